"""FFCV as a loader of views: its order is a view's order, its augmentation is `views`.

In: a `Dataset`, a `ViewSpec`, a batch size. Out: `Batch`es of any positions of any view. What stays
true: pixels, pairs and weights do not depend on batch size, workers, or which positions are asked
for; an error in FFCV's thread or a damaged sample is raised here, at once; a pass that is left
early ends its thread.

FFCV iterates tokens (view << 40 | sample) in the place of indices, so a view travels with every
row: no shared state, no recompilation, and passes over several views may run at once.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from kdcache import pixels, views
from kdcache.dataset import Dataset
from kdcache.errors import DatasetCorrupt, KDCacheError, UsageError
from kdcache.ffcv_import import (
    AllocationQuery,
    EpochIterator,
    FFCVLoader,
    IntDecoder,
    Operation,
    ResizedCropRGBImageDecoder,
)
from kdcache.records import Batch
from kdcache.rng import SAMPLE_BITS
from kdcache.spec import ViewSpec

BATCHES_AHEAD = 2
_SAMPLE_MASK = np.uint64((1 << SAMPLE_BITS) - 1)


class Loader:
    """Batches of views. A resource: use it with `with`, or close it.

    workers   threads that decode; one value for all loaders of a process is wise, because numba
              has one pool of threads
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: ViewSpec,
        batch_size: int,
        *,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, not {batch_size}")
        cores = len(os.sched_getaffinity(0))
        self.dataset = dataset
        self.spec = spec
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.workers = min(workers or cores, numba.config.NUMBA_NUM_THREADS)
        # FFCV decodes whole pairs, so an odd batch size is served by cutting a double batch.
        self._stride = 2 * batch_size if spec.mixup and batch_size % 2 else batch_size
        torch_threads = torch.get_num_threads()
        self._ffcv = _TokenLoader(
            str(dataset.path),
            min(self._stride, len(dataset) + len(dataset) % 2),
            num_workers=self.workers,
            os_cache=True,
            seed=0,
            pipelines={"image": [_ViewDecoder(spec, self.workers)], "label": [_LabelDecoder()]},
            drop_last=False,
            batches_ahead=BATCHES_AHEAD,
        )
        torch.set_num_threads(torch_threads)  # FFCV sets torch's threads along with its own
        self._passes: set[_Pass] = set()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all passes."""
        for running in list(self._passes):
            running.close()

    def batches(
        self, view: int, positions: NDArray[np.int64] | slice = slice(None)
    ) -> Iterator[Batch]:
        """Batches of the given positions of a view, in that order; the last may be short.

        With mixing, positions come in whole pairs (2j, 2j + 1); a slice is widened to them and cut
        back. Raises UsageError for positions outside the view, DatasetCorrupt for a damaged sample.
        """
        samples = len(self.dataset)
        order = views.order(self.spec, view, samples)
        wanted = np.arange(samples)[positions] if isinstance(positions, slice) else positions
        wanted = np.asarray(wanted, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < samples:
            raise UsageError(f"positions must lie in 0 to {samples - 1}")
        if self.spec.mixup:
            _check_pairs(wanted, samples)
        if not len(wanted):
            return
        running = _Pass(self._ffcv, views.tokens(view, order[wanted]))
        self._passes.add(running)
        try:
            start = 0
            for rows, labels in running:
                part = wanted[start : start + len(rows)]
                start += len(rows)
                yield from self._batches_of(view, part, order[part], rows, labels)
        finally:
            running.close()
            self._passes.discard(running)

    def _batches_of(
        self,
        view: int,
        positions: NDArray[np.int64],
        samples: NDArray[np.int64],
        rows: NDArray[np.uint8],
        labels: NDArray[np.int64],
    ) -> Iterator[Batch]:
        """Check, mix and cut one of FFCV's batches, whose memory will be used again."""
        images, checksums, status = pixels.split_rows(rows, self.spec.size_px)
        self._check(samples, checksums, status)
        weights = views.pair_weights(self.spec, view, positions, len(self.dataset))
        images_BHWC = torch.from_numpy(images).to(self.device)
        weights_B = torch.from_numpy(weights).to(self.device)
        labels_B = torch.from_numpy(labels.reshape(-1).copy())
        partners_B = labels_B.clone()
        if self.spec.mixup:
            images_BHWC = views.mix_pairs(images_BHWC, weights_B)
            paired = len(labels_B) // 2 * 2
            partners_B[:paired] = labels_B[:paired].view(-1, 2).flip(1).reshape(-1)
        elif self.device.type == "cpu":
            images_BHWC = images_BHWC.contiguous().clone()
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        labels_B, partners_B = labels_B.to(self.device), partners_B.to(self.device)
        for i in range(0, len(positions), self.batch_size):
            cut = slice(i, i + self.batch_size)
            yield Batch(
                view, positions[cut], samples[cut], images_BCHW[cut],
                labels_B[cut], partners_B[cut], weights_B[cut],
            )  # fmt: skip

    def _check(
        self,
        samples: NDArray[np.int64],
        checksums: NDArray[np.uint32],
        status: NDArray[np.uint32],
    ) -> None:
        bad = (status != pixels.OK) | (checksums != self.dataset.checksums[samples])
        if bad.any():
            i = int(np.argmax(bad))
            reason = pixels.STATUS.get(int(status[i]), "its checksum is not the one recorded")
            raise DatasetCorrupt(
                f"{self.dataset.path}: sample {samples[i]} is damaged: {reason}; "
                "convert the images again"
            )


