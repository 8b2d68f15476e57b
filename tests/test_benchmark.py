# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The benchmark's own sums and comparisons, and a measurement of ours in small. Nothing here looks at a clock."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import golden

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench
import measure
import operators
import ours
import quality
import released
import report

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
    assert report.vision_operations(Emu3VisionVQConfig(), pixels)[work] == expected


def test_bytes_of_a_step_are_those_of_the_released_checkpoints_layers():
    shapes = golden("layout-Emu3-8B.json")
    layers = sum(math.prod(s) for n, s in shapes.items() if n not in ("model.embed_tokens.weight", "lm_head.weight"))
    config = Emu3Config()
    assert report.layer_weights(config) == layers
    kv = 32 * 2 * 8 * 128  # layers, keys and values, key heads, their size
    assert report.bytes_per_pass(config, tokens=10, dtype="bfloat16") == 2 * (layers + 32768 * 4096 + 2 * 10 * kv)
    assert "8.49 billion" in report.gpu_arithmetic(config)


def test_bytes_of_a_picture_in_fewer_bits():
    """Less by what the weights lose: three bytes of four, or three and a half but for a scale among 128."""
    config = Emu3Config(hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=16)
    weights = report.layer_weights(config) + 32768 * 1024
    cache = 16 * 16 * 2 * (24 / 2 + 64 / 2 + 16 * 17 / 2) * 2 * 8 * config.num_key_value_heads * 64
    passes = 16 * 16
    assert report.drawing_bytes(config, 16, 16) == passes * 4 * weights + 4 * cache
    assert report.drawing_bytes(config, 16, 16, "int8") == passes * weights + 2 * cache
    assert report.drawing_bytes(config, 16, 16, "int4") == passes * (weights / 2 + weights / 32) + 2 * cache


def test_parts_are_named():
    assert report.name_of("draw-16", "draw") == "16 x 16 tokens"
    assert report.name_of("draw-16-int8", "draw") == "16 x 16 tokens, int8"


def test_codes_may_differ_only_where_two_codewords_are_equally_near():
    codebook = np.float32([[0, 0], [1, 0], [5, 5]])
    latents = np.float32([[0.1, 0], [0.5, 0.3]])
    peer = np.array([[0, 0]])
    assert bench.compare_codes(np.array([[0, 0]]), peer, latents, codebook)[0]
    tie, text = bench.compare_codes(np.array([[0, 1]]), peer, latents, codebook)
    assert tie and text.startswith("1 of 2 codes equal")
    assert not bench.compare_codes(np.array([[1, 0]]), peer, latents, codebook)[0]
    assert not bench.compare_pixels(np.float32([0.0, 1.0]), np.float32([0.1, 1.0]))[0]


def test_tokens_may_differ_only_from_a_tie_on():
    peer = np.array([[4, 7], [7, 2]])
    codes = np.array([[4, 1], [7, 3], [7, 1], [2, 3]])
    logits = np.float32([[9, 8], [8, 8 - 1e-5], [9, 8], [9, 8]])
    assert bench.compare_tokens(peer, peer, codes, logits)[0]
    tie, text = bench.compare_tokens(np.array([[4, 3], [1, 1]]), peer, codes, logits)
    assert tie and text.startswith("first 1 of 4")
    assert not bench.compare_tokens(np.array([[1, 7], [7, 2]]), peer, codes, logits)[0]
    assert not bench.compare_tokens(np.array([[4, 5], [7, 2]]), peer, codes, logits)[0]


def test_random_checkpoints_are_the_same_each_time_and_load(tmp_path, vision_model):
    shapes = {name: t.shape for name, t in vision_model.state_dict().items()}
    for folder in ("a", "b"):
        assert ours.write_checkpoint(tmp_path / folder, vision_model) == tmp_path / folder
    assert ours.write_checkpoint(tmp_path / "a", vision_model) is None
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded = type(vision_model).from_pretrained(tmp_path / "a")
    assert {name: t.shape for name, t in loaded.state_dict().items()} == shapes


