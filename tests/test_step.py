# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The pass that a GPU takes, run on a CPU: the same tokens, and fit to be recorded once and replayed (a CUDA graph)."""

import contextlib
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from test_generation import DATA, GRAMMAR, NEGATIVE, PROMPTS, unpadded

from paddlemix.models.emu3 import Emu3ForCausalLM, cache, generate_images, generate_text, modeling_emu3
from paddlemix.models.emu3 import generation_emu3 as generation
from paddlemix.models.emu3.generation_emu3 import Sampling

TO_HOST = ("numpy", "item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__", "cpu")
TENSORS = "feed", "past", "noise", "allowed", "picked"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BLOCK", 8)


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch, run):
    """Passes after the prompt are steps; `run(step, original)` stands for a step's `run`, which makes no argument."""
    original = generation._Step.run
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_on_gpu", lambda model: True)
        patch.setattr(generation._Step, "run", lambda step: run(step, original))
        yield


@contextlib.contextmanager
def nothing_comes_to_the_host():
    def refuse(*args, **kwargs):
        raise AssertionError("a step waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in TO_HOST:
            patch.setattr(paddle.Tensor, name, refuse)
        yield


def addresses(step):
    tensors = [getattr(step, name) for name in TENSORS] + step.cache.keys + step.cache.values
    return [None if t is None else (t.data_ptr(), tuple(t.shape), t.dtype) for t in tensors]


class Recorder:
    """Runs steps, and sees to it that they could be replays of the first with their shape.

    Python's numbers are hidden from a step while it runs: the position cannot come from the cache's length.
    """

    def __init__(self):
        self.first, self.replays, self.rooms = {}, 0, set()

    def __call__(self, step, run):
        length, step.cache.length = step.cache.length, None
        with nothing_comes_to_the_host():
            run(step)
        step.cache.length = length
        self.rooms.add(step.cache.room)
        if step in self.first:
            self.replays += 1
        assert self.first.setdefault(step, addresses(step)) == addresses(step)


@pytest.mark.parametrize("guidance_scale", [3.0, 1])
@pytest.mark.parametrize("decoding", ["step", "jacobi"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {}, {"top_p": 0.9, "temperature": 4}], ids=str)
def test_pictures(language_model, monkeypatch, settings, pictures, decoding, guidance_scale):
    """Prompts of different lengths, thus padding, but for one picture without guidance; many blocks of the cache."""
    sizes = [(6, 3), (3, 7)][:pictures]
    prompts, negative = PROMPTS[:pictures], NEGATIVE[:pictures]
    how = prompts, sizes, GRAMMAR, negative, guidance_scale, Sampling(seed=5, **settings), None, decoding, 4
    expected = generate_images(language_model, *how)
    recorder = Recorder()
    with as_on_a_gpu(monkeypatch, recorder):
        drawn = generate_images(language_model, *how)
    for codes, others in zip(drawn.codes, expected.codes, strict=True):
        np.testing.assert_array_equal(codes, others)
    assert drawn.forward_passes == expected.forward_passes
    assert len(recorder.first) + recorder.replays == drawn.forward_passes - 1  # all but the prompt's
    assert recorder.replays and len(recorder.rooms) > 2


def test_answers(language_model, monkeypatch):
    """Two rows, one of them padded."""
    recorder = Recorder()
    with as_on_a_gpu(monkeypatch, recorder):
        steps = list(generate_text(language_model, unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24))
    np.testing.assert_array_equal(np.array(steps).T, DATA["greedy"][:, 20:])
    assert recorder.replays == 23 - len(recorder.first) and len(recorder.first) == len(recorder.rooms)


@pytest.mark.parametrize("scaling", ["linear", "dynamic"])
def test_scaled_positions(language_dir, monkeypatch, scaling):
    """Of the dynamic scaling the base changes with every token."""
    model = Emu3ForCausalLM.from_pretrained(
        language_dir, rope_scaling={"type": scaling, "factor": 2.0}, max_position_embeddings=24
    )
    how = unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24
    expected, recorder = list(generate_text(model, *how)), Recorder()
    with as_on_a_gpu(monkeypatch, recorder):
        assert list(generate_text(model, *how)) == expected
    assert recorder.replays


class Returned(cache.CacheAt):
    """Gives keys and values back: a program of Paddle's may not write into its inputs."""

    def write(self, layer, key, value):
        for cached, new in ((self.keys, key), (self.values, value)):
            rows = [-1, self.head_dim]
            written = paddle.scatter(cached[layer].reshape(rows), self.rows, new.reshape(rows))
            cached[layer] = written.reshape(cached[layer].shape)


def test_a_step_traced_once_is_replayed(language_model, monkeypatch):
    """As a program of Paddle's, in which whatever was a number of Python's is a constant; so it is in a CUDA graph."""
    cpu, programs = paddle.zeros([]).place, {}
    monkeypatch.setattr(paddle.pir.Value, "place", property(lambda value: cpu))  # a program's values have none
    monkeypatch.setattr("paddlemix.external_ops.few_rows_linear.operators", lambda: None)
    monkeypatch.setattr("paddlemix.external_ops.operators", lambda: None)
    monkeypatch.setattr(modeling_emu3, "CacheAt", Returned)
    monkeypatch.setattr(cache, "CACHE_BLOCK", 64)
    traces, runs = [], []

    def replay(step, run):
        def whole(feed, past, noise, keys, values):
            traces.append(step)
            cache = SimpleNamespace(keys=list(keys), values=list(values))
            hidden = step.model.model.step(feed, past, step.allowed, cache)
            return step.pick(hidden[:, -step.count :], noise), cache.keys, cache.values

        cached = step.cache.keys, step.cache.values
        program = programs.setdefault(step, paddle.jit.to_static(whole, full_graph=True))
        step.picked, *written = program(step.feed, step.past, step.noise, *cached)
        for old, new in zip(sum(cached, []), sum(written, []), strict=True):
            old.copy_(new, False)
        runs.append(step)

    sampling = Sampling(seed=5, top_p=0.9)
    how = PROMPTS, [(1, 9), (1, 7)], GRAMMAR, NEGATIVE, 3.0, sampling, None, "step"  # no row's end: one shape of step
    expected = generate_images(language_model, *how).codes
    with as_on_a_gpu(monkeypatch, replay):
        drawn = generate_images(language_model, *how).codes
    for codes, others in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(codes, others)
    assert len(traces) == 1 and len(runs) == 8
