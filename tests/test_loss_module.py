"""The loss as a user of it has it: checks, module, torch.compile, autocast, CUDA graph."""

from __future__ import annotations

import pytest
import torch

from kdcache.codec import decode, dense_target, encode
from kdcache.errors import UsageError
from kdcache.kernels import ops, reference
from kdcache.loss import DistillationLoss, distillation_loss
from kdcache.records import Target, TemperedTarget

B, C = 12, 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def teacher_logits() -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(0)) * 3


def student_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    z = torch.randn(B, C, generator=torch.Generator().manual_seed(1)) * 2
    return z.to(dtype).requires_grad_()


def target(kind: str, device: str = "cpu") -> Target:
    logits = teacher_logits()
    made = dense_target(logits) if kind == "dense" else decode(encode(logits, 5, "float32"), C)
    return made.to(torch.device(device))


def labels(device: str = "cpu") -> torch.Tensor:
    return torch.arange(B, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_it_is_the_reference(kind: str, reduction: str, device: str) -> None:
    z, goal = student_logits().detach().to(device).requires_grad_(), target(kind, device)
    weights = torch.linspace(0, 2, B, device=device)
    loss = distillation_loss(
        z, goal, temperature=3.0, label_weight=0.25, labels=labels(device), weights=weights,
        reduction=reduction,
    )  # fmt: skip
    true_B = reference.rows(
        z.double(), goal.logits_BK, goal.classes_BK, goal.tail_B3, labels(device), weights, 3.0,
        0.25, "bucket",
    )  # fmt: skip
    true = reference.reduce(true_B, reduction)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    (true_gradient,) = torch.autograd.grad(true.sum(), z)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-6)


