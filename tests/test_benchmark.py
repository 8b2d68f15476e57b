# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The benchmark's own sums and comparisons, and a measurement of ours in small. Nothing here looks at a clock."""

import json
import math
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import golden

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench
import compare
import costs
import counts
import equality
import measure
import operators
import ours
import prompts
import quality
import random_checkpoints
import released
import speculation
import summary
import text_model
import training
from page import Page
from peer import llama

from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQConfig


def side_of(name, pixels):
    """The side of what a convolution gives, from its name in the released checkpoint."""
    level = re.match(r"\w+\.(?:down|up)\.(\d)", name)
    level = int(level[1]) if level else 0 if name.startswith(("encoder.conv_in", "decoder.conv_out")) else 3
    return pixels >> level + (".downsample." in name) - (".upsample." in name)


@pytest.mark.parametrize("work, attentions", [("encode", 3), ("decode", 4)])
def test_operations_are_those_of_the_released_checkpoints_kernels(work, attentions):
    shapes = golden("layout-Emu3-VisionTokenizer.json")
    pixels = 64
    kernels = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(work) and len(shape) == 4 and ".conv_y." not in name and ".conv_b." not in name
    }
    # after doubling, 9 weights meet 4 different pixels
    needed = {name: 4 / 9 if ".upsample." in name else 1 for name in kernels}
    expected = sum(2 * math.prod(s) * side_of(name, pixels) ** 2 * needed[name] for name, s in kernels.items())
    expected += attentions * 4 * 1024 * (pixels // 8) ** 4  # queries by keys, weights by values
    assert counts.vision_operations(Emu3VisionVQConfig(), pixels)[work] == expected


def test_bytes_of_a_step_are_those_of_the_released_checkpoints_layers():
    shapes = golden("layout-Emu3-8B.json")
    layers = sum(math.prod(s) for n, s in shapes.items() if n not in ("model.embed_tokens.weight", "lm_head.weight"))
    config = Emu3Config()
    assert counts.layer_weights(config) == layers
    kv = 32 * 2 * 8 * 128  # layers, keys and values, key heads, their size
    assert counts.bytes_per_pass(config, tokens=10, dtype="bfloat16") == 2 * (layers + 32768 * 4096 + 2 * 10 * kv)
    assert "8.49 billion" in counts.gpu_arithmetic(config)[2]


def test_bytes_of_an_image_with_quantized_weights():
    """Less by what the weights lose: three bytes of four, or three and a half but for a scale among 128."""
    config = Emu3Config(hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=16)
    weights = counts.layer_weights(config) + 32768 * 1024
    cache = 16 * 16 * 2 * (24 / 2 + 64 / 2 + 16 * 17 / 2) * 2 * 8 * config.num_key_value_heads * 64
    passes = 16 * 16
    assert counts.image_bytes(config, 16, 16) == passes * 4 * weights + 4 * cache
    assert counts.image_bytes(config, 16, 16, "int8") == passes * weights + 2 * cache
    assert counts.image_bytes(config, 16, 16, "int4") == passes * (weights / 2 + weights / 32) + 2 * cache


def test_codes_may_differ_only_where_two_codewords_are_equally_near():
    codebook = np.float32([[0, 0], [1, 0], [5, 5]])
    latents = np.float32([[0.1, 0], [0.5, 0.3]])
    peer = np.array([[0, 0]])
    assert equality.compare_codes(np.array([[0, 0]]), peer, latents, codebook)[0]
    tie, text = equality.compare_codes(np.array([[0, 1]]), peer, latents, codebook)
    assert tie and text.startswith("1 of 2 codes equal")
    assert not equality.compare_codes(np.array([[1, 0]]), peer, latents, codebook)[0]
    assert not equality.compare_pixels(np.float32([0.0, 1.0]), np.float32([0.1, 1.0]))[0]


def test_tokens_may_differ_only_from_a_tie_on():
    peer = np.array([[4, 7], [7, 2]])
    codes = np.array([[4, 1], [7, 3], [7, 1], [2, 3]])
    logits = np.float32([[9, 8], [8, 8 - 1e-5], [9, 8], [9, 8]])
    assert equality.compare_tokens(peer, peer, codes, logits)[0]
    tie, text = equality.compare_tokens(np.array([[4, 3], [1, 1]]), peer, codes, logits)
    assert tie and text.startswith("first 1 of 4")
    assert not equality.compare_tokens(np.array([[1, 7], [7, 2]]), peer, codes, logits)[0]
    assert not equality.compare_tokens(np.array([[4, 5], [7, 2]]), peer, codes, logits)[0]


@pytest.mark.parametrize("shard_bytes", [random_checkpoints.SHARD_BYTES, 40_000_000])
def test_random_checkpoints_are_the_same_each_time_and_load(tmp_path, shard_bytes):
    from paddlemix.models.emu3 import Emu3ForCausalLM

    config = {**random_checkpoints.LANGUAGE_CONFIG, "torch_dtype": "bfloat16"}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_checkpoints.write_model(tmp_path / folder, config, seed, shard_bytes)
    a, b, c = (sorted((tmp_path / folder).glob("*.safetensors")) for folder in "abc")
    assert len(a) == (1 if shard_bytes > 40_000_000 else 2)
    for first, same, other in zip(a, b, c):
        assert first.read_bytes() == same.read_bytes() != other.read_bytes()
    written = a[0].stat().st_mtime_ns
    random_checkpoints.write_model(tmp_path / "a", config, 1, shard_bytes)  # it is there already
    assert a[0].stat().st_mtime_ns == written
    model = Emu3ForCausalLM.from_pretrained(tmp_path / "a", dtype="float32")
    assert model.config.hidden_size == 64 and model.lm_head.weight.shape == [184622, 64]


def test_random_weights_keep_the_size_of_signals():
    name, shape = "lm_head.weight", [random_checkpoints.PART // 1024 + 7, 2048]  # in several parts
    weight = random_checkpoints.random_tensor(name, "bfloat16", shape)
    assert weight.dtype == "bfloat16" and list(weight.shape) == shape
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    assert (weight == (rng.standard_normal(shape, np.float32) * np.float32(2048**-0.5)).astype("bfloat16")).all()
    norm = random_checkpoints.random_tensor("model.norm.weight", "float32", [4096])
    assert norm.mean() == pytest.approx(1, abs=0.01) and norm.std() == pytest.approx(0.1, rel=0.1)


def test_measures_and_reports(tmp_path, vision_dir):
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(inputs, pixels=np.zeros([1, 3, 32, 32], np.float32), codes=np.zeros([1, 4, 4], np.int64))
    measured = measure.vision(ours, vision_dir, inputs, outputs, warm=1)
    assert np.load(outputs)["codes"].shape == (1, 4, 4) and np.load(outputs)["pixels"].shape == (1, 3, 32, 32)
    assert len(json.loads(json.dumps(measured))["calls"]) == 2
    side = compare.times(measured["calls"], 1, "warm", "encode + decode")
    assert compare.times(measured["calls"][:1], 1, "warm", "encode") is None
    row = {"work": "decode", "when": "warm", "operations": 1e9, "ours": {**side, "seconds": 1.0}}
    limits = {"operations_per_s": {"a": 1e9, "b": 2e9}, "read_bytes_per_s": {"c": 1e9}}
    heads = compare.heads("vision")
    alone = dict(zip(heads, compare.cells(row, limits), strict=True))
    assert (alone["ours"], alone["transformers"], alone["transformers / ours"]) == ("1.00 s", "-", "-")
    row["peer"] = {"seconds": 2.0, "peak_bytes": 2 * side["peak_bytes"]}
    both = dict(zip(heads, compare.cells(row, limits), strict=True))
    assert (both["transformers / ours"], both["of theirs"]) == ("**2.00**", "50%")
    assert (both["the limit"], both["ours reaches"], both["transformers reaches"]) == ("0.50 s", "50%", "25%")
    speeds = compare.cells({**row, "bytes": 1e9, "tokens": 30}, limits)
    assert dict(zip(compare.heads("generate"), speeds, strict=True))["transformers, tokens/s"] == "15.0"


def test_a_measurement_is_a_process_of_its_own(tmp_path):
    args = SimpleNamespace(peer_python=None)
    config = random_checkpoints.VISION_CONFIG
    result = measure.call(args, "ours", "loading.write", {"EMU3_OPS": "0"}, directory=tmp_path, small=True)
    assert result["versions"]["custom operators"] == "not there" and (tmp_path / "config.json").exists()
    with pytest.raises(SystemExit, match="failed with 1"):
        measure.call(args, "ours", "loading.no_such_function", config=config)


def test_commands(monkeypatch, capsys):
    run = bench.parse(["operators", "--parts", "linear", "--no_peer"])
    assert (run.command, run.parts, run.small) == ("operators", ["linear"], False)
    assert set(bench.COMMANDS) == {"compare", "operators", "released", "quality", "prompts", "serving", "speculation",
                                   "loading", "training", "costs"}  # fmt: skip
    assert bench.parse(["prompts", "--llama_python", sys.executable]).no_llama is False
    monkeypatch.setenv("PEER_PYTHON", "/nowhere/python")
    with pytest.raises(SystemExit):
        bench.parse(["compare"])
    assert "/nowhere/python is missing" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_PYTHON", "/nowhere/llama")
    with pytest.raises(SystemExit):
        bench.parse(["prompts"])
    assert "/nowhere/llama is missing" in capsys.readouterr().err


def test_a_row_of_training_compares_the_best_steps_after_the_first():
    own = {"tokens": 100, "steps": [{"seconds": s, "loss": 2.0, "peak_bytes": 1e9} for s in (9, 2, 1)]}
    theirs = {"tokens": 100, "steps": [{"seconds": s, "loss": 2.0001, "peak_bytes": 3e9} for s in (1, 4, 4)]}
    assert training.row_of("x", 0.0, own, theirs) == [
        "x", "0", "100", "25", "**4.00**", "1.00 GB", "3.00 GB", "**3.00**"
    ]  # fmt: skip
    assert training.row_of("x", 0.1, own, None)[2:] == ["100", "-", "-", "1.00 GB", "-", "-"]
    assert training.same_losses(own, theirs)
    theirs["steps"][1]["loss"] = 2.1
    assert not training.same_losses(own, theirs)


def test_a_step_of_training_is_measured(tmp_path):
    config = Emu3Config.from_pretrained(training.MINI)
    np.savez(tmp_path / "rows.npz", **training.rows(config, 1, 64))
    result = training.train(ours, training.MINI, tmp_path / "rows.npz", 2, True, 0.0)
    first, second = (step["loss"] for step in result["steps"])
    assert result["tokens"] == 64 and second < first
    part = {"formula": {"weights": 1e9, "head": 3e9}, "base_bytes": 1e9, "peak_bytes": 3e9}
    row = ["int4, lora", "64", "1.00", "3.00", "4.00", "2.00", "0.50"]
    assert training.memory_row("int4-lora", 64, part) == row


# --- RESULTS.md ------------------------------------------------------------------------------------------


def test_results_that_were_not_measured_stay(tmp_path):
    path = tmp_path / "RESULTS.md"
    heads = ["", "call", "ours"]
    page = Page(path)
    page.put("One", heads, [["a", "warm", "1 s"], ["b", "warm", "2 s"]], "A text.", {"x": "equal: all"}, names=2)
    page.put("Two", [""], [["c"]], "")
    page.put_machine(["x", "y"], "commit 1, 2026-01-01; A, 2 cores.")
    path.write_text(page.text("# Results\n\n| of the opening |\n"))
    assert Page(path).text("# Results") == page.text("# Results")
    page = Page(path)
    page.put("One", heads, [["b", "warm", "3 s"], ["b", "first", "4 s"]], "Another.", {"z": "equal"}, names=2)
    assert page.sections["One"].splitlines()[2:] == [
        "| a | warm | 1 s |", "| b | warm | 3 s |", "| b | first | 4 s |", "", "Another.", "",
        "- x: equal: all", "- z: equal",
    ]  # fmt: skip
    assert page.cells("One")["b, first"]["ours"] == "4 s"
    page.put_machine(["y"], "commit 2.")
    assert page.sections["Machines"].splitlines() == ["- x: commit 1, 2026-01-01; A, 2 cores.", "- y: commit 2."]
    page.put("One", ["", "other columns"], [["a", "1"]], "")
    assert page.sections["One"].splitlines() == ["|  | other columns |", "|---|---|", "| a | 1 |"]
    page.put("Three", [""], [["d"]], "")
    assert re.findall("^## (.*)$", page.text(""), re.MULTILINE) == ["One", "Two", "Three", "Machines"]


def test_the_opening_is_that_of_the_tables():
    path = Path(bench.__file__).parent / "RESULTS.md"
    page = Page(path)
    opening = summary.opening(page)
    assert path.read_text() == page.text(opening)
    rows = [line.split(" | ") for line in opening.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(summary.ROWS)
    assert summary.opening(Page()).count("\n| ") == 1  # the columns' titles
    assert summary.number("981.38 ms") == pytest.approx(0.98138)
    assert summary.measured("commit 1, 2026-01-02; A B, 2 cores, avx2") == "2026-01-02, A B, 2 cores"
    assert summary.measured("") == "date not recorded, machine not recorded"


# --- what a task costs -----------------------------------------------------------------------------------


def test_the_work_of_the_released_model():
    """Products of weights and tokens, counted from the released checkpoint's layers."""
    given, shapes = costs.configs(), golden("layout-Emu3-8B.json")
    matrices = [math.prod(s) for name, s in shapes.items() if name.startswith("model.layers.") and len(s) == 2]
    length, head = costs.PROMPT + 90 * 91 + 3, 2 * 184622 * 4096
    layers = 2 * sum(matrices) * length + 32 * 4 * 4096 * length**2 / 2  # and half of two products of queries and keys
    assert costs.work("question", "int8", 90, *given) == pytest.approx(layers + head, rel=1e-4)
    assert costs.work("train", "float32", 90, *given) == pytest.approx(4 * layers + 3 * head * (length - 24), rel=1e-4)
    assert costs.work("generate", "int8", 90, *given) == counts.image_bytes(given[0], 90, 90, "int8")


def test_constants_are_those_of_two_sizes():
    assert costs.fit([1e9, 4e9], [3.0, 6.0]) == (2.0, 1e9)
    assert costs.fit([1e9, 4e9], [0.5, 6.0]) == (0.0, 5e9 / 6.5)  # no call takes less than nothing
    assert [costs.in_words(s) for s in (0.123, 9.91, 250.4, 3000)] == ["0.12 s", "9.9 s", "250 s", "50 min"]


def test_costs_of_each_task_are_measured(tmp_path, monkeypatch):
    """In small, in this process: seconds and memory, beside the model of them and in a plot."""

    def call(args, side, function, **given):
        module, _, name = function.partition(".")
        result = getattr({"costs": costs, "compare": compare}[module], name)(ours, **given)
        return {**(result or {}), "versions": {"ours": "1"}}

    monkeypatch.setattr(costs, "call", call)
    monkeypatch.setattr(costs, "SMALL", [2, 3, 4])
    monkeypatch.setattr(costs, "MOST_CALLS", 1)
    options = ["--small", "--directory", str(tmp_path), "--tasks", "decode", "generate", "train"]
    args, page = bench.parse(["costs", *options]), Page()
    parts = [part for part, _, _ in costs.run(args, page)]
    assert parts == ["decode float32", "generate float32", "generate int8", "train float32"]
    cells, released = page.cells(costs.TITLE), page.cells(costs.RELEASED)
    for part in parts:
        name = part.replace(" ", ", ")
        rows = [cells[f"{name}, {size}"] for size in (2, 3, 4)]
        assert [row["off by"] for row in rows[:2]] == ["fitted", "fitted"] and rows[2]["off by"][0] in "+-"
        assert all(float(row["peak, GB"]) > 0.1 and float(row["the formula"]) > 0.1 for row in rows)
        assert released[name]["memory, 90 codes a side"].endswith("measured" if part == "decode float32" else " GB")
    assert float(released["generate, int8"]["memory, 90 codes a side"].split()[0]) > 8.49
    assert "</svg>" in (tmp_path / costs.PLOT.name).read_text()


# --- quality and the released size -----------------------------------------------------------------------


def test_divergence_and_agreement():
    """Against the definition, spelled out."""
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(5), 7) for _ in range(2))
    expected = np.mean([sum(a * math.log(a / b) for a, b in zip(*rows)) for rows in zip(p, q)])
    same, divergence = quality.compare((q.argmax(-1), np.log(q)), (p.argmax(-1), np.log(p)))
    assert float(divergence) == pytest.approx(expected, abs=1e-5)
    assert same == f"{100 * np.mean([a.argmax() == b.argmax() for a, b in zip(p, q)]):.1f} %"


def test_real_scenes_are_read_as_they_are_drawn():
    """The prompt of a drawing, then the picture's own tokens; and at each of them what the model says next."""
    import paddle

    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    processor, model = Emu3Processor.from_pretrained("emu3-mini"), Emu3ForCausalLM.from_pretrained("emu3-mini")
    scenes = quality.held_out_scenes(5, 1)
    sequences, visual = quality.real_scenes(processor, scenes, 1), []
    for scene, (ids, start) in zip(scenes, sequences):
        assert ids[start - 1] == processor.grammar.img
        codes = processor.grammar.decode(ids[start:])
        assert codes.shape == (scene.height // 8, scene.width // 8)
        visual.append(codes.size)
    likeliest, logs = quality.next_tokens(model, processor.grammar, sequences)
    assert logs.shape == (sum(visual), processor.grammar.codebook_size) and np.allclose(np.exp(logs).sum(-1), 1)
    ids, start = sequences[0]
    with paddle.no_grad():
        logits = model(paddle.to_tensor([ids[: start + 3]])).logits[0, -1].numpy()
    first = processor.grammar.first_visual
    assert likeliest[3] == logits[first : first + processor.grammar.codebook_size].argmax()


def test_weights_of_a_gguf_file_are_ours():
    """The names are those of a released layer; a head's rows, neighbours where llama.cpp rotates them, are halves."""
    layer = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd", "output_norm", "output", *(f"blk.{i}.{part}" for i in range(32) for part in layer)]
    assert {text_model.renamed(f"{name}.weight") for name in names} == golden("layout-Emu3-8B.json").keys()
    weight = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of six rows
    expected = weight[[0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]
    assert (text_model.in_halves(weight, 2) == expected).all()


def test_text_of_the_documentation():
    markdown = "# A title\n\nA paragraph with `code`.\n\n```sh\nrun | this\n```\n| a | table |\n|---|---|\n- an item\n"
    assert text_model.prose(markdown) == "# A title\n\nA paragraph with `code`.\n\n- an item\n"
    assert text_model.prose("<p>\n![a plot](plot.svg)\n[![badge](x)](y)\n图像。\n") == "图像。\n"
    assert sum(len(text) > 4 * text_model.PIECE for text in text_model.texts()) >= 8


def test_a_text_model_is_measured(tmp_path):
    """The unpacked files as a checkpoint; its perplexity is that of the model's own loss."""
    import paddle

    from paddlemix.models.emu3 import Emu3ForCausalLM

    config = text_model.config_of({
        "llama.vocab_size": 120, "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.block_count": 1,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.rope.freq_base": 1e5, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    })  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with paddle.LazyGuard():
        shapes = {name: t.shape for name, t in Emu3ForCausalLM(Emu3Config(**config)).state_dict().items()}
    tensors = {name: random_checkpoints.random_tensor(name, "float32", shape) for name, shape in shapes.items()}
    np.savez(tmp_path / "weights.npz", **tensors)
    text_model.write_checkpoint(tmp_path)
    pieces = np.random.default_rng(0).integers(0, 120, [2, 70])
    (tmp_path / "pieces.json").write_text(json.dumps(pieces.tolist()))
    model, ids = Emu3ForCausalLM.from_pretrained(tmp_path), paddle.to_tensor(pieces)
    with paddle.no_grad():
        logits, loss = model(ids).logits.numpy(), float(model(ids, labels=ids).loss)
    np.save(tmp_path / "logits.npy", logits[0])
    found = text_model.measure(ours, tmp_path)
    assert found["tokens"] == 140 and text_model.check(**found["check"])[0]
    _, *cells = found["rows"]["float32"]
    assert cells[:2] == ["100.0 %", "0.00000"] and float(cells[2]) == pytest.approx(math.exp(loss), rel=1e-3)
    assert 0 < float(found["rows"]["int8"][2]) < float(found["rows"]["int4"][2])
    np.save(tmp_path / "logits.npy", logits[1])
    assert text_model.check(**text_model.measure(ours, tmp_path)["check"])[1].startswith("**NOT EQUAL**")


def test_bytes_of_a_quantized_pass(tmp_path):
    """Counted from the files: a byte a weight and four an output of int8, and the cache in 16 bits."""
    from conftest import write_checkpoint

    from paddlemix.models.emu3 import Emu3ForCausalLM

    model = Emu3ForCausalLM.from_pretrained(write_checkpoint(tmp_path, "language_model"), dtype="int8")
    layer = [(64, 64), (16, 64), (16, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    layers = 3 * (sum(out * (into + 4) for out, into in layer) + 2 * 4 * 64)
    assert released.pass_bytes(model, 2, 10, 128) == layers + 128 * (64 + 4) + 2 * 10 * (2 * 3 * 16 * 2)


def test_tables_of_the_released_size():
    runs = {"text-to-image": {"prompt_s": 9.0, "pass_s": 0.25, "pass_bytes": 4e9, "read_bytes_per_s": 20e9},
            "an answer": {"prompt_s": 3.0, "pass_s": 0.5, "pass_bytes": 5e9, "read_bytes_per_s": 10e9}}  # fmt: skip
    disk = {"load_s": 30.0, "load_peak_bytes": 6e9, "file_bytes": 10e9, "disk_bytes_per_s": 1e9}
    page = Page()
    asked = {"tokens": 8218, "first_word_s": 240.0}
    found = {**disk, "peak_bytes": 7e9, "runs": runs, "question": asked}
    released.put(page, "int4", [16, 31], [90, 90], found, {**disk, "load_s": 12.0})
    assert "| int4 | 8,218 tokens | 240 s | 34 |" in page.sections[released.QUESTION_TITLE]
    lines = page.text("").splitlines()
    assert "| int4 | 30 s | 10 s | 12 s | 10 s | 6.00 GB | 7.00 GB |" in lines
    row = "| int4, text-to-image | 9.0 s | 0.250 s | 4.00 | 4.00 GB | 20.0 GB/s | 0.200 s | 80% | 7.00 GB |"
    assert row in lines
    row = "| int4, an answer | 3.0 s | 0.500 s | 2.00 | 5.00 GB | 10.0 GB/s | 0.500 s | 100% | 7.00 GB |"
    assert row in lines


def test_time_of_reading_is_not_that_of_passes(tmp_path, monkeypatch):
    from conftest import write_checkpoint

    from paddlemix.models.emu3 import Emu3ForCausalLM

    now = [0.0]
    monkeypatch.setattr(released.time, "perf_counter", lambda: now[0])

    def read(parts, function, repeats):
        now[0] += 7.0
        return sum(function(part).nbytes * part.size for part in parts) / 2.0

    monkeypatch.setattr(released, "read_rate", read)
    model = Emu3ForCausalLM.from_pretrained(write_checkpoint(tmp_path, "language_model"), dtype="int8")
    clock = released.Clock(model)
    for _ in range(40):
        now[0] += 1.0 if len(clock.times) > 1 else 5.0
        clock(None)
    embedding = 2 * math.prod(model.model.embed_tokens.weight.shape)
    assert clock.result(40) == {"prompt_s": 5.0, "pass_s": 1.0, "read_bytes_per_s": embedding / 2}
    assert now[0] == 5.0 + 39.0 + 3 * 7.0


# --- beside llama.cpp ------------------------------------------------------------------------------------


def test_prompts_and_steps_of_ours_are_measured(tmp_path, monkeypatch):
    """The logits that are compared with llama.cpp's are those of a plain forward pass."""
    import paddle
    from conftest import write_checkpoint

    from paddlemix.models.emu3 import Emu3ForCausalLM

    few = {count: [(7 * i) % 100 for i in range(count)] for count in range(800)}
    monkeypatch.setattr(prompts, "tokens", few.get)
    directory, output = write_checkpoint(tmp_path, "language_model"), tmp_path / "logits.npy"
    found = prompts.measure(ours, directory, "float32", [520, 600], [1, 2], output)["modes"][""]
    assert {kind: sorted(times) for kind, times in found.items()} == {"prompts": [520, 600], "steps": [1, 2]}
    model, fed = Emu3ForCausalLM.from_pretrained(directory, dtype="float32"), few[2 * (1 + prompts.STEPS)]
    rows = [few[520], *(few[prompts.SHORT_PROMPT] + fed[row::2] for row in range(2))]
    with paddle.no_grad():
        expected = [model(paddle.to_tensor([row]), logits_to_keep=1).logits[0, 0].numpy() for row in rows]
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-4, atol=1e-5)


def test_llama_rotates_neighbours_as_ours_rotates_halves():
    rng = np.random.default_rng(0)
    heads, dim, size, angles = 3, 8, 5, rng.standard_normal(4)
    weight, x = rng.standard_normal([heads * dim, size]), rng.standard_normal(size)
    a, b = (weight @ x).reshape(heads, 2, dim // 2).swapaxes(0, 1)
    ours_ = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    a, b = (llama.interleaved(weight, heads) @ x).reshape(heads, dim // 2, 2).transpose(2, 0, 1)
    theirs = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    np.testing.assert_allclose(ours_, theirs)


def test_llama_finds_each_tensor(tmp_path):
    from paddlemix.models.emu3.safetensors_file import write_safetensors

    names = {llama.renamed(name) for name in golden("layout-Emu3-8B.json")}
    layer = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    layers = {f"blk.{i}.{part}.weight" for i in range(32) for part in layer}
    assert names == {"token_embd.weight", "output_norm.weight", "output.weight", *layers}
    layout = {"a": ("bfloat16", [3, 4]), "b": ("bfloat16", [5])}
    written = {name: random_checkpoints.random_tensor(name, *how) for name, how in layout.items()}
    write_safetensors(tmp_path / "model.safetensors", layout, written.get)
    read = dict(llama.read_bfloat16(tmp_path / "model.safetensors"))
    assert read.keys() == written.keys()
    assert all((read[name] == tensor.view(np.uint16)).all() for name, tensor in written.items())


def test_the_table_beside_llama(tmp_path, monkeypatch):
    """The best of rounds and modes on both sides; a wrong model fails, and is named."""
    seconds, logits = {"ours": [3.0, 2.0], prompts.LLAMA: [5.0, 4.0]}, np.random.default_rng(0).random([2, 50])

    def call(args, side, function, output=None, **given):
        if function != "prompts.measure":
            return None
        np.save(output, logits if side == "ours" else 3 * logits)
        times = {"prompts": {"20": seconds[side][0]}, "steps": {"2": 1.0}}
        modes = {"a": times, "b": {"prompts": {"20": seconds[side].pop()}, "steps": {"2": 0.5}}}
        return {"modes": modes, "versions": {side: "1"}}

    monkeypatch.setattr(prompts, "call", call)
    options = ["--llama_python", sys.executable, "--dtypes", "int4"]
    args, page = bench.parse(["prompts", "--small", "--directory", str(tmp_path), *options]), Page()
    assert [(part, equal) for part, equal, _ in prompts.run(args, page)] == [("int4", True)]
    body = page.sections[prompts.TITLE].splitlines()
    assert "| a prompt of 20 tokens | int4, Q4_0 | 10.0 | 5.0 | **2.00** | b |" in body
    assert "| decoding, rows: 2 | int4, Q4_0 | 4.0 | 4.0 | **1.00** | b |" in body
    assert "- prompts int4: equal: logits correlate by 1.0000 or more; 2 of 2 greedy tokens same" in body
    assert "</svg>" in (tmp_path / "prompts.svg").read_text()
    assert prompts.compare_logits(logits, logits[::-1], 0.9)[1].startswith("**NOT EQUAL**")
    assert prompts.lines("int8", {"ours": [{"modes": {"": {"prompts": {"8": 2.0}, "steps": {}}}}]}) == [
        ["a prompt of 8 tokens", "int8, Q8_0", "4.0", "-", "-", "-"]
    ]


# --- speculation -----------------------------------------------------------------------------------------


def test_guesses_that_are_measured_draw_the_same_pictures(language_model):
    from guesses import GUESSES
    from test_generation import GRAMMAR, NEGATIVE, PROMPTS

    requests = [(PROMPTS[0], (3, 5), GRAMMAR, NEGATIVE[0]), (PROMPTS[1], (4, 3), GRAMMAR, NEGATIVE[1])]
    expected = speculation.draw(language_model, requests, 3.0, 1.0)
    assert [passes for _, passes in expected] == [3 * 5, 4 * 3]
    for guess in GUESSES:
        for window in (1, 6):
            for (codes, passes), (other, most) in zip(
                speculation.draw(language_model, requests, 3.0, 1.0, guess, window), expected, strict=True
            ):
                np.testing.assert_array_equal(codes, other)
                assert passes <= most
    codes = [codes for codes, _ in expected]
    entropy, *shares = speculation.early_exits(language_model, requests, codes, 3.0, 1.0)
    assert len(shares) == len(language_model.model.layers) and shares[-1] == "100%"
    assert 0 < float(entropy.split()[0]) <= 8  # of 256 tokens


def test_the_row_of_costs():
    assert speculation.cost_row("int8", {"2": 0.02, "4": 0.03}) == ["int8", "20 ms, 1.00", "30 ms, 1.50"]


# --- the operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", operators.PARTS)
def test_operators_are_measured_and_compared(part):
    """Every side has its cases, and ours is right with the operators or without."""
    sides = {side: operators.measure(part, side, operators.SMALL, 0)
             for side in operators.PARTS[part].sides if side != "torch"}  # fmt: skip
    for case, values in sides["ours"].items():
        assert operators.equal(values), case
    for side, cases in sides.items():
        expected = [case for case in sides["ours"] if part == "attention" or side != "paddle" or "float32" in case]
        assert list(cases) == expected and all(values["seconds"] > 0 for values in cases.values())
    rounds = {case: {s: [cases[case]] for s, cases in sides.items() if case in cases} for case in sides["ours"]}
    lines = operators.lines(part, {case: operators.medians(r) for case, r in rounds.items()})
    assert len(lines) == 1 + len(rounds) and len({len(line) for line in lines}) == 1


def test_a_wrong_result_of_an_operator_is_seen(monkeypatch):
    from paddlemix.external_ops import few_rows_linear as module

    right = module.few_rows_linear
    monkeypatch.setattr(module, "few_rows_linear", lambda x, *weight: right(x, *weight) * 1.03)
    cases = operators.measure("linear", "ours", operators.SMALL, 0)
    assert not any(operators.equal(values) for values in cases.values())
    codes, latents = np.array([1, 1]), np.array([[0.0, 1.0], [3.0, 0.0]])
    assert operators.excess(codes[1:], latents[1:], latents) == 0
    assert operators.excess(codes, latents, latents) == 1.0  # the first is as far as they can be
    assert not operators.equal({"error": math.nan})


def test_sums_of_the_operators_table():
    sides = {"ours": [0.004, 0.002, 0.003], "paddle": [0.009, 0.012, 0.03], "torch": [0.02]}
    few = {
        side: [{"seconds": s, "bytes": 60_000_000, "error": s * 1e-3, "share": 0.0024 / s} for s in times]
        for side, times in sides.items()
    }
    case = operators.medians(few)
    assert case == {"seconds": {"ours": 0.003, "paddle": 0.012, "torch": 0.02}, "bytes": 60_000_000, "error": 4e-6,
                    "share": pytest.approx(0.8)}  # fmt: skip
    quantized = {"seconds": {"ours": 0.001}, "bytes": 16_000_000, "error": 0.0, "share": 0.64}
    cases = {"up [2, 3] | float32 | 2": case, "up [2, 3] | int8 | 2": quantized}
    _, *rows = operators.lines("linear", cases)
    assert rows[0][1:] == [
        "float32",
        "2",
        "3.00 ms",
        "20.0",
        "80%",
        "12.00 ms",
        "**4.00**",
        "20.00 ms",
        "**6.67**",
        "4e-06",
    ]
    assert rows[1][1:] == [
        "int8",
        "2",
        "1.00 ms",
        "16.0",
        "64%",
        "12.00 ms",
        "**12.00**",
        "20.00 ms",
        "**20.00**",
        "0e+00",
    ]
    many = {"seconds": {"ours": 2.0, "paddle": 3.0}, "operations": 3e11, "error": 0.0}
    _, row = operators.lines("blocked", {"up [2, 3] | float32 | 512": many})
    assert row[3:6] == ["2.00 s, 150 GFLOP/s", "3.00 s, 100 GFLOP/s", "**1.50**"]
    page = Page()
    operators.put(page, "linear", {**cases, "up [2, 3] | int4 | 2": {**quantized, "error": 1e-3}}, rounds=3)
    assert list(page.sections) == [operators.title("linear")]
    assert "- few rows: **NOT EQUAL**: up [2, 3], int4, 2; rounds: 3" in page.text("").splitlines()


def test_calls_take_turns_over_copies(monkeypatch):
    import paddle

    seen = []
    monkeypatch.setattr(operators, "timed", lambda call: (1.0 + call(), None))
    assert operators.median_seconds([lambda i=i: seen.append(i) or i for i in range(3)], 6) == 2
    assert seen == [2, 0, 1, 2]
    turns = operators.copies(SimpleNamespace(rotated=1000), [paddle.ones([5, 10]), None])  # of 200 bytes
    assert [(weight.tolist(), scale) for weight, scale in turns] == 5 * [([10 * [1.0]] * 5, None)]
    assert len({weight.data_ptr() for weight, _ in turns}) == 5
