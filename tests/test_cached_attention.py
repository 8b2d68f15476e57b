# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention of few new tokens over the cache against float64, and against the model's attention."""

import numpy as np
import paddle
import pytest
from conftest import relative_error

from paddlemix.external_ops import cached_attention as module
from paddlemix.external_ops import operators
from paddlemix.external_ops.cached_attention import cached_attention
from paddlemix.models.emu3 import attention, modeling_emu3
from paddlemix.utils import InputError


@pytest.fixture(params=["paddle", "plain", "avx2", "avx512"])
def how(request, monkeypatch):
    """Without the operator, and with it by each kind of vectors that this processor has."""
    if request.param == "paddle":
        monkeypatch.setattr(module, "operators", lambda: None)
    elif operators() is None:
        pytest.skip("the operators are not built: make ops")
    else:
        monkeypatch.setenv("EMU3_OPS_SIMD", request.param)


def reference(query, key, value, length, allowed):
    """One query at a time, in float64."""
    batch, new, heads, dim = query.shape
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(batch, new, heads):
        past = length - new + 1 + i
        seen = np.arange(past) if allowed is None else np.flatnonzero(allowed[b, :past])
        k, v = (x[b, h // (heads // x.shape[1])].astype(np.float64)[seen] for x in (key, value))
        scores = k @ query[b, i, h].astype(np.float64) / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v / weights.sum()
    return out.reshape([batch, new, -1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "batch, new, heads, kv_heads, dim, length, room",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 1, 8, 2, 64, 300, 1024),
        (1, 16, 4, 4, 128, 40, 40),
        (3, 3, 6, 2, 20, 129, 130),
        (1, 2, 4, 1, 128, 3000, 3072),
        (2, 5, 8, 2, 7, 5, 6),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_values(how, batch, new, heads, kv_heads, dim, length, room, dtype, padded):
    rng = np.random.default_rng(0)
    query = 3 * rng.standard_normal([batch, new, heads, dim]).astype(np.float32)
    cache = [paddle.to_tensor(rng.standard_normal([batch, kv_heads, room, dim]).astype(np.float32)).astype(dtype)
             for _ in "kv"]  # fmt: skip
    key, value = (x.astype("float32").numpy() for x in cache)
    allowed = None
    if padded and length > new:
        allowed = np.arange(length) >= rng.integers(0, length - new + 1, [batch, 1])
    out = cached_attention(
        paddle.to_tensor(query), *cache, length, None if allowed is None else paddle.to_tensor(allowed)
    )
    assert out.dtype == paddle.float32
    assert relative_error(out.numpy(), reference(query, key, value, length, allowed)) < 3e-6


@pytest.mark.parametrize("length", [5, 70, 600])
def test_a_query_that_sees_nothing_gives_the_mean(how, length):
    query, cache = paddle.randn([2, 2, 4, 8]), paddle.randn([2, 2, 640, 8])
    allowed = paddle.ones([2, length], dtype="bool")
    allowed[1] = False
    out = cached_attention(query, cache, cache, length, allowed).numpy()
    mean = cache.numpy()[1, :, :length].mean(1)
    np.testing.assert_allclose(out[1].reshape([2, 2, 2, 8]), np.tile(mean[None, :, None], [2, 1, 2, 1]), atol=1e-6)


def test_mistakes(how):
    query, cache = paddle.ones([2, 3, 4, 8]), paddle.ones([2, 2, 16, 8])
    for bad, length, words in (
        ((query[0], cache, cache), 5, "query must be .B, new, H, D."),
        ((query[:0], cache[:0], cache[:0]), 5, "none empty"),
        ((query, cache[:, :0], cache[:, :0]), 5, "none empty"),
        ((query[:1], cache, cache), 5, "agree in B and D"),
        ((query[:, :, :3], cache, cache), 5, "a multiple of kv"),
        ((query.astype("float64"), cache, cache), 5, "query must be float32"),
        ((query, cache, cache.astype("float16")), 5, "both float32, bfloat16 or float16"),
        ((query, cache, cache), 2, "length must be 3 .the new tokens. to 16 .the room., got 2"),
        ((query, cache, cache), 17, "got 17"),
    ):
        with pytest.raises(InputError, match=words):
            cached_attention(*bad, length)
    for allowed in (paddle.ones([2, 5]), paddle.ones([2, 6], dtype="bool")):
        with pytest.raises(InputError, match="allowed must be bool .2, 5."):
            cached_attention(query, cache, cache, 5, allowed)


@pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")
def test_the_operator_alone_bears_nothing():
    operator = operators().cached_attention
    assert operator(paddle.ones([0, 1, 2, 8]), *[paddle.ones([0, 2, 4, 8])] * 2, None, 3).shape == [0, 1, 16]
    with pytest.raises(Exception, match="query must be"):
        operator(paddle.ones([1, 1, 2, 8]), *[paddle.ones([1, 0, 4, 8])] * 2, None, 3)


def test_gradients(how):
    query, cache = paddle.randn([1, 2, 4, 8]), paddle.randn([1, 2, 6, 8])
    cache.stop_gradient = False
    out = cached_attention(query, cache, cache, 6)
    out.sum().backward()
    assert float(cache.grad.abs().sum()) > 0


@pytest.mark.parametrize("new", [1, 5])
def test_in_the_model(how, monkeypatch, language_model, new):
    """Steps over the cache, one row left-padded, against all tokens at once."""
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 200, [2, 40]))
    mask = paddle.ones_like(ids)
    mask[0, :7] = 0
    monkeypatch.setattr(modeling_emu3.Emu3DecoderLayer, "_has_decoder_step", lambda *_: False)
    monkeypatch.setattr(attention, "operators", module.operators)
    calls = []
    monkeypatch.setattr(attention, "cached_attention", lambda *args: calls.append(1) or cached_attention(*args))
    with paddle.no_grad():
        whole = language_model(ids, mask).logits.numpy()
        cache = language_model.make_cache(2, 40)
        pieces = [language_model(ids[:, :20], mask[:, :20], past_key_values=cache).logits]
        for end in range(20 + new, 41, new):
            pieces.append(language_model(ids[:, end - new : end], mask[:, :end], past_key_values=cache).logits)
    pieces = paddle.concat(pieces, axis=1).numpy()
    assert relative_error(pieces[:, 7:], whole[:, 7:]) < 1e-5
    assert bool(calls) == (module.operators() is not None)


def test_a_gradient_goes_another_way(language_model, monkeypatch):
    monkeypatch.setattr(attention, "cached_attention", None)
    language_model(paddle.to_tensor([[1, 2, 3]]), labels=paddle.to_tensor([[1, 2, 3]])).loss.backward()
    language_model.clear_gradients()
