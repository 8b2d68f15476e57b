# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Imports run one way: a module may import what stands before it here, and nothing imports what stands after it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "paddlemix"
# the order of docs/design.md; modules of one line may not import each other, those of one package may
ORDER = [
    ["paddlemix.utils"],
    ["paddlemix.results"],
    ["paddlemix.paddle_private"],
    ["paddlemix.machine"],
    ["paddlemix.external_ops"],
    ["paddlemix.models.emu3.hub"],
    ["paddlemix.models.emu3.configuration_emu3", "paddlemix.models.emu3.tokenization_emu3"],
    ["paddlemix.models.emu3.parallel"],
    ["paddlemix.models.emu3.safetensors_file"],
    ["paddlemix.models.emu3.adapter"],
    ["paddlemix.models.emu3.checkpoint"],
    ["paddlemix.models.emu3.image_grammar"],
    ["paddlemix.models.emu3.cache", "paddlemix.models.emu3.attention", "paddlemix.models.emu3.linear"],
    ["paddlemix.models.emu3.lora"],
    ["paddlemix.models.emu3.reused_memory"],
    ["paddlemix.models.emu3.onednn"],
    ["paddlemix.models.emu3.vision_engine"],
    ["paddlemix.models.emu3.paddlenlp_generate"],
    ["paddlemix.models.emu3.modeling_emu3", "paddlemix.models.emu3.modeling_emu3visionvq"],
    ["paddlemix.models.emu3.needs"],
    ["paddlemix.models.emu3.sampling", "paddlemix.models.emu3.windows", "paddlemix.models.emu3.cuda_graph"],
    ["paddlemix.models.emu3.sequences"],
    ["paddlemix.models.emu3.passes"],
    ["paddlemix.models.emu3.decoding"],
    ["paddlemix.models.emu3.generation_emu3", "paddlemix.models.emu3.shared_batch", "paddlemix.models.emu3.utils_emu3"],
    ["paddlemix.models.emu3", "paddlemix.models"],
    ["paddlemix.processors"],
    ["paddlemix.pipelines"],
    ["paddlemix.jobs"],
    ["paddlemix.training"],
    ["paddlemix.serving"],
    ["paddlemix.commands"],
    ["paddlemix.examples"],
]
RAY = "paddlemix.jobs.actors", "paddlemix.serving.replicas"
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = [p for p in PACKAGE.rglob("*.py") if not {"build", "modules"} & set(p.relative_to(PACKAGE).parts)]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def place(module):
    """The longest name of ORDER that the module is or is in."""
    names = [name for name in RANK if module == name or module.startswith(name + ".")]
    return max(names, key=len, default=None)


def imported(path):
    """(module, whether at the top of the file) of every import; a name out of a package counts as its module."""
    tree, package = ast.parse(path.read_text(encoding="utf-8")), module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield (full if is_module(full) else module), id(node) in top


def is_module(name):
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    module = module_of(path)
    own = place(module)
    if own is None:
        assert module in ("paddlemix", "paddlemix.demo_images.make_emu3_demo")
        return
    for name, _ in imported(path):
        if not name.startswith("paddlemix.") or place(name) == own:
            continue
        assert place(name), f"{name} has no place in ORDER"
        home = name == "paddlemix.models.emu3"  # which imports lazily: it only names the others
        assert RANK[place(name)] < RANK[own] or (home and RANK[own] > RANK[name]), f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_packages_stay_where_they_belong(path):
    module = module_of(path)
    for name, at_top in imported(path):
        root = name.split(".")[0]
        assert root != "torch", f"{module} imports {name}"
        assert root != "ray" or module in RAY, f"{module} imports {name}"
        assert root not in ("fastapi", "starlette") or module == "paddlemix.serving.app", f"{module} imports {name}"
        if root in ("paddle", "paddlenlp") and at_top:
            homes = "paddlemix.models", "paddlemix.external_ops", "paddlemix.training"
            assert place(module).startswith(homes), f"{module} imports {name}"
        if module.startswith("paddlemix.models"):
            assert root != "PIL", "a model knows ids and tensors"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_signals_and_printing_belong_to_commands(path):
    """The library raises InputError, or yields."""
    if module_of(path).startswith(("paddlemix.commands", "paddlemix.examples", "paddlemix.demo_images")):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    builds = path.parent.name == "external_ops" and path.name in ("setup.py", "build.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or builds, f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: a bare except"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None)]
            assert "signal" not in names


def test_private_names_of_paddle_stand_in_one_file():
    import re

    private = re.compile(
        r"paddle\.base\b|\b(?!self\b)\w+\._(?!_)(?:[a-z_]*hooks|num_groups|epsilon|stride|padding|share_)"
    )
    for path in FILES:
        if path.name != "paddle_private.py":
            found = private.findall(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found}"
