"""Imports point down, every library has one owner, no import runs in circles, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_LINES = 400

# A package imports only packages of a lower rank; so does a module of the top level.
RANKS = {
    "errors": 0,
    "choices": 0,
    "torchrun": 1,
    "waiting": 1,
    "spec": 1,
    "files": 2,
    "paths": 1,
    "batch": 1,
    "kernels": 1,
    "options": 2,
    "views": 3,
    "data": 4,
    "losses": 4,
    "cache": 5,
    "models": 5,
    "teacher": 6,
    "evaluation": 6,
    "training": 7,
    "interop": 7,
    "cli": 8,
    "__main__": 9,
}
# `import kdcache` names all that is public, and imports it on demand.
PUBLIC = "kdcache.__init__"

# Files, or folders, that may import a library, wherever in them.
OWNERS = {
    "ffcv": ["kdcache/data/ffcv.py"],
    "numba": ["kdcache/data/", "kdcache/cache/rans.py", "kernels/"],
    "zarr": ["kdcache/cache/compression.py", "kdcache/cache/layout.py"],
    "numcodecs": ["kdcache/cache/layout.py"],
    "fsspec": ["kdcache/cache/object_store.py"],
    "torchvision": ["kdcache/models/pretrained.py", "kdcache/data/sources/torchvision_datasets.py"],
    "timm": ["kdcache/models/pretrained.py"],
    "pytorch_optimizer": ["kdcache/training/optim.py"],
    "safetensors": ["kdcache/files.py", "kdcache/training/checkpoint.py", "kdcache/models/"],
    "typer": ["kdcache/cli/"],
    "rich": ["kdcache/cli/"],
    "matplotlib": ["kdcache/cli/plots.py"],
    "sklearn": ["kdcache/data/sources/digits.py"],
    "triton": ["kernels/"],
}
# The loss is the one user of the kernels.
KERNEL_USERS = {"kdcache/losses/"}
# A command imports what it needs when it runs, so that `--help` is quick.
LOCAL_IMPORTS = {"kdcache/cli/", "kdcache/cache/compression.py"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and whether a function does it."""

    module: str
    local: bool


def name_of(path: Path) -> str:
    """kdcache/cache/store.py is kdcache.cache.store; a package is its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("kdcache", *parts) if parts[0] == "kernels" else parts)


FILES = [*sorted((ROOT / "kdcache").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]
MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file: in functions and under TYPE_CHECKING too."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        local = id(node) in inside
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, local) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (Import(_own(node.module, alias.name), local) for alias in node.names)


def _own(module: str, name: str) -> str:
    """`from a import b` is the module a.b, where there is one, else a, or a's __init__."""
    for found in (f"{module}.{name}", f"{module}.{name}.__init__", module, f"{module}.__init__"):
        if found in MODULES:
            return found
    return module


def library(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    """The package of a module, or the module itself at the top level."""
    return module.split(".")[1]


def allowed(path: Path, places: list[str] | set[str]) -> bool:
    return str(path.relative_to(ROOT)).startswith(tuple(places))


def test_every_room_has_a_rank_and_every_rank_a_room() -> None:
    assert {room(module) for module in MODULES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    if module == PUBLIC:
        return
    for found in imports_of(MODULES[module]):
        if library(found.module) != "kdcache" or found.module == PUBLIC:
            continue
        here, there = room(module), room(found.module)
        assert here == there or RANKS[there] < RANKS[here], f"{module} imports {found.module}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {i.module for i in imports_of(path) if i.module in MODULES} - {PUBLIC, module}
        for module, path in MODULES.items()
        if module != PUBLIC
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_own_modules_are_imported_at_the_top(module: str) -> None:
    path = MODULES[module]
    local = [i.module for i in imports_of(path) if i.local and library(i.module) == "kdcache"]
    kernels = room(module) == "kernels"  # triton.jit looks for a GPU when it decorates
    assert not local or kernels or allowed(path, LOCAL_IMPORTS), local


@pytest.mark.parametrize("module", MODULES)
def test_every_library_has_one_owner(module: str) -> None:
    path = MODULES[module]
    for found in imports_of(path):
        owners = OWNERS.get(library(found.module))
        assert owners is None or allowed(path, owners), f"{module}: {found.module}"
        if found.module.startswith("kdcache.kernels") and room(module) != "kernels":
            assert allowed(path, KERNEL_USERS), f"{module}: {found.module}"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "kernels"])
def test_kernels_stand_alone(module: str) -> None:
    own = [i.module for i in imports_of(MODULES[module]) if library(i.module) == "kdcache"]
    assert all(name.startswith("kdcache.kernels") for name in own)


def test_the_loop_does_not_know_its_targets_or_its_loss() -> None:
    loop = {i.module for i in imports_of(MODULES["kdcache.training.loop"])}
    assert not {m for m in loop if m.startswith(("kdcache.teacher", "kdcache.cache"))}


def test_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    ours = re.findall(r"^(?:kdcache|kernels|benchmarks)/.*\.py$", listed.stdout, re.MULTILINE)
    lines = {n: len((ROOT / n).read_text().splitlines()) for n in ours if (ROOT / n).exists()}
    assert {n: count for n, count in lines.items() if count > LIMIT_LINES} == {}


def test_these_tests_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport zarr.codecs\n"
        "from kdcache.cache import store, nothing\n"
        "if TYPE_CHECKING:\n    from kdcache.cli.app import main\n"
        "def f():\n    import ffcv\n    async def g():\n"
        "        from kdcache.data.loader import Loader\n        from kdcache import Batch\n"
    )
    assert set(imports_of(file)) == {
        Import("typing", False),
        Import("zarr.codecs", False),
        Import("kdcache.cache.store", False),
        Import("kdcache.cache.__init__", False),
        Import("kdcache.cli.app", False),
        Import("ffcv", True),
        Import("kdcache.data.loader", True),
        Import("kdcache.__init__", True),
    }
