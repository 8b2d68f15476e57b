# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The loss of a language model in little memory: the head at positions with labels alone, some at a time."""

import paddle
import paddle.nn.functional as F
from paddle.distributed.fleet.utils import recompute

from .datasets import IGNORED

LOGITS = 1 << 26  # float32 numbers that are in memory at once, with their gradients three times as many


def next_token_loss(model, ids, labels):
    """The sum of the cross entropies of a batch's labels, float32 [].

    Of logits no more than LOGITS are in memory: they are made again in the backward pass. Padding on the right needs no
    mask, since no token sees what comes after it.

    Args:
        model: Emu3ForCausalLM.
        ids, labels: int64 [rows, length]; labels are those of the ids at their own positions, IGNORED where there is
            none. At least one position beside the first has one.
    """
    hidden = model.model(ids)[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    places = (labels != IGNORED).nonzero().flatten()
    hidden, labels = hidden.index_select(places), labels.index_select(places)

    def of_rows(hidden, labels):
        return F.cross_entropy(model.lm_head(hidden).astype("float32"), labels, reduction="sum")

    at_once = max(1, LOGITS // model.config.vocab_size)
    if len(labels) <= at_once:
        return of_rows(hidden, labels)
    parts = [
        recompute(of_rows, hidden[start : start + at_once], labels[start : start + at_once], use_reentrant=False)
        for start in range(0, len(labels), at_once)
    ]
    return paddle.stack(parts).sum()
