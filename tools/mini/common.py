# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the training programs share: checkpoints to go on from, a step of training, the learning rate's course."""

import hashlib
import math
import os
import sys
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


def need(path):
    """The checkpoint at a path; where there is none the program ends."""
    return load(path) or sys.exit(
        f"{path} is missing: train_vision.py, then train_language.py write such files to --out"
    )


def save_training(path, step, of, model, optimizers, **more):
    """A checkpoint after `step` steps, from which `resume` goes on. `of` tells what the training was of."""
    save(path, step=step, of=of, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], **more)


def resume(path, of, model, optimizers):
    """Go on from a checkpoint: what it holds, of which "step" is the steps done; those are 0 where there is none."""
    state = load(path)
    if state is None:
        return {"step": 0}
    if state["of"] != of:
        sys.exit(f"{path} is of another training ({state['of']}, not {of}): remove it, or name another --out")
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(kept)
    return state


def encoder_of(state):
    """What stands for the codes that a vision tokenizer with this state gives."""
    parts = [t.numpy().tobytes() for name, t in sorted(state.items()) if not name.startswith(("decoder", "post_quant"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def descend(optimizers, weights, loss, rate):
    """A step down the gradient of `loss`, whose norm over `weights` is cut to 1, at a learning rate."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / ((a - b) ** 2).mean()))


class ConvMuon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for convolutions, each weight taken as a matrix [out, in * kernel].

    Momentum, made nearly orthogonal by five Newton-Schulz rounds, as large as an Adam step (Liu et al., arXiv
    2502.16982). torch.optim.Muon takes matrices alone.
    """

    def __init__(self, weights, momentum=0.9):
        super().__init__(weights, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.mul_(group["momentum"]).add_(weight.grad)
                update = (weight.grad + group["momentum"] * average).reshape(len(weight), -1)
                size = 0.2 * max(update.shape) ** 0.5
                weight.sub_(_orthogonal(update).reshape(weight.shape), alpha=group["lr"] * size)


def _orthogonal(matrix):
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()
