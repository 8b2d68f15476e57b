# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checks the CUDA kernels of paddlemix/external_ops on a card and times them; needs nvcc and PyTorch, but not Paddle.

    python tools/check_cuda.py

It builds them for PADDLE_CUDA_ARCH_LIST ("80;90"), else for the card; compares values and gradients with float64, on
tails, pointers that are not aligned, and few and many rows; and gives the bytes a second that a kernel cannot do
without as a share of what a large copy moves. Exit code 1: a number is wrong; 2: nothing could be checked.
"""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    torch = None

OPS = Path(__file__).resolve().parents[1] / "paddlemix" / "external_ops"
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # as in norm_cuda.h
ROUNDING = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of the largest number; sums are of float32
NORM_TYPES = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
              ("float32", "float16")]  # of x, of scale  # fmt: skip
NORM_SHAPES = [(0, 8), (1, 1), (5, 1), (3, 7), (9, 129), (130, 36), (1, 1027), (2, 4100)]
MORE_NORM_SHAPES = [(8200, 33), (70001, 5), (65, 4096), (300, 14336)]  # on a card: every slice of rows, many blocks
CODEBOOKS = [(0, 3, 2), (1, 1, 1), (33, 257, 4), (31, 256, 3), (40, 513, 8), (64, 300, 5), (7, 512, 32)]
MORE_CODEBOOKS = [(8100, 32768, 4), (100003, 1000, 4)]  # positions, size, dim
QUANTIZED = [(dtype, bits) for dtype in ("float16", "bfloat16") for bits in (8, 4)]
LINEAR_SHAPES = [(0, 16, 1), (1, 16, 1), (2, 144, 33), (3, 512, 130), (8, 272, 7), (11, 256, 40), (34, 400, 129),
                 (77, 128, 16)]  # rows, in, out  # fmt: skip
MORE_LINEAR_SHAPES = [(2, 4096, 184622), (16, 14336, 4096), (34, 4096, 1024), (4097, 4096, 1000)]  # the released sizes
STEP_KINDS = [(dtype, bits) for dtype in ("float16", "bfloat16") for bits in (16, 8, 4)]
STEPS = [([3], 1, 1, 1, 16, 32, 48), ([270, 16], 1, 4, 1, 64, 48, 32), ([40], 17, 2, 2, 16, 16, 16),
         ([20, 258], 5, 4, 2, 32, 144, 16), ([1, 2, 3, 4, 5, 6, 7, 8, 300], 1, 2, 1, 16, 16, 144),
         ([64], 64, 1, 1, 16, 32, 16), ([257, 20], 2, 3, 3, 144, 16, 16)]  # fmt: skip
# lengths with the new tokens, how many are new, heads, key heads, head_dim, hidden, inner
RELEASED = 32, 8, 128, 4096, 14336
MORE_STEPS = [([4100, 3], 1, *RELEASED), ([4100, 700], 17, *RELEASED), ([300] * 16, 1, *RELEASED),
              ([8190], 64, *RELEASED)]  # fmt: skip
PICKS = [(1, 1, 1, 0), (1, 2, 5, 2), (2, 1, 33, 1), (2, 3, 257, 7), (1, 1, 1025, 1000), (2, 2, 4097, 64),
         (1, 1, 5000, 4999), (2, 1, 300, 0)]  # rows, positions, tokens, top_k
MORE_PICKS = [(2, 1, 32768, 2048), (2, 16, 32768, 2048), (1, 1, 184622, 2048), (1, 8, 184622, 0)]  # the released sizes
ACCEPTS = [(1, 1, 1, 0), (2, 1, 1, 1), (2, 1, 16, 0), (40, 16, 2, 0), (33, 3, 16, 1), (64, 2, 7, 0), (300, 9, 64, 0)]
ACCEPTS += [(rows, 1 + rows // 3, picks, 0) for rows in (4, 64) for picks in (3, 5, 8, 32)]
# rows, sequences, picks, ids that were read without a pick
EPSILON = 1e-5
MARGIN = 64  # values before and after each tensor


def main():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return "nvcc was not found: install CUDA's toolkit, or put its bin folder on PATH"
    if torch is None:
        return f"PyTorch was not found: install it for {sys.executable}, or run this with the Python that has it"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA card"
    try:
        architectures = architectures_asked() or ["{}{}".format(*torch.cuda.get_device_capability())]
    except ValueError as error:
        return str(error)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "emu3_cuda.so")
        built = subprocess.run(build_command(nvcc, architectures, library), capture_output=True, text=True)
        if built.returncode:
            return f"nvcc failed for sm_{', sm_'.join(architectures)}:\n{built.stdout}{built.stderr}"
        library = ctypes.CDLL(str(library))
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, sm_{', sm_'.join(architectures)}")
        limit = copied_bytes_a_second()
        print(f"a large copy moves {limit / 1e9:.0f} GB/s")
        rows, wrong = check(
            library, "cuda", NORM_SHAPES + MORE_NORM_SHAPES, CODEBOOKS + MORE_CODEBOOKS,
            LINEAR_SHAPES + MORE_LINEAR_SHAPES, STEPS + MORE_STEPS, PICKS + MORE_PICKS,
        )  # fmt: skip
        print(table(rows, times(library), limit))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def architectures_asked():
    """["80", "90"] of PADDLE_CUDA_ARCH_LIST, "80;90" or "8.0 9.0"; empty where it is not set."""
    asked = os.environ.get("PADDLE_CUDA_ARCH_LIST", "")
    found = [one for one in re.split(r"[;,\s]+", asked) if one]
    if not all(re.fullmatch(r"\d{2,3}|\d+\.\d", one) for one in found):
        raise ValueError(f'PADDLE_CUDA_ARCH_LIST must be as "80;90" or "8.0;9.0", got {asked!r}')
    return [one.replace(".", "") for one in found]


def build_command(nvcc, architectures, library):
    codes = [word for sm in architectures for word in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-I{OPS}"]
    return [nvcc, *flags, *codes, *map(str, sorted(OPS.glob("*/*.cu"))), "-o", str(library)]


def guarded(values, dtype, device, offset):
    """A copy of values amid MARGIN NaNs on each side, `offset` values past an aligned pointer; and all of it."""
    values = torch.as_tensor(values)
    whole = torch.full([values.numel() + 2 * MARGIN + offset], float("nan"), device=device, dtype=dtype)
    inner = whole[MARGIN + offset : MARGIN + offset + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner, whole


def untouched(inner, whole):
    """True where nothing was written around `inner`."""
    start = inner.storage_offset()
    return bool(whole[:start].isnan().all() and whole[start + inner.numel() :].isnan().all())


def stream(device):
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if device == "cuda" else 0)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def norm_arguments(x, scale):
    """The types, and the sizes, of a call of emu3_norm_*."""
    types = [TYPES[str(tensor.dtype).removeprefix("torch.")] for tensor in (x, scale)]
    return types, [ctypes.c_int64(size) for size in x.shape]


def norm_forward(library, x, scale, bias, y, mean, rstd):
    types, sizes = norm_arguments(x, scale)
    pointers = map(pointer, (x, scale, bias, y, mean, rstd))
    return library.emu3_norm_forward(*types, *pointers, *sizes, ctypes.c_float(EPSILON), stream(x.device.type))


def norm_backward(library, x, scale, mean, rstd, dy, dx, dscale, dbias, workspace):
    types, sizes = norm_arguments(x, scale)
    pointers = map(pointer, (x, scale, mean, rstd, dy, dx, dscale, dbias, workspace))
    return library.emu3_norm_backward(*types, *pointers, *sizes, stream(x.device.type))


def search(library, latents, codebook, codes):
    """codebook [dim, size]"""
    squares = [(latents * latents).sum(1), (codebook * codebook).sum(0)]
    pointers = map(pointer, (latents, squares[0], codebook, squares[1], codes))
    sizes = map(ctypes.c_int64, (*latents.shape, codebook.shape[1]))
    error = library.emu3_nearest_codeword(*pointers, *sizes, stream(latents.device.type))
    if latents.is_cuda:
        torch.cuda.synchronize()  # the squares live till here
    return error


def norm_reference(x, scale, bias, dy):
    """{name: (float64 values, the size of the terms that they are sums of)} by PyTorch; RMS norm where bias is None."""
    x, scale, dy = (tensor.double().requires_grad_() for tensor in (x, scale, dy))
    bias = None if bias is None else bias.double().requires_grad_()
    mean = x.mean(1, keepdim=True) if bias is not None else torch.zeros_like(x[:, :1])
    rstd = torch.rsqrt(((x - mean) ** 2).mean(1, keepdim=True) + EPSILON)
    y = (x - mean) * rstd * scale
    y = y if bias is None else y + bias
    asked = [x, scale] + ([] if bias is None else [bias])
    gradients = torch.autograd.grad(y, asked, dy.detach())
    expected = {"y": y, "mean": mean[:, 0], "rstd": rstd[:, 0]}
    expected |= dict(zip(("dx", "dscale", "dbias"), gradients))
    sizes = {name: float(values.detach().abs().max()) if values.numel() else 0 for name, values in expected.items()}
    if x.numel():  # of few columns dx is a difference of larger numbers
        sizes["dx"] = max(sizes["dx"], float((dy * scale * rstd).detach().abs().max()))
    return {name: (values.detach(), max(sizes[name], 1e-3)) for name, values in expected.items()}


def check_norm(library, device, shape, x_type, w_type, with_bias, offset):
    """{name: error, 1 at what rounding may do}, and what else is wrong in words."""
    rows, cols = shape
    random = torch.Generator().manual_seed(rows * 31 + cols)
    x_dtype, w_dtype = getattr(torch, x_type), getattr(torch, w_type)
    buffers = {}

    def put(name, values, dtype):
        buffers[name] = guarded(values, dtype, device, offset)
        return buffers[name][0]

    x = put("x", torch.randn(shape, generator=random) + 0.5, x_dtype)
    scale = put("scale", torch.randn(cols, generator=random), w_dtype)
    bias = put("bias", torch.randn(cols, generator=random), w_dtype) if with_bias else None
    dy = put("dy", torch.randn(shape, generator=random), w_dtype)

    def fresh(name, shape, dtype):
        return put(name, torch.full(shape, float("nan")), dtype)  # what is not written is found

    floats = torch.float32
    y, dx = fresh("y", shape, w_dtype), fresh("dx", shape, x_dtype)
    rstd, dscale = fresh("rstd", [rows], floats), fresh("dscale", [cols], w_dtype)
    mean, dbias = (fresh("mean", [rows], floats), fresh("dbias", [cols], w_dtype)) if with_bias else (None, None)
    workspace = fresh("workspace", [2, library.emu3_norm_parts(ctypes.c_int64(rows)), cols], floats)

    codes = []
    for _ in range(2):
        codes.append(norm_forward(library, x, scale, bias, y, mean, rstd))
        codes.append(norm_backward(library, x, scale, mean, rstd, dy, dx, dscale, dbias, workspace))
        got = {name: buffers[name][0].clone() for name in ("y", "mean", "rstd", "dx", "dscale", "dbias")
               if name in buffers}  # fmt: skip
        if len(codes) == 2:
            before = got
    wrong = [f"CUDA error {code}" for code in codes if code]
    wrong += [f"{name} differs from call to call" for name in got if not same(got[name], before[name])]
    wrong += [f"something was written beside {name}" for name, pair in buffers.items() if not untouched(*pair)]
    errors = {}
    expected = norm_reference(x, scale, bias, dy)
    for name, values in got.items():
        allowed = ROUNDING[str(values.dtype).removeprefix("torch.")] * (2 if name.startswith("d") else 1)
        errors[name] = worst(values, *expected[name]) / allowed
    return errors, wrong


def same(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def worst(got, expected, size):
    """The largest difference as a share of size; infinite where a number is none."""
    difference = (got.double() - expected).abs().nan_to_num(float("inf"))
    return float(difference.max()) / size if got.numel() else 0.0


def check_search(library, device, positions, size, dim, offset):
    """As check_norm. Half of the codewords come twice, and the first is right."""
    random = torch.Generator().manual_seed(positions + size)
    once = (size + 1) // 2
    codebook = torch.randn(once, dim, generator=random)
    codebook = torch.cat([codebook, codebook[: size - once]]).to(device)
    latents, around = guarded(torch.randn(positions, dim, generator=random), torch.float32, device, offset)
    by_dim, around_codebook = guarded(codebook.t(), torch.float32, device, offset)
    whole = torch.full([positions + 2 * MARGIN], -7, dtype=torch.int64, device=device)
    codes = whole[MARGIN : MARGIN + positions]
    error = search(library, latents, by_dim, codes)
    wrong = [f"CUDA error {error}"] if error else []
    if not (untouched(latents, around) and untouched(by_dim, around_codebook)
            and bool((whole[:MARGIN] == -7).all() and (whole[MARGIN + positions :] == -7).all())):  # fmt: skip
        wrong.append("something was written beside the codes")
    if positions and (int(codes.min()) < 0 or int(codes.max()) >= once):
        return {"codes": float("inf")}, [*wrong, "codes are not the first of equal ones"]
    errors = [0.0]
    for start in range(0, positions, 256):
        some = latents[start : start + 256].double()
        distances = ((some[:, None] - codebook[None, :once].double()) ** 2).sum(2)
        chosen = distances.gather(1, codes[start : start + 256, None])[:, 0]
        terms = (some * some).sum(1) + (codebook.double() ** 2).sum(1).max()  # the distance is a difference of those
        errors.append(float(((chosen - distances.min(1).values) / terms).max()) / ROUNDING["float32"])
    return {"codes": max(errors)}, wrong


def quantized_weight(bits, out, inputs, random, device):
    """A packed weight, its scale, and its value as float64 [out, in]: the layout of external_ops/README.md."""
    groups = 1 if bits == 8 else -(-inputs // 128)
    largest = 2 ** (bits - 1) - 1
    levels = torch.randint(-largest, largest + 1, (out, inputs), generator=random, device=device)
    scale = torch.rand(out, groups, generator=random, device=device) / largest
    per_input = scale.repeat_interleave(128, 1)[:, :inputs] if bits == 4 else scale
    packed = levels.to(torch.int8)
    if bits == 4:
        halves = torch.nn.functional.pad(levels, (0, groups * 128 - inputs)).view(out, groups, 2, 64) + 8
        packed = (halves[:, :, 0] + 16 * halves[:, :, 1]).to(torch.uint8).view(out, -1)
    return packed, scale, levels * per_input.double()


def quantized_linear(library, bits, x, weight, scale, y):
    """x [rows, in], y [rows, out]"""
    pointers = map(pointer, (x, weight, scale, y))
    sizes = map(ctypes.c_int64, (*x.shape, y.shape[1]))
    kind = TYPES[str(x.dtype).removeprefix("torch.")]
    return library.emu3_quantized_linear(kind, bits, *pointers, *sizes, stream(x.device.type))


def check_quantized(library, device, rows, inputs, out, dtype, bits, offset):
    """As check_norm."""
    random = torch.Generator(device).manual_seed(rows + out)
    weight, scale, values = quantized_weight(bits, out, inputs, random, device)
    at = 8 * offset  # values: addresses of 16 bytes are what the kernel asks for
    x, around_x = guarded(torch.randn(rows, inputs, generator=random, device=device), getattr(torch, dtype), device, at)
    y, around = guarded(torch.full([rows, out], float("nan")), getattr(torch, dtype), device, at)
    codes, results = [], []
    for _ in range(2):
        codes.append(quantized_linear(library, bits, x, weight, scale, y))
        results.append(y.clone())
    wrong = [f"CUDA error {code}" for code in codes if code]
    wrong += [] if same(*results) else ["y differs from call to call"]
    wrong += [] if untouched(y, around) and untouched(x, around_x) else ["something was written beside y"]
    expected = x.double() @ values.t()
    return {"y": worst(y, expected, float(expected.abs().max()) if rows else 1) / ROUNDING[dtype]}, wrong


class DecoderStep(ctypes.Structure):
    """Emu3DecoderStep of decoder_step_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "input_norm", "post_norm")),
        ("weights", ctypes.c_void_p * 7), ("scales", ctypes.c_void_p * 7),
        *((name, ctypes.c_void_p) for name in
          ("cosine", "sine", "key", "value", "lengths", "row_slots", "y", "workspace")),
        *((name, ctypes.c_int64) for name in
          ("batch", "news", "hidden", "heads", "kv_heads", "dim", "inner", "angles", "slots", "capacity")),
        ("epsilon", ctypes.c_float), ("type", ctypes.c_int), ("bits", ctypes.c_int),
    ]  # fmt: skip


