"""Killed at any moment and resumed, a run ends exactly as an uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.cache.cache import LogitCache
from kdcache.cli import app
from kdcache.data.beton import Dataset, open_dataset
from kdcache.errors import Stopped
from kdcache.models import load as models
from kdcache.teacher import targets
from kdcache.teacher.precompute import precompute
from kdcache.training import checkpoint, loop, run_folder
from kdcache.training.distributed import SINGLE_PROCESS
from kdcache.training.loop import Progress, iter_batches, open_loader, set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.spec import ViewSpec
from tests import processes
from tests.conftest import TEACHER, Result, cache_spec
from tests.test_checkpoint import same

STUDENT = "python:tests.conftest:convolutional_student"  # with batch norm and dropout
VIEW = ViewSpec(8, min_scale=0.4, seed=5)
SPEC = TrainSpec("cached", VIEW, epochs=3, batch_size=64, num_views=2, deterministic=True, seed=3)
STEPS = 12
OPTIONS = RunOptions(resume=True, checkpoint_every=3, eval_every=5, log_every=2, workers=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw cached": {"ema_decay": 0.9},
    "adamw online": {"mode": "online", "label_weight": 0.3},
    "sgd online float16": {"mode": "online", "optimizer": "sgd", "precision": "float16"},
    "soap labels": {"mode": "labels", "optimizer": "soap", "ema_decay": 0.99, "num_views": None},
    "adamw bfloat16": {"precision": "bfloat16", "temperature": 2.0},
}


class Killed(BaseException):
    """As a kill, but for what a `with` still does."""


@pytest.fixture(scope="module")
def cache(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = models.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits_test, teacher, VIEW, num_views=2, top_k=None, dtype="float32")
    out = tmp_path_factory.mktemp("cache") / "t.zarr"
    precompute(digits_test, teacher, spec, out, batch_size=64, workers=1)
    return out


def make_run(dataset: Dataset, cache: Path, spec: TrainSpec, val: bool = True) -> TrainingRun:
    set_determinism(spec)
    student = models.load_model(STUDENT, "student", num_classes=10, size_px=8)
    teacher = models.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    source: Any = targets.LabelTargets(10)
    if spec.mode == "online":
        source = targets.OnlineTargets(teacher)
    if spec.mode == "cached":
        source = targets.CachedTargets(LogitCache.open(cache), dataset.content_hash, spec.view_spec)
    return TrainingRun(
        spec, dataset, student, source, val=dataset if val else None, reference_teacher=teacher
    )


Go = Callable[..., dict[str, Any]]


@pytest.fixture
def go(digits_test: Dataset, cache: Path) -> Go:
    """Run a spec in a folder, from its last checkpoint if there is one."""

    def run(
        out: Path,
        spec: TrainSpec = SPEC,
        *,
        stop: Callable[[], int] = lambda: 0,
        report: Callable[[Progress], None] = lambda progress: None,
        **options: Any,
    ) -> dict[str, Any]:
        return train(
            make_run(digits_test, cache, spec),
            out,
            options=replace(OPTIONS, **options),
            stop=stop,
            report=report,
        )

    return run


def dies(after: int) -> Callable[[], int]:
    """For `stop`, which is called once after each step, before anything is saved."""
    asked = iter(range(1, 10_000))

    def ask() -> int:
        if next(asked) == after:
            raise Killed
        return 0

    return ask


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what tells of time."""
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    found: dict[str, Any] = {}
    for name, file in files.items():
        found[name] = file.read_bytes()
        if name.endswith("run.json"):
            found[name] = {**json.loads(found[name]), "seconds": 0, "digest": ""}
        if name.endswith(".jsonl"):
            found[name] = [{**json.loads(x), "rate": 0} for x in found[name].splitlines()]
    return found


