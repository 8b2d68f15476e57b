# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3Pipeline as a user calls it, on Emu3-Mini."""

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from paddlemix import machine
from paddlemix.models.emu3 import Emu3ForCausalLM, Emu3VisionVQModel, generate_images
from paddlemix.models.emu3.checkpoint import OpenCheckpoint
from paddlemix.models.emu3.hub import MINI_DIRECTORY
from paddlemix.models.emu3.sampling import Sampling
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.processors.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
CIRCLE = "a large red circle on a white background."


@pytest.fixture(scope="module")
def emu3():
    return Emu3Pipeline.from_pretrained("emu3-mini", dtype="float32")


@pytest.fixture(scope="module")
def picture(emu3):
    return emu3.generate(CIRCLE, seed=1)[0]


def same(a, b):
    return a.size == b.size and (np.asarray(a) == np.asarray(b)).all()


def test_a_picture_and_an_answer(emu3, picture):
    assert picture.size == (64, 64)
    pixels = np.asarray(picture, int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 100)
    assert 0.1 < red.mean() < 0.3 and (pixels[~red].min(-1) > 200).mean() > 0.9
    assert emu3.understand(picture, "What colour is the circle?") == "red"
    back = emu3.autoencode(picture)
    assert back.size == picture.size and np.abs(np.asarray(back, float) - np.asarray(picture)).mean() < 5


def test_equals_the_parts(emu3, picture):
    """What the pipeline draws is what its parts draw, with the checkpoint's own defaults."""
    processor = emu3.processor
    positive, negative = (processor(text, image_area=64 * 64) for text in (CIRCLE + POSITIVE_PROMPT, NEGATIVE_PROMPT))
    [codes] = generate_images(
        emu3.model, positive.input_ids, positive.image_size, processor.grammar, negative.input_ids, 1.5,
        Sampling(temperature=0.5, seed=1),
    ).codes  # fmt: skip
    assert same(processor.decode_image(codes), picture)


