# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Cross entropy on a CPU, with its gradient in the memory of the logits."""

import paddle

from .. import operators


def fused_cross_entropy_(logits, labels):
    """Losses of rows of logits, which become the gradient of their sum. The caller asks `operators()` first.

    Args:
        logits: float32 [rows, classes] on the CPU; softmax(logits) - one_hot(labels) when this returns.
        labels: int64 [rows] on the CPU, each a class.

    Returns:
        float32 [rows]
    """
    losses = paddle.empty(logits.shape[:1], "float32")
    operators().fused_cross_entropy(logits, labels, losses)
    return losses
