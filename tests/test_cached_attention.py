# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention of new tokens over the cache against float64."""

from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest
from conftest import relative_error

from paddlemix.external_ops import operators, without_operators
from paddlemix.external_ops.cached_attention import MOST_NEW, cached_attention
from paddlemix.utils import InputError

HAS_BFLOAT16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()


@pytest.fixture(params=["paddle", "plain", "avx2", "avx512", "best"])
def how(request, monkeypatch):
    """Without the operator, and with it by each kind of vectors that this processor has."""
    if request.param == "paddle":
        with without_operators():
            yield request.param
    elif operators() is None:
        pytest.skip("the operators are not built: make ops")
    else:
        monkeypatch.setenv("EMU3_OPS_SIMD", request.param)
        yield request.param


def reference(query, key, value, lengths, slots, allowed):
    """One query at a time, in float64."""
    batch, new, heads, dim = query.shape
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(batch, new, heads):
        past = lengths[b] - new + 1 + i
        seen = np.arange(past) if allowed is None else np.flatnonzero(allowed[b, :past])
        k, v = (x[slots[b], h // (heads // x.shape[1])].astype(np.float64)[seen] for x in (key, value))
        scores = k @ query[b, i, h].astype(np.float64) / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v / weights.sum()
    return out.reshape([batch, new, -1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "lengths, slots, new, heads, kv_heads, dim, room",
    [
        ([1], None, 1, 1, 1, 1, 1),
        ([300, 300], None, 1, 8, 2, 64, 1024),
        ([1024, 1], [2, 0], 1, 8, 2, 64, 1024),
        ([40], None, 16, 4, 4, 128, 40),
        ([129, 64, 3], [3, 0, 1], 3, 6, 2, 20, 130),
        ([3000], [1], 2, 4, 1, 128, 3072),
        ([5, 5], None, 5, 8, 2, 7, 6),
        ([70, 16, 520, 1030], [6, 0, 2, 1], 16, 8, 2, 32, 1030),
        ([17], None, 17, 3, 1, 7, 18),
        ([65, 200], [1, 0], 65, 3, 1, 7, 200),
        ([150, 130], [1, 0], 100, 8, 2, 64, 150),
        ([600], [1], 90, 4, 4, 20, 640),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_values(how, lengths, slots, new, heads, kv_heads, dim, room, dtype, padded):
    rng, batch = np.random.default_rng(0), len(lengths)
    query = 3 * rng.standard_normal([batch, new, heads, dim]).astype(np.float32)
    shape = [batch if slots is None else 7, kv_heads, room, dim]
    cache = [paddle.to_tensor(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for _ in "kv"]
    key, value = (x.astype("float32").numpy() for x in cache)
    allowed = None
    if padded:
        most = np.array([length - new for length in lengths])
        allowed = np.arange(max(lengths)) >= rng.integers(0, most + 1)[:, None]
    given = [None if x is None else paddle.to_tensor(x) for x in (lengths, slots, allowed)]
    out = cached_attention(paddle.to_tensor(query), *cache, *given)
    assert out.dtype == paddle.float32
    places = range(batch) if slots is None else slots
    rounds = how == "best" and new > MOST_NEW and dtype == "bfloat16" and HAS_BFLOAT16  # queries and weights, to 2^-9
    if rounds:
        scale = np.float32(1 / np.sqrt(np.float32(dim)))
        query = (query * scale).astype(ml_dtypes.bfloat16).astype(np.float64) / scale
    bound = 4e-3 if rounds else 3e-6
    assert relative_error(out.numpy(), reference(query, key, value, lengths, places, allowed)) < bound


@pytest.mark.parametrize("length, new", [(5, 2), (70, 2), (600, 2), (200, 70)])
def test_a_query_that_sees_nothing_gives_the_mean(how, length, new):
    query, cache = paddle.randn([3, new, 4, 8]), paddle.randn([3, 2, 640, 8])
    lengths = paddle.to_tensor([length, length, length - 2])
    allowed = paddle.ones([3, length], dtype="bool")
    allowed[1:] = False
    out = cached_attention(query, cache, cache, lengths, None, allowed).numpy()
    for row in (1, 2):
        mean = cache.numpy()[row, :, : lengths[row]].mean(1)
        expected = np.tile(mean[None, :, None], [new, 1, 2, 1])
        np.testing.assert_allclose(out[row].reshape([new, 2, 2, 8]), expected, atol=1e-6)


@pytest.mark.parametrize("new", [3, 70])
def test_padding_over_whole_blocks(how, new):
    """Blocks and pieces in which a query sees nothing, before those in which it does, and unused room of NaN."""
    query, cache = paddle.randn([2, new, 4, 8]), paddle.randn([2, 2, 1500, 8])
    cache[0, :, 1200:], cache[1, :, 1400:] = np.nan, np.nan
    allowed = np.ones([2, 1400], bool)
    allowed[0, :700] = False
    out = cached_attention(query, cache, cache, paddle.to_tensor([1200, 1400]), None, paddle.to_tensor(allowed))
    expected = reference(query.numpy(), cache.numpy(), cache.numpy(), [1200, 1400], [0, 1], allowed)
    assert relative_error(out.numpy(), expected) < 3e-6


def test_mistakes(how):
    query, cache, five = paddle.ones([2, 3, 4, 8]), paddle.ones([2, 2, 16, 8]), paddle.to_tensor([5, 5])
    slots = paddle.to_tensor([1, 0])
    for bad, lengths, places, words in (
        ((query[0], cache, cache), five, None, "query must be .B, new, H, D."),
        ((query[:0], cache[:0], cache[:0]), five, None, "none empty"),
        ((query, cache[:, :0], cache[:, :0]), five, None, "none empty"),
        ((query[:, :, :, :4], cache, cache), five, None, "agree in D"),
        ((query[:, :, :3], cache, cache), five, None, "a multiple of kv"),
        ((query.astype("float64"), cache, cache), five, None, "query must be float32"),
        ((query, cache, cache.astype("float16")), five, None, "both float32, bfloat16 or float16"),
        ((query[:1], cache, cache), five[:1], None, "one for each of 1 rows"),
        ((query, cache, cache), five[:1], None, "lengths must be int64 .2. on the CPU"),
        ((query, cache, cache), five.astype("int32"), None, "lengths must be int64 .2. on the CPU"),
        ((query, cache, cache), five, slots.astype("int32"), "slots must be int64 .2. on the CPU"),
        ((query, cache, cache), five, slots + 1, "slots must be 0 to 1, got .2, 1."),
        ((query, cache, cache), five, slots - 1, "slots must be 0 to 1, got .0, -1."),
        ((query, cache, cache), paddle.to_tensor([5, 2]), None, "lengths must be 3 .+ to 16 .the cap.*, got .5, 2."),
        ((query, cache, cache), paddle.to_tensor([17, 5]), None, "got .17, 5."),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            cached_attention(*bad, lengths, places)
    for allowed in (paddle.ones([2, 5]), paddle.ones([2, 6], dtype="bool")):
        with pytest.raises(InputError, match="allowed must be bool .2, 5."):
            cached_attention(query, cache, cache, five, None, allowed)


@pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")
def test_the_operator_alone_bears_nothing():
    operator, none = operators().cached_attention, paddle.zeros([0], "int64")
    assert operator(paddle.ones([0, 1, 2, 8]), *[paddle.ones([0, 2, 4, 8])] * 2, none, None, None).shape == [0, 1, 16]
    query, cache, three = paddle.ones([1, 1, 2, 8]), [paddle.ones([1, 2, 4, 8])] * 2, paddle.to_tensor([3])
    with pytest.raises(Exception, match="query must be"):
        operator(query, *[paddle.ones([1, 0, 4, 8])] * 2, three, None, None)
    wrong = ((three + 2, None, "a length must"), (three, three, "a slot must"), (none, None, "int64 .B."))
    for lengths, slots, words in wrong:
        with pytest.raises(Exception, match=words):
            operator(query, *cache, lengths, slots, None)


def test_gradients(how):
    query, cache = paddle.randn([1, 2, 4, 8]), paddle.randn([1, 2, 6, 8])
    cache.stop_gradient = False
    out = cached_attention(query, cache, cache, paddle.to_tensor([6]))
    out.sum().backward()
    assert float(cache.grad.abs().sum()) > 0
