# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3-Mini, the checkpoint that comes with the package, and the world of scenes that it knows."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import golden, write_checkpoint
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "mini"))

from evaluate import compare
from recognise import recognise
from world import (
    CANVASES,
    COLOURS,
    NUMBERS,
    SHAPES,
    Scene,
    Thing,
    caption,
    held_out,
    questions,
    random_scene,
    relation,
    render,
)

from paddlemix.models.emu3.hub import MINI_DIRECTORY
from paddlemix.utils import InputError

SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"


# --- the world, and the recogniser that reads its pictures


def told(scene):
    """A scene to the pixel grid, for comparing."""
    return sorted((t.colour, t.shape, t.size, round(t.x / 8), round(t.y / 8)) for t in scene.things), scene.background


@pytest.mark.parametrize("damage", ["none", "blur", "noise"])
def test_recogniser_reads_scenes(damage):
    from scipy import ndimage

    rng, right = np.random.default_rng(0), []
    for _ in range(60):
        scene = random_scene(rng)
        picture = render(scene).astype(float)
        if damage == "blur":
            picture = ndimage.gaussian_filter(picture, (0.8, 0.8, 0))
        if damage == "noise":
            picture += rng.normal(0, 8, picture.shape)
        right.append(told(recognise(picture.clip(0, 255).astype(np.uint8))) == told(scene))
    assert np.mean(right) > 0.98


def test_recogniser_sees_what_is_wrong():
    """With a colour, a shape or a place exchanged the picture is read as another scene."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        scene = random_scene(rng, 2, (64, 64))
        picture = render(scene)
        assert told(recognise(picture[:, :, [1, 2, 0]])) != told(scene)
        assert told(recognise(picture[::-1, ::-1])) != told(scene)
        assert len(recognise(np.full_like(picture, 140)).things) == 0


def test_held_out_scenes_are_never_trained_on():
    """What held_out says of a whole scene is true of what a caption can say of it."""
    rng = np.random.default_rng(1)

    def combinations(scene):
        if len(scene.things) == 1:
            return [(t.size, t.colour, t.shape, *scene.background) for t in scene.things]
        pairs = [(a, relation(a, b), b) for a in scene.things for b in scene.things if a is not b]
        return [(a.colour, a.shape, r, b.colour, b.shape) for a, r, b in pairs if r in ("left of", "above")]

    scenes = [random_scene(rng, held=held) for held in (True, False) for _ in range(400)]
    trained = {c for s in scenes[400:] for c in combinations(s)}
    assert all(held_out(s) for s in scenes[:400]) and not any(held_out(s) for s in scenes[400:])
    assert all(set(combinations(s)) - trained for s in scenes[:400])
    assert {len(s.things) for s in scenes} == {1, 2, 3}
    assert {t.shape for s in scenes for t in s.things} == set(SHAPES) and len(SHAPES) >= 6
    assert {t.colour for s in scenes for t in s.things} == set(COLOURS) and len(COLOURS) >= 8


def test_words_say_what_the_scene_shows():
    rng = np.random.default_rng(2)
    for i in range(60):
        scene = random_scene(rng, canvas=CANVASES[i % 3], held=i % 2 == 0)
        assert render(scene).shape == (scene.height, scene.width, 3)
        for text in (caption(scene), caption(scene, rng=rng)):
            assert text.isascii() and text[0].islower() and "  " not in text and "a o" not in text
            assert all(f"{t.colour} {t.shape}" in text for t in scene.things)
        chinese = caption(scene, True), caption(scene, True, rng)
        assert all(text.endswith("。") and not any(c.isascii() for c in text) for text in chinese)
        asked = questions(scene)
        kinds = {kind for kind, _, _ in asked}
        assert {"describe", "count", "background", "shape"} <= kinds
        assert ("relation" in kinds) == any(relation(a, b) for a in scene.things for b in scene.things)
        answers = {question: answer for _, question, answer in asked}
        assert len(answers) == len(set(asked)) and answers["How many objects are there?"] == NUMBERS[len(scene.things)]
        for thing in scene.things:
            assert answers[f"What shape is the {thing.colour} object?"] == thing.shape
        assert len(questions(scene, chinese=True)) == len(asked) - 1  # one way less to ask for a description
        assert not any(c.isascii() for _, *both in questions(scene, True) for text in both for c in text)


def test_relations_are_those_of_the_picture():
    """The side that a caption names is where the colours are, measured in the picture."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = random_scene(rng, 2)
        middle = {t.colour: (t.x, t.y) for t in recognise(render(scene)).things}
        a, b = (middle[t.colour] for t in scene.things)
        axis = {"left of": 0, "above": 1}[relation(*scene.things)]
        assert a[axis] < b[axis] and relation(*scene.things) in caption(scene)


