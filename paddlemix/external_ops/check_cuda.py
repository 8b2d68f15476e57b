# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checks and times the CUDA kernels on the card that is here; needs nvcc and PyTorch, not Paddle.

    python paddlemix/external_ops/check_cuda.py

Compiles them for the card, compares values and gradients with float64, and tells microseconds beside the memory's
limit: the bytes that must move, at the rate of a large copy. Exit code 1 where a number is wrong, 2 where it cannot
run.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("fused_ln/fused_ln.cu", "nearest_codeword/nearest_codeword.cu")
EPSILON = 1e-5
SHAPES = [(0, 8), (1, 1), (3, 7), (2, 129), (70, 1000), (65, 4096), (5, 20000)]  # rows, columns
LATENTS = [(0, 3, 2), (1, 1, 1), (33, 513, 4), (1030, 100, 5), (200, 777, 32)]  # positions, codewords, dimensions
BEST_OF = 20


def main():
    torch = import_torch()
    kernels = Kernels(torch, build(torch))
    types = {torch.float32: (0, 2e-6), torch.float16: (1, 2e-3), torch.bfloat16: (2, 1.6e-2)}  # code, rounding
    wrong = 0
    for x_type, (x_code, _) in types.items():
        for w_type, (w_code, _) in types.items():
            for layer_norm in (False, True):
                worst = max(
                    check_norm(torch, kernels, shape, (x_type, w_type), (x_code, w_code), layer_norm, offset)
                    / max(types[x_type][1], types[w_type][1])
                    for shape in SHAPES
                    for offset in (0, 1)  # 1: no pointer is aligned to more than a value
                )
                name = f"{'layer' if layer_norm else 'RMS'} norm of {x_type}, scale {w_type}"
                wrong += tell(name, worst <= 1, f"{worst:.2f} of the rounding allowed")
    for positions, size, dim in LATENTS:
        count = check_codewords(torch, kernels, positions, size, dim)
        wrong += tell(f"nearest codeword, {positions} of {size} x {dim}", count == 0, f"{count} wrong")
    time_all(torch, kernels)
    if wrong:
        sys.exit(1)


def import_torch():
    """PyTorch with a card, or the line that says what is missing."""
    try:
        import torch
    except ImportError:
        give_up("PyTorch is not installed: pip install torch")
    if shutil.which("nvcc") is None:
        give_up("nvcc is not found: install the CUDA toolkit, or put its bin folder on PATH")
    if not torch.cuda.is_available():
        give_up("PyTorch sees no CUDA card here")
    return torch


def give_up(why):
    print(f"check_cuda.py: {why}", file=sys.stderr)
    sys.exit(2)


def tell(name, right, detail):
    print(f"{'ok   ' if right else 'WRONG'}  {name}: {detail}", flush=True)
    return not right


def build(torch):
    """One shared library of all kernels, for this card."""
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-shared", "-Xcompiler=-fPIC"]
        run = subprocess.run(
            [*command, *(str(HERE / s) for s in SOURCES), f"-o={library}"], capture_output=True, text=True
        )
        if run.returncode:
            give_up(f"nvcc failed:\n{run.stderr}")
        return ctypes.CDLL(str(library))


class Kernels:
    """The C functions of norm_cuda.h and nearest_codeword_cuda.h on tensors."""

    def __init__(self, torch, library):
        self.torch, self.library = torch, library

    def call(self, name, *args):
        """Tensors go as pointers, None as null, float as float, and int as what `int64` and `int32` made of it."""
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, name)(*map(argument, args), stream)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def norm_forward(self, codes, x, scale, bias):
        rows, cols = x.shape
        y = self.torch.empty_like(x, dtype=scale.dtype)
        mean, invvar = (self.torch.empty(rows, device=x.device) for _ in range(2))
        means = None if bias is None else mean
        self.call("emu3_norm_forward", *map(int32, codes), x, scale, bias, y, means, invvar, int64(rows), int32(cols),
                  ctypes.c_float(EPSILON))  # fmt: skip
        return y, means, invvar

    def norm_backward(self, codes, x, scale, mean, invvar, dy):
        rows, cols = x.shape
        dx, dscale = self.torch.empty_like(x), self.torch.empty_like(scale)
        dbias = None if mean is None else self.torch.empty_like(scale)
        parts = self.library.emu3_norm_parts(int64(rows))
        workspace = self.torch.empty(2 * parts * cols, device=x.device)
        self.call("emu3_norm_backward", *map(int32, codes), x, scale, mean, invvar, dy, dx, dscale, dbias, workspace,
                  int64(rows), int32(cols))  # fmt: skip
        return dx, dscale, dbias

    def nearest_codeword(self, latents, codebook):
        """codebook [size, dim]"""
        codes = self.torch.empty(len(latents), dtype=self.torch.int64, device=latents.device)
        turned = codebook.t().contiguous()
        self.call("emu3_nearest_codeword", latents, (latents * latents).sum(1), turned, (codebook * codebook).sum(1),
                  codes, int64(len(latents)), int32(latents.shape[1]), int32(len(codebook)))  # fmt: skip
        return codes


