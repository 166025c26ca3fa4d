"""The benchmarks of records: the other layouts, vector quantisation, the arithmetic, the pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_records,
    harness,
    mixed_views,
    record_report,
    study_records,
    study_report,
)
from benchmarks.bench_records import LogitSet, divergences, of_codec
from benchmarks.layouts import LAYOUTS, DistillKit
from benchmarks.quantisers import VectorQuantiser
from kdcache.batch import TemperedTarget, dense_target
from kdcache.cache.codecs import Dense, TopK
from kdcache.losses.distillation import distillation_loss

CLASSES, ROWS = 300, 50


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 4 * torch.randn(ROWS, CLASSES)


@pytest.fixture(scope="module")
def toy() -> LogitSet:
    """Correlated logits, as a network's are: of 20 features."""
    torch.manual_seed(1)
    features, weights = torch.randn(1200, 20), torch.randn(20, 60)
    return LogitSet.of("toy", features @ weights)


@pytest.mark.parametrize("report", [record_report, study_report])
def test_the_measured_part_of_the_page_is_current(report: SimpleNamespace) -> None:
    text = report.PAGE.read_text()
    assert text == report.page(text), f"run {report.__name__}.write()"


# --- the other layouts -------------------------------------------------------------------------

# Bytes a record as documented, for k = 10 and 64 of 300 classes (9 bits).
WIDTHS = {
    "TinyViT": (44, 260),
    "FKD, float32": (97, 529),
    "FKD, float16": (49, 265),
    "DistillKit": (20 + 12, 32 + 24 + 72),
    "DistillKit, budget": (2 + 12 + 12, 2 + 12 + 72),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_their_documented_size_and_come_back(name: str, logits: torch.Tensor) -> None:
    log_p = torch.log_softmax(logits.double(), 1)
    for k, width in zip((10, 64), WIDTHS[name], strict=True):
        rows = LAYOUTS[name].pack(logits, k)
        assert (rows.dtype, rows.shape) == (np.uint8, (ROWS, width))
        named = LAYOUTS[name].unpack(rows, k, CLASSES)
        assert torch.equal(named.class_ids_BK, log_p.topk(k, 1).indices)
        truth = log_p.gather(1, named.class_ids_BK)
        error = (named.log_p_BK - truth).abs()
        assert error[:, 0].max() < 0.01
        # float16 probabilities below 2^-14 lose digits; the budget's fit has three terms.
        assert error[truth > -8].mean() < (0.3 if "budget" in name else 0.1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_what_a_layout_stands_for_sums_to_one(
    name: str, temperature: float, logits: torch.Tensor
) -> None:
    named = LAYOUTS[name].unpack(LAYOUTS[name].pack(logits, 10), 10, CLASSES)
    log_p_BK, log_tail_B = named.at(temperature)
    total = log_p_BK.exp().sum(1) + log_tail_B.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_fit_of_as_many_terms_as_ranks_is_exact() -> None:
    logits = torch.tensor([[5.0, 4.0, 2.5, 1.0, 0.0, -9.0, -9.0, -9.0]])
    layout = DistillKit(exact=1, powers=2)
    named = layout.unpack(layout.pack(logits, 5), 5, 8)
    truth = torch.log_softmax(logits.double(), 1)[:, 1:5]
    torch.testing.assert_close(named.log_p_BK[:, 1:], truth, rtol=0, atol=1e-5)


# --- vector quantisation -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["product", "residual"])
def test_a_quantiser_gives_back_rows_that_are_codewords(kind: str) -> None:
    rows = torch.randn(200, 12)
    quantiser = VectorQuantiser(kind, 3)
    found = quantiser.reconstruct(quantiser.fit(rows.repeat(2, 1)), rows)
    # 256 codewords from 200 different rows: k-means may have drawn a row twice.
    centred = rows - rows.mean(1, keepdim=True)
    assert ((found - centred).square().mean(1) < 1e-8).double().mean() > 0.6


@pytest.mark.parametrize("kind", ["product", "residual"])
def test_a_quantiser_of_more_bytes_is_closer(kind: str, toy: LogitSet) -> None:
    live = toy.live_BC - toy.live_BC.mean(1, keepdim=True)

    def error(size: int) -> float:
        quantiser = VectorQuantiser(kind, size)
        found = quantiser.reconstruct(quantiser.fit(toy.calibration_NC), toy.live_BC)
        return float((found - live).square().mean() / live.square().mean())

    assert error(20) < error(5) < error(1) < 1


# --- the arithmetic ----------------------------------------------------------------------------


def test_divergences_are_those_of_the_whole_distribution(logits: torch.Tensor) -> None:
    log_p = torch.log_softmax(logits.double() / 2, 1)
    classes = log_p.topk(10, 1).indices
    log_named = torch.log_softmax(torch.randn(ROWS, 11, dtype=torch.float64), 1)
    named, tail = log_named[:, :10], log_named[:, 10]
    even = (tail - math.log(CLASSES - 10))[:, None].expand(ROWS, CLASSES)
    log_q = even.scatter(1, classes, named)
    full, bucket = divergences(log_p, TemperedTarget(named, classes, tail, 2.0, CLASSES), 2.0)
    torch.testing.assert_close(full, (log_p.exp() * (log_p - log_q)).sum(1))
    p_named = log_p.gather(1, classes)
    p_tail = torch.log1p(-p_named.exp().sum(1))
    expected = (p_named.exp() * (p_named - named)).sum(1) + p_tail.exp() * (p_tail - tail)
    torch.testing.assert_close(bucket, expected)
    assert (bucket > 0).all()
    assert (bucket < full).all()


def test_exact_records_lose_nothing(toy: LogitSet) -> None:
    line = bench_records.measure(toy, of_codec(toy, "dense", "float32", Dense("float32")))
    for at in ("1", "2", "5", "10"):
        assert abs(line[f"full_{at}"]) < 1e-6
        for student in ("near", "fresh"):
            assert line[f"cosine_{student}_{at}"] == pytest.approx(1, abs=1e-6)
            assert line[f"error_{student}_{at}"] < 1e-5


def test_figures_of_a_record_are_those_of_its_target(toy: LogitSet) -> None:
    """The error and the cosine again, from the definition."""
    line = bench_records.measure(toy, of_codec(toy, "top k", "k = 5", TopK(5, "float16")))
    noise = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(x.shape, generator=noise)
        for x in torch.split(toy.live_BC, bench_records.ROWS_AT_ONCE)
    ]
    student = (toy.live_BC + 0.7 * torch.cat(parts)).double().requires_grad_()
    codec = TopK(5, "float16")
    target = codec.decode(codec.encode(toy.live_BC), toy.num_classes)
    live = torch.log_softmax(toy.live_BC.double() / 5, 1).exp()
    g_live = torch.softmax(student.detach() / 5, 1) - live
    loss = distillation_loss(student, target, temperature=5.0, tail="uniform")
    (g,) = torch.autograd.grad(loss, student)
    cosine = (g * g_live).sum() / (g.norm() * g_live.norm())
    assert line["cosine_near_5"] == pytest.approx(float(cosine), abs=1e-4)
    assert line["cosine_near_5"] < 0.9


def test_contestants_of_a_small_teacher_have_what_page_and_bars_need(
    monkeypatch: pytest.MonkeyPatch, toy: LogitSet
) -> None:
    monkeypatch.setattr(bench_records, "K", (10, 16))
    monkeypatch.setattr(bench_records, "DISTORTIONS", (1, 0.01))
    monkeypatch.setattr(bench_records, "VECTOR_BYTES", (16,))
    lines = [bench_records.measure(toy, one) for one in bench_records.contestants(toy)]
    at = {(x["layout"], x["setting"]): x for x in lines}
    assert at["transformed", "D = 0.01"]["full_1"] < at["transformed", "D = 1"]["full_1"]
    assert at["transformed", "D = 0.01"]["bytes"] > at["transformed", "D = 1"]["bytes"]
    # Twenty features: their directions hold everything.
    assert at["transformed", "D = 0.01"]["cosine_near_5"] > 0.98
    assert at["TinyViT", "k = 10"]["bytes"] == 44
    assert "| TinyViT, k = 10 | 44.0 |" in record_report._points(lines, "toy")
    bars = bench_records.bars(lines)
    kl = next(x for x in bars if x["case"].startswith("KL of TinyViT"))
    assert kl["bytes"] <= bench_records.KL_BYTES
    ours = at["transformed", kl["record"].split(", ")[-1]]
    assert kl["at_1"] == at["TinyViT", "k = 10"]["full_1"] / ours["full_1"]
    assert kl["met"] == (min(kl[f"at_{T}"] for T in (1, 2, 5, 10)) >= 5)
    assert "| toy | KL of TinyViT" in record_report._bars(bars)


def test_a_set_of_few_classes_has_no_bars() -> None:
    small = LogitSet.of("small", torch.randn(200, 10))
    lines = [bench_records.measure(small, one) for one in bench_records.contestants(small)]
    assert bench_records.bars(lines) == []
    assert {x["layout"] for x in lines} >= {"dense", "transformed", "top k, uint8", "TinyViT"}


def test_lines_of_a_set_replace_its_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    bench_records.forget("a")
    kept, gone = {"set": "b", "x": 1}, {"set": "a", "x": 2}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (gone, kept, gone)))
    bench_records.forget("a")
    assert [json.loads(x) for x in path.read_text().splitlines()] == [kept]


