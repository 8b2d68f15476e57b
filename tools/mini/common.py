# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the training programs share: checkpoints to go on from, and the learning rate's course."""

import math
import os
from pathlib import Path

import torch


def save(path, **state):
    """Write a checkpoint, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path):
    """The checkpoint at a path, or None where there is none."""
    return torch.load(path, weights_only=False) if Path(path).is_file() else None


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / ((a - b) ** 2).mean()))
