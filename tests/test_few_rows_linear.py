# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The linear layer for few and for many rows against float64, with float32, 16, 8 and 4 bit weights."""

import os
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from paddlemix.external_ops import few_rows_linear as module
from paddlemix.external_ops import operators, vectors, without_operators
from paddlemix.external_ops.few_rows_linear import dequantize, few_rows_linear, quantize
from paddlemix.utils import InputError

HAS_BFLOAT16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
KINDS = ("float32", "bfloat16", "int8", "int4")
# out, in: multiples of nothing, and of the group of 128; more than a panel of the blocked path
SHAPES = [(1, 1), (3, 70), (17, 129), (40, 256), (5, 300), (131, 2500)]


@pytest.fixture(params=["paddle", "plain", "avx2", "avx512", "best"])
def how(request, monkeypatch):
    """Without the operators, and with them by each kind of vectors that this processor has."""
    if request.param == "paddle":
        with without_operators():
            yield request.param
    elif operators() is None:
        pytest.skip("the operators are not built: make ops")
    else:
        monkeypatch.setenv("EMU3_OPS_SIMD", request.param)
        yield request.param


def as_multiplied(x, kind, how):
    """x [rows, in] as float64, rounded as the linear layer says it does beside weights of this kind."""
    best = how == "best" and vectors() in ("AVX-512 VNNI", "AVX-VNNI")
    if best and kind == "bfloat16" and len(x) > module.FEW_ROWS and HAS_BFLOAT16:
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    if not best or kind not in ("int8", "int4"):
        return x.astype(np.float64)
    most, (rows, columns) = np.float32({"int8": 32767, "int4": 127}[kind]), x.shape
    groups = np.pad(x, [(0, 0), (0, -columns % 128)]).reshape([rows, -1, 128])
    size = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-30))
    wide = np.rint(groups * (most / size)).astype(np.float64) * (size / most)
    return wide.reshape([rows, -1])[:, :columns]


def make_weight(kind, out, columns, seed=0):
    """(weight and scale as few_rows_linear takes them, the same numbers as float64 [out, in])"""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal([out, columns]).astype(np.float32)
    if kind == "float32":
        return paddle.to_tensor(numbers), None, numbers.astype(np.float64)
    if kind == "bfloat16":
        bits = numbers.view(np.uint32) & 0xFFFF0000
        numbers = bits.view(np.float32)
        return paddle.to_tensor(numbers).astype("bfloat16"), None, numbers.astype(np.float64)
    if kind == "int8":
        codes = rng.integers(-127, 128, [out, columns])
        scale = rng.random(out, dtype=np.float32)
        return (
            paddle.to_tensor(codes.astype(np.int8)),
            paddle.to_tensor(scale),
            codes * scale[:, None].astype(np.float64),
        )
    groups = -(-columns // 128)
    codes = rng.integers(1, 16, [out, groups, 128])
    codes.reshape([out, -1])[:, columns:] = 8
    scale = rng.random([out, groups], dtype=np.float32)
    packed = (codes[..., :64] + 16 * codes[..., 64:]).astype(np.uint8).reshape([out, -1])
    numbers = ((codes - 8) * scale[..., None].astype(np.float64)).reshape([out, -1])[:, :columns]
    return paddle.to_tensor(packed), paddle.to_tensor(scale), numbers


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 17, 64, 65, 131])
@pytest.mark.parametrize("kind", KINDS)
def test_values(how, kind, rows):
    for out, columns in SHAPES:
        weight, scale, numbers = make_weight(kind, out, columns)
        x = np.random.default_rng(rows).standard_normal([rows, columns]).astype(np.float32)
        y = few_rows_linear(paddle.to_tensor(x), weight, scale)
        assert y.dtype == paddle.float32 and y.shape == [rows, out]
        wide = as_multiplied(x, kind, how)
        size = np.abs(wide) @ np.abs(numbers).T  # what rounding is relative to
        assert (np.abs(y.numpy() - wide @ numbers.T) <= 1e-6 * size).all()
        if scale is not None:
            assert np.allclose(dequantize(weight, scale, columns).numpy(), numbers, rtol=1e-6, atol=0)


