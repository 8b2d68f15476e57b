# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model with int8, int4 and, on a CPU, bfloat16 weights: what is stored, computed, saved and refused."""

import json
import math

import ml_dtypes
import numpy as np
import paddle
import pytest
from conftest import golden, golden_weights, relative_error, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from paddlemix import external_ops, machine
from paddlemix.external_ops import few_rows_linear
from paddlemix.models.emu3 import (
    Emu3Config,
    Emu3ForCausalLM,
    Emu3Model,
    Emu3Tokenizer,
    Emu3VisionVQModel,
    checkpoint,
    linear,
    safetensors_file,
)

DATA = golden("language_model.npz")
IDS = paddle.to_tensor(DATA["plain_ids"])
GROUP = 128


def is_quantized(name):
    return "proj" in name or name == "lm_head.weight"


def levels_and_scales(weight, bits):
    """By the definition, in float64: the nearest multiple of largest / (2**(bits - 1) - 1), of a row or of a group of
    128 inputs. int [out, groups, inputs of a group], float64 [out, groups]."""
    largest = 2 ** (bits - 1) - 1
    size = weight.shape[1] if bits == 8 else GROUP
    groups = math.ceil(weight.shape[1] / size)
    padded = np.zeros([len(weight), groups * size])
    padded[:, : weight.shape[1]] = weight
    padded = padded.reshape(len(weight), groups, size)
    scales = np.abs(padded).max(-1) / largest
    return np.rint(padded / np.where(scales == 0, 1, scales)[..., None]).astype(int), scales


def unpack(stored, bits):
    """Levels of the stored bytes: of int4 byte j of a group holds input j in its low half, j + 64 in its high half."""
    if bits == 8:
        return stored.astype(int)[:, None]
    stored = stored.reshape(len(stored), -1, GROUP // 2).astype(int)
    return np.concatenate([stored % 16 - 8, stored // 16 - 8], -1)


def decoded(state, name, columns):
    """float64 [out, in] of a quantized tensor of {name: array}."""
    stored, scale = state[name], state[name + "_scale"].astype(np.float64)
    levels = unpack(stored, 8 if stored.dtype == np.int8 else 4)
    return (levels * scale.reshape(*levels.shape[:2], 1)).reshape(len(stored), -1)[:, :columns]


def bfloat16(array):
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def load(directory, dtype=None):
    return Emu3ForCausalLM.from_pretrained(directory, dtype=dtype)


def logits_of(model, ids=IDS):
    with paddle.no_grad():
        return model(ids, use_cache=False).logits.numpy()  # in which keys and values have 16 bits


def state_of(model):
    return {name: checkpoint.to_array(t) for name, t in model.state_dict().items()}


# --- what is stored


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_weights_are_the_nearest_levels(language_dir, dtype, bits):
    weights, state = golden_weights("language_model"), state_of(load(language_dir, dtype))
    assert state.keys() == weights.keys() | {name + "_scale" for name in weights if is_quantized(name)}
    for name, weight in weights.items():
        if not is_quantized(name):
            expected = bfloat16(weight) if "embed" in name else weight
            np.testing.assert_array_equal(state[name].astype(np.float32), expected)
            continue
        levels, scales = levels_and_scales(weight, bits)
        assert state[name].dtype == (np.int8 if bits == 8 else np.uint8)
        np.testing.assert_allclose(state[name + "_scale"], scales[:, 0] if bits == 8 else scales, rtol=1e-6)
        found = unpack(state[name], bits)
        assert np.abs(found).max() <= 2 ** (bits - 1) - 1
        # float32 may round a number in the middle of two levels the other way
        assert np.abs(found - levels).max() <= 1 and (found != levels).mean() < 1e-3
        error = np.abs(decoded(state, name, weight.shape[1]) - weight)
        limit = np.repeat(scales / 2, weight.shape[1] if bits == 8 else GROUP, axis=1)[:, : weight.shape[1]]
        assert (error <= limit * (1 + 1e-4)).all()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_while_it_is_read_or_afterwards(tmp_path, monkeypatch, stored, dtype):
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 5000)  # some rows at a time; the widest row alone
    weights = {name: w.astype(stored) for name, w in golden_weights("language_model").items()}
    state = state_of(load(write_checkpoint(tmp_path, "language_model", weights), dtype))
    kept = {"float32": "float32", "float64": "float32"}.get(stored, stored)
    assert state["model.norm.weight"].dtype == kept
    assert state["model.embed_tokens.weight"].dtype == ("bfloat16" if kept == "float32" else kept)
    for name, weight in weights.items():
        if is_quantized(name):
            whole = few_rows_linear.quantize(paddle.to_tensor(weight.astype(np.float32)), 8 if dtype == "int8" else 4)
            np.testing.assert_array_equal(state[name], whole[0].numpy())
            np.testing.assert_array_equal(state[name + "_scale"], whole[1].numpy())


def test_never_whole_in_memory(language_dir, monkeypatch):
    """The float weights are seen a few kilobytes at a time."""
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 5000)
    seen, quantize = [], few_rows_linear.quantize
    monkeypatch.setattr(linear, "quantize", lambda w, bits: seen.append(w.numpy().nbytes) or quantize(w, bits))
    read = safetensors_file.SafetensorsFile.read

    def read_floats(self, name, *more):
        assert not is_quantized(name)
        return read(self, name, *more)

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "read", read_floats)
    load(language_dir, "int4")
    quantized = {name: w for name, w in golden_weights("language_model").items() if is_quantized(name)}
    assert max(seen) <= 5000 and sum(seen) == sum(w.nbytes for w in quantized.values())


