"""The processes that train together: their shards of each batch, and what they exchange.

In: rank, size and device. Out: a `ProcessGroup`. What stays true: one process communicates nothing
and pays nothing; a step has the same batch for any number of processes, and each gets whole pairs.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache import torchrun
from kdcache.errors import KDCacheError, PeerFailed, UsageError
from kdcache.spec import canonical_json
from kdcache.training.spec import TrainSpec
from kdcache.training.sync_batchnorm import synchronize
from kdcache.waiting import DEFAULT_TIMEOUT_S, told

# Newer PyTorch has renamed this option.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in _OPTIONS)


class ProcessGroup:
    """This process among `size` processes that train together. A resource: use it with `with`.

    device     that it trains on
    timeout_s  how long to wait for another process, when they meet and later, in seconds

    CPU tensors are reduced by gloo, GPU tensors by NCCL. Entering raises UsageError for a device or
    an environment that does not fit, KDCacheError where the other processes cannot be reached.
    When a process fails, torchrun ends the others; one that notices it first raises PeerFailed.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: str = "cpu",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self._pending: tuple[distributed.Work, torch.Tensor] | None = None

    def __enter__(self) -> ProcessGroup:
        if self.size == 1:
            return self
        backend = "gloo"
        if self.device.type == "cuda":
            _require_gpus()
            torch.cuda.set_device(self.device)
            # Both: requests to save and stop are numbers of the host, which need no GPU.
            backend = "cpu:gloo,cuda:nccl"
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            with told(f"all of {self.size} processes at {address}", self.timeout_s):
                distributed.init_process_group(backend, timeout=timedelta(seconds=self.timeout_s))
        except ValueError as error:
            raise UsageError(
                f"WORLD_SIZE is {self.size}, but torchrun has not started this process ({error}): "
                "start with torchrun, or unset WORLD_SIZE and RANK"
            ) from error
        except RuntimeError as error:
            raise KDCacheError(
                f"process {self.rank} of {self.size} could not connect to the other processes at "
                f"{address}: {str(error).splitlines()[0]}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        try:
            if error is None:
                self.barrier()
        except RuntimeError as late:
            error = late
        # NCCL may wait here for work that a failed process will never do.
        if error is None or self.device.type == "cpu":
            distributed.destroy_process_group()
        if is_peer_failure(error):
            raise PeerFailed(
                f"process {self.rank} of {self.size} ended because another process failed; see "
                "the message of that process"
            ) from error
        if isinstance(error, RuntimeError) and "find_unused_parameters" in str(error):
            raise UsageError(
                "the student has parameters that a step does not use: remove them, set their "
                "requires_grad to False, or train in one process"
            ) from error
        if error is not None and kind is None:
            raise error

    @property
    def is_main(self) -> bool:
        """This is the one process that writes."""
        return self.rank == 0

    def require_equal_shards(self, spec: TrainSpec) -> None:
        """Raise UsageError unless every process gets equally many images, in whole pairs."""
        batch, size = spec.batch_size, self.size
        if spec.view_spec.mixup and batch % 2:
            raise UsageError(
                f"batch size must be even with mixing, not {batch}: a step takes whole pairs; "
                f"give {batch + 1}, or --mixup 0"
            )
        pairs = batch // 2 if spec.view_spec.mixup else batch
        unit = "pairs of images" if spec.view_spec.mixup else "images"
        if size > pairs:
            raise UsageError(
                f"{size} processes are more than the {pairs} {unit} of a batch of {batch}: start "
                f"at most {pairs}, or raise --batch-size"
            )
        if pairs % size:
            raise UsageError(
                f"{size} processes do not divide a batch of {batch} ({pairs} {unit}): each process "
                "takes an equal shard; change --batch-size or the number of processes"
            )

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise UsageError, naming the first process and the first fact, unless all have the same.

        One all-gather of a digest, where they have.
        """
        if self.size == 1:
            return
        own = torch.frombuffer(bytearray(_digest(facts)), dtype=torch.uint8)
        digests = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(digests, own)
        if all(torch.equal(one, own) for one in digests):
            return
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, dict(facts))
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    raise UsageError(
                        f"process {rank} has another {name} than process 0 ({other.get(name)}, not "
                        f"{value}): start all with the same options, files and versions"
                    )

    def shard(self, batches: range, batch_size: int) -> NDArray[np.int64]:
        """The positions of a view that this process takes of these batches, in order."""
        # Each process takes a run of every batch, not of the view: a step then has the same images
        # for any number of processes.
        positions = np.arange(batches.start * batch_size, batches.stop * batch_size)
        shards = positions.reshape(len(batches), self.size, batch_size // self.size)
        return shards[:, self.rank].reshape(-1)

    def data_parallel(self, student: nn.Module) -> nn.Module:
        """The student as the loop calls it: gradients become their mean over all processes, and
        batch normalisation sees the whole batch."""
        if self.size == 1:
            return student
        synchronize(student)
        device = next(student.parameters()).device
        devices = [device] if device.type == "cuda" else None
        # The buffers of batch normalisation are equal in all processes already.
        options: dict[str, Any] = {SYNC_BUFFERS: False}
        return DistributedDataParallel(student, device_ids=devices, **options)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_sums(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums over all processes, by name."""
        # In one order everywhere: processes match each other's reductions by their order.
        return {name: self.all_reduce_sum(values[name].contiguous()) for name in sorted(values)}

    def all_reduce_min(self, values: torch.Tensor) -> torch.Tensor:
        """The minimum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MIN)
        return values

    def all_reduce_max_async(self, value: int) -> int:
        """The largest value that any process gave at the previous call; 0 at the first call.

        Called at every step, it makes all processes act at the same step, and no step waits.
        """
        if self.size == 1:
            return value
        largest = 0
        if self._pending:
            work, reduced = self._pending
            work.wait()
            largest = int(reduced)
        # On the CPU, where gloo reduces it: no step waits for a GPU.
        values = torch.tensor(value)
        work = distributed.all_reduce(values, distributed.ReduceOp.MAX, async_op=True)
        self._pending = work, values
        return largest

    def broadcast(self, value: int) -> int:
        """The value of the main process."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        distributed.broadcast(tensor, 0)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.all_reduce_sum(torch.zeros(1))


def _require_gpus() -> None:
    """Raise UsageError unless each process of this machine has a GPU of its own."""
    processes, gpus = torchrun.current_process().local_world_size, torch.cuda.device_count()
    if processes > gpus:
        raise UsageError(
            f"{processes} processes on this machine are more than its {gpus} "
            f"GPU{'s' * (gpus > 1)}: "
            f"start {gpus} (--nproc-per-node {gpus}), or give --device cpu"
        )


def _digest(facts: Mapping[str, str]) -> bytes:
    return hashlib.sha256(canonical_json(dict(facts)).encode()).digest()


def is_peer_failure(error: BaseException | None) -> bool:
    """PyTorch raises such an error where another process has ended."""
    if not isinstance(error, RuntimeError) or isinstance(error, KDCacheError):
        return False
    # gloo's errors are RuntimeErrors without a type of their own.
    return "gloo" in str(error) or isinstance(error, distributed.DistError)


SINGLE_PROCESS = ProcessGroup()
