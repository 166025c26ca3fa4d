"""What a record keeps of the teacher's answer, against its bytes: our codecs and other ways.

    python -m benchmarks.mixed_views FOLDER               once: two ImageNet teachers' logits
    python -m benchmarks.glyphs FOLDER --sets kanji       once, if you like: another one's
    python -m benchmarks.bench_records FOLDER [--save]    about 20 minutes of 2 CPU cores

Codecs are calibrated on the first rows of each set and measured on the others. Bytes of ours are
those that a cache stores, those of the other caches' layouts as they document them, and beside it
after zstd; those of vector quantisers are their code's. At each temperature:

full     KL(teacher || record) over all classes, a tail spread evenly over its classes
bucket   the same, the tail as one outcome
cosine   between the gradients that the record and the live teacher give a student, over all rows
error    the norm of their difference, by the norm of the live one

"near" is a student whose logits are the teacher's plus normal noise of 0.7 nats, "fresh" one whose
logits are noise of 0.1. The loss spreads a tail evenly ("uniform"), as training from top-k records
does, ours and the other caches'.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch

from benchmarks import harness, record_report
from benchmarks.layouts import LAYOUTS, Layout, Named
from benchmarks.quantisers import VectorQuantiser
from kdcache.batch import Target, TemperedTarget, dense_target
from kdcache.cache import layout as layouts
from kdcache.cache.codecs import CodecSpec, Dense, TopK, Transformed, bind
from kdcache.cache.records import Records
from kdcache.cache.spec import CacheSpec
from kdcache.choices import TOP_K_TAIL
from kdcache.losses.distillation import distillation_losses, spread_tail
from kdcache.teacher.calibration import DENSE_CLASSES, Calibration, choose_record, measure_codec
from kdcache.teacher.options import RecordOptions
from kdcache.views.spec import ViewSpec

TEMPERATURES = (1.0, 2.0, 5.0, 10.0)
CALIBRATION_ROWS = 4096
ROWS_AT_ONCE = 512
STUDENTS = {"near": 0.7, "fresh": 0.1}
DISTORTIONS = (2, 1.5, 1, 0.7, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
K = (5, 10, 16, 32, 64, 128)
VECTOR_BYTES = (16, 32, 48, 64)
TINYVIT_K = 10
MOONSHOT = Transformed(1.2, k=6)
# Bytes of a record, and what they must reach.
KL_BYTES, KL_BAR, COSINE_BYTES, COSINE_BAR, MOONSHOT_BYTES = 60, 5.0, 350, 0.99, 44

Line = dict[str, Any]
Answer = Callable[[float], Target | TemperedTarget]


@dataclass(frozen=True)
class LogitSet:
    """live_BC   rows that are measured; calibration_NC: others"""

    name: str
    calibration_NC: torch.Tensor
    live_BC: torch.Tensor

    @staticmethod
    def of(name: str, logits: torch.Tensor) -> LogitSet:
        rows = min(CALIBRATION_ROWS, len(logits) // 2)
        return LogitSet(name, logits[:rows].float(), logits[rows:].float())

    @property
    def num_classes(self) -> int:
        return self.live_BC.shape[1]

    def cache_spec(self, codec: CodecSpec) -> CacheSpec:
        """Of a cache with whole shards."""
        return CacheSpec(1, 1 << 20, self.num_classes, codec, "0" * 16, "0" * 16, ViewSpec(224))


@dataclass(frozen=True)
class Contestant:
    """A kind of record, with its bytes; `answer` of rows of logits is the target at each T."""

    layout: str
    setting: str
    bytes_per_record: float
    zstd_bytes: float
    answer: Callable[[torch.Tensor], Answer]


# --- the contestants ---------------------------------------------------------------------------


def ours(logits: LogitSet) -> Iterator[Contestant]:
    C = logits.num_classes
    for dtype in ("float16", "uint8"):
        yield of_codec(logits, "dense", dtype, Dense(dtype))
        for k in K:
            if k < C:
                yield of_codec(logits, f"top k, {dtype}", f"k = {k}", TopK(k, dtype))
    k = min(8, C - 1)
    for distortion in DISTORTIONS:
        yield of_codec(logits, "transformed", f"D = {distortion:g}", Transformed(distortion, k))
    if C > MOONSHOT.k:
        yield of_codec(logits, "transformed, k = 6", f"D = {MOONSHOT.distortion:g}", MOONSHOT)


def of_codec(logits: LogitSet, layout: str, setting: str, codec: CodecSpec) -> Contestant:
    tables = codec.fit(logits.calibration_NC) if isinstance(codec, Transformed) else {}
    coder, spec = bind(codec, tables), logits.cache_spec(codec)

    def encode(live_BC: torch.Tensor) -> Records:
        return coder.encode(live_BC, spec.rows(0, np.arange(len(live_BC))))

    records = Records.concatenate([encode(x) for x in torch.split(logits.live_BC, ROWS_AT_ONCE)])
    _, size = layouts.pack(spec, records)

    def answer(live_BC: torch.Tensor) -> Answer:
        found = coder.decode(encode(live_BC), logits.num_classes)
        return lambda temperature: found

    return Contestant(layout, setting, size, size, answer)


def theirs(logits: LogitSet) -> Iterator[Contestant]:
    for name, layout in LAYOUTS.items():
        for k in K:
            if k < logits.num_classes:
                yield of_layout(logits, name, layout, k)


def of_layout(logits: LogitSet, name: str, layout: Layout, k: int) -> Contestant:
    rows = layout.pack(logits.live_BC, k)
    zstd = len(numcodecs.Zstd(level=9).encode(np.ascontiguousarray(rows))) / len(rows)

    def answer(live_BC: torch.Tensor) -> Answer:
        return partial(tempered, layout.unpack(layout.pack(live_BC, k), k, logits.num_classes))

    return Contestant(name, f"k = {k}", rows.shape[1], zstd, answer)


def tempered(named: Named, temperature: float) -> TemperedTarget:
    log_p_BK, log_tail_B = named.at(temperature)
    return TemperedTarget(log_p_BK, named.class_ids_BK, log_tail_B, temperature, named.num_classes)


def vector_quantised(logits: LogitSet) -> Iterator[Contestant]:
    for kind in ("product", "residual"):
        for size in VECTOR_BYTES:
            if size < logits.num_classes:
                yield of_quantiser(logits, VectorQuantiser(kind, size))


def of_quantiser(logits: LogitSet, quantiser: VectorQuantiser) -> Contestant:
    words = quantiser.fit(logits.calibration_NC)

    def answer(live_BC: torch.Tensor) -> Answer:
        found = dense_target(quantiser.reconstruct(words, live_BC))
        return lambda temperature: found

    size = quantiser.size
    return Contestant(f"{quantiser.kind} VQ", f"{size} codes", size, size, answer)


# --- what is measured --------------------------------------------------------------------------


def measure(logits: LogitSet, contestant: Contestant) -> Line:
    """A result line, of all measured rows."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, values: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + values.double().sum()

    noise = torch.Generator().manual_seed(0)
    for live_BC in torch.split(logits.live_BC, ROWS_AT_ONCE):
        standard_BC = torch.randn(live_BC.shape, generator=noise)
        students = {"near": live_BC + STUDENTS["near"] * standard_BC}
        students["fresh"] = STUDENTS["fresh"] * standard_BC
        live, answer = dense_target(live_BC), contestant.answer(live_BC)
        for T in TEMPERATURES:
            target = answer(T)
            log_p_BC = torch.log_softmax(live_BC.double() / T, 1)
            full_B, bucket_B = divergences(log_p_BC, target, T)
            add(f"full_{T:g}", full_B)
            add(f"bucket_{T:g}", bucket_B)
            for name, student_BC in students.items():
                g_BC, ours_BC = (gradient(student_BC, x, T) for x in (live, target))
                at = f"{name}_{T:g}"
                add(f"product_{at}", g_BC * ours_BC)
                add(f"live_{at}", g_BC.square())
                add(f"record_{at}", ours_BC.square())
                add(f"difference_{at}", (g_BC - ours_BC).square())
    line: Line = {
        "set": logits.name,
        "classes": logits.num_classes,
        "layout": contestant.layout,
        "setting": contestant.setting,
        "bytes": contestant.bytes_per_record,
        "zstd_bytes": contestant.zstd_bytes,
    }
    rows = len(logits.live_BC)
    for kind in ("full", "bucket"):
        line |= {f"{kind}_{T:g}": float(sums[f"{kind}_{T:g}"]) / rows for T in TEMPERATURES}
    for name in STUDENTS:
        for at in (f"{name}_{T:g}" for T in TEMPERATURES):
            norms = (sums[f"live_{at}"] * sums[f"record_{at}"]).sqrt()
            line[f"cosine_{at}"] = float(sums[f"product_{at}"] / norms)
            line[f"error_{at}"] = float((sums[f"difference_{at}"] / sums[f"live_{at}"]).sqrt())
    return line


