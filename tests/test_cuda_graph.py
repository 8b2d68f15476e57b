# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Forward passes recorded as CUDA graphs. No card is here: what stands in for Paddle's CUDAGraph keeps the pass that it
was given to record, does not compute it, and computes it when it is replayed."""

from collections import Counter

import numpy as np
import paddle
import pytest
from conftest import host_left_out
from paddle.device.cuda import graphs
from test_generation import DATA, GRAMMAR, NEGATIVE, PROMPTS, unpadded
from test_step import addresses, as_on_a_gpu

from paddlemix import machine
from paddlemix.models.emu3 import Drawing, cache, cuda_graph, decoding, generate_images, generate_text, passes
from paddlemix.models.emu3.decoding import Batch
from paddlemix.models.emu3.generation_emu3 import make_drawings
from paddlemix.models.emu3.sampling import Sampling
from paddlemix.paddle_private import to_tensor


class Card:
    """Card 1 of a machine: its graphs, and what happens in which order."""

    def __init__(self):
        self.log, self.places, self.most, self.warnings = [], set(), 0, []
        self.capturing, self.fails = None, None
        self.eager = Counter()  # runs of a pass by Paddle's operators
        self.live = set()

    def run(self, step, original):
        """In place of Pass.run."""
        if self.capturing is None:
            self.eager[step] += 1
            return original(step)
        if self.fails == "kernel":
            raise OSError("(External) CUDA error(900), operation not permitted when stream is capturing.\n[more]")
        self.capturing.kernels = step, original, addresses(step)

    def graph(card):
        class Graph:
            def __init__(self, place):
                card.places.add(place)

            def capture_begin(self):
                assert card.capturing is None and card.log[-1] == "wait"
                card.capturing = self

            def capture_end(self):
                card.capturing = None
                if card.fails:
                    raise RuntimeError("(External) CUDA error(901), the capture was invalidated")
                card.log.append("record")
                card.live.add(self)
                card.most = max(card.most, len(card.live))

            def replay(self):
                step, original, recorded = self.kernels
                assert self in card.live and addresses(step) == recorded
                lengths, step.cache.lengths = step.cache.lengths, None
                with host_left_out():
                    original(step)
                step.cache.lengths = lengths
                card.log.append("replay")

            def reset(self):
                assert card.log[-1] == "wait"
                card.live.remove(self)
                card.log.append("reset")

        return Graph


@pytest.fixture
def card(monkeypatch):
    found = Card()
    monkeypatch.setattr(cache, "CACHE_BLOCK", 8)
    monkeypatch.setattr(decoding, "FEW_ROWS", 16)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:1")
    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: f"card {number}")
    monkeypatch.setattr(paddle.device, "synchronize", lambda: found.log.append("wait"))
    monkeypatch.setattr(graphs, "CUDAGraph", found.graph())
    monkeypatch.setattr(passes, "upload", to_tensor)
    for module in (decoding, cache):
        monkeypatch.setattr(module, "require_memory", lambda *_: None)
    monkeypatch.setattr(cache, "release_memory", lambda: found.log.append("grown"))
    monkeypatch.setattr(cuda_graph, "_may_record", True)
    log = cuda_graph.logging.getLogger(cuda_graph.__name__)
    monkeypatch.setattr(log, "warning", lambda text, *values: found.warnings.append(text % values))
    with as_on_a_gpu(monkeypatch, found.run):
        yield found


def pictures(model, how="step", sizes=((6, 3), (3, 7)), **settings):
    count = len(sizes)
    sampling = Sampling(seed=5, **settings)
    return generate_images(model, PROMPTS[:count], sizes, GRAMMAR, NEGATIVE[:count], 3.0, sampling, how, 4)


@pytest.fixture(scope="module")
def expected(language_model):
    """On a CPU."""
    return pictures(language_model)


def same(drawn, expected):
    for codes, others in zip(drawn.codes, expected.codes, strict=True):
        np.testing.assert_array_equal(codes, others)


@pytest.mark.parametrize("how", ["step", "jacobi"])
def test_pictures(expected, language_model, card, how, monkeypatch):
    """The third pass of a shape is recorded, on the card in use, and again after the cache has grown or a picture has
    left: by then the old one was given up."""
    monkeypatch.setattr(Drawing, "ahead", 10)
    drawn = pictures(language_model, how)
    same(drawn, expected)
    assert card.places == {"card 1"} and card.log.count("record") >= {"step": 3, "jacobi": 1}[how]
    passes = card.log.count("replay") + sum(card.eager.values())
    in_vain = passes - drawn.forward_passes  # behind the end of a picture
    assert in_vain == 0 if how == "step" else 0 <= in_vain < 4
    assert max(card.eager.values()) == cuda_graph.WARM_UP
    assert card.most <= decoding.MOST_PASSES and not card.live and not card.warnings
    live = 0
    for event in card.log:
        live += {"record": 1, "reset": -1}.get(event, 0)
        assert event != "grown" or live == 0


def test_answers(language_model, card):
    steps = list(generate_text(language_model, unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24))
    np.testing.assert_array_equal(np.array(steps).T, DATA["greedy"][:, 20:])
    assert card.log.count("replay") == 24 - sum(card.eager.values()) > 0


@pytest.mark.parametrize("most", [1, 2])
def test_few_graphs_are_kept(language_model, card, monkeypatch, most):
    """Those of the shapes used last: a row's end is read together with the token before it. One that comes again later
    is recorded once more."""
    monkeypatch.setattr(cache, "CACHE_BLOCK", 64)
    monkeypatch.setattr(decoding, "MOST_PASSES", most)
    drawn = pictures(language_model, sizes=[(5, 7)])
    assert card.most == most and card.log.count("record") == {1: 5, 2: 2}[most]
    assert drawn.forward_passes == card.log.count("replay") + sum(card.eager.values()) == 35


def test_a_picture_joins_and_one_is_cut_off(expected, language_model, card, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BLOCK", 64)
    drawings = make_drawings(PROMPTS, [(6, 3), (3, 7)], GRAMMAR, NEGATIVE, 3.0, Sampling(seed=5))
    batch, counts = Batch(language_model, "step"), []
    batch.join(drawings[0])
    batch.step()  # of a row
    assert card.live
    batch.join(drawings[1])
    assert not card.live
    for _ in range(3):
        batch.step()
    counts.append(card.log.count("record"))
    assert card.live
    batch.leave(drawings[1])
    assert not card.live
    while batch:
        batch.step()
    other = Batch(language_model, "step")
    other.join(drawings[1])  # reads again what it has drawn
    while other:
        other.step()
    for drawing, codes in zip(drawings, expected.codes, strict=True):
        np.testing.assert_array_equal(drawing.codes(), codes)
    assert card.log.count("record") > counts[0] > 1


@pytest.mark.parametrize("fails", ["kernel", "end"])
def test_what_cannot_be_recorded_goes_on_without(expected, language_model, card, fails):
    """By Paddle's operators, with one line for all passes."""
    card.fails = fails
    drawn = pictures(language_model)
    same(drawn, expected)
    assert sum(card.eager.values()) == drawn.forward_passes and not card.live
    (words,) = card.warnings
    assert {"kernel": "OSError (External) CUDA error(900)", "end": "CUDA error(901)"}[fails] in words


