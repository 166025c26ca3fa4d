"""Many processes train as one does, stop together, and say once why."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import distributed as torch_distributed
from torch import nn

from kdcache import waiting
from kdcache.cli import app
from kdcache.data.beton import Dataset, open_dataset
from kdcache.errors import KDCacheError, PeerFailed, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load
from kdcache.training import checkpoint, distributed, run_folder
from kdcache.training.distributed import SINGLE_PROCESS, ProcessGroup, is_peer_failure
from kdcache.training.spec import TrainSpec
from kdcache.views.order import view_order
from kdcache.views.spec import ViewSpec
from tests import ranks
from tests.conftest import TEACHER, Result, linear_teacher, subset
from tests.test_loader import damaged_copy, everything

STUDENT = "python:tests.test_distributed:student"
SPEC = TrainSpec("labels", ViewSpec(8), batch_size=64)


def student(num_classes: int) -> nn.Module:
    """Without dropout, which draws otherwise in each process, and without a bias that batch
    normalisation takes away: AdamW makes steps of the rounding of its gradient, which is 0."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, num_classes),
    )


def lines_of(results: list[Result]) -> list[str]:
    """What all processes say on stderr, but for notices."""
    return [line for r in results for line in r.err.splitlines() if line]


def training(data: Path, out: Path, *options: object, mode: str = "labels") -> list[object]:
    line = ["train", "--mode", mode, "--data", data, "--out", out, "--student", STUDENT]
    return [*line, "--workers", 1, "--batch-size", 32, "--json", *options]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / load.WEIGHTS_FILE)