def as_step(epsilon, x, norms, weights, scales, cosine, sine, key, value, lengths, row_slots, y):
    """A DecoderStep of these tensors, PyTorch's or Paddle's, without its workspace. It does not keep them alive."""
    batch, news, hidden = x.shape
    slots, kv_heads, capacity, dim = key.shape
    x_type, weight_type = (str(tensor.dtype).split(".")[1] for tensor in (x, weights[0]))
    step = DecoderStep(
        batch=batch, news=news, hidden=hidden, heads=weights[0].shape[0] // dim, kv_heads=kv_heads, dim=dim,
        inner=weights[4].shape[0], angles=cosine.shape[0], slots=slots, capacity=capacity,
        epsilon=epsilon, type=TYPES[x_type], bits={"int8": 8, "uint8": 4}.get(weight_type, 16),
    )  # fmt: skip
    tensors = {"x": x, "input_norm": norms[0], "post_norm": norms[1], "cosine": cosine, "sine": sine, "key": key,
               "value": value, "lengths": lengths, "row_slots": row_slots, "y": y}  # fmt: skip
    for name, tensor in tensors.items():
        setattr(step, name, None if tensor is None else tensor.data_ptr())
    for i, (weight, scale) in enumerate(zip(weights, scales)):
        step.weights[i], step.scales[i] = weight.data_ptr(), None if scale is None else scale.data_ptr()
    return step


