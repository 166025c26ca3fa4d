"""Models by name: torchvision, timm, kdcache's own, a user's factory, or a finished run.

In: a name, a role, a class count. Out: a `Classifier`, which takes uint8 views and gives logits;
its normalisation belongs to it, so teacher and student may differ. What stays true: our weights
are safetensors and nothing is unpickled; a fingerprint names weights and normalisation.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import nn

from kdcache import networks
from kdcache.errors import MissingDependency, UsageError
from kdcache.spec import Precision, ViewSpec

Role = Literal["teacher", "student"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
OWN_MEAN: Triple = (0.5, 0.5, 0.5)
OWN_STD: Triple = (0.25, 0.25, 0.25)

WEIGHTS_FILE = "student.safetensors"
RUN_FILE = "run.json"
FORMS = (
    "torchvision:NAME, timm:NAME, kdcache:small|medium|large, python:package.module:factory, "
    "or the folder of a finished run"
)


class Classifier(nn.Module):
    """uint8 views [B, 3, H, W] to logits [B, C]: scale to [0, 1], normalise, run the network.

    precision   of the network's arithmetic, by autocast; the logits come as it gives them
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, name: str, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.precision: Precision = "float32"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = images_BCHW.float().div_(255).sub_(self.mean).div_(self.std)
        dtype = getattr(torch, self.precision)
        with torch.autocast(x.device.type, dtype, enabled=self.precision != "float32"):
            logits_BC: torch.Tensor = self.network(x)
        return logits_BC

    def fingerprint(self) -> str:
        """16 hex digits over normalisation and every weight's name, type, shape and bytes."""
        h = hashlib.sha256()
        norm = [self.mean.flatten().tolist(), self.std.flatten().tolist()]
        h.update(json.dumps(norm).encode())
        for key, weight in sorted(self.network.state_dict().items()):
            h.update(f"{key} {weight.dtype} {tuple(weight.shape)}\n".encode())
            h.update(
                weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return h.hexdigest()[:16]


def load(
    name: str, role: Role, *, num_classes: int, size_px: int, device: torch.device | str = "cpu"
) -> Classifier:
    """The model called `name`, on the device, checked to give `num_classes` logits.

    A teacher comes with its weights (pretrained, or of a run) and is frozen; a student starts fresh
    from torch's current seed. Raises UsageError for an unknown name or another class count.
    """
    kind, _, rest = name.partition(":")
    build: Callable[[], Classifier]
    if name and Path(name).is_dir():
        build = lambda: _from_run(Path(name), role)  # noqa: E731
    elif kind == "torchvision" and rest:
        build = lambda: _from_torchvision(rest, role, num_classes)  # noqa: E731
    elif kind == "timm" and rest:
        build = lambda: _from_timm(rest, role, num_classes)  # noqa: E731
    elif kind == "kdcache" and rest:
        build = lambda: _from_own(rest, role, num_classes)  # noqa: E731
    elif kind == "python" and rest:
        build = lambda: _from_factory(rest, num_classes)  # noqa: E731
    else:
        raise UsageError(f"unknown model {name!r}: a model is {FORMS}")
    model = build().to(torch.device(device)).to(memory_format=torch.channels_last)
    _check_output(model, num_classes, size_px, device)
    if role == "teacher":
        model.eval().requires_grad_(False)
    return model


def save_weights(model: Classifier, path: Path) -> None:
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    weights = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.network.state_dict().items()
    }
    safetensors.torch.save_file(weights, path)


