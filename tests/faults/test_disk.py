"""A disk that fails once, at every operation in turn: one line, and the rerun's bytes are right.

In CI every eleventh operation; each one with `make test-slow`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from kdcache.cache import layout
from kdcache.data.beton import Dataset
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, subset, synthetic_cache
from tests.faults.disk import Disk
from tests.processes import contents
from tests.test_resume import outcome

Run = Callable[..., Result]
STUDENT = "python:tests.conftest:convolutional_student"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dice = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(8):
        place = folder / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        image = PIL.Image.fromarray(dice.integers(0, 256, (20, 90, 3), np.uint8))
        image.save(place / (f"{i}.jpg" if i < 5 else f"{i}.png"))
    return folder


@pytest.fixture(scope="module")
def data(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return subset(digits_test, 64, tmp_path_factory.mktemp("data") / "d.beton")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "c"
    synthetic_cache(out, torch.randn(2, 20, 10), top_k=4, view=ViewSpec(8, mixup=0.0))
    return out


def converting(images: Path) -> tuple[Any, ...]:
    return "convert", images, "{out}/x.beton"


def recording(data: Path) -> tuple[Any, ...]:
    line = ("precompute", "--data", data, "--teacher", TEACHER, "--out", "{out}/c")
    return *line, "--views", 2, "--top-k", 4, "--batch-size", 16, "--workers", 1


def training(data: Path) -> tuple[Any, ...]:
    line = ("train", "--mode", "labels", "--data", data, "--val", data, "--student", STUDENT)
    line = (*line, "--out", "{out}/r", "--epochs", 2, "--batch-size", 16, "--workers", 1)
    options = ("--checkpoint-every", 2, "--log-every", 1, "--eval-every", 4, "--deterministic")
    return *line, *options, "--resume"


def exporting(cache: Path) -> tuple[Any, ...]:
    return "export", cache, "{out}/t"


EVERY = [11, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", ["convert", "precompute", "train", "export"])
def test_a_disk_that_fails_once_costs_nothing_but_a_rerun(
    name: str,
    every: int,
    kdcache: Run,
    images: Path,
    data: Dataset,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 256)
    monkeypatch.setattr(layout, "SHARD_BYTES", 512)
    line = {
        "convert": converting(images),
        "precompute": recording(data.path),
        "train": training(data.path),
        "export": exporting(cache),
    }[name]

    def run(out: Path, disk: Disk) -> Result:
        out.mkdir(exist_ok=True)
        with disk.at_work():
            return kdcache(*(str(word).format(out=out) for word in line))

    read = outcome if name == "train" else contents
    disk = Disk(tmp_path / "whole")
    result = run(tmp_path / "whole", disk)
    assert result.code == 0, result.err
    whole, held = read(tmp_path / "whole"), 0
    assert len(disk.done) > 10
    for fail_at in range(every - 1, len(disk.done), every):
        out = tmp_path / "out"
        failing = Disk(out, fail_at)
        result = run(out, failing)
        what = failing.done[fail_at]
        assert failing.failed
        assert "Traceback" not in result.err
        # A lock that cannot be read, for one, ends nothing.
        if result.code:
            lines = [x for x in result.err.splitlines() if "resumes after" not in x]
            assert (result.code, len(lines)) == (2, 1), (what, result)
            assert "Input/output error" in lines[0], (what, result)
            again = run(out, Disk(out))
            # Where the last name was given before the failure, there is nothing left to do.
            assert again.code == 0 or "exists" in again.err, (what, again)
        assert read(out) == whole, what
        shutil.rmtree(out)
        held += 1
    print(f"{name}: {held} of {held} failures of {len(disk.done)} operations held")
