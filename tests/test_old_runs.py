"""Runs that version 1 wrote: a stopped one resumes, a finished one loads."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache.cache import LogitCache
from kdcache.data.beton import Dataset, open_dataset
from kdcache.errors import UsageError
from kdcache.models import load
from kdcache.models.run_json import read_run_json, view_spec_of
from kdcache.teacher.targets import CachedTargets
from kdcache.training import identity, run_folder
from kdcache.training.loop import Progress, set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

OLD = Path(__file__).parent / "golden" / "v1" / "training"
SPEC = TrainSpec(
    "cached",
    ViewSpec(8, min_scale=0.5),
    epochs=3,
    batch_size=16,
    num_views=3,
    deterministic=True,
    decay_embeddings=True,  # as all did before version 3 of the spec
)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    path = tmp_path / "digits.beton"
    path.write_bytes(gzip.decompress((OLD / "digits.beton.gz").read_bytes()))
    shutil.copy(OLD / "digits.beton.json", tmp_path)
    return open_dataset(path)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run of 12 steps with a checkpoint of step 5."""
    shutil.copytree(OLD / "run-stopped", tmp_path / "r")
    return tmp_path / "r"


def cached_run(data: Dataset, spec: TrainSpec = SPEC) -> TrainingRun:
    cache = LogitCache.open(OLD / "cache.zarr")
    set_determinism(spec)
    name = "python:tests.conftest:any_size"
    student = load.load_model(name, "student", num_classes=10, size_px=8)
    targets = CachedTargets(cache, data.content_hash, spec.view_spec)
    return TrainingRun(spec, data, student, targets, cache=cache.manifest.identity)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def resumed(run: TrainingRun, out: Path) -> tuple[int, dict[str, Any]]:
    """The step that it resumed from, and run.json."""
    reports: list[Progress] = []
    options = RunOptions(resume=True, log_every=2, workers=1)
    record = train(run, out, options=options, report=reports.append)
    assert [p.step for p in reports] == list(range(reports[0].step, 13))
    return reports[0].step, record


def test_a_stopped_run_resumes_and_ends_as_the_uninterrupted_one(
    data: Dataset, stopped: Path
) -> None:
    step, record = resumed(cached_run(data), stopped)
    assert step == 5
    assert record["num_samples"] == len(data)
    assert record["seconds"] > 0
    expected = load_file(OLD / "run-whole" / load.WEIGHTS_FILE)
    # To rounding: PyTorch and this machine's arithmetic may differ from those of the fixture.
    torch.testing.assert_close(
        load_file(stopped / load.WEIGHTS_FILE), expected, rtol=1e-4, atol=1e-5
    )
    assert steps_of(stopped) == steps_of(OLD / "run-whole")
    assert not run_folder.checkpoints(stopped)


def test_its_checkpoint_decides_the_end(data: Dataset, stopped: Path) -> None:
    """A run that begins anew passes through other states, so the comparison above can fail."""
    shutil.rmtree(stopped / "checkpoints")
    step, _ = resumed(cached_run(data, replace(SPEC, lr=1e-2)), stopped.with_name("other"))
    assert step == 0
    expected = load_file(OLD / "run-whole" / load.WEIGHTS_FILE)
    weights = load_file(stopped.with_name("other") / load.WEIGHTS_FILE)
    assert not all(torch.allclose(weights[n], w, rtol=1e-4, atol=1e-5) for n, w in expected.items())


def test_different_options_are_refused(data: Dataset, stopped: Path) -> None:
    with pytest.raises(UsageError, match=r"\(lr: 0.01 here, 0.003 there"):
        resumed(cached_run(data, replace(SPEC, lr=1e-2)), stopped)


def test_they_have_the_default_tail(data: Dataset, stopped: Path) -> None:
    with pytest.raises(UsageError, match=r"\(tail: uniform here, bucket there"):
        resumed(cached_run(data, replace(SPEC, tail="uniform")), stopped)


@pytest.mark.parametrize("name", ["run-finished", "run-whole"])
def test_a_finished_run_loads(name: str) -> None:
    record = read_run_json(OLD / name)
    assert view_spec_of(record) == SPEC.view_spec
    assert TrainSpec.from_json(record["spec"]).epochs == 3
    model = load.load_model(
        f"{OLD / name}@{record['student']}", "teacher", num_classes=10, size_px=8
    )
    assert model.content_hash() == record["weights"]


def test_a_finished_run_is_returned_as_it_is(data: Dataset, tmp_path: Path) -> None:
    shutil.copytree(OLD / "run-whole", tmp_path / "r")
    options = RunOptions(resume=True)
    assert train(cached_run(data), tmp_path / "r", options=options) == read_run_json(
        OLD / "run-whole"
    )


@dataclass(frozen=True)
class LaterSpec(TrainSpec):
    """As a later kdcache may have it."""

    label_smoothing: float = 0.0


def test_a_new_field_with_a_default_resumes_old_runs(
    data: Dataset, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "TrainSpec", LaterSpec)
    spec = LaterSpec(**vars(SPEC))
    with pytest.raises(UsageError, match=r"\(label_smoothing: 0.1 here, 0 there"):
        resumed(cached_run(data, replace(spec, label_smoothing=0.1)), stopped)
    assert resumed(cached_run(data, spec), stopped)[0] == 5


def test_checkpoints_of_all_versions_have_the_moving_average_under_one_name(
    data: Dataset, tmp_path: Path
) -> None:
    run = cached_run(data, replace(SPEC, ema_decay=0.9))
    options = RunOptions(checkpoint_every=5, workers=1)

    class Killed(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(run, tmp_path / "r", options=options, report=kill)
    (newest,) = run_folder.checkpoints(tmp_path / "r")
    content = run_folder.checkpoint.load(newest)
    assert content["average"]["updates"] == content["step"] == 5
