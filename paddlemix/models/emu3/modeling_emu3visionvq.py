# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer: pictures and video to codes of a codebook, and back.

A MoVQ-style autoencoder (Zheng et al. 2022, arXiv 2209.09002; Emu3: arXiv 2409.18869, section 2.2): a 2-D
encoder run on every frame, a few causal 3-D layers that merge four frames into one, a nearest-codeword
quantizer, and the mirror image, whose norms are modulated by the quantized latent. Parameter names are the
released checkpoint's.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.external_ops.nearest_codeword import nearest_codeword
from paddlemix.machine import require_memory, with_memory_released
from paddlemix.paddle_private import group_norm_settings, is_untouched
from paddlemix.utils import InputError

from . import vision_engine
from .checkpoint import CheckpointMixin
from .configuration_emu3 import Emu3VisionVQConfig

LARGEST_PIXEL = 10.0  # decoded ones are a little beyond [-1, 1]; those of 0 to 255 are far from it
BAND = 1 << 22  # numbers of a picture that are computed at once where no gradient is wanted
MOST_WORKSPACE = 500_000_000  # bytes, of bands and of what a convolution takes for itself


def can_use_bands(*layers):
    """Where no gradient is wanted, of layers as they were made, with nothing hooked in or compiled."""
    parts = [part for layer in layers for part in layer.sublayers(include_self=True)]
    plain = all(is_untouched(part) and type(part) in (nn.Conv2D, GroupNorm, SpatialNorm) for part in parts)
    return plain and not paddle.is_grad_enabled() and paddle.in_dynamic_mode()


def in_bands(conv, rows, shape):
    """A 3x3 convolution [N, C, H, W] -> [N, out, H, W] of what `rows(first, end)` gives rows of.

    What comes before a convolution is then never in memory as a whole.
    """
    batch, channels, height, width = shape
    out = paddle.empty([batch, conv.weight.shape[0], height, width], conv.weight.dtype)
    step = max(1, BAND // (batch * channels * width))
    for first in range(0, height, step):
        end = min(first + step, height)
        band = rows(max(first - 1, 0), min(end + 1, height))
        band = F.pad(band, [0, 0, int(first == 0), int(end == height)])
        out[:, :, first:end] = F.conv2d(band, conv.weight, conv.bias, padding=[0, 1])
    return out


def enlarge(x, times, first, end):
    """Rows `first` to `end` of what x [N, C, h, w] is with each number `times` times in both directions."""
    rows = x[:, :, first // times : -(-end // times)]
    rows = rows.repeat_interleave(times, axis=2)[:, :, first % times :][:, :, : end - first]
    return rows.repeat_interleave(times, axis=3)


def norm_and_conv(norm, conv, x, zq=None, dropout=None):
    """conv(silu(norm(x)))"""
    if can_use_bands(norm, conv):
        normed = norm.rows(x, zq)
        return in_bands(conv, lambda first, end: F.silu(normed(first, end)), x.shape)
    h = F.silu(norm(x) if zq is None else norm(x, zq))
    return conv(h if dropout is None else dropout(h))


class Upsample(nn.Layer):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2D(channels, channels, 3, padding=1)

    def forward(self, x):
        if not can_use_bands(self.conv):
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        batch, channels, height, width = x.shape
        rows, size = (lambda first, end: enlarge(x, 2, first, end)), [2 * height, 2 * width]
        return in_bands(self.conv, rows, [batch, channels, *size])


class Downsample(nn.Layer):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2D(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, [0, 1, 0, 1]))  # one column on the right, one row below


class CausalConv3D(nn.Layer):
    """A 3-D convolution that sees two frames of the past and none of the future. [B, C, T, H, W]"""

    def __init__(self, in_channels, out_channels, kernel_size=(3, 1, 1), stride=(1, 1, 1)):
        super().__init__()
        self.padding = []  # innermost axis first, as F.pad takes it
        for k, s in zip(kernel_size[:0:-1], stride[:0:-1], strict=True):
            self.padding += [(k - s + 1) // 2, (k - s) // 2]
        self.padding += [2, 0]
        self.conv = nn.Conv3D(in_channels, out_channels, kernel_size, stride=stride)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding, data_format="NCDHW"))


