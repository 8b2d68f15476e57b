# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The pass that a GPU takes, run on a CPU: the same tokens, and fit to be recorded once and replayed (a CUDA graph)."""

import contextlib
from collections import Counter

import numpy as np
import paddle
import pytest
from conftest import host_left_out
from test_generation import DATA, GRAMMAR, NEGATIVE, PROMPTS, unpadded

from paddlemix import external_ops
from paddlemix.models.emu3 import (
    Answer,
    Batch,
    Drawing,
    Emu3ForCausalLM,
    attention,
    cache,
    decoding,
    generate_images,
    generate_text,
    modeling_emu3,
    passes,
)
from paddlemix.models.emu3.generation_emu3 import make_drawings
from paddlemix.models.emu3.sampling import Noise, Sampling


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BLOCK", 8)
    monkeypatch.setattr(decoding, "FEW_ROWS", 16)
    monkeypatch.setattr(decoding, "few_rows", lambda: 16)


def no(*_):  # a program of Paddle's takes no lambda
    return False


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch, run):
    """Passes over all slots by the eager layers; `run(step, original)` stands for a pass's `run`."""
    original = decoding.Pass.run
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "is_on_cpu", lambda model: False)
        patch.setattr(cache.KVCache, "on_cpu", False)
        patch.setattr(attention, "_has_cached_attention", no)
        patch.setattr(modeling_emu3.Emu3Model, "_has_step", no)
        patch.setattr(decoding.Pass, "run", lambda step: run(step, original))
        yield


def addresses(step):
    tensors = [step.ids, step.past, *(step.results or ()), *step.noise, *step.cache.keys, *step.cache.values]
    return [None if t is None else (t.data_ptr(), tuple(t.shape), t.dtype) for t in tensors]


class Recorder:
    """Runs passes, and sees to it that they could be replays of the first with their shape.

    Python's numbers are hidden from a pass while it runs: the positions cannot come from the cache's lengths.
    """

    def __init__(self):
        self.first, self.replays, self.capacities = {}, 0, set()

    def __call__(self, step, run):
        lengths, step.cache.lengths = step.cache.lengths, None
        picked = bool(step.results)
        with host_left_out():
            run(step)
        step.cache.lengths = lengths
        self.capacities.add(step.cache.capacity)
        self.replays += picked
        assert self.first.setdefault(step, addresses(step)) == addresses(step)


@pytest.mark.parametrize("guidance_scale", [3.0, 1])
@pytest.mark.parametrize("decoding", ["step", "jacobi"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {}, {"top_p": 0.9, "temperature": 4}], ids=str)
def test_pictures(language_model, monkeypatch, settings, pictures, decoding, guidance_scale):
    """Prompts of different lengths; many blocks of the cache; two passes of a window without the host."""
    monkeypatch.setattr(Drawing, "ahead", 10)
    sizes = [(6, 3), (3, 7)][:pictures]
    prompts, negative = PROMPTS[:pictures], NEGATIVE[:pictures]
    how = prompts, sizes, GRAMMAR, negative, guidance_scale, Sampling(seed=5, **settings), decoding, 4
    expected = generate_images(language_model, *how)
    recorder = Recorder()
    with as_on_a_gpu(monkeypatch, recorder):
        drawn = generate_images(language_model, *how)
    for codes, others in zip(drawn.codes, expected.codes, strict=True):
        np.testing.assert_array_equal(codes, others)
    passes = len(recorder.first) + recorder.replays
    if decoding == "step":
        assert drawn.forward_passes == expected.forward_passes == passes
    else:  # what runs behind the end of a picture draws nothing
        assert drawn.forward_passes <= passes < drawn.forward_passes + 10 // 5
    assert recorder.replays and len(recorder.capacities) > 2


def test_answers(language_model, monkeypatch):
    """Two rows of different lengths."""
    recorder = Recorder()
    with as_on_a_gpu(monkeypatch, recorder):
        steps = list(generate_text(language_model, unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24))
    np.testing.assert_array_equal(np.array(steps).T, DATA["greedy"][:, 20:])
    assert recorder.replays == 24 - len(recorder.first) and len(recorder.first) == len(recorder.capacities)


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


@pytest.fixture
def on_a_card(monkeypatch):
    """Passes as on a card; `waits` is how often the host has waited for one."""
    waits, numpy = [], paddle.Tensor.numpy
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda tensor: waits.append(tensor) or numpy(tensor))
    with as_on_a_gpu(monkeypatch, lambda step, run: run(step)):
        yield waits


