"""The benchmark of training steps: its rivals do the same work, and its breakdown adds up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_step, breakdown, harness, page, rivals
from benchmarks.step_cases import TEACHERS, Arrays, Case, photos
from kdcache.batch import dense_target
from kdcache.data.sources import Source
from kdcache.losses.distillation import distillation_loss
from kdcache.teacher import targets

CPU = torch.device("cpu")
# torchvision's decoders, which are faster than PIL, will go; Python warns of fork beside threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*decoding and encoding capabilities:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with photos(12, 32, 2, CPU) as made:
        yield replace(made, batch_size=4)


def logits_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as the rivals prepare it, and what teacher and student say to it."""
    x = rivals.prepare(torch.stack([case.items[i][0] for i in range(4)]), CPU)
    with torch.no_grad():
        return x, case.teacher().network(x), case.student().network.train()(x)


def test_everyone_has_the_same_loss(case: Case) -> None:
    _, answers, logits = logits_of(case)
    ours = distillation_loss(logits, dense_target(answers), temperature=rivals.TEMPERATURE)
    assert ours > 0
    torch.testing.assert_close(rivals.kd_loss(logits, answers), ours)


def test_torchdistill_has_the_same_loss_and_makes_the_same_step(case: Case) -> None:
    pytest.importorskip("torchdistill")
    from benchmarks import rival_torchdistill

    x, answers, logits = logits_of(case)
    box = rival_torchdistill.box_of(case, workers=0)
    box.pre_epoch_process(epoch=0)
    loss = box.forward_process(x, torch.zeros(4, dtype=torch.int64), {})
    torch.testing.assert_close(loss.detach(), rivals.kd_loss(logits, answers))
    box.post_forward_process(loss=loss)

    student = case.student().network.train()
    optimizer = torch.optim.AdamW(
        student.parameters(), rivals.LR, weight_decay=rivals.WEIGHT_DECAY, fused=True
    )
    rivals.kd_loss(student(x), answers).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), rivals.CLIP)
    optimizer.step()
    for theirs, ours in zip(box.student_model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)
    assert box.optimizer.param_groups[0]["lr"] < rivals.LR  # its schedule moves with every step


def test_rivals_train_on_all_images_of_all_epochs(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchdistill")
    from benchmarks.rival_torchdistill import torchdistill

    seen: list[int] = []
    prepare = rivals.prepare

    def counted(images: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 32, 32))
        seen.append(len(images))
        return prepare(images, device)

    monkeypatch.setattr(rivals, "prepare", counted)
    for make in (rivals.plain, torchdistill):
        seen.clear()
        assert make(case, 0)() == case.images == 24
        assert seen == [4] * 6


def test_rivals_normalise_as_kdcache_does_and_mix_the_batch_with_its_reverse(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.stack([case.items[i][0] for i in range(4)])
    student = case.student().eval()
    monkeypatch.setattr(np.random, "beta", lambda a, b: 1.0)
    whole = rivals.prepare(images, CPU)
    torch.testing.assert_close(student.network(whole), student(images))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.75)
    torch.testing.assert_close(rivals.prepare(images, CPU), 0.75 * whole + 0.25 * whole.flip(0))
    grey = rivals.prepare(images[:, :1], CPU)
    assert grey.shape == whole.shape
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_grey_images_stay_grey_until_the_batch(case: Case) -> None:
    image = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    item, label = Arrays(Source(("a", "b"), [image], [1]), case.view)[0]
    assert (item.dtype, tuple(item.shape), label) == (torch.uint8, (1, 32, 32), 1)


