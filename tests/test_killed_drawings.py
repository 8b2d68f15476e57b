# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Drawings that are killed at moments of chance, and resumed; `make fuzz` does it a hundred times.

test_commands.py has those that are ended after their first row, in float32.
"""

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import kill_drawings
import pytest

pytestmark = pytest.mark.long
CASES = [  # dtype, moment, signal
    ("float32", "pictures", signal.SIGKILL),
    ("bfloat16", "rows", signal.SIGTERM),
    ("int8", "token file", signal.SIGKILL),
    ("int4", "rows", signal.SIGINT),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """{dtype: the folder of a drawing that was killed}; two at a time."""

    def run(case):
        (dtype, moment, how), folder = case, tmp_path_factory.mktemp("killed")
        process = kill_drawings.start(folder, dtype, kill_drawings.FORMS[1])
        kill_drawings.kill(process, folder, moment, how, random.Random(dtype))
        return folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([dtype for dtype, _, _ in CASES], pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("dtype", [dtype for dtype, _, _ in CASES])
def test_a_killed_drawing_is_resumed(command, killed, tmp_path, monkeypatch, dtype):
    """In this process, to save its start: its pictures are those of a drawing that nobody killed."""
    arguments = kill_drawings.arguments(dtype, kill_drawings.FORMS[1])
    found = []
    for folder, more in (killed[dtype], ["--resume"]), (tmp_path, []):
        monkeypatch.chdir(folder)
        assert command(*arguments, *more)[0] == 0
        found.append(kill_drawings.pictures(folder))
        assert not list(folder.glob("*.tokens.npz"))
    assert found[0] == found[1] and sorted(found[0]) == [0, 1, 2]
