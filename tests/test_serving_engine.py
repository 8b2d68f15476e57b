# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The engine of the service: jobs beside each other give what the pipeline gives, and each fails alone."""

import json
import logging
import queue
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paddlemix.models.emu3 import Answer, Batch
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.serving import engine as engine_module
from paddlemix.serving.engine import (
    Busy,
    Chat,
    Decode,
    Done,
    Draw,
    Encode,
    Engine,
    Failed,
    Partial,
    Progress,
    Queued,
    Text,
    Unavailable,
)
from paddlemix.utils import InputError

CIRCLE = "a large red circle on a white background."
SMALL = {"height": 32, "width": 24}
TOLD = {"temperature": 0.9, "seed": 5}


class Events(queue.Queue):
    """What a job tells, in order."""

    def __init__(self, engine, job):
        super().__init__()
        self.job = job
        job.listen(self.put)
        engine.submit(job)

    def until(self, *kinds):
        """Events up to the first of these kinds or the last one."""
        found = []
        while not (found and isinstance(found[-1], (*kinds, Done, Failed))):
            found.append(self.get(timeout=60))
        return found

    def result(self):
        last = self.until()[-1]
        assert isinstance(last, Done), last
        return last.result

    def error(self):
        return self.until()[-1].error


def started(pipelines, **options):
    engine = Engine(pipelines, **options)
    engine.start()
    while engine.state == "loading":
        time.sleep(0.01)
    return engine


@pytest.fixture(scope="module")
def emu3():
    return Emu3Pipeline.from_pretrained("emu3-mini", dtype="float32")


@pytest.fixture(scope="module")
def scene(emu3):
    return Image.open(Path(__file__).parents[1] / "paddlemix/demo_images/emu3_scene.png").convert("RGB")


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


class Words:
    """A pipeline of the golden language model: texts are numbers of tokens, pictures there are none."""

    vq_model_path = None

    def __init__(self, model):
        self.language_model, self.config, self.processor, self.tokenizer = model, model.config, self, self
        self.loads = 0

    def load(self):
        self.model, self.loads = self.language_model, self.loads + 1

    def chat_sizes(self, turns, positions):
        return []

    def chat_prompt(self, turns):
        return [5 + i for _, parts in turns for text in parts for i in map(int, text.split())]

    def decode(self, ids, skip_special_tokens):
        return "".join(f"<{i}>" for i in ids)

    def alone(self, text, most, **options):
        from paddlemix.pipelines.emu3 import answer_sampling

        answer = Answer(self.chat_prompt([("user", [text])]), most, self.config, answer_sampling(**options))
        batch = Batch(self.language_model)
        batch.join(answer)
        while batch:
            batch.step()
        return self.decode(answer.ids, True)


def ask(text, most=8, **options):
    return Chat("words", [("user", [text])], most, options)


@pytest.fixture
def words(language_model):
    return Words(language_model)


@pytest.fixture
def engine(words):
    engine = started({"words": words}, max_batch=4, max_queue=5)
    yield engine
    engine.drain(0)


@pytest.fixture
def gate(monkeypatch):
    """While it is cleared, the engine waits before each pass."""
    gate, step = threading.Event(), Batch.step
    gate.set()

    def waiting(self, *args):
        assert gate.wait(60)
        return step(self, *args)

    monkeypatch.setattr(Batch, "step", waiting)
    yield gate
    gate.set()


