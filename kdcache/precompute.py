"""Record a teacher's answers: loader → teacher → codec → tape.

In: a dataset, a frozen teacher, what the tape shall be. Out: a complete tape. What stays true: a
shard is written once it is whole; run again, it does the shards that are missing and no others.
Cost: the teacher's forward pass; records of one shard are held, and written while the next runs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from kdcache import codec
from kdcache.codec import Records
from kdcache.dataset import Dataset
from kdcache.errors import NonFinite
from kdcache.loader import Loader
from kdcache.models import Classifier
from kdcache.records import Batch
from kdcache.spec import TapeSpec, ValueType, ViewSpec
from kdcache.tape import Tape

Progress = Callable[[int], None]


def tape_spec(
    dataset: Dataset,
    teacher: Classifier,
    view: ViewSpec,
    *,
    views: int,
    top_k: int | None,
    dtype: ValueType,
) -> TapeSpec:
    """The spec of a tape of this teacher's answers; top_k None keeps all classes.

    A k whose records would take as many bytes as all logits do becomes "all".
    """
    classes = len(dataset.classes)
    k = classes if top_k is None else top_k
    spec = TapeSpec(
        views, len(dataset), classes, k, dtype, dataset.fingerprint, teacher.fingerprint(), view
    )
    return replace(spec, top_k=codec.effective_top_k(classes, k, dtype))


def precompute(
    dataset: Dataset,
    teacher: Classifier,
    spec: TapeSpec,
    out: Path,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress = lambda rows: None,
) -> Tape:
    """Make or finish the tape of `spec` at `out`; `progress` is called with rows done so far.

    Raises NonFinite when the teacher gives NaN or infinity, and what `Tape` and `Loader` raise.
    """
    device = teacher.mean.device
    tape = Tape.create(out, spec, _info(dataset, teacher, batch_size))
    todo = tape.missing()
    rows = spec.views * spec.samples - sum(tape.rows(shard) for _, shard in todo)
    progress(rows)
    if not todo:
        return tape
    with (
        Loader(dataset, spec.view, batch_size, workers=workers, device=device) as loader,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: Future[None] | None = None
        for view, shard in todo:
            parts: list[Records] = []
            for batch in loader.batches(view, slice(*tape.shard_range(shard))):
                parts.append(codec.encode(ask(teacher, batch), spec.top_k, spec.dtype))
                rows += len(batch)
                progress(rows)
            if writing is not None:
                writing.result()
            writing = writer.submit(tape.write, view, shard, Records.concatenate(parts))
        if writing is not None:
            writing.result()
    return tape


def ask(teacher: Classifier, batch: Batch) -> torch.Tensor:
    """The teacher's logits [B, C] for a batch. Raises NonFinite, naming the first bad sample."""
    with torch.inference_mode():
        logits_BC: torch.Tensor = teacher(batch.images_BCHW)
        if bool(torch.isfinite(logits_BC).all()):
            return logits_BC
    row = int((~torch.isfinite(logits_BC).all(1)).nonzero()[0])
    raise NonFinite(
        f"the teacher {teacher.name} gave NaN or infinity for sample {batch.samples_B[row]} in "
        f"view {batch.view}: nothing was recorded for its shard"
    )


def _info(dataset: Dataset, teacher: Classifier, batch_size: int) -> dict[str, object]:
    device = teacher.mean.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "teacher": teacher.name,
        "class_names": list(dataset.classes),
        "batch_size": batch_size,
        "device": f"{device.type} ({name})",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