def _check_pairs(positions: NDArray[np.int64], samples: int) -> None:
    """Positions must be (2j, 2j + 1) after (2j, 2j + 1); only an odd view's last stands alone."""
    paired = len(positions) // 2 * 2
    even, odd = positions[:paired:2], positions[1:paired:2]
    whole = (even % 2 == 0).all() and (odd == even + 1).all()
    if not whole or (len(positions) > paired and positions[-1] != samples - 1 - (samples - 1) % 2):
        raise UsageError("with mixing, positions must be whole pairs (2j, 2j + 1)")
    if len(positions) > paired and samples % 2 == 0:
        raise UsageError("with mixing, positions must be whole pairs (2j, 2j + 1)")


class _ViewDecoder(ResizedCropRGBImageDecoder):
    """Image field to rendered rows; a subclass of the field's decoder, or FFCV demotes it."""

    get_crop_generator = None

    def __init__(self, spec: ViewSpec, workers: int) -> None:
        Operation.__init__(self)
        self.spec = spec
        self.lanes = 2 * workers

    def declare_state_and_memory(self, state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (pixels.row_bytes(self.spec),), np.dtype("u1")
        after = replace(state, jit_mode=True, shape=shape, dtype=dtype)
        return after, AllocationQuery(shape, dtype)

    def generate_code(self) -> Any:
        entries = self.metadata[self.metadata["mode"] == pixels.JPEG_MODE]
        sides = entries["height"].astype(np.int64) * entries["width"]
        settings = pixels.settings_of(
            self.spec, lanes=self.lanes, scratch_bytes=3 * int(sides.max(initial=1))
        )
        render = pixels.render_rows

        def decode(tokens, rows, metadata, storage):
            render(tokens, rows, metadata, storage[0], storage[1], storage[2], settings)
            return rows[: len(tokens)]

        return decode


class _LabelDecoder(IntDecoder):
    def generate_code(self) -> Any:
        mask = _SAMPLE_MASK

        def decode(tokens, labels, metadata, storage):
            for i in range(len(tokens)):
                sample = tokens[i] & mask
                labels[i] = metadata[sample] if sample < np.uint64(len(metadata)) else -1
            return labels[: len(tokens)]

        return decode


class _TokenLoader(FFCVLoader):
    """FFCV's loader with nothing of its own to iterate: passes bring their tokens."""

    def next_traversal_order(self) -> NDArray[np.uint64]:
        return np.zeros(0, np.uint64)


class _Pass(EpochIterator):
    """One run over some tokens, in FFCV's own thread.

    FFCV's iterator hangs when its pipeline raises or when it is read past its end, and leaks its
    thread when it is left early; this one raises, stops, and can be closed.
    """

    closed: bool

    def run(self) -> None:
        try:
            numba.set_num_threads(self.loader.num_workers)
            for number, tokens in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                self._put(self.run_pipeline(number, tokens, slot, None))
                if self.terminate_event.is_set():
                    return
            self._put(None)
        except BaseException as error:  # it must reach the thread that waits, whatever it is
            self._put(error)

    def _put(self, item: object) -> None:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def __next__(self) -> tuple[Any, Any]:
        while not self.closed:
            try:
                item = self.output_queue.get(timeout=1.0)
            except queue.Empty:
                if self.is_alive():
                    continue
                item = RuntimeError("FFCV's thread ended without a word")
            if item is None:
                self.close()
            elif isinstance(item, BaseException):
                self.close()
                raise KDCacheError(f"FFCV's pipeline failed: {item!r}") from item
            else:
                rows, labels = item
                return rows, labels
        raise StopIteration

    def close(self) -> None:
        self.terminate_event.set()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
