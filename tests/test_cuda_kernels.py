# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The CUDA kernels compile, each by itself; what they compute is for check_cuda.py on a machine with a card."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parent.parent / "paddlemix/external_ops"
KERNELS = sorted(OPS.glob("*/*.cu"))
ARCHITECTURES = ("80", "90")


def test_there_are_kernels():
    assert {path.stem for path in KERNELS} == {"fused_ln", "nearest_codeword"}


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles(source, tmp_path):
    """For all architectures, without a warning, and with the functions that the header beside it promises."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA kernels are not compiled")
    built = tmp_path / "kernel.o"
    command = ["nvcc", "-std=c++17", "-O1", "--threads=2", "-Werror=all-warnings", "-c", str(source), f"-o={built}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (header,) = source.parent.glob("*_cuda.h")
    promised = set(re.findall(r"\bint (emu3_\w+)\(", header.read_text()))
    symbols = subprocess.run(["nm", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    assert promised and promised == set(re.findall(r" T (\w+)", symbols))


@pytest.mark.parametrize(
    ("torch", "words"),
    [("raise ImportError", "PyTorch is not installed"), ("class cuda: is_available = lambda: False", "no CUDA card")],
)
def test_what_check_cuda_lacks_is_one_line(tmp_path, torch, words):
    if "card" in words and shutil.which("nvcc") is None:
        words = "nvcc is not found"
    (tmp_path / "torch.py").write_text(torch)
    command = [sys.executable, OPS / "check_cuda.py"]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1
