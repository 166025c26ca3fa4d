"""The loss as a user calls it: checks, module, torch.compile, autocast, CUDA graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdcache.batch import Target, TemperedTarget, dense_target
from kdcache.cache.codecs import TopK
from kdcache.errors import UsageError
from kdcache.kernels import ops, reference
from kdcache.kernels.problem import Problem
from kdcache.losses.distillation import DistillationLoss, distillation_loss, log_probabilities

B, C = 12, 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def teacher_logits() -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(0)) * 3


def student_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    z = torch.randn(B, C, generator=torch.Generator().manual_seed(1)) * 2
    return z.to(dtype).requires_grad_()


def target(kind: str, device: str = "cpu") -> Target:
    logits = teacher_logits()
    codec = TopK(5, "float32")
    made = dense_target(logits) if kind == "dense" else codec.decode(codec.encode(logits), C)
    return made.to(torch.device(device))


def tempered(kind: str = "sparse", temperature: float = 2.0) -> TemperedTarget:
    goal = target(kind)
    log_p, log_tail = log_probabilities(goal, temperature)
    return TemperedTarget(log_p, goal.class_ids_BK.to(torch.uint16), log_tail, temperature, C)


def definition(z: torch.Tensor, goal: Target, row_weights: torch.Tensor | None = None) -> Problem:
    """At T = 3, in float64."""
    tail, values = goal.tail_B3, goal.logits_BK
    return Problem(z.double(), values, goal.class_ids_BK, tail, row_weights, 3.0, "bucket")


def labels(device: str = "cpu") -> torch.Tensor:
    return torch.arange(B, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_it_is_the_reference(kind: str, reduction: str, device: str) -> None:
    z, goal = student_logits().detach().to(device).requires_grad_(), target(kind, device)
    row_weights = torch.linspace(0, 2, B, device=device)
    loss = distillation_loss(z, goal, temperature=3.0, row_weights=row_weights, reduction=reduction)
    true = reference.reduce(reference.rows(definition(z, goal, row_weights)), reduction)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    (true_gradient,) = torch.autograd.grad(true.sum(), z)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_weight", [0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_with_labels(
    kind: str, dtype: torch.dtype, label_weight: float, reduction: str, device: str
) -> None:
    """w ((1 - a) T^2 KL + a CE) of each row; row 3 has no label, and row 0 no weight."""
    z, goal = student_logits(dtype).detach().to(device).requires_grad_(), target(kind, device)
    row_weights, some = torch.linspace(0, 2, B, device=device), labels(device)
    some[3] = -1
    loss = distillation_loss(
        z,
        goal,
        temperature=3.0,
        label_weight=label_weight,
        labels=some,
        row_weights=row_weights,
        reduction=reduction,
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = z.double()
    kl_B = reference.rows(definition(exact, goal))
    ce_B = functional.cross_entropy(exact, some, ignore_index=-1, reduction="none")
    true_B = row_weights * ((1 - label_weight) * kl_B + label_weight * ce_B)
    true = reference.reduce(true_B, reduction)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    (true_gradient,) = torch.autograd.grad(true.sum(), z)
    # One rounding to 16 bits, as that of the definition.
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(gradient, true_gradient, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_label_that_is_no_class(kind: str, dtype: torch.dtype) -> None:
    z, goal, some = student_logits(dtype), target(kind), labels()
    some[[2, 5]] = torch.tensor([C, 2**40])
    with pytest.raises(IndexError, match=f"labels must be below {C}, which 2 of {B} are not"):
        distillation_loss(z, goal, label_weight=0.5, labels=some)
    assert distillation_loss(z, goal, labels=some).isfinite()
    # The definition, which is what a GPU computes.
    ce_B = reference.label_cross_entropy(z, some)
    (gradient,) = torch.autograd.grad(ce_B.sum(), z)
    bad = [row in (2, 5) for row in range(B)]
    assert ce_B.isnan().tolist() == bad
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == bad


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_student_that_is_no_number_makes_its_labelled_row_nan(kind: str) -> None:
    z = student_logits().detach()
    z[4, 7] = torch.nan
    z.requires_grad_()
    loss_B = distillation_loss(z, target(kind), label_weight=0.5, labels=labels(), reduction="none")
    (gradient,) = torch.autograd.grad(loss_B.sum(), z)
    bad = [row == 4 for row in range(B)]
    assert loss_B.isnan().tolist() == gradient.isnan().all(1).tolist() == bad


@pytest.mark.parametrize("label_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("expected", [None, 1024.0])
def test_the_expected_gradient_of_the_fused_term(
    expected: float | None, label_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    loss = ops.loss
    monkeypatch.setattr(ops, "loss", lambda *a: calls.append(a) or loss(*a))
    scale = None if expected is None else torch.tensor(expected)
    total = distillation_loss(
        student_logits(),
        target("sparse"),
        label_weight=label_weight,
        labels=labels(),
        gradient_in_forward=True,
        expected_gradient=scale,
    )
    total.backward(torch.tensor(expected or 1.0))
    _, _, in_forward, of_kl = calls[0]
    assert in_forward == (label_weight < 1)
    if label_weight == 0:
        assert of_kl is scale
    else:
        assert of_kl.item() == (expected or 1.0) * (1 - label_weight)


def test_mean_is_sum_by_count() -> None:
    z, goal = student_logits(), target("sparse")
    total = distillation_loss(z, goal, reduction="sum")
    torch.testing.assert_close(distillation_loss(z, goal), total / B, rtol=2**-23, atol=0)


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_compiled(label_weight: float, kind: str, dynamic: bool, device: str) -> None:
    goal = target(kind, device)
    torch.compiler.reset()

    def step(z: torch.Tensor) -> torch.Tensor:
        return 3 * distillation_loss(
            z * 2, goal, temperature=2.0, label_weight=label_weight, labels=labels(device)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    z = student_logits().detach().to(device).requires_grad_()
    results = [torch.autograd.grad(f(z), z)[0] for f in (step, compiled)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(step(z), compiled(z), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("default")
def test_compiled_with_another_batch_stride_and_dtype_each_time() -> None:
    def step(z: torch.Tensor, goal: TemperedTarget) -> torch.Tensor:
        loss_B = distillation_loss(z, goal, temperature=2.0, tail="uniform", reduction="none")
        return (loss_B * torch.arange(1, len(z) + 1)).sum()

    compiled, whole = torch.compile(step, fullgraph=True), tempered()
    for rows, dtype in ((B, torch.float32), (5, torch.float32), (7, torch.bfloat16)):
        goal = TemperedTarget(
            whole.log_p_BK[:rows], whole.class_ids_BK[:rows], whole.log_tail_B[:rows], 2.0, C
        )
        z = torch.randn(C, rows).t().to(dtype).requires_grad_()
        results = [torch.autograd.grad(f(z, goal), z)[0] for f in (step, compiled)]
        torch.testing.assert_close(*results, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_autocast(label_weight: float, dtype: torch.dtype, device: str) -> None:
    """Logits come out of autocast in 16 bits; the loss computes and returns 32."""
    student = torch.nn.Linear(8, C).to(device)
    x, goal = torch.randn(B, 8, device=device), target("sparse", device)
    options = {"label_weight": label_weight, "labels": labels(device)}
    with torch.autocast(device, dtype):
        logits = student(x)
        loss = distillation_loss(logits, goal, temperature=2.0, **options)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    loss.backward()
    true = distillation_loss(logits.detach().double(), goal, temperature=2.0, **options)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    assert bool(student.weight.grad.isfinite().all())


def test_module() -> None:
    z, goal = student_logits(), target("sparse")
    module = DistillationLoss(2.0, tail="uniform", label_weight=0.1, reduction="sum")
    options = {"tail": "uniform", "label_weight": 0.1, "labels": labels(), "reduction": "sum"}
    same = distillation_loss(z, goal, temperature=2.0, **options)
    assert torch.equal(module(z, goal, labels()), same)
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
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_operators_match_their_schemas(
    kind: str, columns_first: bool, dtype: torch.dtype, device: str
) -> None:
    goal, z = target(kind, device), student_logits(dtype).detach().to(device)
    z = (z.t().contiguous().t() if columns_first else z).requires_grad_()
    inputs = (z, goal.logits_BK, goal.class_ids_BK, goal.tail_B3, torch.ones(B, device=device))
    options = (2.0, "bucket", False, True)
    torch.library.opcheck(ops.loss_forward, (*inputs, *options, True))
    torch.library.opcheck(ops.loss_forward, (z.detach(), *inputs[1:], *options, False))
    _, saved = ops.loss_forward(z.detach(), *inputs[1:], *options, True)
    upstream = torch.ones(B, device=device)
    arguments = (upstream, saved, z.detach(), *inputs[1:], *options)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.loss_backward, arguments, test_utils=tests)


def test_without_numba_and_triton_the_reference_serves() -> None:
    """In a process where neither can be imported, nor anything of kdcache but the loss."""
    code = """
