# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The decoder layer's step on a GPU: what decides whether the CUDA kernels compute it. The kernels themselves are in
test_cuda_kernels.py."""

from types import SimpleNamespace

import paddle
import pytest
from conftest import stand_in_for_a_card

from paddlemix.external_ops import decoder_step as module
from paddlemix.models.emu3 import Emu3Config, Emu3Model, attention, modeling_emu3
from paddlemix.models.emu3.cache import KVCache

KINDS = [("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "uint8")]


def by_paddle(*given):
    """What the kernels compute: rounded at the end; the new tokens go into the cache."""
    *given, allowed, epsilon = given
    assert allowed is None
    y, *cache = module._with_paddle(*given, epsilon)
    for kept, new in zip(given[6:8], cache, strict=True):
        paddle.assign(new.astype(kept.dtype), kept)
    return y.astype(given[0].dtype)


@pytest.fixture
def card(monkeypatch):
    """A card of capability 9.0 with right kernels; none was looked at before."""
    found = SimpleNamespace(decoder_step=by_paddle, emu3_ops_cuda=None, capability=(9, 0), warnings=[], rows=[])
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda number: found.capability)
    stand_in_for_a_card(monkeypatch, found, module, modeling_emu3)
    module.step_fault.cache_clear()
    yield found
    module.step_fault.cache_clear()


def on_card(shape, dtype=paddle.bfloat16):
    place = SimpleNamespace(gpu_device_id=lambda: 0, is_cpu_place=lambda: False)
    return SimpleNamespace(dtype=dtype, shape=shape, place=place)


def takes(dtype=paddle.bfloat16, weight=paddle.int8, norm=None, cache=None, hidden=4096, inner=14336, dim=128):
    norms = [on_card([hidden], norm or dtype)] * 2
    return module.card_takes(
        on_card([2, 1, hidden], dtype), norms, [on_card([inner, hidden], weight)] * 7,
        on_card([2, 8, 1024, dim], cache or dtype),
    )  # fmt: skip


@pytest.mark.parametrize("dtype, weights", KINDS)
def test_right_kernels_are_taken(card, dtype, weights):
    assert takes(getattr(paddle, dtype), getattr(paddle, weights)) and card.warnings == []


def test_what_the_kernels_do_not_take(card):
    for given in (
        {"dtype": paddle.float32}, {"weight": paddle.float16}, {"norm": paddle.float32}, {"cache": paddle.float32},
        {"hidden": 4100}, {"inner": 14340}, {"dim": 120}, {"dim": 272},
    ):  # fmt: skip
        assert not takes(**given), given
    assert card.warnings == []


def test_a_card_or_operators_without_them(card):
    card.capability = (7, 5)
    assert not takes() and card.warnings == []
    assert "compute capability 7.5" in module.step_fault(paddle.bfloat16, paddle.int8, 128, 0)
    module.step_fault.cache_clear()
    card.capability = (9, 0)
    del card.emu3_ops_cuda
    assert "CUDA operators are not built, `make ops`" in module.step_fault(paddle.bfloat16, paddle.int8, 128, 0)


@pytest.mark.parametrize("rows", [1, 2, 17, 34])
@pytest.mark.parametrize("what", ["the layer", "a key"])
def test_kernels_that_compute_wrongly_are_not_used(card, rows, what):
    """With one number of rows alone; a number of the result or of the cache."""

    def wrong(*given):
        y, x, key = by_paddle(*given), given[0], given[6]
        card.rows.append(x.shape[0] * x.shape[1])
        if card.rows[-1] == rows:
            to = y if what == "the layer" else key
            more = paddle.zeros(to.shape)
            more[-1, -1, -1] = 0.1 * to.astype("float32").abs().max()
            paddle.assign((to.astype("float32") + more).astype(to.dtype), to)
        return y

    card.decoder_step = wrong
    assert not takes(weight=paddle.bfloat16, dim=64) and not takes(weight=paddle.bfloat16, dim=64)
    assert card.rows == [1, 2, 17, 34]
    (words,) = card.warnings
    assert "the decoder step in bfloat16 with bfloat16 weights errs by 0." in words and f"with {rows} rows" in words


def test_kernels_that_fail_are_not_used(card):
    def not_compiled(*_):
        raise OSError("(External) CUDA error(209), no kernel image is available for execution on the device.\n[more]")

    card.decoder_step = not_compiled
    assert not takes(weight=paddle.uint8)
    (words,) = card.warnings
    assert "with int4 weights fails on this card ((External) CUDA error(209)" in words


def test_when_the_model_takes_them(card):
    """Few tokens over the cache and no padding; all layers or none."""
    config = Emu3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=50, pad_token_id=0)  # fmt: skip
    model = Emu3Model(config).eval().to(dtype="bfloat16")
    cache = KVCache(config, 2, 8, "bfloat16")
    past = paddle.to_tensor([3, 4])

    def has_step(rows=2, new=1, mask=None, dtype=paddle.bfloat16, cache=cache):
        with paddle.no_grad():
            return model._has_step(on_card([rows, new, 64], dtype), mask or attention.Mask(past, new), cache)

    padding = paddle.ones([2, 1, 1, 5], "bool")
    assert has_step() and has_step(new=17) and has_step(mask=attention.Mask(4, 1))
    assert not has_step(new=33) and not has_step(dtype=paddle.float32)
    assert not has_step(mask=attention.Mask(4, 1, padding)) and not has_step(mask=attention.Mask(0, 1))
    assert not has_step(cache=KVCache(config, 2, 8, "float32"))
    model.layers[1].input_layernorm.to(dtype="float32")
    assert not has_step() and card.warnings == []
