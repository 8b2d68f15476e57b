# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A decoder layer for new tokens over the cache, on a CPU, in one call: a step of many small operators spends as long
between them as in reading the weights of a small model. The model computes the same with the others."""

from paddlemix.utils import InputError

from .. import operators


def decoder_step(x, norms, weights, scales, cosine, sine, key, value, lengths, slots, epsilon, allowed=None):
    """x + attention(norm(x)), and of that x + mlp(norm(x)). The compiled operator is needed; gives no gradient.

    The result of a row, of its window's first tokens too, is a function of itself alone for up to FEW_ROWS rows and
    tokens in all, and of a row with more new tokens, a part of a prompt, too.

    Args:
        x: float32 [B, new, hidden], the last of the tokens of each row.
        norms: before attention and before the MLP, float32, bfloat16 or float16 [hidden].
        weights: of q, k, v, o, gate, up and down, each as few_rows_linear takes it, all of one dtype.
        scales: of the seven, for int8 and uint8 weights; None for floats.
        cosine, sine: of the rotary angles, float32 [1 or B, new, 1, D], as attention.Rotary doubles them.
        key, value: the cache, as cached_attention takes it. **The new tokens are written into it**, those of row b at
            lengths[b] - new of slot slots[b].
        lengths, slots: as cached_attention takes them; no slot twice.
        allowed: bool [B, max(lengths)], False at padding; None where there is none.

    Returns:
        float32 [B, new, hidden]

    Raises:
        InputError: The cache is a view, which Paddle would copy.
    """
    if not (key.is_contiguous() and value.is_contiguous()):
        raise InputError("decoder_step writes into the cache, whose keys and values must be contiguous: views are not")
    return operators().decoder_step(
        x, norms, weights, scales, cosine, sine, key, value, lengths, slots, allowed, epsilon
    )
