# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A token from logits: guidance, temperature, top-k, top-p and noise, on a card in one kernel; and which of a window's
guesses are accepted, in another."""

import functools
import math

import numpy as np
import paddle

from paddlemix.utils import InputError

from .. import card_fault, operators

MOST_TOKENS = 1 << 19  # that the kernel takes with top_p
# (rows, positions, tokens, top_k, top_p, whether there is noise) that the kernel is compared in
COMPARED = [
    (2, 3, 32768, 2048, 1.0, True), (1, 64, 5003, 7, 1.0, True), (2, 1, 4099, 0, 1.0, True),
    (2, 64, 3001, 0, 1.0, False), (2, 3, 32768, 2048, 0.9, True), (1, 64, 4099, 0, 0.5, True),
]  # fmt: skip


def pick_token(logits, noise=None, guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, offset=0):
    """Sample by the Gumbel-max trick: the largest of logits / temperature + noise is a draw from their softmax.

    Args:
        logits: float32 [rows, positions, tokens]: one row, or two for guidance, whose second one it leads away from.
        noise: float32 [positions, tokens]; None takes the largest logit.
        guidance_scale, temperature: numbers.
        top_k: tokens below the top_k-th largest are left out; 0 leaves out none.
        top_p: of the others the likeliest that together reach it are kept; 1 keeps all. On a card a sum within rounding
            of it, some 1e-6, may keep another number of tokens than on a CPU.
        offset: what is added to the ids.

    Returns:
        int64 [positions]; of equal ones the first.
    """
    wanted = None if noise is None else logits.shape[1:]
    if len(logits.shape) != 3 or logits.shape[0] not in (1, 2) or (noise is not None and noise.shape != wanted):
        given = None if noise is None else list(noise.shape)
        raise InputError(
            "logits must be [1 or 2, positions, tokens] and noise [positions, tokens] or None, got "
            f"{list(logits.shape)} and {given}"
        )
    if card_takes(logits) and (top_p == 1 or logits.shape[2] <= MOST_TOKENS):
        return operators().pick_token(logits, noise, guidance_scale, temperature, top_k, top_p, offset)
    return _with_paddle(logits, noise, guidance_scale, temperature, top_k, top_p, offset)


def accept_tokens(ids, past, picked, forced, table):
    """Which guesses of a window a forward pass has proved right, and what the next pass reads, for each of its rows.

    A guess is accepted where it is the token that was picked, or forced, for its place, and so were all before it.

    Args:
        ids: int64 [rows, read], what the pass has read. past: int64 [rows], tokens in the cache before it.
        picked: int64 [sequences, picks], from the last ids of each that are no padding.
        forced: int64 [sequences, places], the id that stands in each place, or -1 where one is drawn; behind the last
            place it goes on with that.
        table: int64 [rows, 4]: the row's sequence; how many tokens are in the cache before the sequence's place 0, and
            at the row's end (0: the row stays as it is); how many ids it has read before the first one that it picks
            from.

    Returns:
        (ids int64 [rows, picks], past int64 [rows]) of the next pass; it begins with the last accepted token.
    """
    if ids.place.is_gpu_place() and accept_fault(ids.place.gpu_device_id()) is None:
        return tuple(operators().accept_tokens(ids, past, picked, forced, table))
    return _accept_with_paddle(ids, past, picked, forced, table)


def guided(logits, guidance_scale):
    """Logits [rows, positions, tokens] -> [positions, tokens] (classifier-free guidance)."""
    if logits.shape[0] == 1:
        return logits[0]
    conditional, unconditional = logits[0], logits[1]
    return unconditional + guidance_scale * (conditional - unconditional)


def keep_top_k(logits, top_k):
    """Logits [..., tokens], minus infinity where they are below the top_k-th largest; 0 keeps all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return _filled(logits < _least(logits, top_k), -math.inf, logits)


def keep_top_p(logits, top_p):
    """Logits [..., tokens], minus infinity where they are not of the likeliest that together reach top_p (Holtzman et
    al., arXiv 1904.09751); 1 keeps all. On a card Paddle waits for it to sort or add up a single row, of two it does
    not."""
    if top_p == 1.0:
        return logits
    if logits.place.is_gpu_place() and math.prod(logits.shape[:-1]) == 1:
        two = logits.reshape([1, -1]).tile([2, 1])
        return keep_top_p(two, top_p)[0].reshape(logits.shape)
    ordered = logits.sort(axis=-1, descending=True)
    probabilities = paddle.nn.functional.softmax(ordered, axis=-1)
    before = probabilities.cumsum(axis=-1) - probabilities
    least = _filled(before >= top_p, math.inf, ordered).min(axis=-1, keepdim=True)
    return _filled(logits < least, -math.inf, logits)