def test_lists_sizes_and_numbers(emu3, picture):
    images = emu3.generate([CIRCLE, "a small yellow ring"], ratio=["1:1", "4:3"], num_images=2, seed=1)
    assert [image.size for image in images] == [(64, 64), (64, 64), (72, 56), (72, 56)]
    assert same(images[0], picture) and not same(images[1], images[0])
    assert emu3.generate(CIRCLE, height=56, width=72, seed=1)[0].size == (72, 56)
    fresh = [emu3.generate_steps(CIRCLE).seed for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_values_count(emu3, picture):
    values = {"guidance_scale": 4, "temperature": 3, "negative_prompt": "a large red circle", "top_k": 1, "top_p": 0.01}
    for name, value in {**values, "seed": 3}.items():
        assert not same(emu3.generate(CIRCLE, **{"seed": 1, name: value})[0], picture), name


def test_step_by_step(emu3, picture):
    generation = emu3.generate_steps(CIRCLE, seed=1, decoding="step")
    assert generation.sizes == [(64, 64)] and generation.seed == 1 and generation.rows_drawn == 0
    gained, half = 0, None
    for tokens in generation:
        gained += tokens
        if half is None and generation.rows_drawn == 4:
            half, drawn = generation.images()[0], generation.drawn()
    assert gained == generation.tokens == 8 * 9 + 3 and generation.rows_drawn == 8
    assert same(generation.images()[0], picture)
    assert half.size == (64, 64) and half.getpixel((5, 50)) == (128, 128, 128) != half.getpixel((5, 5))
    again = emu3.generate_steps(CIRCLE)
    again.resume(drawn, seed=1)
    assert sum(again) == gained - len(drawn[0]) and same(again.images()[0], picture)
    assert again.metadata(0)["seed"] == 1 and again.settings["temperature"] == 0.5


def test_answers_step_by_step(emu3, picture):
    questions = ["What colour is the circle?", "Please describe the image"]
    answers = emu3.understand_steps(picture, questions)
    steps = list(answers)
    joined = ["".join(texts) for texts in zip(*steps, strict=True)]
    assert joined == answers.texts == emu3.understand(picture, questions)
    assert len(steps) == answers.forward_passes > 5 and all(answers.ended)
    assert emu3.understand([picture], questions[0]) == ["red"]
    assert emu3.understand([picture, picture], questions) == joined
    assert emu3.understand(picture, questions[1], max_new_tokens=3) == joined[1][: len("a large red")]


def test_stopped_and_gone_on_with(emu3, picture):
    generation = emu3.generate_steps(CIRCLE, seed=1)
    for _ in generation:
        if generation.rows_drawn == 3:
            break
    for _ in generation:
        pass
    assert same(generation.images()[0], picture)
    answers = emu3.understand_steps(picture, "Please describe the image")
    texts = [next(iter(answers))[0] for _ in range(3)] + [texts[0] for texts in answers]
    assert "".join(texts) == answers.texts[0] == emu3.understand(picture, "Please describe the image")


def test_answers_hold_whole_characters(emu3, picture, monkeypatch):
    """A character of several bytes comes when its last byte is there, and a text cut off in one at the end."""
    rows = ["é x".encode(), "é".encode()[:1]]
    monkeypatch.setattr(
        emu3.processor.tokenizer, "decode", lambda ids, skip_special_tokens: bytes(ids).decode("utf-8", "replace")
    )
    answers = emu3.understand_steps(picture, ["a", "b"], max_new_tokens=4)
    texts = []
    for i in range(4):
        for answer, row in zip(answers.answers, rows, strict=True):
            answer.ids, answer.ended = list(row[: i + 1]), len(row) <= i + 1
        texts.append([answers._new_text(k) for k in range(2)])
    assert texts == [["", "\ufffd"], ["é", ""], [" ", ""], ["x", ""]]


def test_a_picture_of_several_questions_is_encoded_once(emu3, picture, monkeypatch):
    sizes, encode = [], emu3.processor._encode
    monkeypatch.setattr(emu3.processor, "_encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    other = picture.copy()
    questions = ["What colour is the circle?", "Please describe the image"]
    assert emu3.understand([picture, other, picture], [*questions, questions[1]])[1:] == emu3.understand(
        picture, [questions[1]] * 2
    )
    assert sizes == [2, 1]


def test_notes_on_pictures_of_questions(emu3, picture, caplog):
    """What happened to a picture stands in the notes of the steps, and in the log of a whole answer."""
    caplog.set_level("WARNING")  # which a command may have switched off
    question = "What colour is the circle?"
    clear = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    clear.paste(picture.resize((160, 160)), (48, 48))
    notes = [
        "a picture's transparency is laid over white",
        "a picture of 256 x 256 pixels is scaled to 64 x 64: the checkpoint takes no larger one in a question",
    ]
    answers = emu3.understand_steps([clear, picture, clear], question)
    assert answers.notes == notes and not emu3.understand_steps(picture, question).notes
    over_white = Image.new("RGB", clear.size, "white")
    over_white.paste(clear, mask=clear.getchannel("A"))
    [*_] = answers
    assert not caplog.records and answers.texts[0] == answers.texts[2] == emu3.understand(over_white, question)
    caplog.clear()
    assert emu3.understand(clear, question) == answers.texts[0]
    assert [record.message for record in caplog.records] == notes


def test_a_transparent_picture_is_reconstructed_over_white(emu3, picture):
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 64, 24))
    [step] = emu3.autoencode_steps(clear)
    assert step.original.getpixel((5, 5)) == (255, 255, 255) and step.original.size == (64, 64)


def test_answers_by_chance(emu3, picture):
    question = "Please describe the image"
    draws = []
    for seed in (1, 1, 2):
        answers = emu3.understand_steps(picture, question, temperature=30.0, seed=seed, max_new_tokens=5)
        list(answers)
        draws.append(answers.answers[0].ids)
    assert draws[0] == draws[1] != draws[2]
    greedy = emu3.understand(picture, question)
    assert emu3.understand(picture, question, temperature=0) == emu3.understand(picture, question, top_k=1) == greedy
    assert emu3.understand(picture, question, temperature=1.0, top_p=1e-6) == greedy


def test_autoencode(emu3, picture):
    other = picture.resize((72, 56))
    images = emu3.autoencode([picture, other])
    assert same(images[0], emu3.autoencode(picture)) and images[1].size == (72, 56)
    frames = emu3.autoencode(video=[picture] * 8)
    assert len(frames) == 8 and frames[0].size == picture.size
    [step] = emu3.autoencode_steps(picture)
    assert same(step.image, images[0]) and step.codes.shape == (8, 8) and step.psnr > 25 and step.encode_s > 0


def test_parts_are_loaded_when_needed_and_once(picture, monkeypatch):
    loaded = []
    for part in (Emu3ForCausalLM, Emu3VisionVQModel):
        original = part.open_pretrained
        monkeypatch.setattr(
            part, "open_pretrained", lambda *a, original=original, **k: loaded.append(a[0]) or original(*a, **k)
        )
    emu3 = Emu3Pipeline.from_pretrained("emu3-mini", dtype="int8")
    assert loaded == []
    emu3.autoencode(picture)
    assert len(loaded) == 1
    emu3.understand(picture, "What colour is the circle?")
    emu3.generate(CIRCLE, seed=1)
    assert len(loaded) == 2 and emu3.model.weight_dtype == "int8"
    assert Emu3Pipeline.from_pretrained(vq_model_path="emu3-mini").autoencode(picture).size == (64, 64)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("emu3-loading")]


