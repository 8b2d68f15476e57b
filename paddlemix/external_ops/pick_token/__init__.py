# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A token from logits: guidance, temperature, top-k and noise, on a card in one kernel."""

import functools
import math

import numpy as np
import paddle

from paddlemix.utils import InputError

from .. import card_fault, operators

# (rows, positions, tokens, top_k, whether there is noise) that the kernel is compared in
COMPARED = [(2, 3, 32768, 2048, True), (1, 64, 5003, 7, True), (2, 1, 4099, 0, True), (2, 64, 3001, 0, False)]


def pick_token(logits, noise=None, guidance_scale=1.0, temperature=1.0, top_k=0, offset=0):
    """Sample by the Gumbel-max trick: the largest of logits / temperature + noise is a draw from their softmax.

    Args:
        logits: float32 [rows, positions, tokens]: one row, or two for guidance, whose second one it leads away from.
        noise: float32 [positions, tokens]; None takes the largest logit.
        guidance_scale, temperature: numbers.
        top_k: tokens below the top_k-th largest are left out; 0 leaves out none.
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
    if card_takes(logits):
        return operators().pick_token(logits, noise, guidance_scale, temperature, top_k, offset)
    return _with_paddle(logits, noise, guidance_scale, temperature, top_k, offset)


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
    return hidden(logits < _least(logits, top_k), logits)


def hidden(where, logits):
    """Logits, minus infinity at these. An operator makes that number: what paddle.where makes of it is never freed."""
    return paddle.where(where, paddle.full([], -math.inf, logits.dtype), logits)


def card_takes(logits):
    """Whether the CUDA kernel computes this on the card, rightly."""
    return logits.place.is_gpu_place() and pick_fault(logits.place.gpu_device_id()) is None


@functools.cache
def pick_fault(card):
    """Why the CUDA kernel is not used on a card; None where it is. It must pick what Paddle's operators pick there."""

    def compare():
        fault, random, place = None, np.random.default_rng(0), paddle.CUDAPlace(card)
        for rows, positions, tokens, top_k, is_drawn in COMPARED:
            values = (random.standard_normal([rows + 1, positions, tokens]) * 4).round() / 4  # some are equal
            *logits, noise = values.astype(np.float32)
            logits = paddle.to_tensor(np.stack(logits), place=place)
            noise = paddle.to_tensor(noise * 50, place=place) if is_drawn else None  # each that is kept may win
            how = logits, noise, 3.0, 0.7, top_k, 9
            if not bool((operators().pick_token(*how) == _with_paddle(*how)).all()):
                fault = f"the kernel picks other tokens of {tokens} than Paddle's operators on this card"
        return fault

    return card_fault(card, "the kernel that picks tokens", compare)


def _with_paddle(logits, noise, guidance_scale, temperature, top_k, offset):
    logits = guided(logits, guidance_scale)
    if noise is not None:
        logits = keep_top_k(logits / temperature, top_k) + noise
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