import sys
sys.modules |= dict.fromkeys(("numba", "triton", "zarr", "ffcv", "typer", "torchvision"))
import torch
from kdcache.kernels import ops
from kdcache.losses.distillation import distillation_loss
from kdcache.batch import TemperedTarget
z = torch.arange(12.0).reshape(3, 4).requires_grad_()
goal = TemperedTarget(torch.full((3, 1), -0.5), torch.tensor([[0], [1], [3]]), None, 2.0, 4)
loss = distillation_loss(z, goal, temperature=2.0)
loss.backward()
print(ops.backend(z, goal.class_ids_BK), loss.item(), z.grad.sum().abs().item() < 1e-6)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    z = torch.arange(12.0).reshape(3, 4)
    goal = TemperedTarget(torch.full((3, 1), -0.5), torch.tensor([[0], [1], [3]]), None, 2.0, 4)
    backend, loss, zero_sum = run.stdout.split() or [run.stderr] * 3
    assert (backend, zero_sum) == ("reference", "True")
    fused = distillation_loss(z, goal, temperature=2.0).item()
    assert float(loss) == pytest.approx(fused, rel=1e-6)


@pytest.mark.parametrize(("version", "serves"), [("3.3.1", False), ("3.4.0+git1", True)])
def test_a_triton_without_masked_histograms_is_left_alone(
    version: str, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.importlib.metadata, "version", lambda _: version)
    assert ops._has_triton() == serves


