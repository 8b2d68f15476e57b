# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A row has the same bits alone and beside any others, a token the same in a window and by itself: of the operators on
a CPU, by each kind of vectors, and of what stands in for them."""

import numpy as np
import paddle
import pytest
from test_few_rows_linear import KINDS, make_weight

from paddlemix.external_ops import operators, without_operators
from paddlemix.external_ops.cached_attention import MOST_NEW, cached_attention
from paddlemix.external_ops.decoder_step import decoder_step
from paddlemix.external_ops.few_rows_linear import FEW_ROWS, FEW_ROWS_WITHOUT, few_rows, few_rows_linear
from paddlemix.external_ops.fused_ln import fused_rms_norm

COMPILED = pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")
CACHES = ("float32", "bfloat16", "float16")
# lengths of rows: around the borders of blocks of 64 keys and pieces of 256
LENGTHS = (1, 2, 63, 64, 65, 127, 129, 255, 256, 257, 300, 511, 513, 700, 1025, 1300)


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


@pytest.fixture(params=["plain", "avx2", "avx512", "best"])
def compiled(request, monkeypatch):
    monkeypatch.setenv("EMU3_OPS_SIMD", request.param)


def same(a, b):
    return a.numpy().tobytes() == b.numpy().tobytes()


def random(shape, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# out, in: whole tiles and groups, and not; the last is shared by threads
@pytest.mark.parametrize("out, columns", [(1, 1), (13, 70), (40, 256), (67, 300), (520, 1100)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_linear_layer(how, kind, out, columns):
    weight, scale, _ = make_weight(kind, out, columns)
    x = random([FEW_ROWS, columns])
    alone = paddle.concat([few_rows_linear(x[i : i + 1], weight, scale) for i in range(FEW_ROWS)])
    assert few_rows() == (FEW_ROWS_WITHOUT if how == "paddle" else FEW_ROWS)
    for count in (2, 3, 4, 5, 7, 8, 16, 17, 64):
        if count <= few_rows():
            for first in {0, 1, FEW_ROWS - count} if count < FEW_ROWS else {0}:
                rows = slice(first, first + count)
                assert same(few_rows_linear(x[rows], weight, scale), alone[rows])


@COMPILED
@pytest.mark.parametrize("out, columns", [(1, 1), (13, 70), (67, 300), (200, 1100)])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_a_linear_layer(compiled, kind, out, columns):
    weight, scale, _ = make_weight(kind, out, columns)
    x = random([150, columns])
    together = few_rows_linear(x, weight, scale)
    for first, count in ((0, FEW_ROWS + 1), (85, 65), (1, 66), (3, 77), (20, 128)):
        rows = slice(first, first + count)
        assert same(few_rows_linear(x[rows], weight, scale), together[rows])


@pytest.mark.parametrize("rows", [7, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_beside_infinity_and_nan(how, kind, rows):
    if rows > few_rows() and how == "paddle":
        return
    weight, scale, _ = make_weight(kind, 21, 300)
    x = random([rows, 300])
    alone = few_rows_linear(x, weight, scale)
    x[2, 290], x[5, 0] = np.inf, np.nan
    y = few_rows_linear(x, weight, scale)
    finite = [0, 1, 3, 4, 6]
    assert same(y[finite], alone[finite])
    for row in (2, 5) if rows <= few_rows() else ():
        np.testing.assert_array_equal(y[row].numpy(), few_rows_linear(x[row : row + 1], weight, scale)[0].numpy())


def make_cache(slots, kv_heads, room, dim, dtype, seed=0):
    return [random([slots, kv_heads, room, dim], seed + i).astype(dtype) for i in range(2)]


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (6, 2, 20), (3, 3, 128)])
def test_rows_of_attention(how, heads, kv_heads, dim, dtype):
    rows = len(LENGTHS)
    query, lengths = 3 * random([rows, 1, heads, dim], 9), paddle.to_tensor(LENGTHS)
    cache = make_cache(rows + 1, kv_heads, 1302, dim, dtype)
    slots = paddle.to_tensor(np.random.default_rng(1).permutation(rows + 1)[:rows])
    together = cached_attention(query, *cache, lengths, slots)
    for row in range(rows):
        one = slice(row, row + 1)
        assert same(cached_attention(query[one], *cache, lengths[one], slots[one]), together[one])
        slot = slots[one].item()
        own = [x[slot : slot + 1, :, : lengths[row].item()] for x in cache]
        assert same(cached_attention(query[one], *own, lengths[one]), together[one])
    some = paddle.to_tensor([3, 14, 8])
    assert same(cached_attention(query[some], *cache, lengths[some], slots[some]), together[some])


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("length", [64, 70, 130, 262, 519, 1300])
def test_windows_of_attention(how, length, dtype):
    query, cache = 3 * random([1, MOST_NEW, 4, 64], 9), make_cache(1, 2, 1302, 64, dtype)
    start = length - MOST_NEW
    alone = [cached_attention(query[:, i : i + 1], *cache, paddle.to_tensor([start + i + 1])) for i in range(MOST_NEW)]
    for new in (2, 3, 8, 17, MOST_NEW):
        window = cached_attention(query[:, :new], *cache, paddle.to_tensor([start + new]))
        assert same(window, paddle.concat(alone[:new], axis=1))
    # what stands behind a token takes no part, not even as infinity times nothing
    for x in cache:
        x[:, :, start + 5 :] = np.inf
    assert same(cached_attention(query, *cache, paddle.to_tensor([length]))[:, :5], paddle.concat(alone[:5], axis=1))


@COMPILED
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("length", [80, 200, 600])
def test_prompts_of_attention(compiled, length, dtype):
    """A token of more than MOST_NEW new ones: beside more of them, and beside other rows."""
    query, cache = 3 * random([2, length, 6, 20], 9), make_cache(2, 2, length + 2, 20, dtype)
    together = cached_attention(query, *cache, paddle.to_tensor([length, length]))
    for first, stop in ((0, 65), (length - 70, length), (length // 7, 67 + length // 7)):
        for row in range(2):
            part = cached_attention(
                query[row : row + 1, first:stop], *cache, paddle.to_tensor([stop]), paddle.to_tensor([row])
            )
            assert same(part, together[row : row + 1, first:stop])
    # what stands behind a token takes no part, not even as infinity times nothing
    for behind in (length - 1, length - 6, 65):
        before = [x.clone() for x in cache]
        for x in before:
            x[:, :, behind:] = np.nan
        changed = cached_attention(query, *before, paddle.to_tensor([length, length]))
        assert same(changed[:, :behind], together[:, :behind]) and changed[:, behind:].isnan().all()


@COMPILED
def test_padding_of_another_row_of_attention(compiled):
    """Masks are for PaddleNLP's generate; a row that masks nothing is as without one."""
    query, cache, lengths = random([3, 2, 4, 64], 9), make_cache(3, 2, 400, 64, "float32"), [300, 70, 400]
    allowed = paddle.ones([3, 400], dtype="bool")
    allowed[0, :130] = False
    lengths = paddle.to_tensor(lengths)
    masked = cached_attention(query, *cache, lengths, None, allowed)
    assert same(masked[1:], cached_attention(query, *cache, lengths)[1:])


