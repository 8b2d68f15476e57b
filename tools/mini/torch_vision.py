# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer in PyTorch, to train it: the architecture and parameter names of the released model.

The counterpart of paddlemix/models/emu3/modeling_emu3visionvq.py, for pictures alone. Norms of the temporal
blocks work with fixed statistics, so that training and use compute the same.

A group norm of few channels makes each place depend on the whole picture. At the start, biases before the norms
therefore alternate between +OFFSET and -OFFSET: they make up most of a group's variance, whatever the picture shows,
and the norm's own scale and shift undo them.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ", "codebook_size": 12288, "embed_dim": 12,
    "z_channels": 12, "double_z": False, "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4,
    "ch": 64, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [3], "dropout": 0.0,
}  # fmt: skip


OFFSET = 1.0


def alternating(channels):
    return torch.tensor([OFFSET, -OFFSET]).repeat(channels // 2)


def before_norm(conv):
    """A convolution whose output goes to a group norm."""
    with torch.no_grad():
        conv.bias.copy_(alternating(conv.out_channels))
    return conv


class _GroupNorm(torch.autograd.Function):
    """PyTorch's group norm; its backward pass is slow for bfloat16 with channels last, this one is not."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups):
        b, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, 1e-6)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        groups = mean.shape[1]
        sum_g = gradient.sum(dim=(2, 3), dtype=torch.float32)  # [B, C]
        sum_gx = (gradient * x).sum(dim=(2, 3), dtype=torch.float32)
        mean, rstd = (t.float().repeat_interleave(c // groups, dim=1) for t in (mean, rstd))
        weight = weight.float()
        centred = sum_gx - mean * sum_g

        def over_group(t):
            t = t.reshape(b, groups, -1).mean(dim=2) / (h * w)
            return t.repeat_interleave(c // groups, dim=1)

        slope = -over_group(weight * centred) * rstd**3
        shift = -slope * mean - over_group(weight * sum_g) * rstd
        scale, slope, shift = ((t[:, :, None, None]).to(x.dtype) for t in (weight * rstd, slope, shift))
        gx = torch.addcmul(shift, x, slope).addcmul_(gradient, scale)
        return gx, (centred * rstd).sum(dim=0), sum_g.sum(dim=0), None


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)
        with torch.no_grad():
            self.weight.fill_((OFFSET**2 + 1) ** 0.5)
            self.bias.copy_(-alternating(channels))

    def forward(self, x, zq=None):
        with torch.autocast("cpu", enabled=False):
            return _GroupNorm.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.num_groups)


class SpatialNorm(nn.Module):
    """Group norm scaled and shifted by the quantized latent."""

    def __init__(self, channels, zq_channels):
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y = nn.Conv2d(zq_channels, channels, 1)
        self.conv_b = nn.Conv2d(zq_channels, channels, 1)
        nn.init.ones_(self.conv_y.bias)

    def forward(self, x, zq):
        scale, shift = (F.interpolate(conv(zq), size=x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


def make_norm(channels, zq_channels):
    return SpatialNorm(channels, zq_channels) if zq_channels else GroupNorm(channels)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, zq_channels=None):
        super().__init__()
        self.norm1 = make_norm(in_channels, zq_channels)
        self.conv1 = before_norm(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.norm2 = make_norm(out_channels, zq_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = before_norm(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x, zq=None):
        h = self.conv1(F.silu(self.norm1(x, zq)))
        h = self.conv2(F.silu(self.norm2(h, zq)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels, zq_channels=None):
        super().__init__()
        self.norm = make_norm(channels, zq_channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, zq=None):
        h = self.norm(x, zq)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [B, h*w, C]
        h = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = before_norm(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x):
        return self.conv(F.pad(x, [0, 1, 0, 1]))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = before_norm(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Level(nn.Module):
    def __init__(self, in_channels, out_channels, num_blocks, has_attention, zq_channels=None):
        super().__init__()
        channels = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList([ResnetBlock(i, o, zq_channels) for i, o in zip(channels, channels[1:])])
        self.attn = nn.ModuleList([AttnBlock(out_channels, zq_channels) for _ in range(num_blocks * has_attention)])

    def forward(self, x, zq=None):
        for i, block in enumerate(self.block):
            x = block(x, zq)
            x = self.attn[i](x, zq) if len(self.attn) else x
        return x


class Middle(nn.Module):
    def __init__(self, channels, zq_channels=None):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, zq_channels)
        self.attn_1 = AttnBlock(channels, zq_channels)
        self.block_2 = ResnetBlock(channels, channels, zq_channels)

    def forward(self, x, zq=None):
        return self.block_2(self.attn_1(self.block_1(x, zq), zq), zq)


class CausalConv3d(nn.Module):
    """Sees two frames of the past. Starts near "the present frame as it is" where channels allow. [B, C, T, H, W]"""

    def __init__(self, in_channels, out_channels, kernel_size=(3, 1, 1), stride=(1, 1, 1), start=1.0):
        super().__init__()
        side = kernel_size[1] // 2
        self.padding = [side, side, side, side, 2, 0]
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)
            for i in range(min(in_channels, out_channels)):
                self.conv.weight[i, i, -1, side, side] += start
            self.conv.bias.zero_()

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class TemporalResnetBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3), start=0.0)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class TimeConv(nn.Module):
    def __init__(self, channels, kernel_size, stride):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel_size, stride)
        nn.init.ones_(self.conv.conv.bias)  # the silu after it is then nearly linear at the start

    def forward(self, x):
        return self.conv(x)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        channels = [c["ch"]] + [c["ch"] * m for m in c["ch_mult"]]
        top = len(c["ch_mult"]) - 1
        self.conv_in = before_norm(nn.Conv2d(c["in_channels"], c["ch"], 3, padding=1))
        self.down = nn.ModuleList()
        for i in range(top + 1):
            level = Level(channels[i], channels[i + 1], c["num_res_blocks"], i in c["attn_resolutions"])
            if i < top:
                level.downsample = Downsample(channels[i + 1])
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = GroupNorm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], c["z_channels"], 3, padding=1)
        self.time_conv = nn.ModuleList([TimeConv(c["z_channels"], (4, 3, 3), (2, 1, 1)) for _ in range(2)])
        self.time_res_stack = nn.Sequential(*[TemporalResnetBlock(c["z_channels"]) for _ in range(c["num_res_blocks"])])

    def forward(self, x):
        """[B, 3, H, W] -> [B, z, 1, h, w]: a picture is four equal frames, merged into one"""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        h = h.unsqueeze(2).expand(-1, -1, 4, -1, -1)
        for conv in self.time_conv:
            h = F.silu(conv(h))
        return self.time_res_stack(h)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        channels = [c["ch"] * m for m in c["ch_mult"]]
        top, zq = len(channels) - 1, c["embed_dim"]
        self.time_res_stack = nn.Sequential(*[TemporalResnetBlock(c["z_channels"]) for _ in range(c["num_res_blocks"])])
        self.time_conv = nn.ModuleList([TimeConv(c["z_channels"], (3, 3, 3), (1, 1, 1)) for _ in range(2)])
        self.conv_in = before_norm(nn.Conv2d(c["z_channels"], channels[-1], 3, padding=1))
        self.mid = Middle(channels[-1], zq)
        self.up = nn.ModuleList()
        for i in range(top + 1):
            below = channels[min(i + 1, top)]
            level = Level(below, channels[i], c["num_res_blocks"] + 1, i in c["attn_resolutions"], zq)
            if i > 0:
                level.upsample = Upsample(channels[i])
            self.up.append(level)
        self.norm_out = SpatialNorm(channels[0], zq)
        self.conv_out = nn.Conv2d(channels[0], c["out_channels"], 3, padding=1)

    def forward(self, latents, quantized):
        """[B, z, 1, h, w] twice -> [B, 3, H, W], the first of the four frames: no other is before it"""
        z = self.time_res_stack(torch.cat([latents, quantized]))
        for conv in self.time_conv:
            z = F.silu(conv(z))
        z, zq = z.squeeze(2).chunk(2)
        h = self.mid(self.conv_in(z), zq)
        for level in reversed(self.up):
            h = level(h, zq)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h, zq)))


class Quantizer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c["codebook_size"], c["embed_dim"])

    def forward(self, x):
        """Nearest codewords: [..., embed_dim] -> [...]"""
        book = self.embedding.weight
        flat = x.reshape(-1, x.shape[-1])
        return ((book * book).sum(1) - 2 * flat @ book.T).argmin(1).reshape(x.shape[:-1])


class VisionTokenizer(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or CONFIG
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = CausalConv3d(config["z_channels"], config["embed_dim"])
        self.post_quant_conv = CausalConv3d(config["embed_dim"], config["z_channels"])
        for weight in self.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()  # statistics stay 0 and 1: the same numbers in training and use
        return self

    def latents(self, pixels):
        """[B, 3, H, W] in [-1, 1] -> [B, h, w, embed_dim]"""
        return self.quant_conv(self.encoder(pixels)).squeeze(2).permute(0, 2, 3, 1)

    def encode(self, pixels):
        """[B, 3, H, W] in [-1, 1] -> codes [B, h, w]"""
        return self.quantize(self.latents(pixels))

    def decode_latents(self, latents):
        """[B, h, w, embed_dim] -> [B, 3, H, W]"""
        quantized = latents.permute(0, 3, 1, 2).unsqueeze(2)
        return self.decoder(self.post_quant_conv(quantized), quantized)

    def decode(self, codes):
        return self.decode_latents(self.quantize.embedding(codes))
