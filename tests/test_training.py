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
from paddlemix.training.datasets import Example, collate, make_row
from paddlemix.training.loss import next_token_loss
from paddlemix.training.optimizer import AdamW, cosine_with_min_lr
from paddlemix.training.ranks import Ranks
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


@pytest.mark.parametrize("name", ["unclipped", "clipped"])
@pytest.mark.parametrize("recompute", [False, True])
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
            part.backward()
            loss += float(part)
        if step == 0:
            assert loss == pytest.approx(float(kept["loss"]), rel=1e-5)
            for weight, norm, elements, at in zip(
                weights.values(), kept["gradient_norms"], kept["gradient"], places, strict=True
            ):
                gradient = weight.grad.numpy().ravel()
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
