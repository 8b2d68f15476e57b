# Licensed under the Apache License, Version 2.0; see LICENSE.
"""With the compiled operators and without: found, told of, and the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import golden, relative_error

from paddlemix import external_ops
from paddlemix.external_ops import cached_attention, few_rows_linear, winograd
from paddlemix.models.emu3 import Emu3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
COMPILED = external_ops.operators() is not None


@pytest.fixture
def without_operators():
    with external_ops.without_operators():
        yield


def warning(tmp_path, **environment):
    """What asking twice for the operators says on stderr, and what it gives."""
    code = "from paddlemix.external_ops import operators; print(operators() is operators() is not None)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stderr.splitlines(), run.stdout.strip()


def test_left_out_on_request(tmp_path):
    assert warning(tmp_path, EMU3_OPS="0") == ([], "False")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raise ModuleNotFoundError(name='emu3_ops')", "are not built"),
        ("fused_ln = 1", "are of another version (they lack fused_rms_norm, nearest_codeword"),
        ("raise ImportError('another Paddle')", "do not load (another Paddle)"),
        ("raise RuntimeError('undefined\\nsymbol')", "do not load (undefined symbol)"),
    ],
)
def test_missing_is_told_once(tmp_path, module, words):
    (tmp_path / "emu3_ops.py").write_text(module)
    lines, found = warning(tmp_path)
    assert found == "False" and len(lines) == 1 and words in lines[0] and "make ops" in lines[0]


def test_the_switch():
    found = external_ops.status()
    with external_ops.without_operators(), external_ops.without_operators():
        assert external_ops.operators() is None and external_ops.vectors() is None
        assert external_ops.status() == (None, "are left out by without_operators()")
    assert external_ops.status() == found and external_ops.operators() is found[0]


def test_the_note_names_a_command_that_is_there(monkeypatch, tmp_path):
    assert external_ops.build_command() == "make ops"
    installed = tmp_path / "site-packages" / "paddlemix" / "external_ops" / "__init__.py"
    monkeypatch.setattr(external_ops, "__file__", str(installed))
    assert external_ops.build_command() == "python -m paddlemix.external_ops.build"


needs_operators = pytest.mark.skipif(not COMPILED, reason="the operators are not built: make ops")


@needs_operators
@pytest.mark.parametrize("asked, most", [("plain", 0), ("avx2", 1), ("avx512", 3), (None, 4)])
def test_vectors(monkeypatch, asked, most):
    monkeypatch.delenv("EMU3_OPS_SIMD", raising=False)
    best = external_ops.VECTORS.index(external_ops.vectors())
    if asked:
        monkeypatch.setenv("EMU3_OPS_SIMD", asked)
    most = 1 if asked == "avx512" and best == 2 else most  # AVX-VNNI, which multiplies whole numbers
    assert external_ops.vectors() == external_ops.VECTORS[min(best, most)]


@needs_operators
def test_numbers_that_both_languages_name():
    library = external_ops._library()
    assert library.emu3_ops_version() == external_ops.VERSION
    assert library.emu3_ops_group() == few_rows_linear.GROUP
    assert library.emu3_ops_few_rows() == few_rows_linear.FEW_ROWS
    assert library.emu3_ops_most_new() == cached_attention.MOST_NEW
    assert library.emu3_ops_winograd_inputs() == winograd.INPUTS
    assert library.emu3_ops_winograd_outputs() == winograd.OUTPUTS


@needs_operators
def test_missing_memory_is_a_memory_error(tmp_path):
    """In threads too; and the next call is right."""
    compiler, here, library = shutil.which(os.environ.get("CXX") or "g++"), Path(__file__).parent, tmp_path / "no.so"
    if compiler is None:
        pytest.skip("a compiler is needed")
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", here / "no_memory.cc", "-o", library], check=True)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", here / "no_memory_script.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    counts = {name: int(count) for count, name in (line.split(maxsplit=1) for line in run.stdout.splitlines())}
    del counts["few_rows_linear, int8"]  # which packs its rows where the processor multiplies whole numbers
    assert len(counts) == 11 and min(counts.values()) > 0


@needs_operators
def test_names_that_paddlenlp_imports():
    import fast_ln
    import fused_ln

    x, scale = paddle.rand([3, 8]), paddle.rand([8])
    for norm in (fused_ln.fused_rms_norm, fast_ln.fast_rms_norm):
        y, rstd = norm(x, scale, 1e-6)
        assert (list(y.shape), list(rstd.shape)) == ([3, 8], [3])
    for norm in (fused_ln.fused_ln, fast_ln.fast_ln):
        assert [list(t.shape) for t in norm(x, scale, paddle.zeros([8]), 1e-6)] == [[3, 8], [3], [3]]


def test_golden_logits_without_operators(language_dir, without_operators):
    assert external_ops.operators() is None
    data = golden("language_model.npz")
    with paddle.no_grad():
        logits = Emu3ForCausalLM.from_pretrained(language_dir)(paddle.to_tensor(data["plain_ids"])).logits
    assert relative_error(logits.numpy(), data["plain_logits"]) < 1e-5


def test_golden_codes_without_operators(vision_model, without_operators):
    data = golden("vision_tokenizer.npz")
    with paddle.no_grad():
        codes = vision_model.encode(paddle.to_tensor(data["image"]))
    np.testing.assert_array_equal(codes.numpy(), data["image_codes"])


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [(["-S"], {}, "has no paddle"), ([], {"CXX": "ccache-of-mine g++"}, "no C++ compiler 'ccache-of-mine g++'")],
)
def test_building_without_what_it_needs(tmp_path, options, environment, words):
    setup = ROOT / "paddlemix/external_ops/setup.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *options, setup, "--version"],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and words in run.stderr


def test_the_build_command_names_what_is_missing(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CXX": "no-such-compiler"}
    command = [sys.executable, "-W", "ignore", "-m", "paddlemix.external_ops.build"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert "external_ops: no C++ compiler 'no-such-compiler'" in run.stderr.splitlines()[-1]


def test_every_source_is_packaged():
    """The wheel brings what `python setup.py install` needs."""
    from setuptools import find_namespace_packages

    sources = [p for p in (ROOT / "paddlemix/external_ops").rglob("*") if p.suffix in (".cc", ".cu", ".cuh", ".h")]
    assert len(sources) > 10
    patterns = (ROOT / "setup.py").read_text()
    packages = find_namespace_packages(str(ROOT), include=["paddlemix.*"])
    for source in sources:
        if "build" not in source.parts:
            assert f'"*{source.suffix}"' in patterns
            assert ".".join(source.parent.relative_to(ROOT).parts) in packages
