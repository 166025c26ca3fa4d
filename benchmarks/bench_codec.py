"""Bytes a record against KL(teacher || record), for our caches and for other caches' layouts.

    python -m benchmarks.glyphs FOLDER                    once: two teachers' logits
    python -m benchmarks.bench_codec FOLDER [--save]      about 5 minutes of 2 CPU cores

Bytes are of all rows: ours as Zarr stores them, checksums and shard index included, the others' as
they document them and, beside it, after zstd. KL is of the first 8192 rows, over all classes, with
the tail spread evenly as the others' losses do, and over the named classes and the rest as one
outcome, which is what our bucket loss sees. "projection" is not a layout of ours: it shows what a
record could be that keeps no classes at all (`projected`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from benchmarks import codec_report, harness
from benchmarks.distortion import Curve, bytes_at, divergences, kl_at, least
from benchmarks.layouts import LAYOUTS
from kdcache.batch import Target
from kdcache.cache.codecs import Column, Dense, RecordCodec, Rows, TopK, ValueType
from kdcache.cache.compression import pipeline
from kdcache.cache.records import Records
from kdcache.losses.distillation import log_probabilities

TEMPERATURES = (1.0, 2.0, 5.0, 10.0)
K = (5, 10, 16, 32, 64)
K_BETWEEN = (24, 48, 96, 128, 192)  # so that our curve reaches the others' bytes
DTYPES: dict[str, ValueType] = {"kdcache, 8 bit": "uint8", "kdcache, 16 bit": "float16"}
RANKS = (8, 16, 24, 32, 48, 64)
KL_ROWS = 8192
CHUNK_BYTES = 1 << 18
BYTES_BAR, KL_BAR = 0.6, 5.0

Line = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """logits_BC: all rows. log_p: by temperature, of the first KL_ROWS, in float64."""

    name: str
    logits_BC: torch.Tensor
    log_p: dict[float, torch.Tensor]

    @staticmethod
    def of(name: str, logits_BC: torch.Tensor) -> Teacher:
        z = logits_BC[:KL_ROWS].double()
        return Teacher(name, logits_BC, {T: torch.log_softmax(z / T, 1) for T in TEMPERATURES})

    @property
    def num_classes(self) -> int:
        return self.logits_BC.shape[1]


def codec_of(num_classes: int, k: int, dtype: ValueType) -> RecordCodec:
    return Dense(dtype) if k == num_classes else TopK(k, dtype)


def encode(codec: RecordCodec, batches: Sequence[torch.Tensor]) -> Records:
    rows = Rows(0, 0, np.zeros(0, np.int64))  # these codecs draw nothing
    return Records.concatenate([codec.encode(batch, rows) for batch in batches])


def stored(name: str, array: NDArray[Any], column: Column, rows: int) -> MemoryStore:
    """The array in a Zarr store, in chunks of `rows` as a cache has them."""
    store = MemoryStore()
    width = array.shape[1]
    made = zarr.create_array(
        store,
        name=name,
        shape=(1, *array.shape),
        dtype=array.dtype,
        chunks=(1, rows, width),
        shards=(1, -(-len(array) // rows) * rows, width),
        **pipeline(column, rows),
    )
    made[0] = array
    return store


def write(records: Records, columns: Mapping[str, Column]) -> dict[str, MemoryStore]:
    raw = sum(column.record_bytes for column in columns.values())
    rows = 2
    while rows * raw < CHUNK_BYTES:
        rows *= 2
    return {name: stored(name, x, columns[name], rows) for name, x in records.columns.items()}


def read(stores: dict[str, MemoryStore]) -> Records:
    opened = {name: zarr.open_array(store, path=name) for name, store in stores.items()}
    return Records({name: np.asarray(array[0]) for name, array in opened.items()})


def record_bytes(records: Records, columns: Mapping[str, Column]) -> float:
    """Bytes a record after compression."""
    objects = [o for store in write(records, columns).values() for o in store._store_dict.items()]
    return sum(len(data.to_bytes()) for key, data in objects if "/c/" in key) / len(records)


def _line(teacher: Teacher, layout: str, k: int | str, size: float, zstd: float) -> Line:
    return {
        "set": teacher.name,
        "classes": teacher.num_classes,
        "layout": layout,
        "k": k,
        "bytes": size,
        "zstd_bytes": zstd,
    }


def ours(teacher: Teacher, layout: str, k: int) -> Line:
    C = teacher.num_classes
    codec = codec_of(C, k, DTYPES[layout])
    records = encode(codec, [teacher.logits_BC])
    size = record_bytes(records, codec.columns(C))
    line = _line(teacher, layout, "all" if k == C else k, size, size)
    found = codec.decode(records[:KL_ROWS], C)
    assert isinstance(found, Target)
    tail = None if found.tail_B3 is None else found.tail_B3.double()
    target = Target(found.logits_BK.double(), found.class_ids_BK, tail, teacher.num_classes)
    for T in TEMPERATURES:
        kl = divergences(teacher.log_p[T], target.class_ids_BK, *log_probabilities(target, T))
        line[f"full_{T:g}"], line[f"bucket_{T:g}"] = kl
    return line


def theirs(teacher: Teacher, layout: str, k: int) -> Line:
    rows = LAYOUTS[layout].pack(teacher.logits_BC, k)
    zstd = len(numcodecs.Zstd(level=9).encode(np.ascontiguousarray(rows))) / len(rows)
    line = _line(teacher, layout, k, float(rows.shape[1]), zstd)
    named = LAYOUTS[layout].unpack(rows[:KL_ROWS], k, teacher.num_classes)
    for T in TEMPERATURES:
        kl = divergences(teacher.log_p[T], named.class_ids_BK, *named.at(T))
        line[f"full_{T:g}"], line[f"bucket_{T:g}"] = kl
    return line


def projected(teacher: Teacher, rank: int) -> Line:
    """Logits as 8-bit coefficients of the main directions of other rows' logits.

    Mean and directions would be kept once a cache.
    """
    others = teacher.logits_BC[KL_ROWS:]
    mean_C = others.mean(0)
    centred = others - mean_C
    basis_CR = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:].flip(1)
    weights_BR = (teacher.logits_BC - mean_C) @ basis_CR
    step = float(weights_BR[KL_ROWS:].abs().max()) / 127
    codes_BR = (weights_BR / step).round().clamp(-128, 127)
    array = (codes_BR + 128).to(torch.uint8).numpy()
    column = Column(rank, array.dtype, "entropy")
    size = record_bytes(Records({"weights": array}), {"weights": column})
    line = _line(teacher, "projection", rank, size, size)
    z_BC = (mean_C + step * codes_BR[:KL_ROWS] @ basis_CR.T).double()
    for T in TEMPERATURES:
        kl = divergences(teacher.log_p[T], None, torch.log_softmax(z_BC / T, 1), None)
        line[f"full_{T:g}"], line[f"bucket_{T:g}"] = kl
    return line


def measure(teacher: Teacher) -> list[Line]:
    lines = []
    for layout in DTYPES:
        few = [k for k in sorted((*K, *K_BETWEEN)) if k < teacher.num_classes]
        lines += [ours(teacher, layout, k) for k in (*few, teacher.num_classes)]
    for layout in LAYOUTS:
        lines += [theirs(teacher, layout, k) for k in K if k < teacher.num_classes]
    return lines + [projected(teacher, r) for r in RANKS if r < teacher.num_classes]


def curves(lines: list[Line], layouts: list[str], kind: str) -> list[Curve]:
    """Of each layout, sparse and dense apart: there is nothing between the largest k and all."""
    found = []
    for layout in layouts:
        points = [x for x in lines if x["layout"] == layout]
        for part in (
            [x for x in points if x["k"] != "all"],
            [x for x in points if x["k"] == "all"],
        ):
            if part:
                found.append([(x["bytes"], x[kind]) for x in part])
    return found


def bars(lines: list[Line]) -> list[Line]:
    """Against each point of TinyViT's: our bytes at its KL at T = 1, our KL at its bytes above."""
    found: list[Line] = []
    for point in (x for x in lines if x["layout"] == "TinyViT"):
        size = point["bytes"]
        for T in TEMPERATURES:
            bar: Line = {"set": point["set"], "k": point["k"], "T": T, "tinyvit_bytes": size}
            for kind in ("full", "bucket"):
                kl, mine = point[f"{kind}_{T:g}"], curves(lines, list(DTYPES), f"{kind}_{T:g}")
                bar[f"tinyvit_{kind}"] = kl
                if T == 1:
                    needed = least(bytes_at(c, kl) for c in mine)
                    bar[kind] = None if needed is None else needed / size
                    bar[f"{kind}_met"] = needed is not None and needed <= BYTES_BAR * size
                else:
                    reached = least(kl_at(c, size) for c in mine)
                    bar[kind] = None if reached is None else kl / reached
                    bar[f"{kind}_met"] = reached is not None and kl >= KL_BAR * reached
            found.append(bar)
    return found


