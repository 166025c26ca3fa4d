"""Every command end to end on small data, as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import typer

import kdcache as package
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, RecordCodec, Sampled, TopK
from kdcache.cli import app
from kdcache.data.beton import Dataset
from kdcache.data.sources import open_source
from kdcache.training.spec import TrainSpec
from tests.conftest import TEACHER, Result, synthetic_cache

ROOT = Path(__file__).parents[1]
STUDENT = "python:tests.conftest:convolutional_student"
Run = Callable[..., Result]

VIEW = ["--view-seed", "--size", "--crop", "--min-scale", "--flip", "--no-flip", "--mixup"]
MACHINE = ["--batch-size", "--workers", "--device"]
OPTIONS = {
    "convert": ["--split", "--max-side", "--quality", "--on-error", "--allow-empty", "--json"],
    "plan": [
        "--data",
        "--teacher",
        "--teacher-output",
        "--class-names",
        "--setting",
        "--unlabeled",
        "--views",
        "--record",
        "--distortion",
        "--calibration-records",
        "--top-k",
        "--dtype",
        "--row-order",
        "--average-views",
        "--num-draws",
        "--temperature",
        "--out",
        "--student",
        "--students",
        "--epochs",
        "--precision",
        *VIEW,
        *MACHINE,
        "--json",
    ],
    "precompute": [
        "--data",
        "--teacher",
        "--teacher-output",
        "--class-names",
        "--out",
        "--setting",
        "--unlabeled",
        "--views",
        "--record",
        "--distortion",
        "--calibration-records",
        "--top-k",
        "--dtype",
        "--row-order",
        "--average-views",
        "--num-draws",
        "--temperature",
        "--part",
        "--timeout",
        "--precision",
        *VIEW,
        *MACHINE,
        "--json",
    ],
    "train": [
        "--mode",
        "--data",
        "--student",
        "--out",
        "--cache",
        "--teacher",
        "--teacher-output",
        "--class-names",
        "--val",
        "--recipe",
        "--setting",
        "--unlabeled",
        "--label-weight",
        "--epochs",
        "--optimizer",
        "--lr",
        "--weight-decay",
        "--momentum",
        "--warmup",
        "--temperature",
        "--tail",
        "--ema",
        "--ema-statistics",
        "--precision",
        "--init",
        "--seed",
        "--deterministic",
        "--compile",
        "--views",
        "--average-views",
        "--teacher-size",
        "--resume",
        "--checkpoint-every",
        "--checkpoint-minutes",
        "--max-checkpoints",
        "--eval-every",
        "--log-every",
        "--tensorboard",
        *VIEW,
        *MACHINE,
        "--json",
        "--timeout",
    ],
    "eval": [
        "--data",
        "--teacher",
        "--teacher-output",
        "--class-names",
        "--size",
        "--teacher-size",
        *MACHINE,
        "--json",
    ],
    "inspect": ["--data", "--sample", "--view", "--draw", "--json"],
    "verify": [
        "--data",
        "--teacher",
        "--teacher-output",
        "--class-names",
        "--samples",
        "--delete-damaged",
        "--precision",
        *MACHINE,
        "--json",
    ],
    "export": ["--top-k", "--json"],
    "import": ["--data", "--average-epochs", "--keys-file", "--dtype", "--json"],
    "recipes": ["--data", "--no-measure", "--device", "--json"],
    "demo": ["--out", "--epochs"],
    "bench": [],
}


# --- the surface -----------------------------------------------------------------------------


def test_the_commands_and_their_options_are_these() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    found = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o[0] == "-"}
        for name, command in commands.items()
    }
    assert found == {name: set(options) for name, options in OPTIONS.items()}


def test_help_names_every_command(kdcache: Run) -> None:
    result = kdcache("--help")
    assert result.code == 0
    assert all(re.search(rf"\n\W+{name} ", result.out) for name in OPTIONS)
    nothing = kdcache()
    assert (nothing.out + nothing.err).strip() == result.out.strip()


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_lists_its_options(kdcache: Run, command: str) -> None:
    result = kdcache(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f" {command} " in result.out.splitlines()[1]
    assert all(option in result.out for option in OPTIONS[command])


def test_version(kdcache: Run) -> None:
    assert kdcache("--version") == Result(0, f"{package.__version__}\n", "")


def test_python_m_kdcache() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"{package.__version__}\n")


WITHOUT_FFCV = """
import sys
sys.modules["ffcv"] = None
from pathlib import Path
import kdcache.losses.distillation
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, RecordCodec, Sampled, TopK
from kdcache.cli import app
assert len(LogitCache.open(Path(sys.argv[1])).read(0, 0, 4)) == 4
assert "zarr" in sys.modules
for line in (["--help"], ["inspect", sys.argv[1]], ["convert", "digits", "x.beton"]):
    sys.argv = ["kdcache", *line]
    try:
        app.main()
    except SystemExit as end:
        print("exit code", end.code)