def run_record(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself. Raises UsageError for any other folder."""
    try:
        record = json.loads((folder / RUN_FILE).read_text())
        for field, kind in (("student", str), ("weights", str), ("classes", int)):
            if not isinstance(record[field], kind):
                raise TypeError(f"{field} is {record[field]!r}")
        ViewSpec(**record["view"])
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is not a finished run: it has no {RUN_FILE}; a model is {FORMS}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / RUN_FILE} is damaged: {error!r}") from error
    if record["classes"] < 1 or Path(record["student"]).is_dir():
        raise UsageError(f"{folder / RUN_FILE} is damaged: it does not describe a network")
    return dict(record)


def _from_run(folder: Path, role: Role) -> Classifier:
    """The run's network. As a student it keeps the network's name, so that its own run's record
    does not hang on this folder."""
    record = run_record(folder)
    size_px = record["view"]["size_px"]
    model = load(record["student"], "student", num_classes=record["classes"], size_px=size_px)
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        model.network.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{folder / WEIGHTS_FILE} is damaged: {_line(error)}") from error
    if model.fingerprint() != record["weights"]:
        raise UsageError(
            f"{folder / WEIGHTS_FILE} is damaged: these weights, with the normalisation of "
            f"{record['student']}, are not those that {RUN_FILE} names"
        )
    if role == "teacher":
        model.name = str(folder)
    return model


def _from_own(name: str, role: Role, num_classes: int) -> Classifier:
    if name not in networks.SIZES:
        raise UsageError(f"unknown model 'kdcache:{name}': there are {', '.join(networks.SIZES)}")
    if role == "teacher":
        raise UsageError(
            f"kdcache:{name} has no trained weights: train it with `kdcache train --mode labels` "
            "and give the run's folder"
        )
    return Classifier(networks.build(name, num_classes), f"kdcache:{name}", OWN_MEAN, OWN_STD)


def _from_torchvision(name: str, role: Role, num_classes: int) -> Classifier:
    try:
        if role == "teacher":
            weights = torchvision.models.get_model_weights(name).DEFAULT
            count = len(weights.meta["categories"])
            network = torchvision.models.get_model(name, weights=None, num_classes=count)
            state = weights.get_state_dict(check_hash=True, weights_only=True)
            network.load_state_dict(state)
            preprocess = weights.transforms()
            mean, std = tuple(preprocess.mean), tuple(preprocess.std)
        else:
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
            mean, std = IMAGENET_MEAN, IMAGENET_STD
    except ValueError as error:
        raise UsageError(f"unknown model 'torchvision:{name}': see torchvision.models") from error
    except (TypeError, AttributeError) as error:
        raise UsageError(f"torchvision:{name} does not classify images: {_line(error)}") from error
    except (OSError, RuntimeError) as error:
        line = f"the weights of torchvision:{name} cannot be had: {_line(error)}"
        raise UsageError(line) from error
    return Classifier(network, f"torchvision:{name}", mean, std)


def _from_timm(name: str, role: Role, num_classes: int) -> Classifier:
    try:
        import timm
    except ImportError as error:
        raise MissingDependency("timm is not installed: pip install 'kdcache[timm]'") from error
    try:
        if role == "teacher":
            network = timm.create_model(name, pretrained=True)
        else:
            network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    except (RuntimeError, OSError) as error:
        raise UsageError(f"timm:{name}: {_line(error)}") from error
    config = network.pretrained_cfg
    return Classifier(network, f"timm:{name}", config["mean"], config["std"])


def _from_factory(path: str, num_classes: int) -> Classifier:
    """`package.module:factory`; the factory is called with num_classes and gives an nn.Module.

    The module may carry `mean` and `std` triples; otherwise ImageNet's are taken.
    """
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not look there by itself
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UsageError(
            f"unknown model 'python:{path}': {error}; expected python:package.module:factory"
        ) from error
    try:
        network = factory(num_classes=num_classes)
    except (TypeError, ValueError, RuntimeError, OSError, LookupError, AttributeError) as error:
        raise UsageError(f"python:{path} failed: {type(error).__name__}: {_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"python:{path} gave a {type(network).__name__}, not an nn.Module")
    mean, std = getattr(network, "mean", IMAGENET_MEAN), getattr(network, "std", IMAGENET_STD)
    try:
        return Classifier(network, f"python:{path}", _triple(mean), _triple(std))
    except (TypeError, ValueError) as error:
        raise UsageError(f"python:{path}: mean and std must be three numbers each") from error


def _triple(value: Any) -> Triple:
    r, g, b = np.asarray(value, float).reshape(-1)
    return float(r), float(g), float(b)


def _line(error: Exception) -> str:
    """The first line of a message of somebody else's."""
    return (str(error).splitlines() or [""])[0]


def _check_output(
    model: Classifier, num_classes: int, size_px: int, device: torch.device | str
) -> None:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            probe = torch.zeros(1, 3, size_px, size_px, dtype=torch.uint8, device=device)
            logits = model(probe.contiguous(memory_format=torch.channels_last))
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
        raise UsageError(
            f"{model.name} cannot take views of {size_px} px: {_line(error)}"
        ) from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UsageError(f"{model.name} does not give one row of logits for each image")
    if logits.shape[1] != num_classes:
        raise UsageError(f"{model.name} has {logits.shape[1]} classes, the data has {num_classes}")
