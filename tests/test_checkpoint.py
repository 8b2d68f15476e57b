# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints: every form that is read, what is written, and what is refused."""

import http.server
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import ml_dtypes
import numpy as np
import paddle
import pytest
from conftest import golden, golden_weights, relative_error, write_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from paddlemix import machine
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, Emu3VisionVQModel, checkpoint, safetensors_file

DATA = golden("language_model.npz")
IDS = paddle.to_tensor(DATA["plain_ids"])


def load(directory, **options):
    return Emu3ForCausalLM.from_pretrained(directory, **options)


def logits_of(model):
    with paddle.no_grad():
        return model(IDS).logits.numpy()


def in_shards(directory, weights, shards=3):
    """The released form: model-0000i-of-0000n.safetensors and an index."""
    names, weight_map = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink(missing_ok=True)
    return directory


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", "language_model")


# --- what is read


def test_one_file_and_shards_give_the_same(directory, tmp_path):
    one = logits_of(load(directory))
    assert relative_error(one, DATA["plain_logits"]) < 1e-5
    np.testing.assert_array_equal(logits_of(load(in_shards(directory, golden_weights("language_model")))), one)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_on_the_way(tmp_path, stored, dtype):
    weights = {name: w.astype(stored) for name, w in golden_weights("language_model").items()}
    model = load(write_checkpoint(tmp_path, "language_model", weights), dtype=dtype)
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert str(tensor.dtype) == f"paddle.{dtype}"
        expected = weights[name].astype(dtype).astype("float32")
        np.testing.assert_array_equal(tensor.astype("float32").numpy(), expected)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
def test_cast_to_float16(tmp_path, stored):
    """As a card takes it."""
    x = np.random.RandomState(0).standard_normal([37, 53]).astype(stored)
    save_file({"x": x}, tmp_path / "x.safetensors")
    read = safetensors_file.SafetensorsFile(tmp_path / "x.safetensors").read("x", "float16")
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, x.astype("float16"))


def test_dtype_as_paddle_names_it(directory):
    assert load(directory, dtype=paddle.bfloat16).dtype == paddle.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of"):
        load(directory, dtype="int16")


def test_a_large_tensor_is_read_in_parts(tmp_path, monkeypatch):
    """Odd ends, and memory handed back in between."""
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(safetensors_file, "RELEASE_BYTES", 1 << 16)
    x = np.random.RandomState(0).standard_normal([1003, 517]).astype("float32")
    scalar = np.array(7, dtype="int64")
    save_file({"a": x, "b": scalar, "c": x + 1}, tmp_path / "x.safetensors")
    file = safetensors_file.SafetensorsFile(tmp_path / "x.safetensors")
    read = []
    np.testing.assert_array_equal(file.read("c", "float32", on_bytes=read.append), x + 1)
    np.testing.assert_array_equal(file.read("a", "float16"), x.astype("float16"))
    assert file.read("b", "int64") == 7 and sum(read) == x.nbytes


def test_released_config_values_can_be_changed(directory):
    model = load(directory, attention_dropout=0.0)
    assert model.config.attention_dropout == 0.0 and not model.training
    with pytest.raises(TypeError, match="convert_from_torch"):
        load(directory, convert_from_torch=True)


# --- what is written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_saved_as_the_original_lays_it_out(directory, tmp_path, dtype, max_shard_bytes):
    out = tmp_path / "out"
    load(directory, dtype=dtype).save_pretrained(out, max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in golden_weights("language_model").values()) // (
            1 if dtype == "float32" else 2
        )
    found = {}
    for file in files:
        with safe_open(out / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        found.update({k: v.view(ml_dtypes.bfloat16) if v.dtype == "V2" else v for k, v in read_all(out / file).items()})
    expected = golden_weights("language_model")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].astype("float32"), value.astype(dtype).astype("float32"))
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == dtype and config["architectures"] == ["Emu3ForCausalLM"]
    assert oct(os.stat(out / files[0]).st_mode & 0o777) == oct(os.stat(out / "config.json").st_mode & 0o777)


