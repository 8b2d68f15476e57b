# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The programs of examples/, the Python of the README and of docs/, and the links of all of them."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "mini"))

from recognise import recognise

PAGES = [page for folder in ("*", "docs/*", "paddlemix/**/*") for page in sorted(ROOT.glob(f"{folder}.md"))]


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """example("generate") -> what the program prints; it is run in an empty folder, the current one."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def things(path):
    return [(t.colour, t.shape) for t in recognise(np.asarray(Image.open(path))).things]


def test_generate(example):
    out = example("generate")
    assert out.startswith("64 x 64 pixels, 75 tokens\n") and "\r75 tokens, 8 rows\n" in out
    assert things("generated.png") == [("red", "circle")]
    assert Path("preview.png").read_bytes() == Path("generated.png").read_bytes()  # the last row was drawn


def test_understand(example):
    first, answer, *_, last = example("understand").splitlines()
    assert first == "Please describe the image"
    assert answer == "a large red circle left of a large blue triangle on a white background."
    assert last == str([answer, "blue", "两个"])


def test_tokenizer(example):
    out = example("tokenizer")
    assert "64 x 64 pixels, 8 x 8 codes\n" in out and out.endswith("wrote edited.png\n")
    assert things("edited.png") == [("blue", "triangle"), ("red", "circle")]  # they have changed places


def test_batch(example):
    out = example("batch")
    assert sorted(re.findall(r"wrote (\S+)", out)) == ["request_0.png", "request_1.png", "request_2.png"]
    assert [things(f"request_{i}.png") for i in range(3)] == [
        [("red", "circle")], [("blue", "cross")], [("green", "triangle")],
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/python.md"])
def test_python_of_the_documentation(page, tmp_path, monkeypatch):
    """All of a page's Python, one piece after the other."""
    monkeypatch.chdir(tmp_path)
    pieces = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert pieces
    names = {}
    for piece in pieces:
        exec(compile(piece, page, "exec"), names)
    assert [image.size for image in (names["images"][0], names["image"])] == [(64, 64)] * 2
    assert names["answer"] == "red"


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
