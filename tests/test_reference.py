"""The losses' definition against independent formulas in float64, and their gradients."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kdcache.kernels import reference
from kdcache.kernels.problem import Problem, Tail

F64 = NDArray[np.float64]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 20.0]
TAILS: tuple[Tail, ...] = get_args(Tail)


def pair(
    rows: int = 6, num_classes: int = 37, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits."""
    torch.manual_seed(rows * num_classes)
    return (3 * torch.randn(rows, num_classes)).to(dtype), (3 * torch.randn(rows, num_classes)).to(
        dtype
    )


def softmax(z: F64) -> F64:
    e = np.exp(z - z.max(1, keepdims=True))
    out: F64 = e / e.sum(1, keepdims=True)
    return out


def kl(p: F64, q: F64) -> F64:
    out: F64 = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(1)
    return out


def named_part(
    teacher: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest classes, their log-probabilities, and the log of the mass of the others."""
    log_p = torch.log_softmax(teacher / temperature, 1)
    class_ids = teacher.topk(k, 1).indices
    rest = log_p.scatter(1, class_ids, -torch.inf).logsumexp(1)
    return class_ids, log_p.gather(1, class_ids), rest


# --- dense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_dense_is_the_formula(num_classes: int, temperature: float) -> None:
    student, teacher = pair(num_classes=num_classes)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    found = reference.dense_kl(student, teacher, temperature).numpy()
    np.testing.assert_allclose(found, temperature**2 * kl(p, q), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_is_torchs_kl_div(dtype: torch.dtype, temperature: float) -> None:
    student, teacher = pair(dtype=dtype)
    wanted = functional.kl_div(
        torch.log_softmax(student / temperature, 1),
        torch.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="none",
    ).sum(1)
    found = reference.dense_kl(student, teacher, temperature)
    assert found.dtype == dtype
    torch.testing.assert_close(found, temperature**2 * wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_is_t_times_the_difference_of_the_softmaxes(temperature: float) -> None:
    """T^2 in front keeps the gradient's scale: d/dz T^2 KL = T (q - p), which tends to z - t."""
    student, teacher = pair()
    student.requires_grad_()
    reference.dense_kl(student, teacher, temperature).sum().backward()
    p, q = torch.softmax(teacher / temperature, 1), torch.softmax(student / temperature, 1)
    torch.testing.assert_close(student.grad, temperature * (q - p))


def test_with_a_large_temperature_the_loss_is_half_the_squared_distance() -> None:
    """Hinton et al. 2015, section 2.1: for zero-mean logits."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in pair())
    found = reference.dense_kl(student, teacher, 1e4)
    torch.testing.assert_close(found, (student - teacher).square().mean(1) / 2, rtol=1e-3, atol=0)


def test_equal_logits_have_no_loss_and_no_gradient() -> None:
    student, _ = pair(dtype=torch.float32)
    moved = (student + 5).requires_grad_()
    loss = reference.dense_kl(moved, student, 3.0)
    loss.sum().backward()
    assert loss.abs().amax() < 1e-5
    assert moved.grad is not None
    assert moved.grad.abs().amax() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_huge_logits_lose_nothing(dtype: torch.dtype, temperature: float) -> None:
    """Up to 6e4, in the logits' own type: the maximum goes before 1/T is applied."""
    torch.manual_seed(0)
    base = torch.randint(-6, 7, (5, 50)) * 1e4
    student = (base + 4 * torch.randn(5, 50)).clamp(-6e4, 6e4).to(dtype)
    teacher = (base + 4 * torch.randn(5, 50)).clamp(-6e4, 6e4).to(dtype)
    p, q = (torch.log_softmax(z.double() / temperature, 1) for z in (teacher, student))
    wanted = temperature**2 * torch.where(p.exp() > 0, p.exp() * (p - q), 0).sum(1)
    grown = student.clone().requires_grad_()
    found = reference.dense_kl(grown, teacher, temperature)
    found.sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * temperature**2)
    assert grown.grad is not None
    assert grown.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_impossible_classes_cost_nothing(temperature: float) -> None:
    """-inf where the teacher's probability is 0, on either side or both: finite all through."""
    student, teacher = pair(num_classes=8, dtype=torch.float32)
    teacher[:, 2:4] = -torch.inf
    student[:, 3] = -torch.inf
    student.requires_grad_()
    loss = reference.dense_kl(student, teacher, temperature)
    loss.sum().backward()
    keep = [0, 1, 2, 4, 5, 6, 7]
    without = reference.dense_kl(student.detach()[:, keep], teacher[:, keep], temperature)
    torch.testing.assert_close(loss.detach(), without)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[:, 3] == 0).all()


