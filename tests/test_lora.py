# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LoRA: what is computed and trained over each kind of weights, PEFT's files, merging, and the commands."""

import json
import shutil

import numpy as np
import paddle
import pytest
from conftest import GOLDEN, golden, golden_weights, relative_error, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from paddlemix.external_ops import without_operators
from paddlemix.external_ops.few_rows_linear import dequantize
from paddlemix.models.emu3 import Emu3ForCausalLM, safetensors_file
from paddlemix.models.emu3.adapter import PROJECTIONS, Adapter, LoraConfig
from paddlemix.models.emu3.hub import MINI_DIRECTORY, local_directory
from paddlemix.models.emu3.lora import apply_lora, load_lora, lora_state, save_lora
from paddlemix.utils import InputError

BASES = ("float32", "bfloat16", "int8", "int4")
PEFT = GOLDEN / "peft_adapter"  # written by PEFT 0.21.2 over transformers' Emu3ForCausalLM with the golden weights
DATA = golden("language_model.npz")
IDS = paddle.to_tensor(DATA["plain_ids"])


def load(directory, dtype="float32", lora_path=None):
    return Emu3ForCausalLM.from_pretrained(directory, dtype=dtype, lora_path=lora_path)


def logits_of(model, ids=IDS):
    with paddle.no_grad():
        return model.eval()(ids, use_cache=False).logits.numpy()


def with_adapter(model, seed=0, size=0.02, **config):
    """The model with an adapter that changes something: its B is not zeros."""
    apply_lora(model, LoraConfig(**config), seed)
    rng = np.random.default_rng(seed)
    for name, parameter in lora_state(model).items():
        if "lora_B" in name:
            parameter.set_value((size * rng.standard_normal(parameter.shape)).astype("float32"))
    return model


@pytest.fixture(scope="module")
def adapter_dir(language_dir, tmp_path_factory):
    """An adapter of the golden language model, as this project writes it."""
    directory = tmp_path_factory.mktemp("lora") / "adapter"
    save_lora(with_adapter(load(language_dir)), directory)
    return directory


@pytest.fixture(scope="module")
def mini_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora") / "mini"
    save_lora(with_adapter(load("emu3-mini"), size=2), directory, "emu3-mini")
    return directory


# --- PEFT's files


def test_an_adapter_of_peft(language_dir):
    """Merged while the weights are read, and beside them: PEFT's own numbers."""
    expected = golden("peft_adapter.npz")
    merged = load(language_dir, lora_path=PEFT)
    assert relative_error(logits_of(merged)[:, -1], expected.pop("logits")) < 1e-6
    state = {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
    for name, rows in expected.items():
        assert relative_error(state[name][: len(rows)], rows) < 1e-7
        assert relative_error(golden_weights("language_model")[name][: len(rows)], rows) > 1e-2
    beside = load(language_dir)
    load_lora(beside, PEFT)
    assert relative_error(logits_of(beside)[:, -1], golden("peft_adapter.npz")["logits"]) < 1e-6


def test_targets_of_other_architectures_are_passed_over(language_dir, tmp_path):
    """As PEFT does; recipes name the layers of several."""
    shutil.copytree(PEFT, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "target_modules": [*values["target_modules"], "query_key_value"]}))
    np.testing.assert_array_equal(
        logits_of(load(language_dir, lora_path=tmp_path)), logits_of(load(language_dir, lora_path=PEFT))
    )


