# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning: rows and labels, the numbers of PyTorch, runs that are cut off and go on, several processes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import golden
from safetensors.numpy import load_file

from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM
from paddlemix.models.emu3.hub import MINI_DIRECTORY
from paddlemix.models.emu3.lora import LoraConfig, apply_lora
from paddlemix.models.emu3.needs import training_bytes
from paddlemix.models.emu3.parallel import Ranks
from paddlemix.training.checkpoints import last_checkpoint
from paddlemix.training.curves import read_log
from paddlemix.training.datasets import Example, PreparedData, Rows, make_row
from paddlemix.training.loss import next_token_loss
from paddlemix.training.optimizer import AdamW, cosine_with_min_lr
from paddlemix.training.prepare_data import schema
from paddlemix.training.settings import Settings
from paddlemix.training.train import open_model, train
from paddlemix.utils import InputError

ROOT = Path(__file__).parents[1]
SCHEMA = pa.schema([
    ("id", pa.string()), ("text", pa.string()), ("codes", pa.list_(pa.int32())), ("height", pa.int32()),
    ("width", pa.int32()), ("response", pa.string()),
])  # fmt: skip


def write_data(folder, rows, name="part-00000.parquet", schema=SCHEMA):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / name, row_group_size=4)
    return folder


def make_rows(count=10):
    """Small pictures of one code each, to draw and to be asked about."""
    random, rows = np.random.default_rng(0), []
    for i in range(count):
        height, width = random.integers(2, 5, 2).tolist()
        codes = random.integers(0, 8192, height * width).tolist()
        question = {"text": "What is it?", "response": f"number {i}"} if i % 3 == 0 else {"text": f"picture {i}"}
        rows.append({"id": f"row{i}", "codes": codes, "height": height, "width": width, **question})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"), make_rows())


def settings_of(data, folder, **values):
    given = {
        "model_path": "emu3-mini", "data_path": str(data), "output_dir": str(folder), "learning_rate": 1e-3,
        "warmup_steps": 1, "max_steps": 4, "gradient_accumulation_steps": 4, "save_steps": 2,
    }  # fmt: skip
    return Settings(**{**given, **values})


@functools.cache
def mini_prompts():
    return open_model(settings_of("data", "out"))[1]


def rows_of(settings, positions=1024):
    """The Rows of a run."""
    prompts = mini_prompts()
    return Rows(PreparedData(settings.data_path, prompts.grammar.codebook_size), prompts, settings, positions)


def run(settings):
    """All the events of a run."""
    return list(train(settings, threading.Event()))


def numbers(events):
    """What of a run does not depend on the clock."""
    names = "step", "loss", "learning_rate", "grad_norm", "eval_loss"
    return [{n: e[n] for n in names if n in e} for e in events if "loss" in e or "eval_loss" in e]


# --- the numbers of PyTorch: tools/training_golden.py


@pytest.fixture(scope="module")
def pytorch():
    return golden("training.json"), golden("training.npz")


@pytest.fixture(scope="module")
def golden_rows(pytorch):
    prompts = mini_prompts()
    rows = []
    for i, row in enumerate(pytorch[0]["rows"]):
        answers = ((row["question"], row["answer"]),) if "question" in row else ()
        example = Example(str(i), row.get("text", ""), np.array(row["codes"]), answers)
        rows.append(make_row(prompts, example, add_eos=row.get("with_eos", False)))
    return rows


def test_rows_and_labels_are_the_originals(pytorch, golden_rows):
    for (ids, labels), wanted_ids, wanted_labels in zip(golden_rows, pytorch[1]["ids"], pytorch[1]["labels"]):
        length = len(ids)
        assert ids == wanted_ids[:length].tolist() and set(wanted_ids[length:].tolist()) <= {709}
        assert labels == wanted_labels[:length].tolist() and set(wanted_labels[length:].tolist()) <= {-100}


