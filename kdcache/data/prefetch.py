"""From the host to a GPU ahead of need, without a wait.

In: arrays, and batches that are made as they are asked for. Out: the same on the device. What stays
true: no call here waits for the device; copies and mixing run on a stream of their own, one batch
ahead, and the stream that trains waits for them where they are not done.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from numpy.typing import NDArray

from kdcache.batch import Batch


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; on the CPU it keeps its memory.

    By way of pinned memory, from which copies do not hold the host up. torch keeps that memory
    until the copy is done.
    """
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    return pinned.copy_(host).to(device, non_blocking=True)


def prefetch_to_device(batches: Generator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each made on a stream of its own before the one ahead of it is given out.

    Closing this closes `batches`.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: tuple[Batch, Any] | None = None
    try:
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                made = stream.record_event()
            if ready is not None:
                yield _handed_over(*ready, device)
            if batch is None:
                return
            ready = batch, made
    finally:
        batches.close()


def _handed_over(batch: Batch, made: Any, device: torch.device) -> Batch:
    """For the current stream: it waits for the batch, whose memory is kept until it is done."""
    current = torch.cuda.current_stream(device)
    current.wait_event(made)
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor):
            # Else the allocator would give this memory to a later batch of the copying stream while
            # the training stream still reads it.
            value.record_stream(current)
    return batch
