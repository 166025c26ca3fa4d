"""What a record leaves out, and what that does to a student.

    python -m benchmarks.study_records FOLDER [--save]      about 75 minutes of 2 CPU cores

The teacher is EfficientNet-Lite0 at 160 px (`benchmarks.mixed_views`, whose FOLDER this takes), the
data its unlabelled images, the student a `kdcache:small` at 48 px with 1,000 classes, in function
matching over VIEWS views. The teacher's logits are computed once and kept whole, as float32; each
other kind of record is made of these, so that all students see the same views in the same order.
"online" runs the live teacher, for one epoch, beside dense records for one epoch.

On images of other files, mixed as in training, and plain: the share for which student and live
teacher have the same first class (agreement), and KL(teacher || student) at T = 1 and at the T of
training. A result line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, study_report
from benchmarks.bench_records import tempered
from benchmarks.layouts import LAYOUTS
from benchmarks.mixed_views import load_teacher, write_images
from kdcache.batch import Batch, Target, TargetSource, TemperedTarget, dense_target
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import CodecSpec, Dense, TopK, Transformed
from kdcache.cache.records import Tables
from kdcache.choices import Tail
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.losses.distillation import distillation_loss
from kdcache.models import load
from kdcache.models.classifier import Classifier, Teacher
from kdcache.teacher.calibration import calibration_rows
from kdcache.teacher.logits import teacher_logits
from kdcache.teacher.precompute import make_cache_spec, precompute
from kdcache.teacher.targets import CachedTargets, OnlineTargets
from kdcache.training.loop import train
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec, evaluation_view_spec

TEACHER_PX, STUDENT_PX = 160, 48
VIEWS, EPOCHS, BATCH, SEEDS = 4, 4, 128, 3
PATIENT_EPOCHS = 24
TEMPERATURES = (5.0, 1.0, 2.0)
CALIBRATION_ROWS = 4096
TINYVIT_K = 10

Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """codec   None: TinyViT's layout, which is packed and unpacked as a batch is read"""

    name: str
    codec: CodecSpec | None
    tail: Tail = "bucket"


RECORDS = (
    Record("dense", Dense("float32")),
    Record("transformed, D = 1", Transformed(1.0)),
    Record("top 16, bucket", TopK(16, "float16")),
    Record("top 16, uniform", TopK(16, "float16"), "uniform"),
    Record("TinyViT, k = 10", None, "uniform"),
    Record("transformed, D = 0.02", Transformed(0.02)),
)


def views(size_px: int) -> ViewSpec:
    """Function matching, as the paper's recipes have it."""
    return ViewSpec(size_px, crop="inception", min_scale=0.05, flip=True, mixup=1.0)


@dataclass(frozen=True)
class HeldOut:
    """Images of other files, and the live teacher's logits of them by kind of view."""

    data: Dataset
    live: dict[str, torch.Tensor]

    @staticmethod
    def of(data: Dataset, teacher: Teacher) -> HeldOut:
        kinds = {"mixed": views(TEACHER_PX), "plain": evaluation_view_spec(TEACHER_PX)}
        return HeldOut(data, {name: logits(teacher, data, view) for name, view in kinds.items()})

    def measure(self, student: Classifier, temperature: float) -> Line:
        student.eval()
        found: Line = {}
        kinds = {"mixed": views(STUDENT_PX), "plain": evaluation_view_spec(STUDENT_PX)}
        for name, view in kinds.items():
            z_BC, live_BC = logits(student, self.data, view), self.live[name]
            agree_B = z_BC.argmax(1) == live_BC.argmax(1)
            found[f"{name}_agreement"] = float(agree_B.double().mean())
            for at, T in (("1", 1.0), ("T", temperature)):
                loss = distillation_loss(z_BC, dense_target(live_BC), temperature=T)
                found[f"{name}_kl_{at}"] = float(loss) / T**2
        return found


def logits(model: Teacher, data: Dataset, view: ViewSpec) -> torch.Tensor:
    """Of view 0 of every image; its last, odd one has no partner to be mixed with."""
    count = len(data) // 2 * 2
    with Loader(data, view, BATCH, workers=1) as loader:
        parts = [teacher_logits(model, x).clone() for x in loader.batches(0, np.arange(count))]
    return torch.cat(parts)