def test_measures_and_reports(tmp_path, vision_dir):
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, pixels=np.zeros([1, 3, 32, 32], np.float32), codes=np.zeros([1, 4, 4], np.int64))
    args = SimpleNamespace(checkpoint=vision_dir, inputs=inputs, warm=1)
    measured, outputs = measure.vision(ours, args)
    assert outputs["codes"].shape == (1, 4, 4) and outputs["pixels"].shape == (1, 3, 32, 32)
    assert len(json.loads(json.dumps(measured))["calls"]) == 2
    side = bench.times(measured["calls"], 1, "warm", "encode + decode")
    row = {"work": "decode", "when": "warm", "operations": 1e9, "ours": side}
    result = {
        "rows": [{**row, "peer": {"seconds": 2 * side["seconds"], "peak_bytes": 2 * side["peak_bytes"]}}, row],
        "equal": True, "checks": ["all equal"], "versions": {"paddlepaddle": "3"}, "machine": bench.machine(1),
        "limits": {"operations_per_s": {"a": 1e9, "b": 2e9}, "read_bytes_per_s": {"c": 1e9}},
    }  # fmt: skip
    text = report.report({"vision-128": result})
    assert "| **2.00** |" in text and "| 50% | 0.50 s |" in text and "128 x 128 pixels, decode" in text
    assert "GPU: not run" in text
    assert bench.times(measured["calls"][:1], 1, "warm", "encode") is None