# --- in this process: every step, every optimizer --------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_dies_again_and_again_ends_the_same(go: Go, tmp_path: Path, name: str) -> None:
    """Each of two lives makes four steps, of which three are kept: a life ends mid-epoch."""
    spec = replace(SPEC, **VARIANTS[name])
    go(tmp_path / "whole", spec)
    for _ in range(2):
        with pytest.raises(Killed):
            go(tmp_path / "cut", spec, stop=dies(4))
    assert go(tmp_path / "cut", spec)["evaluation"]["num_samples"] == 297
    whole = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "cut") == whole
    assert set(whole) == {
        "spec.json",
        "log.jsonl",
        "student.safetensors",
        "run.json",
        "best/run.json",
        "best/student.safetensors",
    }


@pytest.fixture(scope="module")
def whole(digits_test: Dataset, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run that nothing disturbed leaves."""
    out = tmp_path_factory.mktemp("whole") / "r"
    train(make_run(digits_test, cache, replace(SPEC, ema_decay=0.9)), out, options=OPTIONS)
    return outcome(out)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_that_dies_after_any_step_ends_the_same(
    go: Go, whole: Any, tmp_path: Path, step: int
) -> None:
    spec = replace(SPEC, ema_decay=0.9)
    with pytest.raises(Killed):
        go(tmp_path / "r", spec, stop=dies(step))
    reports: list[Progress] = []
    go(tmp_path / "r", spec, report=reports.append)
    saved = max(s for s in (0, 3, 5, 6, 9, 10) if s < step)
    assert reports[0] == Progress(saved, STEPS)
    assert outcome(tmp_path / "r") == whole


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_comes_back_whole(
    digits_test: Dataset, cache: Path, tmp_path: Path, name: str
) -> None:
    """What no later step may show is there too: the loss scale, sums for the log."""
    spec = replace(SPEC, **VARIANTS[name])

    this = make_run(digits_test, cache, spec)
    state, loss = State(spec, this.student), this.make_loss()
    with open_loader(this, workers=1) as loader:
        batches = iter_batches(loader, spec)
        for step in range(1, 8):
            train_step(state, this.student, next(batches), this.targets, loss, spec.lr)
            if step == 5:
                state.meter.pop_means(SINGLE_PROCESS)
    if spec.precision == "float16":
        state.scaler.update(123.0)
    checkpoint.save(tmp_path / "c", state.state_dict())
    again = State(spec, make_run(digits_test, cache, spec).student)
    assert not same(again.state_dict(), checkpoint.load(tmp_path / "c"))
    again.load_state_dict(checkpoint.load(tmp_path / "c"))
    checkpoint.save(tmp_path / "d", again.state_dict())
    assert same(checkpoint.load(tmp_path / "d"), checkpoint.load(tmp_path / "c"))
    assert again.meter.steps == 2
    assert again.state_dict()["scaler"].get("scale") == (
        123 if spec.precision == "float16" else None
    )


def test_the_log_is_of_every_logged_step_and_evaluation_in_order(whole: Any) -> None:
    lines = whole["log.jsonl"]
    steps = [(x["step"], "evaluation" in x) for x in lines]
    assert steps == [
        (2, False),
        (4, False),
        (5, True),
        (6, False),
        (8, False),
        (10, False),
        (10, True),
        (12, False),
        (12, True),
    ]
    assert set(lines[0]) == {"step", "steps", "epoch", "loss", "agreement", "lr", "rate"}


def test_how_often_to_log_and_to_keep_is_no_part_of_a_run(
    go: Go, whole: Any, tmp_path: Path
) -> None:
    spec = replace(SPEC, ema_decay=0.9)
    with pytest.raises(Killed):
        go(
            tmp_path / "r",
            spec,
            stop=dies(8),
            log_every=5,
            max_checkpoints=1,
            checkpoint_every=7,
            eval_every=None,
        )
    go(tmp_path / "r", spec, log_every=1, checkpoint_every=None, eval_every=None, workers=2)
    assert outcome(tmp_path / "r")["student.safetensors"] == whole["student.safetensors"]


def test_this_comparison_can_fail(
    go: Go, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one number of the optimizer's state lost, the end must be another."""
    load = checkpoint.load

    def lossy(path: Path) -> dict[str, Any]:
        state = load(path)
        state["optimizer"]["state"][0]["exp_avg"][0, 0, 0, 0] = 0
        return state

    spec = replace(SPEC, ema_decay=0.9)
    with pytest.raises(Killed):
        go(tmp_path / "r", spec, stop=dies(8))
    monkeypatch.setattr(checkpoint, "load", lossy)
    go(tmp_path / "r", spec)
    assert outcome(tmp_path / "r")["student.safetensors"] != whole["student.safetensors"]


@pytest.mark.parametrize("time", ["before the evaluation", "before weights", "before run.json"])
def test_a_run_that_dies_after_its_last_step_ends_the_same(
    go: Go, whole: Any, tmp_path: Path, time: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    spec = replace(SPEC, ema_decay=0.9)
    with monkeypatch.context() as patch:
        if time == "before the evaluation":
            patch.setattr(loop, "_evaluate", die)
            options = {"eval_every": None}
        else:
            options = {}
            write = run_folder._write_json

            def write_or_die(path: Path, record: dict[str, Any]) -> None:
                if path == tmp_path / "r" / "run.json":
                    die()
                write(path, record)

            if time == "before weights":
                patch.setattr(run_folder.RunFolder, "finish", die)
            else:
                patch.setattr(run_folder, "_write_json", write_or_die)
        with pytest.raises(Killed):
            go(tmp_path / "r", spec, **options)
    go(tmp_path / "r", spec)
    found = outcome(tmp_path / "r")
    assert found["student.safetensors"] == whole["student.safetensors"]
    # The run that dies before its one evaluation has no others either.
    logged = {"log_lines": 0} if time == "before the evaluation" else {}
    assert {**found["run.json"], **logged} == {**whole["run.json"], **logged}
    assert "checkpoints" not in os.listdir(tmp_path / "r")


@pytest.mark.parametrize("place", ["model", "weights", "run.json"])
@pytest.mark.parametrize("when", [1, 2])
def test_a_run_that_dies_while_it_evaluates_ends_the_same(
    go: Go, whole: Any, tmp_path: Path, place: str, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 100))
    module, name = {
        "model": (loop, "_evaluate"),
        "weights": (run_folder, "save_weights"),
        "run.json": (run_folder, "_write_json"),
    }[place]
    real = getattr(module, name)

    def die(*arguments: Any, **options: Any) -> Any:
        if not (place == "run.json" and arguments[0].name != "run.json") and next(calls) == when:
            raise Killed
        return real(*arguments, **options)

    spec = replace(SPEC, ema_decay=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(Killed):
            go(tmp_path / "r", spec)
    go(tmp_path / "r", spec)
    assert outcome(tmp_path / "r") == whole


def test_a_signal_keeps_the_step_before_its_evaluation(go: Go, whole: Any, tmp_path: Path) -> None:
    spec = replace(SPEC, ema_decay=0.9)
    for step in (5, 7):
        asked = iter([0] * (step - (5 if step > 5 else 0) - 1) + [signal.SIGTERM])
        with pytest.raises(Stopped, match=f"stopped by signal 15 after step {step}"):
            go(tmp_path / "r", spec, stop=lambda asked=asked: next(asked))
        assert max(int(p.stem) for p in run_folder.checkpoints(tmp_path / "r")) == step
    go(tmp_path / "r", spec)
    assert outcome(tmp_path / "r") == whole


def test_a_signal_at_the_last_step_lets_the_run_end(go: Go, whole: Any, tmp_path: Path) -> None:
    asked = iter([0] * (STEPS - 1) + [signal.SIGTERM])
    go(tmp_path / "r", replace(SPEC, ema_decay=0.9), stop=lambda: next(asked))
    assert outcome(tmp_path / "r") == whole


def test_a_finished_run_is_read_and_not_touched(go: Go, tmp_path: Path) -> None:
    record = go(tmp_path / "r")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "r").rglob("*")}
    assert go(tmp_path / "r", stop=dies(1)) == json.loads(json.dumps(record))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "r").rglob("*")} == before


