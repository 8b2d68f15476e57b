# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Guesses of a token when it comes new into a window of speculative Jacobi decoding, for benchmarks/speculation.py."""

import functools

import numpy as np

from paddlemix.external_ops.pick_token import guided
from paddlemix.models.emu3 import Drawing, Sampling


class Guessing(Drawing):
    """Guesses in another way of tokens that come new into the window: `guess` is one of GUESSES.

    `passes` counts its forward passes; `logits` keeps those that each known or guessed place was picked from last.
    """

    def __init__(self, *args, guess, **options):
        super().__init__(*args, **options)
        self.guess, self.passes, self.logits = GUESSES[guess], 0, {}
        self.noise = Kept(self.noise)

    def pick(self, logits, noise):
        self.passes += 1
        rows = guided(logits, self.guidance_scale).numpy() / self.sampling.temperature
        for place, row in enumerate(rows, self._next()):
            if self.forced[place] < 0:
                self.logits[place] = row
        return super().pick(logits, noise)

    def accept(self, read, picked):
        stop = self._next() + len(picked)
        gained = super().accept(read, picked)
        if self.guess and len(picked):
            for place in range(stop, min(self._next() + self.window, len(self.ids))):
                if self.forced[place] < 0:
                    self.ids[place] = self.guess(self, place)
        return gained

    def above(self, place):
        """The place a row above; None in the first row."""
        return place - self.size[1] - 1 if place > self.size[1] + 1 else None

    def left(self, place):
        return place - 1 if self.forced[place - 1] < 0 else place - 2  # a row's end, or the prompt's

    def draw(self, place, *near):
        """What the place's own noise draws from the mean of the logits at places near it, as far as there are any."""
        found = [self.logits[other] for other in near if other in self.logits] or [self.logits[max(self.logits)]]
        return int((np.mean(found, 0) + self.noise(place - 1, place)[0]).argmax()) + self.grammar.first_visual

    def follower(self, place):
        """What followed the last time that the same tokens stood left and above."""

        def key(at):
            return self.ids[self.left(at)], self.ids[self.above(at) or 0]

        seen = [at for at in range(2, self.known) if self.forced[at] < 0 and key(at) == key(place)]
        return self.ids[seen[-1] if seen else self.left(place)]


GUESSES = {
    "the one in use": None,
    "last drawn": lambda d, place: d.ids[max(d.logits)],
    "above": lambda d, place: d.ids[d.above(place) or d.left(place)],
    "above, one to the right": lambda d, place: d.ids[d.above(place + 1) or d.left(place)],
    "after the same left and above": Guessing.follower,
    "own noise, last logits": lambda d, place: d.draw(place),
    "own noise, logits above": lambda d, place: d.draw(place, d.above(place)),
    "own noise, mean of both": lambda d, place: d.draw(place, d.above(place), max(d.logits)),
}  # fmt: skip


class Kept:
    """A Drawing's noise, each position's made once for all drawings of a seed: guesses need it ahead of its turn."""

    def __init__(self, noise):
        self.size, self.at = noise.size, functools.partial(_noise, noise.sampling.seed, noise.number, noise.size)

    def __call__(self, start, stop):
        return np.stack([self.at(position) for position in range(start, stop)])

    def missing(self, start, stop):
        return []

    def forget(self):
        """Nothing: other drawings of the seed need it."""


@functools.cache
def _noise(seed, number, size, position):
    return Sampling(seed=seed).noise(number, position, size)