def decoder_step(library, step, device):
    return library.emu3_decoder_step(ctypes.byref(step), stream(device))


def with_workspace(library, step, device):
    """The workspace, amid NaNs, which the step is given; and all of it."""
    size = ctypes.c_int64()
    library.emu3_decoder_step_bytes(ctypes.byref(step), ctypes.byref(size))
    inner, whole = guarded(torch.full([size.value // 4], float("nan")), torch.float32, device, 0)
    step.workspace = inner.data_ptr()
    return inner, whole


def step_weights(heads, kv_heads, dim, hidden, inner, dtype, bits, random, device):
    """Seven weights, seven scales, and seven times float64 [out, in], as large as keeps numbers near 1."""
    shapes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden), (hidden, heads * dim),
              (inner, hidden), (inner, hidden), (hidden, inner)]  # fmt: skip
    found = []
    for out, inputs in shapes:
        size = 2.0 ** -round(math.log2(inputs) / 2)
        if bits == 16:
            weight = (torch.randn(out, inputs, generator=random, device=device) * size).to(getattr(torch, dtype))
            found.append((weight, None, weight))
        else:
            weight, scale, values = quantized_weight(bits, out, inputs, random, device)
            found.append((weight, scale * size, values * size))
    return zip(*found)


def step_reference(x, norms, weights, theta, key, value, lengths, slots):
    """y in float64; new tokens are put into key and value, float64. theta [batch, news, 1, dim / 2]"""
    batch, news, _ = x.shape
    dim, cos, sin = key.shape[3], theta.cos(), theta.sin()

    def linear(x, weight):
        return x @ weight.double().t()

    def norm(x, scale):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * scale.double()

    def rotated(y):
        first, second = y.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    h = norm(x, norms[0])
    q, k, v = (linear(h, weight).view(batch, news, -1, dim) for weight in weights[:3])
    q, k, group = rotated(q), rotated(k), q.shape[2] // k.shape[2]
    attended = []
    for row, (length, slot) in enumerate(zip(lengths, slots)):
        key[slot, :, length - news : length] = k[row].transpose(0, 1)
        value[slot, :, length - news : length] = v[row].transpose(0, 1)
        keys, values = (x[slot, :, :length].repeat_interleave(group, 0) for x in (key, value))
        scores = q[row].transpose(0, 1) @ keys.transpose(1, 2) / dim**0.5  # [heads, news, length]
        late = torch.ones(news, length, dtype=torch.bool, device=x.device).triu(length - news + 1)
        out = scores.masked_fill(late, -math.inf).softmax(-1) @ values
        attended.append(out.transpose(0, 1).reshape(news, -1))
    x = x + linear(torch.stack(attended), weights[3])
    h = norm(x, norms[1])
    return x + linear(torch.nn.functional.silu(linear(h, weights[4])) * linear(h, weights[5]), weights[6])


def check_step(library, device, lengths, news, heads, kv_heads, dim, hidden, inner, dtype, bits, offset):
    """As check_norm. Slots are out of order, and what no query sees is NaN."""
    random = torch.Generator(device).manual_seed(sum(lengths) + dim)
    at, of_16_bits, batch = 8 * offset, getattr(torch, dtype), len(lengths)
    slots = [batch + 1, *range(batch - 1)]
    buffers = {}

    def put(name, *shape, shift=0.0, size=1.0, fill=None):
        values = torch.full(shape, fill) if fill else torch.randn(shape, generator=random, device=device) * size + shift
        buffers[name] = guarded(values, of_16_bits, device, at)
        return buffers[name][0]

    x, norms = put("x", batch, news, hidden), [put(f"norm {i}", hidden, shift=1, size=0.2) for i in range(2)]
    weights, scales, values64 = step_weights(heads, kv_heads, dim, hidden, inner, dtype, bits, random, device)
    theta = 7 * torch.rand(batch, news, 1, dim // 2, generator=random, device=device).double()
    cos, sin = theta.cos().float(), theta.sin().float()
    angles = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    cache = [put(name, batch + 2, kv_heads, max(lengths) + 3, dim) for name in ("key", "value")]
    new = torch.zeros(cache[0].shape[:3], dtype=torch.bool, device=device)
    for tensor in cache:
        old = torch.zeros_like(new)
        for slot, length in zip(slots, lengths):
            old[slot, :, : length - news] = new[slot, :, length - news : length] = True
            new[slot, :, : length - news] = False
        tensor[~old] = float("nan")
    before = [tensor.clone() for tensor in cache]
    rows = [torch.tensor(numbers, device=device) for numbers in (lengths, slots)]
    y = put("y", batch, news, hidden, fill=float("nan"))
    step = as_step(EPSILON, x, norms, weights, scales, *angles, *cache, *rows, y)
    buffers["the workspace"] = with_workspace(library, step, device)
    codes, results = [], []
    for _ in range(2):
        codes.append(decoder_step(library, step, device))
        results.append(y.clone())
    cache64 = [tensor.double() for tensor in before]
    expected = step_reference(x.double(), norms, values64, theta, *cache64, lengths, slots)
    wrong = [f"CUDA error {code}" for code in codes if code]
    wrong += [] if same(*results) else ["y differs from call to call"]
    wrong += [f"something was written beside {name}" for name, pair in buffers.items() if not untouched(*pair)]
    errors = {"y": worst(y, expected, float(expected.abs().max()))}
    for name, tensor, was, values in zip(("key", "value"), cache, before, cache64):
        errors[name] = worst(tensor[new], values[new], float(values[new].abs().max()))
        wrong += [] if same(tensor[~new], was[~new]) else [f"another {name} than the new ones was written"]
    return {name: error / (2 * ROUNDING[dtype]) for name, error in errors.items()}, wrong  # it rounds several times


def pick_token(library, logits, noise, ids, top_k, top_p, scale, temperature, first):
    """logits [rows, positions, tokens], noise [positions, tokens] or None, ids int64 [positions]"""
    pointers = map(pointer, (logits, noise, ids))
    sizes = map(ctypes.c_int64, (*logits.shape, top_k))
    numbers = map(ctypes.c_float, (scale, temperature, top_p))
    return library.emu3_pick_token(*pointers, *sizes, *numbers, ctypes.c_int64(first), stream(logits.device.type))


def picked(logits, noise, top_k, top_p, scale, temperature):
    """What pick_token.cuh's plain loop picks, each operation rounded to float32, but top_p's sums."""
    values = logits[0] if len(logits) == 1 else logits[1] + scale * (logits[0] - logits[1])
    if noise is not None:
        values = values / torch.full_like(values, temperature)  # by a number PyTorch multiplies by its inverse
        if 0 < top_k < values.shape[1]:
            least = values.topk(top_k, dim=1).values.min(1, keepdim=True).values
            values = torch.where(values < least, -float("inf"), values)
        if top_p < 1:
            ordered = values.sort(dim=1, descending=True).values.double()
            weights = torch.softmax(ordered, 1)
            is_kept = weights.cumsum(1) - weights < torch.tensor(top_p).double()  # a float32 number
            least = torch.where(is_kept, ordered, float("inf")).min(1, keepdim=True).values
            values = torch.where(values < least, -float("inf"), values)
        values = values + noise
    tokens = torch.arange(values.shape[1], device=values.device)
    is_largest = values == values.max(1, keepdim=True).values
    return torch.where(is_largest, tokens, values.shape[1]).min(1).values  # the first of equal ones


def check_pick(library, device, rows, positions, tokens, top_k, offset):
    """As check_norm. Many logits are equal, and noise is large, so that each token that is kept may be picked."""
    random = torch.Generator().manual_seed(tokens + top_k)
    values = (torch.randn(rows, positions, tokens, generator=random) * 64).round() / 16
    logits, around_logits = guarded(values, torch.float32, device, offset)
    noise, around_noise = guarded(100 * torch.randn(positions, tokens, generator=random), torch.float32, device, offset)
    whole = torch.full([positions + 2 * MARGIN], -7, dtype=torch.int64, device=device)
    ids, wrong = whole[MARGIN : MARGIN + positions], []
    cases = [(noise, top_k, 1), (None, top_k, 1), (noise, 1, 1), (noise, 0, 1), (noise, top_k, 0.9), (noise, 0, 0.4)]
    for some_noise, k, p in cases:
        error = pick_token(library, logits, some_noise, ids, k, p, 3.0, 0.7, 9)
        wrong += [f"CUDA error {error}"] if error else []
        if not bool((ids == 9 + picked(logits, some_noise, k, p, 3.0, 0.7)).all()):
            with_noise = "with noise" if some_noise is noise else "without noise"
            wrong.append(f"other tokens are picked with top_k={k}, top_p={p}, {with_noise}")
    around = [whole[:MARGIN] == -7, whole[MARGIN + positions :] == -7]
    if not (untouched(logits, around_logits) and untouched(noise, around_noise) and bool(torch.cat(around).all())):
        wrong.append("something was written beside the ids")
    return {"ids": float("inf") if wrong else 0.0}, wrong  # there is no rounding in them


def accept_tokens(library, ids, past, windows, forced, numbers, next_ids, next_past):
    pointers = map(pointer, (ids, past, windows, forced, numbers, next_ids, next_past))
    sizes = map(ctypes.c_int64, (*ids.shape, windows.shape[1], forced.shape[1]))
    return library.emu3_accept_tokens(*pointers, *sizes, stream(ids.device.type))


def window_arguments(device, rows, sequences, picks, unpicked, places=8190):
    """Of emu3_accept_tokens: few kinds of ids, so that many guesses are right; some rows are at their end."""
    random = torch.Generator().manual_seed(rows + picks)

    def some(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    forced = some(-4, 2, sequences, places).clip(-1)
    sequence, at, base, stays = (some(0, high, rows) for high in (sequences, places - 1, 9, 5))
    end = torch.where(stays == 0, 0, base + places - 1 - picks)
    numbers = torch.stack([sequence, base, end, torch.full_like(base, unpicked)], 1)
    given = some(0, 2, rows, picks + unpicked), base + at - unpicked, some(0, 2, sequences, picks), forced, numbers
    return [tensor.contiguous().to(device) for tensor in given]


def check_accept(library, device, rows, sequences, picks, unpicked):
    """As check_norm, against accept_tokens.cuh's plain loop."""
    given = window_arguments(device, rows, sequences, picks, unpicked)
    next_ids = torch.full([rows + 2, picks], -7, device=device)
    next_past = torch.full([rows + 2], -7, device=device)
    error = accept_tokens(library, *given, next_ids[1:-1], next_past[1:-1])
    expected = [[-7] * picks], [-7]
    ids, past, windows, forced, numbers = (tensor.tolist() for tensor in given)
    for row, cached, (sequence, base, end, skipped) in zip(ids, past, numbers):
        before, known, last = cached + skipped - base, forced[sequence], len(forced[sequence]) - 1
        fixed = [known[min(max(before + 1 + i, 0), last)] for i in range(2 * picks)]
        tokens = [windows[sequence][min(i, picks - 1)] if id < 0 else id for i, id in enumerate(fixed)]
        right = 1
        while right < picks and row[skipped + right] == tokens[right - 1]:
            right += 1
        right = max(0, min(right, end - cached - skipped))
        expected[0].append(tokens[max(right, 1) - 1 :][:picks])
        expected[1].append(cached + skipped + right)
    wrong = [f"CUDA error {error}"] if error else []
    if (next_ids.tolist(), next_past.tolist()) != (expected[0] + [[-7] * picks], expected[1] + [-7]):
        wrong.append("other guesses are accepted, or something was written beside them")
    return {"ids": float("inf") if wrong else 0.0}, wrong


def check_refusals(library, device):
    """What the C functions must refuse: types that are none, sizes past those of a grid or an int, long latents."""
    one = torch.ones(1, 1, device=device)
    p, n, sixteen, none = pointer(one), *map(ctypes.c_int64, (1, 16, 2**40))
    calls = {
        "type 3": library.emu3_norm_forward(3, 0, *[p] * 6, n, n, ctypes.c_float(1), stream(device)),
        "2^40 rows": library.emu3_norm_forward(0, 0, *[p] * 6, none, n, ctypes.c_float(1), stream(device)),
        "2^40 columns": library.emu3_norm_backward(0, 0, *[p] * 9, n, none, stream(device)),
        "dim 33": library.emu3_nearest_codeword(*[p] * 5, n, ctypes.c_int64(33), n, stream(device)),
        "2^40 codewords": library.emu3_nearest_codeword(*[p] * 5, n, n, none, stream(device)),
        "quantized type 0": library.emu3_quantized_linear(0, 8, *[p] * 4, n, sixteen, n, stream(device)),
        "3 bits": library.emu3_quantized_linear(2, 3, *[p] * 4, n, sixteen, n, stream(device)),
        "a step of nothing": decoder_step(library, DecoderStep(), device),
        "17 inputs": library.emu3_quantized_linear(2, 8, *[p] * 4, n, ctypes.c_int64(17), n, stream(device)),
        "3 rows to pick from": pick_token(library, torch.ones(3, 1, 1, device=device), one, one, 0, 1, 1, 1, 0),
        "temperature 0": pick_token(library, torch.ones(1, 1, 1, device=device), one, one, 0, 1, 1, 0, 0),
        "top_p 0": pick_token(library, torch.ones(1, 1, 1, device=device), one, one, 0, 0, 1, 1, 0),
        "more picks than ids": library.emu3_accept_tokens(*[p] * 7, n, n, sixteen, n, stream(device)),
    }
    return [f"{name}: accepted" for name, code in calls.items() if code != 1]  # cudaErrorInvalidValue


def step_types(dtype, bits):
    return dtype if bits == 16 else f"{dtype}, int{bits}"


def check(
    library, device, norm_shapes=NORM_SHAPES, codebooks=CODEBOOKS, linear_shapes=LINEAR_SHAPES, steps=STEPS, picks=PICKS
):
    """([(kernel, types, cases, largest error as a share of what is allowed)], what is wrong in words)"""
    cases = {}
    for layer in (False, True):
        for types in NORM_TYPES:
            cases["layer norm" if layer else "RMS norm", " -> ".join(types)] = [
                (f"{shape} + {offset}", check_norm, (shape, *types, layer, offset))
                for shape in norm_shapes
                for offset in (0, 1)
            ]
    cases["nearest codeword", "float32"] = [
        (f"{sizes} + {offset}", check_search, (*sizes, offset)) for sizes in codebooks for offset in (0, 1)
    ]
    for dtype, bits in QUANTIZED:
        cases["quantized linear", f"{dtype}, int{bits}"] = [
            (f"{sizes} + {offset}", check_quantized, (*sizes, dtype, bits, offset))
            for sizes in linear_shapes
            for offset in (0, 1)
        ]
    for dtype, bits in STEP_KINDS:
        cases["decoder step", step_types(dtype, bits)] = [
            (f"{sizes} + {offset}", check_step, (*sizes, dtype, bits, offset)) for sizes in steps for offset in (0, 1)
        ]
    cases["pick token", "float32"] = [
        (f"{sizes} + {offset}", check_pick, (*sizes, offset)) for sizes in picks for offset in (0, 1)
    ]
    cases["accept tokens", "int64"] = [(f"{sizes}", check_accept, sizes) for sizes in ACCEPTS]
    rows, wrong = [], check_refusals(library, device)
    for (kernel, types), calls in cases.items():
        largest = 0.0
        for name, function, arguments in calls:
            errors, words = function(library, device, *arguments)
            words += [
                f"{what} is {error:.2g} times what rounding may do" for what, error in errors.items() if error > 1
            ]
            wrong += [f"{kernel}, {types}, {name}: {what}" for what in words]
            largest = max(largest, *errors.values())
        rows.append((kernel, types, len(calls), largest))
    return rows, wrong


def seconds(call, repeats=20):
    """The middle one of `repeats`, on the card."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks[3:])[repeats // 2] / 1e3


def copied_bytes_a_second():
    source = torch.zeros(min(2**30, torch.cuda.mem_get_info()[0] // 4), dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: copy.copy_(source))


def times(library, rows=16384, cols=4096, positions=8100, size=32768, dim=4):
    """{(kernel, types): [(what, seconds, bytes that must move)]} of one large case."""
    found = {}
    for layer in (False, True):
        for x_type, w_type in NORM_TYPES:
            x_dtype, w_dtype = getattr(torch, x_type), getattr(torch, w_type)
            x = torch.randn(rows, cols, device="cuda").to(x_dtype)
            dy, scale = torch.randn(rows, cols, device="cuda").to(w_dtype), torch.ones(cols, device="cuda").to(w_dtype)
            bias, mean = (scale, torch.empty(rows, device="cuda")) if layer else (None, None)
            y, dx, rstd = torch.empty_like(dy), torch.empty_like(x), torch.empty(rows, device="cuda")
            dscale, dbias = torch.empty_like(scale), torch.empty_like(scale) if layer else None
            workspace = torch.empty(2, library.emu3_norm_parts(ctypes.c_int64(rows)), cols, device="cuda")
            forward = (library, x, scale, bias, y, mean, rstd)
            backward = (library, x, scale, mean, rstd, dy, dx, dscale, dbias, workspace)
            found["layer norm" if layer else "RMS norm", f"{x_type} -> {w_type}"] = [
                ("forward", seconds(lambda f=forward: norm_forward(*f)), x.nbytes + y.nbytes),
                ("backward", seconds(lambda b=backward: norm_backward(*b)), x.nbytes + dy.nbytes + dx.nbytes),
            ]
    latents, codebook = torch.randn(positions, dim, device="cuda"), torch.randn(dim, size, device="cuda")
    codes = torch.empty(positions, dtype=torch.int64, device="cuda")
    moved = latents.nbytes + codebook.nbytes + codes.nbytes
    squares = [(latents * latents).sum(1), (codebook * codebook).sum(0)]
    pointers = [pointer(tensor) for tensor in (latents, squares[0], codebook, squares[1], codes)]
    sizes = [ctypes.c_int64(number) for number in (positions, dim, size)]
    call = seconds(lambda: library.emu3_nearest_codeword(*pointers, *sizes, stream("cuda")))
    found["nearest codeword", "float32"] = [("search, bound by arithmetic", call, moved)]
    for dtype, bits in QUANTIZED:
        found["quantized linear", f"{dtype}, int{bits}"] = [
            (f"{rows} rows of 4096 x 14336", *time_quantized(library, dtype, bits, rows)) for rows in (1, 2, 8, 34)
        ]
    for dtype, bits in STEP_KINDS:
        found["decoder step", step_types(dtype, bits)] = [
            (f"a layer, {2 * new} tokens over 4,100 keys", *time_step(library, dtype, bits, new)) for new in (1, 17)
        ]
    found["pick token", "float32"] = [
        (f"{rows} x {positions} x {tokens}, top_k {k}", *time_pick(library, rows, positions, tokens, k))
        for rows, positions, tokens, k in MORE_PICKS
    ]
    found["pick token", "float32"].append(
        ("2 x 16 x 32768, top_k 2048, top_p 0.9", *time_pick(library, 2, 16, 32768, 2048, 0.9))
    )
    given = window_arguments("cuda", 2, 1, 16, 0)
    ids, past = torch.empty_like(given[0]), torch.empty_like(given[1])
    took = seconds(lambda: accept_tokens(library, *given, ids, past))
    found["accept tokens", "int64"] = [("2 rows of 15 guesses, bound by its launch", took, 3 * ids.nbytes)]
    return found


def time_pick(library, rows, positions, tokens, top_k, top_p=1):
    """(seconds, bytes that must be read); what PyTorch takes for its topk of the same sizes stands beside the table."""
    logits = torch.randn(rows, positions, tokens, device="cuda")
    noise, ids = torch.randn_like(logits[0]), torch.empty(positions, dtype=torch.int64, device="cuda")
    took = seconds(lambda: pick_token(library, logits, noise, ids, top_k, top_p, 3.0, 0.7, 9))
    if top_k and top_p == 1:
        torchs = seconds(lambda: logits[0].topk(top_k, dim=1, sorted=False))
        sizes = f"{positions} x {tokens}, top_k {top_k}"
        print(f"{sizes}: PyTorch's topk alone {1e6 * torchs:.0f} us, pick token with all of it {1e6 * took:.0f} us")
    return took, logits.nbytes + noise.nbytes


def time_quantized(library, dtype, bits, rows, out=14336, inputs=4096, copies=10):
    """(seconds, bytes of the weight) of one of many weights, so that none is in the card's cache."""
    weights = torch.randint(0, 256, (copies, out, inputs * bits // 8), dtype=torch.uint8, device="cuda")
    scale = torch.ones(out, 1 if bits == 8 else inputs // 128, device="cuda")
    x = torch.randn(rows, inputs, device="cuda").to(getattr(torch, dtype))
    y = torch.empty(rows, out, device="cuda", dtype=x.dtype)

    def all_of_them():
        for weight in weights:
            quantized_linear(library, bits, x, weight, scale, y)

    return seconds(all_of_them, repeats=10) / copies, weights[0].nbytes


def time_step(library, dtype, bits, new, rows=2, keys=4100, layers=3):
    """(seconds of a layer of the released shape, bytes of its weights and of the keys and values), in a CUDA graph of
    some layers, so that none is in the card's cache."""
    heads, kv_heads, dim, hidden, inner = RELEASED
    random, of_16_bits = torch.Generator("cuda").manual_seed(0), getattr(torch, dtype)
    x, y = (torch.randn(rows, new, hidden, device="cuda").to(of_16_bits) for _ in "xy")
    norm, angles = torch.ones(hidden, device="cuda", dtype=of_16_bits), torch.ones(1, new, 1, dim, device="cuda")
    numbers, steps, kept = torch.tensor([[keys] * rows, [*range(rows)]], device="cuda"), [], []
    for _ in range(layers):
        weights, scales, _ = step_weights(heads, kv_heads, dim, hidden, inner, dtype, bits, random, "cuda")
        cache = [torch.randn(rows, kv_heads, keys + new, dim, device="cuda").to(of_16_bits) for _ in "kv"]
        steps.append(as_step(EPSILON, x, [norm] * 2, weights, scales, angles, angles, *cache, *numbers, y))
        kept.append((weights, scales, cache, with_workspace(library, steps[-1], "cuda")))

    def all_of_them():
        for step in steps:
            decoder_step(library, step, "cuda")

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    moved = sum(weight.nbytes for weight in weights) + 2 * rows * kv_heads * keys * dim * 2
    return seconds(graph.replay, repeats=10) / layers, moved


def table(rows, timed, limit):
    lines = ["| kernel | types | cases | error / allowed | large case | ms | GB/s | of the copy |", "|" + "---|" * 8]
    for kernel, types, cases, error in rows:
        for what, took, moved in timed[kernel, types]:
            share = f"{1e3 * took:.3f} | {moved / took / 1e9:.0f} | {moved / took / limit:.0%}"
            lines.append(f"| {kernel} | {types} | {cases} | {error:.2f} | {what} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    result = main()
    if isinstance(result, str):
        print(f"check_cuda.py: {result}", file=sys.stderr)
        result = 2
    sys.exit(result)
