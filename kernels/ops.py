"""The loss of a batch as one call, fused with its gradient where possible; operators of torch.

    cuda   Triton; backward reads the logits again, or uses the gradient that forward computed
           (`in_forward`)
    cpu    numba; forward computes the gradient, backward returns it
    else, float64, or where either is missing or old: `reference.rows`, differentiated by torch

In eager mode an autograd.Function calls the kernels; under torch.compile the operators
`kdcache::loss_forward` and `kdcache::loss_backward` do. Only the student's logits get a gradient.
The 1/B of a mean is a factor of the rows, so that the gradient needs no further pass for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from kdcache.kernels import layout, reference
from kdcache.kernels.problem import NUM_TENSORS, Problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _has_triton() -> bool:
    """3.4 or later, the first whose histogram takes a mask; older ones come with torch < 2.8."""
    if importlib.util.find_spec("triton") is None:
        return False
    for name in ("triton", "pytorch-triton"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return (int(major), int(minor)) >= (3, 4)
    return False


HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = _has_triton()


def backend(student_BC: Tensor, class_ids_BK: Tensor | None) -> str:
    """Which form computes the loss of these logits: triton, numba or reference."""
    if student_BC.dtype not in FLOATS:
        return "reference"
    if student_BC.device.type == "cpu" and HAS_NUMBA:
        return "numba"
    if student_BC.device.type == "cuda" and HAS_TRITON:
        from kdcache.kernels import dispatch

        if dispatch.serves(None if class_ids_BK is None else class_ids_BK.shape[1]):
            return "triton"
    return "reference"


def loss(
    problem: Problem,
    reduction: str,
    in_forward: bool = False,
    expected_gradient: Tensor | None = None,
) -> Tensor:
    """`reference.reduce` of `reference.rows`: a number, or [B] for the reduction `none`.

    in_forward, expected_gradient   cuda, eager: compute the gradient in the forward pass, for a
        gradient of the loss that will equal `expected_gradient` (a tensor of one number on the
        device, such as the loss scale; 1 where None). Any other gradient costs one more pass.
    """
    student_BC = problem.student_BC
    chosen = backend(student_BC, problem.class_ids_BK)
    if chosen == "reference":
        return reference.reduce(reference.rows(problem), reduction)
    mean, whole = reduction == "mean", reduction != "none"
    # Where none is needed, the CPU form writes no [B, C].
    gradient = torch.is_grad_enabled() and student_BC.requires_grad
    if gradient and not torch.compiler.is_compiling():
        # The CPU form computes the gradient in the forward pass in any case.
        in_forward = in_forward and chosen == "triton"
        return _Loss.apply(*problem, mean, whole, in_forward, expected_gradient)
    if torch.compiler.is_compiling():
        loss_B = loss_forward(*problem, mean, gradient)[0]
    else:
        loss_B = _forward(problem, mean, gradient)[0]
    return loss_B.sum() if whole else loss_B


def _forward(problem: Problem, mean: bool, gradient: bool) -> tuple[Tensor, Tensor]:
    """The rows, and what backward needs: on the CPU the gradient, on a GPU numbers of each row."""
    if problem.student_BC.device.type == "cpu":
        from kdcache.kernels import cpu

        return cpu.rows(problem, _coefficient(problem, mean), gradient)
    return _fused(problem).forward(problem, _coefficient(problem, mean))


def _backward(gradient_B: Tensor, saved: Tensor, problem: Problem, mean: bool) -> Tensor:
    if problem.student_BC.device.type == "cpu":
        return (saved * gradient_B[:, None]).to(problem.student_BC.dtype)
    return _fused(problem).backward(gradient_B, saved, problem, _coefficient(problem, mean))


def _fused(problem: Problem):
    # Imported here, because triton.jit looks for a GPU or an interpreter when it decorates.
    from kdcache.kernels import dense, sparse

    return (dense if problem.class_ids_BK is None else sparse).FORM


def _coefficient(problem: Problem, mean: bool) -> float:
    return 1 / max(problem.student_BC.shape[0], 1) if mean else 1.0


class _Loss(torch.autograd.Function):
    """Eager mode. What Python does around a small kernel takes as long as the kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        *fields, mean, whole, in_forward, expected = arguments
        problem = Problem(*fields)
        _save(ctx, problem)
        ctx.mean, ctx.in_forward, ctx.expected = mean, in_forward, expected
        if in_forward:
            loss_B, ctx.left = _fused(problem).forward_with_gradient(
                problem, _coefficient(problem, mean), expected
            )
        else:
            loss_B, ctx.left = _forward(problem, mean, True)
        return loss_B.sum() if whole else loss_B

    @staticmethod
    def backward(ctx, gradient):
        # create_graph=True: what the kernels compute has no graph of its own.
        if torch.is_grad_enabled():
            raise NotImplementedError("the fused losses have no second derivative: use float64")
        return _gradient(ctx, gradient), *(None,) * (len(Problem._fields) + 3)


