# Licensed under the Apache License, Version 2.0; see LICENSE.
"""RMS norm, layer norm and the nearest codeword against float64, compiled and with Paddle."""

import numpy as np
import paddle
import pytest

from paddlemix.external_ops import nearest_codeword as codewords
from paddlemix.external_ops import operators, without_operators
from paddlemix.external_ops.fast_ln import fast_ln, fast_rms_norm
from paddlemix.external_ops.fused_ln import fused_ln, fused_rms_norm
from paddlemix.utils import InputError

EPSILON = 1e-5
SHAPES = [(1,), (1, 1), (3, 7), (2, 5, 129), (70, 1000)]
ROUNDING = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(params=["paddle", "plain", "avx2", "avx512"])
def how(request, monkeypatch):
    """Without the operators, and with them by each kind of vectors that this processor has.

    Gives how much more may be lost to rounding: the operators sum in double, Paddle in float32.
    """
    if request.param == "paddle":
        with without_operators():
            yield 4
    elif operators() is None:
        pytest.skip("the operators are not built: make ops")
    else:
        monkeypatch.setenv("EMU3_OPS_SIMD", request.param)
        yield 1


def tensor(rng, shape, dtype, shift=0.0):
    """A tensor that asks for its gradient, and the same numbers as float64."""
    given = paddle.to_tensor((rng.standard_normal(shape) + shift).astype(np.float32)).astype(dtype)
    given.stop_gradient = False
    return given, given.astype("float32").numpy().astype(np.float64)


def error(got, expected):
    return float(np.abs(got.astype("float32").numpy() - expected).max() / max(np.abs(expected).max(), 1e-3))


def reference(x, scale, bias, dy):
    """y, mean, rstd, and the gradients of x, scale and bias, in float64; RMS norm where bias is None."""
    mean = x.mean(-1, keepdims=True) if bias is not None else np.zeros_like(x[..., :1])
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON)
    normal, g = (x - mean) * rstd, dy * scale
    shift = g.mean(-1, keepdims=True) if bias is not None else 0
    dx = (g - shift - normal * (g * normal).mean(-1, keepdims=True)) * rstd
    rows = tuple(range(x.ndim - 1))
    y = normal * scale + (0 if bias is None else bias)
    return y, mean[..., 0], rstd[..., 0], dx, (dy * normal).sum(rows), dy.sum(rows)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [fused_rms_norm, fast_rms_norm, fused_ln, fast_ln])
def test_values_and_gradients(how, norm, shape, dtypes):
    rng, layer_norm = np.random.default_rng(0), norm in (fused_ln, fast_ln)
    (x, x64), (scale, scale64) = tensor(rng, shape, dtypes[0], 0.5), tensor(rng, shape[-1:], dtypes[1])
    bias, bias64 = tensor(rng, shape[-1:], dtypes[1]) if layer_norm else (None, None)
    dy, dy64 = tensor(rng, shape, dtypes[1])
    y, *rest = norm(x, scale, bias, EPSILON) if layer_norm else norm(x, scale, EPSILON)
    assert (y.dtype, list(y.shape)) == (scale.dtype, list(shape))
    y64, mean64, rstd64, dx64, dscale64, dbias64 = reference(x64, scale64, bias64, dy64)
    for got, expected in zip([y, *rest], [y64, *([mean64] if layer_norm else []), rstd64], strict=True):
        assert error(got, expected) < how * ROUNDING[dtypes[1]]
    assert all(t.stop_gradient for t in rest)
    y.backward(dy)
    if shape[-1] > 1:  # of one column only rounding is left
        assert error(x.grad, dx64) < 2 * how * ROUNDING[dtypes[0]]
        assert error(scale.grad, dscale64) < 2 * how * ROUNDING[dtypes[1]]
    if layer_norm:
        assert error(bias.grad, dbias64) < 2 * how * ROUNDING[dtypes[1]]


def test_strided_input(how):
    x, x64 = tensor(np.random.default_rng(1), (9, 6), "float32")
    scale = paddle.ones([9])
    expected = reference(x64.T, np.ones(9), None, np.ones((6, 9)))
    assert error(fused_rms_norm(x.t(), scale, EPSILON)[0], expected[0]) < how * 1e-6


@pytest.mark.parametrize("norm", [fused_rms_norm, fused_ln])
def test_no_rows(how, norm):
    x, *parameters = paddle.ones([0, 5]), paddle.ones([5]), paddle.ones([5])
    parameters = parameters[: 2 if norm is fused_ln else 1]
    for given in (x, *parameters):
        given.stop_gradient = False
    norm(x, *parameters, EPSILON)[0].sum().backward()
    assert x.grad.shape == [0, 5] and all(float(p.grad.abs().sum()) == 0 for p in parameters)


def test_wrong_scale():
    with pytest.raises(InputError, match=r"must be float \[4\]"):
        fused_rms_norm(paddle.ones([2, 4]), paddle.ones([3]), EPSILON)
    with pytest.raises(InputError, match="cols not 0"):
        fused_rms_norm(paddle.ones([2, 0]), paddle.ones([0]), EPSILON)


@pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")
def test_the_operators_alone_have_no_gradient_through_the_mean():
    x, one = paddle.randn([2, 4]), paddle.ones([4])
    x.stop_gradient = False
    for given in (operators().fused_rms_norm(x, one, EPSILON), operators().fused_ln(x, one, one, EPSILON)):
        with pytest.raises(Exception, match="through y alone"):
            given[1].sum().backward()


@pytest.mark.parametrize("n, size, dim", [(0, 3, 2), (1, 1, 1), (33, 513, 4), (1030, 100, 5)])
def test_nearest_codeword(how, n, size, dim):
    rng = np.random.default_rng(2)
    latents = rng.standard_normal([n, dim]).astype(np.float32)
    codebook = rng.standard_normal([size, dim]).astype(np.float32)
    codebook[size // 2 :] = codebook[: size - size // 2]  # of equal codewords the first
    distances = ((latents[:, None].astype(np.float64) - codebook) ** 2).sum(-1)
    codes = codewords.nearest_codeword(paddle.to_tensor(latents), paddle.to_tensor(codebook))
    assert codes.numpy().tolist() == distances.argmin(1).tolist()
