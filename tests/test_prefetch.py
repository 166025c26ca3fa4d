"""Copies ahead of need, without a GPU: what is done in which order, and on which stream."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.batch import Batch
from kdcache.data import prefetch

GPU = torch.device("cuda:0")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order, to streams that are not there."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == GPU

        def record_event(self) -> str:
            log.append("side: event")
            return "event"

    class Consumer:
        def wait_event(self, event: str) -> None:
            log.append(f"main: waits for {event}")

    @contextmanager
    def stream(one: Stream) -> Generator[None]:
        log.append("side (")
        yield
        log.append(")")

    def record_stream(tensor: torch.Tensor, one: Consumer) -> None:
        assert isinstance(one, Consumer)
        log.append(f"main: holds {tensor.numel()}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Consumer())
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return log


def batch_of(view: int, *, teacher: bool) -> Batch:
    rows = np.arange(2)
    images, numbers = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)
    seen = torch.zeros(2, 3, 8, 8, dtype=torch.uint8) if teacher else None
    return Batch(view, rows, rows, images, numbers, numbers, numbers, seen)


def test_a_batch_is_made_before_the_one_ahead_of_it_is_given_out(events: list[str]) -> None:
    def batches() -> Generator[Batch]:
        for view in range(3):
            events.append(f"made {view}")
            yield batch_of(view, teacher=False)

    for batch in prefetch.prefetch_to_device(batches(), GPU):
        events.append(f"main: step {batch.view}")
    holds = ["main: waits for event", "main: holds 96", *["main: holds 2"] * 3]
    made = [["side (", f"made {view}", "side: event", ")"] for view in range(3)]
    assert events == [
        *made[0],
        *made[1],
        *holds,
        "main: step 0",
        *made[2],
        *holds,
        "main: step 1",
        "side (",
        "side: event",
        ")",
        *holds,
        "main: step 2",
    ]


def test_what_the_teacher_sees_is_held_too(events: list[str]) -> None:
    list(prefetch.prefetch_to_device((batch_of(0, teacher=True) for _ in "."), GPU))
    assert "main: holds 384" in events


@pytest.mark.usefixtures("events")
def test_leaving_early_and_errors_close_what_makes_the_batches() -> None:
    closed = []

    def batches() -> Generator[Batch]:
        try:
            yield batch_of(0, teacher=False)
            yield batch_of(1, teacher=False)
            raise ValueError("the third")
        finally:
            closed.append(True)

    running: Any = prefetch.prefetch_to_device(batches(), GPU)
    next(running)
    running.close()
    assert closed == [True]
    with pytest.raises(ValueError, match="the third"):
        list(prefetch.prefetch_to_device(batches(), GPU))
    assert closed == [True, True]


@pytest.mark.usefixtures("events")
def test_no_batches() -> None:
    assert list(prefetch.prefetch_to_device((batch_of(0, teacher=False) for _ in ""), GPU)) == []


def test_on_the_cpu_arrays_are_taken_as_they_are() -> None:
    array = np.arange(5)
    tensor = prefetch.to_device(array, torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2, 3, 4]


def test_copies_to_a_gpu_go_by_pinned_memory_and_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    empty = torch.empty

    def pinned(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        made.append({"shape": tuple(shape), "pin_memory": pin_memory})
        return empty(shape, dtype=dtype)

    def to(tensor: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
        moved.append({"device": device, **options})
        return tensor

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    rows = np.arange(24, dtype=np.uint8).reshape(4, 6)[:, :4]  # as the loader's: with a gap
    found = prefetch.to_device(rows, GPU)
    assert found.is_contiguous()
    assert (found.numpy() == rows).all()
    assert made == [{"shape": (4, 4), "pin_memory": True}]
    assert moved == [{"device": GPU, "non_blocking": True}]