def divergences(
    log_p_BC: torch.Tensor, target: Target | TemperedTarget, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in nats of each row from the teacher's log-probabilities at T: over all classes, the tail
    spread evenly; over the named classes and the tail as one outcome. A target without a tail names
    all classes."""
    log_q_BC = log_probabilities(target, temperature).double()
    full_B = _kl(log_p_BC, log_q_BC).sum(1)
    if target.class_ids_BK is None:
        return full_B, full_B
    ids_BK = target.class_ids_BK.long()
    parts = []
    for log_BC in (log_p_BC, log_q_BC):
        rest_BC = log_BC.scatter(1, ids_BK, -torch.inf)
        parts.append(torch.cat([log_BC.gather(1, ids_BK), rest_BC.logsumexp(1, keepdim=True)], 1))
    return full_B, _kl(*parts).sum(1)


def log_probabilities(target: Target | TemperedTarget, temperature: float) -> torch.Tensor:
    """Of all classes [B, C], the tail spread evenly over its classes."""
    if isinstance(target, Target):
        return spread_tail(target, temperature)
    assert target.log_tail_B is not None
    each_B1 = (target.log_tail_B - math.log(target.num_classes - target.log_p_BK.shape[1]))[:, None]
    each_BC = each_B1.expand(-1, target.num_classes)
    return each_BC.scatter(1, target.class_ids_BK, target.log_p_BK)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return log_p.exp() * (log_p - log_q)


def gradient(
    student_BC: torch.Tensor, target: Target | TemperedTarget, temperature: float
) -> torch.Tensor:
    """Of the loss, with respect to the student's logits [B, C]."""
    z_BC = student_BC.clone().requires_grad_()
    # Not the mean: the last batch of rows is smaller.
    loss_B = distillation_losses(z_BC, target, temperature=temperature, tail=TOP_K_TAIL)
    return torch.autograd.grad(loss_B.sum(), z_BC)[0]


def automatic(logits: LogitSet) -> list[Line]:
    """What `precompute --record auto` chooses at each temperature, its tables' bytes left out."""
    lines = []
    for T in TEMPERATURES:
        options = RecordOptions(data=Path("x"), teachers=("x",), temperature=T)
        spec, live = logits.cache_spec(Dense()), Calibration(logits.calibration_NC)
        few = logits.num_classes <= DENSE_CLASSES
        choice = measure_codec(spec, live) if few else choose_record(spec, live, options)
        fidelity = {f"{x.temperature:g}": round(x.cosine, 4) for x in choice.fidelity}
        lines.append(
            {
                "set": logits.name,
                "auto_at": T,
                "record": choice.codec.describe(logits.num_classes),
                "bytes": choice.bytes_per_record,
                "cosine": fidelity,
            }
        )
    return lines


# --- the bars ----------------------------------------------------------------------------------


def bars(lines: list[Line]) -> list[Line]:
    """Of each set: at most so many bytes, and what the best transformed records have there."""
    found: list[Line] = []
    records = [x for x in lines if x["layout"].startswith("transformed")]
    names = (x for x in lines if (x["layout"], x["setting"]) == ("TinyViT", f"k = {TINYVIT_K}"))
    anchor = next(names, None)
    if anchor is None:
        return []  # too few classes for that record, which the bars are set by
    for what, size in (("KL", KL_BYTES), ("KL, moonshot", MOONSHOT_BYTES)):
        few = [x for x in records if x["bytes"] <= size]
        times = [{T: anchor[f"full_{T:g}"] / x[f"full_{T:g}"] for T in TEMPERATURES} for x in few]
        if few:
            best, ratios = max(zip(few, times, strict=True), key=lambda one: min(one[1].values()))
            found.append(_bar(best, f"{what} of TinyViT, k = 10 / ours", size, ratios, KL_BAR))
    few = [x for x in records if x["bytes"] <= COSINE_BYTES]
    if few:
        best = max(few, key=lambda x: min(x[f"cosine_near_{T:g}"] for T in TEMPERATURES))
        cosines = {T: best[f"cosine_near_{T:g}"] for T in TEMPERATURES}
        found.append(_bar(best, "cosine, near student", COSINE_BYTES, cosines, COSINE_BAR))
    return found


def _bar(line: Line, what: str, size: int, found: dict[float, float], bar: float) -> Line:
    return {
        "set": line["set"],
        "case": f"{what}, at most {size} bytes",
        "record": f"{line['layout']}, {line['setting']}",
        "bytes": line["bytes"],
        **{f"at_{T:g}": value for T, value in found.items()},
        "bar": bar,
        "met": min(found.values()) >= bar,
    }


def contestants(logits: LogitSet) -> Iterable[Contestant]:
    yield from ours(logits)
    yield from theirs(logits)
    yield from vector_quantised(logits)


def read_set(path: Path) -> tuple[LogitSet, Line]:
    """Logits, and what is known of them."""
    about = json.loads(path.with_suffix(".json").read_text())
    keys = ("set", "classes", "images", "mean_top1_probability", "accuracy", "typefaces")
    logits = LogitSet.of(path.stem, torch.from_numpy(np.load(path)))
    known = {key: about[key] for key in keys if key in about}
    return logits, known | {"records": len(logits.live_BC)}


def forget(name: str) -> None:
    """Leave out earlier result lines of this set."""
    path = harness.RESULTS / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(x for x in lines if json.loads(x)["set"] != name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the logits lie")
    parser.add_argument("--sets", nargs="+", choices=list(record_report.SETS), help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the result lines, make the page")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.sets or record_report.SETS:
        path = args.folder / f"{name}.npy"
        if not path.exists():
            print(f"no {path}: left out")
            continue
        logits, about = read_set(path)
        if args.save:
            forget(name)
        lines = [measure(logits, one) for one in contestants(logits)]
        harness.report("records", "teacher", [about], args.save)
        harness.report("records", "bytes and fidelity", lines, args.save)
        if met := bars(lines):
            harness.report("records", "bars", met, args.save)
        harness.report("records", "auto", automatic(logits), args.save)
    if args.save:
        record_report.write()


if __name__ == "__main__":
    main()
