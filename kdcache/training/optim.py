"""The student's optimizer and the schedule of its rate.

In: a `TrainSpec` and a student. Out: a torch optimizer, whose rate the loop sets at every step.
Weight decay means the same to all three: a step first or last multiplies each matrix and each
kernel by 1 - rate * weight_decay, whatever its gradient (Loshchilov & Hutter 2019); biases, scales
of normalisations and embeddings do not decay (`undecayed`).

    adamw  torch's, fused
    sgd    torch's, fused, with heavy-ball momentum
    soap   Adam in the eigenbases of Shampoo's preconditioners (Vyas et al. 2024, arXiv 2409.11321)

What stays true: a step of AdamW or SGD gives no value to the host. One of SOAP does so once, in
the first step, which sets up the bases and moves no weight; every tenth step turns the bases, by a
QR decomposition for each side of each kernel. Of a kernel with sides s, SOAP keeps 2 sum s^2 values
more than AdamW: 426 MB more for a ResNet-50.

Every state is a function of the steps made, in numbers and in memory: tensors of a weight's shape
are laid out as the weight, others are contiguous. So what `state_dict` gives goes through a file
and goes on to the bit, in the middle of ten steps too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from kdcache.errors import MissingDependency, UsageError
from kdcache.models.classifier import Classifier
from kdcache.training.spec import TrainSpec

GRADIENT_NORM = 1.0  # the paper clips the global norm there, in every recipe
FUSED_ON = ("cpu", "cuda")


def warmup_steps(spec: TrainSpec, steps: int) -> int:
    """Steps with a rising rate. Raises UsageError where the rate would never be reached."""
    if spec.warmup < 1:
        return round(spec.warmup * steps)
    if spec.warmup >= steps:
        raise UsageError(
            f"a warm-up of {spec.warmup:g} steps does not fit into the run's {steps}: give more "
            "epochs, or a warmup below 1, which is a fraction of them"
        )
    return round(spec.warmup)


def learning_rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Linear warm-up from 0, then a half cosine to 0. Raises what `warmup_steps` does."""
    rise = warmup_steps(spec, steps)
    if step < rise:
        return spec.lr * (step + 1) / rise
    return spec.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# Last parts of names, in torchvision's and others' networks: embeddings of positions and of the
# class, tables of biases, scales of layers. Matrices by their shape, they are biases and scales.
EMBEDDINGS = {
    "absolute_pos_embed",
    "class_token",
    "cls_token",
    "dist_token",
    "layer_scale",
    "pos_embed",
    "pos_embedding",
    "relative_position_bias_table",
}


def undecayed(student: nn.Module) -> set[str]:
    """The names of the weights that weight decay leaves out.

    As timm does it: biases, scales of normalisations, and what the network itself names
    (`no_weight_decay`, `no_weight_decay_keywords`); and `EMBEDDINGS`.
    """
    network = student.network if isinstance(student, Classifier) else student
    prefix = "network." if network is not student else ""
    own: set[str] = set(getattr(network, "no_weight_decay", set)())
    words: set[str] = set(getattr(network, "no_weight_decay_keywords", set)())
    return {
        prefix + name
        for name, weight in network.named_parameters()
        if weight.ndim <= 1
        or name.endswith(".bias")
        or name in own
        or name.rpartition(".")[2] in EMBEDDINGS
        or any(word in name for word in words)
    }


def make_optimizer(student: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """Of the weights that learn. Raises UsageError where there is none, MissingDependency for
    "soap" without its package."""
    named = [(name, w) for name, w in student.named_parameters() if w.requires_grad]
    if not named:
        raise UsageError("the student has no weight that learns: all have requires_grad = False")
    left_out = undecayed(student)
    if spec.decay_embeddings:
        left_out = {name for name, w in named if w.ndim <= 1}
    weights = [w for _, w in named]
    groups: list[dict[str, Any]] = [
        {
            "params": [w for name, w in named if name not in left_out],
            "weight_decay": spec.weight_decay,
        },
        {"params": [w for name, w in named if name in left_out], "weight_decay": 0.0},
    ]
    if spec.optimizer == "soap":
        return _soap(groups, spec)
    fused = all(w.device.type in FUSED_ON for w in weights)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, fused=fused)
    # torch's SGD would add the decay to the gradient, and so to the momentum.
    # Under another name, then: torch would apply what is called weight_decay itself.
    decayed = [{"params": g["params"], "shrink": g["weight_decay"]} for g in groups]
    sgd = torch.optim.SGD(decayed, lr=spec.lr, momentum=spec.momentum, fused=fused)
    sgd.register_step_pre_hook(apply_weight_decay)
    return sgd


@torch.no_grad()
def apply_weight_decay(sgd: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    # GradScaler lends a fused step this tensor, 1 where the step shall change nothing.
    left_out: torch.Tensor | float = getattr(sgd, "found_inf", 0.0)
    for group in sgd.param_groups:
        if group["params"] and group["shrink"]:
            factor = 1 - group["lr"] * group["shrink"] * (1 - left_out)
            torch._foreach_mul_(group["params"], factor)


def _soap(groups: list[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise MissingDependency(
            "the optimizer soap needs pytorch-optimizer: pip install 'kdcache[soap]'"
        ) from error
    soap: torch.optim.Optimizer = SOAP(groups, lr=spec.lr)
    soap.register_step_post_hook(_lay_out)
    return soap


def _lay_out(soap: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Sums round by the order in memory, and eigenbases of few gradients magnify rounding."""
    for weight, kept in soap.state.items():
        kept["Q"] = [q.contiguous() if len(q) else q for q in kept["Q"]]
        if kept["exp_avg_sq"].stride() != weight.stride():
            kept["exp_avg_sq"] = torch.empty_like(weight).copy_(kept["exp_avg_sq"])
