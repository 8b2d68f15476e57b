# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The package outside a checkout: what `pip install .` installs, run from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import paddlemix

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy: setuptools writes beside what it builds. Its name and the folder of what is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "paddlemix", folder / "source" / "paddlemix", ignore=leave_out)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    # from the source archive, so that nothing is missing in that either
    commands = (
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder],
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder,
         folder / f"paddlemix_emu3-{paddlemix.__version__}.tar.gz"],
    )  # fmt: skip
    for command in commands:
        subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        file.extractall(folder / "installed")
    return path.name, folder / "installed"


def test_the_version_is_the_packages_own(wheel):
    assert wheel[0] == f"paddlemix_emu3-{paddlemix.__version__}-py3-none-any.whl"


def test_every_file_of_the_package_is_in_it(wheel):
    tracked = {path.relative_to(ROOT) for path in (ROOT / "paddlemix").rglob("*") if path.is_file()}
    built = {path for path in tracked if {"build", "__pycache__"} & set(path.parts) or ".egg-info" in str(path)}
    installed = {path.relative_to(wheel[1]) for path in wheel[1].rglob("*") if path.is_file()}
    assert tracked - built <= installed


def test_it_installs_the_command(wheel):
    [entry_points] = wheel[1].glob("*.dist-info/entry_points.txt")
    assert "emu3 = paddlemix.commands.__main__:main" in entry_points.read_text()


def test_it_runs_there(wheel, tmp_path):
    """In an empty folder; and no advice names a Makefile that is not there."""
    program = (
        "from paddlemix.commands import __main__, language_model; language_model.SLOW_BYTES = 1; "
        "__main__.main(['generate', 'a red circle', '--model_path=emu3-mini', '--height=16', '--width=16'])"
    )
    env = {**os.environ, "PYTHONPATH": str(wheel[1]), "EMU3_OPS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("wrote result_0.png\n"), done.stderr
    assert "python -m paddlemix.external_ops.build" in done.stderr and "make ops" not in done.stderr
    assert Image.open(tmp_path / "result_0.png").size == (16, 16)