SAMPLING = Sampling(seed=5, top_k=0)


def drawings_of(sizes, sampling=SAMPLING, guidance_scale=3.0, **how):
    count = len(sizes)
    return make_drawings(PROMPTS[:count], sizes, GRAMMAR, NEGATIVE[:count], guidance_scale, sampling, **how)


def drawn_on_a_cpu(model, sizes, *how):
    drawings = drawings_of(sizes, *how)
    batch = Batch(model, "step")
    batch.join(*drawings)
    while batch:
        batch.step()
    return [drawing.drawn().tolist() for drawing in drawings]


@pytest.mark.parametrize("sizes, waits", [([(4, 5)], 4), ([(1, 1)], 1), ([(3, 1)], 3), ([(2, 3), (3, 7)], 5)], ids=str)
def test_the_host_waits_once_a_row(language_model, sizes, waits, request):
    """Of two pictures at each row's end of one of them: here after 3, 6 (the first is done), 7, 14 and 21 tokens."""
    expected = drawn_on_a_cpu(language_model, sizes)
    waited, drawings = request.getfixturevalue("on_a_card"), drawings_of(sizes)
    batch, gained = Batch(language_model, "step"), dict.fromkeys(drawings, 0)
    batch.join(*drawings)
    while batch:
        for drawing, tokens in batch.step():
            gained[drawing] += tokens
    assert [drawing.drawn().tolist() for drawing in drawings] == expected
    assert list(gained.values()) == [drawing.tokens for drawing in drawings]
    assert len(waited) == waits and batch.forward_passes == max(h * w for h, w in sizes)


def test_cut_off_in_a_row(language_model, request, monkeypatch):
    """Nothing of the row counts; the batch goes on, and so does another one with what was drawn."""
    (expected,) = drawn_on_a_cpu(language_model, [(3, 5)])
    request.getfixturevalue("on_a_card")
    (drawing,), runs, run = drawings_of([(3, 5)]), [], decoding.Pass.run

    def interrupted(step):
        runs.append(step)
        if len(runs) == 8:
            raise KeyboardInterrupt
        run(step)

    batch = Batch(language_model, "step")
    batch.join(drawing)
    with monkeypatch.context() as patch:
        patch.setattr(decoding.Pass, "run", interrupted)
        assert batch.step() == [(drawing, 5)]
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    assert drawing.drawn().tolist() == expected[:5]
    (other,), another = drawings_of([(3, 5)], drawn=[drawing.drawn()]), Batch(language_model, "step")
    another.join(other)
    for each in batch, another:
        while each:
            each.step()
    assert drawing.drawn().tolist() == other.drawn().tolist() == expected


def test_one_joins_between_rows(language_model, request):
    sizes = [(3, 5), (2, 3)]
    expected = drawn_on_a_cpu(language_model, sizes)
    request.getfixturevalue("on_a_card")
    drawings, batch = drawings_of(sizes), Batch(language_model, "step")
    batch.join(drawings[0])
    batch.step()
    batch.join(drawings[1])
    while batch:
        batch.step()
    assert [drawing.drawn().tolist() for drawing in drawings] == expected


def test_an_answer_beside_a_picture_is_looked_at_after_each_token(language_model, request):
    prompt = unpadded(DATA["padded_ids"], DATA["padded_mask"])[0]
    (alone,) = zip(*generate_text(language_model, [prompt], 9), strict=True)
    (expected,) = drawn_on_a_cpu(language_model, [(3, 5)])
    request.getfixturevalue("on_a_card")
    (drawing,), answer = drawings_of([(3, 5)]), Answer(prompt, 9, language_model.config)
    batch = Batch(language_model, "step")
    batch.join(drawing, answer)
    for i in range(9):
        assert len(answer.ids) == i
        batch.step()
    assert answer.ids == list(alone) and answer.is_done
    while batch:
        batch.step()
    assert drawing.drawn().tolist() == expected


HOT = Sampling(seed=3, temperature=9.0, top_k=0)  # noise decides, so that many guesses are right