def test_saved_as_peft_saves(language_dir, tmp_path):
    """The same tensors under the same names, to the last bit, and the fields that PEFT computes by."""
    model = load(language_dir)
    load_lora(model, PEFT)
    save_lora(model, tmp_path, "BAAI/Emu3-Gen")
    ours, theirs = (load_file(directory / "adapter_model.safetensors") for directory in (tmp_path, PEFT))
    assert ours.keys() == theirs.keys() == lora_state(model).keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    config, original = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, PEFT))
    same = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out")
    assert {key: config[key] for key in same} == {key: original[key] for key in same}
    assert config["base_model_name_or_path"] == "BAAI/Emu3-Gen" and config.keys() <= original.keys()
    # only layer 1 has it, so that names of all layers would add others in PEFT
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (PROJECTIONS, 21),
        ("all-linear", 21),
        (["q_proj", "lm_head"], 4),
        (["self_attn.v_proj"], 3),
        (r".*\.layers\.[02]\..*(up|down)_proj", 4),
        (["model.layers.2.mlp.up_proj"], 1),
    ],
)
def test_chosen_layers(language_dir, tmp_path, targets, found):
    model = with_adapter(load(language_dir), rank=3, target_modules=targets)
    state = lora_state(model)
    assert len(state) == 2 * found
    assert {name for name, p in model.named_parameters() if not p.stop_gradient} == {
        name.removeprefix("base_model.model.").removesuffix(".weight") for name in state
    }
    save_lora(model, tmp_path)
    assert relative_error(logits_of(load(language_dir, lora_path=tmp_path)), logits_of(model)) < 2e-6


# --- what is computed


def test_a_new_adapter_changes_nothing(language_dir):
    model, names = load(language_dir), {}
    before = logits_of(model)
    apply_lora(model, LoraConfig(rank=4, target_modules=["q_proj", "down_proj"]), seed=7)
    np.testing.assert_array_equal(logits_of(model), before)
    for seed, targets in ((7, PROJECTIONS), (7, ["down_proj"]), (8, ["down_proj"])):
        other = load(language_dir)
        apply_lora(other, LoraConfig(rank=4, target_modules=targets), seed)
        a = lora_state(other)["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].numpy()
        names[seed, len(targets)] = a
        assert a.shape == (4, 160) and np.abs(a).max() <= 160**-0.5 and a.std() == pytest.approx((3 * 160) ** -0.5, 0.1)
    assert (names[7, 7] == names[7, 1]).all() and (names[7, 1] != names[8, 1]).any()  # by seed and name alone


def test_merged_is_the_same(language_dir, adapter_dir):
    beside = load(language_dir)
    load_lora(beside, adapter_dir)
    merged = logits_of(load(language_dir, lora_path=adapter_dir))
    assert relative_error(merged, logits_of(beside)) < 1e-6
    assert relative_error(merged, logits_of(load(language_dir))) > 0.05


@pytest.mark.parametrize("dtype", BASES)
def test_merged_before_it_is_rounded(language_dir, adapter_dir, tmp_path, monkeypatch, dtype):
    """To the last bit the weights of a checkpoint that holds the sums, however few rows are read at a time."""
    weights = golden_weights("language_model")
    for name, (a, b) in Adapter.read(adapter_dir).pairs.items():
        weights[name + ".weight"] = weights[name + ".weight"] + b @ a * np.float32(2)
    expected = load(write_checkpoint(tmp_path, "language_model", weights), dtype).state_dict()
    for chunk in (safetensors_file.CHUNK_BYTES, 5000):
        monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", chunk)
        found = load(language_dir, dtype, adapter_dir).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            difference = (found[name].astype("float32") - tensor.astype("float32")).abs().max()
            assert float(difference) <= 1e-6 * float(tensor.astype("float32").abs().max()) * (dtype == "float32"), name


@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("dtype", BASES)
def test_gradients(language_dir, dtype, operators):
    """Of x, A and B by their formulas in float64; the weight gets none."""
    layer = with_adapter(load(language_dir, dtype), rank=3, alpha=5).model.layers[0].mlp.down_proj
    weight = dequantize(layer.weight, layer.weight_scale, 160) if dtype in ("int8", "int4") else layer.weight
    w, a, b = (x.astype("float32").numpy().astype("float64") for x in (weight, layer.lora_A, layer.lora_B))
    rng = np.random.default_rng(1)
    for rows in (3, 70):
        x, g = rng.standard_normal([rows, 160]), rng.standard_normal([rows, 64])
        tensor = paddle.to_tensor(x.astype("float32"), stop_gradient=False)
        layer.clear_gradients()
        if operators:
            y = layer(tensor)
        else:
            with without_operators():
                y = layer(tensor)
        (y * paddle.to_tensor(g.astype("float32"))).sum().backward()
        scale = 5 / 3
        assert relative_error(y.numpy(), x @ w.T + scale * (x @ a.T) @ b.T) < 1e-5
        assert relative_error(tensor.grad.numpy(), g @ w + scale * (g @ b) @ a) < 1e-5
        assert relative_error(layer.lora_A.grad.numpy(), scale * (g @ b).T @ x) < 1e-5
        assert relative_error(layer.lora_B.grad.numpy(), scale * g.T @ (x @ a.T)) < 1e-5
        assert layer.weight.grad is None


def test_dropout_is_of_training(language_dir):
    model = with_adapter(load(language_dir), dropout=0.5)
    expected = logits_of(model)
    with paddle.no_grad():
        model.train()
        assert relative_error(model(IDS, use_cache=False).logits.numpy(), expected) > 1e-3
    np.testing.assert_array_equal(logits_of(model), expected)


@pytest.mark.parametrize(("dtype", "recompute"), [*((dtype, False) for dtype in BASES), ("int4", True)])
def test_training(dtype, recompute):
    """Five steps on emu3-mini: the loss falls, and nothing but the adapter has changed."""
    model = load("emu3-mini", dtype)
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    apply_lora(model, LoraConfig(dropout=0.05), seed=1)
    if recompute:
        model.gradient_checkpointing_enable()
    model.train()
    paddle.seed(0)
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=list(lora_state(model).values()))
    ids, losses = paddle.to_tensor(np.random.default_rng(0).integers(0, 13000, [2, 20])), []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1, losses
    state = model.state_dict()
    assert all((state[name].numpy() == array).all() for name, array in before.items())
    assert all(float(p.abs().max()) > 0 for p in lora_state(model).values())


