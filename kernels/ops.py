"""`reference.rows` as one call: fused where it can be, with its gradient; operators of torch.

In: what `reference.rows` takes. Out: the loss of each row, divided by B where the caller is going
to sum it into a mean, so that the gradient needs no pass of its own for that.

    cuda   Triton; backward reads the logits again, or forward leaves the gradient (`in_forward`)
    cpu    numba; forward leaves the gradient, backward hands it over
    else, float64, or where either is missing: `reference.rows`, differentiated by torch

In eager mode an autograd.Function calls the kernels; under torch.compile the operators
`kdcache::loss_forward` and `kdcache::loss_backward` do. Only the student's logits get a gradient.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kdcache.kernels import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATS = 8  # numbers a row that the Triton forward leaves for its backward; see sparse.py


HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend(student_BC: Tensor, classes_BK: Tensor | None) -> str:
    """Which form serves these logits: triton, numba or reference."""
    if student_BC.dtype not in FLOATS:
        return "reference"
    if student_BC.device.type == "cpu" and HAS_NUMBA:
        return "numba"
    if student_BC.device.type == "cuda" and HAS_TRITON:
        from kdcache.kernels import dispatch

        if dispatch.serves(None if classes_BK is None else classes_BK.shape[1]):
            return "triton"
    return "reference"


def rows(
    student_BC: Tensor,
    values: Tensor,
    classes_BK: Tensor | None,
    tail_values: Tensor | None,
    labels_B: Tensor | None,
    weights_B: Tensor | None,
    temperature: float,
    label_weight: float,
    tail: str,
    tempered: bool,
    mean: bool,
    in_forward: bool = False,
    expected_gradient: Tensor | None = None,
) -> Tensor:
    """`reference.rows` [B], each divided by B where `mean`.

    in_forward, expected_gradient   cuda, eager: compute the gradient in the forward pass, for a
        gradient of the loss that will equal `expected_gradient` (a tensor of one number on the
        device, such as the loss scale; 1 where None). Another one costs one more pass.
    """
    problem = (student_BC, values, classes_BK, tail_values, labels_B, weights_B,
               float(temperature), float(label_weight), tail, tempered)  # fmt: skip
    chosen = backend(student_BC, classes_BK)
    if chosen == "reference":
        loss_B = reference.rows(*problem)
        return loss_B / max(len(loss_B), 1) if mean else loss_B
    gradient = torch.is_grad_enabled() and student_BC.requires_grad
    if torch.compiler.is_compiling():
        return loss_forward(*problem, mean, gradient)[0]
    if not gradient:
        return _forward(*problem, mean, False)[0]
    return _Rows.apply(*problem, mean, in_forward and chosen == "triton", expected_gradient)


def _forward(student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature,
             label_weight, tail, tempered, mean, gradient):  # fmt: skip
    """The rows, and what backward needs: on the CPU the gradient, on a GPU numbers of each row."""
    problem = (student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature,
               label_weight, tail, tempered, _coefficient(student_BC, mean))  # fmt: skip
    if student_BC.device.type == "cpu":
        from kdcache.kernels import cpu

        return cpu.rows(*problem, gradient)
    return _fused(classes_BK).forward(*problem)


def _backward(gradient_B, saved, student_BC, values, classes_BK, tail_values, labels_B, weights_B,
              temperature, label_weight, tail, tempered, mean):  # fmt: skip
    if student_BC.device.type == "cpu":
        return (saved * gradient_B[:, None]).to(student_BC.dtype)
    problem = (student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature,
               label_weight, tail, tempered, _coefficient(student_BC, mean))  # fmt: skip
    return _fused(classes_BK).backward(gradient_B, saved, *problem)


def _fused(classes_BK: Tensor | None):
    # Here, because triton.jit looks for a GPU or an interpreter when it decorates.
    from kdcache.kernels import dense, sparse

    return dense if classes_BK is None else sparse


def _coefficient(student_BC: Tensor, mean: bool) -> float:
    return 1 / max(student_BC.shape[0], 1) if mean else 1.0


class _Rows(torch.autograd.Function):
    """Eager mode. Python and dispatch around the kernels cost as much as a small kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        *problem, in_forward, expected = arguments
        ctx.save_for_backward(*problem[:6])
        ctx.options, ctx.in_forward, ctx.expected = problem[6:], in_forward, expected
        if in_forward:
            *inputs, mean = problem
            coefficient = _coefficient(problem[0], mean)
            loss_B, ctx.left = _fused(problem[2]).forward_with_gradient(
                *inputs, coefficient, expected
            )
        else:
            loss_B, ctx.left = _forward(*problem, True)
        return loss_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_B):
        problem = (*ctx.saved_tensors, *ctx.options)
        if problem[0].device.type == "cuda" and not ctx.in_forward:
            return _backward(gradient_B, ctx.left, *problem), *(None,) * 12
        # The gradient is handed over, not lent: whoever gets it may write to it.
        left, ctx.left = ctx.left, None
        if left is None:
            left, ctx.in_forward = _forward(*problem, True)[1], False
        if problem[0].device.type == "cuda":
            if ctx.in_forward:
                from kdcache.kernels.rows import rescale

                rescale(left, gradient_B, ctx.expected)
                return left, *(None,) * 12
            return _backward(gradient_B, left, *problem), *(None,) * 12
        if gradient_B.stride(0) == 0 and gradient_B.numel() and gradient_B[0].item() == 1:
            return left.to(problem[0].dtype), *(None,) * 12
        return left.mul_(gradient_B[:, None]).to(problem[0].dtype), *(None,) * 12


@torch.library.custom_op("kdcache::loss_forward", mutates_args=())
def loss_forward(
    student_BC: Tensor,
    values: Tensor,
    classes_BK: Tensor | None,
    tail_values: Tensor | None,
    labels_B: Tensor | None,
    weights_B: Tensor | None,
    temperature: float,
    label_weight: float,
    tail: str,
    tempered: bool,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature,
                    label_weight, tail, tempered, mean, gradient)  # fmt: skip


@loss_forward.register_fake
def _(student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature, label_weight,
      tail, tempered, mean, gradient):  # fmt: skip
    B, C = student_BC.shape
    saved = (STATS, B) if student_BC.device.type == "cuda" else (B, C) if gradient else (0, 0)
    kind = torch.float32
    return student_BC.new_empty(B, dtype=kind), student_BC.new_empty(saved, dtype=kind)


@torch.library.custom_op("kdcache::loss_backward", mutates_args=())
def loss_backward(
    gradient_B: Tensor,
    saved: Tensor,
    student_BC: Tensor,
    values: Tensor,
    classes_BK: Tensor | None,
    tail_values: Tensor | None,
    labels_B: Tensor | None,
    weights_B: Tensor | None,
    temperature: float,
    label_weight: float,
    tail: str,
    tempered: bool,
    mean: bool,
) -> Tensor:
    return _backward(gradient_B, saved, student_BC, values, classes_BK, tail_values, labels_B,
                     weights_B, temperature, label_weight, tail, tempered, mean)  # fmt: skip


@loss_backward.register_fake
def _(gradient_B, saved, student_BC, *_):
    if student_BC.device.type == "cpu":
        return student_BC.new_empty(student_BC.shape)
    from kdcache.kernels import layout

    return layout.empty_gradient(student_BC)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.options = inputs[6:11]


def _operator_backward(ctx, gradient_B, _):
    saved, *problem = ctx.saved_tensors
    return loss_backward(gradient_B, saved, *problem, *ctx.options), *(None,) * 11


loss_forward.register_autograd(_operator_backward, setup_context=_setup)
