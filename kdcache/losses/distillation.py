"""The distillation loss of a batch: student logits against a `Target`.

    loss = distillation_loss(student(x), target, temperature=2.0)

Works in any training loop, under torch.compile and under autocast. The logits' device decides which
fused form computes it (`kernels/ops.py`), in float32 whatever the logits' dtype; float64 logits get
the definition itself, `kernels/reference.py`. Sole importer of `kdcache.kernels`.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import nn

from kdcache.batch import Target, TemperedTarget
from kdcache.errors import UsageError
from kdcache.kernels import ops, reference
from kdcache.kernels.problem import Problem, Tail
from kdcache.kernels.reference import Reduction

TAILS, REDUCTIONS = get_args(Tail), get_args(Reduction)


def distillation_loss(
    logits_BC: torch.Tensor,
    target: Target | TemperedTarget,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    label_weight: float = 0.0,
    labels: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    gradient_in_forward: bool = False,
    expected_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1 - a) T^2 KL(target || softmax(logits / T)) + a CE(labels, softmax(logits)), reduced.

    logits_BC            the student's, [B, C], of any floating type
    target               of the teacher, for the same rows; a TemperedTarget only at its own T
    temperature          T (Hinton et al. 2015, arXiv 1503.02531, section 2, with its factor T^2)
    tail                 what is assumed of the classes that a target does not name:
                         bucket, uniform, renormalise or none (`kernels/README.md`)
    label_weight         a, from 0 to 1
    labels               [B] class ids; a negative one means that the row has no CE term
    row_weights          [B] a factor for each row
    reduction            mean (sum / B, whatever the row weights; 0 where B = 0), sum, or none: [B]
    gradient_in_forward  CUDA, eager: backward does not read the logits again where the gradient of
                         this loss is `expected_gradient` (one number on the device, such as the
                         loss scale; 1 by default); any other gradient costs one more pass

    The KL term is fused; the CE term is plain PyTorch beside it. Neither waits for a GPU.

    Raises UsageError when shapes or devices differ, when T is not positive, when T < 1 and the
    target has a tail (its summary holds for T >= 1), when labels are missing, and when anything
    but the logits requires a gradient. A class id outside 0 to C - 1, or a label of C or more,
    raises IndexError on the CPU and makes its row NaN on a GPU; so does a label under
    torch.compile.
    """
    _check_options(logits_BC, target, tail, reduction, label_weight)
    if label_weight > 0 and labels is None:
        raise UsageError(f"label_weight {label_weight} needs labels=")
    problem = _problem(logits_BC, target, float(temperature), tail, row_weights)
    _check("labels", labels, logits_BC, logits_BC.shape[:1], floating=False)
    _check("expected_gradient", expected_gradient, logits_BC, None)
    if labels is None or label_weight == 0:
        loss: torch.Tensor = ops.loss(problem, reduction, gradient_in_forward, expected_gradient)
        return loss
    # In float32, so that the sum of both gradients is rounded to the logits' dtype once.
    z = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    ce_B = reference.weighted(_cross_entropy(z, labels), row_weights)
    if gradient_in_forward:
        one = torch.ones((), device=z.device) if expected_gradient is None else expected_gradient
        expected_gradient = one.float() * (1 - label_weight)
        # A gradient computed for an expected one of 0 cannot be scaled to another.
        gradient_in_forward = label_weight < 1
    kl = ops.loss(problem._replace(student_BC=z), reduction, gradient_in_forward, expected_gradient)
    mixed: torch.Tensor = (1 - label_weight) * kl + label_weight * reference.reduce(ce_B, reduction)
    return mixed


def distillation_losses(
    logits_BC: torch.Tensor, target: Target, *, temperature: float = 1.0, tail: Tail = "bucket"
) -> torch.Tensor:
    """T^2 KL of each row [B]."""
    return distillation_loss(
        logits_BC, target, temperature=temperature, tail=tail, reduction="none"
    )


class DistillationLoss(nn.Module):
    """`distillation_loss` with its options fixed: loss(logits, target, labels, row_weights).

    temperature, tail, label_weight, reduction, gradient_in_forward   as there
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        tail: Tail = "bucket",
        label_weight: float = 0.0,
        reduction: Reduction = "mean",
        gradient_in_forward: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.tail = tail
        self.label_weight = label_weight
        self.reduction = reduction
        self.gradient_in_forward = gradient_in_forward

    def forward(
        self,
        logits_BC: torch.Tensor,
        target: Target | TemperedTarget,
        labels: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of `logits_BC` to `target`; `labels`, `row_weights` and what is raised are as in
        `distillation_loss`."""
        return distillation_loss(
            logits_BC,
            target,
            temperature=self.temperature,
            tail=self.tail,
            label_weight=self.label_weight,
            labels=labels,
            row_weights=row_weights,
            reduction=self.reduction,
            gradient_in_forward=self.gradient_in_forward,
        )

    def extra_repr(self) -> str:
        """What `repr` of the module shows."""
        return f"temperature={self.temperature}, tail={self.tail}, label_weight={self.label_weight}"


def _class_ids(target: Target | TemperedTarget) -> torch.Tensor | None:
    return target.class_ids_BK