def test_beside_a_quantized_checkpoint(language_dir, adapter_dir, tmp_path):
    """Rounded again it would be lost: it stays in float32, as in training. A row does not depend on its neighbours."""
    from test_generation import GRAMMAR, GREEDY, NEGATIVE, PROMPTS, SIZES

    from paddlemix.models.emu3 import generate_images

    load(language_dir, "int4").save_pretrained(tmp_path)
    model, trained = load(tmp_path, None, adapter_dir), load(language_dir, "int4")
    load_lora(trained, adapter_dir)
    np.testing.assert_array_equal(logits_of(model), logits_of(trained))
    assert relative_error(logits_of(model), logits_of(load(tmp_path, None))) > 0.05
    together = generate_images(model, PROMPTS, SIZES, GRAMMAR, NEGATIVE, sampling=GREEDY).codes
    for i, codes in enumerate(together):
        one = slice(i, i + 1)
        alone = generate_images(model, PROMPTS[one], SIZES[one], GRAMMAR, NEGATIVE[one], sampling=GREEDY)
        np.testing.assert_array_equal(alone.codes[0], codes)


# --- what is refused


def refused(message, *words):
    assert "\n" not in message and all(word in message for word in words), message


CONFIGS = {
    "IA3": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "DoRA": ({"use_dora": True}, "use_dora True is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
    "biases": ({"bias": "all"}, "bias 'all' is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "what PEFT may have next": ({"use_better_lora": 1}, "use_better_lora 1 is not supported"),
    "no rank": ({"r": "8"}, "rank of LoRA must be 1 to 65536"),
    "another rank": ({"r": 5}, "lora_A [5, in]"),
    "alpha": ({"lora_alpha": float("nan")}, "alpha of LoRA must be above 0"),
    "dropout": ({"lora_dropout": 1}, "dropout of LoRA must be 0 or more"),
    "no targets": ({"target_modules": None}, "target_modules must be names"),
    "a pattern": ({"target_modules": "("}, "target_modules must be names"),
    "another file": ({"peft_type": None}, "peft_type None is not supported"),
    "too few layers": ({"target_modules": ["v_proj"]}, "layers.1.mlp.down_proj, which target_modules in adapter_"),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configurations(language_dir, tmp_path, change):
    shutil.copytree(PEFT, tmp_path, dirs_exist_ok=True)
    values, words = CONFIGS[change]
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(InputError) as error:
        load(language_dir, lora_path=tmp_path)
    refused(str(error.value), str(tmp_path), words)


def without_b(weights):
    return {name: array for name, array in weights.items() if "q_proj.lora_B" not in name}


WEIGHTS = {
    "nothing": (lambda w: {}, "holds no weights"),
    "half": (without_b, "q_proj has lora_A [2, 64], and by adapter_config.json needs lora_A [2, in] and lora_B"),
    "NaN": (lambda w: {**w, next(iter(w)): np.full_like(next(iter(w.values())), np.nan)}, "NaN or infinity"),
    "another model's layer": (lambda w: {n.replace("layers.1", "layers.9"): x for n, x in w.items()}, "another model"),
    "another model's width": (
        lambda w: {n: np.pad(x, [(0, 0), (0, 3)]) if "lora_A" in n else x for n, x in w.items()}, "of another model",
    ),
    "DoRA": (lambda w: {**w, "base_model.model.lm_head.lora_magnitude_vector": np.ones(3, "f")}, "lora_magnitude_v"),
    "integers": (lambda w: {n: x.astype("int8") for n, x in w.items()}, "matrices of floats"),
    "a whole model": (lambda w: {"model.norm.weight": np.ones(64, "f")}, "model.norm.weight is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("way", ["merged", "beside"])
def test_weights(language_dir, tmp_path, change, way):
    shutil.copytree(PEFT, tmp_path, dirs_exist_ok=True)
    make, words = WEIGHTS[change]
    save_file(make(load_file(PEFT / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        if way == "merged":
            load(language_dir, lora_path=tmp_path)
        else:
            load_lora(load(language_dir), tmp_path)
    refused(str(error.value), str(tmp_path), words)


def test_folders_that_hold_none(language_dir, tmp_path):
    def refuse(path, *words):
        with pytest.raises(InputError) as error:
            load(language_dir, lora_path=path)
        refused(str(error.value), *words)

    refuse(tmp_path / "a" / "b", "no LoRA adapter at", "a/b")
    refuse("", "no LoRA adapter at ''")
    refuse(language_dir, "has no adapter_config.json", "not a LoRA adapter")
    shutil.copy(PEFT / "adapter_config.json", tmp_path)
    refuse(tmp_path, "has no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").touch()
    refuse(tmp_path, "adapter_model.bin, a pickle")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    refuse(tmp_path, "truncated or not a safetensors file")


def test_the_newest_of_a_training_run(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.part"):
        shutil.copytree(PEFT, tmp_path / name)
    assert Adapter.read(tmp_path).path.parent == local_directory(tmp_path) == tmp_path / "checkpoint-10"
    shutil.copy(PEFT / "adapter_config.json", tmp_path)  # a checkpoint itself
    assert local_directory(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank"), ({"rank": 2.5}, "rank"), ({"alpha": 0}, "alpha"), ({"dropout": 1.0}, "dropout"),
        ({"target_modules": []}, "target_modules"), ({"target_modules": [3]}, "target_modules"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(values, words):
    with pytest.raises(InputError, match=words):
        LoraConfig(**values)


def test_models_that_cannot(language_dir, tmp_path):
    model = load(language_dir)
    with pytest.raises(InputError, match="no linear layer is called 'query', there are q_proj, "):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "query"]))
    with pytest.raises(InputError, match="no LoRA adapter to save"):
        save_lora(model, tmp_path)
    apply_lora(model)
    with pytest.raises(InputError, match="already"):
        load_lora(model, PEFT)
    with pytest.raises(InputError, match="save_lora"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- the commands


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


DRAW = ["--prompt=a red circle", "--height=24", "--width=32", "--seed=1", "--vq_model_path=emu3-mini"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_merge(command, folder, mini_adapter, dtype):
    """The merged checkpoint's picture is the adapter's to the last bit, and not the model's own."""
    arguments = ["--model_path=emu3-mini", f"--lora_path={mini_adapter}", f"--dtype={dtype}"]
    code, out, err = command("merge", *arguments, "--output_path=m")
    assert (code, err) == (0, "") and out.startswith("weights: 15.5 MB before, ") and out.endswith(" wrote m\n"[1:])
    assert json.loads((folder / "m" / "config.json").read_text()).get("quantization_config") == (
        None if dtype == "float32" else {"bits": 8, "group_size": -1}
    )
    pictures = {}
    for name, options in {
        "merged": ["--model_path=m"], "adapter": arguments, "none": ["--model_path=emu3-mini"],
    }.items():  # fmt: skip
        code, _, err = command("generate", *DRAW, *options, f"--dtype={dtype}", f"--output_dir={name}")
        assert (code, err) == (0, "")
        pictures[name] = Image.open(folder / name / "result_0.png")
    assert pictures["merged"].tobytes() == pictures["adapter"].tobytes() != pictures["none"].tobytes()
    assert pictures["adapter"].text["lora_path"] == str(mini_adapter) and "lora_path" not in pictures["none"].text


def test_merge_refuses(command, folder, mini_adapter):
    def refuse(*words, **options):
        options = {"model_path": "emu3-mini", "lora_path": mini_adapter, "output_path": "m", **options}
        code, out, err = command("merge", *(f"--{name}={value}" for name, value in options.items()))
        assert (code, out) == (2, "") and err.count("\n") == 1 and all(word in err for word in words), err
        assert not (folder / "m").exists()

    refuse("no LoRA adapter at 'nowhere'", lora_path="nowhere")
    refuse("is not an empty folder", output_path=".")
    refuse("of another model", lora_path=PEFT)
    refuse("--dtype", dtype="float16")
    load("emu3-mini", "int4").save_pretrained("q")
    refuse("q is int4 already", model_path="q")


def test_answers(command, folder, mini_adapter):
    """A mistyped adapter is told of before anything is loaded."""
    arguments = ["--model_path=emu3-mini", "--dtype=float32", "--image_path=paddlemix/demo_images/emu3_scene.png"]
    ways = [], [f"--lora_path={mini_adapter}"]
    answers = [command("understand", "what is it?", *arguments, "--max_new_tokens=4", *way) for way in ways]
    assert [code for code, _, _ in answers] == [0, 0] and answers[0][1] != answers[1][1]
    code, out, err = command("understand", "what is it?", *arguments, "--lora_path=nowhere")
    assert (code, out) == (2, "") and "no LoRA adapter at 'nowhere'" in err and err.count("\n") == 1


@pytest.mark.parametrize("base", ["emu3-mini", "q"])
def test_another_adapter_does_not_go_on_with_a_drawing(command, folder, mini_adapter, monkeypatch, base):
    from paddlemix.pipelines.steps import Generation

    load("emu3-mini", "int8").save_pretrained("q")
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI_DIRECTORY / "language_model" / name, "q")

    def stop(self):
        raise KeyboardInterrupt

    arguments = ["generate", *DRAW, f"--model_path={base}"]
    with monkeypatch.context() as patch:
        patch.setattr(Generation, "images", stop)
        assert command(*arguments, f"--lora_path={mini_adapter}")[0] == 130
    code, _, err = command(*arguments, "--resume")
    assert code == 2 and "of another drawing: its checkpoint is" in err
    code, out, _ = command(*arguments, f"--lora_path={mini_adapter}", "--resume")
    assert code == 0 and "going on after" in out


def test_served_names(mini_adapter):
    from paddlemix.commands import serve

    def make(*arguments):
        return serve.make_pipelines(serve.parser().parse_args(arguments))

    lora = f"--lora_path={mini_adapter}"
    pipelines, names = make("--model_path=emu3-mini", lora)
    assert names == {"emu3-mini+mini": ["draw", "chat"]} and pipelines["emu3-mini+mini"].lora_path == str(mini_adapter)
    names = make("--model_path=emu3-mini", f"--chat_{lora[2:]}")[1]
    assert names == {"emu3-mini": ["draw"], "emu3-mini+mini": ["chat"]}
    with pytest.raises(InputError, match="no model that"):
        make("--chat_model_path=emu3-mini", lora)
    with pytest.raises(InputError, match="no LoRA adapter at 'nowhere'"):
        make("--model_path=emu3-mini", "--lora_path=nowhere")
