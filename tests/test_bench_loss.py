"""The benchmark of the losses: its gate, its page, its command."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import bench_loss, gpu_suite, loss_report
from tests.conftest import Result


def test_the_measured_part_of_the_page_is_current() -> None:
    text = loss_report.PAGE.read_text()
    assert text == loss_report.page(text), "write it anew: python -m benchmarks.bench_loss --write"


def test_the_gate_lets_nothing_wrong_pass() -> None:
    case = bench_loss.Case.make(8, 50, torch.float32, "cpu")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        case.z.grad = None
        loss = bench_loss.ours(tail="renormalise")(case.z, case.sparse)
        loss.backward()
        return loss, case.z.grad

    def wrong() -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = step()
        return loss, gradient * 1.001

    assert bench_loss.correct(case, step, "renormalise")
    assert not bench_loss.correct(case, wrong, "renormalise")
    assert not bench_loss.correct(case, step, "uniform")


@pytest.mark.filterwarnings("default")
def test_a_line_has_what_the_table_and_the_bars_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    found = bench_loss.measure((8, 50), torch.float32, "cpu", 3)
    assert [lines[0]["cache"] for lines in found] == ["warm", "cold"]
    for lines in found:
        assert not [x for x in lines if "result" in x]
        assert bench_loss.bars(lines)
        assert "| copy |" in loss_report._table(lines)


def test_the_gpu_suite_runs_every_gpu_test_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"tests/test_a.py::test_{n}[a b]" for n in range(10)]
    monkeypatch.setattr(gpu_suite, "gpu_tests", lambda: ids)
    dealt: list[str] = []

    def run(name: str, command: list[str], seconds: float) -> tuple[str, str, float]:
        hand = command[len(gpu_suite.PYTEST) :]
        assert name == f"{len(hand)} tests"
        dealt.extend(hand)
        return name, "passed", 1.0

    monkeypatch.setattr(gpu_suite, "run", run)
    assert len(gpu_suite.tests(480, 4)) == 4
    assert sorted(dealt) == sorted(ids)
    monkeypatch.setattr(gpu_suite, "gpu_tests", list)
    assert gpu_suite.tests(480, 4) == [("tests", "FAILED (none)", 0.0)]


@pytest.mark.slow
def test_the_gpu_suite_finds_the_gpu_tests() -> None:
    found = gpu_suite.gpu_tests()
    assert any("test_it_runs_in_a_cuda_graph[sparse-False]" in name for name in found)


def test_the_command_needs_a_checkout(
    kdcache: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def no_benchmarks(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("benchmarks"):
            raise ModuleNotFoundError("gone", name="benchmarks")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_benchmarks)
    result = kdcache("bench", "loss")
    assert result.code == 2
    assert "benchmarks are not part of an installed kdcache" in result.err


def test_a_shape_that_is_none(kdcache: Callable[..., Result]) -> None:
    result = kdcache("bench", "loss", "--shape", "1000")
    assert result.code == 2
    assert "--shape is ROWSxCLASSES, such as 512x1000, not '1000'" in result.err