"""


def test_caches_and_losses_need_no_ffcv(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "t", torch.zeros(1, 4, 3), top_k=3)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FFCV, tmp_path / "t"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "Usage: kdcache" in done.stdout
    assert "1 of 1 views" in done.stdout
    assert done.stdout.endswith("exit code 2\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("kdcache: reading images needs FFCV, which is not installed")


COMMAND = """
import sys
from kdcache.cli import app
sys.argv[0] = "kdcache"
try:
    app.main()
finally:
    print("loaded:", *sys.modules)
"""


def loaded_by(*line: object, folder: Path = ROOT) -> set[str]:
    """The modules that a command imports."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, line)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


FFCV = {"ffcv", "numba", "torchvision"}
HEAVY = {*FFCV, "torch", "zarr", "timm", "matplotlib", "scipy", "numpy", "PIL", "fsspec"}


@pytest.mark.parametrize("line", [["--help"], ["train", "--help"], ["bench", "loss", "--help"]])
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    loaded = loaded_by(*line)
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        (["convert", "no/folder", "x.beton"], {"numpy", "PIL"}),
        (["convert", "digits", "no/x.beton"], set()),
        (["inspect", "no.zarr"], set()),
        (["verify", "no.zarr"], set()),
        (["eval", "torchvision:resnet18", "--data", "no.beton"], set()),
        (["train", "--mode", "labels", "--data", "no.beton", "--out", "r"], set()),
        (["precompute", "--teacher", "x", "--data", "no.beton", "--out", "r"], set()),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_paths_are_checked_before_anything_heavy_is_imported(
    line: list[str], needed: set[str]
) -> None:
    loaded = loaded_by(*line)
    assert "typer" in loaded
    assert loaded & HEAVY == needed


def test_inspect_reads_a_cache_without_what_reads_images(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "t", torch.zeros(1, 4, 3), top_k=3)
    loaded = loaded_by("inspect", tmp_path / "t")
    assert "zarr" in loaded
    assert not loaded & FFCV


# --- the whole way on digits -----------------------------------------------------------------


def answer(result: Result) -> dict[str, object]:
    """The one JSON value that a command printed."""
    assert result.code == 0, result.err
    value = json.loads(result.out)
    assert isinstance(value, dict)
    return value


def test_convert(kdcache: Run, tmp_path: Path) -> None:
    out = tmp_path / "d.beton"
    found = answer(kdcache("convert", "digits", out, "--split", "test", "--json"))
    assert (found["samples"], found["classes"], found["skipped"]) == (297, 10, 0)
    assert found["bytes"] == out.stat().st_size
    assert (tmp_path / "d.beton.json").exists()


def test_images_without_labels_go_all_the_way(kdcache: Run, tmp_path: Path) -> None:
    """From a flat folder to a student, without a word about labels."""
    photos, data, cache = tmp_path / "photos", tmp_path / "d.beton", tmp_path / "t.zarr"
    photos.mkdir()
    for i, image in enumerate(open_source("digits", "test").images[:20]):
        PIL.Image.fromarray(np.asarray(image)).save(photos / f"{i:02}.png")
    (photos / "notes.txt").write_text("no image")
    found = answer(kdcache("convert", photos, data, "--json"))
    assert (found["samples"], found["classes"]) == (20, 0)
    assert (found["re_encoded"], found["ignored"]) == ({"PNG": 20}, {".txt": 1})
    assert "per_class_min" not in found
    teacher = "python:tests.test_settings:seven_classes"
    line = ("--data", data, "--teacher", teacher, "--batch-size", 10)
    assert kdcache("precompute", *line, "--out", cache).code == 0
    train = ("train", "--data", data, "--student", "kdcache:small", "--epochs", 1)
    train = (*train, "--batch-size", 10, "--size", 8)
    student = tmp_path / "run"
    result = kdcache(*train[:-2], "--mode", "cached", "--cache", cache, "--out", student)
    assert result.code == 0, result.err
    for refused in (
        (*train, "--mode", "labels", "--out", tmp_path / "x"),
        ("eval", student, "--data", data),
    ):
        result = kdcache(*refused)
        assert result.code == 2
        assert f"{data} has no labels: its images were not in class folders" in result.err