def _check_options(
    logits_BC: torch.Tensor,
    target: Target | TemperedTarget,
    tail: Tail,
    reduction: Reduction,
    label_weight: float,
) -> None:
    if logits_BC.dim() != 2:
        raise UsageError(f"the student's logits must be [B, C], not {list(logits_BC.shape)}")
    if not logits_BC.is_floating_point():
        raise UsageError(f"the student's logits must be floating-point, not {logits_BC.dtype}")
    if logits_BC.shape[1] != target.num_classes:
        raise UsageError(
            f"the student has {logits_BC.shape[1]} classes, its targets have {target.num_classes}"
        )
    for name, value, known in (("tail", tail, TAILS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if not 0 <= label_weight <= 1:
        raise UsageError(f"label_weight must be from 0 to 1, not {label_weight}")


def _problem(
    logits_BC: torch.Tensor,
    target: Target | TemperedTarget,
    temperature: float,
    tail: Tail,
    row_weights: torch.Tensor | None,
) -> Problem:
    """The target beside these logits. The kernels read memory by the shapes that are checked."""
    tempered = isinstance(target, TemperedTarget)
    values, tail_values = _teacher(target, temperature)
    class_ids_BK = _class_ids(target)
    B, C = logits_BC.shape
    K = C if class_ids_BK is None else class_ids_BK.shape[-1]
    if K == 0:
        raise UsageError("the target names no class")
    _check("target", values, logits_BC, (B, K), floating=True)
    _check("class_ids", class_ids_BK, logits_BC, (B, K), floating=False)
    _check("tail", tail_values, logits_BC, (B,) if tempered else (B, 3), floating=True)
    _check("row_weights", row_weights, logits_BC, (B,))
    return Problem(
        logits_BC, values, class_ids_BK, tail_values, row_weights, temperature, tail, tempered
    )


def _cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """`reference.label_cross_entropy`; on the CPU, eager, a label of C or more is an IndexError."""
    B, C = logits_BC.shape
    if logits_BC.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = int((labels_B >= C).sum())
        if wrong:
            raise IndexError(f"labels must be below {C}, which {wrong} of {B} are not")
    ce_B: torch.Tensor = reference.label_cross_entropy(logits_BC, labels_B)
    return ce_B


def _check(
    name: str,
    x: torch.Tensor | None,
    logits_BC: torch.Tensor,
    shape: tuple[int, ...] | None,
    *,
    floating: bool | None = None,
) -> None:
    """Of this shape (None: one number) and kind (None: any), and on the logits' device."""
    if x is None:
        return
    if x.shape != shape if shape is not None else x.numel() != 1:
        wanted = "one number" if shape is None else list(shape)
        raise UsageError(
            f"{name} must be {wanted} beside logits {list(logits_BC.shape)}, not {list(x.shape)}"
        )
    if floating is not None and x.is_floating_point() != floating:
        wanted = "a floating-point tensor" if floating else "class ids"
        raise UsageError(f"{name} must be {wanted}, not {x.dtype}")
    if x.device != logits_BC.device:
        raise UsageError(f"{name} is on {x.device}, the student's logits on {logits_BC.device}")
    # The kernels give a gradient to the student's logits alone.
    if x.requires_grad:
        raise UsageError(f"{name} requires a gradient, and gets none: detach it")


def _teacher(
    target: Target | TemperedTarget, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_temperature(temperature, sparse=False)
    if isinstance(target, TemperedTarget):
        if target.temperature != temperature:
            raise UsageError(
                f"the target is at temperature {target.temperature}, the loss at {temperature}"
            )
        return target.log_p_BK, target.log_tail_B
    check_temperature(temperature, sparse=target.tail_B3 is not None)
    return target.logits_BK, target.tail_B3


def log_probabilities(
    target: Target, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target at T: log-probabilities of its named classes [B, K], and of its tail [B]."""
    log_p_BK, log_tail_B = reference.temper(
        target.logits_BK, target.tail_B3, target.num_classes, temperature
    )
    return log_p_BK, log_tail_B


def spread_tail(target: Target, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities at T of every class [B, C], the mass of the tail spread evenly over it."""
    log_p_BK, log_tail_B = log_probabilities(target, temperature)
    if target.class_ids_BK is None:
        return log_p_BK
    left = target.num_classes - log_p_BK.shape[1]
    assert log_tail_B is not None
    each_B1 = (log_tail_B - math.log(left))[:, None]
    return each_B1.expand(-1, target.num_classes).scatter(1, target.class_ids_BK, log_p_BK)


def temper(target: Target, temperature: float) -> TemperedTarget:
    """A target at T; of a dense target, every class is named."""
    log_p_BK, log_tail_B = log_probabilities(target, temperature)
    class_ids_BK = target.class_ids_BK
    if class_ids_BK is None:
        class_ids_BK = torch.arange(target.num_classes).expand_as(log_p_BK)
    return TemperedTarget(log_p_BK, class_ids_BK, log_tail_B, temperature, target.num_classes)


def check_temperature(temperature: float, *, sparse: bool) -> None:
    """Raise UsageError for a temperature at which targets (sparse: with a tail) are not defined."""
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, not {temperature}")
    if temperature == math.inf:
        raise UsageError("temperature must be finite")
    if sparse and temperature < 1:
        raise UsageError(
            f"temperature must be at least 1 for top-k targets, not {temperature}: a "
            "cache made with --top-k all has targets for any temperature"
        )