@pytest.mark.parametrize(("name", "recompute"), [("unclipped", False), ("clipped", True)])
def test_steps_give_the_numbers_of_pytorch(pytorch, name, recompute, monkeypatch):
    about, arrays = pytorch
    how, kept = about["settings"], {key[8:]: value for key, value in arrays.items() if key.startswith("float64.")}
    if recompute:  # the head in several parts as well
        monkeypatch.setattr("paddlemix.training.loss.LOGITS", 50 * 13208)
    model = Emu3ForCausalLM.from_pretrained("emu3-mini", dtype="float32").train()
    (model.recompute_enable if recompute else model.recompute_disable)()
    weights = dict(model.named_parameters())
    assert list(weights) == about["parameters"]
    optimizer = AdamW(weights, how["weight_decay"], Ranks())
    ids, labels = (paddle.to_tensor(arrays[key].astype(np.int64)) for key in ("ids", "labels"))
    count, places = int((labels[:, 1:] != -100).sum()), arrays["elements"]
    for step in range(how["max_steps"]):
        loss = 0.0
        for rows in about["micro_batches"]:
            part = next_token_loss(model, ids[rows], labels[rows]) / count
            optimizer.backward(part)
            loss += float(part)
        if step == 0:
            assert loss == pytest.approx(float(kept["loss"]), rel=1e-5)
            for name_of_weight, norm, elements, at in zip(
                weights, kept["gradient_norms"], kept["gradient"], places, strict=True
            ):
                gradient = optimizer.gradients[name_of_weight].numpy().ravel()
                assert np.linalg.norm(gradient.astype(np.float64)) == pytest.approx(norm, rel=1e-4)
                assert np.abs(gradient[at] - elements).max() < 5e-4 * np.abs(elements).max()  # PyTorch: 6e-5
        rate = cosine_with_min_lr(
            step, how["max_steps"], how["warmup_steps"], how["learning_rate"], how["min_learning_rate"]
        )
        assert rate == pytest.approx(kept[f"{name}.rates"][step], rel=1e-12)
        assert loss == pytest.approx(kept[f"{name}.losses"][step], rel=1e-5)
        if step == how["steps_kept"]:
            break
        norm = optimizer.step(rate, about["runs"][name]["max_grad_norm"])
        assert norm == pytest.approx(kept[f"{name}.gradient_norms"][step], rel=1e-4)
    for weight, norm, elements, at in zip(
        weights.values(), kept[f"{name}.norms"], kept[f"{name}.values"], places, strict=True
    ):
        weight = weight.numpy().ravel()
        assert np.linalg.norm(weight.astype(np.float64)) == pytest.approx(norm, rel=1e-5)
        assert np.abs(weight[at] - elements).max() < 2e-5


def test_gradients_are_cut_only_where_a_norm_is_given(tmp_path):
    for max_norm, gradient in ((0, 100), (100, 50), (1000, 100)):
        weight = paddle.create_parameter([4], "float32")
        optimizer = AdamW({"w": weight}, 0.0, Ranks())
        optimizer.backward((100 * weight).sum())
        assert optimizer.step(1e-3, max_norm) == pytest.approx(200)
        optimizer.save(tmp_path / "state.safetensors")
        assert load_file(tmp_path / "state.safetensors")["w.exp_avg"] == pytest.approx(0.1 * gradient, rel=1e-5)


def test_the_defaults_are_the_originals():
    """Of scripts/t2i_sft.sh; a process of it has 2 rows at once, 4 times a step."""
    how = settings_of("data", "out", learning_rate=1e-5, warmup_steps=30, max_steps=0, gradient_accumulation_steps=8,
                      save_steps=500)  # fmt: skip
    assert how == Settings(model_path="emu3-mini", data_path="data", output_dir="out")
    assert (how.min_learning_rate, how.weight_decay, how.max_grad_norm, how.null_prompt_prob) == (1e-6, 0.1, 5.0, 0.05)
    assert (how.num_train_epochs, how.save_total_limit, how.per_device_train_batch_size) == (4, 10, 1)
    assert how.loss_on == "vision" and not how.add_eos and not how.lora