HARD = {
    "shifted": lambda x: x + 100,
    "one large": lambda x: np.where(np.arange(x.shape[1]) == 5, 1e5, x),
    "tiny": lambda x: x * 1e-31,
    "of all sizes": lambda x: x * 10.0 ** np.random.default_rng(3).uniform(-30, 5, x.shape),
}


@pytest.mark.parametrize("rows", [2, 5, 20, 70])
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_hard_inputs(how, kind, hard, rows):
    weight, scale, numbers = make_weight(kind, 9, 300)
    x = HARD[hard](np.random.default_rng(rows).standard_normal([rows, 300])).astype(np.float32)
    if hard == "one large":  # which nothing may come through of where its weights are 0
        zero = np.zeros_like(numbers)
        zero[:, 5] = numbers[:, 5]
        numbers = numbers - zero
        weight = _without_column(weight, kind, 5)
    y = few_rows_linear(paddle.to_tensor(x), weight, scale).numpy()
    wide = as_multiplied(x, kind, how)
    size = np.abs(wide) @ np.abs(numbers).T
    if kind == "int4":  # nibbles are too large by 8, so that a sum passes through what is as large as the largest input
        padded = np.pad(np.abs(x), [(0, 0), (0, -300 % 128)]).reshape([rows, -1, 128]).max(-1).repeat(128, -1)
        size = size + padded[:, :300] @ np.abs(numbers).T
    assert (np.abs(y - wide @ numbers.T) <= 1e-6 * size + 1e-37).all()


def _without_column(weight, kind, column):
    if kind == "int4":
        packed = weight.numpy()
        packed[:, column] = (packed[:, column] & 0xF0) + 8
        return paddle.to_tensor(packed)
    weight = weight.clone()
    weight[:, column] = paddle.zeros([weight.shape[0]], weight.dtype)
    return weight