int32, int64 = ctypes.c_int, ctypes.c_int64


def argument(x):
    return x if isinstance(x, ctypes._SimpleCData) else ctypes.c_void_p(0 if x is None else x.data_ptr())


def random(torch, shape, dtype, offset=0, shift=0.0):
    """Normal numbers whose first lies `offset` values behind the start of its memory, where all is aligned."""
    count = 1
    for n in shape:
        count *= n
    numbers = torch.randn(count + offset, device="cuda") + shift
    return numbers.to(dtype)[offset:].view(shape)


def check_norm(torch, kernels, shape, dtypes, codes, layer_norm, offset):
    """The largest error of values and gradients against float64, of each tensor's largest value."""
    torch.manual_seed(0)
    rows, cols = shape
    x, dy = random(torch, shape, dtypes[0], offset, 0.5), random(torch, shape, dtypes[1], offset)
    scale = random(torch, [cols], dtypes[1], offset)
    bias = random(torch, [cols], dtypes[1], offset) if layer_norm else None
    y, mean, invvar = kernels.norm_forward(codes, x, scale, bias)
    dx, dscale, dbias = kernels.norm_backward(codes, x, scale, mean, invvar, dy)
    x64, scale64 = x.double().requires_grad_(), scale.double().requires_grad_()
    bias64 = bias.double().requires_grad_() if layer_norm else None
    centred = x64 - x64.mean(1, keepdim=True) if layer_norm else x64
    y64 = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + EPSILON) * scale64
    y64 = y64 + bias64 if layer_norm else y64
    y64.backward(dy.double())
    pairs = [(y, y64.detach()), (dscale, scale64.grad)]
    pairs += [(dx, x64.grad)] if cols > 1 else []  # of one column only rounding is left
    pairs += [(dbias, bias64.grad)] if layer_norm else []
    return max(error(got, expected) for got, expected in pairs)


def error(got, expected):
    if not expected.numel():
        return 0.0
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def check_codewords(torch, kernels, positions, size, dim):
    """How many codes are neither the nearest but for rounding nor, of equal codewords, the first."""
    torch.manual_seed(0)
    latents, codebook = random(torch, [positions, dim], torch.float32), random(torch, [size, dim], torch.float32)
    half = size // 2
    codebook[size - half :] = codebook[:half]
    codes = kernels.nearest_codeword(latents, codebook)
    distances = torch.cdist(latents.double(), codebook.double()) ** 2
    chosen = distances.gather(1, codes.unsqueeze(1)).squeeze(1) if positions else distances.sum(1)
    least = distances.min(1).values if positions else distances.sum(1)
    far = chosen > least + 1e-5 * (1 + least)
    return int((far | (codes >= size - half) & (codes - (size - half) < half)).sum())


def time_all(torch, kernels):
    big = torch.empty(1 << 28, device="cuda")
    rate = 2 * big.numel() * 4 / seconds(torch, lambda: big.clone())
    print(f"\n{torch.cuda.get_device_name()}, a copy moves {rate / 1e9:.0f} GB/s")
    print("kernel                                      us   the limit   reached")
    rows, cols = 8192, 4096
    x, dy, scale = (random(torch, s, torch.bfloat16) for s in ([rows, cols], [rows, cols], [cols]))
    bias, codes = torch.zeros_like(scale), (2, 2)
    for name, shift in (("RMS norm", None), ("layer norm", bias)):
        _, mean, invvar = kernels.norm_forward(codes, x, scale, shift)
        forward = seconds(torch, lambda shift=shift: kernels.norm_forward(codes, x, scale, shift))
        line(f"{name} forward, 8192 x 4096 bfloat16", forward, 2 * x.nbytes / rate)
        backward = seconds(torch, lambda m=mean, i=invvar: kernels.norm_backward(codes, x, scale, m, i, dy))
        line(f"{name} backward", backward, 3 * x.nbytes / rate)
    latents, codebook = random(torch, [8100, 4], torch.float32), random(torch, [32768, 4], torch.float32)
    spent = seconds(torch, lambda: kernels.nearest_codeword(latents, codebook))
    line("nearest codeword, 8100 of 32768 x 4", spent, (latents.nbytes + codebook.nbytes + 8 * 8100) / rate)


def line(name, spent, limit):
    print(f"{name:42}{1e6 * spent:8.1f}{1e6 * limit:9.1f} us{limit / spent:8.0%}")


def seconds(torch, function):
    """The best of some calls, by the card's clock, after one that does not count."""
    function()
    best = float("inf")
    for _ in range(BEST_OF):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


if __name__ == "__main__":
    main()