def _filled(where, number, x):
    """x, with a number at these places. An operator makes that number: what paddle.where makes of it is copied from the
    host, for which a card is waited for, and never freed."""
    return paddle.where(where, paddle.full([], number, x.dtype), x)


def card_takes(logits):
    """Whether the CUDA kernel computes this on the card, rightly."""
    return logits.place.is_gpu_place() and pick_fault(logits.place.gpu_device_id()) is None


@functools.cache
def pick_fault(card):
    """Why the CUDA kernel is not used on a card; None where it is. It must pick what Paddle's operators pick there."""

    def compare():
        fault, random, place = None, np.random.default_rng(0), paddle.CUDAPlace(card)
        for rows, positions, tokens, top_k, top_p, is_drawn in COMPARED:
            values = (random.standard_normal([rows + 1, positions, tokens]) * 4).round() / 4  # some are equal
            *logits, noise = values.astype(np.float32)
            logits = paddle.to_tensor(np.stack(logits), place=place)
            noise = paddle.to_tensor(noise * 50, place=place) if is_drawn else None  # each that is kept may win
            how = logits, noise, 3.0, 0.7, top_k, top_p, 9
            if not bool((operators().pick_token(*how) == _with_paddle(*how)).all()):
                fault = f"the kernel picks other tokens of {tokens} than Paddle's operators on this card"
        return fault

    return card_fault(card, "the kernel that picks tokens", compare)


@functools.cache
def accept_fault(card):
    """Why the CUDA kernel of accept_tokens is not used on a card; None where it is. As pick_fault."""

    def compare():
        random, fault = np.random.default_rng(0), None
        for how in ((16, 0), (1, 1)):
            given = [paddle.to_tensor(x, place=paddle.CUDAPlace(card)) for x in example_of_passes(random, *how)]
            found, right = operators().accept_tokens(*given), _accept_with_paddle(*given)
            if not all(bool((a == b).all()) for a, b in zip(found, right, strict=True)):
                fault = "the kernel accepts other guesses than Paddle's operators on this card"
        return fault

    return card_fault(card, "the kernel that accepts guesses", compare)


def example_of_passes(random, picks, unpicked, rows=40, sequences=16, places=64):
    """Arguments of accept_tokens: of two ids, so that many guesses are right; rows at their end and of nobody."""
    forced = random.integers(-4, 2, [sequences, places]).clip(-1)
    sequence, at, base = random.integers(0, [[sequences], [places - 1], [9]], [3, rows])
    end = np.where(random.random(rows) < 0.2, 0, base + places - 1 - picks)
    table = np.stack([sequence, base, end, np.full(rows, unpicked)], axis=1)
    ids, picked = random.integers(0, 2, [rows, picks + 1]), random.integers(0, 2, [sequences, picks])
    return ids, base + at - unpicked, picked, forced, table


def _with_paddle(logits, noise, guidance_scale, temperature, top_k, top_p, offset):
    logits = guided(logits, guidance_scale)
    if noise is not None:
        logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p) + noise
    ids = logits.argmax(axis=-1)
    return ids + offset if offset else ids


def _least(logits, top_k):
    """The top_k-th largest logit of each row, [..., 1]. Paddle has a fast way on a card for a tensor of one axis; of
    more axes a single block of threads looks for one value after the other."""
    if logits.place.is_cpu_place():
        return logits.topk(top_k, axis=-1, sorted=False)[0].min(axis=-1, keepdim=True)
    rows = logits.reshape([-1, logits.shape[-1]])
    least = [rows[i].topk(top_k, sorted=False)[0].min() for i in range(rows.shape[0])]
    return paddle.stack(least).reshape([*logits.shape[:-1], 1])


def _accept_with_paddle(ids, past, picked, forced, table):
    """Without an operator that looks at its indices on the host."""
    sequence, base, end, unpicked = table.unbind(axis=1)
    picks, at = picked.shape[1], past + unpicked
    steps = paddle.arange(2 * picks)
    places = (at - base).unsqueeze(-1) + 1 + steps
    tokens = paddle.index_sample(forced.index_select(sequence), places.clip(0, forced.shape[1] - 1))
    drawn = picked.index_select(sequence).index_select(steps.clip(max=picks - 1), axis=1)
    tokens = paddle.where(tokens < 0, drawn, tokens)  # [rows, 2 * picks]
    columns = (unpicked.unsqueeze(-1) + 1 + steps[:picks]).clip(max=ids.shape[1] - 1)
    is_right = (tokens[:, :picks] == paddle.index_sample(ids, columns)) & (steps[:picks] < picks - 1)
    right = 1 + is_right.astype("int64").cumprod(1).sum(1)
    right = paddle.minimum(right, end - at).clip(min=0)
    return paddle.index_sample(tokens, right.clip(min=1).unsqueeze(-1) - 1 + steps[:picks]), at + right
