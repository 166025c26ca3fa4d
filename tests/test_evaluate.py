"""Accuracy and fidelity against figures computed by hand on the same pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import models
from kdcache.dataset import Dataset
from kdcache.evaluate import evaluate
from kdcache.models import Classifier
from kdcache.sources import open_source
from tests.conftest import TEACHER

HALF = (0.5, 0.5, 0.5)


def network(seed: int, classes: int = 10) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, classes)), "x", HALF, HALF)


def test_figures_are_those_computed_by_hand(digits_test: Dataset) -> None:
    """Small images are shown whole, so the pixels are those of the source."""
    source = open_source("digits", "test")
    grey = torch.from_numpy(np.stack([np.asarray(x) for x in source.images]))
    images = grey[:, None].expand(-1, 3, -1, -1) if grey.ndim == 3 else grey.permute(0, 3, 1, 2)
    labels = torch.tensor(source.labels)
    model, teacher = network(1), models.load(TEACHER, "teacher", num_classes=10, size_px=8)
    with torch.inference_mode():
        z, t = model(images).double(), teacher(images).double()
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(t, 1)
    found = evaluate(model, digits_test, size_px=8, teacher=teacher, batch_size=64)
    assert found.samples == 297
    assert found.top1 == pytest.approx(float((z.argmax(1) == labels).double().mean()))
    rank = (z > z.gather(1, labels[:, None])).sum(1)
    assert found.top5 == pytest.approx(float((rank < 5).double().mean()))
    agreement = float((z.argmax(1) == t.argmax(1)).double().mean())
    assert found.agreement == pytest.approx(agreement)
    cross = -float(log_q.gather(1, labels[:, None]).mean())
    assert found.cross_entropy == pytest.approx(cross, rel=1e-5)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 100, 297, 1000])
def test_the_batch_size_does_not_matter(digits_test: Dataset, batch_size: int) -> None:
    model = network(2)
    a = evaluate(model, digits_test, size_px=8, batch_size=batch_size)
    b = evaluate(model, digits_test, size_px=8)
    assert (a.samples, a.top1, a.top5) == (b.samples, b.top1, b.top5)
    assert a.cross_entropy == pytest.approx(b.cross_entropy, rel=1e-5)


def test_a_model_agrees_with_itself(digits_test: Dataset) -> None:
    teacher = models.load(TEACHER, "teacher", num_classes=10, size_px=8)
    found = evaluate(teacher, digits_test, size_px=8, teacher=teacher)
    assert found.agreement == 1
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_nothing_is_said_of_one(digits_test: Dataset) -> None:
    found = evaluate(network(3), digits_test, size_px=8)
    assert found.agreement is None
    assert found.kl is None


def test_top5_of_two_classes_means_nothing(photos: Dataset) -> None:
    found = evaluate(network(3, classes=2), photos, size_px=8)
    assert found.samples == 41
    assert found.top5 is None
    assert 0 <= found.top1 <= 1


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(digits_test: Dataset, training: bool) -> None:
    model = Classifier(
        nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10)), "x", HALF, HALF
    ).train(training)
    before = model.fingerprint()
    evaluate(model, digits_test, size_px=8)
    assert model.training is training
    assert model.network.training is training
    assert model.fingerprint() == before


def test_the_mode_is_restored_after_an_error(digits_test: Dataset) -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), "x", HALF, HALF).train()
    with pytest.raises(RuntimeError):
        evaluate(model, digits_test, size_px=8)
    assert model.training


def test_progress_counts_images(digits_test: Dataset) -> None:
    seen: list[int] = []
    evaluate(network(4), digits_test, size_px=8, batch_size=128, progress=seen.append)
    assert seen == [128, 256, 297]