def _save(ctx, problem: Problem) -> None:
    """Tensors made in inference mode, as a teacher's may be, cannot be saved, only kept."""
    tensors = problem[:NUM_TENSORS]
    ctx.kept = [x if x is not None and x.is_inference() else None for x in tensors]
    pairs = zip(tensors, ctx.kept, strict=True)
    ctx.save_for_backward(*(x if kept is None else None for x, kept in pairs))
    ctx.options = problem[NUM_TENSORS:]


def _saved(ctx) -> Problem:
    pairs = zip(ctx.saved_tensors, ctx.kept, strict=True)
    return Problem(*(x if kept is None else kept for x, kept in pairs), *ctx.options)


def _gradient(ctx, gradient):
    problem, left = _saved(ctx), ctx.left
    if problem.student_BC.device.type == "cpu":
        # Handed over, not shared: the caller may write to it, so a second backward computes anew.
        ctx.left = None
        left = _forward(problem, ctx.mean, True)[1] if left is None else left
        # Reading a number of the CPU costs nothing, and a factor of 1 needs no pass.
        if gradient.dim() or gradient.item() != 1:
            left.mul_(gradient[:, None] if gradient.dim() else gradient)
        return left.to(problem.student_BC.dtype)
    # A stride of 0: one number serves all rows.
    gradient_B = gradient if gradient.dim() else gradient.expand(len(problem.student_BC))
    if not ctx.in_forward:
        return _backward(gradient_B, left, problem, ctx.mean)
    # A second backward: the first one gave its gradient away.
    if left is None:
        return _backward(gradient_B, _forward(problem, ctx.mean, True)[1], problem, ctx.mean)
    from kdcache.kernels.launch import rescale

    ctx.left = None
    rescale(left, gradient_B, ctx.expected)
    return left


# The operators have flat signatures, in the order of `Problem`: torch takes no tuple of fields.


@torch.library.custom_op("kdcache::loss_forward", mutates_args=())
def loss_forward(
    student_BC: Tensor,
    values: Tensor,
    class_ids_BK: Tensor | None,
    tail_values: Tensor | None,
    row_weights_B: Tensor | None,
    temperature: float,
    tail: str,
    tempered: bool,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        student_BC, values, class_ids_BK, tail_values, row_weights_B, temperature, tail, tempered
    )
    return _forward(problem, mean, gradient)


@loss_forward.register_fake
def _(student_BC, *arguments):
    gradient = arguments[-1]
    B, C = student_BC.shape
    saved = (B, C) if gradient else (0, 0)
    if student_BC.device.type == "cuda":
        # What the fused forward leaves: the gradient is computed in the backward pass.
        saved = (layout.STATS, B)
    kind = torch.float32
    return student_BC.new_empty(B, dtype=kind), student_BC.new_empty(saved, dtype=kind)


@torch.library.custom_op("kdcache::loss_backward", mutates_args=())
def loss_backward(
    gradient_B: Tensor,
    saved: Tensor,
    student_BC: Tensor,
    values: Tensor,
    class_ids_BK: Tensor | None,
    tail_values: Tensor | None,
    row_weights_B: Tensor | None,
    temperature: float,
    tail: str,
    tempered: bool,
    mean: bool,
) -> Tensor:
    problem = Problem(
        student_BC, values, class_ids_BK, tail_values, row_weights_B, temperature, tail, tempered
    )
    return _backward(gradient_B, saved, problem, mean)


@loss_backward.register_fake
def _(gradient_B, saved, student_BC, *_):
    if student_BC.device.type == "cpu":
        return student_BC.new_empty(student_BC.shape)
    return layout.empty_gradient(student_BC)


def _setup(ctx, inputs, output):
    *fields, mean, _ = inputs
    ctx.save_for_backward(output[1], *fields[:NUM_TENSORS])
    ctx.options = *fields[NUM_TENSORS:], mean


def _operator_backward(ctx, gradient_B, _):
    saved, *tensors = ctx.saved_tensors
    gradient = loss_backward(gradient_B, saved, *tensors, *ctx.options)
    return gradient, *(None,) * (len(Problem._fields) + 1)


loss_forward.register_autograd(_operator_backward, setup_context=_setup)