def test_no_rows_cost_nothing() -> None:
    z = torch.empty(0, C, requires_grad=True)
    named = Target(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 3), C)
    for dtype in (torch.float32, torch.float64):
        for empty in (dense_target(torch.empty(0, C)), named):
            loss = distillation_loss(
                z.to(dtype), empty, label_weight=0.5, labels=torch.empty(0, dtype=torch.int64)
            )
            loss.backward()
            assert loss == 0


def test_a_target_made_in_inference_mode() -> None:
    """As that of a teacher at work is; plain PyTorch could not save it for backward."""
    with torch.inference_mode():
        goals = [target("sparse"), target("dense")]
    for goal, same in zip(goals, (target("sparse"), target("dense")), strict=True):
        z = student_logits()
        found, wanted = distillation_loss(z, goal), distillation_loss(z, same)
        for _ in range(2):
            a, b = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (found, wanted))
            assert torch.equal(a, b)
    with torch.inference_mode():
        assert distillation_loss(student_logits(), goals[0]).isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint(reentrant: bool) -> None:
    z, goal = student_logits(), target("sparse")

    def step(x: torch.Tensor) -> torch.Tensor:
        return distillation_loss(2 * x, goal, temperature=2.0)

    checkpoint(step, z, use_reentrant=reentrant).backward()
    assert torch.equal(z.grad, torch.autograd.grad(step(z), z)[0])


