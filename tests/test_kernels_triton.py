"""The Triton kernels against float64: on a GPU where there is one, else under Triton's interpreter.

triton.jit looks for TRITON_INTERPRET when it decorates, so the interpreter needs a process of its
own: without a GPU, `test_under_the_interpreter` runs the tests of this file in one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kdcache.kernels.problem import Problem
from tests.loss_cases import EPS, TAILS, assert_close, failing_teachers, moved, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_DEVICE = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_DEVICE else "cpu"
kernel = pytest.mark.skipif(not (INTERPRETED or ON_DEVICE), reason="run in a process of its own")
# The interpreter is numpy, which warns of what a GPU does silently: log 0, padding's inf - inf.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")
pytestmark = pytest.mark.gpu if ON_DEVICE else QUIET

if INTERPRETED or ON_DEVICE:
    import triton
    import triton.language as tl

    from kdcache.kernels import dense, dispatch, launch, sparse
    from kdcache.kernels.rows import edges, start_of

    @triton.jit
    def stores_kernel(ptr, C: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
        """Counts what `store_row` and then a store at `edges` write of each element."""
        row = tl.arange(0, 8).to(tl.int64)
        in_R = row < 8
        base, off = start_of(row, C, VEC)
        col = tl.arange(0, BLOCK)
        line = col[None, :] // VEC
        whole = (line >= ((off + VEC - 1) // VEC)[:, None]) & (line < ((off + C) // VEC)[:, None])
        tl.atomic_add(ptr + base[:, None] + col[None, :], 1.0, mask=whole)
        at, own = edges(off, 0, in_R, C, VEC, BLOCK)
        tl.atomic_add(ptr + base[:, None] + at, 1.0, mask=own)


@pytest.mark.skipif(INTERPRETED or ON_DEVICE, reason="this is the interpreter, or a GPU")
@pytest.mark.timeout(900)  # all tests of this file
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(part: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-m", part, "--noconftest"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        made = getattr(owner, name)

        def filled(*a: object, made=made, **k: object) -> torch.Tensor:
            memory = made(*a, **k)
            return memory.fill_(torch.nan) if memory.is_floating_point() else memory

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of long rows on rows of several hundred: many tiles, little work."""
    loop = dispatch.Entry(dispatch.ANY, "loop", 256, 1, 4, "")
    grad = dispatch.Entry(dispatch.ANY, "grad", 128, 2, 4, "")
    tables = {"sparse": (loop,), "dense": (loop,), "backward": (grad,)}
    monkeypatch.setattr(dispatch, "TABLES", tables)


def _choose(tiles: bool, request: pytest.FixtureRequest) -> None:
    if tiles:
        request.getfixturevalue("small_tiles")