def test_convert_says_what_it_made(kdcache: Run, tmp_path: Path) -> None:
    result = kdcache("convert", "digits", tmp_path / "d.beton", "--split", "test")
    assert result.code == 0
    assert re.search(r"^samples +297 ", result.out, re.MULTILINE)
    assert re.search(r"^per_class_min +27 ", result.out, re.MULTILINE)
    assert re.search(r"^per_class_max +33 ", result.out, re.MULTILINE)


PRECOMPUTE = ("precompute", "--teacher", TEACHER, "--batch-size", 100, "--min-scale", 0.5)


@pytest.fixture
def cache(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "t.zarr"
    assert kdcache(*PRECOMPUTE, "--data", digits_test.path, "--out", path, "--views", 2).code == 0
    return path


def test_precompute(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "t.zarr"
    line = (*PRECOMPUTE, "--data", digits_test.path, "--out", path, "--views", 2, "--json")
    found = answer(kdcache(*line))
    assert (found["views"], found["views_added"], found["samples"]) == (2, 0, 297)
    assert found["record"] == "all classes, float16"
    spec = LogitCache.open(path).spec
    assert (spec.view_spec.size_px, spec.view_spec.crop, spec.view_spec.min_scale) == (
        8,
        "inception",
        0.5,
    )
    assert (spec.view_spec.flip, spec.view_spec.mixup, spec.view_spec.seed) == (True, 1.0, 0)
    again = answer(kdcache(*line))
    assert again["bytes"] == found["bytes"]


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        (["--top-k", "1", "--dtype", "uint8"], TopK(1, "uint8")),
        (["--top-k", "all", "--dtype", "float32"], Dense("float32")),
        (["--num-draws", "3", "--temperature", "2"], Sampled(3, 2.0)),
    ],
)
def test_precompute_takes_its_record_options(
    kdcache: Run, digits_test: Dataset, tmp_path: Path, options: list[str], codec: RecordCodec
) -> None:
    out = tmp_path / "t.zarr"
    line = (*PRECOMPUTE, "--data", digits_test.path, "--out", out, "--views", 1)
    assert kdcache(*line, *options).code == 0
    assert LogitCache.open(out).spec.codec == codec


def test_precompute_adds_views_to_a_cache(kdcache: Run, digits_test: Dataset, cache: Path) -> None:
    line = (*PRECOMPUTE, "--data", digits_test.path, "--out", cache, "--json", "--views")
    more = kdcache(*line, 5)
    assert "has 2 views: adding 3" in more.err
    found = answer(more)
    assert (found["views"], found["views_added"], found["shards_missing"]) == (5, 3, 0)
    fewer = kdcache(*line, 1)
    assert fewer.err == ""
    found = answer(fewer)
    assert (found["views"], found["views_added"]) == (5, 0)