def assert_same(found: Path, expected: Path, steps: int) -> None:
    """To rounding: weights, and the log in all but the rate."""
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-4)
    logs = []
    for run in (found, expected):
        rows = [json.loads(line) for line in (run / run_folder.LOG_FILE).read_text().splitlines()]
        logs.append([row for row in rows if "loss" in row])
    assert [row["step"] for row in logs[0]] == list(range(1, steps + 1))
    for name in ("step", "epoch", "loss", "agreement", "lr"):
        values = [[row[name] for row in rows] for rows in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


# --- shares ----------------------------------------------------------------------------------


@given(
    count=st.integers(1, 9),
    pairs=st.integers(1, 5),
    first=st.integers(0, 4),
    batches=st.integers(0, 4),
    mixup=st.booleans(),
)
def test_shares_of_a_step_are_its_batch(
    count: int, pairs: int, first: int, batches: int, mixup: bool
) -> None:
    size = count * pairs * (2 if mixup else 1)
    groups = [ProcessGroup(rank, count) for rank in range(count)]
    shares = [g.shard(range(first, first + batches), size) for g in groups]
    for number in range(batches):
        own = size // count
        step = [share[number * own : (number + 1) * own].tolist() for share in shares]
        start = (first + number) * size
        assert [p for part in step for p in part] == list(range(start, start + size))
        if mixup:
            assert all(part[0::2] == [p - 1 for p in part[1::2]] for part in step)
            assert all(p % 2 == 0 for part in step for p in part[0::2])
    assert all(len(share) == batches * size // count for share in shares)


@pytest.mark.parametrize(
    ("count", "batch", "mixup", "line"),
    [
        (
            1,
            33,
            1.0,
            "batch size must be even with mixing, not 33: a step takes whole pairs; give "
            "34, or --mixup 0",
        ),
        (2, 33, 1.0, "batch size must be even with mixing, not 33"),
        (2, 33, 0.0, r"2 processes do not divide a batch of 33 \(33 images\)"),
        (
            4,
            34,
            1.0,
            r"4 processes do not divide a batch of 34 \(17 pairs of images\): each process "
            "takes an equal shard; change --batch-size or the number of processes",
        ),
        (
            3,
            4,
            1.0,
            "3 processes are more than the 2 pairs of images of a batch of 4: start at "
            "most 2, or raise --batch-size",
        ),
        (5, 4, 0.0, "5 processes are more than the 4 images of a batch of 4"),
    ],
)
def test_shares_that_cannot_be(count: int, batch: int, mixup: float, line: str) -> None:
    spec = TrainSpec("labels", ViewSpec(8, mixup=mixup), batch_size=batch)
    with pytest.raises(UsageError, match=line):
        ProcessGroup(0, count).require_equal_shards(spec)


@pytest.mark.parametrize(
    ("count", "batch", "mixup"),
    [(1, 2, 1.0), (1, 33, 0.0), (2, 4, 1.0), (3, 6, 1.0), (4, 4, 0.0), (3, 33, 0.0)],
)
def test_shares_that_can_be(count: int, batch: int, mixup: float) -> None:
    spec = TrainSpec("labels", ViewSpec(8, mixup=mixup), batch_size=batch)
    ProcessGroup(0, count).require_equal_shards(spec)


@pytest.mark.parametrize(
    ("count", "options", "line"),
    [
        (2, ("--batch-size", 33), "batch size must be even with mixing, not 33"),
        (2, ("--batch-size", 34), "2 processes do not divide a batch of 34 (17 pairs of images)"),
        (2, ("--batch-size", 2), "2 processes are more than the 1 pairs of images of a batch of 2"),
    ],
)
def test_what_all_processes_meet_is_said_once(
    digits_test: Dataset, tmp_path: Path, count: int, options: tuple[Any, ...], line: str
) -> None:
    out = tmp_path / "run"
    found = ranks.command(count, tmp_path / "io", *training(digits_test.path, out, *options))()
    assert found[0].code == 2, found
    assert [text[: len(line) + 9] for text in lines_of(found)] == [f"kdcache: {line}"]
    assert not out.exists()


# --- one result ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    line = ["precompute", "--data", digits_test.path, "--teacher", TEACHER, "--views", 2]
    ranks.command(1, folder, *line, "--out", folder / "t")()
    return folder / "t"


@pytest.mark.parametrize(
    ("count", "mode", "options"),
    [
        (2, "cached", ()),
        (2, "labels", ("--ema", 0.9, "--optimizer", "sgd")),
        pytest.param(4, "cached", (), marks=pytest.mark.slow),
        pytest.param(4, "labels", ("--mixup", 0), marks=pytest.mark.slow),
        pytest.param(2, "online", ("--label-weight", 0.3), marks=pytest.mark.slow),
    ],
)
def test_the_result_of_one_process(
    digits_test: Dataset,
    tmp_path: Path,
    cache: Path,
    count: int,
    mode: str,
    options: tuple[Any, ...],
) -> None:
    given = {
        "cached": ("--cache", cache, "--teacher", TEACHER),
        "online": ("--teacher", TEACHER),
        "labels": (),
    }[mode]
    options = (*given, *options, "--val", digits_test.path, "--epochs", 2, "--log-every", 1)
    options = (*options, "--eval-every", 8)
    records = []
    for n in (1, count):
        out = tmp_path / str(n)
        line = training(digits_test.path, out, *options, mode=mode)
        first, *others = ranks.command(n, tmp_path / f"io{n}", *line)()
        assert [r.code for r in (first, *others)] == [0] * n, first.err
        assert not any(r.out + r.err for r in others)
        records.append(json.loads(first.out))
    one, many = tmp_path / "1", tmp_path / str(count)
    assert_same(many, one, steps=18)
    assert sorted(f.name for f in many.iterdir()) == sorted(f.name for f in one.iterdir())
    for name, value in records[0]["evaluation"].items():
        found = records[1]["evaluation"][name]
        assert found == (value and pytest.approx(value, rel=1e-2, abs=7e-3)), name


def measure(data: Path, out: Path, rank: int, count: int) -> None:
    dataset = open_dataset(data)
    network = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    judge = load.load_model(
        "python:tests.test_distributed:other_teacher", "teacher", num_classes=10, size_px=8
    )
    with ProcessGroup(rank, count) as group:
        found = evaluate(
            network,
            dataset,
            size_px=8,
            teacher=judge,
            workers=1,
            part=(rank, count),
            reduce=group.all_reduce_sums,
        )
    (out / f"{count}.{rank}").write_text(json.dumps(asdict(found)))


def other_teacher(num_classes: int) -> nn.Module:
    network = linear_teacher(num_classes)
    with torch.no_grad():
        network[1].weight.mul_(0.8).add_(0.3)
    return network


def test_an_evaluation_is_of_every_sample_once(digits_test: Dataset, tmp_path: Path) -> None:
    for count in (1, 3):
        ranks.run(count, measure, digits_test.path, tmp_path)
    one, *many = (json.loads(f.read_text()) for f in sorted(tmp_path.iterdir()))
    assert len(many) == 3
    for found in many:
        assert found == many[0]
        assert found == pytest.approx(one, rel=1e-9)
    assert 0 < one["agreement"] < 1


# --- what all agree on -----------------------------------------------------------------------


def agree(out: Path, rank: int, count: int) -> None:
    with ProcessGroup(rank, count) as group:
        answers = [
            group.all_reduce_max_async(value) for value in ((0, 0, 15, 0, 0), (0, 1, 0, 0, 2))[rank]
        ]
        told, total = group.broadcast(7 + rank), group.all_reduce_sum(torch.tensor([1.0, rank]))
        least = group.all_reduce_min(torch.tensor([float(rank), 5.0 - rank]))
        totals = group.all_reduce_sums({"b": torch.ones(2), "a": torch.tensor(float(rank))})
        group.barrier()
    found = [answers, told, total.tolist(), least.tolist(), totals["a"].item(), list(totals)]
    (out / str(rank)).write_text(json.dumps(found))


def test_what_processes_agree_on(tmp_path: Path) -> None:
    ranks.run(2, agree, tmp_path)
    expected = [[0, 0, 1, 15, 0], 7, [2.0, 1.0], [0.0, 4.0], 1.0, ["a", "b"]]
    assert [json.loads((tmp_path / str(r)).read_text()) for r in range(2)] == [expected] * 2


def test_one_process_asks_nobody() -> None:
    with ProcessGroup() as group:
        assert group.all_reduce_max_async(15) == 15
        assert group.broadcast(3) == 3
        one = torch.ones(2)
        assert group.all_reduce_sum(one) is one
        assert group.all_reduce_min(one) is one
        group.barrier()
        network = nn.Linear(2, 2)
        assert group.data_parallel(network) is network
    assert not torch_distributed.is_initialized()
    assert SINGLE_PROCESS.is_main


# --- ends ------------------------------------------------------------------------------------


def log_reaches(run: Path, step: int, commands: ranks.Commands) -> None:
    end = time.monotonic() + 60
    log = run / run_folder.LOG_FILE
    while not log.exists() or log.read_text().count("\n") < step:
        assert time.monotonic() < end
        assert all(p.is_alive() for p in commands.ranks.running), commands()
        time.sleep(0.005)


LONG = ("--epochs", 30, "--log-every", 1)
STEPS = 30 * 9


@pytest.fixture(scope="module")
def undisturbed(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    line = training(digits_test.path, folder / "run", *LONG, "--lr", 1e-3)
    [done] = ranks.command(1, folder, *line)()
    assert done.code == 0, done.err
    return folder / "run"


@pytest.mark.parametrize(("rank", "then"), [(1, 1), (0, 2)])
def test_a_sigterm_to_one_stops_all_at_one_step_and_others_go_on(
    digits_test: Dataset, tmp_path: Path, undisturbed: Path, rank: int, then: int
) -> None:
    out = tmp_path / "run"
    line = training(digits_test.path, out, *LONG, "--lr", 1e-3)
    commands = ranks.command(2, tmp_path / "io", *line)
    log_reaches(out, 5, commands)
    commands.ranks.kill(rank, signal.SIGTERM)
    found = commands()
    assert [r.code for r in found] == [128 + signal.SIGTERM] * 2
    [kept] = run_folder.checkpoints(out)
    step = checkpoint.load(kept)["step"]
    assert 5 <= step < STEPS
    said = f"kdcache: stopped after step {step}, checkpoint saved; the same command with --resume"
    assert [text[: len(said)] for text in lines_of(found)] == [said]
    again = ranks.command(then, tmp_path / "io2", *line, "--resume")()
    assert [r.code for r in again] == [0] * then, again[0].err
    assert lines_of(again) == [f"kdcache: resumes after step {step} of {STEPS}"]
    assert_same(out, undisturbed, STEPS)


def test_a_kill_of_one_ends_all_and_the_run_goes_on(
    digits_test: Dataset, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    line = training(digits_test.path, out, *LONG, "--lr", 1e-3, "--checkpoint-every", 4)
    commands = ranks.command(2, tmp_path / "io", *line)
    log_reaches(out, 9, commands)
    start = time.monotonic()
    commands.ranks.kill(1, signal.SIGKILL)
    found = commands()
    assert time.monotonic() - start < 20
    assert found[1].code == -signal.SIGKILL
    assert found[0].code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert lines_of(found) == []
    again = ranks.command(2, tmp_path / "io2", *line, "--resume")()
    assert [r.code for r in again] == [0, 0], again[0].err
    assert_same(out, undisturbed, STEPS)


def test_checkpoints_by_the_clock_of_any_process(digits_test: Dataset, tmp_path: Path) -> None:
    """Each looks at its own; all write at one step."""
    out = tmp_path / "run"
    line = training(digits_test.path, out, "--epochs", 2, "--checkpoint-minutes", 1e-9)
    found = ranks.command(2, tmp_path / "io", *line)()
    assert [r.code for r in found] == [0, 0], found[0].err


# --- failures --------------------------------------------------------------------------------


def sample_of(dataset: Dataset, position: int) -> int:
    return int(view_order(ViewSpec(8), 0, len(dataset))[position])


def test_a_damaged_sample_of_one_process_ends_all_and_is_named_once(
    digits_test: Dataset, tmp_path: Path
) -> None:
    second = 3 * 32 + 16  # the first position of the second process in step 4
    sample = sample_of(digits_test, second)
    damaged = damaged_copy(digits_test, tmp_path, sample, everything)
    out = tmp_path / "run"
    line = training(damaged.path, out, "--min-scale", 0.05, "--log-every", 1)
    found = ranks.command(2, tmp_path / "io", *line)()
    assert found[1].code == 2, found
    assert found[0].code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    [said] = lines_of(found)
    assert f"sample {sample} is damaged" in said


class _OneFails(nn.Module):
    """From its fifth step on, the second process gets NaN."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = student(num_classes)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        self.calls += len(x) == 16
        bad = os.environ.get("RANK") == "1" and self.calls >= 5
        return logits * (torch.nan if bad else 1)


def student_that_fails_one(num_classes: int) -> nn.Module:
    return _OneFails(num_classes)


def test_nan_in_one_process_stops_all_and_keeps_no_such_checkpoint(
    digits_test: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = training(digits_test.path, out, "--checkpoint-every", 1, "--log-every", 3)
    line[line.index(STUDENT)] = "python:tests.test_distributed:student_that_fails_one"
    found = ranks.command(2, tmp_path / "io", *line)()
    assert found[0].code == 2, found
    said = "kdcache: the loss is not finite at step 5: lower --lr or raise --warmup; the checkpoint"
    assert [text[: len(said)] for text in lines_of(found)] == [said]
    assert [checkpoint.load(f)["step"] for f in run_folder.checkpoints(out)] == [3, 4]
    assert [
        json.loads(x)["step"] for x in (out / run_folder.LOG_FILE).read_text().splitlines()
    ] == [3]


def test_an_error_of_the_first_process_ends_all(digits_test: Dataset, tmp_path: Path) -> None:
    """The folder is its business alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    line = training(digits_test.path, tmp_path / "run")
    found = ranks.command(2, tmp_path / "io", *line)()
    assert found[0].code == 2, found
    [said] = lines_of(found)
    assert "run exists; choose another --out, or remove it" in said


def elsewhere(folder: Path, line: list[str], rank: int, count: int) -> None:
    """Each process in a folder of its own, as on machines that share no files."""
    own = folder / f"machine{rank}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    ranks._command(folder, line, rank, count)


def test_a_folder_that_one_machine_does_not_see(digits_test: Dataset, tmp_path: Path) -> None:
    line = training(digits_test.path, Path("run"), "--epochs", 3, "--checkpoint-every", 2)
    words = [str(word) for word in (*line, "--resume", "--log-every", 1)]
    commands = ranks.Commands(ranks.start(2, elsewhere, tmp_path, words), tmp_path)
    log_reaches(tmp_path / "machine0/run", 5, commands)
    commands.ranks.kill(0, signal.SIGTERM)
    assert [r.code for r in commands()] == [143, 143]
    found = ranks.Commands(ranks.start(2, elsewhere, tmp_path, words), tmp_path)()
    assert found[1].code == 2, found
    [said] = [text for text in lines_of(found) if "resumes after" not in text]
    assert "process 1 does not see run/checkpoints/" in said
    assert said.endswith("--out must be on a file system that all machines share")


def with_unused(num_classes: int) -> nn.Module:
    network = student(num_classes)
    network.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    return network


def test_weights_that_no_step_uses(digits_test: Dataset, tmp_path: Path) -> None:
    line = training(digits_test.path, tmp_path / "run")
    line[line.index(STUDENT)] = "python:tests.test_distributed:with_unused"
    found = ranks.command(2, tmp_path / "io", *line)()
    assert found[0].code == 2, found
    [said] = set(lines_of(found))  # on a slow machine both say it
    assert said.startswith("kdcache: the student has parameters that a step does not use")


# --- what processes must have in common --------------------------------------------------------


def with_an_own(folder: Path, line: list[str], own: list[str], rank: int, count: int) -> None:
    """The second process with other options than the first one: the last one given counts."""
    ranks._command(folder, [*line, *(own if rank else [])], rank, count)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["--lr", "0.5"], "process 1 has another spec lr than process 0 (0.5, not "),
        (["--seed", "3"], "process 1 has another spec seed than process 0 (3, not 0)"),
        (["--mixup", "0"], "another spec view_spec mixup than process 0 (0, not 1)"),
        (["--student", "python:tests.conftest:any_size"], "process 1 has another student than"),
        (["--log-every", "2"], "process 1 has another log_every than process 0 (2, not "),
        (["--data", "OTHER"], "process 1 has another data than process 0"),
        (["--val", "OTHER"], "process 1 has another data to evaluate on than process 0"),
    ],
)
def test_processes_of_different_runs_do_not_train(
    digits_test: Dataset, tmp_path: Path, own: list[str], words: str
) -> None:
    other = subset(digits_test, 120, tmp_path / "other.beton")
    own = [str(other.path) if word == "OTHER" else word for word in own]
    line = [str(word) for word in training(digits_test.path, tmp_path / "run")]
    running = ranks.start(2, with_an_own, tmp_path, line, own)
    found = ranks.Commands(running, tmp_path)()
    assert found[0].code == 2, found
    [said] = set(lines_of(found))  # on a slow machine both say it
    assert words in said
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "SAID_AFTER_S", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    words = f"process 0 of 2 could not connect to the other processes at 127.0.0.1:{port}: "
    with pytest.raises(KDCacheError, match=words), ProcessGroup(0, 2, timeout_s=1):
        pass
    line = f"still waiting for all of 2 processes at 127.0.0.1:{port}, for 1 s at most"
    assert [r.getMessage() for r in caplog.records if r.name == "kdcache"] == [line]


# --- how processes meet ----------------------------------------------------------------------


def test_a_process_group_that_torchrun_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    line = "WORLD_SIZE is 2, but torchrun has not started this process .*MASTER_ADDR"
    with pytest.raises(UsageError, match=line), ProcessGroup(1, 2):
        pass


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for gpus, line in (
        (1, "2 processes on this machine are more than its 1 GPU: start 1 "),
        (0, "2 processes on this machine are more than its 0 GPU"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UsageError, match=line), ProcessGroup(0, 2, "cuda:0"):
            pass


@pytest.mark.parametrize("error", [torch_distributed.DistNetworkError, RuntimeError])
def test_nobody_to_meet(monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]) -> None:
    def unmet(backend: str, timeout: timedelta) -> None:
        raise error("the client socket has timed out\nmore")

    monkeypatch.setattr(distributed.distributed, "init_process_group", unmet)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    line = (
        "process 1 of 2 could not connect to the other processes at node0:29500: the client "
        "socket has timed out$"
    )
    with pytest.raises(KDCacheError, match=line), ProcessGroup(1, 2):
        pass


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[third_party/gloo/transport/tcp/pair.cc:5] Connection closed"), True),
        (torch_distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("CUDA out of memory"), False),
        (UsageError("gloo"), False),
        (None, False),
    ],
)
def test_what_a_process_meets_when_another_has_ended(error: Any, lost: bool) -> None:
    assert is_peer_failure(error) is lost


