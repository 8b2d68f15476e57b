# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 and int4 on a GPU: what decides whether the CUDA kernel computes, and the same with Paddle. The kernel itself is
in test_cuda_kernels.py."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import stand_in_for_a_card

from paddlemix.external_ops import few_rows_linear as module
from paddlemix.external_ops import without_operators
from paddlemix.external_ops.few_rows_linear import dequantize, few_rows_linear, quantize
from paddlemix.utils import InputError

CASES = [(dtype, bits) for dtype in ("float16", "bfloat16") for bits in (8, 4)]


def product(x, weight, scale):
    """What the kernel computes: rounded once, at the end."""
    right = paddle.matmul(x.astype("float32"), dequantize(weight, scale, x.shape[-1]), transpose_y=True)
    return right.astype(x.dtype)


@pytest.fixture
def card(monkeypatch):
    """A card of capability 9.0 that has this kernel; none was looked at before."""
    found = SimpleNamespace(few_rows_linear=product, emu3_ops_cuda=None, capability=(9, 0), warnings=[], calls=0)

    def quantize_weight(weight, bits):  # the compiled one computes on a CPU alone
        assert weight.place.is_cpu_place()
        with monkeypatch.context() as patch:
            patch.setattr(module, "operators", lambda: None)
            return quantize(weight, bits)

    found.quantize_weight = quantize_weight
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda number: found.capability)
    stand_in_for_a_card(monkeypatch, found, module)
    module.kernel_fault.cache_clear()
    yield found
    module.kernel_fault.cache_clear()


@pytest.mark.parametrize("dtype, bits", CASES)
def test_with_paddle(dtype, bits, monkeypatch):
    """Without the kernel, for any number of inputs; Paddle has no product of 16 bits on a CPU: a stand-in."""
    real = paddle.matmul

    def of_16_bits(x, y, **how):
        assert x.dtype == y.dtype
        return real(x.astype("float32"), y.astype("float32"), **how).astype(x.dtype)

    monkeypatch.setattr(paddle, "matmul", of_16_bits)
    monkeypatch.setattr(module, "CHUNK", 4096)  # some rows of the weight at a time
    weight, scale = quantize(paddle.randn([70, 200]), bits)
    x = paddle.randn([2, 3, 200]).astype(dtype)
    with without_operators():
        y = few_rows_linear(x, weight, scale)
    expected = x.astype("float64").numpy() @ dequantize(weight, scale, 200).numpy().astype(np.float64).T
    assert y.dtype == x.dtype and y.shape == [2, 3, 70]
    error = np.abs(y.astype("float64").numpy() - expected).max() / np.abs(expected).max()
    assert error < {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]  # the weight and the sum are rounded


def a_call(dtype=paddle.bfloat16, inputs=4096, weight=paddle.int8):
    place = SimpleNamespace(gpu_device_id=lambda: 0)
    return SimpleNamespace(dtype=dtype, shape=[2, inputs], place=place), SimpleNamespace(dtype=weight)


def test_what_the_kernel_takes(card):
    for inputs in (16, 4096, 14336):
        assert module.card_takes(*a_call(inputs=inputs))
    assert module.card_takes(*a_call(paddle.float16, weight=paddle.uint8))
    assert not module.card_takes(*a_call(inputs=100))
    assert not module.card_takes(*a_call(dtype=paddle.float32))
    assert not module.card_takes(*a_call(weight=paddle.bfloat16))
    assert card.warnings == []


def test_cards_without_tensor_cores_for_it(card):
    card.capability = (7, 5)
    assert not module.card_takes(*a_call()) and card.warnings == []
    assert "compute capability 7.5, the kernel needs 8.0" in module.kernel_fault(paddle.bfloat16, 8, 0)


def test_operators_that_were_built_for_a_cpu(card):
    del card.emu3_ops_cuda
    assert "CUDA operators are not built, `make ops`" in module.kernel_fault(paddle.bfloat16, 4, 0)


@pytest.mark.parametrize("dtype, bits", CASES)
@pytest.mark.parametrize("rows", [2, 16, 34, 70])
def test_a_kernel_that_computes_wrongly_is_not_used(card, rows, dtype, bits):
    """With 2 rows or with 16 alone: each way of the kernel is looked at, once."""

    def wrong(x, weight, scale):
        card.calls += 1
        y = product(x, weight, scale).astype("float32")
        y[-1, -1] += 0.05 * y.abs().max() if x.shape[0] == rows else 0
        return y.astype(x.dtype)

    card.few_rows_linear = wrong
    call = a_call(getattr(paddle, dtype), weight=paddle.int8 if bits == 8 else paddle.uint8)
    assert not module.card_takes(*call) and not module.card_takes(*call)
    assert card.calls == 4
    (words,) = card.warnings
    assert words.startswith(f"the int{bits} kernel errs by 0.0") and f"with {rows} rows" in words
    assert module.kernel_fault(call[0].dtype, bits, 0) in words  # what a command notes


def test_a_kernel_that_fails_is_not_used(card):
    def not_compiled(*_):
        raise OSError("(External) CUDA error(209), no kernel image is available for execution on the device.\n[more]")

    card.few_rows_linear = not_compiled
    assert not module.card_takes(*a_call())
    (words,) = card.warnings
    assert "the int8 kernel fails on this card ((External) CUDA error(209)" in words


def test_floats_of_16_bits_are_not_taken():
    with pytest.raises(InputError, match="takes float32 activations"):
        few_rows_linear(paddle.ones([2, 4], dtype="bfloat16"), paddle.ones([3, 4], dtype="bfloat16"))