HIDDEN, HEADS, KV_HEADS, DIM, INNER, ROOM = 96, 6, 2, 16, 203, 330


def make_layer(kind):
    """norms, weights and scales as decoder_step takes them"""
    kept = KV_HEADS * DIM
    sizes = [(HIDDEN, HIDDEN), (kept, HIDDEN), (kept, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN)]
    made = [make_weight(kind, *size, seed) for seed, size in enumerate([*sizes, (HIDDEN, INNER)])]
    weights, scales = [weight for weight, _, _ in made], [scale for _, scale, _ in made]
    return [1 + 0.1 * random([HIDDEN], seed) for seed in (7, 8)], weights, None if scales[0] is None else scales


def angles(lengths, new):
    """cosine and sine of the last `new` positions of each row, [B, new, 1, DIM]"""
    places = (np.array(lengths)[:, None] - new + np.arange(new))[..., None] / 100 ** (np.arange(DIM // 2) / (DIM // 2))
    pair = np.cos(places), np.sin(places)
    doubled = np.concatenate([pair[0]] * 2, -1), np.concatenate([-pair[1], pair[1]], -1)
    return [paddle.to_tensor(x[:, :, None].astype(np.float32)) for x in doubled]


@COMPILED
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_windows_of_a_decoder_layer(compiled, kind, dtype):
    layer = make_layer(kind)

    def run(cache, x, lengths, slots):
        """Writes into the cache."""
        cosine, sine = angles(lengths, x.shape[1])
        rows = [paddle.to_tensor(numbers) for numbers in (lengths, slots)]
        return decoder_step(x, *layer, cosine, sine, *cache, *rows, 1e-5)

    lengths, slots, new = [8, 70, 259, 330], [4, 0, 3, 1], 8
    x = random([4, new, HIDDEN], 3)
    window = make_cache(5, KV_HEADS, ROOM, DIM, dtype)
    start = [t.clone() for t in window]
    together = run(window, x, lengths, slots)
    for row in range(4):
        cache = [t.clone() for t in start]
        one, place, length = slice(row, row + 1), slots[row : row + 1], lengths[row]
        assert same(run(cache, x[one], [length], place), together[one])
        assert all(same(a[place], b[place]) for a, b in zip(cache, window, strict=True))
        cache = [t.clone() for t in start]
        steps = [run(cache, x[one, i : i + 1], [length - new + 1 + i], place) for i in range(new)]
        assert same(paddle.concat(steps, axis=1), together[one])
        assert all(same(a[place], b[place]) for a, b in zip(cache, window, strict=True))
        # wrong guesses behind the first three tokens
        cache, guesses = [t.clone() for t in start], paddle.concat([x[one, :3], random([1, 5, HIDDEN], 99)], axis=1)
        assert same(run(cache, guesses, [length], place)[:, :3], together[one, :3])
    assert all(same(a[2], b[2]) for a, b in zip(start, window, strict=True))  # the slot of no row


@COMPILED
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_decoder_layer(compiled, kind, dtype):
    layer, new = make_layer(kind), 100
    cache, x = make_cache(5, KV_HEADS, ROOM, DIM, dtype), random([2, new, HIDDEN], 3)

    def run(x, lengths, slots):
        """Hidden states, and what the slots hold then."""
        own = [t.clone() for t in cache]
        cosine, sine = angles(lengths, x.shape[1])
        rows = [paddle.to_tensor(numbers) for numbers in (lengths, slots)]
        return decoder_step(x, *layer, cosine, sine, *own, *rows, 1e-5), own

    lengths, slots = [100, 329], [3, 1]
    together, both = run(x, lengths, slots)
    for row in range(2):
        alone, own = run(x[row : row + 1], lengths[row : row + 1], slots[row : row + 1])
        assert same(alone, together[row : row + 1])
        assert all(same(a[slots[row]], b[slots[row]]) for a, b in zip(own, both, strict=True))


@pytest.mark.parametrize("cols", [1, 7, 64, 129, 1027])
@pytest.mark.parametrize("dtype", CACHES)
def test_rows_of_a_norm(how, cols, dtype):
    x, scale = random([64, cols]).astype(dtype), random([cols], 1)
    together = fused_rms_norm(x, scale, 1e-5)[0]
    for count in (1, 2, 5, 17):
        rows = [fused_rms_norm(x[i : i + count], scale, 1e-5)[0] for i in range(0, 64, count)]
        assert same(paddle.concat(rows), together)
