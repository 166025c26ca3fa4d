"""Imports point down, every library has one owner, and files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_LINES = 400

# A file imports only files of a lower rank. kernels/ stands below all that use it.
RANKS = {
    "__init__": 0,
    "errors": 0,
    "fidelity": 0,
    "networks": 0,
    "records": 0,
    "rng": 0,
    "kernels": 0,
    "spec": 1,
    "ffcv_import": 1,
    "loss": 1,
    "staging": 1,
    "store": 1,
    "averages": 2,
    "checkpoint": 2,
    "classifier": 2,
    "codec": 2,
    "compression": 2,
    "normalization": 2,
    "optimizers": 2,
    "sources": 2,
    "views": 2,
    "settings": 2,
    "dataset": 3,
    "pixels": 3,
    "sampling": 3,
    "shards": 3,
    "zoo": 3,
    "loader": 4,
    "models": 4,
    "cache": 4,
    "saved_logits": 4,
    "precompute": 5,
    "evaluate": 5,
    "processes": 5,
    "recipes": 5,
    "summary": 5,
    "picture": 5,
    "tinyvit": 5,
    "verify": 5,
    "runs": 6,
    "targets": 6,
    "train": 6,
    "demo": 6,
    "recompute": 6,
    "console": 7,
    "keeper": 7,
    "plan": 7,
    "session": 8,
    "jobs": 9,
    "exchange_commands": 10,
    "inspect_commands": 10,
    "recipe_commands": 10,
    "cache_commands": 10,
    "train_commands": 10,
    "cli": 11,
    "__main__": 12,
}

# The files that may import a library, wherever in them.
OWNERS = {
    "ffcv": {"kdcache/ffcv_import.py"},
    "zarr": {"kdcache/compression.py", "kdcache/shards.py"},
    "numcodecs": {"kdcache/shards.py"},
    "fsspec": {"kdcache/store.py"},
    "torchvision": {"kdcache/zoo.py", "kdcache/sources.py"},
    "timm": {"kdcache/zoo.py"},
    "pytorch_optimizer": {"kdcache/optimizers.py"},
    "safetensors": {"kdcache/checkpoint.py", "kdcache/models.py"},
    "typer": {
        "kdcache/cli.py",
        "kdcache/console.py",
        "kdcache/exchange_commands.py",
        "kdcache/inspect_commands.py",
        "kdcache/recipe_commands.py",
        "kdcache/cache_commands.py",
        "kdcache/train_commands.py",
    },
    "matplotlib": {"kdcache/picture.py"},
    "sklearn": {"kdcache/sources.py"},
}
KERNEL_USERS = {"kdcache/loss.py"}
LOCAL_IMPORTS_ALLOWED = {
    "kdcache/cli.py",
    "kdcache/console.py",
    "kdcache/exchange_commands.py",
    "kdcache/inspect_commands.py",
    "kdcache/recipe_commands.py",
    "kdcache/cache_commands.py",
    "kdcache/train_commands.py",
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and whether a function does it."""

    module: str
    local: bool


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
            if node.module == "kdcache":
                yield from (Import(_own(alias.name), local) for alias in node.names)
            else:
                yield Import(node.module, local)


def _own(name: str) -> str:
    """`from kdcache import x` is the module x, or else a name of the package itself."""
    return f"kdcache.{name}" if name in RANKS else "kdcache.__init__"


def library(module: str) -> str:
    return module.partition(".")[0]


MODULES = sorted((ROOT / "kdcache").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def test_every_module_has_a_rank_and_every_rank_a_module() -> None:
    assert {p.stem for p in MODULES} | {"kernels"} == set(RANKS)
    assert not [p for p in (ROOT / "kdcache").iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_imports_point_down(path: Path) -> None:
    for found in imports_of(path):
        if library(found.module) != "kdcache":
            continue
        name = found.module.split(".")[1] if "." in found.module else "__init__"
        assert RANKS[name] < RANKS[path.stem], f"{path.name} imports {found.module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_own_modules_are_imported_at_the_top(path: Path) -> None:
    local = [i.module for i in imports_of(path) if i.local and library(i.module) == "kdcache"]
    assert not local or str(path.relative_to(ROOT)) in LOCAL_IMPORTS_ALLOWED


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_library_has_one_owner(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for found in imports_of(path):
        assert name in OWNERS.get(library(found.module), {name}), f"{name}: {found.module}"
        if library(found.module) == "triton":
            assert path.parent.name == "kernels"
        if found.module.startswith("kdcache.kernels") and path.parent.name != "kernels":
            assert name in KERNEL_USERS


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_stand_alone(path: Path) -> None:
    own = [i.module for i in imports_of(path) if library(i.module) == "kdcache"]
    assert all(module.startswith("kdcache.kernels") for module in own)


def test_the_loop_does_not_know_its_teacher() -> None:
    train = {i.module for i in imports_of(ROOT / "kdcache" / "train.py")}
    assert not train & {
        "kdcache.teacher.targets",
        "kdcache.teacher.precompute",
        "kdcache.cache.cache",
    }


def test_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    ours = re.findall(r"^(?:kdcache|kernels|benchmarks)/.*\.py$", listed.stdout, re.MULTILINE)
    lines = {n: len((ROOT / n).read_text().splitlines()) for n in ours if (ROOT / n).exists()}
    lines.pop("kdcache/cli.py", None)
    assert {n: count for n, count in lines.items() if count > LIMIT_LINES} == {}


def test_these_tests_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport zarr.codecs\nfrom kdcache import cache, nothing\n"
        "if TYPE_CHECKING:\n    from kdcache.cli.app import main\n"
        "def f():\n    import ffcv\n    async def g():\n        from kdcache.data.loader import Loader\n"
    )
    assert set(imports_of(file)) == {
        Import("typing", False),
        Import("zarr.codecs", False),
        Import("kdcache.cache.cache", False),
        Import("kdcache.__init__", False),
        Import("kdcache.cli.app", False),
        Import("ffcv", True),
        Import("kdcache.data.loader", True),
    }