def test_the_teacher_costs_four_times_the_student(case: Case) -> None:
    def operations(network: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
        return int(counter.get_total_flops())

    student, teacher = case.student().network, case.teacher().network
    assert operations(teacher) == TEACHERS * operations(student) > 0


def span(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def step_at(ts: float) -> list[dict[str, Any]]:
    """The loop's ranges, 100 us each; the next step begins 50 us after the last one's end."""
    names = breakdown.RANGES
    return [span("user_annotation", n, ts + 100 * i, 100) for i, n in enumerate(names)]


def test_on_the_host_a_range_takes_its_time() -> None:
    waits = [span("user_annotation", "wait", at + 10, 30) for at in (0, 650)]
    other = [span("cpu_op", "load", 0, 900), span("user_annotation", "mine", 0, 900)]
    events = [*step_at(650), *other, *waits, *step_at(0)]
    found = breakdown.on_host(events, cache_wait_us=20)
    assert found.steps == 2
    assert found.step_ms == pytest.approx(0.625)
    assert found.ranges_ms == dict.fromkeys(breakdown.RANGES, pytest.approx(0.1))
    assert found.wait_ms == pytest.approx(0.04)
    shares = found.line("% of the step")
    assert (shares["load"], shares["other"]) == (pytest.approx(16), pytest.approx(4))
    assert (shares["step"], shares["wait"]) == (pytest.approx(100), pytest.approx(6.4))


def test_on_a_device_work_belongs_to_the_range_that_launched_it() -> None:
    events = [*step_at(0), *step_at(650)]

    def work(number: int, launched: float, begin: float, dur: float, cat: str = "kernel") -> None:
        launch = "gpu_" not in cat and number % 2
        events.append(
            span(
                "cuda_driver" if launch else "cuda_runtime",
                "launch",
                launched,
                1,
                correlation=number,
            )
        )
        events.append(span(cat, "work", begin, dur, correlation=number))

    work(1, 50, 60, 500, "gpu_memcpy")  # load: idle as for kernels
    work(2, 150, 160, 40)  # target
    work(3, 250, 260, 60)  # forward, 60 us after the target
    work(4, 450, 600, 100)  # backward; its gap is the host's
    work(5, 550, 700, 20)  # optimizer
    work(6, 800, 860, 10, "gpu_memcpy")  # a copy of targets is waiting
    work(7, 900, 960, 60)  # forward of the next step, 240 us after the optimizer
    work(8, 901, 1030, 10)  # and another of it
    work(9, 2000, 2000, 500)  # of no range
    found = breakdown.on_device(events)
    assert found.ranges_ms == {
        "load": pytest.approx(0.25),
        "target": pytest.approx(0.025),
        "forward": pytest.approx(0.065),
        "loss": 0,
        "backward": pytest.approx(0.05),
        "optimizer": pytest.approx(0.01),
    }
    assert found.wait_ms == pytest.approx((60 + 240) / 2 / 1e3)


def test_the_breakdown_of_a_real_run_adds_up(case: Case, tmp_path: Path) -> None:
    teacher = case.teacher()
    cache = bench_step.record(case, teacher, tmp_path / "cache.zarr")
    for mode, source in bench_step.sources(case, teacher, cache).items():
        cached = source if isinstance(source, targets.CachedTargets) else None
        run = bench_step.training(case, mode, source)
        found = breakdown.measure(run, CPU, cached)
        assert found.steps == 6
        assert all(value > 0 for value in found.ranges_ms.values())
        assert sum(found.ranges_ms.values()) <= found.step_ms
        assert 0 < found.wait_ms <= found.ranges_ms["load"] + found.ranges_ms["target"]


def test_bars_are_asked_of_ratios_in_one_round() -> None:
    rates = {
        "train, labels": 100.0,
        "train, cached": 96.0,
        "train, online": 40.0,
        "plain loop": 30.0,
        "precompute": 90.0,
        "teacher, forward": 100.0,
        "student, forward": 400.0,
    }
    lines = bench_step.ratios("g", {name: harness.Samples([r], [0]) for name, r in rates.items()})
    found = {x["case"]: (x["ratio"], x.get("met")) for x in lines}
    assert found["train, cached / train, labels"] == (0.96, False)
    assert found["train, cached / plain loop"] == (pytest.approx(3.2), True)
    assert found["train, online / plain loop"] == (pytest.approx(4 / 3), True)
    assert found["student, forward / teacher, forward"] == (4, None)
    assert not any("torchdistill" in name for name in found)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_workers_that_are_tried(
    cores: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert bench_step.worker_counts() == counts


@pytest.mark.slow
def test_the_whole_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "COMMANDS", {"step": page.COMMANDS["step"]})
    options = "--rounds 1 --samples 0 --photos 32 --photo-px 32 --save"
    monkeypatch.setattr(sys, "argv", ["bench_step", *options.split()])
    bench_step.main()
    text, printed = page.page(), capsys.readouterr().out
    for words in ("train, cached / plain loop", "student, forward / teacher, forward", "optimizer"):
        assert words in text
        assert words in printed
