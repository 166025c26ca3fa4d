"""Figures from sums against independent definitions in NumPy, one sample after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdcache.evaluation.metrics import (
    BINS,
    Sums,
    accuracy_sums,
    calibration_error,
    feature_sums,
    fidelity_sums,
    linear_cka,
)

F64 = NDArray[np.float64]


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added(*parts: Sums) -> Sums:
    return {name: torch.stack([p[name] for p in parts]).sum(0) for name in parts[0]}


# --- calibration -----------------------------------------------------------------------------


def calibration_by_loop(logits: F64, labels: NDArray[np.int64]) -> float:
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    error = 0.0
    for m in range(1, BINS + 1):
        rows = [i for i in range(len(p)) if (m - 1) / BINS < p[i].max() <= m / BINS]
        if rows:
            accuracy = float(np.mean([p[i].argmax() == labels[i] for i in rows]))
            confidence = float(np.mean([p[i].max() for i in rows]))
            error += len(rows) / len(p) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 100.0])
def test_calibration_against_a_loop(scale: float) -> None:
    logits = normal(1, 500, 7, scale=scale)
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(2))
    found = calibration_error(accuracy_sums(logits, labels)["bins"])
    assert found == pytest.approx(calibration_by_loop(logits.double().numpy(), labels.numpy()))


def test_calibration_of_known_models() -> None:
    """Sure and right; sure and wrong; a coin's honesty."""
    sure = torch.tensor([[100.0, 0.0]]).repeat(8, 1)
    right, wrong = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
    assert calibration_error(accuracy_sums(sure, right)["bins"]) == pytest.approx(0)
    assert calibration_error(accuracy_sums(sure, wrong)["bins"]) == pytest.approx(1)
    even = torch.zeros(8, 2)
    half = torch.tensor([0, 1] * 4)
    assert calibration_error(accuracy_sums(even, half)["bins"]) == pytest.approx(0)


def test_a_bin_holds_its_upper_edge() -> None:
    """Of 15 bins a half is within the eighth, and a third is the end of the fifth."""
    for classes, expected in ((2, 8), (3, 5)):
        bins = accuracy_sums(torch.zeros(1, classes), torch.zeros(1, dtype=torch.int64))["bins"]
        assert bins[0].nonzero().tolist() == [[expected - 1]]


# --- likeness of logits ----------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 5, 6, 40])
def test_likeness_against_definitions(num_classes: int) -> None:
    z, t = normal(3, 200, num_classes, scale=2), normal(4, 200, num_classes, scale=3)
    found = fidelity_sums(z, t)
    agreement = agreement5 = kl = euclidean = 0.0
    for z_C, t_C in zip(z.double().numpy(), t.double().numpy(), strict=True):
        best = np.argsort(-z_C)
        agreement += best[0] == t_C.argmax()
        agreement5 += t_C.argmax() in best[:5]
        q, p = np.exp(z_C) / np.exp(z_C).sum(), np.exp(t_C) / np.exp(t_C).sum()
        kl += sum(p[c] * math.log(p[c] / q[c]) for c in range(num_classes))
        euclidean += math.sqrt(((z_C - t_C) ** 2).sum())
    assert float(found["agreement"]) == agreement
    assert float(found["agreement5"]) == agreement5
    assert float(found["kl"]) == pytest.approx(kl)
    assert float(found["euclidean"]) == pytest.approx(euclidean)


def test_kl_has_a_direction_and_no_offset_and_distance_has_one() -> None:
    z, t = normal(3, 50, 9), normal(4, 50, 9)
    a, b = fidelity_sums(z, t), fidelity_sums(t, z)
    assert float(a["kl"]) != pytest.approx(float(b["kl"]), rel=1e-3)
    shifted = fidelity_sums(z + 1, t)
    assert float(shifted["kl"]) == pytest.approx(float(a["kl"]), rel=1e-4)
    assert float(shifted["euclidean"]) != pytest.approx(float(a["euclidean"]), rel=1e-2)


def test_a_model_that_cannot_decide_agrees_with_itself() -> None:
    z = torch.zeros(30, 12)
    assert float(fidelity_sums(z, z)["agreement"]) == 30


def test_extreme_logits_give_finite_figures() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0]])
    assert all(torch.isfinite(x).all() for x in fidelity_sums(z, -z).values())
    assert float(fidelity_sums(z, -z)["kl"]) == pytest.approx(2e4)


# --- likeness of features --------------------------------------------------------------------


def gram_cka(x: F64, y: F64) -> float:
    """The definition over N x N Gram matrices (Kornblith et al. 2019, equations 3 and 4)."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n

    def hsic(k: F64, other: F64) -> float:
        return float(np.trace(k @ h @ other @ h)) / (n - 1) ** 2

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    found = linear_cka(feature_sums(x, y), len(x))
    assert found is not None
    return found


X, NOISE = normal(5, 120, 11) + 3, normal(6, 120, 17)
Y = X @ normal(7, 11, 17) + 4 * NOISE - 2


def test_cka_against_gram_matrices() -> None:
    expected = gram_cka(X.double().numpy(), Y.double().numpy())
    assert 0.3 < expected < 0.95
    assert cka(X, Y) == pytest.approx(expected, rel=1e-9)
    assert cka(Y, X) == pytest.approx(expected, rel=1e-9)


def test_what_cka_does_not_see() -> None:
    """Rotations, one scale for all, and a shift; it does see a scale for each feature."""
    rotation = torch.linalg.qr(normal(8, 17, 17).double())[0]
    expected = cka(X, Y)
    assert cka(X, Y.double() @ rotation) == pytest.approx(expected, rel=1e-9)
    assert cka(7 * X, Y) == pytest.approx(expected, rel=1e-6)
    assert cka(X, Y.double() + 50) == pytest.approx(expected, rel=1e-9)
    assert cka(X, X.double() @ torch.linalg.qr(normal(9, 11, 11).double())[0]) == pytest.approx(1)
    assert cka(X, Y * torch.arange(1, 18)) != pytest.approx(expected, rel=0.01)


def test_features_far_from_zero_keep_their_likeness() -> None:
    expected = gram_cka(X.double().numpy(), Y.double().numpy())
    assert cka(X.double() + 1e4, Y.double() - 1e4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_features_that_do_not_vary_have_no_likeness(constant: float) -> None:
    still = torch.full((120, 4), constant)
    assert linear_cka(feature_sums(X, still), 120) is None
    assert linear_cka(feature_sums(still, X), 120) is None


def test_parts_add_up() -> None:
    z, t = normal(3, 120, 9), normal(4, 120, 9)
    labels = torch.arange(120) % 9
    cuts = (slice(0, 50), slice(50, 50), slice(50, 120))  # one has no sample
    for whole, parts in (
        (accuracy_sums(z, labels), [accuracy_sums(z[c], labels[c]) for c in cuts]),
        (fidelity_sums(z, t), [fidelity_sums(z[c], t[c]) for c in cuts]),
        (feature_sums(X, Y), [feature_sums(X[c], Y[c]) for c in cuts]),
    ):
        torch.testing.assert_close(added(*parts), whole, rtol=1e-12, atol=1e-12)
        assert all(x.dtype == torch.float64 for x in whole.values())
