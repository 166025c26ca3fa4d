"""The benchmark of the codec: the other layouts, its arithmetic, its page."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import bench_codec, codec_report
from benchmarks.distortion import bytes_at, divergences, kl_at
from benchmarks.layouts import LAYOUTS, DistillKit

CLASSES, ROWS = 300, 50


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 4 * torch.randn(ROWS, CLASSES)


def test_the_measured_part_of_the_page_is_current() -> None:
    text = codec_report.PAGE.read_text()
    assert text == codec_report.page(text), "python -m benchmarks.bench_codec FOLDER --save"


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


def test_divergences_are_those_of_the_whole_distribution(logits: torch.Tensor) -> None:
    log_p = torch.log_softmax(logits.double(), 1)
    classes = log_p.topk(10, 1).indices
    log_named = torch.log_softmax(torch.randn(ROWS, 11, dtype=torch.float64), 1)
    named, tail = log_named[:, :10], log_named[:, 10]
    even = (tail - math.log(CLASSES - 10))[:, None].expand(ROWS, CLASSES)
    log_q = even.scatter(1, classes, named)
    full, bucket = divergences(log_p, classes, named, tail)
    assert full == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item())
    assert 0 < bucket < full
    assert divergences(log_p, None, log_p, None) == (0, 0)


def test_curves_are_read_between_their_points() -> None:
    curve = [(10.0, 1.0), (30.0, 0.01)]
    assert bytes_at(curve, 0.1) == pytest.approx(20)
    assert bytes_at(curve, 2.0) == 10
    assert bytes_at(curve, 0.001) is None
    assert kl_at(curve, 20) == pytest.approx(0.1)
    assert kl_at(curve, 5) is None
    assert kl_at(curve, 99) == 0.01


def test_lines_of_a_small_teacher_have_what_page_and_bars_need(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor
) -> None:
    monkeypatch.setattr(bench_codec, "K_BETWEEN", (100,))
    monkeypatch.setattr(bench_codec, "KL_ROWS", 30)
    lines = bench_codec.measure(bench_codec.Teacher.of("toy", logits))
    bars = bench_codec.bars(lines)
    assert len(bars) == len(bench_codec.K) * len(bench_codec.TEMPERATURES)
    assert "| TinyViT | 10 | 44.0 |" in codec_report._points(lines)
    assert "| toy | 10 | 44 |" in codec_report._bars(bars, lines)
    eight = {x["k"]: x for x in lines if x["layout"] == "kdcache, 8 bit"}
    assert eight["all"]["full_1"] < 1e-3
    assert eight[64]["full_2"] < eight[10]["full_2"]
