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
import ours
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
    assert report.bytes_per_pass(config, tokens=10, itemsize=2) == 2 * (layers + 32768 * 4096 + 2 * 10 * kv)
    assert "8.49 billion" in report.gpu_arithmetic(config)


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
