"""Random draws of the teacher: unbiased, reproducible, and a target as any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.cache.codecs import Rows, Sampled
from kdcache.cache.records import Records
from kdcache.errors import CacheCorrupt
from kdcache.kernels import reference
from kdcache.losses.distillation import distillation_loss

CLASSES = 12


def rows_of(logits_C: torch.Tensor, count: int) -> torch.Tensor:
    return logits_C.expand(count, -1)


def draws_of(
    logits_BC: torch.Tensor,
    draws: int,
    T: float = 1.0,
    *,
    seed: int = 0,
    view: int = 0,
    first: int = 0,
) -> Records:
    rows = np.arange(first, first + len(logits_BC))
    return Sampled(draws, T).encode(logits_BC, Rows(seed, view, rows))


def dense(records: Records, draws: int, num_classes: int, T: float = 1.0) -> torch.Tensor:
    """The estimate as probabilities [B, C]."""
    target = Sampled(draws, T).decode(records, num_classes)
    out = torch.zeros(len(records), num_classes)
    return out.scatter_add(1, target.class_ids_BK, target.log_p_BK.exp())


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("draws", [1, 7, 50])
def test_the_estimate_is_unbiased(draws: int, T: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(CLASSES) * 2
    p = torch.softmax(logits / T, 0)
    count = 40_000
    mean = dense(draws_of(rows_of(logits, count), draws, T), draws, CLASSES, T).mean(0)
    error = (p * (1 - p) / (draws * count)).sqrt()
    assert bool(((mean - p).abs() < 5 * error + 1e-7).all())


def test_the_top_k_would_be_biased_and_the_gradient_is_not() -> None:
    """Mean gradient over many draws against the dense one; renormalised top-k misses it."""
    torch.manual_seed(1)
    teacher, z = torch.randn(CLASSES), torch.randn(CLASSES)
    exact = torch.softmax(z, 0) - torch.softmax(teacher, 0)
    count, n = 40_000, 5
    student = rows_of(z, count).clone().requires_grad_()
    target = Sampled(n).decode(draws_of(rows_of(teacher, count), n), CLASSES)
    distillation_loss(student, target, tail="none", reduction="sum").backward()
    assert student.grad is not None
    found = student.grad.mean(0)
    assert (found - exact).abs().max() < 5 * 0.5 / (n * count) ** 0.5
    top = teacher.topk(n)
    biased = torch.softmax(z, 0)
    biased[top.indices] -= torch.softmax(top.values, 0)
    assert (biased - exact).abs().max() > 0.02


def test_draws_are_a_function_of_seed_view_and_row() -> None:
    torch.manual_seed(2)
    logits = torch.randn(100, CLASSES)
    whole = draws_of(logits, 8)
    again = Records.concatenate([draws_of(logits[:33], 8), draws_of(logits[33:], 8, first=33)])
    for name, array in whole.columns.items():
        np.testing.assert_array_equal(array, again.columns[name])
    for other in (draws_of(logits, 8, seed=1), draws_of(logits, 8, view=1)):
        assert (other.columns["counts"] != whole.columns["counts"]).any()


def test_draws_of_version_1_are_pinned() -> None:
    """They change only with the codec's name: a cache that is resumed would be of two kinds."""
    logits = torch.arange(6.0).expand(3, 6) / 2
    found = draws_of(logits, 6, seed=5, view=3, first=1000).columns
    assert found["classes"].tolist() == PINNED["classes"]
    assert found["counts"].tolist() == PINNED["counts"]


PINNED = {
    "classes": [[2, 3, 4, 0, 0, 0], [2, 3, 4, 5, 0, 0], [2, 4, 5, 0, 0, 0]],
    "counts": [[1, 1, 4, 0, 0, 0], [1, 1, 2, 2, 0, 0], [2, 2, 2, 0, 0, 0]],
}


def test_records_are_rising_classes_and_counts_that_sum_to_n() -> None:
    torch.manual_seed(3)
    records = draws_of(torch.randn(500, 300) * 3, 20).columns
    counts, classes = records["counts"].astype(int), records["classes"].astype(int)
    assert records["classes"].dtype == np.uint16
    assert (counts.sum(1) == 20).all()
    for c, n in zip(classes, counts, strict=True):
        live = n > 0
        assert (np.diff(c[live]) > 0).all()
        assert not live[np.argmin(live) :].any() or live.all()


def test_more_draws_than_classes() -> None:
    records = draws_of(torch.zeros(50, 3), 200)
    assert records.columns["classes"].shape == (50, 3)
    assert dense(records, 200, 3).sum(1).allclose(torch.ones(50))


def test_a_sure_teacher_is_one_class() -> None:
    logits = torch.full((4, CLASSES), -1000.0)
    logits[:, CLASSES - 1] = 0
    assert dense(draws_of(logits, 9), 9, CLASSES)[:, -1].eq(1).all()


def test_what_no_draws_can_have_given_is_corrupt() -> None:
    records = draws_of(torch.zeros(2, 3), 4)
    with pytest.raises(CacheCorrupt, match="a record does not hold 5 draws"):
        Sampled(5).decode(records, 3)
    with pytest.raises(CacheCorrupt, match="a record names class 2 of 2"):
        Sampled(4).decode(records[:1], 2)


@pytest.mark.parametrize("tail", ["none", "bucket"])
def test_the_loss_takes_it_whatever_the_tail(tail: reference.Tail) -> None:
    """Draws leave no tail, so all tails are one loss but the renormalised, which is it too."""
    torch.manual_seed(4)
    z, teacher = torch.randn(20, CLASSES), torch.randn(20, CLASSES)
    target = Sampled(6, 2.0).decode(draws_of(teacher, 6, 2.0), CLASSES)
    losses = [distillation_loss(z, target, temperature=2.0, tail=t) for t in (tail, "renormalise")]
    torch.testing.assert_close(losses[0], losses[1])
