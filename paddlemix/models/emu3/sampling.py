# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tokens from logits: temperature, top-k, top-p, and noise that is a function of the request alone."""

import functools
from dataclasses import dataclass

import numpy as np

from paddlemix.external_ops.pick_token import keep_top_k, keep_top_p, pick_token
from paddlemix.utils import InputError, real_number, whole_number

# Logits are float32: times what is larger, or divided by what is smaller, several become infinite, and so equal.
LARGEST, SMALLEST = 1e15, 1e-15


def check_guidance_scale(guidance_scale):
    """The scale as a float. InputError where it cannot be."""
    accepted = f"a finite number, 1 for no guidance, 0 or of size {SMALLEST:g} to {LARGEST:g}"
    scale = real_number("guidance_scale", guidance_scale, accepted, -LARGEST, LARGEST)
    if 0 < abs(scale) < SMALLEST:
        raise InputError(f"guidance_scale must be {accepted}, got {scale}")
    return scale


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits. top_k=1 is greedy; top_k=0 and top_p=1.0 leave nothing out."""

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        advice = f"; {SMALLEST:g} to {LARGEST:g} are taken, top_k=1 gives greedy decoding"
        limits = "above 0 and finite", SMALLEST, LARGEST
        values = {
            "temperature": real_number("temperature", self.temperature, *limits, advice),
            "top_k": whole_number("top_k", self.top_k, "a whole number, 0 (all) or more", 0),
            "top_p": real_number("top_p", self.top_p, f"above 0, from {SMALLEST:g}, and at most 1", SMALLEST, 1),
            "seed": whole_number("seed", self.seed, "a whole number, 0 to 2**63 - 1", 0),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def noise(self, number, position, size):
        """Gumbel noise float32 [size], a fixed function of (seed, number of the picture or answer, position)."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, number, position])
        return np.random.Generator(bits).gumbel(size=size).astype(np.float32)

    def pick(self, logits, noise):
        """Sample by the Gumbel-max trick: the largest of logits + noise is a draw from their softmax.

        logits: float32 [..., tokens]; noise: of the same shape, None if greedy -> int64 [...].
        """
        if self.is_greedy:
            return logits.argmax(axis=-1)
        return (self.top_logits(logits) + noise).argmax(axis=-1)

    def pick_guided(self, logits, noise, guidance_scale=1.0, offset=0):
        """The same of logits float32 [rows, picked, tokens], of one row or of two (with the prompt, without it), and
        noise float32 [picked, tokens], None if greedy -> int64 [picked], `offset` added."""
        return pick_token(logits, noise, guidance_scale, self.temperature, self.top_k, self.top_p, offset)

    def top_logits(self, logits):
        """Logits over the temperature; minus infinity where top-k or top-p leaves a token out."""
        return keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)

    @property
    def is_greedy(self):
        return self.top_k == 1


GREEDY = Sampling(top_k=1)


class Noise:
    """Sampling's noise for one sequence, each position's made once, ahead of its use where there is time.

    Args:
        sampling: Sampling.
        number: of the picture or answer in its request.
        size: tokens to choose from.
    """

    def __init__(self, sampling, number, size):
        self.sampling, self.number, self.size = sampling, number, size
        self.made = {}

    def __call__(self, start, stop):
        """float32 [stop - start, size]"""
        for make in self.missing(start, stop):
            make()
        return np.stack([self.made[position] for position in range(start, stop)])

    def missing(self, start, stop):
        """Functions that make the noise of these positions where it is not made. That of earlier ones is not needed any
        more. None where nothing is drawn by chance."""
        if self.sampling.is_greedy:
            return []
        self.made = {position: self.made[position] for position in list(self.made) if position >= start}
        return [functools.partial(self._make, p) for p in range(start, stop) if p not in self.made]

    def forget(self):
        """What is made; it is made again where it is asked for."""
        self.made = {}

    def _make(self, position):
        self.made[position] = self.sampling.noise(self.number, position, self.size)
