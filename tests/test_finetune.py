# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The tutorial of fine-tuning: its scenes, its data, and that its programs run through."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import paddle

from paddlemix.training.settings import Settings
from paddlemix.training.train import open_model

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools" / "mini"), str(ROOT / "tools" / "finetune")]

import before_after
import make_data
import settle
from evaluate import compare
from make_data import NEWS, new_scene, sizes
from recognise import recognise
from world import NEW_COLOURS, held_out, places, random_scene, render

TARGETS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"


def test_recogniser_reads_what_is_new():
    rng = np.random.default_rng(0)
    scenes = [new_scene(rng, new=NEWS[i % 3], held=i % 2 == 0) for i in range(18)]
    scenes += [random_scene(rng) for _ in range(6)]
    right = [compare(scene, recognise(render(scene), new=True))["right"] for scene in scenes]
    assert np.mean(right) > 0.97
    for scene in scenes[:18]:
        assert not compare(scene, recognise(render(scene)))["right"]  # which does not know houses and brown


def test_new_scenes_and_their_question():
    rng = np.random.default_rng(1)
    for i in range(60):
        scene = new_scene(rng, new=NEWS[i % 3], held=i % 2 == 0)
        assert held_out(scene) == (i % 2 == 0)
        shapes, colours = {t.shape for t in scene.things}, {t.colour for t in scene.things}
        assert ("house" in shapes) == (NEWS[i % 3] != "colour") and ("brown" in colours) == (NEWS[i % 3] != "shape")
        for (question, answer), thing in zip(sizes(scene), scene.things, strict=True):
            of = question.removeprefix("What size is the ").removesuffix("?").removesuffix(" object")
            assert (of in (thing.shape, thing.colour)) and answer == thing.size
            assert sum(of in (other.shape, other.colour) for other in scene.things) == 1
    assert set(NEW_COLOURS) == {"brown"}


def test_settled_codes_are_the_likeliest_of_those_that_were_seen():
    _, prompts = open_model(Settings("emu3-mini", ("data",), "out"))
    first, scenes = prompts.grammar.first_visual, [random_scene(np.random.default_rng(2), 2, (64, 64))]
    own = list(places(scenes[0], (8, 8)))
    found = {place: {3: 1, 7: 1, 5: 1} if i % 2 else {3: 2} for i, place in enumerate(own)}

    head = np.zeros([1, first + 10], np.float32)
    head[0, [first + 9, first + 7, first + 3]] = 3, 2, 1  # 9 is likeliest everywhere, then 7, then 3
    model = Namespace(
        model=lambda ids: paddle.ones([*ids.shape, 1]), lm_head=lambda hidden: hidden @ paddle.to_tensor(head)
    )
    chosen = settle.likeliest(model, prompts, scenes, found, dict.fromkeys(own, 3))
    assert chosen == {place: 7 if 7 in codes else 3 for place, codes in found.items()}


def test_the_tutorial_runs_through(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(before_after, "LONGEST", 3)
    monkeypatch.setattr(before_after, "NAMES", {"both": "brown houses"})
    make_data.main(Namespace(out=tmp_path / "data", new=1, known=1, seed=0))
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and len({row["id"] for row in rows}) == 4
    code, out, err = command(
        "prepare", "--vq_model_path=emu3-mini", "--data_path", tmp_path / "data" / "train.jsonl", "--output_path",
        tmp_path / "codes",
    )  # fmt: skip
    assert code == 0 and "wrote 4 rows" in out + err and "error" not in out + err
    settled = Namespace(
        data=tmp_path / "data" / "train.jsonl", codes=tmp_path / "codes", out=tmp_path / "settled", times=0, seed=0
    )
    settle.main(settled)  # nothing is encoded, and the codes stay
    code, out, err = command(
        "train", "--model_path=emu3-mini", "--data_path", tmp_path / "settled", "--output_dir", tmp_path / "lora",
        "--lora", "--lora_target_modules", *TARGETS, "--max_steps=2", "--per_device_train_batch_size=3",
        "--gradient_accumulation_steps=1",
    )  # fmt: skip
    assert code == 0, err
    lora, picture = tmp_path / "lora" / "checkpoint-2", tmp_path / "picture.png"
    before_after.main(Namespace(model_path="emu3-mini", lora_path=lora, count=1, picture=picture, seed=100))
    table = capsys.readouterr().out
    assert "| of 1 each | before | after |" in table and "brown houses drawn" in table and picture.is_file()
