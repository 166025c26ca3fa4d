"""The seam `Loss`: its member, its JSON, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from kdcache import choices
from kdcache.batch import Batch, dense_target
from kdcache.errors import UsageError
from kdcache.losses.distillation import TAILS, distillation_loss
from kdcache.losses.loss import LOSSES, Distillation, loss_from_json, loss_to_json
from kdcache.teacher.targets import LabelTargets


@pytest.fixture
def batch() -> Batch:
    return Batch(
        view=0,
        positions_B=np.arange(4),
        sample_ids_B=np.arange(4),
        images_BCHW=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        labels_B=torch.tensor([0, 1, 2, 2]),
        partner_labels_B=torch.tensor([1, 0, 2, 2]),
        mix_weights_B=torch.tensor([64, 64, 100, 0], dtype=torch.int16),
    )


@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
def test_distillation_is_the_functional_form_to_the_bit(batch: Batch, label_weight: float) -> None:
    torch.manual_seed(0)
    logits_BC, target = torch.randn(4, 5), dense_target(torch.randn(4, 5))
    expected = distillation_loss(logits_BC, target, temperature=2.0)
    if label_weight:
        labels = distillation_loss(logits_BC, LabelTargets(5)(batch))
        expected = torch.lerp(expected, labels, label_weight)
    assert torch.equal(
        Distillation(2.0, label_weight=label_weight)(logits_BC, target, batch), expected
    )


def test_the_labels_are_mixed_as_the_pixels(batch: Batch) -> None:
    logits_BC = torch.randn(4, 5)
    loss = Distillation(label_weight=1.0)(logits_BC, dense_target(logits_BC), batch)
    p_BC = torch.zeros(4, 5)
    for row, (own, partner, weight) in enumerate(((0, 1, 64), (1, 0, 64), (2, 2, 100), (2, 2, 0))):
        p_BC[row, own] += 1 - weight / 256
        p_BC[row, partner] += weight / 256
    entropy = -torch.special.xlogy(p_BC, p_BC).sum(1)
    ce_B = -(p_BC * logits_BC.log_softmax(1)).sum(1)
    assert loss.item() == pytest.approx((ce_B - entropy).mean().item(), rel=1e-5)


def test_the_tails_of_the_options_are_those_of_the_kernels() -> None:
    assert get_args(choices.Tail) == TAILS


@pytest.mark.parametrize(
    ("loss", "json"),
    [
        (Distillation(), {"name": "distillation"}),
        (Distillation(2, label_weight=0.5), {"temperature": 2.0, "label_weight": 0.5}),
        (Distillation(tail="uniform"), {"tail": "uniform"}),
    ],
)
def test_json_round_trip(loss: Distillation, json: dict[str, Any]) -> None:
    assert loss_to_json(loss) == {"name": "distillation", **json}
    assert loss_from_json(loss_to_json(loss)) == loss
    assert LOSSES["distillation"] is Distillation


@pytest.mark.parametrize(
    ("json", "words"),
    [
        ({"name": "hinge"}, "unknown loss 'hinge', known are distillation"),
        ({"name": "distillation", "alpha": 1}, "the loss 'distillation' has the field 'alpha'"),
    ],
)
def test_json_of_another_loss(json: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loss_from_json(json)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"tail": "none of it"}, "tail must be one of bucket, .*, not 'none of it'"),
        ({"label_weight": 1.1}, r"label weight must be in \[0, 1\], not 1.1"),
    ],
)
def test_bad_parameters(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Distillation(**fields)