def test_precompute_takes_its_view_options(
    kdcache: Run, digits_test: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "t.zarr"
    line = ("precompute", "--data", digits_test.path, "--out", out, "--views", 1)
    view = ("--crop", "center", "--no-flip", "--mixup", 0.4, "--view-seed", 9, "--size", 8)
    assert kdcache(*line, "--teacher", TEACHER, *view).code == 0
    found = LogitCache.open(out).spec.view_spec
    assert (found.crop, found.flip, found.mixup, found.seed) == ("center", False, 0.4, 9)
    assert found.min_scale == pytest.approx((7 / 8) ** 2)


def trained(kdcache: Run, data: Dataset, out: Path, *options: object) -> dict[str, object]:
    return answer(
        kdcache(
            "train",
            "--data",
            data.path,
            "--val",
            data.path,
            "--student",
            STUDENT,
            "--out",
            out,
            "--epochs",
            2,
            "--batch-size",
            98,
            "--json",
            *options,
        )
    )


def test_train_in_three_modes_then_eval(
    kdcache: Run, digits_test: Dataset, cache: Path, tmp_path: Path
) -> None:
    view = ("--min-scale", 0.5)
    labels = trained(kdcache, digits_test, tmp_path / "l", "--mode", "labels", *view)
    online = trained(
        kdcache,
        digits_test,
        tmp_path / "o",
        "--mode",
        "online",
        "--teacher",
        TEACHER,
        *view,
        "--views",
        2,
    )
    cached = trained(
        kdcache,
        digits_test,
        tmp_path / "c",
        "--mode",
        "cached",
        "--cache",
        cache,
        "--teacher",
        TEACHER,
    )
    specs = [TrainSpec.from_json(x["spec"]) for x in (labels, online, cached)]  # type: ignore[arg-type]
    assert [spec.mode for spec in specs] == ["labels", "online", "cached"]
    assert specs[0].view_spec == specs[1].view_spec == specs[2].view_spec
    assert [spec.num_views for spec in specs] == [None, 2, 2]
    assert labels["weights"] != online["weights"]
    assert "agreement" in online
    assert "agreement" in cached
    assert "agreement" not in labels
    for found, name in ((labels, "l"), (online, "o"), (cached, "c")):
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["weights"] == found["weights"]
        steps = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [s["step"] for s in steps] == [6, 6]
        assert steps[1]["evaluation"] == record["evaluation"]
    result = answer(
        kdcache("eval", f"{tmp_path / 'c'}@{STUDENT}", "--data", digits_test.path, "--json")
    )
    own = {"num_samples", "top1", "top5", "cross_entropy", "calibration_error"}
    assert {k: v for k, v in result.items() if v is not None} == {
        k: v
        for k, v in cached["evaluation"].items()
        if k in own  # type: ignore[attr-defined]
    }
    result = answer(
        kdcache(
            "eval",
            f"{tmp_path / 'c'}@{STUDENT}",
            "--data",
            digits_test.path,
            "--teacher",
            TEACHER,
            "--json",
        )
    )
    assert result == cached["evaluation"]


def test_a_run_teaches_the_next_student(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    trained(kdcache, digits_test, tmp_path / "a", "--mode", "labels")
    trained(
        kdcache,
        digits_test,
        tmp_path / "b",
        "--mode",
        "online",
        "--teacher",
        f"{tmp_path / 'a'}@{STUDENT}",
    )
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert record["teacher"] == str(tmp_path / "a")


def test_deterministic_runs_are_equal(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    runs = [
        trained(kdcache, digits_test, tmp_path / name, "--mode", "labels", "--deterministic")
        for name in ("a", "b")
    ]
    assert runs[0]["weights"] == runs[1]["weights"]


def test_train_says_what_came_of_it(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    result = kdcache(
        "train",
        "--mode",
        "labels",
        "--data",
        digits_test.path,
        "--val",
        digits_test.path,
        "--student",
        STUDENT,
        "--out",
        tmp_path / "r",
        "--epochs",
        1,
        "--batch-size",
        98,
    )
    assert result.code == 0
    assert all(word in result.out for word in ("run", "top-1", "top-5", "images_per_s", "%"))


def test_a_run_in_two_parts(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    """Its best weights are a run's folder, and its average is what it gives."""
    line = (
        "--mode",
        "labels",
        "--ema",
        0.5,
        "--optimizer",
        "sgd",
        "--lr",
        0.1,
        "--checkpoint-every",
        1,
        "--checkpoint-minutes",
        60,
        "--eval-every",
        4,
        "--log-every",
        2,
        "--max-checkpoints",
        1,
        "--resume",
        "--deterministic",
    )
    whole = trained(kdcache, digits_test, tmp_path / "whole", *line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdcache.training.run_folder.RunFolder.finish", lambda self, record, _: record
        )
        trained(kdcache, digits_test, tmp_path / "r", *line)
    assert [f.name for f in (tmp_path / "r/checkpoints").iterdir()] == ["0000000006.safetensors"]
    refused = kdcache("eval", tmp_path / "r", "--data", digits_test.path)
    assert "is not a finished run: it has no run.json" in refused.err
    again = trained(kdcache, digits_test, tmp_path / "r", *line)
    assert again["weights"] == whole["weights"]
    assert again["spec"]["ema_decay"] == 0.5  # type: ignore[index]
    best = answer(
        kdcache(
            "eval", f"{tmp_path / 'r' / 'best'}@{STUDENT}", "--data", digits_test.path, "--json"
        )
    )
    record = json.loads((tmp_path / "r" / "best" / "run.json").read_text())
    assert record["evaluation"]["top1"] == best["top1"]
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4, 4, 6, 6]
    measured = [x["evaluation"]["top1"] for x in lines if "evaluation" in x]
    assert max(measured) == best["top1"]


def test_a_run_starts_from_given_weights(
    kdcache: Run, digits_test: Dataset, tmp_path: Path
) -> None:
    first = trained(kdcache, digits_test, tmp_path / "a", "--mode", "labels")
    slow = ("--mode", "labels", "--lr", 1e-9, "--weight-decay", 0, "--init")
    for name, source in (("b", tmp_path / "a"), ("c", tmp_path / "a" / "student.safetensors")):
        again = trained(kdcache, digits_test, tmp_path / name, *slow, source)
        top1 = [x["evaluation"]["top1"] for x in (first, again)]  # type: ignore[index]
        assert top1[1] == pytest.approx(top1[0], abs=0.2)
        spec = json.loads((tmp_path / name / "spec.json").read_text())
        assert spec["initial_weights"] == first["weights"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_with_a_compiled_student(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    made = trained(kdcache, digits_test, tmp_path / "a", "--mode", "labels", "--compile")
    found = answer(kdcache("eval", tmp_path / "a", "--data", digits_test.path, "--json"))
    assert found["top1"] == pytest.approx(made["evaluation"]["top1"], abs=0.01)  # type: ignore[index]


def test_a_run_logs_for_tensorboard(kdcache: Run, digits_test: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trained(kdcache, digits_test, tmp_path / "r", "--mode", "labels", "--tensorboard")
    assert len(list((tmp_path / "r" / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_where_there_is_no_terminal_a_line_tells_now_and_then(
    kdcache: Run, digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        "train",
        "--mode",
        "labels",
        "--data",
        digits_test.path,
        "--student",
        STUDENT,
        "--epochs",
        2,
        "--batch-size",
        98,
        "--log-every",
        4,
        "--out",
    )
    assert kdcache(*line, tmp_path / "quiet").err == ""
    monkeypatch.setattr("kdcache.cli.train.LINE_S", 0.0)
    told = kdcache(*line, tmp_path / "r").err.splitlines()
    number = r"[\d,.]+"
    known = f"loss {number}, agreement {number}%, "
    forms = [
        f"kdcache: step {step} of 6: {known * (step >= 4)}{number} images/s, 0:.* left"
        for step in range(1, 7)
    ]
    assert len(told) == 6
    assert all(re.fullmatch(*pair) for pair in zip(forms, told, strict=True)), told


def test_a_run_without_val_tells_how_training_ended(
    kdcache: Run, digits_test: Dataset, tmp_path: Path
) -> None:
    line = ("train", "--mode", "labels", "--data", digits_test.path, "--student", STUDENT)
    result = kdcache(*line, "--epochs", 1, "--batch-size", 98, "--out", tmp_path / "r")
    last = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[-1])
    assert re.search(rf"training loss +{last['loss']:.4g} +\n", result.out)
    assert f"{last['agreement']:.2%}" in result.out


def test_a_teacher_that_is_a_run_is_shown_the_size_that_it_knows(
    kdcache: Run, digits_test: Dataset, tmp_path: Path
) -> None:
    small = "python:tests.conftest:any_size"
    line = ("--data", digits_test.path, "--epochs", 1, "--batch-size", 98)
    made = kdcache(
        "train",
        "--mode",
        "labels",
        "--student",
        small,
        *line,
        "--size",
        12,
        "--out",
        tmp_path / "t",
    )
    assert made.code == 0, made.err
    teacher = f"{tmp_path / 't'}@{small}"
    cache = ("precompute", "--data", digits_test.path, "--teacher", teacher, "--out")
    assert "was made for" not in kdcache(*cache, tmp_path / "own").err
    view = LogitCache.open(tmp_path / "own").spec.view_spec
    assert view is not None
    assert view.size_px == 12
    shown = kdcache(*cache, tmp_path / "other", "--size", 8)
    assert f"{teacher} was made for views of 12 px and is shown views of 8 px" in shown.err
    kdcache(
        "train",
        "--mode",
        "online",
        "--teacher",
        teacher,
        "--student",
        small,
        *line,
        "--out",
        tmp_path / "s",
    )
    assert (
        json.loads((tmp_path / "s" / "run.json").read_text())["spec"]["view_spec"]["size_px"] == 12
    )


def test_eval_says_how_good_a_model_is(kdcache: Run, digits_test: Dataset) -> None:
    result = kdcache("eval", TEACHER, "--data", digits_test.path, "--teacher", TEACHER)
    assert result.code == 0
    assert "agreement           100.00%" in result.out
    assert "KL(teacher||model)  0.0000" in result.out


def test_inspect(kdcache: Run, cache: Path) -> None:
    found = answer(kdcache("inspect", cache, "--json"))
    assert found["spec"] == LogitCache.open(cache).spec.to_json()
    assert found["info"] == LogitCache.open(cache).metadata
    summary = found["summary"]
    assert isinstance(summary, dict)
    assert (summary["views_complete"], summary["rows"]) == (2, 594)


def test_inspect_says_what_a_cache_is(kdcache: Run, cache: Path) -> None:
    result = kdcache("inspect", cache)
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "297 samples" in text
    assert "8 px, inception crop (area 0.5 to 1), flip, mixup 1, seed 0" in text
    assert "all classes, float16, 20 bytes before compression" in text
    assert "2 of 2 views, 2 of 2 shards" in text
    assert "594 records, T = 1: mean; p5, p25, p50, p75, p95" in text
    assert "nats" in text
    assert "tail mass" not in text


def test_inspect_of_an_incomplete_cache(kdcache: Run, cache: Path) -> None:
    for view in (0, 1):
        (cache / f"logits/c/{view}/0/0").unlink()
    result = kdcache("inspect", cache)
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "0 of 2 views, 0 of 2 shards" in text
    assert "coverage views 0-1 lack all" in text
    assert "entropy" not in result.out
    assert answer(kdcache("inspect", cache, "--json"))["summary"]["rows"] == 0  # type: ignore[index]


def test_inspect_with_data_says_how_right_the_teacher_was(
    kdcache: Run, cache: Path, digits_test: Dataset, digits: Dataset
) -> None:
    result = kdcache("inspect", cache, "--data", digits_test.path)
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "at the sample's own class (at least half of a mixed view)" in text
    found = answer(kdcache("inspect", cache, "--data", digits_test.path, "--json"))
    accuracy = found["summary"]["accuracy"]  # type: ignore[index]
    assert 0 < accuracy["own"] < 1
    assert 0 < accuracy["partner"] < 1
    assert answer(kdcache("inspect", cache, "--json"))["summary"]["accuracy"] is None  # type: ignore[index]
    refused = kdcache("inspect", cache, "--data", digits.path)
    assert (refused.code, refused.out) == (2, "")
    assert "was made from other data" in refused.err


def test_inspect_of_one_record(kdcache: Run, cache: Path, digits_test: Dataset) -> None:
    found = answer(kdcache("inspect", cache, "--sample", 7, "--view", 1, "--json"))
    assert (found["sample"], found["view"], found["tail"]) == (7, 1, 0)
    assert sorted(found["names"]) == sorted(digits_test.class_names)  # type: ignore[call-overload]
    assert sum(found["probabilities"]) == pytest.approx(1)  # type: ignore[call-overload]
    result = kdcache("inspect", cache, "--sample", 7, "--view", 1)
    text = " ".join(result.out.split())
    assert f"view 1, position {found['position']}" in text
    assert f"{found['names'][0]} ({found['classes'][0]})" in text  # type: ignore[index]
    assert answer(kdcache("inspect", cache, "--sample", 7, "--json"))["view"] == 0


def test_inspect_draws_the_view_of_a_record(
    kdcache: Run, cache: Path, digits_test: Dataset, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    line = ("inspect", cache, "--sample", 7, "--data", digits_test.path)
    out = tmp_path / "v.png"
    found = answer(kdcache(*line, "--draw", out, "--json"))
    assert found["picture"] == str(out)
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--view", 1], "--view and --draw go with --sample"),
        (["--draw", "x.png"], "--view and --draw go with --sample"),
        (["--sample", 0, "--draw", "x.png"], "--draw needs --data, to render the view"),
        (["--sample", 297], "sample must be 0 to 296"),
        (["--sample", 0, "--view", 2], "view must be 0 to 1"),
    ],
)
def test_inspect_refuses(kdcache: Run, cache: Path, options: list[object], words: str) -> None:
    result = kdcache("inspect", cache, *options)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_json_is_one_line(kdcache: Run, cache: Path) -> None:
    result = kdcache("inspect", cache, "--json")
    assert result.err == ""
    assert len(result.out.splitlines()) == 1


def test_progress_leaves_nothing_in_a_log(kdcache: Run, digits_test: Dataset) -> None:
    assert kdcache("eval", TEACHER, "--data", digits_test.path).err == ""
