# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The loss of a language model in little memory: the head at positions with labels alone, some at a time."""

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed.fleet.utils import recompute

from paddlemix.external_ops import operators
from paddlemix.external_ops.float_product import float_product
from paddlemix.external_ops.fused_cross_entropy import fused_cross_entropy_
from paddlemix.models.emu3.needs import LOGITS

from .datasets import IGNORED


def next_token_loss(model, ids, labels):
    """The sum of the cross entropies of a batch's labels, float32 [].

    Of logits no more than LOGITS are in memory, on a card with their gradients three times as many. Their gradient is
    made at once on a CPU; elsewhere they are made again in the backward pass. Padding on the right needs no mask, since
    no token sees what comes after it.

    Args:
        model: Emu3ForCausalLM.
        ids, labels: int64 [rows, length]; labels are those of the ids at their own positions, IGNORED where there is
            none. At least one position beside the first has one.
    """
    labels = F.pad(labels[:, 1:], [0, 0, 0, 1], value=IGNORED).flatten()  # of the positions that predict them
    places = (labels != IGNORED).nonzero().flatten()
    hidden, labels = model.model(ids).flatten(0, 1).index_select(places), labels.index_select(places)
    at_once, head = max(1, LOGITS // model.config.vocab_size), model.lm_head
    if _has_head_loss(head, hidden):
        return _HeadLoss.apply(hidden, head.weight, head.weight_scale, labels, at_once)

    def of_rows(hidden, labels):
        return F.cross_entropy(head(hidden).astype("float32"), labels, reduction="sum")

    if len(labels) <= at_once:
        return of_rows(hidden, labels)
    parts = [
        recompute(of_rows, hidden[start : start + at_once], labels[start : start + at_once], use_reentrant=False)
        for start in range(0, len(labels), at_once)
    ]
    return paddle.stack(parts).sum()


def _has_head_loss(head, hidden):
    """Training on a CPU with the compiled operators, a head without an adapter."""
    if operators() is None or not hidden.place.is_cpu_place() or hidden.dtype != paddle.float32:
        return False
    return paddle.is_grad_enabled() and {name for name, _ in head.named_parameters()} <= {"weight", "weight_scale"}


class _HeadLoss(PyLayer):
    """The sum of the losses of rows. The gradients of some rows' logits go through the head while they are there: three
    products of the head, where making the logits again would take four."""

    @staticmethod
    def forward(ctx, hidden, weight, scale, labels, at_once):
        ctx.others = [None] * (scale is not None) + [None]  # no gradients of these
        losses, dhidden, logits, ctx.dweight, ctx.dtype = [], [], None, None, weight.dtype
        for start in range(0, len(labels), at_once):
            some = hidden[start : start + at_once]
            logits = None if logits is None or len(some) < len(logits) else logits  # its memory again
            logits = float_product(some, weight, scale, into=logits, add=False)
            losses.append(fused_cross_entropy_(logits, labels[start : start + at_once]))
            dhidden.append(float_product(logits, weight, scale, hidden.shape[1], weight_turned=True))
            if not weight.stop_gradient:
                ctx.dweight = float_product(logits, some, x_turned=True, weight_turned=True, into=ctx.dweight)
        ctx.dhidden = paddle.concat(dhidden)
        return paddle.concat(losses).sum()

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight, ctx.dhidden, ctx.dweight = ctx.dhidden, ctx.dweight, None, None
        if dweight is not None:
            dweight = dweight.scale_(float(dloss)).astype(ctx.dtype)
        return dhidden.scale_(float(dloss)), dweight, *ctx.others