# --- the study ---------------------------------------------------------------------------------


def test_tinyvit_targets_are_those_of_its_layout(logits: torch.Tensor) -> None:
    def dense(batch: object) -> object:
        return dense_target(logits)

    targets = study_records.TinyViTTargets(dense, 2.0)  # type: ignore[arg-type]
    found = targets(SimpleNamespace())  # type: ignore[arg-type]
    named = LAYOUTS["TinyViT"].unpack(LAYOUTS["TinyViT"].pack(logits, 10), 10, CLASSES)
    log_p_BK, log_tail_B = named.at(2.0)
    torch.testing.assert_close(found.log_p_BK, log_p_BK)
    torch.testing.assert_close(found.log_tail_B, log_tail_B)
    assert found.temperature == 2.0


def test_runs_of_the_study_are_all_different() -> None:
    runs = [(record.name, *rest) for record, *rest in study_records.plan()]
    assert len(runs) == len(set(runs))
    whole = [x for x in runs if x[-1] == study_records.EPOCHS]
    assert len(whole) == len(study_records.RECORDS) * 3 * study_records.SEEDS


def test_a_table_of_the_study_has_means_and_ranges() -> None:
    def line(record: str, seed: int, kl: float) -> dict[str, object]:
        found = {"record": record, "T": 5.0, "seed": seed, "bytes": 44, "epochs": 4}
        return found | {"mixed_kl_1": kl, "mixed_kl_T": kl / 50, "mixed_agreement": 0.25}

    lines = [line("top 16", 0, 1.0), line("top 16", 1, 2.0)]
    row = study_report.table(lines, "mixed").splitlines()[-1]
    assert row == "| top 16 | 44 | 1.500 ± 0.500 | 0.0300 ± 0.0100 | 25.0 ± 0.0 % |"


# --- the sets ----------------------------------------------------------------------------------


def test_fashion_mnist_needs_a_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"run `kdcache demo --out {tmp_path}` first"):
        mixed_views.fashion_mnist(tmp_path)


def test_a_set_is_read_in_two_parts(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "x.json").write_text(json.dumps({"set": "x", "classes": 8, "view": {}}))
    found, about = bench_records.read_set(tmp_path / "x.npy")
    assert np.array_equal(found.calibration_NC, rows[:15])
    assert np.array_equal(found.live_BC, rows[15:])
    assert about == {"set": "x", "classes": 8, "records": 15}