def test_the_language_model_is_read_while_a_picture_is_encoded(emu3, picture, monkeypatch):
    """Each waits for the other here; the answer and the weights are those of one after the other."""
    begun, encoded = threading.Event(), threading.Event()
    read, encode = OpenCheckpoint.read, Emu3VisionVQModel.encode

    def read_beside(checkpoint, progress):
        begun.set()
        assert encoded.wait(60)
        return read(checkpoint, progress)

    def encode_beside(model, pixels):
        assert begun.wait(60)
        codes = encode(model, pixels)
        encoded.set()
        return codes

    pipeline = Emu3Pipeline.from_pretrained("emu3-mini", dtype="float32")
    pipeline.vision_tokenizer = emu3.vision_tokenizer
    monkeypatch.setattr(OpenCheckpoint, "read", read_beside)
    monkeypatch.setattr(Emu3VisionVQModel, "encode", encode_beside)
    assert pipeline.understand(picture, "What colour is the circle?") == "red"
    assert not pipeline.model.training and not reading_threads()
    for one, other in zip(pipeline.model.parameters(), emu3.model.parameters(), strict=True):
        assert (one == other).all()


def test_an_error_while_the_language_model_is_read(emu3, picture, tmp_path, monkeypatch):
    directory = shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "copy")
    pipeline = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini", dtype="float32")
    pipeline.vision_tokenizer = emu3.vision_tokenizer
    with pytest.raises(ValueError, match="no room for the picture"):
        pipeline.understand(picture, "x " * 5000)
    needed = pipeline.processor.memory_to_encode([picture])
    needed += Emu3ForCausalLM.open_pretrained(directory, dtype="float32").size
    monkeypatch.setattr(machine, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="GB of memory for .* and for pictures that are encoded beside it"):
        pipeline.understand(picture, "x")
    monkeypatch.undo()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff" * 4)
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipeline.understand(picture, "x")
    assert "model" not in vars(pipeline) and not reading_threads()


def test_the_checkpoint_says_what_is_good(emu3, tmp_path):
    assert emu3.defaults == {"guidance_scale": 1.5, "temperature": 0.5, "top_k": 2048, "top_p": 1.0}
    directory = shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "copy")
    path = directory / "generation_config.json"
    pipeline = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini")
    assert pipeline.defaults == emu3.defaults
    path.write_text(json.dumps({"bos_token_id": 1, "top_k": 5}))  # as the released file has it: ids
    other = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini")
    assert other.defaults == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 5, "top_p": 1.0}
    for text, words in (
        ("[1]", " must hold one JSON object"),
        ('{"temperature": "hot"}', ": temperature must be above 0"),
        ('{"temperature": true}', ": temperature must be above 0"),
        ('{"top_k": 1e999}', ": top_k must be"),
        ('{"top_k": 7.5}', ": top_k must be .* got 7.5: mend or remove it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json{words}"):
            _ = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini").defaults
    path.write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        _ = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini").defaults
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="generation_config.json is not a regular file"):
        _ = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini").defaults
    path.unlink()
    for text, words in (('{"temperature": 0}', "temperature must be above 0"), ('{"guidance_scale": 1e999}', "finite")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json: .*{words}"):
            _ = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini").defaults
    path.unlink()
    plain = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini")
    assert plain.defaults == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}


def swap_two(directory):
    path = directory / "emu3_vision_tokens.txt"
    lines = path.read_text().splitlines()
    i = lines.index("<|visual token 000007|>")
    lines[i : i + 2] = reversed(lines[i : i + 2])
    path.write_text("\n".join(lines) + "\n")


def edit(directory, file, **values):
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: edit(d, CONFIG, img_token_id=918, boi_token_id=917), "img_token_id 918, .* it is 917"),
        (lambda d: edit(d, TOKENIZER, img_token="<|image start|>", boi_token="<|image token|>"), "917, .* it is 918"),
        (lambda d: edit(d, CONFIG, eos_token_id=5), r"eos_token_id 5, .* 916 \(<\|extra_204\|>\)"),
        (lambda d: edit(d, CONFIG, eos_token_id=[5, 709]), r"eos_token_id \[5, 709\], .* 916"),
        (lambda d: edit(d, CONFIG, pad_token_id=5), "pad_token_id 5, .* 709"),
        (lambda d: edit(d, CONFIG, vocab_size=13207), "13208 tokens and the model 13207"),
        (lambda d: edit(d, TOKENIZER, eol_token="<|extra_201|>") or edit(d, CONFIG, eol_token_id=913), "of its own"),
        (swap_two, "in this order"),
    ],
)
def test_a_tokenizer_and_a_model_that_do_not_belong_together(emu3, tmp_path, change, words):
    directory = shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "copy")
    change(directory)
    pipeline = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini")
    pipeline.vision_tokenizer = emu3.vision_tokenizer  # read once
    with pytest.raises(ValueError, match=words):
        _ = pipeline.processor