class TemporalBatchNorm(nn.Layer):
    """BatchNorm3D whose statistics carry the checkpoint's names."""

    def __init__(self, channels):
        super().__init__()
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)
        self.register_buffer("running_mean", paddle.zeros([channels]))
        self.register_buffer("running_var", paddle.ones([channels]))
        self.register_buffer("num_batches_tracked", paddle.zeros([], dtype="int64"))

    def forward(self, x):
        # in float32, as the statistics are, whatever the model's dtype
        out = F.batch_norm(
            x.astype("float32"), self.running_mean, self.running_var, self.weight.astype("float32"),
            self.bias.astype("float32"), training=self.training, momentum=0.9, epsilon=1e-5, data_format="NCDHW",
        )  # fmt: skip
        return out.astype(x.dtype)


class TemporalResnetBlock(nn.Layer):
    def __init__(self, channels, dropout):
        super().__init__()
        self.norm1 = TemporalBatchNorm(channels)
        self.conv1 = CausalConv3D(channels, channels, (3, 3, 3))
        self.norm2 = TemporalBatchNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3D(channels, channels, (3, 3, 3))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(h))))


class TemporalUpsample(nn.Layer):
    def __init__(self, channels):
        super().__init__()
        self.conv = CausalConv3D(channels, channels, (3, 3, 3))

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, axis=2))