def test_mean_is_sum_by_count() -> None:
    z, goal = student_logits(), target("sparse")
    total = distillation_loss(z, goal, reduction="sum")
    torch.testing.assert_close(distillation_loss(z, goal) * B, total, rtol=4e-7, atol=0)


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(kind: str, dynamic: bool, device: str) -> None:
    goal = target(kind, device)

    def step(z: torch.Tensor) -> torch.Tensor:
        return 3 * distillation_loss(
            z * 2, goal, temperature=2.0, label_weight=0.5, labels=labels(device)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    z = student_logits().detach().to(device).requires_grad_()
    results = [torch.autograd.grad(f(z), z)[0] for f in (step, compiled)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(step(z), compiled(z), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Logits come out of autocast in 16 bits; the loss computes and returns 32."""
    student = torch.nn.Linear(8, C).to(device)
    x, goal = torch.randn(B, 8, device=device), target("sparse", device)
    with torch.autocast(device, dtype):
        logits = student(x)
        loss = distillation_loss(logits, goal, temperature=2.0)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    loss.backward()
    true = distillation_loss(logits.detach().double(), goal, temperature=2.0)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    assert bool(student.weight.grad.isfinite().all())


def test_module() -> None:
    z, goal = student_logits(), target("sparse")
    module = DistillationLoss(2.0, tail="uniform", label_weight=0.1, reduction="sum")
    functional = distillation_loss(
        z, goal, temperature=2.0, tail="uniform", label_weight=0.1, labels=labels(),
        reduction="sum",
    )  # fmt: skip
    assert torch.equal(module(z, goal, labels()), functional)
    assert "temperature=2.0, tail=uniform, label_weight=0.1" in repr(module)


def test_a_target_of_ones_own() -> None:
    log_p = torch.log_softmax(teacher_logits() / 2, 1)
    values, classes = log_p.topk(4)
    rest = torch.log1p(-values.exp().sum(1))
    goal = TemperedTarget(values, classes.int(), rest, 2.0, C)
    z = student_logits()
    loss = distillation_loss(z, goal, temperature=2.0, tail="uniform")
    true = distillation_loss(z.double(), goal, temperature=2.0, tail="uniform")
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"the target is at temperature 2.0, the loss at 1.0"):
        distillation_loss(z, goal)


@pytest.mark.filterwarnings("default")  # the checker's own
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_operators_keep_their_word(kind: str) -> None:
    goal = target(kind)
    arguments = (
        student_logits(), goal.logits_BK, goal.classes_BK, goal.tail_B3, labels(), None, 2.0, 0.5,
        "bucket", False, True, True,
    )  # fmt: skip
    torch.library.opcheck(ops.loss_forward, arguments)


def test_without_numba_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    z, goal = student_logits(), target("sparse")
    fused = distillation_loss(z, goal, temperature=2.0)
    monkeypatch.setattr(ops, "HAS_NUMBA", False)
    assert ops.backend(z, goal.classes_BK) == "reference"
    torch.testing.assert_close(distillation_loss(z, goal, temperature=2.0), fused)


def test_no_rows_cost_nothing() -> None:
    z = torch.empty(0, C, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        empty = dense_target(torch.empty(0, C))
        loss = distillation_loss(z.to(dtype), empty)
        loss.backward()
        assert loss == 0


def test_usage_errors() -> None:
    z, goal = student_logits(), target("sparse")
    with pytest.raises(UsageError, match=r"the student has 49 classes, its targets have 50"):
        distillation_loss(z[:, :-1], goal)
    with pytest.raises(UsageError, match=r"logits must be \[B, C\], not \[12\]"):
        distillation_loss(z[:, 0], goal)
    with pytest.raises(UsageError, match="target has 12 rows, the student's logits 11"):
        distillation_loss(z[1:], goal)
    with pytest.raises(UsageError, match="labels has 3 rows, the student's logits 12"):
        distillation_loss(z, goal, label_weight=0.5, labels=labels()[:3])
    with pytest.raises(UsageError, match="weights has 13 rows, the student's logits 12"):
        distillation_loss(z, goal, weights=torch.ones(13))
    with pytest.raises(UsageError, match=r"labels must be class numbers, not torch.float32"):
        distillation_loss(z, goal, label_weight=0.5, labels=labels().float())
    with pytest.raises(UsageError, match=r"tail must be one of bucket, .*, not 'renorm'"):
        distillation_loss(z, goal, tail="renorm")
    with pytest.raises(UsageError, match="reduction must be one of mean, sum, none, not 'batch'"):
        distillation_loss(z, goal, reduction="batch")
    with pytest.raises(UsageError, match="target is on meta, the student's logits on cpu"):
        distillation_loss(z, goal.to(torch.device("meta")))
    with pytest.raises(UsageError, match="label_weight must be from 0 to 1, not 2"):
        distillation_loss(z, goal, label_weight=2, labels=labels())
    with pytest.raises(UsageError, match=r"label_weight 0.5 needs labels="):
        distillation_loss(z, goal, label_weight=0.5)
    with pytest.raises(UsageError, match=r"temperature must be above 0, not 0"):
        distillation_loss(z, goal, temperature=0)
    with pytest.raises(UsageError, match=r"at least 1 for top-k targets, not 0.5"):
        distillation_loss(z, goal, temperature=0.5)
    moving = Target(goal.logits_BK.clone().requires_grad_(), goal.classes_BK, goal.tail_B3, C)
    with pytest.raises(UsageError, match="detach it"):
        distillation_loss(z, moving)


def curve(dtype: torch.dtype) -> list[float]:
    """Twenty steps of a small student; float64 logits take the reference."""
    torch.manual_seed(0)
    student, x, goal = torch.nn.Linear(8, C), torch.randn(B, 8), target("sparse")
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = distillation_loss(student(x).to(dtype), goal, temperature=2.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_training_has_the_curve_of_the_reference() -> None:
    fused, true = curve(torch.float32), curve(torch.float64)
    assert true[-1] < true[0] / 2
    assert fused == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("nan", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalise", "none"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_what_is_no_number_comes_out_as_none(kind: str, tail: str, nan: float) -> None:
    """Whatever the bits of the NaN, and wherever in its row: a lost one would train on."""
    for column in (0, 7, C - 1):
        z = student_logits().detach()
        z[3, column] = nan
        z.requires_grad_()
        loss_B = distillation_loss(z, target(kind), temperature=2.0, tail=tail, reduction="none")
        assert loss_B.isfinite().tolist() == [row != 3 for row in range(B)]
        (gradient,) = torch.autograd.grad(loss_B.sum(), z)
        assert gradient.isfinite().all(1).tolist() == [row != 3 for row in range(B)]


def test_there_is_no_second_derivative() -> None:
    z = student_logits()
    with pytest.raises(NotImplementedError, match="use float64"):
        torch.autograd.grad(distillation_loss(z, target("sparse")), z, create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_it_runs_in_a_cuda_graph(kind: str, in_forward: bool) -> None:
    """Which also shows that nothing in it waits for the device."""
    goal = target(kind, "cuda")
    z = student_logits().detach().cuda().requires_grad_()

    def step() -> torch.Tensor:
        loss = distillation_loss(z, goal, temperature=2.0, gradient_in_forward=in_forward)
        return torch.autograd.grad(loss, z)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