def test_a_drawing_is_right_only_if_all_of_it_is():
    scene = random_scene(np.random.default_rng(4), 2, (64, 64))
    a, b = scene.things
    other = next(s for s in SHAPES if s not in (a.shape, b.shape))
    moved = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    painted = replace(a, colour=b.colour), replace(b, colour=a.colour)
    for things, wrong in (
        ((a, b), set()),
        ((a,), {"count", "colour", "shape", "shape + colour", "relation", "right"}),
        ((a, replace(b, shape=other)), {"shape", "shape + colour", "right"}),
        (moved, {"relation", "right"}),
        (painted, {"relation", "right"} | ({"shape + colour"} if a.shape != b.shape else set())),
    ):
        result = compare(scene, replace(scene, things=things))
        assert {name for name, value in result.items() if not value} == wrong
    alone = replace(scene, things=(a,))
    assert compare(alone, alone)["relation"] is None and compare(alone, alone)["right"]


# --- the shipped checkpoint


@pytest.fixture(scope="module")
def mini():
    """(language model, processor)"""
    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    return Emu3ForCausalLM.from_pretrained("emu3-mini"), Emu3Processor.from_pretrained("emu3-mini")


@pytest.fixture(scope="module")
def torchs():
    """What PyTorch gave with these weights (tools/mini/export.py): the demo scene's codes, drawings, answers."""
    return golden("emu3_mini.json")


def test_codes_are_those_of_pytorch(mini, torchs):
    assert mini[1].tokenize_image([Image.open(SCENE)])[0].tolist() == torchs["codes"]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_drawings_are_those_of_pytorch(mini, torchs, scale):
    from paddlemix.models.emu3 import Sampling, generate_images
    from paddlemix.processors.prompts import NEGATIVE_PROMPT

    model, processor = mini
    expected = [d for d in torchs["drawings"] if d["guidance_scale"] == scale]
    assert len(expected) >= 3
    sizes = [np.shape(d["codes"]) for d in expected]
    size = {"ratio": [f"{w}:{h}" for h, w in sizes], "image_area": model.config.image_area}
    prompts = processor([d["prompt"] for d in expected], **size)
    assert prompts["image_size"] == [list(s) for s in sizes]
    negative = processor([NEGATIVE_PROMPT] * len(expected), **size)["input_ids"]
    drawn = generate_images(
        model, prompts["input_ids"], sizes, processor.grammar, negative, scale, Sampling(top_k=1)
    )  # fmt: skip
    for codes, one in zip(drawn.codes, expected, strict=True):
        assert codes.tolist() == one["codes"], one["prompt"]


def test_answers_are_those_of_pytorch(mini, torchs):
    from paddlemix.models.emu3 import generate_text

    model, processor = mini
    expected = torchs["answers"]
    picture = Image.open(SCENE)
    prompts = processor([a["question"] for a in expected], [picture] * len(expected), mode="U")["input_ids"]
    for ids, one in zip(zip(*generate_text(model, prompts, 32)), expected, strict=True):
        ids = [i for i in ids if i is not None]
        ids += [] if len(one["ids"]) == 32 else [model.config.eos_token_id]
        assert ids == one["ids"], one["question"]


def test_it_is_small_and_whole():
    names = {str(p.relative_to(MINI_DIRECTORY)): p.stat().st_size for p in MINI_DIRECTORY.rglob("*") if p.is_file()}
    assert sum(names.values()) <= 32 << 20
    assert names.keys() == {
        "README.md", "language_model/config.json", "language_model/emu3.tiktoken",
        "language_model/emu3_vision_tokens.txt", "language_model/generation_config.json",
        "language_model/model.safetensors", "language_model/tokenizer_config.json",
        "vision_tokenizer/config.json", "vision_tokenizer/model.safetensors",
        "vision_tokenizer/preprocessor_config.json",
    }  # fmt: skip
    assert json.loads((MINI_DIRECTORY / "vision_tokenizer" / "config.json").read_text())["codebook_size"] >= 512


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        ("models.emu3", "Emu3Config", "language_model"), ("models.emu3", "Emu3Tokenizer", "language_model"),
        ("models.emu3", "Emu3ForCausalLM", "language_model"), ("models.emu3", "Emu3Model", "language_model"),
        ("models.emu3", "Emu3VisionVQConfig", "vision_tokenizer"),
        ("models.emu3", "Emu3VisionVQModel", "vision_tokenizer"),
        ("processors", "Emu3VisionVQImageProcessor", "vision_tokenizer"),
    ],
)  # fmt: skip
def test_every_class_takes_the_name(module, name, part, tmp_path, monkeypatch):
    """From any folder, and whatever it holds: a folder of that name is ./emu3-mini."""
    cls = getattr(importlib.import_module(f"paddlemix.{module}"), name)
    (tmp_path / "emu3-mini").mkdir()
    monkeypatch.chdir(tmp_path)
    by_name, by_path = cls.from_pretrained("emu3-mini"), cls.from_pretrained(MINI_DIRECTORY / part)
    if hasattr(by_name, "state_dict"):
        ours, theirs = by_name.state_dict(), by_path.state_dict()
        assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    else:
        for made, folder in ((by_name, "a"), (by_path, "b")):
            made.save_pretrained(tmp_path / folder)
        saved = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "ab"]
        assert saved[0] and saved[0] == saved[1]
    with pytest.raises(InputError, match="has no|has neither"):
        cls.from_pretrained("./emu3-mini")


