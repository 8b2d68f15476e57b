# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The command `emu3`: its verbs, on Emu3-Mini, which comes with the package."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import golden
from PIL import Image

from paddlemix.commands.__main__ import VERBS
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, Emu3Tokenizer, Emu3VisionVQConfig, needs

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: "), (code, out, err)
    assert all(word in err for word in words), err


# --- the command itself


def test_without_a_verb_it_lists_them(command):
    code, out, err = command("")
    assert (code, err) == (0, "") and (code, out, err) == command("--help")
    for verb in VERBS:
        assert len(re.findall(rf"^  {verb} +\w", out, re.MULTILINE)) == 1


@pytest.mark.parametrize("arguments", ["--help", "generate --help"])
def test_nobody_reads_the_help(arguments):
    line = f"{sys.executable} -m paddlemix.commands {arguments} | true"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    assert subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=True).stderr == ""


def emu3(line, *flags, **environment):
    """A command line with its redirections, in a process of its own."""
    line = f"{sys.executable} {' '.join(flags)} -m paddlemix.commands {line}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("arguments", ["--help", "generate --help", "--version"])
@pytest.mark.parametrize(("streams", "reason"), [(">&-", "is closed"), (">/dev/full", "No space left")])
def test_a_result_that_cannot_be_printed(arguments, streams, reason):
    done = emu3(f"{arguments} {streams}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr, done.stderr


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_an_error_that_cannot_be_printed(streams):
    assert emu3(f"foo {streams}").returncode == 2


@pytest.mark.parametrize(("streams", "code"), [("<&- >&- 2>&-", 0), (">/dev/full 2>/dev/full", 2)])
def test_a_drawing_does_not_need_its_streams(folder, streams, code):
    """Whatever libraries print is not in the picture."""
    done = emu3(f"generate x --model_path=emu3-mini --height=16 --width=16 --preview=p.png --verbose {streams}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    for name in ("result_0.png", "p.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.size == (16, 16)


def test_python_without_docstrings(folder):
    done = emu3("generate '-OO x' --model_path=emu3-mini --height=16 --width=16", "-sOO", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(folder / "result_0.png").text["prompt"] == "-OO x"
    assert "native multimodal model" in emu3("--help", PYTHONOPTIMIZE="2").stdout


@pytest.mark.parametrize(
    ("chosen", "code", "told"),
    [("100000", 0, "note: OMP_NUM_THREADS is '100000', this process has "), ("", 0, ""),
     ("-1", 2, "error: OMP_NUM_THREADS is '-1': give a number of threads from 1 to ")],
)  # fmt: skip
def test_numbers_of_threads(chosen, code, told):
    """Neither OpenMP nor Paddle has a word to say, and none of them aborts."""
    done = emu3("info --json", OMP_NUM_THREADS=chosen)
    assert done.returncode == code and done.stderr.startswith(told) and done.stderr.count("\n") == bool(told)
    if not code:
        machine = json.loads(done.stdout)["machine"]
        assert machine["threads"] in (None, machine["cores"])


@pytest.mark.parametrize(("name", "accepted"), [("EMU3_OPS", "0, 1"), ("EMU3_OPS_SIMD", "plain, avx2, avx512, best")])
def test_unknown_settings_of_the_operators(name, accepted, monkeypatch):
    from paddlemix import external_ops

    monkeypatch.setenv(name, "off")
    with pytest.raises(ValueError, match=f"^{name} is 'off': accepted are {accepted}, or unset it$"):
        importlib.reload(external_ops)


def test_an_unknown_verb(command):
    refused(command("genrate"), "'genrate'", "did you mean generate?")
    refused(command("x"), "the verbs are generate, understand")


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_large(verb, tmp_path):
    """Which makes it quick: Paddle alone takes seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "paddlemix.commands", verb, "--help"], capture_output=True,
        text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith(f"usage: emu3 {verb} ") and re.search("--(vq_)?model_path", done.stdout)
    assert not re.search(r"\| +(paddle|numpy|PIL|paddlenlp|tqdm)$", done.stderr, re.MULTILINE)


def test_each_verb_takes_what_its_script_takes(command):
    scripts = {
        "generate": "run_generation_inference.py", "understand": "run_understanding_inference.py",
        "autoencode": "autoencode.py", "serve": "serve.py",
    }  # fmt: skip
    for verb, script in scripts.items():
        verbs, scripts = (set(re.findall(r"--\w+", command(name, "--help")[1])) for name in (verb, script))
        assert verbs == scripts


# --- generate, understand, autoencode


def test_generate(command, folder):
    """The prompt may stand by itself; the picture is the script's."""
    arguments = ["--model_path=emu3-mini", "--seed=1", "--dtype=float32", "--height=32", "--width=32"]
    code, out, err = command("generate", "a red circle", *arguments)
    assert (code, err) == (0, "") and out.endswith("wrote result_0.png\n")
    assert command("run_generation_inference.py", *arguments, "--prompt=a red circle")[0] == 0
    assert command("generate", *arguments, "a red circle")[0] == 0
    pictures = [Image.open(f"result_{i}.png") for i in range(3)]
    assert all(p.text["prompt"] == "a red circle" for p in pictures)
    assert all((np.asarray(p) == np.asarray(pictures[0])).all() for p in pictures)


def test_a_prompt_given_twice(command, folder):
    refused(command("generate", "a", "--prompt", "b"), "give prompt once", "'a'")
    refused(command("understand", "bad \udcff byte"), "--question", "not UTF-8")


def test_utf_8_where_the_locale_is_ascii(command, folder):
    """Python gives its bytes as surrogates then."""
    prompt = "un rond carm\u00e9"
    given = prompt.encode().decode("ascii", "surrogateescape")
    options = "--model_path=emu3-mini", "--height=16", "--width=16", "--seed=1"
    code, _, err = command("generate", given, "--negative_prompt", given, *options)
    assert (code, err) == (0, "") and Image.open("result_0.png").text["prompt"] == prompt


def test_understand(command, folder):
    question = "How many objects are there?"
    code, out, _ = command("understand", question, "--model_path=emu3-mini", f"--image_path={SCENE}")
    assert (code, out) == (0, "two\n")


def test_autoencode(command, folder):
    code, out, err = command("autoencode", "--model_path=emu3-mini", f"--image_path={SCENE}")
    assert (code, err) == (0, "") and out.endswith("wrote recon_image.png, recon_image_compare.png\n")


def test_out_of_memory_is_one_line(command, folder, monkeypatch):
    """Paddle's own words have many."""
    import paddle

    def too_much(*args, **options):
        paddle.empty([10**13])

    monkeypatch.setattr("paddlemix.models.emu3.Emu3VisionVQModel.encode", too_much)
    code, _, err = command("autoencode", "--model_path=emu3-mini", f"--image_path={SCENE}")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: out of memory (Fail to alloc memory of 40000000000000 size): ")


# --- quantize


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantize(command, folder, dtype):
    """The weights are those of quantizing while loading; what was asked of them is in the folder as well."""
    code, out, err = command("quantize", "--model_path=emu3-mini", "--output_path=new/q", f"--dtype={dtype}")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"weights: 15\.5 MB before, \d+\.\d MB in {dtype}\nwrote new/q\n", out)
    assert [p.name for p in (folder / "new").iterdir()] == ["q"]
    assert (folder / "new" / "q").stat().st_mode & 0o777 == 0o777 & ~current_umask()
    model, expected = Emu3ForCausalLM.from_pretrained("new/q"), Emu3ForCausalLM.from_pretrained("emu3-mini", dtype)
    assert model.weight_dtype == dtype
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (tensor.numpy() == other.numpy()).all(), name
    assert Emu3Tokenizer.from_pretrained("new/q").encode("a red") == Emu3Tokenizer.from_pretrained("emu3-mini").encode(
        "a red"
    )
    written = sum(p.stat().st_size for p in (folder / "new" / "q").glob("*.safetensors"))
    assert needs.weight_bytes(model.config, dtype) == pytest.approx(written, rel=0.01)
    refused(command("quantize", "--model_path=new/q", "--output_path=b", f"--dtype={dtype}"), f"is {dtype} already")


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_quantize_takes_generation_config_along(command, folder):
    copy_of_mini(folder / "mine")
    (folder / "mine" / "generation_config.json").write_text("{}")
    (folder / "q").mkdir()  # an empty folder may be there
    (folder / "to_empty").symlink_to("q")
    (folder / "to_none").symlink_to("new/r")
    for output in ("to_empty", "to_none", "no/../s"):
        assert command("quantize", "--model_path=mine", f"--output_path={output}", "--dtype=int8")[0] == 0
        assert (folder / output.split("/")[-1] / "generation_config.json").read_text() == "{}"
    assert (folder / "to_empty").is_symlink() and (folder / "new" / "r" / "config.json").exists()


def copy_of_mini(folder, **config):
    import shutil

    from paddlemix.models.emu3.hub import MINI_DIRECTORY

    shutil.copytree(MINI_DIRECTORY / "language_model", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def test_quantize_refuses(command, folder, monkeypatch):
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    copy_of_mini(folder / "tied", tie_word_embeddings=True)
    before = sorted(folder.rglob("*"))

    def quantize(model="emu3-mini", output="q", dtype="int8"):
        return command("quantize", f"--model_path={model}", f"--output_path={output}", f"--dtype={dtype}")

    refused(quantize(output="full"), "--output_path full", "not an empty folder")
    refused(quantize(output=""), "--output_path .", "not an empty folder")
    refused(quantize(output="full/file"), "full/file")
    refused(quantize(dtype="bfloat16"), "--dtype", "'int8', 'int4'")
    refused(quantize("tied"), "head is its embedding")
    refused(quantize("nowhere"), "no checkpoint at 'nowhere'")
    refused(command("quantize"), "required: --model_path, --output_path, --dtype")
    with monkeypatch.context() as patch:
        patch.setattr("paddlemix.machine.available_memory", lambda: 10**6)
        refused(quantize(), "GB of memory in int8", "free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 10**6}))
        refused(quantize(), "--output_path q takes", "free there")

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Emu3ForCausalLM, "save_pretrained", full)
    refused(quantize(), "No space left on device")
    assert sorted(folder.rglob("*")) == before  # nothing half


def test_a_text_that_an_option_has_swallowed(command, folder):
    models = ["--model_path=emu3-mini", "--dtype=float32"]
    refused(command("generate", *models, "--ratio", "1:1", "a red circle"), "--ratio takes 'a red circle'", "--prompt")
    refused(command("understand", *models, "--image_path", "a.png", "why?"), "--image_path takes 'why?'", "--question")


# --- info


def test_needs_are_those_of_the_released_checkpoints():
    """Worked out from config.json alone, and counted in the released files."""
    from paddlemix.models.emu3.cache import cache_bytes

    count = sum(math.prod(shape) for shape in golden("layout-Emu3-8B.json").values())
    config = Emu3Config()
    assert needs.parameters(config) == count
    assert needs.weight_bytes(config, "float32") == 4 * count and needs.weight_bytes(config, "bfloat16") == 2 * count
    assert needs.picture_tokens(config) == (720, 64 + 90 * 91 + 3)
    assert cache_bytes(config, 2 * 9216, "bfloat16") == 2 * 9216 * 2 * 32 * 1024 * 2
    layout = golden("layout-Emu3-VisionTokenizer.json")
    weights, features = needs.vision_bytes(Emu3VisionVQConfig(), 720 * 720)
    assert weights == pytest.approx(4 * sum(math.prod(shape) for shape in layout.values()), rel=1e-3)
    assert 3e9 < features < 5e9


def test_a_tied_head_counts_once():
    config = Emu3Config(tie_word_embeddings=True)
    assert needs.parameters(Emu3Config()) - needs.parameters(config) == 184622 * 4096


def test_info(command, folder):
    code, out, err = command("info")
    assert (code, err) == (0, "")
    words = [line.split()[0] for line in out.splitlines()]
    assert words == ["versions", "device", "memory", "operators", "attention", "dtypes"]
    assert "float32, bfloat16, int8, int4" in out and re.search(r"\d cores, \d+ threads", out)


def test_info_names_the_command_that_compiles_the_operators(command, folder, monkeypatch):
    from paddlemix import external_ops

    monkeypatch.setattr(external_ops, "operators", lambda: None)
    monkeypatch.setattr(external_ops, "status", lambda: (None, "are not built"), raising=False)
    code, out, _ = command("info")
    assert code == 0 and "operators   are not built; `make ops` compiles them\n" in out
    assert "attention   new tokens matrix products" in out


def test_info_of_a_checkpoint(command, folder, monkeypatch):
    code, out, err = command("info", "--model_path=emu3-mini", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found.keys() == {"versions", "machine", "checkpoint"}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    checkpoint = found["checkpoint"]
    assert checkpoint["picture"] == {"side": 64, "rows": 2, "tokens": 64 + 8 * 9 + 3}
    memory = checkpoint["memory"]
    assert list(memory) == ["float32", "bfloat16", "int8", "int4"] and all(need["fits"] for need in memory.values())
    assert memory["float32"]["weights"] == 4 * checkpoint["parameters"]
    monkeypatch.setattr("paddlemix.machine.available_memory", lambda: 10**6)
    code, out, _ = command("info", "--model_path=emu3-mini")
    assert code == 0 and out.count("does not fit") == 4


def test_info_of_what_is_not_a_language_model(command, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "Emu3VisionVQ"}))
    refused(command("info", "--model_path=."), "Emu3VisionVQ")
    refused(command("info", "--device=gpu:99"), "device 'gpu:99'")