# --- what is computed


def float_twin(directory, model):
    """A float32 model of what a model of fewer bits holds."""
    state = state_of(model)
    weights = {
        name: decoded(state, name, w.shape[1]).astype(np.float32)
        if name + "_scale" in state
        else state[name].astype(np.float32)
        for name, w in golden_weights("language_model").items()
    }
    return load(write_checkpoint(directory, "language_model", weights), "float32")


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_computes_with_what_is_stored(language_dir, tmp_path, dtype):
    model = load(language_dir, dtype)
    twin = float_twin(tmp_path, model)
    for ids in (IDS, IDS[:, :1], IDS[:, :3]):
        expected = logits_of(twin, ids)
        with external_ops.without_operators():  # which round nothing else
            assert relative_error(logits_of(model, ids), expected) < 1e-5
        # activations are rounded by less than weights were
        assert relative_error(logits_of(model, ids), expected) < {"int8": 1e-3, "int4": 0.03, "bfloat16": 0.01}[dtype]
    assert model(IDS).logits.dtype == paddle.float32 and model.weight_dtype == dtype
    with paddle.no_grad():
        hidden = Emu3Model.from_pretrained(language_dir, dtype=dtype)(IDS)
        np.testing.assert_array_equal(hidden.numpy(), model.model(IDS).numpy())


def test_bfloat16_is_float32_with_rounded_weights(language_dir, tmp_path):
    weights = {name: bfloat16(w) for name, w in golden_weights("language_model").items()}
    rounded = load(write_checkpoint(tmp_path, "language_model", weights), "float32")
    model = load(language_dir, "bfloat16")
    assert {str(p.dtype) for p in model.parameters()} == {"paddle.bfloat16"}
    with external_ops.without_operators():  # which round activations to bfloat16 too, where many are multiplied
        assert relative_error(logits_of(model), logits_of(rounded)) < 1e-5
        assert relative_error(logits_of(model), DATA["plain_logits"]) > 1e-4


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.03), ("int8", 0.05), ("int4", 0.6)])
def test_close_to_the_original(language_dir, dtype, error):
    """Random weights are the hardest to quantize: a level of a row of 64 is about 1.2 % (int8), 22 % (int4) of a
    weight's deviation."""
    difference = logits_of(load(language_dir, dtype)) - DATA["plain_logits"]
    assert 1e-4 < difference.std() / DATA["plain_logits"].std() < error


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_in_pieces_through_a_cache_of_16_bits(language_dir, dtype):
    model = load(language_dir, dtype)
    whole, length = logits_of(model), IDS.shape[1]
    cache = model.make_cache(IDS.shape[0], length)
    assert cache.keys[0].dtype == paddle.bfloat16
    pieces = []
    for a, b in [(0, 9), (9, 10), (10, length)]:
        with paddle.no_grad():
            pieces.append(model(IDS[:, a:b], past_key_values=cache).logits.numpy())
    assert relative_error(np.concatenate(pieces, axis=1), whole) < 0.03  # keys and values are rounded to 8 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 20])
