"""The public loss: what it refuses, and that it is the definition on every kind of target."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from kdcache.batch import Target, dense_target
from kdcache.cache.codecs import Rows
from kdcache.errors import UsageError
from kdcache.kernels import reference
from kdcache.kernels.problem import Tail
from kdcache.losses.distillation import check_temperature, distillation_loss, distillation_losses
from tests.conftest import codec_for

TAILS: tuple[Tail, ...] = get_args(Tail)


def student_and_teacher(num_classes: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(num_classes)
    return 2 * torch.randn(16, num_classes), 2 * torch.randn(16, num_classes)


def recorded(teacher_BC: torch.Tensor, top_k: int) -> Target:
    num_classes = teacher_BC.shape[1]
    codec = codec_for(num_classes, top_k, "float32")
    rows = Rows(0, 0, np.arange(len(teacher_BC)))
    return codec.decode(codec.encode(teacher_BC, rows), num_classes)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0, 20.0])
def test_dense_targets_give_the_definition(temperature: float) -> None:
    student, teacher = student_and_teacher()
    found = distillation_losses(student, dense_target(teacher), temperature=temperature)
    wanted = reference.dense_kl(student.double(), teacher.double(), temperature)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    mean = distillation_loss(student, dense_target(teacher), temperature=temperature)
    torch.testing.assert_close(mean, found.mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("tail", TAILS)
def test_a_full_record_gives_the_dense_loss(tail: Tail, temperature: float) -> None:
    student, teacher = student_and_teacher()
    found = distillation_losses(student, recorded(teacher, 40), temperature=temperature, tail=tail)
    wanted = distillation_losses(student, dense_target(teacher), temperature=temperature)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_a_record_that_lacks_one_class_is_almost_dense(temperature: float) -> None:
    """A tail of one class is known exactly at T = 1, and almost at any other."""
    student, teacher = student_and_teacher()
    found = distillation_losses(student, recorded(teacher, 39), temperature=temperature)
    wanted = distillation_losses(student, dense_target(teacher), temperature=temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_bucket_is_the_default_and_a_lower_bound() -> None:
    student, teacher = student_and_teacher(200)
    target = recorded(teacher, 8)
    found = distillation_losses(student, target)
    assert torch.equal(found, distillation_losses(student, target, tail="bucket"))
    assert (found <= distillation_losses(student, dense_target(teacher)) + 1e-5).all()


def test_losses_of_one_target_differ_by_their_tail() -> None:
    student, teacher = student_and_teacher(200)
    target = recorded(teacher, 8)
    values = {float(distillation_loss(student, target, temperature=3.0, tail=t)) for t in TAILS}
    assert len(values) == len(TAILS)


@pytest.mark.parametrize("top_k", [5, 40])
def test_the_gradient_reaches_the_student_in_its_own_type(top_k: int) -> None:
    student, teacher = student_and_teacher()
    half = student.half().requires_grad_()
    distillation_loss(half, recorded(teacher, top_k), temperature=2.0).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    assert half.grad.abs().sum() > 0


@pytest.mark.parametrize("top_k", [5, 40])
def test_inputs_are_left_as_they_were(top_k: int) -> None:
    student, teacher = student_and_teacher()
    target = recorded(teacher, top_k)
    before = student.clone(), target.logits_BK.clone()
    student.requires_grad_()
    distillation_loss(student, target, temperature=2.0).backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(target.logits_BK, before[1])


def test_class_counts_must_agree() -> None:
    _, teacher = student_and_teacher()
    with pytest.raises(UsageError, match="the student has 39 classes, its targets have 40"):
        distillation_loss(torch.zeros(16, 39), dense_target(teacher))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_temperature_is_above_zero(temperature: float, sparse: bool) -> None:
    with pytest.raises(UsageError, match=f"temperature must be above 0, not {temperature}"):
        check_temperature(temperature, sparse=sparse)


def test_an_infinite_temperature_is_refused() -> None:
    with pytest.raises(UsageError, match="temperature must be"):
        check_temperature(float("inf"), sparse=False)


def test_below_one_only_targets_without_a_tail_are_defined() -> None:
    student, teacher = student_and_teacher()
    with pytest.raises(UsageError, match=r"at least 1 for top-k targets, not 0\.5: a cache made"):
        distillation_loss(student, recorded(teacher, 5), temperature=0.5)
    assert distillation_loss(student, recorded(teacher, 40), temperature=0.5).isfinite()
    labels = Target(torch.zeros(16, 1), torch.zeros(16, 1, dtype=torch.int64), None, 40)
    assert distillation_loss(student, labels, temperature=0.5).isfinite()


def test_a_label_gives_cross_entropy() -> None:
    student, _ = student_and_teacher()
    labels = torch.arange(16)
    target = Target(torch.zeros(16, 1), labels[:, None], None, 40)
    wanted = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(distillation_loss(student, target), wanted)
