"""Where a batch's targets come from: the live teacher, the tape, or the labels.

Each class is a `TargetSource`. Online and cached agree: the same teacher logits give the same
target to the bit when the tape keeps all of them as float32.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from kdcache import codec
from kdcache.codec import Records
from kdcache.errors import TapeCorrupt
from kdcache.models import Classifier
from kdcache.precompute import ask
from kdcache.records import Batch, Target
from kdcache.spec import ViewSpec
from kdcache.tape import Tape
from kdcache.views import MIX_UNIT


class OnlineTargets:
    """Runs the teacher on the batch's own pixels."""

    def __init__(self, teacher: Classifier) -> None:
        self.teacher = teacher

    def __call__(self, batch: Batch) -> Target:
        return codec.dense_target(ask(self.teacher, batch))


class CachedTargets:
    """Reads the tape. A thread reads ahead by one block.

    Raises TapeMismatch unless the tape was made of this view spec and of the data with this
    fingerprint, TapeIncomplete when it lacks a shard.
    """

    def __init__(self, tape: Tape, fingerprint: str, view: ViewSpec) -> None:
        tape.require_plays(fingerprint, view)
        tape.require_complete()
        self.tape = tape
        self.block_rows = tape.layout.chunk_rows
        self._blocks: dict[tuple[int, int], Future[Records]] = {}
        self._reader = ThreadPoolExecutor(1, "kdcache-tape")

    def __call__(self, batch: Batch) -> Target:
        """Raises TapeCorrupt or TapeIncomplete, naming the view and the positions."""
        numbers = batch.positions_B // self.block_rows
        wanted = [(batch.view, int(b)) for b in np.unique(numbers)]
        ahead = self._after(wanted[-1])
        self._blocks = {k: self._blocks.get(k) or self._start(k) for k in [*wanted, ahead]}
        parts = [
            self._blocks[view, b].result()[batch.positions_B[numbers == b] - b * self.block_rows]
            for view, b in wanted
        ]
        records = Records.concatenate(parts)
        if (np.diff(numbers) < 0).any():
            records = records[np.argsort(np.argsort(numbers, kind="stable"))]
        try:
            target = codec.decode(records, self.tape.spec.classes)
        except TapeCorrupt as error:
            at = f"{batch.positions_B.min()} to {batch.positions_B.max()}"
            line = f"{self.tape.path}: view {batch.view}, positions {at}: {error}"
            raise TapeCorrupt(line) from error
        return target.to(batch.images_BCHW.device)

    def _start(self, key: tuple[int, int]) -> Future[Records]:
        view, block = key
        start = block * self.block_rows
        stop = min(start + self.block_rows, self.tape.spec.samples)
        return self._reader.submit(self.tape.read, view, start, stop)

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        view, block = key
        if (block + 1) * self.block_rows < self.tape.spec.samples:
            return view, block + 1
        return (view + 1) % self.tape.spec.views, 0


class LabelTargets:
    """The ground truth, mixed as the pixels are: at most two classes with mass."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, batch: Batch) -> Target:
        partner = batch.weights_B.float() / MIX_UNIT
        # A pair of one class keeps one entry with all of the mass.
        partner = partner.masked_fill(batch.labels_B == batch.partners_B, 0)
        mass_B2 = torch.stack([1 - partner, partner], 1)
        classes_B2 = torch.stack([batch.labels_B, batch.partners_B], 1)
        logits_B2 = mass_B2.log() - mass_B2.amax(1, keepdim=True).log()
        return Target(logits_B2, classes_B2, None, self.num_classes)
