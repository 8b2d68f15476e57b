# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configurations: files come back as they were."""

import json
import os

import pytest

from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQConfig
from paddlemix.utils import InputError, read_json

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
        ({"num_hidden_layers": 10_000}, "num_hidden_layers must be above 0 and at most 1000, got 10000"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be above 0"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number"),
        ({"rope_theta": 1e-40}, "rope_theta must be a finite number"),  # 0 in float32
        ({"initializer_range": -1.0}, "initializer_range must be 0 to 100"),
        ({"eos_token_id": []}, "eos_token_id must be an integer"),
        ({"eos_token_id": [3, "4"]}, "eos_token_id must be an integer"),
        ({"eos_token_id": [3, 184622]}, "eos_token_id must be 0 to 184621, below vocab_size"),
        ({"pad_token_id": -1}, "pad_token_id must be 0 to 184621"),
        ({"boi_token_id": 50, "vocab_size": 50}, "boi_token_id must be 0 to 49"),
        ({"head_dim": 64}, "head_dim is 64, the other values make it 128"),
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
        {"ch_mult": [0, 1]}, {"ch_mult": [1] * 5000}, {"ch_mult": [1, 10**30]}, {"num_res_blocks": 2**31 - 1},
        {"embed_dim": 2**31 - 1}, {"temporal_downsample_factor": 2**30}, {"attn_resolutions": None}, {"dropout": -1.0},
        {"z_channels": 8},
    ],
)  # fmt: skip
def test_values_that_make_no_vision_tokenizer(values):
    with pytest.raises(ValueError, match=f"config: {next(iter(values))}") as error:
        Emu3VisionVQConfig(**values)
    assert len(str(error.value)) < 200


BROKEN = [b"{", b"[]", b"\x00", b"[" * 100_000, b'{"a":' * 100_000, '{"a": "\u00e9"}'.encode("latin-1"), b"9" * 5000]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("name", ["config.json", "any.json"])
def test_a_broken_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=f"{name} (is not valid JSON|must hold one JSON object)") as error:
        Emu3Config.from_pretrained(tmp_path) if name == "config.json" else read_json(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_is_not_a_small_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 30)
    for name, words in dict.fromkeys(("fifo", "folder", "device", "dangling"), "not a regular file").items():
        with pytest.raises(InputError, match=f"{name} is {words}"):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match="large has 1073741824 bytes"):
        read_json(tmp_path / "large")
    with pytest.raises(InputError, match="nothing: there is no such file"):
        read_json(tmp_path / "nothing")


def test_utf_8_with_a_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + '{"name": "\u753b"}'.encode())
    assert Emu3Config.from_pretrained(tmp_path).name == "\u753b"


def test_a_key_may_have_any_name(tmp_path):
    text = write(tmp_path, {**RELEASED, "self": 1, "cls": 2, "name_or_path": 3, "head_dim": 128})
    Emu3Config.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == text
    assert vars(Emu3VisionVQConfig(self=1)) == {"self": 1}


def test_several_tokens_may_end_a_text():
    assert Emu3Config().eos_token_ids == (151850,)
    config = Emu3Config(eos_token_id=[151850, 151643])
    assert config.eos_token_ids == (151850, 151643) and config.to_dict()["eos_token_id"] == [151850, 151643]


@pytest.mark.parametrize(
    ("rope_parameters", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, 5e5, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_type": "linear", "factor": 2.0}, 1e6, {"type": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_type": "dynamic", "factor": 4.0}, 5e5, {"type": "dynamic", "factor": 4.0}),
    ],
)
def test_rope_of_newer_transformers(rope_parameters, theta, scaling):
    """It is written back as the original reads it."""
    config = Emu3Config(rope_parameters=rope_parameters)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert config.to_dict() == {"model_type": "Emu3", "rope_theta": theta, "rope_scaling": scaling}
    older = {key: value for key, value in rope_parameters.items() if key != "rope_theta"}
    assert Emu3Config(rope_scaling=older or None).rope_scaling == scaling


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}, "rope_scaling must be.*yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling must be.*llama3"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 8.0}}, "rope_scaling must be"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling must be"),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "contradict"),
        ({"rope_parameters": [1e4]}, "rope_parameters must be an object"),
    ],
)
def test_rope_of_newer_transformers_refused(values, words):
    with pytest.raises(InputError, match=words):
        Emu3Config(**values)


@pytest.mark.parametrize(
    ("folder", "config_class", "right"),
    [
        ("Emu3-Chat-hf", Emu3Config, "take BAAI/Emu3-Chat$"),
        ("Emu3-Gen-hf", Emu3Config, "take BAAI/Emu3-Gen$"),
        ("emu", Emu3Config, "take BAAI/Emu3-Gen or BAAI/Emu3-Chat$"),
        ("Emu3-Gen-hf", Emu3VisionVQConfig, "take BAAI/Emu3-VisionTokenizer$"),
    ],
)
def test_a_conversion_is_named_as_such(tmp_path, folder, config_class, right):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder, {"model_type": "emu3", "text_config": {"model_type": "emu3_text_model"}, "vq_config": {}})
    with pytest.raises(InputError, match=f"{folder}' is a conversion for Hugging Face transformers.*{right}"):
        config_class.from_pretrained(tmp_path / folder)