def make_cache(record: Record, dense: LogitCache, path: Path) -> LogitCache:
    """A cache of the logits of `dense`, with the record's codec; or the one that is there."""
    assert record.codec is not None
    if LogitCache.exists(path):
        return LogitCache.open(path)
    spec = replace(dense.spec, codec=record.codec)
    tables: Tables = {}
    if isinstance(record.codec, Transformed):
        places = calibration_rows(spec, CALIBRATION_ROWS)
        parts = [dense[view].columns["logits"][rows] for view, rows in places]
        tables = record.codec.fit(torch.from_numpy(np.concatenate(parts)))
    cache = LogitCache.create(path, spec, dense.metadata, tables=tables)
    coder = cache.coder()
    for view, shard in cache.missing():
        start, stop = cache.shard_range(shard)
        live_BC = torch.from_numpy(dense[view, start:stop].columns["logits"])
        cache.write(view, shard, coder.encode(live_BC, spec.rows(view, np.arange(start, stop))))
    return cache


class TinyViTTargets:
    """Targets of dense records, by way of TinyViT's layout."""

    def __init__(self, dense: CachedTargets, temperature: float) -> None:
        self.dense, self.temperature = dense, temperature

    def __call__(self, batch: Batch) -> TemperedTarget:
        target = self.dense(batch)
        assert isinstance(target, Target)
        layout = LAYOUTS["TinyViT"]
        rows = layout.pack(target.logits_BK, TINYVIT_K)
        named = layout.unpack(rows, TINYVIT_K, target.num_classes)
        return tempered(named, self.temperature)


def run(
    data: Dataset, source: TargetSource, tail: Tail, temperature: float, seed: int, epochs: int
) -> Classifier:
    """A trained student."""
    torch.manual_seed(seed)
    student = load.load_model(
        "kdcache:small", "student", num_classes=1000, size_px=STUDENT_PX, device="cpu"
    )
    spec = TrainSpec(
        "online" if isinstance(source, OnlineTargets) else "cached",
        views(STUDENT_PX),
        epochs,
        BATCH,
        num_views=VIEWS,
        temperature=temperature,
        seed=seed,
        tail=tail,
        teacher_view_spec=views(TEACHER_PX),
    )
    train(TrainingRun(spec, data, student, source))
    return student


class Study:
    """What all runs share: data, teacher, caches and the lines so far."""

    def __init__(self, folder: Path, save: bool) -> None:
        self.folder, self.save = folder, save
        self.data, held_out = write_images(folder)
        self.teacher = load_teacher("lite0")
        spec = make_cache_spec(
            self.data, self.teacher, views(TEACHER_PX), Dense("float32"), num_views=VIEWS
        )
        self.dense = precompute(self.data, self.teacher, spec, folder / "dense.zarr", batch_size=64)
        self.held_out = HeldOut.of(held_out, self.teacher)
        self.done = {(x["record"], x["T"], x["seed"], x["epochs"]) for x in study_report.saved()}

    def source(self, record: Record, temperature: float) -> tuple[TargetSource, float]:
        """Targets, and the bytes of a record."""
        if record.name == "online":
            return OnlineTargets(self.teacher), 0
        cache = self.dense
        if record.codec and record.codec != cache.spec.codec:
            cache = make_cache(record, cache, self.folder / f"{record.codec}.zarr")
        targets = CachedTargets(cache, self.data.content_hash, views(STUDENT_PX), resized=True)
        if record.codec is None:
            return TinyViTTargets(targets, temperature), 4 + 4 * TINYVIT_K
        return targets, cache.stored_bytes() / (cache.spec.num_views * cache.spec.num_samples)

    def add(self, record: Record, temperature: float, seed: int, epochs: int = EPOCHS) -> None:
        """A run and its line."""
        if (record.name, temperature, seed, epochs) in self.done:
            return
        start = time.perf_counter()
        source, size = self.source(record, temperature)
        student = run(self.data, source, record.tail, temperature, seed, epochs)
        line = {"record": record.name, "T": temperature, "seed": seed, "bytes": size}
        line |= {"images": len(self.data), "epochs": epochs, "views": VIEWS}
        line |= self.held_out.measure(student, temperature)
        line["seconds"] = time.perf_counter() - start
        harness.report("records_study", "student", [line], self.save)


def plan() -> Iterator[tuple[Record, float, int, int]]:
    """Runs, those that tell most first."""
    for seed in range(SEEDS):
        for temperature in TEMPERATURES:
            for record in RECORDS[:-1]:
                yield record, temperature, seed, EPOCHS
    yield from ((RECORDS[-1], T, seed, EPOCHS) for seed in range(SEEDS) for T in TEMPERATURES)
    yield from ((one, 5.0, 0, 1) for one in (RECORDS[0], Record("online", None)))
    dense, _, bucket, uniform, *_ = RECORDS
    for temperature in TEMPERATURES:
        yield from ((one, temperature, 0, PATIENT_EPOCHS) for one in (dense, bucket, uniform))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the result lines, make the page")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args.folder, args.save)
    for one in plan():
        study.add(*one)
    if args.save:
        study_report.write()


if __name__ == "__main__":
    main()
