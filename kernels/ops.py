"""The loss of a batch as one call: fused where it can be, with its gradient; operators of torch.

    cuda   Triton; backward reads the logits again, or forward leaves the gradient (`in_forward`)
    cpu    numba; forward leaves the gradient, backward hands it over
    else, float64, or where either is missing or old: `reference.rows`, differentiated by torch

In eager mode an autograd.Function calls the kernels; under torch.compile the operators
`kdcache::loss_forward` and `kdcache::loss_backward` do. Only the student's logits get a gradient.
A mean's 1/B is folded into the rows, so that the gradient needs no pass of its own for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from kdcache.kernels import layout, reference

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


def loss(
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
    reduction: str,
    in_forward: bool = False,
    expected_gradient: Tensor | None = None,
) -> Tensor:
    """`reference.reduce` of `reference.rows`: a number, or [B] for the reduction `none`.

    in_forward, expected_gradient   cuda, eager: compute the gradient in the forward pass, for a
        gradient of the loss that will equal `expected_gradient` (a tensor of one number on the
        device, such as the loss scale; 1 where None). Another one costs one more pass.
    """
    problem = (student_BC, values, classes_BK, tail_values, labels_B, weights_B,
               float(temperature), float(label_weight), tail, tempered)  # fmt: skip
    chosen = backend(student_BC, classes_BK)
    if chosen == "reference":
        return reference.reduce(reference.rows(*problem), reduction)
    mean, whole = reduction == "mean", reduction != "none"
    gradient = torch.is_grad_enabled() and student_BC.requires_grad
    if gradient and not torch.compiler.is_compiling():
        in_forward = in_forward and chosen == "triton"
        return _Loss.apply(*problem, mean, whole, in_forward, expected_gradient)
    forward = loss_forward if torch.compiler.is_compiling() else _forward
    loss_B = forward(*problem, mean, gradient)[0]
    return loss_B.sum() if whole else loss_B


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

    return (dense if classes_BK is None else sparse).FORM


def _coefficient(student_BC: Tensor, mean: bool) -> float:
    return 1 / max(student_BC.shape[0], 1) if mean else 1.0


class _Loss(torch.autograd.Function):
    """Eager mode. What Python does around a small kernel costs as much as the kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        *problem, whole, in_forward, expected = arguments
        # Tensors made in inference mode, as a teacher's may be, cannot be saved, only kept.
        ctx.kept = [x if x is not None and x.is_inference() else None for x in problem[:6]]
        ctx.save_for_backward(
            *(x if kept is None else None for x, kept in zip(problem[:6], ctx.kept, strict=True))
        )
        ctx.options, ctx.in_forward, ctx.expected = problem[6:], in_forward, expected
        if in_forward:
            *inputs, mean = problem
            loss_B, ctx.left = _fused(problem[2]).forward_with_gradient(
                *inputs, _coefficient(problem[0], mean), expected
            )
        else:
            loss_B, ctx.left = _forward(*problem, True)
        return loss_B.sum() if whole else loss_B

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise NotImplementedError("the fused losses have no second derivative: use float64")
        return _gradient(ctx, gradient), *(None,) * 13


def _gradient(ctx, gradient):
    pairs = zip(ctx.saved_tensors, ctx.kept, strict=True)
    problem = (*(x if kept is None else kept for x, kept in pairs), *ctx.options)
    student_BC = problem[0]
    # What forward left is handed over, not lent: whoever gets it may write to it.
    left = ctx.left
    if student_BC.device.type == "cpu":
        ctx.left = None
        left = _forward(*problem, True)[1] if left is None else left
        if gradient.dim() or gradient.item() != 1:
            left.mul_(gradient[:, None] if gradient.dim() else gradient)
        return left if left.dtype == student_BC.dtype else left.to(student_BC.dtype)
    gradient_B = gradient if gradient.dim() else gradient.expand(len(student_BC))
    if not ctx.in_forward:
        return _backward(gradient_B, left, *problem)
    if left is None:
        return _backward(gradient_B, _forward(*problem, True)[1], *problem)
    from kdcache.kernels.launch import rescale

    ctx.left = None
    rescale(left, gradient_B, ctx.expected)
    return left


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
    saved = (B, C) if gradient else (0, 0)
    if student_BC.device.type == "cuda":
        saved = (layout.STATS, B)
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
    return layout.empty_gradient(student_BC)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.options = inputs[6:11]


def _operator_backward(ctx, gradient_B, _):
    saved, *problem = ctx.saved_tensors
    return loss_backward(gradient_B, saved, *problem, *ctx.options), *(None,) * 11


loss_forward.register_autograd(_operator_backward, setup_context=_setup)