def recompute(p: Problem, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    form = (dense if p.class_ids_BK is None else sparse).FORM
    loss_B, stats = form.forward(p, 1.0)
    return loss_B, form.backward(factor, stats, p, 1.0)


def in_forward(p: Problem, expected: float) -> tuple[torch.Tensor, torch.Tensor]:
    form = (dense if p.class_ids_BK is None else sparse).FORM
    scale = None if expected == 1 else torch.tensor([expected], device=DEVICE)
    return form.forward_with_gradient(p, 1.0, scale)


def check(p: Problem) -> None:
    p = moved(p, DEVICE)
    factor = torch.linspace(0.5, 2, len(p.student_BC), device=DEVICE)
    loss_B, gradient = recompute(p, factor)
    assert_close(p, loss_B, gradient, factor=factor, interpreter=INTERPRETED)
    loss_B, gradient = in_forward(p, 4.0)
    assert_close(p, loss_B, gradient, factor=4.0, interpreter=INTERPRETED)


@kernel
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("C", [10, 100, 1000, 1003])
def test_sparse(C: int, tail: str) -> None:
    check(problem(5, C, 1, T=1.0, tail=tail))
    check(problem(3, C, 5, T=4.0, tail=tail, tempered=True, dtype=torch.bfloat16))
    check(problem(3, C, min(16, C), T=20.0, tail=tail, dtype=torch.float16))
    check(problem(3, C, min(C, 100), T=2.0, tail=tail, row_weights=True, index=torch.uint16))


@kernel
@pytest.mark.parametrize("tail", TAILS)
def test_one_class_and_two(tail: str) -> None:
    check(problem(3, 1, 1, T=0.5, tail=tail, tempered=True))
    check(problem(3, 2, 1, T=4.0, tail=tail, dtype=torch.bfloat16))


@kernel
@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_many_named_classes_and_classes_beyond_15_bits() -> None:
    check(problem(1, 1500, 1024, tail="bucket"))
    p = problem(1, 40000, 4, tail="uniform", index=torch.uint16)
    p.class_ids_BK[0, 3] = 39999
    check(p)


@kernel
@pytest.mark.parametrize("tail", TAILS)
def test_sparse_long_rows(tail: str) -> None:
    check(problem(1, 21841, 16, tail=tail, dtype=torch.bfloat16))
    check(problem(1, 17003, 7, tail=tail, tempered=True, T=0.5, index=torch.int32))


@kernel
@pytest.mark.parametrize("C", [1, 2, 10, 100, 1003, 21841])
def test_dense(C: int) -> None:
    rows = 1 if C > 1003 else 3
    check(problem(rows, C, None, T=0.5))
    check(problem(rows, C, None, T=20.0, row_weights=True))
    check(problem(rows, C, None, T=1.0, dtype=torch.bfloat16))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_large_logits_in_every_dtype(dtype: torch.dtype, tail: str) -> None:
    for scale in (1e3, 3e4):
        for T in (0.5, 20.0):
            check(problem(T=T, tail=tail, scale=scale, dtype=dtype, tempered=True))


@kernel
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_large_logits_in_tiles(dtype: torch.dtype, tail: str) -> None:
    check(problem(2, 700, T=0.5, tail=tail, scale=3e4, dtype=dtype, tempered=True))
    check(problem(1, 1003, T=20.0, tail=tail, dtype=dtype, row_weights=True))


@kernel
@pytest.mark.parametrize("C", [100, 1003])
@pytest.mark.parametrize("tiles", [False, True])
def test_large_dense_logits(C: int, tiles: bool, request: pytest.FixtureRequest) -> None:
    _choose(tiles, request)
    check(problem(2, C, None, T=0.5, scale=3e4, dtype=torch.float16))
    p = problem(2, C, None, T=2.0)
    check(p._replace(student_BC=p.student_BC + 3e4, values=p.values - 3e4))


@kernel
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("tail", ["renormalise", "none", "bucket"])
def test_masked_student_logits_and_fewer_named_classes(
    tail: str, tiles: bool, request: pytest.FixtureRequest
) -> None:
    _choose(tiles, request)
    for C, masked in ((100, 20), (1003, 500)):
        check(problem(2, C, tail=tail, tempered=True, masked=masked, pads=3))
        check(problem(2, C, K=None, masked=masked))


@kernel
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("K", [8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("C", "stride", "shift"), [(1000, 1024, 0), (1001, 1008, 0), (1003, 1003, 1), (100, 131, 0)]
)
def test_rows_of_any_stride_and_alignment(
    C: int,
    stride: int,
    shift: int,
    dtype: torch.dtype,
    K: int | None,
    tiles: bool,
    request: pytest.FixtureRequest,
) -> None:
    _choose(tiles, request)
    check(problem(2, C, K, stride=stride, shift=shift, dtype=dtype))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1000, 1004, 1008, 1009])