def test_ctrl_c_while_a_pass_is_recorded(expected, language_model, card, monkeypatch):
    """The next step records it."""
    drawings = make_drawings(PROMPTS, [(6, 3), (3, 7)], GRAMMAR, NEGATIVE, 3.0, Sampling(seed=5))
    batch, run, pressed = Batch(language_model, "step"), decoding.Pass.run, []

    def interrupted(step):
        if card.capturing and not pressed:
            pressed.append(step)
            raise KeyboardInterrupt
        run(step)

    with monkeypatch.context() as patch:  # undone before what the fixture has put there
        patch.setattr(decoding.Pass, "run", interrupted)
        batch.join(*drawings)
        while batch:
            try:
                batch.step()
            except KeyboardInterrupt:
                assert pressed and card.capturing is None
    for drawing, codes in zip(drawings, expected.codes, strict=True):
        np.testing.assert_array_equal(drawing.codes(), codes)
    assert pressed and not card.warnings


def test_graphs_are_given_up_where_memory_is_out(expected, language_model, card, monkeypatch):
    """Before Paddle releases what it keeps, and the step is tried once more."""
    monkeypatch.setattr(cache, "CACHE_BLOCK", 64)
    released, run = [], decoding.Pass.run

    def out_of_memory(step):
        if card.live and not card.capturing and not released:
            raise MemoryError("ResourceExhaustedError: Out of memory error on GPU 1")
        run(step)

    monkeypatch.setattr(machine, "release_memory", lambda: released.append(len(card.live)))
    with monkeypatch.context() as patch:
        patch.setattr(decoding.Pass, "run", out_of_memory)
        same(pictures(language_model), expected)
    assert released == [0] and card.live == set() and card.log.count("record") > 1


def test_memory_that_is_out_while_a_pass_is_recorded(language_model, request, monkeypatch):
    """The pass goes on by Paddle's operators, and is recorded when the graphs were given up the next time."""
    expected, card = pictures(language_model), request.getfixturevalue("card")
    run, out = decoding.Pass.run, []

    def once(step):
        if card.capturing and not out:
            out.append(step)
            raise MemoryError("ResourceExhaustedError: Out of memory error on GPU 1")
        run(step)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Pass, "run", once)
        same(pictures(language_model), expected)
    assert out and card.eager[out[0]] > cuda_graph.WARM_UP and card.log.count("replay") > 0
    (words,) = card.warnings
    assert "MemoryError ResourceExhaustedError: Out of memory" in words


def test_top_p_is_recorded(language_model, request):
    expected, card = pictures(language_model, top_p=0.9), request.getfixturevalue("card")
    same(pictures(language_model, top_p=0.9), expected)
    assert "replay" in card.log and not card.warnings


def test_a_cpu_records_nothing(language_model, monkeypatch):
    def refuse(place):
        raise AssertionError

    monkeypatch.setattr(graphs, "CUDAGraph", refuse)
    pictures(language_model)