# --- equality


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_twelve_jobs_together_are_each_as_alone(emu3, scene, dtype):
    pipeline = emu3 if dtype == "float32" else Emu3Pipeline.from_pretrained("emu3-mini", dtype=dtype)
    if dtype != "float32":
        pipeline.processor = emu3.processor
    draws = [
        ("a green ring", 1, {**SMALL, "seed": 1}), (CIRCLE, 2, {**SMALL, "seed": 2}),
        (CIRCLE, 1, {"height": 16, "width": 16, "seed": 1, "temperature": 2.0, "top_p": 0.9}),
        ("a blue square", 1, {**SMALL, "seed": 1, "guidance_scale": 1}),
        ("a blue square", 1, {**SMALL, "seed": 3, "guidance_scale": 1, "top_k": 1}),
        ("", 1, {"height": 8, "width": 48, "seed": 2**40, "negative_prompt": "a small circle"}),
        ("two things", 1, {"ratio": "1:2", "height": 24, "width": 24, "seed": 9, "guidance_scale": 4}),
    ]  # fmt: skip
    other = scene.resize((48, 40))
    chats = [
        (scene, "Please describe the image", 5, {}), (scene, "What shape is the red object?", 4, {}),
        (other, "Please describe the image", 6, TOLD), (other, "How many objects are there?", 3, {"temperature": 0}),
        (scene, "Please describe the image", 4, {**TOLD, "seed": 6, "top_k": 50}),
    ]  # fmt: skip
    pictures = [pipeline.generate(prompt, num_images=n, **options) for prompt, n, options in draws]
    texts = [pipeline.understand(image, text, max_new_tokens=most, **options) for image, text, most, options in chats]
    engine = started({"one": pipeline}, max_batch=16)
    jobs = [Draw("one", *request) for request in draws]
    jobs += [Chat("one", [("user", [image, text])], most, options) for image, text, most, options in chats]
    results = [one.result() for one in [Events(engine, job) for job in jobs]]
    engine.drain(1)
    for expected, result in zip(pictures, results, strict=False):
        assert len(expected) == len(result.pictures)
        assert all(same(a, b) for a, (b, _) in zip(expected, result.pictures, strict=True))
    assert [result.text for result in results[len(draws) :]] == texts
    again = results[1].pictures[1][1]
    assert (again["prompt"], again["seed"], again["image"], again["dtype"]) == (CIRCLE, 2, 1, dtype)
    assert results[1].tokens == 2 * (4 * 4 + 3) and results[-1].tokens == 4
    assert engine.stats()["pictures_total"] == 8 and engine.stats()["running"] == 0


