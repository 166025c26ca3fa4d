"""A network that takes views, or several that answer as one teacher.

In: uint8 views. Out: logits. What stays true: normalisation belongs to the network, so teacher and
student may differ, and so may the members of an ensemble; a content_hash names weights and
normalisation; what is not a finite number in one member is not hidden by the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from kdcache.choices import TeacherOutput
from kdcache.errors import UsageError
from kdcache.spec import Precision, digest

Triple = tuple[float, float, float]

LEAST_LOG_P = -700.0  # about the logarithm of the smallest float64
LOGITS_KEY = "logits"


class Classifier(nn.Module):
    """uint8 views [B, 3, H, W] to logits [B, C]: scale to [0, 1], normalise, run the network.

    precision     of the network's arithmetic, by autocast; the logits come as it gives them
    num_classes   C, as `models.load` has found it; 0 before
    num_outputs   classes of the network itself; 0 where that is not known
    output        what the network gives
    class_ids_C   the network's class of each of the C, where they are others than 0 to C - 1
    matched       its classes were found to be the data's, by name
    assumed_norm  mean and std are ImageNet's, as the network names none
    output_part   where the logits were in what the network gives, if that is not one tensor
    """

    mean: torch.Tensor
    std: torch.Tensor
    class_ids_C: torch.Tensor | None

    def __init__(self, network: nn.Module, name: str, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.precision: Precision = "float32"
        self.num_classes = 0
        self.num_outputs = 0
        self.output: TeacherOutput = "logits"
        self.output_part = ""
        self.assumed_norm = False
        self.matched = False
        # Not persistent: a weights file has the network's own keys alone.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_ids_C", None, persistent=False)

    def select(self, class_ids: Sequence[int]) -> None:
        """Give the logits of these classes of the network alone, in this order."""
        self.num_classes = len(class_ids)
        if tuple(class_ids) != tuple(range(self.num_outputs)):
            self.class_ids_C = torch.tensor(class_ids, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.answer(images_BCHW, self.precision)

    def answer(self, images_BCHW: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Logits [B, C] in this precision. Raises UsageError for a network that gives no tensor."""
        return self._answer(images_BCHW, precision, self.network)

    def _answer(
        self,
        images_BCHW: torch.Tensor,
        precision: Precision,
        network: Callable[[torch.Tensor], object],
    ) -> torch.Tensor:
        # Outside autocast, in float32: pixels are normalised alike in every precision.
        x = images_BCHW.float().div_(255).sub_(self.mean).div_(self.std)
        dtype = getattr(torch, precision)
        with torch.autocast(x.device.type, dtype, enabled=precision != "float32"):
            found = network(x if precision != "float32" else self._in_own_dtype(x))
        logits_BC = found if isinstance(found, torch.Tensor) else self._part(found, len(x))
        if self.output == "probabilities":
            logits_BC = logits_BC.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        return logits_BC if self.class_ids_C is None else logits_BC[:, self.class_ids_C]

    def _in_own_dtype(self, x: torch.Tensor) -> torch.Tensor:
        """For a network whose weights are in another type, as after `.half()`."""
        first = next(self.network.parameters(), x)
        return x.to(first.dtype) if first.is_floating_point() else x

    def _part(self, found: object, rows: int) -> torch.Tensor:
        """The logits in what a frozen network gives: its `logits`, or the first tensor [B, C]."""
        parts = _tensors(found) if not self.training else {}
        fits = {
            key: x for key, x in parts.items() if x.shape == (rows, self.num_outputs or x.shape[-1])
        }
        key = LOGITS_KEY if LOGITS_KEY in fits else next(iter(fits), None)
        if key is None:
            raise UsageError(
                f"{self.name} gives a {type(found).__name__} when it "
                f"{'trains' if self.training else 'answers'}, not one tensor of logits: build it "
                "without auxiliary heads"
            )
        self.output_part = f"{type(found).__name__}: {key}"
        return fits[key]

    def features(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the classifying layer gets, [B, D], and the logits [B, C].

        That layer is the last nn.Linear or 1x1 convolution to run, if it is C wide; what it gets
        for several places of the image is averaged over them. None where there is no such layer.
        A network that was compiled in place runs as it was before.
        """
        last: list[tuple[nn.Module, torch.Tensor]] = []

        def keep(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            last[:] = [(layer, inputs[0])]

        hooks = [
            layer.register_forward_pre_hook(keep)
            for layer in self.network.modules()
            if _head_width(layer)
        ]
        try:
            # Compiled code leaves hooks out, and `forward` is never compiled.
            logits_BC = self._answer(images_BCHW, self.precision, self.network.forward)
        finally:
            for hook in hooks:
                hook.remove()
        if not last or _head_width(last[0][0]) != logits_BC.shape[1]:
            return None, logits_BC
        layer, x = last[0]
        # A classifying 1x1 convolution gets a map: its channels go last, its places are averaged.
        if isinstance(layer, nn.Conv2d):
            x = x.movedim(1, -1)
        return x.reshape(len(x), -1, x.shape[-1]).mean(1), logits_BC

    def content_hash(self) -> str:
        """16 hex digits over normalisation and every weight's name, type, shape and bytes."""
        h = hashlib.sha256()
        # The same weights behind another normalisation, or read otherwise, are another function.
        read: list[object] = [self.mean.flatten().tolist(), self.std.flatten().tolist()]
        if self.output == "probabilities":
            read.append(self.output)
        if self.class_ids_C is not None:
            read.append(self.class_ids_C.tolist())
        h.update(json.dumps(read).encode())
        for key, weight in sorted(self.network.state_dict().items()):
            h.update(f"{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
            h.update(
                weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return h.hexdigest()[:16]


class Ensemble(nn.Module):
    """Several classifiers as one teacher: the mean of their probabilities (Beyer et al. 2022).

    The logits [B, C] are log((1/M) sum_m softmax(z_m)), float32, at least LEAST_LOG_P; where any
    member gives NaN or infinity they are NaN.

    precision   of all members' arithmetic, whatever a member says of itself

    Raises UsageError unless the members have equally many classes and one precision.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        first = members[0]
        for other in members[1:]:
            if other.num_classes != first.num_classes:
                raise UsageError(
                    f"teachers must have equally many classes: {first.name} has "
                    f"{first.num_classes}, {other.name} has {other.num_classes}"
                )
            if other.precision != first.precision:
                raise UsageError(
                    f"teachers must have one precision: {first.name} has {first.precision}, "
                    f"{other.name} has {other.precision}"
                )
        self.members = nn.ModuleList(members)
        self.name = " + ".join(member.name for member in members)
        self.precision: Precision = first.precision
        self.num_classes = first.num_classes
        self.eval()

    @property
    def device(self) -> torch.device:
        return self._members()[0].device

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        answers = [m.answer(images_BCHW, self.precision).float() for m in self._members()]
        # A logit of -inf would vanish in the mean.
        kept = [torch.where(z.isfinite(), z.log_softmax(1), torch.nan) for z in answers]
        # The mean of probabilities in logarithms: those of unlikely classes would underflow.
        log_p_BC = torch.logsumexp(torch.stack(kept), 0) - math.log(len(kept))
        return log_p_BC.clamp(min=LEAST_LOG_P)

    def features(self, images_BCHW: torch.Tensor) -> tuple[None, torch.Tensor]:
        """None, for several networks share no features, and the logits [B, C]."""
        return None, self(images_BCHW)

    def content_hash(self) -> str:
        """16 hex digits over the members' content hashes, in order."""
        return digest([member.content_hash() for member in self._members()])

    def _members(self) -> list[Classifier]:
        return [member for member in self.members if isinstance(member, Classifier)]


def _tensors(found: object) -> dict[str, torch.Tensor]:
    """The tensors in a tuple, a dict or an object of fields, by place or name."""
    named: dict[str, object] = {}
    if isinstance(found, Mapping):
        named = {str(key): x for key, x in found.items()}
    elif isinstance(found, list | tuple):
        names = getattr(found, "_fields", map(str, range(len(found))))
        named = dict(zip(names, found, strict=True))
    elif hasattr(found, "__dict__"):
        named = dict(vars(found))
    return {key: x for key, x in named.items() if isinstance(x, torch.Tensor)}


Teacher = Classifier | Ensemble


def teacher_of(members: Sequence[Classifier]) -> Teacher:
    """The one classifier itself, or the ensemble of several."""
    return members[0] if len(members) == 1 else Ensemble(members)


def _head_width(layer: nn.Module) -> int:
    """How many classes this layer would tell apart; 0 for a layer of another kind."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.out_channels
    return 0