# --- sparse ----------------------------------------------------------------------------------


def densified(
    student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float, tail: Tail
) -> F64:
    """The same loss from full probability vectors, in NumPy."""
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    top = np.argsort(-p, axis=1, kind="stable")[:, :k]
    p_k, q_k = np.take_along_axis(p, top, 1), np.take_along_axis(q, top, 1)
    r = 1 - p_k.sum(1, keepdims=True)
    if tail == "none":
        return temperature**2 * (p_k * np.log(p_k / q_k)).sum(1)
    if tail == "renormalise":
        p_k = p_k / p_k.sum(1, keepdims=True)
        return temperature**2 * (p_k * np.log(p_k / q_k)).sum(1)
    if tail == "bucket":
        rest = q.sum(1, keepdims=True) - q_k.sum(1, keepdims=True)
        return temperature**2 * kl(np.concatenate([p_k, r], 1), np.concatenate([q_k, rest], 1))
    spread = np.repeat(r / (p.shape[1] - k), p.shape[1], 1)
    np.put_along_axis(spread, top, p_k, 1)
    return temperature**2 * kl(spread, q)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("tail", TAILS)
def test_sparse_is_its_dense_picture(tail: Tail, k: int, temperature: float) -> None:
    student, teacher = pair()
    found = reference.sparse_kl(
        student, *named_part(teacher, k, temperature), temperature, tail
    ).numpy()
    wanted = densified(student, teacher, k, temperature, tail)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_named_is_dense(tail: Tail, temperature: float) -> None:
    student, teacher = pair()
    class_ids, log_p, _ = named_part(teacher, 37, temperature)
    dense = reference.dense_kl(student, teacher, temperature)
    for log_tail in (None, torch.full((6,), -torch.inf, dtype=torch.float64)):
        found = reference.sparse_kl(student, class_ids, log_p, log_tail, temperature, tail)
        torch.testing.assert_close(found, dense)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bucket_is_a_lower_bound_that_rises_with_k(temperature: float) -> None:
    student, teacher = pair(rows=200)
    dense = reference.dense_kl(student, teacher, temperature)
    before = torch.zeros_like(dense)
    for k in (1, 2, 4, 8, 16, 32, 36):
        found = reference.sparse_kl(student, *named_part(teacher, k, temperature), temperature)
        assert (found <= dense + 1e-9).all()
        assert (found >= before - 1e-9).all()
        before = found


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("log_mass", [-torch.inf, -2000.0])
def test_an_empty_tail_leaves_the_students_tail_alone(tail: Tail, log_mass: float) -> None:
    """r = 0 adds nothing, and a student whose tail is impossible gets finite gradients."""
    student, teacher = pair(num_classes=6)
    teacher[:, 3:] = -torch.inf
    student[:, 3:] = -torch.inf
    student.requires_grad_()
    class_ids = torch.arange(3).expand(6, 3)
    log_p = torch.log_softmax(teacher, 1)[:, :3]
    log_tail = torch.full((6,), log_mass, dtype=torch.float64)
    loss = reference.sparse_kl(student, class_ids, log_p, log_tail, 1.0, tail)
    loss.sum().backward()
    wanted = reference.dense_kl(student.detach()[:, :3], teacher[:, :3], 1.0)
    torch.testing.assert_close(loss.detach(), wanted)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_class_named_without_mass_is_free() -> None:
    """Labels without mixing name their class twice, the second time with mass 0."""
    student = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    log_p = torch.tensor([[0.0, -torch.inf]])
    loss = reference.sparse_kl(student, torch.tensor([[0, 1]]), log_p, None, 1.0)
    loss.sum().backward()
    torch.testing.assert_close(loss[0].detach(), torch.tensor(math.log(1 + math.exp(-0.5))))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_students_are_computed_in_float32(dtype: torch.dtype, tail: Tail) -> None:
    student, teacher = pair(dtype=torch.float32)
    student = student.to(dtype)
    found = reference.sparse_kl(student, *named_part(teacher, 5, 2.0), 2.0, tail)
    exact = reference.sparse_kl(student.double(), *named_part(teacher.double(), 5, 2.0), 2.0, tail)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dense_passes_gradcheck(temperature: float) -> None:
    student, teacher = pair(rows=3, num_classes=7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: reference.dense_kl(z, teacher, temperature), (student,)
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("tail", TAILS)
def test_sparse_passes_gradcheck(tail: Tail, k: int, temperature: float) -> None:
    student, teacher = pair(rows=3, num_classes=7)
    student.requires_grad_()
    named = named_part(teacher, k, temperature)
    assert torch.autograd.gradcheck(
        lambda z: reference.sparse_kl(z, *named, temperature, tail), (student,)
    )


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_sum_to_zero_in_each_row(tail: Tail) -> None:
    """Softmax does not see a constant added to all logits, so no loss moves it."""
    student, teacher = pair()
    student.requires_grad_()
    reference.sparse_kl(student, *named_part(teacher, 4, 2.0), 2.0, tail).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(6, dtype=torch.float64))


