# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The CUDA kernels where no card is: compiled with nvcc, and their arithmetic run on a CPU (cuda_on_host/)."""

import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.utils import cpp_extension
from test_norms import EPSILON, error, reference, tensor
from test_pick_token import accepted

from paddlemix.external_ops.few_rows_linear import dequantize, quantize
from paddlemix.external_ops.pick_token import example_of_passes

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"  # which conftest.py puts on sys.path

import check_cuda

OPS = ROOT / "paddlemix" / "external_ops"
HOST = Path(__file__).parent / "cuda_on_host"
SOURCES = sorted(str(path.relative_to(OPS)) for path in OPS.rglob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc (of CUDA's toolkit) was not found")


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_setup_collects_every_source(monkeypatch):
    """With a CUDA build of Paddle and nvcc; nothing is compiled."""
    asked = {}
    monkeypatch.setenv("PADDLE_CUDA_ARCH_LIST", "80;90")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name, **_: name)
    monkeypatch.setattr(cpp_extension, "CUDAExtension", lambda **given: given)
    monkeypatch.setattr(cpp_extension, "setup", lambda **given: asked.update(given["ext_modules"]))
    monkeypatch.chdir(OPS)  # where setup.py goes; and back
    runpy.run_path(str(OPS / "setup.py"))
    assert [source for source in asked["sources"] if source.endswith(".cu")] == SOURCES != []


@needs_nvcc
@pytest.mark.parametrize("cards", [(80,), pytest.param((80, 90), marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_cards(source, cards, tmp_path):
    """The same kernels for sm_80 and sm_90, no register spilled, and what its C header names comes out."""
    targets = [word for sm in cards for word in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
    log = run(
        NVCC, "-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xptxas=-v", "--threads=2", *targets,
        "-I", OPS, "-c", OPS / source, "-o", tmp_path / "out.o",
    )  # fmt: skip
    kernels = [set(re.findall(rf"Compiling entry function '(\w+)' for 'sm_{sm}'", log)) for sm in cards]
    assert kernels[0] and all(of_card == kernels[0] for of_card in kernels)
    assert set(re.findall(r"\d+ bytes spill \w+", log)) == {"0 bytes spill stores", "0 bytes spill loads"}
    headers = "".join(path.read_text() for path in (OPS / source).parent.glob("*_cuda.h"))
    exported = re.findall(r" T (?!_Z)(\w+)", run("nm", "--defined-only", tmp_path / "out.o"))
    assert sorted(exported) == sorted(re.findall(r"\bint (emu3_\w+)\(", headers)) != []


@pytest.mark.long
@needs_nvcc
def test_compiles_for_an_older_card(tmp_path):
    """A T4: it keeps norms, codewords and picks; the tensor cores' kernels do nothing there."""
    for name in ("few_rows_linear", "nearest_codeword", "decoder_step", "pick_token"):
        source = OPS / name / f"{name}.cu"
        run(NVCC, "-O1", "-std=c++17", "-arch=sm_75", "-I", OPS, "-c", source, "-o", tmp_path / "out.o")


@needs_nvcc
@pytest.mark.parametrize(
    "source",
    [
        f"{name}/{name}.cc"
        for name in ("few_rows_linear", "fused_ln", "nearest_codeword", "decoder_step", "pick_token")
    ],
)
def test_paddle_side_compiles_with_cuda(source):
    """What a CUDA build of Paddle compiles, against this Paddle's headers; Python's part of them asks for cuBLAS's."""
    cuda = Path(run(NVCC, "--dryrun", "x.cu").split("_HERE_=")[1].split("\n")[0].strip()).parent
    includes = [OPS, paddle.sysconfig.get_include(), f"{paddle.sysconfig.get_include()}/third_party"]
    includes += [sysconfig.get_paths()["include"], cuda / "include" / "cccl", cuda / "include"]
    defines = ["-DPADDLE_WITH_CUDA", "-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_NO_PYTHON"]
    run("g++", "-fsyntax-only", "-std=c++17", *defines, *(f"-I{path}" for path in includes), OPS / source)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build_for_host(tmp_path_factory.mktemp("kernels"))


def build_for_host(folder, change=lambda code: code):
    """The CUDA sources compiled by g++ with cuda_on_host, loaded."""
    for path in (*OPS.rglob("*.cu"), *OPS.rglob("*.cuh"), *OPS.rglob("*_cuda.h")):
        if (HOST / path.name).exists():
            continue
        copy = folder / path.relative_to(OPS)
        copy.parent.mkdir(exist_ok=True)
        launch = r"([\w:]+(?:<[^<>;]*>)?)\s*<<<([^;]*?)>>>\(([^;]*)\);"
        code, found = re.subn(launch, r"cuda_on_host::launch(\2, [&] { \1(\3); });", change(path.read_text()))
        assert "<<<" not in code and bool(found) == ("__global__" in code), path
        copy.write_text(code)
    sources = [word for source in SOURCES for word in ("-x", "c++", folder / source)]
    run(
        "g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off",
        "-I", HOST, *sources, "-o", folder / "kernels.so",
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(params=["forwards", "backwards"])
def order(request, kernels):
    """A card runs warps in any order."""
    ctypes.c_int.in_dll(kernels, "cuda_on_host_backwards").value = request.param == "backwards"


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def like(tensor, shape=None, dtype=None):
    """A tensor of NaNs to be written to."""
    return paddle.full(tensor.shape if shape is None else shape, float("nan"), dtype or tensor.dtype)


@pytest.mark.parametrize("types", [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (130, 36), (2, 1027), (1, 4100)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_norm(kernels, order, layer_norm, shape, types):
    rng = np.random.default_rng(0)
    (x, x64), (scale, scale64), (dy, dy64) = (
        tensor(rng, *given) for given in [(shape, types[0], 0.5), (shape[1:], types[1]), (shape, types[1])]
    )
    bias, bias64 = tensor(rng, shape[1:], types[1]) if layer_norm else (None, None)
    y, rstd, dx, dscale = like(dy), like(x, shape[:1], "float32"), like(x), like(scale)
    mean, dbias = (like(rstd), like(scale)) if layer_norm else (None, None)
    codes, sizes = [TYPES[name] for name in types], [ctypes.c_int64(size) for size in shape]
    pointers = map(address, (x, scale, bias, y, mean, rstd))
    assert kernels.emu3_norm_forward(*codes, *pointers, *sizes, ctypes.c_float(EPSILON), None) == 0
    workspace = like(x, [2, kernels.emu3_norm_parts(sizes[0]), shape[1]], "float32")
    pointers = map(address, (x, scale, mean, rstd, dy, dx, dscale, dbias, workspace))
    assert kernels.emu3_norm_backward(*codes, *pointers, *sizes, None) == 0

    y64, mean64, rstd64, dx64, dscale64, dbias64 = reference(x64, scale64, bias64, dy64)
    rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
    expected = [(y, y64), (rstd, rstd64), (dscale, dscale64)] + ([(dx, dx64)] if shape[1] > 1 else [])
    for got, values in expected + ([(mean, mean64), (dbias, dbias64)] if layer_norm else []):
        if values.size:
            assert error(got, values) < 2 * rounding[got.dtype.name.lower()]


@pytest.mark.parametrize("positions, size, dim", [(0, 3, 2), (1, 1, 1), (33, 513, 4), (40, 256, 8), (7, 300, 32)])
def test_nearest_codeword(kernels, order, positions, size, dim):
    rng = np.random.default_rng(2)
    latents, codebook = (rng.standard_normal([n, dim]).astype(np.float32) for n in (positions, size))
    codebook[size // 2 :] = codebook[: size - size // 2]  # of equal codewords the first
    squares = [(values * values).sum(1) for values in (latents, codebook)]
    codes = np.full(positions, -1)
    arrays = latents, squares[0], np.ascontiguousarray(codebook.T), squares[1], codes
    pointers = [ctypes.c_void_p(values.ctypes.data) for values in arrays]
    assert kernels.emu3_nearest_codeword(*pointers, *map(ctypes.c_int64, (positions, dim, size)), None) == 0
    distances = ((latents[:, None].astype(np.float64) - codebook) ** 2).sum(-1)
    assert codes.tolist() == distances.argmin(1).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "rows, inputs, out", [(0, 16, 3), (1, 16, 1), (2, 400, 33), (9, 256, 17), (34, 144, 20), (70, 272, 16)]
)
def test_quantized_linear(kernels, order, rows, inputs, out, bits, dtype):
    rng = np.random.default_rng(3)
    weight, scale = quantize(tensor(rng, (out, inputs), "float32")[0], bits)
    x, x64 = tensor(rng, (rows, inputs), dtype)
    y = like(x, [rows, out])
    sizes = map(ctypes.c_int64, (rows, inputs, out))
    assert kernels.emu3_quantized_linear(TYPES[dtype], bits, *map(address, (x, weight, scale, y)), *sizes, None) == 0
    if rows:
        expected = x64 @ dequantize(weight, scale, inputs).numpy().astype(np.float64).T
        assert error(y, expected) < {"float16": 5e-4, "bfloat16": 4e-3}[dtype]  # half a step of the result's own


# tokens of each row, the new ones with them; how many are new; heads, key heads, head_dim
STEPS = [
    ([5], 1, 2, 2, 64), ([300, 17, 513], 1, 4, 1, 128), ([520, 40], 17, 4, 1, 64),
    ([1, 2, 3, 4, 5, 256, 257, 258, 9], 1, 2, 2, 80), ([300], 44, 2, 1, 256),
]  # fmt: skip


def rms_norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def layer64(x, norms, weights, theta, key, value, lengths, slots):
    """The layer in float64; the new tokens are put into key and value. theta [batch, news, 1, dim / 2]"""
    batch, news, _ = x.shape
    kv_heads, dim = key.shape[1], key.shape[3]
    wq, wk, wv, wo, gate, up, down = weights

    def rotated(y):
        first, second = np.split(y, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(theta) - second * np.sin(theta), second * np.cos(theta) + first * np.sin(theta)], axis=-1
        )

    h = rms_norm(x, norms[0])
    q, k, v = ((h @ w.T).reshape([batch, news, -1, dim]) for w in (wq, wk, wv))
    q, k = rotated(q), rotated(k)
    attended, group = np.empty_like(q), q.shape[2] // kv_heads
    for b, (length, slot) in enumerate(zip(lengths, slots)):
        for i in range(news):
            at = length - news + i
            key[slot, :, at], value[slot, :, at] = k[b, i], v[b, i]
            for head in range(q.shape[2]):
                seen = key[slot, head // group, : at + 1], value[slot, head // group, : at + 1]
                weight = np.exp(seen[0] @ q[b, i, head] / np.sqrt(dim))
                attended[b, i, head] = weight @ seen[1] / weight.sum()
    x = x + attended.reshape([batch, news, -1]) @ wo.T
    h = rms_norm(x, norms[1])
    gated = h @ gate.T
    return x + (gated / (1 + np.exp(-gated)) * (h @ up.T)) @ down.T


def make_step(lengths, news, heads, kv_heads, dim, dtype, weights, hidden=144, inner=272):
    """Random arguments of emu3_decoder_step, and those of layer64. Nobody's keys are NaN; slots are out of order."""
    rng = np.random.default_rng(4)
    batch, capacity = len(lengths), max(lengths) + 3
    slots = [batch + 1, *range(batch - 1)]
    x, x64 = tensor(rng, [batch, news, hidden], dtype)
    norms, norms64 = zip(*(tensor(rng, [hidden], dtype, 1) for _ in range(2)))
    shapes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden), (hidden, heads * dim)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    given, scales, given64 = [], [], []
    for out, inputs in shapes:
        weight = paddle.to_tensor((rng.standard_normal([out, inputs]) / np.sqrt(inputs)).astype(np.float32))
        packed = (weight.astype(dtype), None) if weights == "16 bits" else quantize(weight, int(weights[-1]))
        given.append(packed[0])
        scales.append(packed[1])
        value = packed[0].astype("float32") if packed[1] is None else dequantize(*packed, inputs)
        given64.append(value.numpy().astype(np.float64))
    theta = rng.uniform(0, 7, [batch, news, 1, dim // 2])
    doubled = np.cos(theta), np.cos(theta), -np.sin(theta), np.sin(theta)
    angles = [paddle.to_tensor(np.concatenate(pair, -1).astype(np.float32)) for pair in (doubled[:2], doubled[2:])]
    cache = rng.standard_normal([2, batch + 2, kv_heads, capacity, dim])
    known = np.zeros(cache.shape[1:4], bool)
    for slot, length in zip(slots, lengths):
        known[slot, :, : length - news] = True
    cache[:, ~known] = np.nan
    cache = [paddle.to_tensor(x.astype(np.float32)).astype(dtype) for x in cache]
    cache64 = [x.astype("float32").numpy().astype(np.float64) for x in cache]
    rows = paddle.to_tensor(lengths), paddle.to_tensor(slots)
    step = x, norms, given, scales, *angles, *cache, *rows, like(x)
    return step, (x64, norms64, given64, theta, *cache64, lengths, slots)


@pytest.mark.parametrize("weights", ["16 bits", "int8", "int4"])
@pytest.mark.parametrize("case", range(len(STEPS)))
def test_decoder_step(kernels, order, case, weights):
    dtype = ("float16", "bfloat16")[case % 2]
    tensors, expected = make_step(*STEPS[case], dtype, weights)
    before = [x.clone() for x in tensors[6:8]]
    step, size = check_cuda.as_step(EPSILON, *tensors), ctypes.c_int64()
    assert kernels.emu3_decoder_step_bytes(ctypes.byref(step), ctypes.byref(size)) == 0
    workspace = paddle.full([size.value // 4 + 4], float("nan"))
    step.workspace = workspace.data_ptr()
    assert kernels.emu3_decoder_step(ctypes.byref(step), None) == 0
    y64, rounding = layer64(*expected), {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert error(tensors[-1], y64) < 2 * rounding
    assert workspace[size.value // 4 :].isnan().all()
    for now, was, right in zip(tensors[6:8], before, expected[4:6]):
        now, was = (x.astype("float32").numpy() for x in (now, was))
        new = np.isnan(was) & ~np.isnan(right)
        assert new.sum() == len(STEPS[case][0]) * STEPS[case][1] * STEPS[case][3] * STEPS[case][4]
        np.testing.assert_array_equal(now[~new], was[~new])
        assert np.abs(now[new] - right[new]).max() < 2 * rounding * np.abs(right[new]).max()


def picked(logits, noise, top_k, scale, temperature, top_p):
    """By a sort, each operation rounded to float32, but top_p's sums: ids [positions]."""
    values = logits[0] if len(logits) == 1 else logits[1] + np.float32(scale) * (logits[0] - logits[1])
    if noise is None:
        return values.argmax(-1)
    values = values / np.float32(temperature)
    least = np.sort(values, axis=-1)[:, -top_k, None] if 0 < top_k < values.shape[1] else -np.inf
    values = np.where(values < least, -np.float32(np.inf), values)
    if top_p < 1:
        ordered = -np.sort(-values, axis=-1)
        with np.errstate(invalid="ignore"):  # infinite logits
            weights = np.exp((ordered - ordered[:, :1]).astype(np.float64))
        weights /= weights.sum(-1, keepdims=True)
        before = weights.cumsum(-1) - weights  # of equal ones that of the first decides
        is_first = ordered[:, 1:] < ordered[:, :-1]
        assert np.abs(before[:, 1:] - np.float32(top_p)).min(initial=1, where=is_first) > 1e-6  # or rounding decides
        least = np.where(before < np.float32(top_p), ordered, np.inf).min(-1, keepdims=True)
        values = np.where(values < least, -np.float32(np.inf), values)
    return (values + noise).argmax(-1)


PICKS = [(1, 0, 5, 2), (1, 1, 1, 0), (2, 3, 5, 2), (1, 2, 1030, 1029), (2, 2, 5000, 7), (2, 1, 300, 1), (1, 1, 9000, 9)]


@pytest.mark.parametrize("rows, positions, tokens, top_k", PICKS)
@pytest.mark.parametrize("kind", ["equal ones", "any", "infinite"])
def test_pick_token(kernels, order, rows, positions, tokens, top_k, kind):
    """Of many equal logits, some at the top_k-th; of logits of all sizes and both signs; of which some are infinite."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal([rows, positions, tokens]).astype(np.float32)
    if kind == "equal ones":
        logits = np.round(4 * logits) / 4
    elif kind == "any":
        logits *= np.float32(10) ** rng.integers(-30, 30, logits.shape).astype(np.float32)
    else:
        logits[0, :, ::3] = -np.inf
    noise = 100 * rng.standard_normal([positions, tokens]).astype(np.float32)  # each that is kept may win
    cases = [(noise, 3.0, 0.7, 1, 9), (None, 1.5, 2.0, 1, 0), (np.round(noise), -1, 1.0, 1, 2**40),
             (noise, 3.0, 0.7, 0.9, 0), (noise, 2.0, 4.0, 0.3, 0), (noise, 1.0, 1.0, 1e-15, 0)]  # fmt: skip
    for given, scale, temperature, top_p, first in cases:
        ids = np.full(positions + 1, -7)
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (logits, given, ids)]
        sizes = map(ctypes.c_int64, (rows, positions, tokens, top_k))
        numbers = map(ctypes.c_float, (scale, temperature, top_p))
        assert kernels.emu3_pick_token(*pointers, *sizes, *numbers, ctypes.c_int64(first), None) == 0
        assert ids.tolist() == [*(first + picked(logits, given, top_k, scale, temperature, top_p)).tolist(), -7]


@pytest.mark.parametrize("picks, unpicked", [(1, 0), (1, 1), (4, 0), (5, 1), (16, 0), (64, 0), (130, 0)])
def test_accept_tokens(kernels, order, picks, unpicked):
    given = example_of_passes(np.random.default_rng(picks), picks, unpicked)
    ids, past, windows, forced, _ = given
    rows = len(past)
    found = np.full([rows + 1, picks], -7), np.full(rows + 1, -7)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*given, *found)]
    sizes = map(ctypes.c_int64, (rows, ids.shape[1], picks, forced.shape[1]))
    assert kernels.emu3_accept_tokens(*pointers, *sizes, None) == 0
    next_ids, next_past = accepted(*given)
    assert found[0].tolist() == [*next_ids, [-7] * picks] and found[1].tolist() == [*next_past, -7]


@pytest.fixture(scope="module")
def torch_python():
    for python in (os.environ.get("PEER_PYTHON"), ROOT / ".venv-peer/bin/python", ROOT / ".venv-mini/bin/python"):
        if not python or shutil.which(python) is None:
            continue
        if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
            return python
    pytest.skip("no Python with PyTorch: make bench makes .venv-peer, or name one in PEER_PYTHON")


def check_with(torch_python, library, *arguments):
    """What check_cuda.check gives of a library on a CPU: the rows of its table, and what is wrong."""
    code = f"import ctypes, json, sys; sys.path.insert(0, {str(TOOLS)!r}); import check_cuda; "
    code += f"print(json.dumps(check_cuda.check({library}, 'cpu')))"
    return json.loads(run(torch_python, "-c", code, *arguments))


def test_check_cuda_finds_nothing_wrong(kernels, torch_python):
    rows, wrong = check_with(torch_python, "ctypes.CDLL(sys.argv[1])", kernels._name)
    assert wrong == [] and len(rows) == 23
    assert all(cases >= 14 and error < 1 for _, _, cases, error in rows)


def test_check_cuda_finds_what_is_wrong(torch_python):
    """Of a library that says that all is well and computes nothing."""
    names = ["norm_forward", "norm_backward", "nearest_codeword", "quantized_linear", "pick_token",
             "accept_tokens", "decoder_step", "decoder_step_bytes"]  # fmt: skip
    names = [f"emu3_{name}" for name in names]
    idle = f"type('Idle', (), dict.fromkeys({names}, lambda *_: 0) | {{'emu3_norm_parts': lambda *_: 1}})"
    rows, wrong = check_with(torch_python, idle)
    assert all(error > 1 for *_, error in rows)
    for words in ["2^40 rows: accepted", "y is inf times", "dscale is inf times", "not the first of equal ones",
                  "other tokens are picked with top_k=7", "top_p=0.9", "other guesses are accepted"]:  # fmt: skip
        assert any(words in line for line in wrong), words


def said(python, **environment):
    """What check_cuda.py says where it can check nothing."""
    done = subprocess.run([python, TOOLS / "check_cuda.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_check_cuda_says_what_is_missing(tmp_path, request):
    assert "nvcc was not found" in said(sys.executable, PATH="", CUDA_HOME=str(tmp_path))
    (tmp_path / "nvcc").touch(mode=0o755)
    without = tmp_path / "torch.py"  # hides a PyTorch that is there
    without.write_text("raise ModuleNotFoundError(name='torch')")
    assert "PyTorch was not found" in said(sys.executable, PATH=str(tmp_path), PYTHONPATH=str(tmp_path))
    python = request.getfixturevalue("torch_python")
    assert "no CUDA card" in said(python, PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")


def test_check_cuda_builds_for(monkeypatch, tmp_path):
    monkeypatch.delenv("PADDLE_CUDA_ARCH_LIST", raising=False)
    assert check_cuda.architectures_asked() == []
    for asked in ("80;90", "8.0 9.0", " 8.0, 90;"):
        monkeypatch.setenv("PADDLE_CUDA_ARCH_LIST", asked)
        assert check_cuda.architectures_asked() == ["80", "90"]
    monkeypatch.setenv("PADDLE_CUDA_ARCH_LIST", "sm_80")
    with pytest.raises(ValueError, match='must be as "80;90"'):
        check_cuda.architectures_asked()
    command = check_cuda.build_command("nvcc", ["80", "90"], tmp_path / "out.so")
    assert command.count("-gencode") == 2
    assert [word for word in command if word.endswith(".cu")] == [str(OPS / source) for source in SOURCES]
