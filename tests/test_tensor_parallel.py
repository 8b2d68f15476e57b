# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tensor parallel: what each process reads, and two real processes that draw and answer as one does."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import EXAMPLES, relative_error
from PIL import Image
from tensor_parallel_script import ASK, DRAW, load, logits_of, models, tokens_of

from paddlemix.models.emu3 import Batch, Emu3Config, Emu3ForCausalLM
from paddlemix.models.emu3.adapter import Adapter, LoraConfig
from paddlemix.models.emu3.linear import SplitHead
from paddlemix.utils import InputError

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"
# activations stay float32: where a processor rounds them to 8 or 16 bits, a last bit may become a step of these
PLAIN = {"EMU3_OPS_SIMD": "plain", "OMP_NUM_THREADS": "1"}
BYTES = 15_457_152  # of the tensors of Emu3-Mini's file


def launch(folder, program, *arguments):
    """Two processes by Paddle's launcher; what they print goes into `folder`."""
    command = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", folder, program, *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}
    environment |= {**PLAIN, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip


def one_of(rank, count):
    """What a layer asks of its Ranks before anything is computed."""
    return SimpleNamespace(rank=rank, count=count)


def whole(weights, axis):
    return np.concatenate([weight.numpy() for weight in weights], axis=axis)


# --- what is read


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of a layer whose rows are divided, and of one whose columns are."""
    random, config, pairs = np.random.default_rng(0), LoraConfig(rank=2, target_modules=["q_proj", "down_proj"]), {}
    for name, outputs, inputs in (("self_attn.q_proj", 192, 192), ("mlp.down_proj", 192, 576)):
        a, b = random.normal(size=[2, inputs]), random.normal(size=[outputs, 2])
        pairs[f"model.layers.1.{name}"] = a.astype(np.float32), b.astype(np.float32)
    directory = tmp_path_factory.mktemp("adapter")
    Adapter(config, pairs).write(directory)
    return directory


@pytest.mark.parametrize("is_saved", [False, True], ids=["from floats", "as in the files"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_the_parts_are_those_of_the_whole(dtype, is_saved, adapter, tmp_path):
    """Weights, quantized ones with their scales, and an adapter merged or beside them, have the bits of one process."""
    name, dtypes = "emu3-mini", {"dtype": dtype}
    if is_saved:
        name, dtypes = tmp_path, {}
        Emu3ForCausalLM.from_pretrained("emu3-mini", dtype=dtype).save_pretrained(name)
    one = Emu3ForCausalLM.from_pretrained(name, **dtypes, lora_path=adapter)
    parts = [Emu3ForCausalLM.from_pretrained(name, **dtypes, lora_path=adapter, ranks=one_of(i, 2)) for i in range(2)]
    of_one, of_parts = one.state_dict(), [part.state_dict() for part in parts]
    assert is_saved and dtype != "float32" or not any("lora" in name for name in of_one)
    assert of_one.keys() == of_parts[0].keys()
    first = one.config.eoi_token_id + 1
    for name, weight in of_one.items():
        both, weight = [state[name] for state in of_parts], weight.numpy()
        if "lm_head" in name:  # texts' rows, then visual ones, half of each in both
            text, visual = first // 2, (len(weight) - first) // 2
            for i, mine in enumerate(both):
                own = weight[i * text : (i + 1) * text], weight[first + i * visual : first + (i + 1) * visual]
                np.testing.assert_array_equal(mine.numpy(), np.concatenate(own))
        elif re.search(r"([qkv]|gate|up)_proj\.(weight|lora_B)", name):
            np.testing.assert_array_equal(whole(both, 0), weight)
        elif re.search(r"embed|(o|down)_proj\.(weight|lora_A)$", name) or dtype + name[-12:] == "int4weight_scale":
            np.testing.assert_array_equal(whole(both, 1), weight)
        else:  # norms, the scale of int8, which is of the whole row, and what an adapter does not divide
            for mine in both:
                np.testing.assert_array_equal(mine.numpy(), weight)
    if dtype == "float32" and not is_saved:
        assert sum(part.bytes_read for part in parts) < 1.001 * BYTES
        assert all(0.45 < part.bytes_read / BYTES < 0.55 for part in parts)


def test_a_key_head_stays_with_its_queries():
    """Three key heads in two processes: two and one."""
    parts = [Emu3ForCausalLM.from_pretrained("emu3-mini", ranks=one_of(i, 2)) for i in range(2)]
    attention = [part.model.layers[0].self_attn for part in parts]
    assert [a.k_proj.weight.shape[0] for a in attention] == [64, 32]
    assert [a.q_proj.weight.shape[0] for a in attention] == [128, 64] == [a.o_proj.weight.shape[1] for a in attention]


@pytest.mark.parametrize(("count", "vocab"), [(2, 22), (4, 25), (4, 23), (8, 19)])
def test_the_head_gathers_all_logits(count, vocab):
    config = Emu3Config(
        vocab_size=vocab, hidden_size=4, num_attention_heads=1, num_key_value_heads=1,
        **{f"{role}_token_id": i for i, role in enumerate(["bos", "eos", "pad", "img", "boi", "eol", "eof", "eoi"])},
    )  # fmt: skip
    weight, x = paddle.arange(vocab * 4.0).reshape([vocab, 4]), paddle.to_tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]])
    right, sent = paddle.matmul(x, weight, transpose_y=True).numpy(), []

    def gather(rank, x):
        sent[rank : rank + 1] = [x]
        return sent if len(sent) == count else [x] * count

    heads = []
    for rank in range(count):
        ranks = SimpleNamespace(rank=rank, count=count, gather_tensors=lambda x, rank=rank: gather(rank, x))
        heads.append(SplitHead(config, ranks))
        own = np.concatenate([np.arange(rows.start, rows.stop) for rows in heads[-1].rows])
        heads[-1].weight.set_value(weight.index_select(paddle.to_tensor(own)))
    for rows in (None, slice(8, vocab), slice(0, 8), slice(3, 12)):
        sent.clear()
        for head in heads:
            found = head(x, rows)
        np.testing.assert_array_equal(found.numpy(), right[:, rows or slice(None)])


# --- what cannot be


def test_refusals(command, language_dir):
    with pytest.raises(InputError, match=r"3 cannot be divided among 4 processes: take 3 or fewer"):
        Emu3ForCausalLM.from_pretrained("emu3-mini", ranks=one_of(0, 4))
    with pytest.raises(InputError, match=r"int4 has a scale for each 128 inputs, and 2 processes would divide those"):
        Emu3ForCausalLM.from_pretrained(language_dir, dtype="int4", ranks=one_of(1, 2))
    for verb in ("generate", "understand", "serve"):
        code, out, err = command(verb, "--model_path=emu3-mini", "--tensor_parallel")
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert "--tensor_parallel is for several processes" in err and "paddle.distributed.launch" in err
    code, _, err = command("serve", "--model_path=emu3-mini", "--tensor_parallel", "--ray")
    assert code == 2 and "--ray do not go together" in err


# --- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory, language_dir):
    folder = tmp_path_factory.mktemp("two")
    job = launch(folder / "logs", Path(__file__).with_name("tensor_parallel_script.py"), folder, language_dir, SCENE)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    return folder


@pytest.mark.long
@pytest.mark.parametrize("result", models(None))
def test_two_processes_pick_the_tokens_of_one(two, language_dir, result, monkeypatch):
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    model = load(*models(language_dir)[result])
    assert relative_error(np.load(two / f"{result}.npy"), logits_of(model)) < 2e-6  # halves are rounded before the sum
    found = json.loads((two / f"{result}.json").read_text())
    assert found["tokens"] == tokens_of(model, Batch(model))
    assert all(one["bytes_read"] < 0.6 * model.bytes_read for one in found["used"])


@pytest.mark.long
def test_the_commands_of_two_processes_give_the_results_of_one(two, command, tmp_path):
    code, out, _ = command("generate", *DRAW, "--output_dir", tmp_path)
    with Image.open(tmp_path / "result_0.png") as one, Image.open(two / "result_0.png") as both:
        assert code == 0 and one.text == both.text
        np.testing.assert_array_equal(np.array(one), np.array(both))
    code, answer, _ = command("understand", *ASK, SCENE)
    log = (two / "logs" / "workerlog.0").read_text()
    assert code == 0 and answer.strip() and answer in log and "2 processes read 8.0, 7.5 MB of weights" in log
    assert "wrote" not in (two / "logs" / "workerlog.1").read_text()  # the first one alone prints and writes
    assert len(list(two.glob("*.png"))) == 1
    for name in ("draw.stats", "ask.stats"):
        processes = json.loads((two / name).read_text())["processes"]
        assert [one["rank"] for one in processes] == [0, 1]
        assert all(one["bytes_read"] < 0.55 * BYTES and one["peak_memory_mb"] > 0 for one in processes)


def ask(port, path, **body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


@pytest.mark.long
def test_a_server_of_two_processes(two, tmp_path):
    """Requests join and leave; a process that dies ends the other one with a line."""
    arguments = "--model_path=emu3-mini", "--dtype=float32", "--device=cpu", "--port=0", "--tensor_parallel"
    job = launch(tmp_path, EXAMPLES / "serve.py", *arguments)
    log = tmp_path / "workerlog.0"
    for _ in range(1200):
        if found := re.search(r"listening on \S+:(\d+)", log.read_text() if log.exists() else ""):
            break
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    port, prompt = int(found[1]), {"prompt": "a small red ring", "seed": 3, "size": "32x32"}
    with contextlib.suppress(urllib.error.URLError, TimeoutError):  # somebody who does not wait
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/images/generations", b"{}", timeout=0.1)
    chat = ask(port, "chat/completions", model="emu3-mini", messages=[{"role": "user", "content": "hello"}])
    assert chat["choices"][0]["message"]["content"]
    picture = base64.b64decode(ask(port, "images/generations", **prompt)["data"][0]["b64_json"])
    with Image.open(io.BytesIO(picture)) as one, Image.open(two / "result_0.png") as other:
        np.testing.assert_array_equal(np.array(one), np.array(other))
    second = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "serve.py"], capture_output=True, text=True, check=True)
    os.kill(int(second.stdout.split()[-1]), signal.SIGKILL)
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        ask(port, "images/generations", **prompt)
    out, _ = job.communicate(timeout=60)
    line = "error: one of the 2 processes has ended" in out or "Container rank 1 status failed" in out
    assert job.returncode and line and "Traceback" not in out, out