def test_words_together_are_each_as_alone(words):
    """More jobs than rows, from several threads, with and without chance."""
    engine = started({"words": words}, max_batch=4)
    requests = [(f"{i} 3 {i * 7}", 3 + i % 5, {"temperature": 1.0, "seed": i} if i % 2 else {}) for i in range(24)]
    expected = [words.alone(text, most, **options) for text, most, options in requests]
    results = {}

    def client(numbers):
        for i in numbers:
            text, most, options = requests[i]
            results[i] = Events(engine, ask(text, most, **options)).result().text

    threads = [threading.Thread(target=client, args=(range(k, 24, 6),)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.drain(1)
    assert [results[i] for i in range(24)] == expected


def test_pictures_in_the_making(emu3):
    engine = started({"one": emu3})
    quick = Events(engine, Draw("one", CIRCLE, 1, {"seed": 1}, 3)).until()
    previews = [event for event in quick if isinstance(event, Partial)]
    rows = [sum(np.asarray(event.image)[4::8, 4].std(-1) > 0) for event in previews]
    assert 1 <= len(previews) <= 3 and [event.number for event in previews] == list(range(len(previews)))
    assert all(event.image.size == (64, 64) and event.index == 0 for event in previews) and rows == sorted(rows)
    progress = [event for event in quick if isinstance(event, Progress)]
    assert progress and [e.tokens for e in progress] == sorted({e.tokens for e in progress})
    assert {(e.total, e.rows_total) for e in progress} == {(8 * 9 + 3, 8)} and progress[-1].tokens_per_s > 0
    assert same(quick[-1].result.pictures[0][0], emu3.generate(CIRCLE, seed=1)[0])
    engine.previews.saved_s = -1e6  # a tenth of the time is used up
    slow = Events(engine, Draw("one", CIRCLE, 1, {"seed": 1, **SMALL}, 3)).until()
    assert not any(isinstance(event, Partial) for event in slow) and isinstance(slow[-1], Done)
    engine.drain(1)


def test_codes_of_a_picture_and_back(emu3, scene):
    engine = started({"one": emu3})
    codes = Events(engine, Encode("one", scene)).result()
    assert codes.shape == (scene.height // 8, scene.width // 8) and codes.dtype == np.int64
    assert same(Events(engine, Decode("one", codes.tolist())).result(), emu3.autoencode(scene))
    assert isinstance(Events(engine, Decode("one", [[10**6]])).error(), InputError)
    with pytest.raises(InputError, match="rows of whole numbers"):
        engine.submit(Decode("one", [1, 2]))
    engine.drain(1)


def test_a_second_question_reads_the_picture_no_more(emu3, scene, monkeypatch):
    questions = ["Please describe the image", "What shape is the red object?", "Please describe the image"]
    texts = [emu3.understand(scene, text, max_new_tokens=6) for text in questions]
    encode, calls = emu3.processor._encode, []
    monkeypatch.setattr(emu3.processor, "_encode", lambda pixels: calls.append(1) or encode(pixels))
    engine = started({"one": emu3})
    results = [Events(engine, Chat("one", [("user", [scene.copy(), text])], 6)).result() for text in questions]
    engine.drain(1)
    assert [result.text for result in results] == texts and len(calls) == 1
    [prompt] = emu3.processor(questions[0], scene, mode="U").input_ids
    picture = prompt.index(emu3.config.eoi_token_id) + 1  # up to its end
    assert picture > 72 and [result.cached_tokens for result in results] == [0, picture, picture]
    assert engine.stats()["cached_tokens_total"] == 2 * picture


def test_texts_come_as_they_are_written_and_stop(words, engine):
    whole = words.alone("1 2", 8)
    parts = Events(engine, ask("1 2")).until()
    assert "".join(event.text for event in parts if isinstance(event, Text)) == parts[-1].result.text == whole
    assert (parts[-1].result.finish_reason, parts[-1].result.tokens, parts[-1].result.prompt_tokens) == ("length", 8, 2)
    third = [i for i, character in enumerate(whole) if character == "<"][3]
    for stop in (whole[third : third + 5], [whole[third - 2 : third + 3], "never"]):
        job = ask("1 2")
        job.stop = [stop] if isinstance(stop, str) else stop
        events = Events(engine, job).until()
        said = "".join(event.text for event in events if isinstance(event, Text))
        expected = whole[: whole.index(job.stop[0])]
        assert said == events[-1].result.text == expected and events[-1].result.finish_reason == "stop"
        assert events[-1].result.tokens < 8


# --- the queue


def test_a_full_queue_and_places_in_it(engine, gate):
    gate.clear()
    running = [Events(engine, ask(f"{i}", 200)) for i in range(4)]
    while engine.stats()["running"] < 4:
        gate.set()
        time.sleep(0.01)
        gate.clear()
    waiting = [Events(engine, ask(f"{i}", 3)) for i in range(5)]
    with pytest.raises(Busy) as busy:
        engine.submit(ask("9"))
    assert busy.value.retry_after >= 1 and not isinstance(busy.value, Unavailable)
    gate.set()
    assert [one.until(Queued)[-1] for one in waiting] == [Queued(place) for place in range(1, 6)]
    engine.cancel(waiting[0].job)
    engine.cancel(running[0].job)
    assert waiting[4].until(Queued)[-1].place < 5
    assert all(one.result().text for one in waiting[1:])
    for one in running[1:]:
        engine.cancel(one.job)
    while engine.stats()["running"]:
        time.sleep(0.01)
    assert not any(isinstance(event, (Done, Failed)) for one in (waiting[0], *running) for event in list(one.queue))


def test_a_cancelled_job_ends_within_a_pass(engine, gate):
    one = Events(engine, ask("1", 200))
    one.until(Text)
    gate.clear()
    engine.cancel(one.job)
    steps = one.job.sequences[0].ids
    count = len(steps)
    gate.set()
    while engine.stats()["running"]:
        time.sleep(0.01)
    assert len(steps) <= count + 1
    assert Events(engine, ask("2")).result().tokens == 8


def test_what_cannot_be_is_said_at_once(words, engine, emu3):
    for job, text in [
        (Chat("other", []), "unknown model 'other': there are words"), (ask("1", 0), "max_new_tokens must be"),
        (ask("1", temperature=-1), "temperature must be"), (ask("1", colour=1), "unknown options: colour"),
        (Chat("words", [("user", [3])]), "texts and PIL pictures"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=text):
            engine.submit(job)
    assert "have 256 tokens, the model has 256 positions" in str(Events(engine, ask("1 " * 256, 1)).error())
    long = Events(engine, ask("1 " * 250, 10**9)).result()
    assert long.tokens <= 6 and long.prompt_tokens == 250  # what the positions leave
    with pytest.raises(Unavailable, match="is being loaded"):
        Engine({"words": words}).submit(ask("1"))
    wrong = [({"ratio": "0:1"}, "ratio"), ({"seed": -1}, "seed"), ({"negative_prompt": 3}, "negative_prompt")]
    for options, text in [*wrong, ({"steps": 1}, "unknown options")]:
        with pytest.raises(InputError, match=text):
            Draw("one", "x", 1, options).check(emu3)


# --- faults


def test_a_job_that_fails_fails_alone(words, engine, monkeypatch, caplog):
    """In each part of a pass, memory included; the others have the same bits."""
    caplog.set_level(logging.WARNING)
    texts = ["1 2", "2 3 4", "13 1", "4 4"]
    expected = [words.alone(text, 8) for text in texts]

    def bad(ids):
        return ids[0] == 5 + 13

    pick, accept, read = Answer.pick, Answer.accept, type(words.language_model.model).read_prompt

    def broken_pick(self, *args):
        if bad(self.prompts[0]) and len(self.ids) == 3:
            raise RuntimeError(CIRCLE)
        return pick(self, *args)

    def broken_accept(self, *args):
        if bad(self.prompts[0]):
            raise MemoryError
        return accept(self, *args)

    def broken_read(self, ids, *args):
        if int(ids[0, 0]) == 5 + 13:
            raise ValueError(CIRCLE)
        return read(self, ids, *args)

    for where, name, broken, kind in [
        (Answer, "pick", broken_pick, RuntimeError), (Answer, "accept", broken_accept, MemoryError),
        (type(words.language_model.model), "read_prompt", broken_read, ValueError),
    ]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, name, broken)
            jobs = [Events(engine, ask(text)) for text in texts]
            assert isinstance(jobs[2].error(), kind)
            assert [jobs[i].result().text for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    assert Events(engine, ask(texts[2])).result().text == expected[2]
    assert CIRCLE not in caplog.text and jobs[2].job.id in caplog.text


def test_the_thread_survives_everything(words, engine, monkeypatch):
    expected = words.alone("1", 8)
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda *_: 1 / 0)
        assert isinstance(Events(engine, ask("1")).error(), ZeroDivisionError)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_admit", lambda *_: 1 / 0)
        assert isinstance(Events(engine, ask("1")).error(), ZeroDivisionError)
    assert Events(engine, ask("1")).result().text == expected
    deaf = ask("1", 200)
    deaf.listen(lambda event: 1 / 0)
    engine.submit(deaf)
    while engine.stats()["running"] or engine.stats()["queue_depth"]:
        time.sleep(0.01)
    assert Events(engine, ask("1")).result().text == expected


def test_memory_for_one_more_is_waited_for(words, engine, monkeypatch):
    """A row that the cache has no memory for joins when others have left, and one that never fits fails."""
    expected = [words.alone(f"{i}", 8) for i in range(4)]
    from paddlemix.models.emu3.cache import KVCache

    check = KVCache._require_memory

    def two_slots(self, slots, *args):
        if slots > 2:
            raise engine_module.NotEnoughMemory("no memory")
        check(self, slots, *args)

    monkeypatch.setattr(KVCache, "_require_memory", two_slots)
    assert [one.result().text for one in [Events(engine, ask(f"{i}")) for i in range(3)]] == expected[:3]
    monkeypatch.setattr("paddlemix.machine.free_memory", lambda: 100)
    assert "keys and values" in str(Events(engine, ask("3", 200)).error())


def test_a_second_model_is_loaded_when_it_is_asked_for(language_model):
    first, second = Words(language_model), Words(language_model)
    engine = started({"words": first, "again": first, "second": second})
    assert (first.loads, second.loads) == (1, 0)
    texts = [Events(engine, Chat(name, [("user", ["1"])], 4)).result().text for name in engine.pipelines]
    assert len(set(texts)) == 1 and (first.loads, second.loads) == (1, 1)
    third = engine.pipelines["third"] = Words(language_model)

    def too_large():
        raise InputError("34.0 GB of memory in float32 are needed")

    third.load = too_large
    for _ in range(2):
        error = Events(engine, Chat("third", [("user", ["1"])], 4)).error()
        assert isinstance(error, Unavailable) and "cannot be loaded now" in str(error)
    engine.drain(1)
    failed = started({"third": third})
    assert (failed.state, failed.reason) == ("failed", "34.0 GB of memory in float32 are needed")
    with pytest.raises(Unavailable, match=r"34\.0 GB"):
        failed.submit(Chat("third", [("user", ["1"])]))


def test_draining(words, gate):
    engine = started({"words": words})
    one, long = Events(engine, ask("1")), Events(engine, ask("1", 250))
    one.until(Text)
    engine.drain(60)
    assert one.result().tokens == 8 and long.result().tokens > 8
    with pytest.raises(Unavailable):
        engine.submit(ask("1"))
    engine = started({"words": words}, max_batch=1)
    gate.clear()
    left = [Events(engine, ask("1", 200)) for _ in range(3)]
    threading.Timer(0.3, gate.set).start()
    engine.drain(0.1)
    assert all(isinstance(one.error(), Unavailable) for one in left)
    Engine({"words": words}).drain(0)  # never started


# --- a folder


def test_a_restart_finishes_what_was_accepted(emu3, tmp_path, gate, caplog):
    expected = emu3.generate(CIRCLE, num_images=2, seed=7, **SMALL)
    engine = started({"one": emu3}, output_dir=tmp_path, max_batch=2)
    done = Events(engine, Draw("one", CIRCLE, 1, SMALL)).result()
    assert [p.name for p in tmp_path.iterdir()] == ["result_0.png"]
    with Image.open(tmp_path / "result_0.png") as image:
        assert same(image, done.pictures[0][0]) and image.text["seed"] == str(done.pictures[0][1]["seed"])
    gate.clear()
    left = Draw("one", CIRCLE, 2, {**SMALL, "seed": 7})
    events, gone = Events(engine, left), Draw("one", CIRCLE)
    engine.submit(gone)
    engine.cancel(gone)
    threading.Timer(0.1, gate.set).start()
    engine.drain(0)
    assert isinstance(events.error(), Unavailable) and events.empty()
    [record] = tmp_path.glob("request_*")
    assert json.loads(record.read_text())["options"]["seed"] == 7 and left.id in record.name
    broken = {"1": "{", "2": "[]", "3": '{"pipeline": "other", "prompt": "x", "n": 1, "options": {}}'}
    for number, text in broken.items():
        (tmp_path / f"request_{number * 16}.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        engine = started({"one": emu3}, output_dir=tmp_path)
        other = Engine({"one": emu3}, output_dir=tmp_path)
        assert list(other.records.left()) == []  # another server's are its own
        engine.drain(60)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["result_0.png", "result_1.png", "result_2.png"]
    for path, image in zip(names[1:], expected, strict=True):
        with Image.open(tmp_path / path) as written:
            assert same(written, image)
    for words in ("accepted before the restart", "its pictures are written"):
        assert f"request {left.id}: {words}" in caplog.text
    assert CIRCLE not in caplog.text
    assert all(f"request {number * 16}: refused" in caplog.text for number in broken)


def test_a_folder_that_cannot_be_written(emu3, tmp_path, caplog):
    caplog.set_level(logging.WARNING)  # other tests disable it
    folder = tmp_path / "results"
    folder.mkdir()
    engine = started({"one": emu3}, output_dir=folder)
    folder.rmdir()
    assert len(Events(engine, Draw("one", CIRCLE, 1, SMALL)).result().pictures) == 1
    engine.drain(1)
    assert "cannot be kept" in caplog.text and "cannot be written" in caplog.text and str(folder) not in caplog.text


# --- memory


def test_memory_after_a_thousand_jobs_is_that_after_a_hundred(words):
    """Prompts and lengths differ, some are cancelled, some fail."""
    engine, sizes = started({"words": words}, max_queue=100), []
    for _ in range(10):
        jobs = [Events(engine, ask(f"{i % 200} 2", 1 + i % 3, seed=i)) for i in range(100)]
        for one in jobs[::10]:
            engine.cancel(one.job)
        for one in (one for i, one in enumerate(jobs) if i % 10):
            one.result()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    engine.drain(1)
    assert sizes[-1] - sizes[0] < 4 << 20
    assert engine.stats()["queue_depth"] == engine.stats()["running"] == 0