@pytest.mark.parametrize("rows", [2, 20, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan(how, kind, rows):
    weight, scale, numbers = make_weight(kind, 5, 140)
    x = np.ones([rows, 140], np.float32)
    x[0, 7], x[1, 130] = np.inf, np.nan
    x.view(np.uint32)[1, 131] = 0xFFFFFFFF  # NaN of all ones, which rounding must not carry over into 0
    y = few_rows_linear(paddle.to_tensor(x), weight, scale).numpy()
    assert not np.isfinite(y[:2]).any()
    assert np.isnan(y[1]).all()
    assert np.allclose(y[2:], numbers.sum(1), atol=1e-4)


def test_avx_vnni_computes_as_avx_512_vnni(tmp_path):
    """On a processor of the latter, which has the same products with vectors of AVX2 too, in another encoding."""
    compiler, source = shutil.which(os.environ.get("CXX") or "g++"), Path(__file__).parent / "avx_vnni.cc"
    if vectors() != "AVX-512 VNNI" or compiler is None:
        pytest.skip("AVX-512 VNNI and a compiler are needed")
    options = ["-O0", "-std=c++17", "-fopenmp", '-DSIMD_VEX=""', "-I", str(Path(module.__file__).parents[1])]
    subprocess.run([compiler, *options, str(source), "-o", str(tmp_path / "program")], check=True)
    lines = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in lines}
    assert {kind for kind, _ in found} == {"int8", "int4"} and {rows for _, rows in found} == {"1", "5", "70"}
    assert all(error < 1e-6 if int(rows) <= module.FEW_ROWS else error == 0 for (_, rows), error in found.items())


def assert_rounded(codes, numbers, largest):
    """Codes are the nearest to numbers / their largest * `largest`, but for what float32 cannot tell."""
    size = np.abs(numbers).max(-1, keepdims=True)
    assert (np.abs(codes - numbers / np.where(size > 0, size, 1) * largest) <= 0.5 + 1e-6 * largest).all()
    assert np.abs(codes).max() <= largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out, columns", [(1, 1), (3, 70), (17, 129), (8, 256)])
def test_quantize(how, dtype, out, columns):
    given = paddle.to_tensor(np.random.default_rng(1).standard_normal([out, columns]).astype(np.float32)).astype(dtype)
    numbers = given.astype("float32").numpy().astype(np.float64)
    weight, scale = quantize(given, 8)
    assert weight.dtype == paddle.int8 and scale.shape == [out]
    assert_rounded(weight.numpy().astype(np.float64), numbers, 127)
    assert np.allclose(scale.numpy(), np.abs(numbers).max(-1) / 127, rtol=1e-6)
    weight, scale = quantize(given, 4)
    groups = -(-columns // 128)
    numbers = np.pad(numbers, [(0, 0), (0, groups * 128 - columns)]).reshape([out, groups, 128])
    assert weight.dtype == paddle.uint8 and weight.shape == [out, groups * 64]
    packed = weight.numpy().reshape([out, groups, 64])
    assert_rounded(np.concatenate([packed & 15, packed >> 4], -1) - 8.0, numbers, 7)
    assert np.allclose(scale.numpy(), np.abs(numbers).max(-1) / 7, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_nothing(how, bits):
    given = paddle.zeros([2, 130])
    given[1] = 1e-40  # too small for a scale
    weight, scale = quantize(given, bits)
    assert (dequantize(weight, scale, 130).numpy() == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantize_gives_the_same_bytes_either_way(how, monkeypatch, dtype, bits):
    numbers = np.random.default_rng(2).standard_normal([33, 1100]).astype(np.float32)
    numbers[:, ::3] = np.round(numbers[:, ::3] * 8) / 8  # ties
    numbers[5] *= 1e-36
    given = paddle.to_tensor(numbers).astype(dtype)
    weight, scale = quantize(given, bits)
    monkeypatch.setattr(module, "CHUNK", 5000)  # by pieces, too
    with without_operators():
        expected, expected_scale = quantize(given, bits)
    assert weight.numpy().tobytes() == expected.numpy().tobytes()
    assert scale.numpy().tobytes() == expected_scale.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(how, kind):
    weight, scale, _ = make_weight(kind, 40, 300)
    assert few_rows_linear(paddle.ones([0, 300]), weight, scale).shape == [0, 40]
    assert few_rows_linear(paddle.ones([2, 0, 300]), weight, scale).shape == [2, 0, 40]


def test_leading_axes_and_gradients(how):
    x, weight = paddle.randn([2, 3, 20]), paddle.randn([4, 20])
    expected = x.numpy() @ weight.numpy().T
    assert np.allclose(few_rows_linear(x, weight).numpy(), expected, atol=1e-5)
    assert np.allclose(few_rows_linear(x[:, 1], weight).numpy(), expected[:, 1], atol=1e-5)  # not contiguous
    weight.stop_gradient = False
    few_rows_linear(x, weight).sum().backward()
    assert np.allclose(weight.grad.numpy(), np.tile(x.numpy().sum((0, 1)), [4, 1]), atol=1e-5)


def test_mistakes(how):
    x = paddle.ones([2, 8])
    with pytest.raises(InputError, match="must be .out, 8."):
        few_rows_linear(x, paddle.ones([3, 9]))
    with pytest.raises(InputError, match="scale of a paddle.int8 weight"):
        few_rows_linear(x, paddle.ones([3, 8], dtype="int8"))
    with pytest.raises(InputError, match="float64"):
        few_rows_linear(x, paddle.ones([3, 8], dtype="float64"))
    with pytest.raises(InputError, match="float32 .3., got paddle.float16 .3."):
        few_rows_linear(x, paddle.ones([3, 8], dtype="int8"), paddle.ones([3], dtype="float16"))
    with pytest.raises(InputError, match="float32 activations .+ in., got paddle.float32 "):
        few_rows_linear(paddle.to_tensor(1.0), paddle.ones([3, 8]))
    for empty in ([0, 8], [3, 0]):
        with pytest.raises(InputError, match="not empty"):
            few_rows_linear(paddle.ones([2, empty[1]]), paddle.ones(empty))
        with pytest.raises(InputError, match="not empty"):
            quantize(paddle.ones(empty), 8)
    assert few_rows_linear(paddle.ones([0, 8]), paddle.ones([3, 8])).shape == [0, 3]
    with pytest.raises(InputError, match="8 or 4 bits, got 3"):
        quantize(x, 3)
    for bad in (np.nan, np.inf):
        for bits in (8, 4):
            with pytest.raises(InputError, match="finite"):
                quantize(paddle.to_tensor([[1.0, bad, 2.0]]), bits)
