"""The losses on the CPU: the definition itself, and numba's form against it in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.kernels import cpu, ops, reference
from kdcache.kernels.problem import Problem
from tests import loss_cases
from tests.loss_cases import TAILS, assert_close, failing_teachers, problem, truth

ROOT = Path(__file__).parents[1]


def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    z = p.student_BC.detach().requires_grad_()
    assert ops.backend(z, p.class_ids_BK) == "numba"
    loss_B = ops.loss(p._replace(student_BC=z), "none")
    loss_B.sum().backward()
    return loss_B.detach(), z.grad


def check(p: Problem) -> None:
    assert_close(p, *run(p))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(cpu.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tempered", [False, True], ids=["logits", "log-p"])
@pytest.mark.parametrize("C", [10, 100, 1000, 1003, 21841])
def test_sparse(C: int, tempered: bool, tail: str) -> None:
    for K, T in ((1, 1.0), (5, 4.0), (min(16, C), 20.0), (min(C, 100), 2.0)):
        check(problem(4, C, K, T=T, tail=tail, tempered=tempered))


@pytest.mark.parametrize("tail", TAILS)
def test_one_class_and_two(tail: str) -> None:
    check(problem(3, 1, 1, T=0.5, tail=tail, tempered=True))
    check(problem(3, 2, 1, T=4.0, tail=tail))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_row_weights(T: float, tail: str) -> None:
    check(problem(T=T, tail=tail, row_weights=True))
    check(problem(T=T, tail=tail, row_weights=True, tempered=True))


@pytest.mark.parametrize("C", [1, 2, 10, 1003, 21841])
@pytest.mark.parametrize("T", [0.5, 1.0, 20.0])
def test_dense(C: int, T: float) -> None:
    check(problem(3, C, None, T=T))
    check(problem(3, C, None, T=T, row_weights=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_large_logits_in_every_dtype(dtype: torch.dtype, tail: str) -> None:
    for scale in (1.0, 1e3, 3e4):
        for T in (0.5, 4.0, 20.0):
            check(problem(T=T, tail=tail, scale=scale, dtype=dtype, tempered=True))
            check(problem(K=None, T=T, scale=scale, dtype=dtype))


@pytest.mark.parametrize("tail", TAILS)
def test_rows_with_fewer_named_classes(tail: str) -> None:
    check(problem(tail=tail, tempered=True, pads=3))
    check(problem(tail=tail, tempered=True, pads=7))


@pytest.mark.parametrize("tail", ["renormalise", "none", "bucket"])
def test_masked_student_logits(tail: str) -> None:
    p = problem(tail=tail, tempered=True, masked=20)
    check(p)
    assert run(p)[1][:, -20:].count_nonzero() == 0
    check(problem(K=None, masked=20))


@pytest.mark.parametrize("K", [8, None])
def test_rows_of_another_stride_and_shift(K: int | None) -> None:
    check(problem(C=101, K=K, stride=107, shift=3))
    p = problem(C=100, K=K)
    columns = p.student_BC.t().contiguous().t()
    assert not columns.is_contiguous()
    assert torch.equal(ops.loss(p._replace(student_BC=columns), "none"), run(p)[0])


def test_a_tail_that_all_but_vanishes() -> None:
    p = problem(tail="bucket", tempered=True, T=1.0)
    for gap in (20, 60, 120, 1000):
        z = p.student_BC.clone()
        z.scatter_add_(1, p.class_ids_BK, torch.full(p.class_ids_BK.shape, float(gap)))
        check(p._replace(student_BC=z))


@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_named_equals_dense(tail: str) -> None:
    p = problem(C=100, K=100, tail=tail)
    logits = torch.empty(5, 100).scatter_(1, p.class_ids_BK, p.values)
    dense = p._replace(values=logits, class_ids_BK=None)
    (loss, gradient), (dense_loss, dense_gradient) = run(p), run(dense)
    torch.testing.assert_close(loss, dense_loss, rtol=1e-5, atol=1e-6)
    worst = (gradient - dense_gradient).abs().amax(1) / gradient.abs().amax(1)
    assert worst.max() <= 4e-7


@pytest.mark.parametrize("K", [8, None])
def test_no_rows(K: int | None) -> None:
    loss_B, gradient_BC = run(problem(0, K=K))
    assert loss_B.shape == (0,)
    assert gradient_BC.shape == (0, 100)


@pytest.mark.parametrize("K", [8, None])
def test_twice_is_the_same_to_the_bit_on_any_number_of_threads(K: int | None) -> None:
    p = problem(64, 1003, K)
    first = run(p)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(p), strict=True))


@pytest.mark.parametrize("K", [8, None])
@pytest.mark.parametrize("C", [10, 16, 37])
def test_near_memory_is_the_same_to_the_bit(
    C: int, K: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM's loops take one element at a time where their arrays lie near each other."""
    empty = torch.empty
    for seed in range(30):
        p = problem(1, C, K, seed=seed)
        far = cpu.rows(p, 1.0, True)
        for gap in (0, 1, 6, 16, 32):
            pool = empty(2 * C + gap)
            student, gradient = pool[:C].view(1, C), pool[C + gap :].view(1, C)
            student.copy_(p.student_BC)
            beside = {p.student_BC.shape: gradient}
            monkeypatch.setattr(cpu.torch, "empty", lambda x, b=beside: b.get(x, empty(x)))
            near = cpu.rows(p._replace(student_BC=student), 1.0, True)
            assert near[1].data_ptr() == gradient.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True)), gap


