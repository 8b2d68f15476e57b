# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A picture or an answer is a function of its own request, bit for bit: alone, beside others, joined late, by windows
of guesses or one token at a time, cut off and gone on with."""

import contextlib
import random
from dataclasses import replace

import numpy as np
import paddle
import pytest
from conftest import write_checkpoint
from test_generation import GRAMMAR, NEGATIVE, PROMPTS

from paddlemix import external_ops
from paddlemix.machine import NotEnoughMemory
from paddlemix.models.emu3 import Answer, Batch, Drawing, Emu3ForCausalLM, Sampling, cache, decoding
from paddlemix.models.emu3.sampling import GREEDY


class RecordedDrawing(Drawing):
    """Keeps the logits of every token that was drawn: more than the tokens, they show each bit."""

    def pick(self, logits, noise):
        self.logits = logits.numpy()
        return super().pick(logits, noise)

    def accept(self, read, picked):
        start, self.seen = self._next(), getattr(self, "seen", {})
        gained = super().accept(read, picked)
        for i, position in enumerate(range(start, self.known)):
            if self.forced[position] < 0:
                self.seen[position] = self.logits[:, i].tobytes()
        return gained

    @property
    def result(self):
        return self.codes().tolist()


class RecordedAnswer(Answer):
    def pick(self, logits, noise):
        self.seen = {**getattr(self, "seen", {}), len(self.ids): logits.numpy().tobytes()}
        return super().pick(logits, noise)

    @property
    def result(self):
        return self.ids


LONG = [5 + i % 150 for i in range(1, 70)]  # longer than a chunk of a prompt


def requests(config):
    """Makers of sequences; prompts, sizes, scales and samplings differ, two requests have the same prompt."""
    long, prompts, negative = [*LONG, GRAMMAR.boi, GRAMMAR.img], PROMPTS, NEGATIVE
    hot = Sampling(seed=3, temperature=9.0)
    return [
        lambda **how: RecordedDrawing(prompts[0], (3, 5), GRAMMAR, negative[0], 3.0, Sampling(seed=1), **how),
        lambda **how: RecordedDrawing(prompts[0], (4, 3), GRAMMAR, negative[1], 2, Sampling(seed=2, top_p=0.9), **how),
        lambda **how: RecordedDrawing(long, (2, 9), GRAMMAR, negative[0], 1.5, hot, **how),
        lambda **how: RecordedDrawing(prompts[1], (5, 2), GRAMMAR, None, 1, Sampling(top_k=1), number=3, **how),
        lambda: RecordedAnswer(LONG, 12, config, GREEDY),
        lambda: RecordedAnswer(prompts[1], 15, config, Sampling(top_k=0, seed=7), 2),
    ]


def run(model, sequences, how="step", window=None, seed=None):
    """Decode; with a seed they join at random steps."""
    batch, waiting, dice = Batch(model, how, window), list(sequences), random.Random(seed)
    if seed is None:
        batch.join(*waiting)
        waiting = []
    while batch or waiting:
        while waiting and (not batch or dice.random() < 0.3):
            batch.join(waiting.pop(dice.randrange(len(waiting))))
        batch.step()
    return [(sequence.result, sequence.seen) for sequence in sequences]


CASES = [("float32", "operators"), ("bfloat16", "operators"), ("int8", "operators"), ("int4", "operators")]
CASES += [("float32", "paddle"), ("int8", "paddle")]
CASES += [pytest.param((dtype, "paddle"), marks=pytest.mark.long) for dtype in ("bfloat16", "int4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """(dtype, whether by the compiled operators or by Paddle's)"""
    return request.param


@pytest.fixture(scope="module")
def model(case, language_dir):
    return Emu3ForCausalLM.from_pretrained(language_dir, dtype=case[0])


@pytest.fixture(autouse=True)
def way(case, monkeypatch):
    monkeypatch.setattr(decoding, "PROMPT_CHUNK", {"cpu": 24})
    monkeypatch.setattr(cache, "CACHE_BLOCK", 32)
    if case[1] == "paddle":
        with external_ops.without_operators():
            yield
    elif external_ops.operators() is None:
        pytest.skip("the operators are not built: make ops")
    else:
        yield


def test_a_request_is_the_same_bits_whatever_else_runs(model):
    make = requests(model.config)
    alone = [run(model, [one()])[0] for one in make]
    assert len({str(result) for result, _ in alone}) == len(make)
    assert run(model, [one() for one in make]) == alone
    for seed in range(3):
        assert run(model, [one() for one in make], seed=seed) == alone
    assert run(model, [one() for one in make * 5]) == alone * 5
    assert run(model, [one() for one in make], "auto") == [run(model, [one()], "auto")[0] for one in make] == alone
    for window in (1, 3, 15):
        assert run(model, [one() for one in make], "jacobi", window) == alone
        assert [run(model, [one()], "jacobi", window)[0] for one in make] == alone


def test_a_drawing_that_was_cut_off_is_the_same_bits(model):
    """What was drawn is read again by the kernels that drew it."""
    for one in requests(model.config)[:4]:
        [(codes, seen)] = run(model, [one()])
        whole = one()
        run(model, [whole])
        for length in (0, 1, 4, 7, len(whole.drawn()) - 1):
            for how in ("step", "jacobi"):
                again = one(drawn=whole.drawn()[:length])
                [(result, rest)] = run(model, [again], how, 3)
                assert result == codes
                assert rest and all(seen[position] == logits for position, logits in rest.items())


def test_a_sequence_that_leaves_changes_nothing(model):
    make = requests(model.config)
    expected = run(model, [make[0]()])[0]
    batch, kept, left = Batch(model, "step"), make[0](), make[2]()
    batch.join(left)
    batch.join(kept)
    for _ in range(6):
        batch.step()
    batch.leave(left)
    late = make[0]()
    batch.join(late)  # takes the slots that became free
    while batch:
        batch.step()
    assert (kept.result, kept.seen) == (late.result, late.seen) == expected
    assert batch.cache.slots == 4


def test_a_sequence_goes_on_in_another_batch(model):
    for one in requests(model.config):
        [expected] = run(model, [one()])
        moved, other = one(), requests(model.config)[0]()
        for passes in (1, 4, 100):
            batch = Batch(model, "step")
            batch.join(other) if not other.is_done else None
            batch.join(moved)
            while moved in batch.slots and batch.forward_passes < passes:
                batch.step()
            batch.leave(moved)
        assert (moved.result, moved.seen) == expected


def test_mistakes_of_a_caller_change_nothing(model):
    make = requests(model.config)
    [expected] = run(model, [make[0]()])
    batch, one = Batch(model, "step"), make[0]()
    batch.leave(one)
    batch.join(one)
    vocabulary = model.config.vocab_size
    for bad, words in [
        ([one], "there already"),
        ([make[1](), make[2]()] * 1 + [one], "there already"),
        ([Answer([1, -1], 3, model.config)], "ids must be whole numbers from 0 to"),
        ([Answer([vocabulary, 1], 3, model.config)], "ids must be whole numbers from 0 to"),
    ]:
        with pytest.raises(ValueError, match=words):
            batch.join(*bad)
        batch.step()
    with pytest.raises(ValueError, match="ids must be whole numbers"):
        Answer([5, 1.5], 3, model.config)
    while batch:
        batch.step()
    batch.leave(one)
    batch.join(one)  # it is done
    assert not batch and (one.result, one.seen) == expected


def test_a_step_that_is_broken_off_is_made_again(model, monkeypatch):
    """As by Ctrl-C at any place: an error comes at every so many calls of what a step is made of."""
    make = requests(model.config)
    expected = [run(model, [one()])[0] for one in make]
    places = [(decoding.Pass, "run"), (decoding.Pass, "__call__"), (Drawing, "accept"), (Answer, "accept"),
              (type(model.model), "read_prompt"), (cache.KVCache, "copy_row"), (Batch, "leave")]  # fmt: skip
    for where, name in places:
        original, count = getattr(where, name), [0]

        def broken(self, *args, original=original, count=count):
            count[0] += 1
            if count[0] % 5 == 2:
                raise KeyboardInterrupt
            result = original(self, *args)
            if count[0] % 5 == 4:
                raise KeyboardInterrupt
            return result

        sequences = [one() for one in make]
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            batch = Batch(model, "step")
            batch.join(*sequences)
            while batch:
                with contextlib.suppress(KeyboardInterrupt):
                    batch.step()
        if name != "accept":  # logits are recorded around it
            assert [(sequence.result, sequence.seen) for sequence in sequences] == expected, name
        assert [sequence.result for sequence in sequences] == [result for result, _ in expected], name


def test_two_batches_do_not_share_a_sequence(model):
    one = requests(model.config)[0]
    [expected] = run(model, [one()])
    moved, batches = one(), [Batch(model, "step"), Batch(model, "step")]
    for i in range(12):
        batch = batches[i % 2]
        if moved not in batch.slots or moved.batch is not batch:
            batch.leave(moved)
            batch.join(moved)
        batch.step()
        batches[1 - i % 2].step()
    run_on = Batch(model, "step")
    run_on.join(moved)
    while run_on:
        run_on.step()
    assert (moved.result, moved.seen) == expected
    assert not any(batch.step() for batch in batches) and not any(batches)


def test_memory_that_ends_while_the_cache_grows(model, monkeypatch):
    make = requests(model.config)
    expected = [run(model, [one()])[0] for one in (make[2], make[4])]
    for call in range(1, 12, 3):
        batch, sequences, calls = Batch(model, "step"), [make[2](), make[4]()], []
        concat = paddle.concat

        def fail(tensors, axis=0, call=call, calls=calls, concat=concat):
            if len(tensors[0].shape) == 4:
                calls.append(axis)
                if len(calls) == call:
                    raise MemoryError
            return concat(tensors, axis)

        with monkeypatch.context() as patch:
            patch.setattr(cache.paddle, "concat", fail)
            failed = 0
            waiting = list(sequences)
            while batch or waiting:
                try:
                    if waiting:
                        batch.join(waiting[0])
                        waiting.pop(0)
                    batch.step()
                except MemoryError:
                    failed += 1
        assert failed == 1 and [(s.result, s.seen) for s in sequences] == expected


def test_dynamic_positions(case, tmp_path):
    """The base of the positions changes with every token beyond the model's."""
    directory = write_checkpoint(
        tmp_path, "language_model", rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=20
    )
    model = Emu3ForCausalLM.from_pretrained(directory, dtype=case[0])
    make = requests(model.config)
    alone = [run(model, [one()])[0] for one in make]
    assert run(model, [one() for one in make], "jacobi", 3) == alone
    assert run(model, [one() for one in make], seed=1) == alone
    prompts = [LONG, LONG, [*LONG[:60], 3]]
    alone = [run(model, [RecordedAnswer(prompt, 5, model.config)])[0] for prompt in prompts]
    answers, batch = [RecordedAnswer(prompt, 5, model.config) for prompt in prompts], Batch(model, prefix_tokens=400)
    for answer in answers:
        batch.join(answer)
        while batch:
            batch.step()
    assert [(answer.result, answer.seen) for answer in answers] == alone
    assert [answer.reused for answer in answers] == [0, 68, 0]  # keys of a prompt of another length are others


@pytest.mark.parametrize("kept", [True, False])
def test_a_prompt_that_begins_as_another_is_not_read_again(model, kept):
    """Whole chunks of 24 tokens, or all of the same prompt; of a row that was kept, or that is here."""
    prompts = [(LONG, 68), ([*LONG[:60], 9, 8, 7], 48), ([*LONG[:50], 3, *LONG], 48), (LONG[:49], 48), (LONG[:48], 24)]
    prompts += [(LONG[:20], 0), ([1, *LONG], 0)]
    drawing = requests(model.config)[0]
    [expected_drawing] = run(model, [drawing()])
    for prompt, reused in prompts:
        [expected] = run(model, [RecordedAnswer(prompt, 5, model.config)])
        batch, first = Batch(model, prefix_tokens=400 if kept else 0), Answer(LONG, 12, model.config)
        again, beside = RecordedAnswer(prompt, 5, model.config), drawing()
        batch.join(first)
        while kept and batch:
            batch.step()
        batch.join(beside)  # it must not write where a prompt is kept
        batch.join(again)
        while batch:
            batch.step()
        assert (again.result, again.seen, again.reused) == (*expected, reused)
        assert (beside.result, beside.seen, beside.reused) == (*expected_drawing, 0)
        assert bool(batch.kept) == kept


@pytest.mark.parametrize(("height", "together"), [(2, True), (2, False), (9, True), (9, False)])
def test_questions_about_one_picture_read_it_once(model, height, together):
    """All of the picture, which is smaller or larger than a chunk, wherever it ends; what follows is each one's own."""
    grammar = replace(GRAMMAR, encode_text=lambda text: list(text.encode()))
    picture = [5, *grammar.encode(np.arange(height * 5).reshape(height, 5))]
    prompts = [[*picture, 9, 8, 7], [*picture, 9, 8, 6, *LONG], [*picture, *LONG[:30]], [*picture, 4], picture]
    prompts += [[*picture, *picture[1:], 3, 4], [*picture, *picture[1:], 3, 5, 6], [*picture[:-1], 3, 9, 8, 7]]
    alone = [run(model, [RecordedAnswer(prompt, 4, model.config)])[0] for prompt in prompts]
    sequences, batch = [RecordedAnswer(prompt, 4, model.config) for prompt in prompts], Batch(model, prefix_tokens=2000)
    for sequence in sequences:
        batch.join(sequence)
        while batch and not together:
            batch.step()
    while batch:
        batch.step()
    assert [(sequence.result, sequence.seen) for sequence in sequences] == alone
    once, chunks = len(picture), (len(picture) - 1) // 24 * 24
    assert [sequence.reused for sequence in sequences] == [0, *[once] * 3, chunks, once, 2 * once - 1, chunks]


def test_kept_prompts_are_bounded_and_given_up(model, monkeypatch):
    def answer(batch, prompt):
        sequence = Answer(prompt, 3, model.config)
        batch.join(sequence)
        while batch:
            batch.step()
        return sequence.reused

    prompts = [[i, *LONG] for i in range(1, 7)]
    batch = Batch(model, "step", prefix_tokens=3 * 100)
    assert [answer(batch, prompt) for prompt in prompts] == [0] * 6
    most = len(batch.kept)
    assert 2 <= most == 300 // batch.cache.capacity and batch.cache.slots == most + 1
    assert answer(batch, prompts[-most]) == 69  # the last ones are kept, and this one is now the newest
    assert answer(batch, [9, *LONG]) == 0 and answer(batch, prompts[-most]) == 69
    assert answer(batch, prompts[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(cache.KVCache, "_require_memory", lambda self, slots, *_: require(slots <= most))
        batch.join(*(Drawing(PROMPTS[0], (3, 5), GRAMMAR, None, 1) for _ in range(most)))
        with pytest.raises(NotEnoughMemory):
            batch.join(Drawing(PROMPTS[0], (3, 5), GRAMMAR, None, 1))
    assert not batch.kept
    while batch:
        batch.step()
    assert answer(batch, prompts[0]) == 0 and answer(batch, prompts[0]) == 69
    batch.give_up()
    assert batch.cache is None and answer(batch, prompts[0]) == 0


def require(fits):
    if not fits:
        raise NotEnoughMemory


def test_some_sequences_take_a_step(model):
    make = requests(model.config)
    expected = [run(model, [one()])[0] for one in make]
    batch, sequences = Batch(model, "step"), [one() for one in make]
    for sequence in sequences:
        batch.join(sequence)
    while batch:
        for sequence in sequences:
            assert {other for other, _ in batch.step([sequence])} <= {sequence}
    assert [(sequence.result, sequence.seen) for sequence in sequences] == expected


def test_results_do_not_come_from_noise_alone(model):
    """The test would see a change: other logits in the last bit are other bytes."""
    one = requests(model.config)[0]
    [(_, seen)] = run(model, [one()])
    assert len(set(seen.values())) == len(seen) == 15
    assert all(np.isfinite(np.frombuffer(logits, np.float32)).all() for logits in seen.values())