class OnTheDevice(TorchDispatchMode):
    """Fails where an operator's result is not on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(x, torch.Tensor) or x.device.type == "cuda", f"{func} leaves it"
        return out


@pytest.mark.parametrize("num_classes", [50, 20000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_nothing_waits_for_the_device(
    kind: str, in_forward: bool, reduction: str, num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPU tensors without contents, where there is no number to look at; launches do nothing."""
    from kdcache.kernels import launch, layout

    launched = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(launch, "rescale", lambda *_: launched.append("rescale"))
    monkeypatch.setattr(layout, "vector", lambda *_: 8)
    context = SimpleNamespace(save_for_backward=lambda *x: setattr(context, "saved_tensors", x))
    with FakeTensorMode(), OnTheDevice():

        def some(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda")

        named = some(B, 5).long(), some(B, 3)
        teacher = (some(B, num_classes), None, None) if kind == "dense" else (some(B, 5), *named)
        inputs = (some(B, num_classes), *teacher, some(B))
        assert ops.backend(inputs[0], inputs[2]) == "triton"
        options = (2.0, "bucket", False, reduction == "mean", reduction != "none")
        loss = ops._Loss.forward(context, *inputs, *options, in_forward, some(1))
        gradient = ops._gradient(context, torch.ones_like(loss))
        assert gradient.shape == (B, num_classes)
        with pytest.raises(DataDependentOutputException):
            loss.sum().item()
        with pytest.raises(AssertionError, match="leaves it"):
            loss.cpu()
    assert len(launched) == 2 + (in_forward and num_classes == 20000)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_labels_do_not_wait_for_the_device(
    kind: str, in_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.kernels import launch, layout

    launched = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(layout, "vector", lambda *_: 8)
    with FakeTensorMode(), OnTheDevice():

        def some(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda")

        named = (some(B, 5), some(B, 5).long(), some(B, 3))
        goal = Target(some(B, C), None, None, C) if kind == "dense" else Target(*named, C)
        loss = distillation_loss(
            some(B, C).requires_grad_(),
            goal,
            label_weight=0.5,
            labels=some(B).long(),
            row_weights=some(B),
            gradient_in_forward=in_forward,
        )
        assert loss.shape == ()
    assert len(launched) == 1


def test_usage_errors() -> None:
    z, goal = student_logits(), target("sparse")
    with pytest.raises(UsageError, match=r"the student has 49 classes, its targets have 50"):
        distillation_loss(z[:, :-1], goal)
    with pytest.raises(UsageError, match=r"logits must be \[B, C\], not \[12\]"):
        distillation_loss(z[:, 0], goal)
    with pytest.raises(UsageError, match=r"must be floating-point, not torch.int64"):
        distillation_loss(z.long(), goal)
    for wrong, message in (
        (
            Target(goal.logits_BK[1:], goal.class_ids_BK, goal.tail_B3, C),
            r"target must be \[12, 5\]",
        ),
        (
            Target(goal.logits_BK, goal.class_ids_BK[:, 1:], goal.tail_B3, C),
            r"target must be .12, 4",
        ),
        (
            Target(goal.logits_BK, goal.class_ids_BK, goal.tail_B3[:, 0], C),
            r"tail must be \[12, 3\]",
        ),
        (Target(goal.logits_BK, None, None, C), r"\[12, 50\] beside .*\[12, 50\], not \[12, 5\]"),
        (Target(goal.logits_BK, goal.class_ids_BK.float(), None, C), "class_ids must be class ids"),
        (Target(goal.logits_BK[:, :0], goal.class_ids_BK[:, :0], None, C), "names no class"),
    ):
        with pytest.raises(UsageError, match=message):
            distillation_loss(z, wrong)
    with pytest.raises(UsageError, match=r"labels must be \[12\] beside .*, not \[3\]"):
        distillation_loss(z, goal, label_weight=0.5, labels=labels()[:3])
    for shape in ((13,), (12, 1)):
        with pytest.raises(UsageError, match=r"row_weights must be \[12\] beside logits"):
            distillation_loss(z, goal, row_weights=torch.ones(shape))
    with pytest.raises(UsageError, match="expected_gradient must be one number"):
        distillation_loss(z, goal, expected_gradient=torch.ones(2))
    with pytest.raises(
        UsageError, match=r"row_weights requires a gradient, and gets none: detach it"
    ):
        distillation_loss(z, goal, row_weights=torch.ones(B, requires_grad=True))
    with pytest.raises(UsageError, match=r"temperature must be above 0, not -1"):
        distillation_loss(z, tempered(temperature=-1.0), temperature=-1)
    with pytest.raises(UsageError, match=r"labels must be class ids, not torch.float32"):
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
    moving = Target(goal.logits_BK.clone().requires_grad_(), goal.class_ids_BK, goal.tail_B3, C)
    with pytest.raises(UsageError, match="detach it"):
        distillation_loss(z, moving)


def curve(dtype: torch.dtype, device: str) -> list[float]:
    """Twenty steps of a small student; float64 logits take the reference."""
    torch.manual_seed(0)
    student, x = torch.nn.Linear(8, C).to(device), torch.randn(B, 8).to(device)
    goal = target("sparse", device)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = distillation_loss(student(x).to(dtype), goal, temperature=2.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", DEVICES)
def test_training_has_the_curve_of_the_reference(device: str) -> None:
    fused, true = curve(torch.float32, device), curve(torch.float64, device)
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
