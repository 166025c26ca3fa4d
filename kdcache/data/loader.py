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
from collections.abc import Generator, Iterator

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.data import render
from kdcache.data.beton import Dataset
from kdcache.data.passes import Engine, Pass
from kdcache.data.prefetch import prefetch_to_device, to_device
from kdcache.errors import DatasetCorrupt, UsageError
from kdcache.views.mixing import mix_pairs, pair_mix_weights
from kdcache.views.order import view_order, view_tokens
from kdcache.views.spec import ViewSpec

PROBED = 16  # positions of a view that stand for all of its pixels


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
            Engine(
                dataset,
                # FFCV allocates whole batches, so none is larger than the data.
                min(stride, len(dataset) + len(dataset) % 2),
                self.workers,
                {"image": render.ViewDecoder(seen, self.workers), "label": render.LabelDecoder()},
            )
            for seen in self._seen
        ]
        self._passes: set[Pass] = set()

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
        # One more, for a partner that is decoded but not given out.
        weights = np.zeros(left + 1, np.int16)
        if self.spec.mixup:
            wanted = _whole_pairs(wanted, samples)
            weights = pair_mix_weights(self.spec, view, wanted, samples)
        if not left:
            return
        # A token names view and sample, and each engine renders it by its own spec: the passes show
        # the same samples, whatever order the teacher's seed would give them.
        tokens = view_tokens(view, order[wanted])
        running: list[Pass] = []
        try:
            for engine in self._engines:
                running.append(Pass(engine, tokens))
                self._passes.add(running[-1])
            for outputs in zip(*running, strict=True):
                count = len(outputs[0][0])
                places, wanted = wanted[:count], wanted[count:]
                shares, weights = weights[:count], weights[count:]
                whole = self._batch(view, places, order[places], shares, outputs)
                yield from self._cut(whole, left)
                left -= count
        finally:
            # Also when the caller leaves early, which closes this generator.
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
        # Before mixing, which would spread a damaged sample's pixels to its partner.
        self._check(samples, checksums, status)
        if self.device.type == "cpu":
            # One pass that also copies, out of memory that FFCV writes again.
            images_BHWC = torch.from_numpy(render.mix_rows(images, weights))
        else:
            images_BHWC = mix_pairs(to_device(images, self.device), mix_weights_B)
        # Only the strides change: the batch is channels-last in memory, as the networks' weights
        # are.
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
