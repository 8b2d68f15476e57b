# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer's 2-D layers by oneDNN: what Encoder.encode_frames and Decoder.decode_frames compute.

Several times as fast on a CPU as Paddle's eager operators, at little more memory than the weights; with the compiled
operators, whose 3 x 3 convolutions take fewer products, twice as fast again. It is the same network, function by
function as the layers of modeling_emu3visionvq.py, on arrays with the channels last, [1, H, W, C], one frame after
another.
"""

import math

import numpy as np
import paddle
from paddle import nn

from paddlemix.external_ops import operators, winograd
from paddlemix.external_ops.spatial_norm import spatial_norm
from paddlemix.paddle_private import convolution_settings, group_norm_settings, is_untouched, to_tensor

from . import onednn
from .reused_memory import empty, reused_memory

QUERIES = 1024  # of attention at once: never a whole [H*W, H*W] matrix
BAND = 1 << 19  # numbers of a picture that are scaled and shifted at once: they stay in the cache


def can_run(half, *inputs):
    """Whether the encoder or decoder can compute here: float32 on a CPU in eval mode, no gradients wanted, the
    layers as they were made."""
    parameters = half.parameters()
    tensors = [*parameters, *inputs]
    # the temporal layers compute by themselves, before or after
    layers = [half] + [layer for name, layer in half.named_sublayers() if not name.startswith("time_")]
    return (
        onednn.load() is not None
        and paddle.in_dynamic_mode()
        and all(_is_plain(layer) for layer in layers)
        and all(t.dtype == paddle.float32 and t.place.is_cpu_place() for t in tensors)
        and all(t.is_contiguous() for t in parameters)
        and not (paddle.is_grad_enabled() and any(not t.stop_gradient for t in tensors))
    )


def _is_plain(layer):
    """Not in training, a layer as the architecture has it, and nothing hooked in or compiled."""
    if not is_untouched(layer):
        return False
    if type(layer) is nn.Conv2D:  # stride 2 is the downsampling's, which pads by itself
        stride, *how = convolution_settings(layer)
        pad = 0 if stride == [2, 2] else layer.weight.shape[-1] // 2
        return how == [pad, "zeros", [1, 1], 1, "NCHW"] and layer.bias is not None
    return type(layer).__module__.startswith(__package__) or type(layer) in (nn.LayerList, nn.Dropout)


def encode_frames(encoder, pixels):
    """[N, 3, H, W] -> [N, z, h, w]"""
    return _by_frame(lambda x: _encode(encoder, x), pixels)


def decode_frames(decoder, z, zq):
    """Latents and quantized latents [N, z, h, w] -> [N, 3, H, W]"""
    return _by_frame(lambda *frame: _decode(decoder, *frame), z, zq)


def _by_frame(function, *tensors):
    arrays = [np.ascontiguousarray(t.numpy().transpose(0, 2, 3, 1)) for t in tensors]
    with onednn.all_cores(), reused_memory():
        outs = [function(*(a[i : i + 1] for a in arrays)) for i in range(len(arrays[0]))]
    out = np.ascontiguousarray(np.concatenate(outs).transpose(0, 3, 1, 2))
    return to_tensor(out)


def _encode(encoder, x):
    h = _conv(encoder.conv_in, x)
    for level in encoder.down:
        h = _level(level, h)
        if hasattr(level, "downsample"):
            h = _conv(level.downsample.conv, h, stride=2, padding=(0, 1))
    return _norm_and_conv(encoder.norm_out, encoder.conv_out, _middle(encoder.mid, h))


def _decode(decoder, z, zq):
    h = _middle(decoder.mid, _conv(decoder.conv_in, z), zq)
    for level in reversed(decoder.up):
        h = _level(level, h, zq)
        if hasattr(level, "upsample"):
            h = _upsample(level.upsample.conv, h)
    return _norm_and_conv(decoder.norm_out, decoder.conv_out, h, zq)


def _upsample(conv, x):
    """A 3x3 convolution after doubling every pixel sees each pixel twice or thrice: with those weights added up it is
    a 2x2 convolution for each of the 4 places in a doubled pixel, and 4/9 of the arithmetic."""
    _, height, width, _ = x.shape
    out = empty([1, 2 * height, 2 * width, len(conv.bias)])
    if winograd.takes(conv.weight):
        winograd.winograd_conv(x[0], conv.weight, conv.bias, out[0], doubled=True)
        return out
    w = np.ascontiguousarray(conv.weight.numpy().transpose(2, 3, 0, 1))
    for i, rows in enumerate(_pairs(w)):
        for j, weight in enumerate(_pairs(rows.swapaxes(0, 1))):
            pixels = onednn.conv2d(x, weight.transpose(2, 3, 1, 0), conv.bias, padding=(1, 1))
            out[:, i::2, j::2] = pixels[:, i : i + height, j : j + width]
    return out


def _pairs(w):
    """Of three weights along the first axis the two that the first of a doubled pixel sees, and the second."""
    return np.stack([w[0], w[1] + w[2]]), np.stack([w[0] + w[1], w[2]])


def _level(level, x, zq=None):
    for i, block in enumerate(level.block):
        x = _resnet_block(block, x, zq)
        if len(level.attn):
            x = _attention(level.attn[i], x, zq)
    return x


def _middle(middle, x, zq=None):
    x = _attention(middle.attn_1, _resnet_block(middle.block_1, x, zq), zq)
    return _resnet_block(middle.block_2, x, zq)


def _resnet_block(block, x, zq):
    """The sum is made in the memory of its first term, which for most blocks is `x` itself."""
    h = _norm_and_conv(block.norm1, block.conv1, x, zq)
    if block.nin_shortcut is not None:
        x = _conv(block.nin_shortcut, x)
    return _norm_and_conv(block.norm2, block.conv2, h, zq, add_to=x)


def _attention(attn, x, zq):
    h = _norm(attn.norm, x, zq)
    q, k, v = (_conv(conv, h).reshape(-1, h.shape[-1]) for conv in (attn.q, attn.k, attn.v))  # [H*W, C]
    q /= math.sqrt(q.shape[1])
    for i in range(0, len(q), QUERIES):
        weights = onednn.matmul(q[i : i + QUERIES], k.T)
        onednn.softmax(weights)
        q[i : i + QUERIES] = onednn.matmul(weights, v)  # these are not asked for again
    return _conv(attn.proj_out, q.reshape(x.shape), add_to=x)


def _norm_and_conv(norm, conv, x, zq=None, add_to=None):
    """conv(silu(norm(x)))"""
    if winograd.takes(conv.weight):
        return _winograd(conv, x, add_to, _norm_settings(norm, zq, silu=True))
    return _conv(conv, _norm(norm, x, zq, silu=True), add_to=add_to)


def _norm_settings(norm, zq, silu):
    """What spatial_norm takes after x."""
    latent = {}
    if zq is not None:  # 1 x 1 convolutions of the latent, before each of its places becomes many pixels
        latent, norm = {"scale": _conv(norm.conv_y, zq)[0], "shift": _conv(norm.conv_b, zq)[0]}, norm.norm_layer
    groups, epsilon = group_norm_settings(norm)
    return {"weight": norm.weight, "bias": norm.bias, "groups": groups, "epsilon": epsilon, "silu": silu, **latent}


def _norm(norm, x, zq=None, silu=False):
    if operators() is not None:
        return spatial_norm(x[0], **_norm_settings(norm, zq, silu), out=empty(x.shape[1:]))[None]
    if zq is None:
        return onednn.group_norm(x, norm.weight, norm.bias, *group_norm_settings(norm), silu)
    h = _norm(norm.norm_layer, x)
    times = h.shape[1] // zq.shape[1]
    rows = max(1, BAND // (times * h[0, 0].size))  # of the latent
    for i in range(0, zq.shape[1], rows):
        band = h[:, times * i : times * (i + rows)]
        latent = zq[:, i : i + rows].repeat(times, axis=1).repeat(times, axis=2)
        scaled = _conv(norm.conv_y, latent, multiply=band)
        band[:] = _conv(norm.conv_b, latent, add_to=scaled, silu=silu)
    return h


def _conv(conv, x, stride=1, padding=None, add_to=None, **then):
    if stride == 1 and not then and winograd.takes(conv.weight):
        return _winograd(conv, x, add_to)
    if padding is None:
        padding = [conv.weight.shape[-1] // 2] * 2  # the size stays
    return onednn.conv2d(x, conv.weight, conv.bias, stride, padding, add_to, **then)


def _winograd(conv, x, add_to=None, norm=None):
    out = empty([*x.shape[:3], len(conv.bias)]) if add_to is None else add_to
    winograd.winograd_conv(x[0], conv.weight, conv.bias, out[0], add=add_to is not None, norm=norm)
    return out