def test_the_visual_rows_of_the_head_alone(language_dir, dtype, rows):
    head = load(language_dir, dtype).lm_head
    x = paddle.to_tensor(np.random.RandomState(0).standard_normal([rows, 64]).astype("float32"))
    with paddle.no_grad():
        whole, part = head(x).numpy(), head(x, slice(256, 500)).numpy()
    assert part.shape == (rows, 244)
    np.testing.assert_allclose(part, whole[:, 256:500], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_pictures_and_text(language_dir, tmp_path, dtype):
    """The same as the float32 model of the stored weights, with a float32 cache of numbers that fit 16 bits or not."""
    from test_generation import GRAMMAR, GREEDY, NEGATIVE, PROMPTS, SIZES

    from paddlemix.models.emu3 import generate_images, generate_text

    model = load(language_dir, dtype)
    twin = float_twin(tmp_path, model)
    make = twin.make_cache
    twin.make_cache = lambda *a: make(*a).map(lambda x: x.astype("bfloat16"))
    pictures = [generate_images(m, PROMPTS, SIZES, GRAMMAR, NEGATIVE, sampling=GREEDY).codes for m in (model, twin)]
    for ours, expected in zip(*pictures, strict=True):
        np.testing.assert_array_equal(ours, expected)
    ours, expected = (list(generate_text(m, PROMPTS, 12)) for m in (model, twin))
    assert ours == expected
    ids, _ = model.generate(IDS[:1], max_new_tokens=5)
    assert ids.shape == [1, 5]


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_gradients_pass_through(language_dir, tmp_path, dtype):
    """Of the embedding, through layers that are not trained themselves, as the float32 model's."""
    model = load(language_dir, dtype)
    grads = []
    for m in (model, float_twin(tmp_path, model)):
        embeddings = paddle.to_tensor(state_of(model)["model.embed_tokens.weight"].astype("float32")[DATA["plain_ids"]])
        embeddings.stop_gradient = False
        m(inputs_embeds=embeddings, labels=IDS).loss.backward()
        grads.append(embeddings.grad.numpy())
    assert relative_error(*grads) < 1e-5
    assert all(p.stop_gradient for name, p in model.named_parameters() if dtype != "bfloat16" and is_quantized(name))


# --- what is saved


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_saved_and_loaded_again(language_dir, tmp_path, monkeypatch, dtype, max_shard_bytes):
    model = load(language_dir, dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"int8": {"bits": 8, "group_size": -1}, "int4": {"bits": 4, "group_size": 128}}[dtype]
    assert config["quantization_config"] == expected and config["torch_dtype"] == "bfloat16"
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found.update(load_file(file))
    state = state_of(model)
    assert found.keys() == state.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in state.items())
    monkeypatch.setattr(few_rows_linear, "quantize", None)  # nothing is quantized again
    for asked in (None, dtype):
        again = load(tmp_path, asked)
        assert again.weight_dtype == dtype and again.config.to_dict() == {**model.config.to_dict(), **config}
        np.testing.assert_array_equal(logits_of(again), logits_of(model))
    Emu3Model.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_scales_of_another_dtype_become_float32(int8_dir, stored):
    weights = load_file(int8_dir / "model.safetensors")
    scales = {name: w.astype(stored) for name, w in weights.items() if name.endswith("_scale")}
    save_file({**weights, **scales}, int8_dir / "model.safetensors")
    model = load(int8_dir)
    state = state_of(model)
    for name, scale in scales.items():
        np.testing.assert_array_equal(state[name], scale.astype(np.float32), strict=True)
    assert np.isfinite(logits_of(model)).all()


def test_a_file_is_written_as_the_library_reads_it(tmp_path):
    arrays = {
        "b": np.arange(3, dtype=np.int8), "a": np.arange(5, dtype=np.uint8), "c": np.array(7, dtype=np.int64),
        "d": np.ones([2, 3], ml_dtypes.bfloat16), "e": np.zeros([0, 4], np.float32), "f": np.eye(3, dtype=np.float32),
    }  # fmt: skip
    layout = {name: (a.dtype.name, a.shape) for name, a in arrays.items()}
    safetensors_file.write_safetensors(tmp_path / "x.safetensors", layout, arrays.get)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].astype("float32"), array.astype("float32"))
    header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


# --- what is refused


def refuse(directory, dtype, *words, load=load):
    with pytest.raises(ValueError) as error:
        load(directory, dtype)
    assert isinstance(error.value, checkpoint.InputError)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture
def int8_dir(language_dir, tmp_path):
    load(language_dir, "int8").save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_another_dtype_of_a_quantized_checkpoint(int8_dir, dtype):
    refuse(int8_dir, dtype, "is int8", dtype)


def test_the_vision_tokenizer_stays_in_floats(vision_dir):
    refuse(vision_dir, "int8", "float32, float16, bfloat16", load=lambda d, t: Emu3VisionVQModel.from_pretrained(d, t))


def test_a_tied_head(language_dir, tmp_path):
    weights = golden_weights("language_model")
    del weights["lm_head.weight"]
    write_checkpoint(tmp_path, "language_model", weights, tie_word_embeddings=True)
    refuse(tmp_path, "int8", "embedding", "bfloat16")
    assert load(tmp_path, "bfloat16").weight_dtype == "bfloat16"


