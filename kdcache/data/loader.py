"""FFCV as a loader of views: its order is a view's order, its augmentation is `views`.

In: a `Dataset`, a `ViewSpec`, a batch size. Out: `Batch`es of any positions of any view. What stays
true: pixels, pairs and weights do not depend on batch size, workers, or which positions are asked
for; an error in FFCV's thread or a damaged sample is raised here, at once; a pass that is left
early ends its thread.

FFCV iterates tokens (view << 40 | sample) in the place of indices, so a view travels with every
row: no shared state, no recompilation, and passes over several views may run at once.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.data import render
from kdcache.data.beton import Dataset
from kdcache.data.ffcv import Compiler, EpochIterator, Graph, Operation, PipelineSpec, Reader
from kdcache.data.prefetch import prefetch_to_device, to_device
from kdcache.errors import DatasetCorrupt, KDCacheError, UsageError
from kdcache.views.mixing import mix_pairs, pair_mix_weights
from kdcache.views.order import view_order, view_tokens
from kdcache.views.spec import ViewSpec

BATCHES_AHEAD = 2
PROBED = 16  # positions of a view that stand for all of its pixels
# Numba has one object for this type while it is held. A loader of FFCV's own in this process sets
# it to constant (see _Memory); ours set it back.
_BYTES = numba.uint8[::1]


class Loader:
    """Batches of views. A resource: use it with `with`, or close it.

        with Loader(dataset, ViewSpec(224), 256) as loader:
            for epoch in range(epochs):
                loader.view = epoch
                for batch in loader: ...

    dataset            what `open_dataset` gives
    spec               the views; any of them, at any time
    batch_size         images in a batch; the last batch of a view may have fewer
    teacher_view_spec  what the teacher sees of the same samples: batches have these pixels too,
                       from a second pass beside the first
    workers            threads that decode, in each pass; one value for all loaders of a process is
                       wise, because numba has one pool of threads. None: all cores, or half of
                       them where batches stay on the CPU
    device             where batches go; to a GPU they are copied ahead of need

    view               the one that iteration gives: set it before each epoch

    Raises UsageError for a batch size below 1, and for a teacher's view that mixes otherwise than
    the student's.
    """

    view: int = 0

    def __init__(
        self,
        dataset: Dataset,
        spec: ViewSpec,
        batch_size: int,
        *,
        teacher_view_spec: ViewSpec | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, not {batch_size}")
        _require_same_mixing(spec, teacher_view_spec)
        cores = len(os.sched_getaffinity(0))
        self.dataset = dataset
        self.spec = spec
        self.batch_size = batch_size
        self.device = torch.device(device)
        if workers is None:
            # On the CPU the network wants the cores too.
            workers = max(1, cores // 2) if self.device.type == "cpu" else cores
        self.workers = min(workers, numba.config.NUMBA_NUM_THREADS)
        # This starts numba's threads, here and not in a pass: only the thread that starts TBB's may
        # fork afterwards.
        numba.get_num_threads()
        # FFCV decodes whole pairs, so an odd batch size is served by cutting a double batch.
        stride = 2 * batch_size if spec.mixup and batch_size % 2 else batch_size
        self._seen = [spec, teacher_view_spec] if teacher_view_spec else [spec]
        self._engines = [
            _Engine(
                dataset,
                min(stride, len(dataset) + len(dataset) % 2),
                self.workers,
                {"image": render.ViewDecoder(seen, self.workers), "label": render.LabelDecoder()},
            )
            for seen in self._seen
        ]
        self._passes: set[_Pass] = set()

    def __len__(self) -> int:
        """Batches of a view."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """All batches of the view `view`, in its order."""
        return self.batches(self.view)

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

        With mixing, positions come in whole pairs (2j, 2j + 1); only the last may lack its partner,
        which is then decoded but not given out. Raises UsageError for other positions,
        DatasetCorrupt for a damaged sample.
        """
        made = self._batches(view, positions)
        return prefetch_to_device(made, self.device) if self.device.type == "cuda" else made

    def _batches(self, view: int, positions: NDArray[np.int64] | slice) -> Generator[Batch]:
        samples = len(self.dataset)
        order = view_order(self.spec, view, samples)
        wanted = np.arange(samples)[positions] if isinstance(positions, slice) else positions
        wanted = np.asarray(wanted, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < samples:
            raise UsageError(f"positions must lie in 0 to {samples - 1}")
        left = len(wanted)
        weights = np.zeros(left + 1, np.int16)
        if self.spec.mixup:
            wanted = _whole_pairs(wanted, samples)
            weights = pair_mix_weights(self.spec, view, wanted, samples)
        if not left:
            return
        # A token names view and sample, and each engine renders it by its own spec: the passes show
        # the same samples, whatever order the teacher's seed would give them.
        tokens = view_tokens(view, order[wanted])
        running: list[_Pass] = []
        try:
            for engine in self._engines:
                running.append(_Pass(engine, tokens))
                self._passes.add(running[-1])
            for outputs in zip(*running, strict=True):
                count = len(outputs[0][0])
                places, wanted = wanted[:count], wanted[count:]
                shares, weights = weights[:count], weights[count:]
                whole = self._batch(view, places, order[places], shares, outputs)
                yield from self._cut(whole, left)
                left -= count
        finally:
            for one in running:
                one.close()
            self._passes.difference_update(running)

    def _batch(
        self,
        view: int,
        positions: NDArray[np.int64],
        samples: NDArray[np.int64],
        weights: NDArray[np.int16],
        outputs: tuple[tuple[NDArray[np.uint8], NDArray[np.int64]], ...],
    ) -> Batch:
        """Check, mix and copy a batch of each of FFCV's passes, whose memory will be used again."""
        labels = outputs[0][1].reshape(-1).copy()
        partners = labels.copy()
        if self.spec.mixup:
            paired = len(labels) // 2 * 2
            partners[:paired] = labels[:paired].reshape(-1, 2)[:, ::-1].reshape(-1)
        mix_weights_B = to_device(weights, self.device)
        images = [
            self._images(rows, seen.size_px, samples, weights, mix_weights_B)
            for (rows, _), seen in zip(outputs, self._seen, strict=True)
        ]
        return Batch(
            view,
            positions,
            samples,
            images[0],
            to_device(labels, self.device),
            to_device(partners, self.device),
            mix_weights_B,
            images[1] if len(images) > 1 else None,
        )

    def _images(
        self,
        rows: NDArray[np.uint8],
        size_px: int,
        samples: NDArray[np.int64],
        weights: NDArray[np.int16],
        mix_weights_B: torch.Tensor,
    ) -> torch.Tensor:
        """Rendered rows as mixed images [B, 3, H, W] on the device."""
        images, checksums, status = render.split_rows(rows, size_px)
        self._check(samples, checksums, status)
        if self.device.type == "cpu":
            images_BHWC = torch.from_numpy(render.mix_rows(images, weights))
        else:
            images_BHWC = mix_pairs(to_device(images, self.device), mix_weights_B)
        return images_BHWC.permute(0, 3, 1, 2)

    def _cut(self, batch: Batch, rows: int) -> Iterator[Batch]:
        """The first `rows` rows of a batch in pieces of the batch size."""
        rows = min(rows, len(batch))
        for start in range(0, rows, self.batch_size):
            part = slice(start, min(start + self.batch_size, rows))
            seen = batch.teacher_images_BCHW
            yield Batch(
                batch.view,
                batch.positions_B[part],
                batch.sample_ids_B[part],
                batch.images_BCHW[part],
                batch.labels_B[part],
                batch.partner_labels_B[part],
                batch.mix_weights_B[part],
                None if seen is None else seen[part],
            )

    def _check(
        self, samples: NDArray[np.int64], checksums: NDArray[np.uint32], status: NDArray[np.uint32]
    ) -> None:
        bad = (status != render.OK) | (checksums != self.dataset.checksums[samples])
        if bad.any():
            i = int(np.argmax(bad))
            reason = render.STATUS.get(int(status[i]), "its checksum is not the one recorded")
            raise DatasetCorrupt(
                f"{self.dataset.path}: sample {samples[i]} is damaged: {reason}; "
                "convert the images again"
            )


def render_digest(dataset: Dataset, spec: ViewSpec) -> str:
    """16 hex digits of the first mixed pixels of views 0 and 1: equal wherever views are."""
    h = hashlib.sha256()
    with Loader(dataset, spec, PROBED, workers=1) as loader:
        for view in (0, 1):
            batch = next(loader.batches(view, slice(0, PROBED)))
            h.update(batch.images_BCHW.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def _require_same_mixing(spec: ViewSpec, teacher_view_spec: ViewSpec | None) -> None:
    seen = teacher_view_spec or spec
    if (spec.mixup or seen.mixup) and (spec.mixup, spec.seed) != (seen.mixup, seen.seed):
        raise UsageError(
            "where images are mixed, teacher and student need the same pairs: one seed and one "
            f"mixup, not {spec.seed} and {spec.mixup:g} beside {seen.seed} and {seen.mixup:g}"
        )


def _whole_pairs(positions: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """Positions with the last one's partner added where it is missing, checked to be pairs."""
    if len(positions) % 2 and positions[-1] ^ 1 < num_samples:
        positions = np.append(positions, positions[-1] ^ 1)
    paired = positions[: len(positions) // 2 * 2]
    if (paired[::2] % 2).any() or (paired[1::2] != paired[::2] + 1).any():
        raise UsageError("with mixing, positions must be whole pairs (2j, 2j + 1)")
    return positions


class _Memory:
    """The mapped file and where its payloads lie, as FFCV's passes ask for them.

    FFCV's own manager builds tables of Python objects that nobody reads (600 MB for ImageNet), and
    declares numba's type of byte arrays constant for the whole process, after which numba no
    longer finds the functions that it compiled for that type.
    """

    def __init__(self, reader: Reader) -> None:
        table = np.sort(reader.alloc_table, order="ptr")
        pointers, sizes = np.ascontiguousarray(table["ptr"]), np.ascontiguousarray(table["size"])
        self.state = np.memmap(reader.file_name, np.uint8, "r"), pointers, sizes

    def schedule_epoch(self, batches: object) -> _Memory:
        return self

    def start_batch(self, number: int) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Engine:
    """What FFCV's passes need of a loader, without the loader.

    FFCV's own would compile each decoder for each loader, for a second, and set torch's number of
    threads. Ours call a compiled kernel themselves, so they stay plain Python.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, workers: int, decoders: dict[str, Operation]
    ) -> None:
        _BYTES.mutable = True
        self.reader = Reader(str(dataset.path))
        self.memory_manager = _Memory(self.reader)
        self.batch_size = batch_size
        self.batches_ahead = BATCHES_AHEAD
        self.num_workers = workers
        handlers = self.reader.handlers
        numbers = {name: number for number, name in enumerate(handlers)}
        specs = {name: PipelineSpec(name, decoders[name], []) for name in handlers}
        self.graph = Graph(specs, handlers, numbers, self.reader.metadata, None)
        Compiler.set_enabled(False)
        try:
            _, code = self.graph.collect_requirements()
            self.code = self.graph.codegen_all(code)
        finally:
            Compiler.set_enabled(True)


class _Pass(EpochIterator):
    """One run over some tokens, in FFCV's own thread.

    FFCV's iterator hangs when its pipeline raises or when it is read past its end, and leaks its
    thread when it is left early; this one raises, stops, and can be closed.
    """

    closed: bool
    ended = False

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
        item = None if self.ended else self._take()
        if isinstance(item, tuple):
            rows, labels = item
            return rows, labels
        self.ended = True
        self.close()
        if item is None:
            raise StopIteration
        if isinstance(item, KDCacheError):
            raise item
        raise KDCacheError(f"FFCV's pipeline failed: {item!r}") from item

    def _take(self) -> tuple[Any, Any] | BaseException | None:
        """The next batch, None at the end, or the error that ended the thread."""
        while not self.terminate_event.is_set():
            running = self.is_alive()
            try:
                item: tuple[Any, Any] | BaseException | None = self.output_queue.get(timeout=0.5)
                return item
            except queue.Empty:
                # The last item may have come between the wait and the end of the thread.
                if not running:
                    return RuntimeError("its thread ended without a word")
        return KDCacheError("the loader was closed while a pass was under way")

    def close(self) -> None:
        """End the thread; a reader that still waits gets an error, not a short pass."""
        self.terminate_event.set()
        # While the interpreter ends, a thread stands still for good: it cannot be waited for.
        alone = threading.current_thread() is self or sys.is_finalizing()
        if self.is_alive() and not alone:
            self.join()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)