def speeds(teacher: Teacher, rounds: int, k: int = 10) -> list[Line]:
    """Records a second from logits to bytes and back, logits in batches, torch on one thread."""
    torch.set_num_threads(1)
    z, num_classes = teacher.logits_BC, teacher.num_classes
    batches = torch.split(z, 256)
    contestants: dict[str, Callable[[], int]] = {}

    def add(name: str, step: Callable[..., object], *inputs: object) -> None:
        def run() -> int:
            step(*inputs)
            return len(z)

        contestants[name] = run

    for layout, dtype in DTYPES.items():
        codec = TopK(k, dtype)
        records, columns = encode(codec, batches), codec.columns(num_classes)
        add(f"{layout}: codec.encode", encode, codec, batches)
        add(f"{layout}: write to Zarr", write, records, columns)
        add(f"{layout}: read from Zarr", read, write(records, columns))
        add(f"{layout}: codec.decode", codec.decode, records, num_classes)
    found = harness.interleave(contestants, rounds)
    lines = []
    for name, samples in found.items():
        rates = {p: rate for p, rate in samples.quantiles().items() if p != "cpu_us"}
        lines.append({"set": teacher.name, "k": k, "step": name, **rates})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where benchmarks.glyphs left the logits")
    parser.add_argument("--rounds", type=int, default=7, help="of the speeds")
    parser.add_argument("--save", action="store_true", help="keep the result lines, make the page")
    args = parser.parse_args()
    if args.save:
        harness.start_results("codec")
    for name in ("kana", "kanji"):
        logits_BC = torch.from_numpy(np.load(args.folder / f"{name}.npy"))
        about = json.loads((args.folder / f"{name}.json").read_text())
        keys = ("set", "classes", "typefaces", "accuracy", "mean_top1_probability")
        about = {**{key: about[key] for key in keys}, "records": len(logits_BC)}
        harness.report("codec", "teacher", [about], args.save)
        teacher = Teacher.of(name, logits_BC)
        lines = measure(teacher)
        harness.report("codec", "bytes and KL", lines, args.save)
        harness.report("codec", "bars", bars(lines), args.save)
    harness.report("codec", "speed", speeds(teacher, args.rounds), args.save)
    if args.save:
        codec_report.write()


if __name__ == "__main__":
    main()