def test_its_pictures_go_through_as_they_are(mini):
    """Scenes keep their size, photographs become 256 x 256 pixels or as many, and ratios give the scenes' sizes."""
    processor = mini[1]
    for height, width in CANVASES:
        pixels = processor.image_processor(Image.new("RGB", (width, height)))["pixel_values"]
        assert pixels.shape == (1, 3, height, width)
    height, width = processor.image_processor(Image.new("RGB", (1920, 1280)))["pixel_values"].shape[2:]
    assert 0.9 * 256 * 256 < height * width <= 256 * 256
    sizes = processor(["a"] * 3, ratio=["1:1", "4:3", "3:4"], image_area=mini[0].config.image_area)["image_size"]
    assert [(8 * h, 8 * w) for h, w in sizes] == [(64, 64), (56, 72), (72, 56)] == list(CANVASES)


# --- the commands, by name, in a folder that is not the repository


def test_draw(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_path=emu3-mini", "--dtype=float32", "--seed=1", "--prompt", "a red circle", "一个蓝色方形"]
    code, _, err = command("run_generation_inference.py", *arguments, "--ratio", "1:1", "4:3")
    assert (code, err) == (0, "")
    pictures = [Image.open(f"result_{i}.png") for i in range(2)]
    assert [p.size for p in pictures] == [(64, 64), (72, 56)]
    assert pictures[0].text["vq_model_path"] == "emu3-mini"


def test_answer(command, tmp_path, monkeypatch, mini, torchs):
    monkeypatch.chdir(tmp_path)
    image = "paddlemix/demo_images/emu3_scene.png"  # of the package, whatever the folder
    asked = torchs["answers"][1]
    arguments = ["--model_path=emu3-mini", "--dtype=float32", f"--image_path={image}", "--question", asked["question"]]
    code, out, err = command("run_understanding_inference.py", *arguments)
    assert code == 0 and "note" not in err
    assert out == mini[1].tokenizer.decode(asked["ids"], skip_special_tokens=True) + "\n"


def test_large_pictures_of_questions_are_scaled(command, tmp_path, monkeypatch):
    """To the sizes that it was made for, with a note; the default picture too."""
    monkeypatch.chdir(tmp_path)
    things = Thing("circle", "red", "large", 16, 32), Thing("triangle", "blue", "large", 48, 32)
    scene = Scene(64, 64, ("white",), things)
    for side in (128, 256):
        Image.fromarray(render(scene)).resize((side, side), Image.Resampling.LANCZOS).save(f"{side}.png")
    default = "paddlemix/demo_images/emu3_demo.png"
    arguments = ["Please describe the image", "--model_path=emu3-mini", "--image_path", "128.png", "256.png", default]
    code, out, err = command("understand", *arguments)
    answers = out.splitlines()
    assert code == 0 and len(answers) == 6 and answers[1] == answers[3] == caption(scene) and answers[5]
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    for note, sizes in zip(notes, ("128 x 128|64 x 64", "256 x 256|64 x 64", "640 x 424|72 x 48"), strict=True):
        before, after = sizes.split("|")
        assert f"a picture of {before} pixels is scaled to {after}: " in note


def test_autoencode(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("autoencode.py", "--model_path=emu3-mini", f"--image_path={SCENE}")
    assert (code, err) == (0, "")
    assert Image.open("recon_image.png").size == (64, 64)
    assert float(out.split("PSNR ")[1].split()[0]) > 22


def test_a_folder_of_its_name_is_told(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emu3-mini").mkdir()
    _, _, err = command("autoencode.py", "--model_path=emu3-mini", f"--image_path={SCENE}")
    assert err.count("\n") == 1 and "./emu3-mini" in err


def test_it_takes_no_other_vision_tokenizer(command, tmp_path, monkeypatch):
    from paddlemix.processors import Emu3VisionVQImageProcessor

    monkeypatch.chdir(tmp_path)
    Emu3VisionVQImageProcessor().save_pretrained(write_checkpoint(tmp_path / "vision", "vision_tokenizer"))
    code, _, err = command("run_generation_inference.py", "--model_path=emu3-mini", "--vq_model_path=vision")
    assert code == 2 and err.count("\n") == 1 and "32768 codewords" in err and "belong together" in err


def test_the_demo_scene_is_held_out():
    scene = recognise(np.asarray(Image.open(SCENE)))
    assert len(scene.things) == 2 and held_out(scene) and (render(scene) == np.asarray(Image.open(SCENE))).all()