@pytest.mark.parametrize(
    "window, ahead, sizes, guidance_scale, sampling",
    [
        (1, 128, [(4, 5)], 3.0, HOT), (3, 8, [(4, 5)], 1, HOT), (15, 128, [(3, 4)], 1, Sampling(seed=2)),
        (6, 21, [(5, 1)], 3.0, HOT), (2, 30, [(2, 3), (4, 4)], 3.0, HOT), (3, 10, [(1, 1), (3, 7)], 1, HOT),
        (7, 128, [(3, 5)], 3.0, Sampling(seed=1, top_p=0.8, temperature=4)), (4, 20, [(4, 3)], 3.0, Sampling(top_k=1)),
    ],
)  # fmt: skip
def test_windows_go_on_without_the_host(
    language_model, monkeypatch, request, window, ahead, sizes, guidance_scale, sampling
):
    """Over the ends of rows and of a picture, as many passes as may pick `ahead` tokens."""
    monkeypatch.setattr(Drawing, "ahead", ahead)
    expected = drawn_on_a_cpu(language_model, sizes, sampling, guidance_scale)
    waited, drawings = request.getfixturevalue("on_a_card"), drawings_of(sizes, sampling, guidance_scale)
    batch, gained, most = Batch(language_model, "jacobi", window), dict.fromkeys(drawings, 0), []
    batch.join(*drawings)
    while batch:
        window = min(window, 16 // sum(len(drawing.prompts) for drawing in batch.running or drawings) - 1)
        most.append(min(Drawing.passes_ahead, ahead // (1 + window)))
        before = batch.forward_passes
        for drawing, tokens in batch.step():
            gained[drawing] += tokens
        assert batch.forward_passes - before <= max(1, most[-1])
    assert [drawing.drawn().tolist() for drawing in drawings] == expected
    assert list(gained.values()) == [drawing.tokens for drawing in drawings]
    assert len(waited) == len(most) and batch.forward_passes <= max(h * w for h, w in sizes)


def shapes_of_passes(monkeypatch):
    shapes, run = [], decoding.Pass.run
    monkeypatch.setattr(decoding.Pass, "run", lambda step: shapes.append(tuple(step.ids.shape)) or run(step))
    return shapes


@pytest.mark.parametrize("window", [1, 15])
def test_few_passes_are_in_vain(language_model, request, monkeypatch, window):
    request.getfixturevalue("on_a_card")
    with monkeypatch.context() as patch:  # undone before what the fixture has put there
        shapes = shapes_of_passes(patch)
        batch = Batch(language_model, "jacobi", window)
        batch.join(*drawings_of([(2, 31)], HOT, 1))
        while batch:
            batch.step()
    assert 0 < batch.forward_passes <= len(shapes) < batch.forward_passes + 8


def test_a_pass_has_the_rows_of_its_sequences(language_model, request, monkeypatch):
    """Where others have left, so that windows stay as large; wherever in the cache they are."""
    sizes = [(1, 2), (3, 7)]
    expected = drawn_on_a_cpu(language_model, sizes, HOT, 1)[1]
    request.getfixturevalue("on_a_card")
    drawings = drawings_of(sizes, HOT, 1) + drawings_of([(1, 2), (1, 4)], Sampling(seed=9), 1)
    with monkeypatch.context() as patch:
        shapes = shapes_of_passes(patch)
        batch = Batch(language_model, "jacobi")
        batch.join(*drawings)
        while batch:
            batch.step()
    assert drawings[1].drawn().tolist() == expected
    assert shapes[0] == (4, 4) and shapes[-1] == (1, 16) and max(rows * new for rows, new in shapes) == 16


def test_noise_of_a_position_is_made_once(language_model, request, monkeypatch):
    """By a CPU and a card, with guesses and without; what is done has none."""
    made, make = Counter(), Noise._make
    monkeypatch.setattr(Noise, "_make", lambda noise, p: made.update([(noise, p)]) or make(noise, p))

    def draw(how, window):
        drawings, batch = drawings_of([(3, 5), (4, 4)], HOT), Batch(language_model, how, window)
        batch.join(*drawings)
        while batch:
            batch.step()
        assert made == Counter((one.noise, p) for one in drawings for p in range(one.draws))
        assert not any(one.noise.made for one in drawings)
        made.clear()

    for device in (None, "on_a_card"):
        if device:
            request.getfixturevalue(device)
        for how, window in (("step", None), ("jacobi", 1), ("jacobi", 3)):
            draw(how, window)


@pytest.mark.parametrize("where, name", [(decoding.Pass, "run"), (Drawing, "accept")], ids=["pass", "accept"])
def test_windows_cut_off_joined_and_gone_on_with(language_model, request, monkeypatch, where, name):
    """Ctrl-C in a pass or while the host looks loses no token that counts; another picture joins and leaves; a batch
    goes on with what was drawn before."""
    monkeypatch.setattr(Drawing, "ahead", 9)
    sizes = [(4, 5), (3, 4)]
    expected = drawn_on_a_cpu(language_model, sizes, HOT)
    request.getfixturevalue("on_a_card")
    drawings, original, calls = drawings_of(sizes, HOT), getattr(where, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    def steps(batch, count=10**6):
        while batch and count:
            count -= 1
            with contextlib.suppress(KeyboardInterrupt):
                batch.step()

    batch = Batch(language_model, "jacobi", 2)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupted)
        batch.join(drawings[0])
        steps(batch, 2)
        batch.join(drawings[1])
        steps(batch, 2)
        batch.leave(drawings[1])
        cut = drawings[1].drawn()
        assert 0 < len(cut) < len(expected[1]) and cut.tolist() == expected[1][: len(cut)]
        steps(batch)
    assert len(calls) > 5 and drawings[0].drawn().tolist() == expected[0]
    again = drawings_of(sizes, HOT, drawn=[[], cut])[1]
    for other in again, drawings[1]:  # read in one pass that picks, and in several
        another = Batch(language_model, "jacobi", 2)
        another.join(other)
        steps(another)
        assert other.drawn().tolist() == expected[1]


def test_noise_is_uploaded_once_for_several_passes(language_model, request, monkeypatch):
    """And that of a position once."""
    monkeypatch.setattr(Drawing, "ahead", 12)
    uploaded, original = [], passes.upload
    (expected,) = drawn_on_a_cpu(language_model, [(3, 5)], HOT)
    waited, (drawing,) = request.getfixturevalue("on_a_card"), drawings_of([(3, 5)], HOT)
    monkeypatch.setattr(passes, "upload", lambda array: uploaded.append(array) or original(array))
    batch = Batch(language_model, "jacobi", 3)
    batch.join(drawing)
    while batch:
        batch.step()
    noise = [array for array in uploaded if array.dtype == np.float32]
    assert drawing.drawn().tolist() == expected
    assert len(noise) <= len(waited) < batch.forward_passes
    np.testing.assert_array_equal(np.concatenate(noise), drawing.noise(0, drawing.draws))


class Returned(cache.KVCache):
    """Gives keys and values back: a program of Paddle's may not write into its inputs."""

    def __init__(self, keys, values):
        self.keys, self.values = list(keys), list(values)

    def write(self, layer, key, value, mask):
        for cached, new in ((self.keys, key), (self.values, value)):
            rows, shape = [-1, key.shape[-1]], cached[layer].shape
            written = paddle.scatter(cached[layer].reshape(rows), mask.cache_rows(shape), new.reshape(rows))
            cached[layer] = written.reshape(shape)


def test_a_pass_traced_once_is_replayed(language_model, monkeypatch):
    """As a program of Paddle's, in which whatever was a number of Python's is a constant; so it is in a CUDA graph."""
    cpu, programs = paddle.zeros([]).place, {}
    monkeypatch.setattr(paddle.pir.Value, "place", property(lambda value: cpu))  # a program's values have none
    monkeypatch.setattr(cache, "CACHE_BLOCK", 64)
    traces, runs = [], []

    def replay(step, run):
        def whole(ids, past, noise, keys, values):
            traces.append(step)
            step.ids, step.past, step.noise, step.cache = ids, past, noise, Returned(keys, values)
            picked, next_ids, next_past = step.compute()
            return picked, next_ids, next_past, step.cache.keys, step.cache.values

        cached, own = (step.cache.keys, step.cache.values), (step.ids, step.past, step.noise, step.cache)
        program = programs.setdefault(step, paddle.jit.to_static(whole, full_graph=True))
        *step.results, keys, values = program(*own[:3], *cached)
        step.ids, step.past, step.noise, step.cache = own
        for old, new in zip(sum(cached, []), keys + values, strict=True):
            old.copy_(new, False)
        runs.append(step)

    sampling = Sampling(seed=5, top_p=0.9)
    how = PROMPTS, [(1, 9), (1, 7)], GRAMMAR, NEGATIVE, 3.0, sampling, "step"  # no row's end: one shape of pass
    expected = generate_images(language_model, *how).codes
    with external_ops.without_operators(), as_on_a_gpu(monkeypatch, replay):
        drawn = generate_images(language_model, *how).codes
    for codes, others in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(codes, others)
    assert len(traces) == 2 and len(runs) == 9  # again when the smaller picture has left
