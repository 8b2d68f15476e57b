# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fixtures that several test files use."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = Path(__file__).parents[1] / "paddlemix" / "examples" / "emu3"
sys.path[:0] = [str(GOLDEN), str(Path(__file__).parents[1] / "tools")]

import random_checkpoints
import recipe

# tests/test_fuzz.py: "short" is part of `make test`, the same inputs each time; "long" is a round of `make fuzz`
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
settings.register_profile(
    "short", max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=SLOW
)
settings.register_profile(
    "long", max_examples=300, derandomize=False, print_blob=True, deadline=None, suppress_health_check=SLOW
)
settings.load_profile("short")

MODELS = {  # golden name: (tag of its weights, model_type)
    "vision_tokenizer": ("public-vq", "Emu3VisionVQ"),
    "language_model": ("public-lm", "Emu3"),
}


def golden(name):
    """A golden file: a dict of arrays of a .npz, else what the JSON holds."""
    path = GOLDEN / name
    return dict(np.load(path)) if path.suffix == ".npz" else json.loads(path.read_text())


def golden_weights(kind):
    """{name: float32 array} in torch layout, a function of the tag, the names and the shapes alone."""
    tag, _ = MODELS[kind]
    return {name: recipe.tensor(tag, name, shape) for name, shape in golden(f"{kind}.layout.json").items()}


def write_checkpoint(directory, kind, weights=None, **config):
    """A checkpoint of the original in the released layout, one file."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODELS[kind][1], **golden(f"{kind}.json"), **config}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = golden_weights(kind) if weights is None else weights
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def stand_in_for_a_card(monkeypatch, found, *modules):
    """`found` takes the place of the compiled operators in these modules, the CPU that of a card; what external_ops
    logs as a warning goes into found.warnings."""
    import paddle

    from paddlemix import external_ops

    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: paddle.CPUPlace())
    for module in (external_ops, *modules):
        monkeypatch.setattr(module, "operators", lambda: found)
    log = external_ops.logging.getLogger(external_ops.__name__)
    monkeypatch.setattr(log, "warning", lambda text, *values: found.warnings.append(text % values))


@contextlib.contextmanager
def host_left_out():
    """Inside it no tensor comes to the host, for which a card would be waited for, and none is made of the host's
    numbers, which a CUDA graph cannot hold."""
    import paddle

    def refuse(*args, **kwargs):
        raise AssertionError("a step waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("numpy", "item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__", "cpu"):
            patch.setattr(paddle.Tensor, name, refuse)
        patch.setattr(paddle.tensor.creation, "_to_tensor_non_static", refuse)
        patch.setattr(paddle._C_ops, "assign_value_", refuse)
        patch.setattr(paddle.base.core, "from_dlpack", refuse)
        yield


def relative_error(a, b):
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


@pytest.fixture(params=["plain", "avx2", "best"])
def vectors(request, monkeypatch):
    """The compiled operators by each kind of vectors that this processor has."""
    monkeypatch.setenv("EMU3_OPS_SIMD", request.param)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("autoencode.py", "--model_path", ...) -> (exit code, stdout, stderr), run in this process.

    A name without .py is a verb of `emu3`, "" is `emu3` by itself.
    """

    def run(script, *arguments):
        from paddlemix.commands.__main__ import main

        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        path, code = list(sys.path), 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(EXAMPLES / script), run_name="__main__")
            else:
                main([script, *map(str, arguments)] if script else [])
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.path[:] = path
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("vision"), "vision_tokenizer")


@pytest.fixture(scope="session")
def language_dir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("language"), "language_model")


@pytest.fixture(scope="session")
def vision_model(vision_dir):
    from paddlemix.models.emu3 import Emu3VisionVQModel

    return Emu3VisionVQModel.from_pretrained(vision_dir)


@pytest.fixture(scope="session")
def language_model(language_dir):
    from paddlemix.models.emu3 import Emu3ForCausalLM

    return Emu3ForCausalLM.from_pretrained(language_dir)


@pytest.fixture(scope="session")
def vocabulary_dir(tmp_path_factory):
    """A directory with the tokenizer files of the released Emu3; read it, do not write to it."""
    directory = tmp_path_factory.mktemp("emu3-vocabulary")
    random_checkpoints.write_vocabulary(directory)
    config = {
        "added_tokens_decoder": {},
        "auto_map": {"AutoTokenizer": ["tokenization_emu3.Emu3Tokenizer", None]},
        "bos_token": "<|extra_203|>",
        "eos_token": {"content": "<|extra_204|>", "special": True},
        "model_max_length": 9216,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "Emu3Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return directory
