"""The processes of a run, as torchrun starts them: who we are, what we share, what we agree on.

In: torchrun's environment. Out: a `World`. What stays true: with one process nothing here costs or
changes anything; a step's batch is the same for any number of processes, and each has whole pairs.
"""

from __future__ import annotations

import inspect
import os
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.errors import KDCacheError, PeerFailed, UsageError
from kdcache.training.spec import TrainSpec
from kdcache.training.sync_batchnorm import synchronize

# Later torch has another name for it.
_NAMES = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in _NAMES)


class World:
    """This process among `count` that train together. A resource: use it with `with`.

    device   that it trains on

    Its collectives run on gloo for the CPU's tensors and on NCCL for a GPU's. Entering raises
    UsageError for a device or an environment that cannot be, KDCacheError where the others are not
    met. When a process fails, torchrun ends the others; one that notices first raises ProcessLost.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        self.rank = rank
        self.count = count
        self.device = torch.device(device)
        self._asked: tuple[distributed.Work, torch.Tensor] | None = None

    def __enter__(self) -> World:
        if self.count == 1:
            return self
        backend = "gloo"
        if self.device.type == "cuda":
            _require_gpus()
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            distributed.init_process_group(backend)
        except ValueError as error:
            raise UsageError(
                f"WORLD_SIZE is {self.count}, but torchrun has not started this process ({error}): "
                "start with torchrun, or unset WORLD_SIZE and RANK"
            ) from error
        except RuntimeError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise KDCacheError(
                f"process {self.rank} of {self.count} has not met the others at {place}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.count == 1:
            return
        try:
            if error is None:
                self.wait()
        except RuntimeError as late:
            error = late
        # NCCL may wait here for work that a lost process will never do.
        if error is None or self.device.type == "cpu":
            distributed.destroy_process_group()
        if is_peer_failure(error):
            raise PeerFailed(
                f"process {self.rank} of {self.count} ended because another one did; that one's "
                "own message says why"
            ) from error
        if isinstance(error, RuntimeError) and "find_unused_parameters" in str(error):
            raise UsageError(
                "the student has weights that a step does not use: give it without them, or with "
                "requires_grad = False, or train it in one process"
            ) from error
        if error is not None and kind is None:
            raise error

    @property
    def first(self) -> bool:
        """This is the one process that writes."""
        return self.rank == 0

    def require_shares(self, spec: TrainSpec) -> None:
        """Raise UsageError unless each process gets an equal share, of whole pairs."""
        batch, count = spec.batch_size, self.count
        if spec.view_spec.mixup and batch % 2:
            raise UsageError(
                f"batch size must be even with mixing, not {batch}: a step takes whole pairs; "
                f"give {batch + 1}, or --mixup 0"
            )
        pairs = batch // 2 if spec.view_spec.mixup else batch
        unit = "pairs of images" if spec.view_spec.mixup else "images"
        if count > pairs:
            raise UsageError(
                f"{count} processes are more than the {pairs} {unit} of a batch of {batch}: start "
                f"at most {pairs}, or raise --batch-size"
            )
        if pairs % count:
            raise UsageError(
                f"{count} processes do not divide a batch of {batch} ({pairs} {unit}): a process "
                "takes an equal share; change --batch-size or their number"
            )

    def share(self, batches: range, batch_size: int) -> NDArray[np.int64]:
        """The positions of a view that this process takes of these batches, in order."""
        positions = np.arange(batches.start * batch_size, batches.stop * batch_size)
        shares = positions.reshape(len(batches), self.count, batch_size // self.count)
        return shares[:, self.rank].reshape(-1)

    def parallel(self, student: nn.Module) -> nn.Module:
        """The student as the loop calls it: gradients become their mean over all processes, and
        batch normalisation sees the whole batch."""
        if self.count == 1:
            return student
        synchronize(student)
        device = next(student.parameters()).device
        devices = [device] if device.type == "cuda" else None
        # What batch normalisation keeps is the same everywhere already.
        options: dict[str, Any] = {SYNC_BUFFERS: False}
        return DistributedDataParallel(student, device_ids=devices, **options)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def totals(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums over all processes, by name."""
        return {name: self.total(values[name].contiguous()) for name in sorted(values)}

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """The minimum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MIN)
        return values

    def told(self, value: int) -> int:
        """The first process's value."""
        if self.count == 1:
            return value
        found = torch.tensor(value)
        distributed.broadcast(found, 0)
        return int(found)

    def wait(self) -> None:
        """Until all have come here."""
        self.total(torch.zeros(1))

    def largest_soon(self, value: int) -> int:
        """The largest value that any process gave to the last call of this; 0 at the first.

        Asked at every step it makes all act at the same one, and no step waits for an answer.
        """
        if self.count == 1:
            return value
        answer = 0
        if self._asked:
            work, found = self._asked
            work.wait()
            answer = int(found)
        asked = torch.tensor(value)
        work = distributed.all_reduce(asked, distributed.ReduceOp.MAX, async_op=True)
        self._asked = work, asked
        return answer


def _require_gpus() -> None:
    """Raise UsageError unless each process of this machine has a GPU of its own."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes on this machine are more than its {gpus} GPU{'s' * (gpus > 1)}: "
            f"start {gpus} (--nproc-per-node {gpus}), or give --device cpu"
        )


def is_peer_failure(error: BaseException | None) -> bool:
    """This is what a process meets when another one has ended."""
    if not isinstance(error, RuntimeError) or isinstance(error, KDCacheError):
        return False
    return "gloo" in str(error) or isinstance(error, distributed.DistError)


SINGLE_PROCESS = World()