@pytest.mark.parametrize("how", [{}, {"bits": 3, "group_size": -1}, {"quant_method": "gptq", "bits": 4}, "int8", [8]])
def test_quantized_in_another_way(language_dir, tmp_path, how):
    write_checkpoint(tmp_path, "language_model", quantization_config=how)
    refuse(tmp_path, None, "quantization_config must be", "'bits': 8")


def test_files_and_config_that_do_not_belong_together(int8_dir, language_dir):
    values = json.loads((int8_dir / "config.json").read_text())
    (int8_dir / "config.json").write_text(json.dumps({**values, "quantization_config": None}))
    refuse(int8_dir, None, "weight_scale", "too many")
    how = {"bits": 4, "group_size": 128}
    (int8_dir / "config.json").write_text(json.dumps({**values, "quantization_config": how}))
    refuse(int8_dir, None, "is int8", "asks for uint8")
    (int8_dir / "config.json").write_text(json.dumps(values))
    weights = load_file(int8_dir / "model.safetensors")
    weights["model.norm.weight"] = np.ones(64, np.int8)
    save_file(weights, int8_dir / "model.safetensors")
    refuse(int8_dir, None, "model.norm.weight", "integers")
    write_checkpoint(int8_dir, "language_model", quantization_config=values["quantization_config"])
    refuse(int8_dir, None, "lacks", "weight_scale")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_not_finite(tmp_path, bad, stored):
    weights = {name: w.astype(stored) for name, w in golden_weights("language_model").items()}
    weights["model.layers.1.mlp.up_proj.weight"][77, 5] = bad
    write_checkpoint(tmp_path, "language_model", weights)
    refuse(tmp_path, "int4", "model.layers.1.mlp.up_proj.weight", "NaN or infinity")


def test_memory_of_the_released_model(tmp_path, monkeypatch):
    """int8 takes a byte a weight and 4 an output, int4 half a byte and 4 a group of 128 weights; the rest 2 bytes."""
    Emu3Config().save_pretrained(tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    shapes = golden("layout-Emu3-8B.json")
    for dtype in ("int8", "int4"):
        size = 0
        for name, shape in shapes.items():
            if not is_quantized(name):
                size += 2 * math.prod(shape)
            else:
                size += (shape[1] + 4 if dtype == "int8" else shape[1] / 2 + 4 * shape[1] / 128) * shape[0]
        refuse(tmp_path, dtype, f"{size / 1e9:.1f} GB", f"in {dtype}")
        assert size < (9.4e9 if dtype == "int8" else 5.7e9)


# --- the commands


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_draw(command, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_path=emu3-mini", f"--dtype={dtype}", "--prompt=a red circle", "--height=24", "--width=32"]
    code, _, err = command("run_generation_inference.py", *arguments)
    assert (code, err) == (0, "")
    picture = Image.open("result_0.png")
    assert picture.size == (32, 24) and picture.text["dtype"] == dtype


def test_answer_of_a_quantized_checkpoint(command, tmp_path, monkeypatch):
    """Its own dtype is what the command takes; another one is refused in a line."""
    monkeypatch.chdir(tmp_path)
    Emu3ForCausalLM.from_pretrained("emu3-mini", dtype="int8").save_pretrained("small")
    Emu3Tokenizer.from_pretrained("emu3-mini").save_pretrained("small")
    arguments = ["--model_path=small", "--vq_model_path=emu3-mini", "--image_path=paddlemix/demo_images/emu3_scene.png"]
    arguments += ["--question", "How many objects are there?"]
    code, out, err = command("run_understanding_inference.py", *arguments)
    assert (code, out) == (0, "two\n") and err.count("\n") == 1
    code, out, err = command("run_understanding_inference.py", *arguments, "--dtype=bfloat16")
    assert (code, out) == (2, "") and "small is int8" in err and err.count("\n") == 1


def test_slow_without_the_operators_is_told(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(external_ops, "operators", lambda: None)
    arguments = ["--model_path=emu3-mini", "--prompt=a red circle", "--height=16", "--width=16"]
    assert command("run_generation_inference.py", *arguments)[2] == ""  # a small model is quick enough
    monkeypatch.setattr("paddlemix.commands.language_model.SLOW_BYTES", 1e6)
    for dtype in (["--dtype=int4"], ["--dtype=float32"], []):
        code, _, err = command("run_generation_inference.py", *arguments, *dtype)
        assert code == 0 and err.count("\n") == 1 and "run `make ops`" in err
    code, _, err = command("run_generation_inference.py", *arguments, "--dtype=float16")
    assert code == 0 and err.count("\n") == 2 and "going on in float32" in err and "run `make ops`" in err