class TemporalDownsample(nn.Layer):
    def __init__(self, channels):
        super().__init__()
        self.conv = CausalConv3D(channels, channels, (4, 3, 3), (2, 1, 1))

    def forward(self, x):
        return self.conv(x)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(num_groups=32, num_channels=channels, epsilon=1e-6)

    def forward(self, x, zq=None):
        return super().forward(x)

    def rows(self, x, zq=None):
        """A function of (first, end) that gives these rows of forward(x)."""
        groups, epsilon = group_norm_settings(self)
        batch, channels = x.shape[:2]
        of_group = x.reshape([batch * groups, -1])
        mean, rstd = [], []
        step = max(1, BAND // of_group.shape[1])
        for first in range(0, batch * groups, step):
            some = of_group[first : first + step].astype("float32")
            mean.append(some.mean(axis=1, keepdim=True))
            rstd.append(paddle.rsqrt(((some - mean[-1]) ** 2).mean(axis=1, keepdim=True) + epsilon))
        # [batch * groups, 1] -> [batch, channels, 1, 1]
        mean, rstd = (
            paddle.concat(parts).tile([1, channels // groups]).reshape([batch, channels, 1, 1])
            for parts in (mean, rstd)
        )
        scale = (rstd * self.weight.astype("float32").reshape([1, -1, 1, 1])).astype(x.dtype)
        mean, bias = mean.astype(x.dtype), self.bias.reshape([1, -1, 1, 1])
        return lambda first, end: (x[:, :, first:end] - mean) * scale + bias


class SpatialNorm(nn.Layer):
    """Group norm scaled and shifted, position by position, by the quantized latent `zq`."""

    def __init__(self, channels, zq_channels):
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y = nn.Conv2D(zq_channels, channels, 1)
        self.conv_b = nn.Conv2D(zq_channels, channels, 1)

    def forward(self, x, zq):
        # a 1x1 convolution commutes with nearest upsampling: run it at the latent's size
        scale, shift = self.conv_y(zq), self.conv_b(zq)
        if scale.shape[-2:] != x.shape[-2:]:
            scale = F.interpolate(scale, size=x.shape[-2:], mode="nearest")
            shift = F.interpolate(shift, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * scale + shift

    def rows(self, x, zq):
        """A function of (first, end) that gives these rows of forward(x, zq)."""
        normed, scale, shift = self.norm_layer.rows(x), self.conv_y(zq), self.conv_b(zq)
        times = x.shape[-1] // zq.shape[-1]
        return lambda first, end: (
            normed(first, end) * enlarge(scale, times, first, end) + enlarge(shift, times, first, end)
        )


def make_norm(channels, zq_channels):
    return GroupNorm(channels) if zq_channels is None else SpatialNorm(channels, zq_channels)


class ResnetBlock(nn.Layer):
    def __init__(self, in_channels, out_channels, dropout, zq_channels=None):
        super().__init__()
        self.norm1 = make_norm(in_channels, zq_channels)
        self.conv1 = nn.Conv2D(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, zq_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2D(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2D(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, zq=None):
        h = norm_and_conv(self.norm1, self.conv1, x, zq)
        h = norm_and_conv(self.norm2, self.conv2, h, zq, self.dropout)
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return shortcut + h if paddle.is_grad_enabled() else h.add_(shortcut)


class AttnBlock(nn.Layer):
    """Attention of one head over all positions of a frame."""

    def __init__(self, channels, zq_channels=None):
        super().__init__()
        self.norm = make_norm(channels, zq_channels)
        self.q = nn.Conv2D(channels, channels, 1)
        self.k = nn.Conv2D(channels, channels, 1)
        self.v = nn.Conv2D(channels, channels, 1)
        self.proj_out = nn.Conv2D(channels, channels, 1)

    def forward(self, x, zq=None):
        h = self.norm(x, zq)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # [B, C, H*W]
        weights = F.softmax(paddle.matmul(q, k, transpose_x=True) / math.sqrt(q.shape[1]), axis=-1)
        return x + self.proj_out(paddle.matmul(v, weights, transpose_y=True).reshape(x.shape))


class Level(nn.Layer):
    """The blocks at one resolution, each followed by attention where the resolution has it."""

    def __init__(self, in_channels, out_channels, num_blocks, has_attention, dropout, zq_channels=None):
        super().__init__()
        channels = [in_channels] + [out_channels] * num_blocks
        self.block = nn.LayerList(
            [ResnetBlock(i, o, dropout, zq_channels) for i, o in zip(channels[:-1], channels[1:], strict=True)]
        )
        self.attn = nn.LayerList(
            [AttnBlock(out_channels, zq_channels) for _ in range(num_blocks)] if has_attention else []
        )

    def __iter__(self):
        """Its layers: whoever calls them one by one holds no more than one's input."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]


class Middle(nn.Layer):
    def __init__(self, channels, dropout, zq_channels=None):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, zq_channels)
        self.attn_1 = AttnBlock(channels, zq_channels)
        self.block_2 = ResnetBlock(channels, channels, dropout, zq_channels)

    def forward(self, x, zq=None):
        return self.block_2(self.attn_1(self.block_1(x, zq), zq), zq)


def temporal_steps(config):
    return int(math.log2(config.temporal_downsample_factor))


class Encoder(nn.Layer):
    def __init__(self, config):
        super().__init__()
        channels = [config.ch] + [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2D(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.LayerList()
        for i in range(len(config.ch_mult)):
            level = Level(
                channels[i], channels[i + 1], config.num_res_blocks, i in config.attn_resolutions, config.dropout
            )
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(channels[i + 1])
            self.down.append(level)
        self.mid = Middle(channels[-1], config.dropout)
        self.norm_out = GroupNorm(channels[-1])
        self.conv_out = nn.Conv2D(channels[-1], config.z_channels, 3, padding=1)
        self.time_conv = nn.LayerList([TemporalDownsample(config.z_channels) for _ in range(temporal_steps(config))])
        self.time_res_stack = nn.Sequential(
            *[TemporalResnetBlock(config.z_channels, config.dropout) for _ in range(config.num_res_blocks)]
        )

    def encode_frames(self, x):
        """[N, 3, H, W] -> [N, z, h, w]"""
        if vision_engine.can_run(self, x):
            return vision_engine.encode_frames(self, x)
        h = self.conv_in(x)
        for level in self.down:
            for layer in level:
                h = layer(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return norm_and_conv(self.norm_out, self.conv_out, self.mid(h))

    def merge_frames(self, h):
        """[B, z, T, h, w] -> [B, z, T / 4, h, w]"""
        for conv in self.time_conv:
            h = F.silu(conv(h))
        return self.time_res_stack(h)


class Decoder(nn.Layer):
    def __init__(self, config):
        super().__init__()
        channels = [config.ch * m for m in config.ch_mult]
        top = len(channels) - 1
        self.time_res_stack = nn.Sequential(
            *[TemporalResnetBlock(config.z_channels, config.dropout) for _ in range(config.num_res_blocks)]
        )
        self.time_conv = nn.LayerList([TemporalUpsample(config.z_channels) for _ in range(temporal_steps(config))])
        self.conv_in = nn.Conv2D(config.z_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], config.dropout, config.embed_dim)
        self.up = nn.LayerList()
        for i in range(len(channels)):
            level = Level(
                channels[min(i + 1, top)], channels[i], config.num_res_blocks + 1, i in config.attn_resolutions,
                config.dropout, config.embed_dim,
            )  # fmt: skip
            if i > 0:
                level.upsample = Upsample(channels[i])
            self.up.append(level)
        self.norm_out = SpatialNorm(channels[0], config.embed_dim)
        self.conv_out = nn.Conv2D(channels[0], config.out_channels, 3, padding=1)

    def split_frames(self, z):
        """[B, z, T, h, w] -> [B, z, 4 T, h, w]"""
        z = self.time_res_stack(z)
        for conv in self.time_conv:
            z = F.silu(conv(z))
        return z

    def decode_frames(self, z, zq):
        """Latents and quantized latents [N, z, h, w] -> [N, 3, H, W]"""
        if vision_engine.can_run(self, z, zq):
            return vision_engine.decode_frames(self, z, zq)
        h = self.mid(self.conv_in(z), zq)
        for level in reversed(self.up):
            for layer in level:
                h = layer(h, zq)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return norm_and_conv(self.norm_out, self.conv_out, h, zq)


def feature_bytes(config, pixels, with_engine, itemsize=4):
    """What encoding or decoding so many pixels at once takes beside the weights: features of the first level, times
    what was measured with vision_engine and with the layers."""
    features = pixels * config.ch * itemsize
    return 7 * features if with_engine else 5 * features + MOST_WORKSPACE


class VectorQuantizer(nn.Layer):
    def __init__(self, config):
        super().__init__()
        bound = 1.0 / config.codebook_size
        self.embedding = nn.Embedding(
            config.codebook_size, config.embed_dim, weight_attr=nn.initializer.Uniform(-bound, bound)
        )

    def forward(self, x):
        """Index of the nearest codeword. [..., embed_dim] -> [...] int64"""
        return nearest_codeword(x.reshape([-1, x.shape[-1]]), self.embedding.weight).reshape(x.shape[:-1])


class Emu3VisionVQModel(CheckpointMixin, nn.Layer):
    """Pictures and video <-> codes of a codebook (32,768 codewords in the released model).

    One code stands for 8 x 8 pixels of a picture, and for 8 x 8 pixels of 4 frames of a video.
    """

    config_class = Emu3VisionVQConfig
    repeated = {"ch_mult": r"encoder\.down\.(\d+)\.", "num_res_blocks": r"encoder\.time_res_stack\.(\d+)\."}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = CausalConv3D(config.z_channels, config.embed_dim)
        self.post_quant_conv = CausalConv3D(config.embed_dim, config.z_channels)
        self.spatial_scale_factor = config.spatial_downsample_factor

    @property
    def dtype(self):
        return self.quantize.embedding.weight.dtype

    def forward(self, pixel_values):
        """There and back: pixels [B, 3, H, W] or [B, T, 3, H, W] -> pixels of the same shape."""
        return self.decode(self.encode(pixel_values))

    def latents(self, pixel_values):
        """What is quantized: [B, 3, H, W] or [B, T, 3, H, W] -> [B, T / 4 (1 of a picture), h, w, embed_dim]."""
        self._check_pixels(pixel_values)
        self._require_memory(self.encoder, math.prod(pixel_values.shape[:-3]), math.prod(pixel_values.shape[-2:]))
        pixel_values = pixel_values.astype(self.dtype)
        low, high = float(pixel_values.min()), float(pixel_values.max())
        if not -LARGEST_PIXEL <= low <= high <= LARGEST_PIXEL:  # nor NaN
            raise InputError(
                f"pixel_values must be in [-1, 1], got {low:g} to {high:g}: Emu3VisionVQImageProcessor makes them of "
                "pictures, or divide those of 0 to 255 by 127.5 and subtract 1"
            )
        frames = self.config.temporal_downsample_factor
        if pixel_values.ndim == 4:
            # a picture is four equal frames to the model: encode one, repeat its latent
            h = with_memory_released(self.encoder.encode_frames, pixel_values)
            h = h.unsqueeze(2).expand([-1, -1, frames, -1, -1])
        else:
            h = with_memory_released(self.encoder.encode_frames, pixel_values.flatten(0, 1))
            h = h.reshape([*pixel_values.shape[:2], *h.shape[1:]]).transpose([0, 2, 1, 3, 4])
        return self.quant_conv(self.encoder.merge_frames(h)).transpose([0, 2, 3, 4, 1])

    def encode(self, pixel_values):
        """Codes of pictures or video.

        Args:
            pixel_values: float tensor in [-1, 1]. Pictures [B, 3, H, W], or video [B, T, 3, H, W]; H and W
                multiples of 8, T a multiple of 4 (in the released configuration).

        Returns:
            int64 tensor: [B, H/8, W/8] of pictures, [B, T/4, H/8, W/8] of video.

        Raises:
            InputError (a ValueError): sides or frames that do not divide, another number of axes or channels, NaN, or
                numbers far from [-1, 1].
        """
        codes = self.quantize(self.latents(pixel_values))
        return codes.squeeze(1) if pixel_values.ndim == 4 else codes

    def decode(self, codes):
        """Pictures or video of codes.

        Args:
            codes: integer tensor [B, h, w] of pictures, [B, t, h, w] of video.

        Returns:
            float tensor, about [-1, 1]: [B, 3, 8h, 8w] of pictures, [B, 4t, 3, 8h, 8w] of video.

        Raises:
            InputError (a ValueError): another number of axes, or a code outside the codebook.
        """
        self._check_codes(codes)
        is_picture = codes.ndim == 3
        frames = 1 if is_picture else self.config.temporal_downsample_factor
        self.require_memory_to_decode(math.prod(codes.shape[:-2]) * frames, *codes.shape[-2:])
        if is_picture:
            codes = codes.unsqueeze(1)
        quantized = self.quantize.embedding(codes).transpose([0, 4, 1, 2, 3])  # [B, embed_dim, t, h, w]
        latents = self.post_quant_conv(quantized)
        frames = self.decoder.split_frames(paddle.concat([latents, quantized]))
        if is_picture:
            frames = frames[:, :, :1]  # of the four frames the first is the picture
        z, zq = frames.transpose([0, 2, 1, 3, 4]).chunk(2)  # [B, T, z, h, w]
        pixels = with_memory_released(self.decoder.decode_frames, z.flatten(0, 1), zq.flatten(0, 1))
        return pixels if is_picture else pixels.reshape([*z.shape[:2], *pixels.shape[1:]])

    def require_memory_to_decode(self, frames, height, width):
        """InputError where there is not enough memory to decode frames of so many codes."""
        self._require_memory(self.decoder, frames, height * width * self.spatial_scale_factor**2)

    def memory_to_encode(self, frames, pixels):
        """Bytes that encoding takes beside the weights."""
        return self._memory(self.encoder, frames, pixels)[0]

    def _require_memory(self, half, frames, pixels):
        size, at_once = self._memory(half, frames, pixels)
        require_memory(size, f"for {at_once} pixels at once")

    def _memory(self, half, frames, pixels):
        """(bytes, pixels at once) of frames of so many pixels each."""
        by_frame = vision_engine.can_run(half)
        at_once = pixels if by_frame else frames * pixels
        return feature_bytes(self.config, at_once, by_frame, self.quantize.embedding.weight.element_size()), at_once

    def _check_pixels(self, pixel_values):
        config = self.config
        if not isinstance(pixel_values, paddle.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise InputError(f"pixel_values must be a Paddle tensor of floats in [-1, 1], got {kind}")
        shape = pixel_values.shape
        if 0 in shape:
            raise InputError(f"pixel_values has an axis of no elements: {list(shape)}")
        if len(shape) not in (4, 5) or shape[-3] != config.in_channels:
            raise InputError(
                f"pixel_values must be [B, {config.in_channels}, H, W] or [B, T, {config.in_channels}, H, W], "
                f"got {list(shape)}"
            )
        factor = self.spatial_scale_factor
        if shape[-2] % factor or shape[-1] % factor:
            raise InputError(
                f"height and width must be multiples of {factor}, got {shape[-2]} x {shape[-1]}: "
                "Emu3VisionVQImageProcessor resizes a picture so"
            )
        if len(shape) == 5 and shape[1] % config.temporal_downsample_factor:
            raise InputError(
                f"the number of frames must be a multiple of {config.temporal_downsample_factor}, got {shape[1]}: "
                "repeat the last frame or leave some out"
            )

    def _check_codes(self, codes):
        if not isinstance(codes, paddle.Tensor) or codes.dtype not in (paddle.int64, paddle.int32):
            kind = getattr(codes, "dtype", type(codes).__name__)
            raise InputError(f"codes must be a Paddle tensor of int64 or int32, got {kind}")
        if codes.ndim not in (3, 4) or 0 in codes.shape:
            raise InputError(f"codes must be [B, h, w] or [B, t, h, w], got {list(codes.shape)}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.config.codebook_size:
            raise InputError(
                f"codes must be 0 to {self.config.codebook_size - 1}, got {low} to {high}: "
                "a code is a visual token's id less the first visual token's id"
            )