# --- labels and rows -------------------------------------------------------------------------


def test_label_cross_entropy_is_torchs() -> None:
    student, _ = pair()
    student.requires_grad_()
    labels = torch.tensor([0, 36, -1, 5, -100, 7])
    found = reference.label_cross_entropy(student, labels)
    wanted = functional.cross_entropy(
        student, labels.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_label_cross_entropy_passes_gradcheck() -> None:
    student, _ = pair(rows=3, num_classes=7)
    student.requires_grad_()
    labels = torch.tensor([2, -1, 6])
    assert torch.autograd.gradcheck(lambda z: reference.label_cross_entropy(z, labels), (student,))


def test_a_row_without_a_label_may_have_impossible_classes() -> None:
    student = torch.tensor([[-torch.inf, 1.0, 0.5]], requires_grad=True)
    loss = reference.label_cross_entropy(student, torch.tensor([-1]))
    loss.sum().backward()
    assert loss == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_rows_are_weighted() -> None:
    student, teacher = pair()
    row_weights = torch.linspace(0, 2, 6)
    p = Problem(student, teacher, None, None, row_weights, 2.0, "bucket")
    wanted = row_weights * reference.dense_kl(student, teacher, 2.0)
    torch.testing.assert_close(reference.rows(p), wanted)
    torch.testing.assert_close(reference.reduce(wanted, "mean"), wanted.sum() / 6)


# --- the tail at any temperature -------------------------------------------------------------


def tail_numbers(tail: torch.Tensor) -> torch.Tensor:
    return torch.stack([tail.logsumexp(1), tail.mean(1), tail.var(1, correction=0)], 1)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 30.0])
def test_tail_mass_is_exact_at_both_ends(spread: float) -> None:
    torch.manual_seed(1)
    tail = spread * torch.randn(50, 200, dtype=torch.float64) - 4
    numbers = tail_numbers(tail)
    torch.testing.assert_close(reference.tail_log_mass(numbers, 200, 1.0), tail.logsumexp(1))
    start = reference.tail_log_mass(numbers, 200, 0.0)
    torch.testing.assert_close(start, torch.full_like(start, math.log(200)))


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 100.0])
def test_tail_mass_stays_where_it_must_lie(spread: float) -> None:
    """log sum exp(b t) is convex in b: below its chord, above its tangent; and above b K(1)."""
    torch.manual_seed(2)
    numbers = tail_numbers(-spread * torch.rand(50, 200, dtype=torch.float64).square())
    at_one, mean, _ = numbers.unbind(1)
    for b in (0.05, 0.1, 0.25, 0.5, 0.9):
        found = reference.tail_log_mass(numbers, 200, b)
        start = math.log(200)
        assert (found <= (1 - b) * start + b * at_one + 1e-9).all()
        assert (found >= start + b * mean - 1e-9).all()
        assert (found >= b * at_one - 1e-9).all()


def test_equal_tails_are_exact_at_every_temperature() -> None:
    numbers = tail_numbers(torch.full((1, 90), -3.0, dtype=torch.float64))
    for temperature in (1.0, 1.5, 4.0, 20.0):
        found = reference.tail_log_mass(numbers, 90, 1 / temperature)
        assert abs(float(found) - (math.log(90) - 3 / temperature)) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_temper_without_a_tail_is_log_softmax(temperature: float) -> None:
    _, teacher = pair()
    log_p, log_tail = reference.temper(teacher, None, 37, temperature)
    assert log_tail is None
    torch.testing.assert_close(log_p, torch.log_softmax(teacher / temperature, 1))