# --- killed for real -------------------------------------------------------------------------


def _life(out: Path, data: Path, cache: Path, prepare: Callable[..., None], *args: Any) -> None:
    """A life of a run, in a process that may be killed."""
    this = make_run(open_dataset(data), cache, replace(SPEC, ema_decay=0.9))
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    prepare(out, *args)
    train(this, out, options=OPTIONS)


def _undisturbed(out: Path) -> None:
    """Nothing."""


def _die_before_change(out: Path, moment: int) -> None:
    changes = iter(range(10_000))

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if str(args[0]).startswith(str(out)) and next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _die_within_file(out: Path, size: int) -> None:
    """The kernel ends the process within the write of its first checkpoint."""
    real = checkpoint.save_tensors

    def limited(*arguments: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        real(*arguments)

    checkpoint.save_tensors = limited


@pytest.mark.timeout(1200)  # a hundred lives and more
@pytest.mark.parametrize("every", [27, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_a_file_it_ends_the_same(
    digits_test: Dataset, cache: Path, whole: Any, tmp_path: Path, every: int
) -> None:
    killed = random.Random(every).randrange(every)
    lives = 0
    while True:
        out = tmp_path / str(killed)
        code = processes.run(_life, out, digits_test.path, cache, _die_before_change, killed)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert processes.run(_life, out, digits_test.path, cache, _undisturbed) == 0
        assert outcome(out) == whole
        killed, lives = killed + every, lives + 1
    assert killed > 50
    assert outcome(out) == whole
    print(f"killed at {lives} of {killed} changes")


@pytest.mark.parametrize("size", [5_000, 60_000])
def test_killed_within_the_write_of_a_checkpoint_it_ends_the_same(
    digits_test: Dataset, cache: Path, whole: Any, tmp_path: Path, size: int
) -> None:
    out = tmp_path / "r"
    code = processes.run(_life, out, digits_test.path, cache, _die_within_file, size)
    assert code == -signal.SIGXFSZ
    left = list((out / "checkpoints").iterdir())
    assert left
    assert all(f.name.startswith(".tmp") or f.suffix == ".partial" for f in left)
    assert all(f.stat().st_size <= size for f in left)
    assert processes.run(_life, out, digits_test.path, cache, _undisturbed) == 0
    assert outcome(out) == whole


# --- the command -----------------------------------------------------------------------------


def line(mode: str, data: Dataset, cache: Path, out: Path, *options: object) -> list[object]:
    source = ["--cache", cache] if mode == "cached" else ["--teacher", TEACHER, "--views", 2]
    view = [] if mode == "cached" else ["--min-scale", 0.4, "--view-seed", 5]
    return [
        "train",
        "--mode",
        mode,
        "--data",
        data.path,
        "--student",
        STUDENT,
        "--out",
        out,
        "--epochs",
        24,
        "--batch-size",
        64,
        "--ema",
        0.9,
        "--val",
        data.path,
        "--eval-every",
        25,
        "--checkpoint-every",
        10,
        "--log-every",
        7,
        "--workers",
        1,
        "--deterministic",
        *source,
        *view,
        *options,
    ]


@pytest.fixture(scope="module")
def commanded(
    digits_test: Dataset, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """What the command leaves in a mode where nothing disturbs it."""
    known: dict[str, Any] = {}

    def get(mode: str) -> Any:
        if mode not in known:
            folder = tmp_path_factory.mktemp(mode)
            result = processes.command(folder, *line(mode, digits_test, cache, folder / "r"))()
            assert (result.code, without_wrap(result.err)) == (0, "")
            known[mode] = outcome(folder / "r")
        return known[mode]

    return get


def without_wrap(words: str) -> str:
    """Without the line that a cached run has more epochs than views."""
    return "".join(x for x in words.splitlines(keepends=True) if "trains on view e mod" not in x)


@contextlib.contextmanager
def begun(folder: Path, *words: object) -> Iterator[Any]:
    """A command that has logged a line since it began."""
    log = folder / "r" / "log.jsonl"
    before = log.read_bytes() if log.exists() else b""
    wait = processes.command(folder, *words)
    while wait.process.is_alive() and not (
        log.exists() and log.read_bytes()[len(before) :].count(b"\n")
    ):
        pass
    yield wait
    wait()


@pytest.mark.parametrize(
    ("mode", "kills"),
    [("cached", 3), *(pytest.param(m, 12, marks=pytest.mark.slow) for m in ("cached", "online"))],
)
def test_a_command_killed_at_random_moments_ends_the_same(
    digits_test: Dataset, cache: Path, commanded: Any, tmp_path: Path, mode: str, kills: int
) -> None:
    whole = commanded(mode)
    dice = random.Random(kills)
    words = line(mode, digits_test, cache, tmp_path / "r", "--resume")
    for _ in range(kills):
        wait = processes.command(tmp_path, *words)
        wait.process.join(dice.uniform(0.2, 0.7))
        wait.process.kill()
        if wait().code == 0:
            break
    result = processes.command(tmp_path, *words)()
    assert result.code == 0, result
    assert outcome(tmp_path / "r") == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_step_and_exits_as_schedulers_expect(
    digits_test: Dataset, cache: Path, commanded: Any, tmp_path: Path, number: int, code: int
) -> None:
    words = line("cached", digits_test, cache, tmp_path / "r")
    with begun(tmp_path, *words) as wait:
        os.kill(wait.process.pid, number)
        result: Result = wait()
    step = max(int(p.stem) for p in run_folder.checkpoints(tmp_path / "r"))
    said = f"kdcache: stopped after step {step}, checkpoint saved; the same command with --resume"
    assert (result.code, result.out) == (code, "")
    assert without_wrap(result.err) == f"{said} resumes from there\n"
    again = processes.command(tmp_path, *words)()
    assert again.code == 2
    assert "give --resume to resume the run in it" in again.err
    last = processes.command(tmp_path, *words, "--resume")()
    assert last.code == 0
    assert without_wrap(last.err) == f"kdcache: resumes after step {step} of 96\n"
    assert outcome(tmp_path / "r") == commanded("cached")
    more = processes.command(tmp_path, *words, "--resume")()
    assert (more.code, more.out) == (0, last.out)
    said = f"kdcache: {tmp_path / 'r'} is a finished run: there is nothing to resume\n"
    assert without_wrap(more.err) == said


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment_is_one_line(
    digits_test: Dataset, cache: Path, commanded: Any, tmp_path: Path, seed: int
) -> None:
    """From the start, while the model is loaded, to the end."""
    words = line("online", digits_test, cache, tmp_path / "r", "--resume")
    wait = processes.command(tmp_path, *words)
    wait.process.join(random.Random(seed).uniform(0.02, 0.6))
    if wait.process.exitcode is None:
        os.kill(wait.process.pid, signal.SIGINT)
    result = wait()
    assert result.code in (0, 130), result
    assert len(result.err.splitlines()) <= 1, result
    result = processes.command(tmp_path, *words)()
    assert result.code == 0, result
    assert outcome(tmp_path / "r") == commanded("online")


@pytest.mark.slow
def test_a_real_command_in_a_shell(digits_test: Dataset, cache: Path, tmp_path: Path) -> None:
    """Started, preempted, killed and finished as a scheduler would."""
    words = [str(w) for w in line("online", digits_test, cache, tmp_path / "r", "--resume")]
    codes = []
    for number in (signal.SIGTERM, signal.SIGKILL, None):
        options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "text": True}
        with subprocess.Popen(
            [sys.executable, "-m", "kdcache", *words, "--epochs", "100"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            **options,
        ) as run:
            log = tmp_path / "r" / "log.jsonl"
            before = log.read_bytes() if log.exists() else b""
            while number and run.poll() is None:
                if log.exists() and len(log.read_bytes()) > len(before) + 300:
                    run.send_signal(number)
                    break
                time.sleep(0.005)
            said = run.communicate()[1]
            assert "Traceback" not in said
            codes.append(run.returncode)
    assert codes == [143, -9, 0]
    assert models.read_run_json(tmp_path / "r")["spec"]["epochs"] == 100


def slow_teacher(num_classes: int) -> torch.nn.Module:
    """Takes a minute for a batch, but not for the first few."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes))
    calls = iter(range(1000))
    network.register_forward_pre_hook(lambda *_: time.sleep(60) if next(calls) > 8 else None)
    return network


def test_a_second_ctrl_c_does_not_wait(digits_test: Dataset, cache: Path, tmp_path: Path) -> None:
    words = line("online", digits_test, cache, tmp_path / "r", "--log-every", 1)
    words[words.index(TEACHER)] = "python:tests.test_resume:slow_teacher"
    with begun(tmp_path, *words) as wait:
        wait.process.join(0.5)
        os.kill(wait.process.pid, signal.SIGINT)
        wait.process.join(0.5)
        assert wait.process.is_alive()
        os.kill(wait.process.pid, signal.SIGINT)
        wait.process.join(20)
        result: Result = wait()
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


# --- places ----------------------------------------------------------------------------------

CANNOT = 77


def _read_only(folder: Path, words: list[object]) -> None:
    """Commands on folders that cannot be written; finished ones are read all the same."""
    if os.getuid():
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
    else:
        try:
            processes.own_mounts()
            processes.mount("--bind", folder, folder)
            processes.mount("-o", "remount,bind,ro", folder)
        except OSError as error:
            print(error)
            sys.exit(CANNOT)
    for name, wanted in (
        ("begun", (2, rf"cannot write {folder}/begun")),
        ("new", (2, rf"cannot write {folder}/new")),
        ("finished", (0, "finished is a finished run: there is nothing to resume")),
    ):
        code, said = _main(*words, "--out", folder / name)
        assert code == wanted[0], said
        assert wanted[1] in said.splitlines()[-1], said
        assert "Traceback" not in said


def _main(*words: object) -> tuple[int, str]:
    said = io.StringIO()
    sys.argv = ["kdcache", *map(str, words)]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            app.main()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def test_a_folder_that_is_read_only(digits_test: Dataset, cache: Path, tmp_path: Path) -> None:
    words = line("online", digits_test, cache, tmp_path / "folder" / "x", "--epochs", 2, "--resume")
    (tmp_path / "folder").mkdir()
    for name in ("finished", "begun"):
        out = tmp_path / "folder" / name
        assert processes.command(tmp_path, *words, "--out", out)().code == 0
    (tmp_path / "folder" / "begun" / "run.json").unlink()
    code = processes.run(_read_only, tmp_path / "folder", words)
    if code == CANNOT:
        pytest.skip("no mounts allowed here")
    assert code == 0


def _on_a_full_disk(disk: Path, words: list[object], kib: int) -> None:
    try:
        processes.own_mounts()
        processes.mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk)
    except OSError as error:
        print(error)
        sys.exit(CANNOT)
    code, said = _main(*words, "--out", disk / "r")
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert "No space left on device" in said, said
    kept = [checkpoint.load(path) for path in run_folder.checkpoints(disk / "r")]
    processes.mount("-o", "remount,size=4m", disk)
    code, said = _main(*words, "--out", disk / "r")
    assert code == 0, said
    assert ("resumes after" in said) == bool(kept), said
    shutil.copytree(disk / "r", disk.parent / "copy")


@pytest.mark.parametrize("kib", [4, 60, 200, 300])
def test_a_full_disk(
    digits_test: Dataset, cache: Path, commanded: Any, tmp_path: Path, kib: int
) -> None:
    """Full at spec.json, within the first checkpoint, within a later one, at the best weights."""
    words = line("online", digits_test, cache, tmp_path / "x", "--resume")
    (tmp_path / "disk").mkdir()
    code = processes.run(_on_a_full_disk, tmp_path / "disk", words, kib)
    if code == CANNOT:
        pytest.skip("no mounts allowed here")
    assert code == 0
    assert outcome(tmp_path / "copy") == commanded("online")
