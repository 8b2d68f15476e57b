# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configurations: files come back as they were."""

import json

import pytest

from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQConfig

# as BAAI/Emu3-Gen ships it, with the keys that other libraries put there
RELEASED = {
    "architectures": ["Emu3ForCausalLM"], "attention_dropout": 0.1,
    "auto_map": {
        "AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM",
    },
    "boi_token_id": 151852, "bos_token_id": 151849, "eof_token_id": 151847, "eoi_token_id": 151853,
    "eol_token_id": 151846, "eos_token_id": 151850, "hidden_act": "silu", "hidden_size": 4096, "image_area": 518400,
    "img_token_id": 151851, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 9216,
    "model_type": "Emu3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pad_token_id": 151643, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.44.0", "use_cache": True,
    "vocab_size": 184622,
}  # fmt: skip


def write(directory, values):
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text)
    return text


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_released_file_comes_back_byte_for_byte(tmp_path, use_cache):
    text = write(tmp_path, {**RELEASED, "use_cache": use_cache})
    config = Emu3Config.from_pretrained(tmp_path)
    assert config.use_cache is use_cache
    config.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == text


def test_defaults_are_the_released_values():
    config = Emu3Config()
    same = {k: getattr(config, k) for k in RELEASED if hasattr(Emu3Config, k)}
    assert same == {k: RELEASED[k] for k in same} and len(same) > 22
    assert config.head_dim == 128


def test_unknown_keys_and_changes_are_kept(tmp_path):
    write(tmp_path, {"model_type": "Emu3VisionVQ", "ch": 64, "new_key": [1, {"a": None}]})
    config = Emu3VisionVQConfig.from_pretrained(tmp_path, dropout=0.1)
    assert config.new_key == [1, {"a": None}]
    assert config.to_dict() == {"model_type": "Emu3VisionVQ", "ch": 64, "new_key": [1, {"a": None}], "dropout": 0.1}
    assert config.codebook_size == 32768


def test_no_key_value_heads_means_no_groups():
    assert Emu3Config(num_key_value_heads=None).num_key_value_heads == 32


@pytest.mark.parametrize(
    "rope_scaling",
    [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 1.5}, None],
)
def test_rope_scaling_accepted(rope_scaling):
    assert Emu3Config(rope_scaling=rope_scaling).rope_scaling == rope_scaling


@pytest.mark.parametrize(
    "rope_scaling",
    [
        "linear", {}, {"type": "linear"}, {"type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2},
        {"type": "linear", "factor": 1.0}, {"type": "linear", "factor": float("nan")},
        {"type": "linear", "factor": 2.0, "more": 1},
    ],
)  # fmt: skip
def test_rope_scaling_refused(rope_scaling):
    with pytest.raises(ValueError, match="rope_scaling must be"):
        Emu3Config(rope_scaling=rope_scaling)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 0}, "hidden_size must be above 0"),
        ({"hidden_size": 10**13}, "hidden_size must be above 0"),
        ({"initializer_range": None}, "initializer_range must be a finite number"),
        ({"hidden_size": "4096"}, "hidden_size must be an integer"),
        ({"use_cache": "false"}, "use_cache must be true or false"),
        ({"eos_token_id": [3, 202]}, "eos_token_id must be an integer"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"rope_theta": -5}, "rope_theta must be above 0"),
        ({"attention_dropout": 2.0}, "attention_dropout must be 0 or more and below 1"),
        ({"to_dict": 1}, "to_dict must be called something else"),
        ({"hidden_size": 4100}, "even multiple"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "llama"}, "'llama' model"),
    ],
)
def test_values_that_make_no_model(values, words):
    with pytest.raises(ValueError, match=words):
        Emu3Config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"ch": 48}, {"temporal_downsample_factor": 3}, {"double_z": True}, {"ch_mult": []}, {"ch_mult": "1224"},
        {"ch_mult": [0, 1]}, {"attn_resolutions": None}, {"dropout": -1.0}, {"z_channels": 8},
    ],
)  # fmt: skip
def test_values_that_make_no_vision_tokenizer(values):
    with pytest.raises(ValueError, match=f"config: {next(iter(values))}"):
        Emu3VisionVQConfig(**values)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        Emu3Config.from_pretrained(tmp_path)