def test_a_gradient_that_is_not_one_and_a_second_backward() -> None:
    p = problem()
    z = p.student_BC.detach().requires_grad_()
    loss_B = ops.loss(p._replace(student_BC=z), "none")
    factor = torch.linspace(-2, 3, 5)
    loss_B.backward(factor, retain_graph=True)
    assert_close(p, loss_B.detach(), z.grad, factor=factor)
    z.grad = None
    loss_B.backward(torch.ones(5))
    assert_close(p, loss_B.detach(), z.grad)


@pytest.mark.parametrize("tail", [*TAILS, None])
def test_a_teacher_that_is_no_number_makes_its_row_nan(tail: str | None) -> None:
    """As the definition has it: a NaN that passed for a class of no mass would go unseen."""
    for p in failing_teachers(100, tail):
        for loss_B, gradient in (truth(p), run(p)):
            assert loss_B.isnan().tolist() == [False, True, False]
            assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("tail", [*TAILS, None])
def test_a_student_that_is_no_number_makes_its_row_nan(tail: str | None) -> None:
    for column in (0, 50, 99):
        p = problem(3, 100, 8 if tail else None, tail=tail or "none")
        p.student_BC[1, column] = torch.nan
        for loss_B, gradient in (truth(p), run(p)):
            assert loss_B.isnan().tolist() == [False, True, False]
            assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
def test_a_class_that_does_not_exist_is_refused(wrong: int) -> None:
    p = problem()
    p.class_ids_BK[2, 3] = wrong
    with pytest.raises(IndexError, match="1 of 5 rows name a class outside 0 to 99"):
        run(p)


def test_the_gradient_of_a_row_sums_to_nothing() -> None:
    for tail in TAILS:
        gradient = run(problem(C=1000, K=16, tail=tail))[1].double()
        assert bool((gradient.sum(1).abs() <= loss_cases.EPS * 1000 * gradient.abs().amax(1)).all())


@pytest.mark.parametrize("tail", TAILS)
def test_the_reference_has_the_gradient_of_its_loss(tail: str) -> None:
    p = problem(3, 12, 4, T=2.0, tail=tail)
    exact = Problem(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in p))
    z = exact.student_BC.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.rows(exact._replace(student_BC=z)), z)


def test_uint16_classes() -> None:
    p = problem(index=torch.uint16)
    check(p)


def test_without_a_libgomp_another_layer_serves() -> None:
    code = """
import sys
sys.modules["numba.np.ufunc.omppool"] = None
import torch
from tests.test_kernels_cpu import problem, run
print(bool(run(problem())[1].isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


def _spoilt(p: Problem, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    loss, gradient = (x.float() for x in truth(p))
    if kind == "no 1/T":
        gradient = gradient * p.temperature
    elif kind == "T squared twice":
        loss = loss * p.temperature**2
    elif kind == "lost tail":
        bare = p._replace(tail_values=None)
        return tuple(x.float() for x in truth(bare))
    elif kind == "A = 1":
        q = torch.softmax(p.student_BC / p.temperature, 1)
        gradient = gradient + p.temperature * (1 - p.values.exp().sum(1, keepdim=True)) * q
    elif kind == "off by one":
        gradient = gradient.roll(1, 1)
    else:
        gradient = gradient.bfloat16().float()
    return loss, gradient


@pytest.mark.parametrize(
    "kind", ["no 1/T", "T squared twice", "lost tail", "A = 1", "off by one", "bf16 arithmetic"]
)
def test_the_bounds_catch_mistakes(kind: str) -> None:
    p = problem(tail="none", tempered=True) if kind == "A = 1" else problem()
    assert_close(p, *(x.float() for x in truth(p)))
    with pytest.raises(AssertionError):
        assert_close(p, *_spoilt(p, kind))
