# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning: rows and labels, the numbers of PyTorch, runs that are cut off and go on, several processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import paddle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import golden
from safetensors.numpy import load_file

from paddlemix.models.emu3 import Emu3ForCausalLM
from paddlemix.models.emu3.parallel import Ranks
from paddlemix.training.datasets import Example, make_row
from paddlemix.training.loss import next_token_loss
from paddlemix.training.optimizer import AdamW, cosine_with_min_lr
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
    _, prompts = open_model(settings_of("data", "out"))
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


# --- runs


def test_a_run_that_was_cut_off_gives_the_same_numbers(data, tmp_path):
    how = {"eval_rows": 2, "eval_steps": 2, "max_steps": 5, "save_total_limit": 2}
    whole = run(settings_of(data, tmp_path / "whole", **how))
    stop, seen = threading.Event(), []
    for event in train(settings_of(data, tmp_path / "cut", **how), stop):
        seen.append(event)
        if event["step"] == 3:
            stop.set()  # step 4 is given up
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


def test_each_row_comes_once_in_an_epoch_and_the_batch_size_changes_nothing(data, tmp_path):
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
    tokens = sum(e["tokens"] for e in one if "tokens" in e)
    _, prompts = open_model(settings_of(data, tmp_path))
    rows = [
        Example(row["id"], row["text"], np.array(row["codes"]).reshape(row["height"], row["width"]),
                ((row["text"], row["response"]),) if "response" in row else ())
        for row in make_rows()
    ]  # fmt: skip
    assert tokens == sum(len(make_row(prompts, row)[0]) for row in rows)


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
    how = {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "dtype": dtype, "save_steps": 2, "max_steps": 3}
    whole = run(settings_of(data, tmp_path / "whole", **how))
    assert numbers(whole)[0]["loss"] > numbers(whole)[-1]["loss"]
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


def test_a_run_draws_samples_and_curves(data, tmp_path):
    from PIL import Image

    events = run(settings_of(data, tmp_path, max_steps=1, sample_prompt=["a large red circle."], eval_steps=1))
    (samples,) = [event["samples"] for event in events if "samples" in event]
    assert Image.open(samples[0]).size == (64, 64) and Image.open(tmp_path / "curves.png").size == (1000, 700)


def test_loss_on_other_tokens(data, tmp_path):
    """Of drawings all tokens, or the text; padding never."""
    _, prompts = open_model(settings_of(data, tmp_path))
    example = Example("a", "a red square", np.zeros([2, 3], np.int64), ())
    ids, labels = make_row(prompts, example, "all", add_eos=True)
    assert labels == ids and ids[-1] == 916
    ids, labels = make_row(prompts, example, "text")
    text = prompts.drawing_prompt("a red square")
    assert labels == text + [-100] * (len(ids) - len(text))
    ids, labels = make_row(prompts, example, without_text=True)
    assert ids[:2] == [915, 918] and sum(label != -100 for label in labels) == 6


def test_a_conversation_of_several_turns(data, tmp_path):
    _, prompts = open_model(settings_of(data, tmp_path))
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
        os.kill(job.pid, which)
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
    assert len(names) == 2 and not names[0] & names[1] and abs(len(names[0]) - len(names[1])) < 60
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
    ],
)
def test_settings_that_cannot_be(data, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        run(settings_of(data, tmp_path, **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "1 rows of the data have no id"),
        ({"id": "row3"}, "several rows of the data have the id 'row3'"),
        ({"text": " "}, "row 'row1' of the data has an empty text"),
        ({"text": None}, "have no text"),
        ({"response": ""}, "row 'row1' of the data has a picture and a question without an answer"),
        ({"codes": [0]}, "row 'row1' has 1 codes for a picture of"),
        ({"codes": None}, "row 'row1' has 0 codes"),
        ({"codes": [99999] * 64, "height": 8, "width": 8}, "row 'row1' has codes from 99999 to 99999"),
        ({"codes": [-1] * 64, "height": 8, "width": 8}, "row 'row1' has codes from -1"),
        ({"text": "a " * 2000}, "row 'row1' takes .* tokens and the model has 1024 positions"),
    ],
)
def test_rows_that_cannot_be(tmp_path, change, message):
    rows = make_rows()
    rows[1] |= change
    with pytest.raises(InputError, match=message):
        run(settings_of(write_data(tmp_path / "data", rows), tmp_path / "out", num_train_epochs=1, max_steps=0))


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


def test_another_run_is_not_gone_on_with(data, tmp_path):
    run(settings_of(data, tmp_path, max_steps=1))
    with pytest.raises(InputError, match="was trained with learning_rate 0.001, this command gives 0.002"):
        run(settings_of(data, tmp_path, max_steps=1, learning_rate=2e-3))
    with pytest.raises(InputError, match="rows of the data 10, this command gives 11"):
        run(settings_of(write_data(tmp_path / "more", make_rows(11)), tmp_path, max_steps=1))
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
    run(settings_of(data, tmp_path, max_steps=1))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-1").iterdir()}
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 20, 40 << 20));"
        "from paddlemix.commands.__main__ import main; main()"
    )
    more = write_data(tmp_path / "data", make_rows())
    arguments = ["train", "--model_path=emu3-mini", f"--data_path={more}", f"--output_dir={tmp_path / 'out'}",
                 "--max_steps=1"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["log.jsonl", "visualdl"]
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-1").iterdir()}


def test_the_command(command, data, tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.commands.train.PACED", 2)
    code, out, err = command(
        "train", "--model_path", "emu3-mini", "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps=2",
        "--eval_rows=2", "--apply_loss_on_only_vision", "False", "--add_eos",
    )  # fmt: skip
    assert code == 0 and "loss of held-out rows" in out and out.endswith("checkpoint-2\n")
    assert "step 2 of 2: " in out and " s a step, the end is expected on " in out
    assert "note: 8 rows to train, 2 held out, 8 a step, 2 steps" in err
    code, out, err = command("train", "--model_path=emu3-mini", "--data_path", data, "--output_dir", tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith("error: ") and "this command gives" in err
    code, out, err = command("train", "--model_path", "emu3-mini")
    assert (code, err) == (2, "error: the following arguments are required: --data_path, --output_dir\n")