# --- which rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_row_comes_once_in_an_epoch_and_none_that_is_held_out(data, tmp_path, ranks):
    rows = rows_of(settings_of(data, tmp_path, eval_rows=3))

    def ids(step, count):
        shares = [rows.of_step(step, count, rank, ranks) for rank in range(ranks)]
        assert all([len(r.ids) for r in share] == sorted(len(r.ids) for r in share) for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        return sorted(row.id for share in shares for row in share)

    held_out = [row.id for rank in range(ranks) for row in rows.of_evaluation(rank, ranks)]
    trained = sorted({f"row{i}" for i in range(10)} - set(held_out))
    assert len(held_out) == len(set(held_out)) == 3
    assert [ids(epoch, 7) for epoch in range(3)] == [trained] * 3
    assert sorted(sum((ids(step, 2) for step in range(7)), [])) == sorted(trained * 2)  # across the end of an epoch
    assert ids(1, 2) == sorted(row.id for row in rows.of_step(1, 2))
    assert [ids(place, 1) for place in range(7)] != [ids(place, 1) for place in range(7, 14)]


def test_texts_of_drawings_are_dropped_by_chance(data, tmp_path):
    def dropped(count=10, epochs=20, **values):
        """{(epoch, id): whether the text is not there} of drawings; questions keep theirs."""
        rows, found = rows_of(settings_of(data, tmp_path, **values)), {}
        for step in range(epochs * 10 // count):
            for row in rows.of_step(step, count):
                is_dropped = row.ids[:2] == [915, 918]  # begin of sequence, begin of image
                if int(row.id[3:]) % 3:
                    found[step * count // 10, row.id] = is_dropped
                else:
                    assert not is_dropped
        assert len(found) == 6 * epochs
        return found

    assert set(dropped(null_prompt_prob=0, epochs=2).values()) == {False}
    assert set(dropped(null_prompt_prob=1, epochs=2).values()) == {True}
    half = dropped(null_prompt_prob=0.5)
    assert 0.3 < np.mean(list(half.values())) < 0.7
    assert half == dropped(null_prompt_prob=0.5, count=2)  # whatever a step is
    assert half != dropped(null_prompt_prob=0.5, seed=1)
    assert [half[0, f"row{i}"] for i in (1, 2, 4, 5, 7, 8)] != [half[1, f"row{i}"] for i in (1, 2, 4, 5, 7, 8)]


def test_a_row_may_take_all_positions(tmp_path):
    one = write_data(tmp_path / "data", make_rows()[1:2])
    row = rows_of(settings_of(one, tmp_path)).of_step(0, 1)[0]
    how = settings_of(one, tmp_path, null_prompt_prob=0)
    length = len(rows_of(how).of_step(0, 1)[0].ids)
    assert rows_of(how, length).longest == length >= len(row.ids)
    with pytest.raises(InputError, match=f"takes {length + 1} tokens and the model has {length} positions"):
        rows_of(replace(how, add_eos=True), length)


def test_data_is_known_by_what_it_holds(data, tmp_path):
    """Not by its files, nor by their order where that changes nothing."""
    rows = make_rows()
    for i in range(2):
        write_data(tmp_path / "parts", rows[5 * i : 5 * i + 5], f"part-{i}.parquet")
    columns = [{"turns": None, "error": None, **row} for row in rows]
    failed = {"id": "failed", "error": "damaged"}
    whole = write_data(tmp_path / "whole", [*columns[:3], failed, *columns[3:]], schema=schema())
    assert len({PreparedData([path], 12288).digest for path in (data, tmp_path / "parts", whole)}) == 1
    others = [[*rows[5:], *rows[:5]], [rows[0] | {"text": "Who?"}, *rows[1:]]]
    others.append([rows[0] | {"codes": [rows[0]["codes"][0] ^ 1, *rows[0]["codes"][1:]]}, *rows[1:]])
    digests = {PreparedData([write_data(tmp_path / f"{i}", other)], 12288).digest for i, other in enumerate(others)}
    assert len(digests | {PreparedData([data], 12288).digest}) == 4


# --- runs


def test_a_run_that_was_cut_off_gives_the_same_numbers(data, tmp_path):
    how = {"eval_rows": 2, "eval_steps": 2, "max_steps": 5, "save_total_limit": 2}
    whole = run(settings_of(data, tmp_path / "whole", **how))
    seen = []

    def run_until(is_end):
        stop = threading.Event()
        for event in train(settings_of(data, tmp_path / "cut", **how), stop):
            seen.append(event)
            if is_end(event):
                stop.set()

    run_until(lambda event: "checkpoint" in event)  # the evaluation of step 2 is given up
    assert seen[-1] == {"step": 2, "checkpoint": str(tmp_path / "cut" / "checkpoint-2")}
    run_until(lambda event: event["step"] == 3)  # step 4 is given up
    assert seen[-1] == {"step": 3, "checkpoint": str(tmp_path / "cut" / "checkpoint-3")}
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:  # a kill while a later step was written
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    seen += run(settings_of(data, tmp_path / "cut", **how))
    assert numbers(seen) == numbers(whole) and len(numbers(whole)) == 5 + 3
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert numbers(lines) == numbers(whole)
    ends = [path / "checkpoint-5" for path in (tmp_path / "whole", tmp_path / "cut")]
    for name in sorted(os.listdir(ends[0])):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "cut")) == [
        "checkpoint-4", "checkpoint-5", "curves.png", "log.jsonl", "visualdl"
    ]  # fmt: skip
    Emu3ForCausalLM.from_pretrained(ends[0])


def test_the_batch_size_changes_nothing(data, tmp_path):
    one = run(settings_of(data, tmp_path / "one", max_steps=0, num_train_epochs=1, gradient_accumulation_steps=5))
    other = run(
        settings_of(
            data, tmp_path / "two", max_steps=0, num_train_epochs=1, gradient_accumulation_steps=1,
            per_device_train_batch_size=5, recompute=True,
        )
    )  # fmt: skip
    assert [e["epoch"] for e in one if "epoch" in e] == [0.5, 1.0]
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    rows = rows_of(settings_of(data, tmp_path)).of_step(0, 10)
    assert sum(e["tokens"] for e in one if "tokens" in e) == sum(len(row.ids) for row in rows)


def test_16_bit_weights_have_float32_masters(data, tmp_path):
    events = run(settings_of(data, tmp_path / "16", dtype="bfloat16"))
    events32 = run(settings_of(data, tmp_path / "32"))
    for a, b in zip(numbers(events), numbers(events32), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    masters = load_file(tmp_path / "16" / "checkpoint-4" / "optimizer-00001-of-00001.safetensors")
    model = Emu3ForCausalLM.from_pretrained(tmp_path / "16" / "checkpoint-4", dtype="bfloat16")
    for name, weight in model.named_parameters():
        master = paddle.to_tensor(masters[f"{name}.master"])
        assert bool((master.astype("bfloat16") == weight).all()), name
        assert bool((master != weight.astype("float32")).any()), name


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_adapters_are_trained_and_gone_on_with(data, tmp_path, dtype):
    """In PEFT's files: the model is not written, and a run that was cut off gives the same bytes."""
    how = {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "dtype": dtype, "save_steps": 2, "max_steps": 3,
           "image_area": 2304}  # fmt: skip
    whole = run(settings_of(data, tmp_path / "whole", **how))
    assert numbers(whole)[0]["loss"] > numbers(whole)[-1]["loss"]
    assert any("an adapter has no config.json" in event.get("note", "") for event in whole)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    assert numbers(run(settings_of(data, tmp_path / "cut", **how))) == numbers(whole)[2:]
    ends = [path / "checkpoint-3" for path in (tmp_path / "whole", tmp_path / "cut")]
    optimizer = "optimizer-00001-of-00001.safetensors"
    names = ["adapter_config.json", "adapter_model.safetensors", optimizer, "training.json"]
    assert sorted(os.listdir(ends[0])) == names
    for name in names:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    adapter = load_file(ends[0] / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 6 and all(np.abs(array).max() > 0 for array in adapter.values())
    with pytest.raises(InputError, match="it is a LoRA adapter: give the model that it belongs to"):
        open_model(settings_of(data, tmp_path, model_path=str(ends[0])))
    for damage, fault in ((lambda file: file.write_bytes(b"a"), "truncated"), (Path.unlink, "is no optimizer's state")):
        damage(ends[1] / optimizer)
        with pytest.raises(InputError, match=f"cannot go on from .*checkpoint-3 .*{fault}.*: remove it, to go on"):
            run(settings_of(data, tmp_path / "cut", **how))


def test_an_adapter_is_not_gone_on_with_over_other_weights(data, tmp_path):
    """Even where the path of the model is the same."""
    base = tmp_path / "base"
    shutil.copytree(MINI_DIRECTORY / "language_model", base)
    how = settings_of(data, tmp_path / "run", model_path=str(base), lora=True, lora_rank=2, max_steps=1)
    run(how)
    run(how)
    model = Emu3ForCausalLM.from_pretrained(base)
    model.model.norm.weight.set_value(model.model.norm.weight * 1.001)
    model.save_pretrained(base)
    with pytest.raises(InputError, match="was trained with base weights '[0-9a-f]{8}', this command"):
        run(how)


def test_a_run_draws_samples_and_curves(data, tmp_path):
    """Of the area that is trained. What goes wrong there costs no step, and is made again."""
    from PIL import Image

    how = settings_of(data, tmp_path, max_steps=1, sample_prompt=["a large red circle."], eval_rows=2, image_area=2304)
    with pytest.raises(InputError, match="nowhere"):  # before the first step
        run(replace(how, vq_model_path="/nowhere"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(OSError, match="samples"):
        run(how)
    (tmp_path / "samples").unlink()
    events = run(how)
    assert [sorted(event) for event in events if "note" not in event] == [["samples", "step"]]
    (sample,) = events[-1]["samples"]
    assert Image.open(sample).size == (48, 48) and Image.open(tmp_path / "curves.png").size == (1000, 700)


def test_loss_on_other_tokens(data, tmp_path):
    """Of drawings all tokens, or the text; padding never."""
    prompts = mini_prompts()
    example = Example("a", "a red square", np.zeros([2, 3], np.int64), ())
    ids, labels = make_row(prompts, example, "all", add_eos=True)
    assert labels == ids and ids[-1] == 916
    ids, labels = make_row(prompts, example, "text")
    text = prompts.drawing_prompt("a red square")
    assert labels == text + [-100] * (len(ids) - len(text))
    ids, labels = make_row(prompts, example, without_text=True)
    assert ids[:2] == [915, 918] and sum(label != -100 for label in labels) == 6


def test_a_conversation_of_several_turns(data, tmp_path):
    prompts = mini_prompts()
    codes = np.zeros([2, 3], np.int64)
    ids, labels = make_row(prompts, Example("a", "what?", codes, (("what?", "a ring"), ("and?", "a square"))))
    learned = [label for label in labels if label != -100]
    assert learned == prompts.answer("a ring") + prompts.answer("a square")
    assert ids == prompts.chat_prompt([("user", [codes, "what?"]), ("assistant", ["a ring"]), ("user", ["and?"])]) + (
        prompts.answer("a square")
    )


# --- as processes


def start(data, folder, *more, launch=0):
    arguments = ["--model_path", "emu3-mini", "--data_path", data, "--output_dir", folder, "--learning_rate=1e-3",
                 "--warmup_steps=1", *more]  # fmt: skip
    program = [str(ROOT / "paddlemix" / "examples" / "emu3" / "train.py")]
    if launch:
        logs = ["--log_dir", f"{folder}-logs"]
        program = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(launch), *logs, *program]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip


def wait_for(process, is_there):
    for _ in range(1200):
        if is_there():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("nothing came in a minute")


def lines_of(folder):
    log = folder / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.long
def test_a_killed_run_goes_on_with_another_number_of_processes(data, tmp_path):
    """kill -9 of one of two processes ends the other; one process goes on; SIGTERM and Ctrl-C write a checkpoint."""
    folder, how = tmp_path / "run", ["--gradient_accumulation_steps=2", "--max_steps=400"]
    job = start(data, folder, *how, "--save_steps=3", launch=2)
    wait_for(job, lambda: (folder / "checkpoint-3").is_dir() and len(lines_of(folder)) > 5)
    second = subprocess.run(
        ["pgrep", "-P", str(job.pid), "-f", "train.py"], capture_output=True, text=True
    ).stdout.split()[-1]  # fmt: skip
    os.kill(int(second), signal.SIGKILL)
    out, _ = job.communicate(timeout=60)
    # whichever of the two is first: the process that waits for the other one, or the launcher that ends it
    line = "error: one of the 2 processes has ended" in out or "Container rank 1 status failed" in out
    assert job.returncode and line and "Traceback" not in out, out

    for which, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done = len(lines_of(folder))
        job = start(data, folder, *how, "--save_steps=1000")
        wait_for(job, lambda done=done: len(lines_of(folder)) > done + 1)
        for _ in range(3 if which == signal.SIGTERM else 1):  # as Paddle's launcher ends its processes
            os.kill(job.pid, which)
            time.sleep(0.1)
        out, _ = job.communicate(timeout=60)
        assert job.returncode == code and "a step keeps the 4 rows that it began with" in out and "wrote" in out
        steps = [json.loads(line)["step"] for line in lines_of(folder) if "loss" in json.loads(line)]
        assert steps == list(range(1, steps[-1] + 1)) and (folder / f"checkpoint-{steps[-1]}").is_dir()


def test_two_processes_give_the_numbers_of_one(data, tmp_path):
    how = ["--max_steps=3", "--save_steps=2", "--eval_rows=3", "--eval_steps=3"]
    job = start(data, tmp_path / "two", *how, "--gradient_accumulation_steps=2", launch=2)
    out, _ = job.communicate(timeout=100)
    assert job.returncode == 0, out
    one = run(settings_of(data, tmp_path / "one", max_steps=3, eval_rows=3, eval_steps=3))
    two = [json.loads(line) for line in lines_of(tmp_path / "two")]
    assert len(numbers(one)) == 4
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    # each keeps a part of the optimizer's state, and one process goes on from both
    parts = sorted((tmp_path / "two" / "checkpoint-2").glob("optimizer-*"))
    names = [set(load_file(part)) for part in parts]
    assert len(names) == 2 and not names[0] & names[1]
    sizes = [sum(array.size for array in load_file(part).values()) for part in parts]
    assert max(sizes) < 1.1 * min(sizes)
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "two" / "checkpoint-2").rename(again / "checkpoint-2")
    rest = run(settings_of(data, again, max_steps=3, eval_rows=3, eval_steps=3))
    assert numbers(rest)[0] == pytest.approx(numbers(one)[2], rel=1e-5)


# --- what cannot be


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_path": "/nowhere"}, "there is no Parquet file"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number from 0 to 1"),
        ({"min_learning_rate": 0.1}, "not below min_learning_rate"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number, 1 or more"),
        ({"null_prompt_prob": 1.5}, "null_prompt_prob must be a number from 0 to 1"),
        ({"apply_loss_on_only_text": True}, "both on"),
        ({"dtype": "int4"}, "add --lora"),
        ({"max_steps": 0, "num_train_epochs": 0}, "give one of them"),
        ({"eval_rows": 10}, "eval_rows is 10 of 10 rows"),
        ({"max_position_embeddings": 12}, "takes .* tokens and the model has 12 positions"),
        ({"model_path": "/nowhere"}, "nowhere"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a number from 0"),
        ({"lora_rank": 16}, "lora_rank is of adapters: add --lora"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules is of adapters"),
        ({"sample_prompt": ["a " * 2000]}, "a sample_prompt has 2... tokens, the model has 1024 positions"),
        ({"sample_prompt": ["a ring"], "image_area": 5}, "an area of .* leaves a picture of 0 x 0 tokens"),
    ],
)
def test_settings_that_cannot_be(data, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        run(settings_of(data, tmp_path, **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "1 rows of the data have no id"),
        ({"id": ""}, "row '' of the data has an empty id"),
        ({"id": "row3"}, "several rows of the data have the id 'row3'"),
        ({"text": " "}, "row 'row1' of the data has an empty text"),
        ({"text": None}, "have no text"),
        ({"response": ""}, "row 'row1' of the data has a picture and a question without an answer"),
        ({"codes": [0]}, "row 'row1' has 1 codes for a picture of"),
        ({"codes": None}, "row 'row1' has 0 codes"),
        ({"codes": [1, None, 3, 4], "height": 2, "width": 2}, "row 'row1' has 3 codes for a picture of 2 x 2"),
        ({"codes": [1], "height": -1, "width": -1}, "row 'row1' of the data has a height or a width below 1"),
        ({"response": "a", "turns": [{"text": "b", "response": None}]}, "row 'row1' of the data has a turn without"),
        ({"response": "a", "turns": [{"text": " ", "response": "c"}]}, "row 'row1' of the data has a turn without"),
        ({"response": "a", "turns": [None]}, "row 'row1' of the data has a turn without"),
        ({"turns": [{"text": "b", "response": "c"}]}, "row 'row1' of the data has turns, and no answer"),
        ({"codes": [99999] * 64, "height": 8, "width": 8}, "row 'row1' has codes from 99999 to 99999"),
        ({"codes": [-1] * 64, "height": 8, "width": 8}, "row 'row1' has codes from -1"),
        ({"text": "a " * 2000}, "row 'row1' takes .* tokens and the model has 1024 positions"),
        ({"text": "\U0001d160" * 200}, "row 'row1' takes 2... tokens"),  # in NFC these are three times as many bytes
        ({"text": "a" + "\u0301" * 300}, "row 'row1': a text has more than 256 combining marks"),
    ],
)
def test_rows_that_cannot_be(tmp_path, change, message):
    """The last one of several files, and nothing is trained before it is found."""
    rows = make_rows()
    write_data(tmp_path / "data", [*rows[:1], *rows[2:]], "part-00000.parquet")
    path = write_data(tmp_path / "data", [rows[1] | change], "part-00001.parquet", schema())
    with pytest.raises(InputError, match=message):
        run(settings_of(path, tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", pa.array([["a"]] * 10), "cannot read its column text"),
        ("text", pa.array([b"\xff"] * 10).view(pa.string()), "cannot read its column text .*UTF8"),
        ("height", pa.array(["tall"] * 10), "cannot read its column height"),
        ("codes", pa.array([[0.5] * 4] * 10), "cannot read its column codes"),
        ("codes", pa.array([[2**40] * 4] * 10), "cannot read its column codes"),
        ("codes", pa.array(["1 2 3 4"] * 10), "cannot read its column codes"),
        ("text", pa.array(range(10)), None),
        ("text", pa.array([f"a {i}" for i in range(10)], pa.large_string()), None),
        ("id", pa.array(range(10)), None),
        ("response", pa.nulls(10), None),
        ("width", pa.array(["2"] * 10), None),
        ("codes", pa.array([[1.0, 2.0, 3.0, 4.0]] * 10, pa.large_list(pa.float64())), None),
    ],
)
def test_columns_of_other_types(tmp_path, column, values, message):
    """As pandas and others write them: cast where nothing is lost, else an error."""
    rows = [{"id": f"{i}", "text": f"{i}", "codes": [0] * 4, "height": 2, "width": 2} for i in range(10)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), tmp_path / "a.parquet")
    if message:
        with pytest.raises(InputError, match=message):
            PreparedData([tmp_path], 8192)
    else:
        example = PreparedData([tmp_path], 8192).example(2)
        assert type(example.text) is str and example.codes.shape == (2, 2) and example.conversation == ()


def test_data_that_is_given_twice(data, tmp_path):
    for paths in ([data, data], [data, data / "part-00000.parquet"]):
        with pytest.raises(InputError, match="several rows of the data have the id 'row0': .* each file once"):
            PreparedData(paths, 8192)


def test_a_file_that_is_cut_off_later(data, tmp_path):
    shutil.copy(data / "part-00000.parquet", tmp_path)
    file = pq.ParquetFile(tmp_path / "part-00000.parquet")
    start = file.metadata.row_group(2).column(2).data_page_offset
    with open(tmp_path / "part-00000.parquet", "r+b") as damaged:
        damaged.seek(start)
        damaged.write(bytes(40))
    with pytest.raises(InputError, match="part-00000.parquet: cannot read its column codes"):
        PreparedData([tmp_path], 8192)


def test_a_quantized_checkpoint_is_trained_by_adapters_only(data, tmp_path):
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "model", ignore=without_weights)
    config = Emu3Config.from_pretrained("emu3-mini").quantized("int4")
    (tmp_path / "model" / "config.json").chmod(0o644)
    config.save_pretrained(tmp_path / "model")
    how = settings_of(data, tmp_path, model_path=str(tmp_path / "model"))
    with pytest.raises(InputError, match="model is int4, and such weights cannot be trained: add --lora"):
        open_model(how)
    assert open_model(replace(how, lora=True))[0] == config


def test_files_of_others_in_the_folder(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for text in ('{"a": 1}', '{"step": 3, "job": {}}', '{"step": "3", "job": {"rows of a step": 1}}'):
        (tmp_path / "checkpoint-3" / "training.json").write_text(text)
        with pytest.raises(InputError, match="training.json is not of `emu3 train`: give another --output_dir"):
            last_checkpoint(tmp_path, {})
    for text in ("3\n", '{"a": 1}\n', '{"step": 1}\nnot JSON\n{"step": 3}\n'):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(InputError, match="log.jsonl, line ., is not of `emu3 train`"):
            read_log(tmp_path / "log.jsonl")


def test_a_step_of_too_many_rows(data, tmp_path):
    with pytest.raises(InputError, match="a step of 1,000,000,000,000 rows .*: give 1,048,576 at most"):
        run(settings_of(data, tmp_path, gradient_accumulation_steps=10**12))


def test_files_that_cannot_be(data, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1, not")
    with pytest.raises(InputError, match="not a Parquet file that can be read"):
        run(settings_of(tmp_path / "broken.parquet", tmp_path / "out"))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="has no column text, codes, height, width, response"):
        run(settings_of(tmp_path / "other.parquet", tmp_path / "out"))
    schema = SCHEMA.append(pa.field("error", pa.string()))
    failed = [{"id": "a", "error": "damaged"}]
    with pytest.raises(InputError, match="no row without an error"):
        run(settings_of(write_data(tmp_path / "failed", failed, schema=schema), tmp_path / "out"))
    mixed = write_data(tmp_path / "mixed", [*make_rows(), {"id": "damaged", "error": "damaged"}], schema=schema)
    events = run(settings_of(mixed, tmp_path / "out", max_steps=1))
    assert "1 rows have an error in the data and are left out" in [event.get("note") for event in events]


def test_one_run_at_a_time_in_a_folder(data, tmp_path):
    begun = train(settings_of(data, tmp_path, max_steps=1), threading.Event())
    next(begun)
    before = (tmp_path / "log.jsonl").stat()
    words = "another process writes into .* now: wait for it, end it, or give another folder"
    with pytest.raises(InputError, match=words):
        run(settings_of(data, tmp_path, max_steps=1))
    assert (tmp_path / "log.jsonl").stat() == before
    begun.close()
    assert run(settings_of(data, tmp_path, max_steps=1))[-1]["step"] == 1


def test_another_run_is_not_gone_on_with(data, tmp_path):
    run(settings_of(data, tmp_path, max_steps=1))
    with pytest.raises(InputError, match="was trained with learning_rate 0.001, this command gives 0.002"):
        run(settings_of(data, tmp_path, max_steps=1, learning_rate=2e-3))
    with pytest.raises(InputError, match="rows of the data 10, this command gives 11"):
        run(settings_of(write_data(tmp_path / "more", make_rows(11)), tmp_path, max_steps=1))
    with pytest.raises(InputError, match="digest of the data"):
        run(settings_of(write_data(tmp_path / "turned", make_rows()[::-1]), tmp_path, max_steps=1))
    with pytest.raises(InputError, match="was trained with dtype 'float32', this command gives 'bfloat16'"):
        run(settings_of(data, tmp_path, max_steps=1, dtype="bfloat16"))
    with pytest.raises(InputError, match="model_path 'emu3-mini', this command gives"):
        run(settings_of(data, tmp_path, max_steps=1, model_path=str(tmp_path / "checkpoint-1")))


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_rows(data, tmp_path, monkeypatch):
    import paddlemix.training.loss as loss

    real, calls = loss.next_token_loss, []

    def sometimes(model, ids, labels):
        calls.append(ids.shape)
        return real(model, ids, labels) * (1 if len(calls) < 10 else float("nan"))

    monkeypatch.setattr(loss, "next_token_loss", sometimes)
    message = r"the loss of step 3 is nan, of the rows \['row\d', 'row\d', 'row\d'\]: .*-2 is the last good checkpoint"
    with pytest.raises(InputError, match=message):
        run(settings_of(data, tmp_path, max_steps=40, save_steps=1))
    assert max(json.loads(line)["step"] for line in lines_of(tmp_path)) == 2
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_full_disk_loses_nothing(data, tmp_path):
    """No file of more than 40 MB: the model's 31 fit, the optimizer's 62 do not."""
    folder, stop = tmp_path / "out", threading.Event()
    how = settings_of(data, folder, max_steps=2, save_steps=1)
    for event in train(how, stop):
        if "checkpoint" in event:
            stop.set()
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()}
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 20, 40 << 20));"
        "from paddlemix.commands.__main__ import main; main()"
    )
    arguments = ["train", "--model_path=emu3-mini", f"--data_path={data}", f"--output_dir={folder}", "--max_steps=2",
                 "--save_steps=1", "--learning_rate=1e-3", "--warmup_steps=1",
                 "--gradient_accumulation_steps=4"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = f"error: cannot write all into {folder} (File too large): make room there and give the same command again"
    assert done.stderr.splitlines()[-1] == last
    assert "going on from" in done.stderr and [json.loads(line)["step"] for line in lines_of(folder)][-1] == 2
    assert sorted(os.listdir(folder)) == ["checkpoint-1", "curves.png", "log.jsonl", "visualdl"]
    assert before == {path.name: path.read_bytes() for path in (folder / "checkpoint-1").iterdir()}
    assert run(how)[-1] == {"step": 2, "checkpoint": str(folder / "checkpoint-2")}


def test_the_memory_of_training():
    """By arithmetic of the released layers, and what adapters with a dropout keep more, by Paddle's allocator."""
    released = Emu3Config()
    for dtype, weights in (("bfloat16", 2 * 8.49e9), ("float32", 4 * 8.49e9)):
        parts = training_bytes(released, dtype, 1000)
        assert parts["weights"] == pytest.approx(weights, rel=1e-3)
        assert parts["optimizer"] == pytest.approx(8.49e9 * (16 if dtype == "bfloat16" else 12), rel=1e-3)
    assert training_bytes(released, "bfloat16", 1, processes=8)["optimizer"] == pytest.approx(8.49e9 * 2, rel=1e-3)

    def of_adapters(rank, **how):
        return training_bytes(released, "bfloat16", 1000, rank, activation=2, **how)["activations"]

    copies = 4 * (6 * 4096 + 14336) * 1000  # of a layer: what seven projections take, in float32
    assert of_adapters(8) - of_adapters(0) == 32 * copies
    assert of_adapters(8, recompute=True) - of_adapters(0, recompute=True) == copies
    assert of_adapters(8, lora_dropout=0.1) - of_adapters(0) == 32 * copies * 5 // 4

    kept, mini, ids = {}, Emu3Config.from_pretrained("emu3-mini"), paddle.zeros([2, 100], "int64")
    for dropout in (0.0, 0.1):
        model = Emu3ForCausalLM.from_pretrained("emu3-mini", dtype="float32").train()
        apply_lora(model, LoraConfig(dropout=dropout))
        before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
        hidden = model.model(ids)
        kept[dropout] = paddle.base.core.host_memory_stat_current_value("Allocated", 0) - before
        expected = training_bytes(mini, "float32", 200, 8, lora_dropout=dropout)["activations"]
        assert kept[dropout] == pytest.approx(expected, rel=0.15)
        del hidden
    assert kept[0.1] - kept[0.0] == pytest.approx(6 * 5 * (6 * 192 + 576) * 200, rel=0.05)


def test_the_command(command, data, tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.commands.train.PACED", 2)
    code, out, err = command(
        "train", "--model_path", "emu3-mini", "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps=2",
        "--eval_rows=2", "--apply_loss_on_only_vision", "False", "--add_eos",
    )  # fmt: skip
    assert code == 0 and f"\nstep 2: wrote {tmp_path / 'out' / 'checkpoint-2'}\nstep 2: loss of held-out rows 1" in out
    assert "step 2 of 2: " in out and " s a step, the end is expected on " in out
    assert "note: 8 rows to train, 2 held out, 8 a step, 2 steps" in err
    code, out, err = command("train", "--model_path=emu3-mini", "--data_path", data, "--output_dir", tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith("error: ") and "this command gives" in err
    code, out, err = command("train", "--model_path", "emu3-mini")
    assert (code, err) == (2, "error: the following arguments are required: --data_path, --output_dir\n")