def test_a_dense_teacher_of_another_dtype(stride: int, dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    p = problem(3, 1000, None, stride=stride, dtype=dtype)
    rounded = p.values.to(other)
    check(p._replace(values=rounded))


@kernel
@pytest.mark.parametrize("tiles", [False, True])
def test_a_tail_that_all_but_vanishes(tiles: bool, request: pytest.FixtureRequest) -> None:
    _choose(tiles, request)
    p = problem(2, 700, tail="bucket", tempered=True, T=1.0)
    for gap in (20, 120, 1000):
        z = p.student_BC.clone()
        z.scatter_add_(1, p.class_ids_BK, torch.full(p.class_ids_BK.shape, float(gap)))
        check(p._replace(student_BC=z))


@kernel
@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_named_equals_dense(tail: str) -> None:
    p = moved(problem(C=100, K=100, tail=tail), DEVICE)
    logits = p.values.new_empty(5, 100).scatter_(1, p.class_ids_BK, p.values)
    ones = torch.ones(5, device=DEVICE)
    whole = p._replace(values=logits, class_ids_BK=None)
    (loss, gradient), (dense_loss, dense_gradient) = recompute(p, ones), recompute(whole, ones)
    torch.testing.assert_close(loss, dense_loss, rtol=1e-5, atol=1e-6)
    worst = (gradient - dense_gradient).abs().amax(1) / gradient.abs().amax(1)
    assert worst.max() <= 4e-7
    nothing = EPS * 100 * gradient.abs().amax(1)
    assert bool((gradient.double().sum(1).abs() <= nothing).all())


@kernel
@pytest.mark.parametrize("K", [8, None])
@pytest.mark.parametrize("C", [100, 17003])
def test_no_rows(C: int, K: int | None) -> None:
    p = moved(problem(0, C, K), DEVICE)
    for loss_B, gradient in (recompute(p, torch.ones(0, device=DEVICE)), in_forward(p, 1)):
        assert loss_B.shape == (0,)
        assert gradient.shape == (0, C)


@kernel
@pytest.mark.parametrize("K", [8, None])
@pytest.mark.parametrize("C", [100, 1003, pytest.param(17003, marks=pytest.mark.slow)])
def test_twice_is_the_same_to_the_bit(C: int, K: int | None) -> None:
    p = moved(problem(4, C, K, dtype=torch.bfloat16), DEVICE)
    factor = torch.ones(4, device=DEVICE)
    for form in (lambda: recompute(p, factor), lambda: in_forward(p, 1)):
        first, second = form(), form()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kernel
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
def test_a_class_that_does_not_exist_makes_its_row_nan(
    wrong: int, tiles: bool, request: pytest.FixtureRequest
) -> None:
    """The kernel does it without the host waiting; nothing is written out of place."""
    _choose(tiles, request)
    p = moved(problem(), DEVICE)
    p.class_ids_BK[2, 3] = wrong
    bad = [row == 2 for row in range(5)]
    for loss_B, gradient in (recompute(p, torch.ones(5, device=DEVICE)), in_forward(p, 1)):
        assert loss_B.isnan().tolist() == bad
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == bad


@kernel
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("tail", [*TAILS, None])
def test_what_is_no_number_comes_out_as_none(
    tail: str | None, tiles: bool, request: pytest.FixtureRequest
) -> None:
    _choose(tiles, request)
    for column, nan in ((0, float("nan")), (350, -float("nan")), (699, float("inf"))):
        p = moved(problem(3, 700, 8 if tail else None, tail=tail or "none"), DEVICE)
        p.student_BC[1, column] = nan
        loss_B, gradient = recompute(p, torch.ones(3, device=DEVICE))
        assert loss_B.isfinite().tolist() == [True, False, True]
        assert gradient.isfinite().all(1).tolist() == [True, False, True]


@kernel
# In tiles it takes the interpreter five seconds a tail.
@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tail", [*TAILS, None])
def test_a_teacher_that_is_no_number_makes_its_row_nan(
    tail: str | None, tiles: bool, request: pytest.FixtureRequest
) -> None:
    """A failing teacher has such targets where the host does not wait for the device."""
    _choose(tiles, request)
    for p in failing_teachers(300, tail):
        q = moved(p, DEVICE)
        for loss_B, gradient in (recompute(q, torch.ones(3, device=DEVICE)), in_forward(q, 1)):
            assert loss_B.isnan().tolist() == [False, True, False]
            assert gradient.isnan().all(1).tolist() == [False, True, False]


@kernel
@pytest.mark.parametrize("C", [5, 8, 19, 24, 31])
def test_every_element_of_a_row_is_stored_once(C: int) -> None:
    """Twice would be a race of two threads whose values may differ in their last bit."""
    stored = torch.zeros(8, C, device=DEVICE)
    stores_kernel[(1,)](stored, C=C, VEC=8, BLOCK=64)
    assert torch.equal(stored, torch.ones_like(stored))


@kernel
def test_rescale() -> None:
    g = torch.arange(12.0, device=DEVICE).reshape(3, 4)
    gradient = torch.tensor([2.0, 4.0, 0.0], device=DEVICE)
    expected = g * gradient[:, None] / 2
    launch.rescale(g, gradient, torch.tensor([2.0], device=DEVICE))
    assert torch.equal(g, expected)