def test_several_tokens_may_end_an_answer(emu3, picture, tmp_path):
    directory = shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "copy")
    answer = emu3.processor.tokenizer.encode("red")
    for ends, text in (([916, 709], "red"), ([916, answer[0]], "")):
        edit(directory, CONFIG, eos_token_id=ends)
        pipeline = Emu3Pipeline.from_pretrained(directory, vq_model_path="emu3-mini", dtype="float32")
        pipeline.vision_tokenizer = emu3.vision_tokenizer
        assert pipeline.understand(picture, "What colour is the circle?") == text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.generate("x", num_images=10**9), "at most 10000 pictures"),
        (lambda e: e.generate("x", num_images=9999, height=512, width=512), "GB of memory for the keys and values"),
        (lambda e: e.generate("x", height=100_000, width=100_000), "GB of memory for"),
        (lambda e: e.generate("x " * 100_000), "the prompt has 2000.. tokens, the model has 1024 pos"),
        (lambda e: e.generate("x", negative_prompt="y " * 100_000), "the negative_prompt has 2000.. tokens"),
        (lambda e: e.generate("x", num_images=0), "num_images must be 1 or more"),
        (lambda e: e.generate("x", height=-8, width=8), "height and width must be positive"),
        (lambda e: e.generate("x", ratio="abc"), "'abc'"),
        (lambda e: e.generate(["x", "y", "z"], ratio=["1:1", "1:2"]), "3 prompts, 2 ratios"),
        (lambda e: e.generate("x", guidance_scale=float("nan")), "guidance_scale"),
        (lambda e: e.generate("x", temperature=0), "temperature must be above 0"),
        (lambda e: e.generate("x", decoding="fast"), "decoding must be one of"),
        (lambda e: e.understand(Image.new("RGB", (64, 64)), "x", max_new_tokens=0), "max_new_tokens"),
        (lambda e: e.understand([1, 2], ["a", "b", "c"]), "2 and 3"),
        (lambda e: e.understand([], "x"), "at least one picture"),
        (
            lambda e: e.understand(Image.new("RGB", (64, 64)), "x " * 100_000),
            "the question has 2000.. tokens, the model has 1024 positions: there is no room for the picture; shorten",
        ),
        (lambda e: e.understand(Image.new("RGB", (64, 64)), []), "at least one question"),
        (lambda e: e.generate([]), "at least one"),
        (lambda e: e.autoencode(), "image or video"),
        (lambda e: e.autoencode(video=[Image.new("RGB", (64, 64))] * 3), "3 frames"),
        (lambda e: e.autoencode(video=[Image.new("RGB", (64, 64)), Image.new("RGB", (72, 64))]), "different sizes"),
        (lambda e: Emu3Pipeline.from_pretrained("nowhere/at/all"), "no checkpoint at 'nowhere/at/all'"),
        (lambda e: Emu3Pipeline.from_pretrained("emu3-mini", chat_template="x"), "chat template"),
        (lambda e: Emu3Pipeline.from_pretrained(vq_model_path="emu3-mini").generate("x"), "no language model"),
    ],
)
def test_mistakes(emu3, call, words):
    _ = emu3.processor
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        call(emu3)
    assert time.monotonic() - started < 5  # before any work; a second on a quiet machine


def test_a_long_negative_prompt_gets_the_note_that_a_prompt_gets(emu3):
    long = "y " * 480
    assert not emu3.generate_steps("x").notes
    for how in ({"prompt": long}, {"prompt": "x", "negative_prompt": long}):
        [note] = emu3.generate_steps(**how).notes
        assert "64 x 64 pixels take" in note and "the model has 1024 positions" in note
    assert not emu3.generate_steps("x", negative_prompt=long, guidance_scale=1).notes


def test_a_text_of_many_pictures_is_tokenized_once(emu3, monkeypatch):
    tokenizer, texts = emu3.processor.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *a, **k: texts.append(text) or encode(text, *a, **k))
    emu3.generate_steps(["a circle", "a ring"], num_images=50, height=16, width=16)
    texts = [text for text in texts if "*" not in text]  # sizes
    assert len(texts) == 3 and texts[0].startswith("a circle")