def test_sections_of_other_programs_stay(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nintroduction\n\n## One\n\nold\n\n### deeper\n\n## Two\n\n| a |\n")
    report.put_section(page, "One", "new\n")
    report.put_section(page, "Three", "\nthird")
    assert page.read_text() == "# Results\n\nintroduction\n\n## One\n\nnew\n\n## Two\n\n| a |\n\n## Three\n\nthird\n"
    report.put_section(tmp_path / "new.md", "One", "1")
    assert (tmp_path / "new.md").read_text() == f"{report.INTRODUCTION}\n## One\n\n1\n"


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


def test_bytes_of_a_quantized_pass(tmp_path):
    """Counted from the files: a byte a weight and four an output of int8, and the cache in 16 bits."""
    from conftest import write_checkpoint

    from paddlemix.models.emu3 import Emu3ForCausalLM

    model = Emu3ForCausalLM.from_pretrained(write_checkpoint(tmp_path, "language_model"), dtype="int8")
    layer = [(64, 64), (16, 64), (16, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    layers = 3 * (sum(out * (into + 4) for out, into in layer) + 2 * 4 * 64)
    assert released.pass_bytes(model, 2, 10, 128) == layers + 128 * (64 + 4) + 2 * 10 * (2 * 3 * 16 * 2)


def test_tables_of_the_released_size():
    runs = {"a picture": {"prompt_s": 9.0, "pass_s": 0.25, "pass_bytes": 4e9, "read_bytes_per_s": 20e9},
            "an answer": {"prompt_s": 3.0, "pass_s": 0.5, "pass_bytes": 5e9, "read_bytes_per_s": 10e9}}  # fmt: skip
    disk = {"load_s": 30.0, "load_peak_bytes": 6e9, "file_bytes": 10e9, "disk_bytes_per_s": 1e9}
    row = {"dtype": "int4", **disk, "peak_bytes": 7e9, "runs": runs, "again": disk}
    lines = released.section([16, 31], [row]).splitlines()
    assert "| int4 | 30 s (10 s) | 30 s (10 s) | 6.00 GB | 7.00 GB |" in lines
    assert "| int4, a picture | 9.0 s | 0.250 s | 4.00 | 4.00 GB | 20.0 GB/s | 0.200 s | 80% |" in lines
    assert "| int4, an answer | 3.0 s | 0.500 s | 2.00 | 5.00 GB | 10.0 GB/s | 0.500 s | 100% |" in lines


def test_time_of_reading_is_not_that_of_passes(tmp_path, monkeypatch):
    from conftest import write_checkpoint

    from paddlemix.models.emu3 import Emu3ForCausalLM

    now = [0.0]
    monkeypatch.setattr(released.time, "perf_counter", lambda: now[0])

    def read(size, function, repeats):
        function()
        now[0] += 7.0
        return size / 2.0

    monkeypatch.setattr(released, "best_rate", read)
    model = Emu3ForCausalLM.from_pretrained(write_checkpoint(tmp_path, "language_model"), dtype="int8")
    clock = released.Clock(model)
    for _ in range(40):
        now[0] += 1.0 if len(clock.times) > 1 else 5.0
        clock(None)
    embedding = 2 * math.prod(model.model.embed_tokens.weight.shape)
    assert clock.result(40) == {"prompt_s": 5.0, "pass_s": 1.0, "read_bytes_per_s": embedding / 2}
    assert now[0] == 5.0 + 39.0 + 3 * 7.0


def test_random_weights_of_the_released_size():
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(4 * released.PART, dtype=np.float32)
    weight = released.random_tensor(rng, pool, "lm_head.weight", [released.PART // 1024 + 7, 2048])
    assert weight.dtype == "bfloat16" and weight.shape == ((released.PART // 1024 + 7) * 2048,)
    assert float(weight.astype(np.float32).std()) == pytest.approx(2048**-0.5, rel=0.25)
    assert (released.random_tensor(rng, pool, "model.norm.weight", [4]) == 1).all()


@pytest.mark.parametrize("part", operators.PARTS)
def test_operators_are_measured_and_compared(part):
    """Every side has its cases, and ours is right with the operators or without."""
    sides = {side: operators.measure(part, side, operators.SMALL, 0)
             for side in operators.PARTS[part].sides if side != "torch"}  # fmt: skip
    for case, values in sides["ours"].items():
        assert values["error"] < operators.LARGEST_ERROR, case
    for side, cases in sides.items():
        expected = [case for case in sides["ours"] if part == "attention" or side != "paddle" or "float32" in case]
        assert list(cases) == expected and all(values["seconds"] > 0 for values in cases.values())
    rounds = {case: {s: [cases[case]] for s, cases in sides.items() if case in cases} for case in sides["ours"]}
    result = {"cases": {case: operators.medians(r) for case, r in rounds.items()}, "read_bytes_per_s": {"sum": 1e10}}
    lines = operators.table(part, result).splitlines()
    assert len(lines) == 2 + len(rounds) and len({line.count("|") for line in lines}) == 1


def test_a_wrong_result_of_an_operator_is_seen(monkeypatch):
    from paddlemix.external_ops import few_rows_linear as module

    right = module.few_rows_linear
    monkeypatch.setattr(module, "few_rows_linear", lambda x, *weight: right(x, *weight) * 1.0001)
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
    text = operators.table("linear", {"cases": cases, "read_bytes_per_s": {"a": 2e10, "b": 2.5e10}})
    assert "| float32 | 2 | 3.00 ms | 20.0 | 80% | 12.00 ms | **4.00** | 20.00 ms | **6.67** | 4e-06 |" in text
    assert "| int8 | 2 | 1.00 ms | 16.0 | 64% | 12.00 ms | **12.00** | 20.00 ms | **20.00** | 0e+00 |" in text
    many = {"seconds": {"ours": 2.0, "paddle": 3.0}, "operations": 3e11, "error": 0.0}
    text = operators.table("blocked", {"cases": {"up [2, 3] | float32 | 512": many}, "read_bytes_per_s": {"a": 1}})
    assert "| 2.00 s, 150 GFLOP/s | 3.00 s, 100 GFLOP/s | **1.50** |" in text
    wrong = {"cases": {**cases, "up [2, 3] | int4 | 2": {**quantized, "error": 1e-3}}, "rounds": 3, "versions": {}}
    wrong.update(machine=bench.machine(1), read_bytes_per_s={"a": 1e10})
    text = operators.section({"linear": wrong})
    assert "**NOT EQUAL**: up [2, 3], int4, 2;" in text and "### Few rows" in text and "### Many rows" not in text


def test_parts_that_were_not_measured_stay():
    def measured(seconds, part="blocked"):
        name, values = ("up [2, 3] | float32 | 512", {"operations": 1e9}) if part == "blocked" else ("norm", {})
        case = {"seconds": dict.fromkeys(operators.PARTS[part].sides, seconds), "error": 0.0, **values}
        found = {"cases": {name: case}, "rounds": 3, "versions": {}, "machine": bench.machine(1)}
        return {part: {**found, "read_bytes_per_s": {"a": 1e10}}}

    both = operators.section({**measured(2.0), **measured(3.0, "others")})
    for part, seconds in (("blocked", 2.0), ("others", 3.0)):
        assert operators.section(measured(seconds, part), both) == both
    assert operators.section(measured(4.0), both) == both.replace("2.00 s, 0", "4.00 s, 0")
    assert "Norm and codebook" not in operators.section(measured(2.0))


def test_calls_take_turns_over_copies(monkeypatch):
    import paddle

    seen = []
    monkeypatch.setattr(operators, "timed", lambda call: (1.0 + call(), None))
    assert operators.median_seconds([lambda i=i: seen.append(i) or i for i in range(3)], 6) == 2
    assert seen == [2, 0, 1, 2]
    turns = operators.copies(SimpleNamespace(rotated=1000), [paddle.ones([5, 10]), None])  # of 200 bytes
    assert [(weight.tolist(), scale) for weight, scale in turns] == 5 * [([10 * [1.0]] * 5, None)]
    assert len({weight.data_ptr() for weight, _ in turns}) == 5
