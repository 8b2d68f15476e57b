# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Causal attention of whole rows on a CPU, with its gradient, in memory linear in their length: for training."""

import paddle

from .. import operators


def causal_attention(query, key, value, dropout=0.0):
    """Grouped-query attention in which a token sees itself and those before it. The caller asks `operators()` first.

    The gradient is the same whatever the number of threads is.

    Args:
        query: float32 [B, length, H, D] on the CPU, not empty, not scaled.
        key, value: float32 [B, kv, length, D], H a multiple of kv.
        dropout: of weights, less than 1; Paddle's random numbers give the seed of it.

    Returns:
        float32 [B, length, H * D]
    """
    seed = paddle.randint(0, 2**31 - 1, [1]).item() if dropout else 0
    return operators().causal_attention(query, key, value, dropout, seed)[0]