def test_a_lost_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed.distributed, name, lambda *_, **__: None)
    line = "process 0 of 2 ended because another process failed; see the message of that process"
    with pytest.raises(PeerFailed, match=line), ProcessGroup(0, 2):
        raise RuntimeError("gloo: Connection closed by peer")


@pytest.mark.parametrize(
    ("rank", "error", "waits_s"),
    [
        ("0", UsageError("x"), []),
        ("1", UsageError("x"), [app.OTHERS_WAIT_S]),
        ("0", PeerFailed("x"), [app.PEER_FAILED_WAIT_S]),
        ("1", PeerFailed("x"), [app.PEER_FAILED_WAIT_S]),
    ],
)
def test_the_one_that_knows_why_speaks_first(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    error: KDCacheError,
    waits_s: list[float],
) -> None:
    def fail() -> None:
        raise error

    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(app.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as end:
        app.main()
    assert (end.value.code, waited) == (2, waits_s)
    assert app.OTHERS_WAIT_S < app.PEER_FAILED_WAIT_S


# --- torchrun --------------------------------------------------------------------------------


def torchrun(*options: object) -> subprocess.Popen[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"}
    return subprocess.Popen(
        [*run, *map(str, options)],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_nodes_give_the_result_of_one_process(digits_test: Dataset, tmp_path: Path) -> None:
    options = ("--val", digits_test.path, "--epochs", 2, "--log-every", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint")
    line = training(digits_test.path, tmp_path / "two", *options)
    running = [torchrun(*nodes, f"127.0.0.1:{port}", "-m", "kdcache", *line) for _ in range(2)]
    said = [node.communicate(timeout=120) for node in running]
    assert [node.returncode for node in running] == [0, 0], said
    assert sorted(len(out.splitlines()) for out, _ in said) == [0, 1]
    assert not any("kdcache" in err or "Warning" in err for _, err in said), said
    line = training(digits_test.path, tmp_path / "one", *options)
    assert ranks.command(1, tmp_path / "io", *line)()[0].code == 0
    assert_same(tmp_path / "two", tmp_path / "one", steps=18)


@pytest.mark.slow
def test_torchrun_hands_a_sigterm_on(digits_test: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = training(digits_test.path, out, "--epochs", 3000, "--log-every", 1)
    agent = torchrun("--standalone", "--nproc-per-node", 2, "-m", "kdcache", *line)
    while not (out / run_folder.LOG_FILE).exists() and agent.poll() is None:
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    _, err = agent.communicate(timeout=60)
    assert agent.returncode == 1  # its own, whatever the processes give
    [kept] = run_folder.checkpoints(out)
    said = f"kdcache: stopped after step {checkpoint.load(kept)['step']}, checkpoint saved"
    assert [text[: len(said)] for text in err.splitlines() if "kdcache:" in text] == [said]


@pytest.mark.slow
def test_under_torchrun_the_one_that_knows_why_is_heard(
    digits_test: Dataset, tmp_path: Path
) -> None:
    sample = sample_of(digits_test, 3 * 32 + 16)
    damaged = damaged_copy(digits_test, tmp_path, sample, everything)
    line = training(damaged.path, tmp_path / "run", "--log-every", 1)
    agent = torchrun("--standalone", "--nproc-per-node", 2, "-m", "kdcache", *line)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 1
    [said] = [text for text in err.splitlines() if text.startswith("kdcache:")]
    assert f"sample {sample} is damaged" in said