def read_all(path):
    """{name: array} by the file format's own definition, bfloat16 too."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    return {
        name: np.frombuffer(data[8 + size :][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_vision_tokenizer_there_and_back(vision_dir, vision_model, tmp_path):
    vision_model.save_pretrained(tmp_path)
    before, after = load_file(vision_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


def test_saving_over_an_earlier_checkpoint_leaves_none_of_it(directory, tmp_path):
    model = load(directory)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=100_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    model.save_pretrained(tmp_path / "out", max_shard_bytes=100_000)
    np.testing.assert_array_equal(logits_of(load(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_save_that_is_cut_off_leaves_the_earlier_one(directory, tmp_path, monkeypatch, error):
    model = load(directory)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=100_000)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    model.model.norm.weight.set_value(model.model.norm.weight + 1)
    whole, calls = checkpoint.to_array, []

    def cut_off(tensor):
        calls.append(1)
        if len(calls) == 20:  # in a later shard
            raise error
        return whole(tensor)

    monkeypatch.setattr(checkpoint, "to_array", cut_off)
    with pytest.raises(type(error)):
        model.save_pretrained(tmp_path / "out", max_shard_bytes=100_000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


# --- what is refused


def refuse(directory, *words):
    with pytest.raises(ValueError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def change(directory, function):
    weights = golden_weights("language_model")
    function(weights)
    save_file(weights, directory / "model.safetensors")


def test_no_such_directory(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "directory that exists")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "directory that exists")
    (tmp_path / "file.bin").write_text("")
    refuse(tmp_path / "file.bin", "pickle")
    refuse("", "empty")
    refuse(None, "empty")


def test_no_config(directory):
    (directory / "config.json").unlink()
    refuse(directory, "config.json")


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    refuse(directory, "model.safetensors", "download")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model_state.pdparams"])
def test_pickles_are_never_loaded(directory, name):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb()))
    refuse(directory, name, "pickle", "refused")


@pytest.mark.parametrize("cut", [1, 7, 9, 100, 5000, -1])
def test_truncated(directory, cut):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refuse(directory, "model.safetensors", "truncated")


def test_missing_shard_and_wrong_index(directory):
    in_shards(directory, golden_weights("language_model"))
    (directory / "model-00002-of-00003.safetensors").unlink()
    refuse(directory, "model-00002-of-00003.safetensors")
    in_shards(directory, golden_weights("language_model"))
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    refuse(directory, "lacks lm_head.weight")
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../../x.safetensors"}}'):
        index.write_text(text)
        refuse(directory, "index" if "x.saf" not in text else "shard")


def test_missing_extra_and_wrong_tensors_are_named(directory):
    change(directory, lambda w: w.pop("model.norm.weight"))
    refuse(directory, "lacks model.norm.weight")
    change(directory, lambda w: w.update({"model.surplus": np.ones(3, "float32")}))
    refuse(directory, "model.surplus")
    change(directory, lambda w: w.update({"model.norm.weight": np.ones(65, "float32")}))
    refuse(directory, "model.norm.weight", "[65]", "[64]")
    change(directory, lambda w: w.update({"model.norm.weight": np.ones(64, "int32")}))
    refuse(directory, "model.norm.weight", "I32")
    change(directory, lambda w: w.update({"model.norm.weight": np.ones(64, "int64")}))
    refuse(directory, "model.norm.weight", "integers")


def edit(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("sharded", [False, True])
def test_layers_that_the_weights_do_not_have_are_never_made(directory, sharded, monkeypatch):
    if sharded:
        in_shards(directory, golden_weights("language_model"))
    monkeypatch.setattr(Emu3ForCausalLM, "__init__", lambda *a: pytest.fail("made"))
    for number in (2, 4, 1000):
        edit(directory, num_hidden_layers=number)
        refuse(directory, f"weights of 3 where num_hidden_layers {number}", "its config.json")
    edit(directory, num_hidden_layers=10_000)
    refuse(directory, "num_hidden_layers must be above 0 and at most 1000")


@pytest.mark.parametrize("values", [{"num_res_blocks": 32}, {"ch_mult": [1, 1, 2, 2, 4]}, {"ch_mult": [1, 2, 2]}])
def test_blocks_that_the_weights_do_not_have_are_never_made(vision_dir, values, monkeypatch):
    monkeypatch.setattr(Emu3VisionVQModel, "__init__", lambda *a: pytest.fail("made"))
    with pytest.raises(ValueError, match=f"where {next(iter(values))} .* of config.json asks for another"):
        Emu3VisionVQModel.from_pretrained(vision_dir, **values)


def test_rotary_buffers_of_old_checkpoints_are_ignored(directory):
    expected = logits_of(load(directory))
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change(directory, lambda w: w.update({name.format(i): np.ones(4, "float32") for i in range(3)}))
    np.testing.assert_array_equal(logits_of(load(directory)), expected)


def test_a_tied_head_that_differs_is_refused(directory):
    edit(directory, tie_word_embeddings=True)
    refuse(directory, "lm_head.weight, which differs from model.embed_tokens.weight", "tie_word_embeddings")
    change(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    model = load(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits_of(model)
    change(directory, lambda w: w.pop("lm_head.weight"))
    np.testing.assert_array_equal(logits_of(load(directory)), expected)


def test_weights_of_a_conversion_are_named_as_such(directory):
    weights = {name.replace("model.", "model.text_model."): w for name, w in golden_weights("language_model").items()}
    save_file(weights, directory / "model.safetensors")
    refuse(directory, "conversion for Hugging Face transformers", "take BAAI/Emu3-Gen or BAAI/Emu3-Chat")


def test_weights_that_cannot_be_read_are_not_called_truncated(directory, tmp_path):
    path, user = directory / "model.safetensors", os.geteuid()
    path.chmod(0)
    try:
        if user == 0:  # who may read all
            os.seteuid(65534)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read \(Permission denied\): check who"):
            safetensors_file.SafetensorsFile(path)
    finally:
        if user == 0:
            os.seteuid(0)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        safetensors_file.SafetensorsFile(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is truncated"):
        safetensors_file.SafetensorsFile(tmp_path / "empty")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_not_finite(directory, bad, stored):
    weights = {name: w.astype(stored) for name, w in golden_weights("language_model").items()}
    weights["model.layers.1.mlp.up_proj.weight"][77, 5] = bad
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity"):
        load(directory, dtype="bfloat16")
    with pytest.raises(ValueError, match="NaN or infinity"):
        file = safetensors_file.SafetensorsFile(directory / "model.safetensors")
        file.read("model.layers.1.mlp.up_proj.weight", "float16")
    refuse(directory, "model.layers.1.mlp.up_proj.weight", "NaN or infinity")


def test_large_finite_values_are_not_taken_for_infinity(directory):
    def enlarge(weights):
        weights["model.norm.weight"][:] = 3e38

    change(directory, enlarge)
    assert float(load(directory).model.norm.weight.max()) == np.float32(3e38)


def test_damaged_files_are_refused_or_read_never_worse(directory):
    """Random damage to the header: an InputError, or (where it hit nothing that matters) a model."""
    path = directory / "model.safetensors"
    whole, rng = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little") + 8
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load(directory)
        except ValueError as error:
            assert isinstance(error, checkpoint.InputError), repr(error)


def test_the_other_kind_of_checkpoint(vision_dir, language_dir):
    refuse(vision_dir, "Emu3VisionVQ")
    with pytest.raises(ValueError, match="'Emu3' model"):
        Emu3VisionVQModel.from_pretrained(language_dir)


def test_too_large_for_float16(directory):
    def enlarge(weights):
        weights["model.norm.weight"][3] = 1e6

    change(directory, enlarge)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*too large for float16: take bfloat16"):
        safetensors_file.SafetensorsFile(directory / "model.safetensors").read("model.norm.weight", "float16")
    assert float(load(directory, dtype="bfloat16").model.norm.weight[3]) == pytest.approx(1e6, rel=0.01)


def test_a_container_counts_files_that_were_read_as_free(tmp_path, monkeypatch):
    group = tmp_path / "cgroup"
    group.mkdir()
    files = "inactive_file 9000\nactive_file 5000"
    for name, text in {"memory.max": "16000", "memory.current": "15000", "memory.stat": f"anon 1\n{files}"}.items():
        (group / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: group if path == "/sys/fs/cgroup" else path)
    assert machine.available_memory() == 16000 - 1000
    (group / "memory.max").write_text("max")
    assert machine.available_memory() > 10**6


def test_reading_that_is_stopped(directory):
    opened = Emu3ForCausalLM.open_pretrained(directory)
    opened.stop()
    with pytest.raises(CancelledError):
        opened.read(progress=False)


def test_not_enough_memory(directory, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 100_000)
    refuse(directory, "GB of memory in float32")
    monkeypatch.setattr(machine, "available_memory", lambda: 10**10)
    with pytest.raises(ValueError, match="GB of memory for the keys and values of 100000000 tokens"):
        load(directory).make_cache(1, 100_000_000)


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache on disk, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub, name, directory):
    """What huggingface_hub leaves of a download."""
    home, commit = hub / ("models--" + name.replace("/", "--")), "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(directory, home / "snapshots" / commit)


def test_a_hub_name_from_the_cache(hub, directory):
    in_shards(directory, golden_weights("language_model"))
    cache(hub, "BAAI/Emu3-Gen", directory)
    assert relative_error(logits_of(load("BAAI/Emu3-Gen")), DATA["plain_logits"]) < 1e-5


def test_no_network_and_nothing_cached(hub):
    refuse("BAAI/Emu3-Gen", "BAAI/Emu3-Gen", "not in the local cache", "HF_HUB_OFFLINE is set")


@pytest.fixture
def server(hub, monkeypatch):
    """A hub on this machine: {revision: {file name: bytes}} of BAAI/Emu3-Gen."""
    revisions = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            parts = self.path.strip("/").split("/")
            is_api = parts[0] == "api"
            files = revisions.get(parts[5 if is_api else 3])
            status = 200 if files is not None else 503 if "down" in revisions else 404
            commit = f"{list(revisions).index(parts[5]) + 1:040x}" if is_api and status == 200 else parts[3]
            if is_api and status == 200:
                revisions[commit] = files
                body = json.dumps({"id": "BAAI/Emu3-Gen", "sha": commit, "siblings": [{"rfilename": f} for f in files]})
                body = body.encode()
            else:
                body = files[parts[4]] if files else b""
            self.send_response(status)
            error = {"X-Error-Code": "RevisionNotFound"} if status == 404 else {}
            headers = {"Content-Length": len(body), "ETag": f'"{commit}-{parts[-1]}"', "X-Repo-Commit": commit, **error}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield revisions
        server.shutdown()


def test_a_revision(server, tmp_path, monkeypatch):
    for i, revision in enumerate(("main", "v2")):
        Emu3Config(pad_token_id=i).save_pretrained(tmp_path)
        server[revision] = {"config.json": (tmp_path / "config.json").read_bytes()}
    assert Emu3Config.from_pretrained("BAAI/Emu3-Gen").pad_token_id == 0
    assert Emu3Config.from_pretrained("BAAI/Emu3-Gen@v2").pad_token_id == 1
    with pytest.raises(ValueError, match="cannot fetch BAAI/Emu3-Gen@v3: the hub has no revision 'v3'"):
        Emu3Config.from_pretrained("BAAI/Emu3-Gen", revision="v3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Emu3Config.from_pretrained("BAAI/Emu3-Gen", revision="v2").pad_token_id == 1  # from the cache
    with pytest.raises(ValueError, match="it is not in the local cache and HF_HUB_OFFLINE is set"):
        Emu3Config.from_pretrained("BAAI/Emu3-Gen@v3")
    with pytest.raises(ValueError, match="no checkpoint at 'emu3-mini@v2'"):
        Emu3Config.from_pretrained("emu3-mini", revision="v2")


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE is set", "the hub is out of reach: connect", "the hub answered 503"])
def test_a_cache_that_lacks_files(server, hub, directory, why, monkeypatch):
    """Their names, and why they are not fetched."""
    in_shards(directory, golden_weights("language_model"))
    lacking = ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    for name in lacking:
        (directory / name).unlink()
    cache(hub, "BAAI/Emu3-Gen", directory)
    if "OFFLINE" in why:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif "reach" in why:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    else:
        server["down"] = {}
    refuse("BAAI/Emu3-Gen", *lacking, "are not in the local cache and " + why)


def test_only_the_needed_files_are_asked_for(directory, monkeypatch):
    in_shards(directory, golden_weights("language_model"))
    asked = []

    def snapshot_download(name, allow_patterns, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing is cached")
        asked.extend(allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load("BAAI/Emu3-Gen")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    whole = ["model.safetensors", "model.safetensors.index.json"]
    assert asked == ["config.json", "generation_config.json", *whole, *shards]


def test_a_cached_checkpoint_needs_no_network(hub, directory, monkeypatch):
    cache(hub, "BAAI/Emu3-Gen", directory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("requests.Session.request", lambda *a, **k: pytest.fail("asked the network"))
    load("BAAI/Emu3-Gen")


def test_a_hub_that_does_not_answer(tmp_path):
    """A server that takes the connection and says nothing: an error within seconds, not never."""
    server = socket.create_server(("127.0.0.1", 0))
    script = (
        "import time; from paddlemix.models.emu3 import hub; hub.HUB_TIMEOUT = 1; start = time.time()\n"
        "try: hub.fetch('BAAI/Emu3-Gen', ['config.json'])\n"
        "except hub.InputError as error: print(error)\n"
        "assert time.time() - start < 20"
    )
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    server.close()
    assert done.returncode == 0 and "cannot fetch BAAI/Emu3-Gen" in done.stdout, done.stderr


def test_hub_errors_are_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        headers, status_code, request = {}, 404, None

    def fail(kind):
        def snapshot_download(*args, local_files_only=False, **kwargs):
            if local_files_only:
                raise LocalEntryNotFoundError("nothing is cached")
            raise kind("first line\nsecond line", response=Response()) if issubclass(kind, IOError) else kind("x\ny")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    for kind, words in [
        (errors.RepositoryNotFoundError, "no such checkpoint"),
        (errors.GatedRepoError, "login"),
        (errors.HfHubHTTPError, "first line"),
    ]:
        fail(kind)
        refuse("BAAI/Emu3-Gen", words)


def test_memory_of_the_released_model_is_told_before_anything_is_read(tmp_path, monkeypatch):
    Emu3Config().save_pretrained(tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda: 30 * 10**9)
    sizes = golden("layout-Emu3-8B.json").values()
    expected = f"{4 * sum(map(math.prod, sizes)) / 1e9:.1f} GB"
    assert re.fullmatch(r"3\d\.\d GB", expected)
    refuse(tmp_path, expected, "30.0 GB are free")
