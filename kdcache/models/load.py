"""Models by name: torchvision, timm, kdcache's own, a user's factory, or a finished run.

In: a name, a role, a class count. Out: a `Classifier`, tried on a view of the size that it will
get; for several names, an `Ensemble`. What stays true: our weights are safetensors and nothing is
unpickled; weights either fit a network key by key or are refused.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from kdcache.choices import TeacherOutput
from kdcache.errors import UsageError, did_you_mean
from kdcache.models import pretrained, resnet
from kdcache.models.class_names import ClassNames, match_classes
from kdcache.models.classifier import Classifier, Teacher, Triple, teacher_of
from kdcache.models.pretrained import Role
from kdcache.models.run_json import (
    RUN_FILE,
    read_run_json,
    require_trusted,
    split_run,
    view_spec_of,
)
from kdcache.spec import Precision

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
OWN_MEAN: Triple = (0.5, 0.5, 0.5)
OWN_STD: Triple = (0.25, 0.25, 0.25)

WEIGHTS_FILE = "student.safetensors"
FORMS = (
    "torchvision:NAME, timm:NAME, kdcache:small|medium|large, python:package.module:factory, "
    "or the folder of a finished run (FOLDER@python:... where its network is a factory)"
)


def load_model(
    name: str,
    role: Role,
    *,
    num_classes: int | None,
    size_px: int,
    device: torch.device | str = "cpu",
) -> Classifier:
    """The model called `name`, on the device, checked to give `num_classes` logits.

    A teacher comes with its weights (pretrained, or of a run) and is frozen; a student starts fresh
    from torch's current seed. None: as many classes as it has, for a teacher or a run; a factory is
    called with None. Raises UsageError for an unknown name or another class count.
    """
    kind, _, rest = name.partition(":")
    found = split_run(name)
    if num_classes is None and role == "student" and not found:
        raise UsageError(f"the student {name} needs a number of classes")
    build: Callable[[], Classifier]
    if found:
        build = lambda: from_run(*found, role)  # noqa: E731
    elif kind == "torchvision" and rest:
        build = lambda: pretrained.from_torchvision(rest, role, num_classes)  # noqa: E731
    elif kind == "timm" and rest:
        build = lambda: pretrained.from_timm(rest, role, num_classes)  # noqa: E731
    elif kind == "kdcache" and rest:
        build = lambda: _from_own(rest, role, num_classes)  # noqa: E731
    elif kind == "python" and rest:
        build = lambda: _from_factory(rest, num_classes)  # noqa: E731
    elif "/" in name.partition("@")[0] and ":" not in name.partition("@")[0]:
        raise UsageError(f"no such folder: {name}; a model is {FORMS}")
    else:
        raise UsageError(f"unknown model {name!r}: a model is {FORMS}")
    # channels_last: the layout of the loader's batches.
    model = build().to(torch.device(device)).to(memory_format=torch.channels_last)
    model.num_outputs = num_classes or 0
    # At once, so that a wrong size or class count is one line before anything long begins.
    _check_output(model, num_classes, size_px, device)
    if role == "teacher":
        model.eval().requires_grad_(False)
    elif model.output_part:
        raise UsageError(
            f"{name} gives a {model.output_part.partition(':')[0]}, not one tensor of logits: "
            "build a student without auxiliary heads"
        )
    return model


def natural_size_px(name: str) -> int | None:
    """The side of views that a finished run was trained at, or the only one that a model takes;
    None where it takes many."""
    if found := split_run(name):
        return view_spec_of(read_run_json(found[0])).size_px
    return pretrained.natural_size_px(name)


def trained_size_px(name: str) -> int | None:
    """The side of views that a teacher was trained at; None where that is not known."""
    return natural_size_px(name) or pretrained.pretrained_size_px(name)


def load_student(
    name: str, *, num_classes: int | None, size_px: int, device: torch.device | str = "cpu"
) -> Classifier:
    """A model to train, initialised from torch's current seed.

    name         torchvision:NAME, timm:NAME, kdcache:small|medium|large,
                 python:package.module:factory, or the folder of a finished run
    num_classes  C; None only for a run, which has its own
    size_px      side of the views that it will get, in pixels
    device       where its parameters are put

    Raises UsageError for an unknown name, or a network that does not give [B, C] logits.
    """
    return load_model(name, "student", num_classes=num_classes, size_px=size_px, device=device)


def class_names_of(name: str) -> ClassNames | None:
    """The names of a trained model's classes; None where they are not known."""
    if found := split_run(name):
        trained = read_run_json(found[0]).get("class_names")
        return ClassNames.of(trained) if trained else None
    return pretrained.class_names(name)


def load_teacher(
    names: str | Sequence[str],
    *,
    num_classes: int | None = None,
    size_px: int,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    output: TeacherOutput = "logits",
    class_names: Sequence[str] = (),
    teacher_class_names: Sequence[str] = (),
    data: object = "the data",
) -> Teacher:
    """A frozen model with its weights, or several whose probabilities are averaged.

    names                of one model or several, as in `load_student`; torchvision's and timm's
                         come with pretrained weights
    num_classes          C; None: as many as the teachers have, or as class_names
    size_px              side of the views that it will get, in pixels
    device               where its parameters are put
    precision            of its forward passes, by autocast
    output               what the models give: logits, probabilities (whose logarithms become the
                         logits) or log-probabilities
    class_names          of the data: where the names of a model's classes are known too, its logits
                         are brought into their order, and those of other classes are left out
    teacher_class_names  of each model's classes, where they are not known otherwise
    data                 where class_names come from, for messages

    Raises UsageError without a name, where class counts differ, and for what `load_student` does;
    ClassesMismatch for a model that lacks some of the data's classes.
    """
    if isinstance(names, str):
        names = [names]
    if not names:
        raise UsageError("expected the name of at least one teacher")
    members = []
    for name in names:
        ids, count = None, num_classes
        known = ClassNames.of(teacher_class_names) if teacher_class_names else None
        if class_names and (known := known or class_names_of(name)):
            ids = match_classes(name, known, data, class_names)
        if known and (ids or teacher_class_names):
            count = len(known)
        model = load_model(name, "teacher", num_classes=count, size_px=size_px, device=device)
        model.output = output
        if ids:
            model.select(ids)
            model.matched = True
        members.append(model)
    teacher = teacher_of(members)
    teacher.precision = precision
    return teacher


def from_run(folder: Path, given: str, role: Role) -> Classifier:
    """The run's network. As a student it keeps the network's name, so that its own run's record
    does not hang on this folder.

    given   the network's name, which has to be given for one of a user's code; else ""
    """
    record = read_run_json(folder)
    require_trusted(folder, record["student"], given)
    size_px = view_spec_of(record).size_px
    model = load_model(
        record["student"], "student", num_classes=record["num_classes"], size_px=size_px
    )
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        model.network.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{folder / WEIGHTS_FILE} is damaged: {first_line(error)}") from error
    # Beyond damage: a factory whose normalisation has changed makes another network of these
    # weights.
    if model.content_hash() != record["weights"]:
        raise UsageError(
            f"{folder / WEIGHTS_FILE} is damaged: these weights, with the normalisation of "
            f"{record['student']}, are not those that {RUN_FILE} names"
        )
    if role == "teacher":
        model.name = str(folder)
    return model


def _from_own(name: str, role: Role, num_classes: int | None) -> Classifier:
    if name not in resnet.SIZES:
        known, close = ", ".join(resnet.SIZES), did_you_mean(name, resnet.SIZES)
        raise UsageError(f"unknown model 'kdcache:{name}': there are {known}{close}")
    if role == "teacher":
        raise UsageError(
            f"kdcache:{name} has no trained weights: train it with `kdcache train --mode labels` "
            "and give the run's folder"
        )
    assert num_classes is not None  # of a student, as `load_model` has checked
    return Classifier(resnet.build(name, num_classes), f"kdcache:{name}", OWN_MEAN, OWN_STD)


def _from_factory(path: str, num_classes: int | None) -> Classifier:
    """`package.module:factory`; the factory is called with num_classes, where None is for
    as many classes as it has, and gives an nn.Module.

    The module may carry `mean` and `std` triples; otherwise ImageNet's are taken.
    """
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not look there by itself
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    # A module of a user's may do anything when it is imported, and may call sys.exit.
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"unknown model 'python:{path}': {type(error).__name__}: {first_line(error)}; expected "
            "python:package.module:factory"
        ) from error
    try:
        network = factory(num_classes=num_classes)
    # A factory may do anything, and may call sys.exit.
    except (Exception, SystemExit) as error:
        line = f"python:{path} failed: {type(error).__name__}: {first_line(error)}"
        if num_classes is None:
            line += "; it was called with num_classes=None, for as many classes as it has"
        raise UsageError(line) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"python:{path} gave a {type(network).__name__}, not an nn.Module")
    mean, std = getattr(network, "mean", IMAGENET_MEAN), getattr(network, "std", IMAGENET_STD)
    try:
        model = Classifier(network, f"python:{path}", _triple(mean), _triple(std))
        model.assumed_norm = not hasattr(network, "mean")
        return model
    except (TypeError, ValueError) as error:
        raise UsageError(f"python:{path}: mean and std must be three numbers each") from error


def _triple(value: Any) -> Triple:
    r, g, b = np.asarray(value, float).reshape(-1)
    return float(r), float(g), float(b)


def first_line(error: BaseException) -> str:
    """The first line of a message of somebody else's, without its full stop."""
    return (str(error).splitlines() or [""])[0].removesuffix(".")


def _check_output(
    model: Classifier, num_classes: int | None, size_px: int, device: torch.device | str
) -> None:
    training = model.training
    # In training mode, batch normalisation may fail on the probe's single image.
    model.eval()
    try:
        with torch.inference_mode():
            probe = torch.zeros(1, 3, size_px, size_px, dtype=torch.uint8, device=device)
            logits = model(probe.contiguous(memory_format=torch.channels_last))
    except UsageError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
        line = f"{model.name} cannot take views of {size_px} px: {first_line(error)}"
        own_px = natural_size_px(model.name)
        if own_px not in (None, size_px):
            line += f"; give --size {own_px}"
        raise UsageError(line) from error
    finally:
        model.train(training)
    if logits.ndim != 2:
        raise UsageError(f"{model.name} does not give one row of logits for each image")
    model.num_classes = model.num_outputs = logits.shape[1]
    pretrained.require_classes(model.name, model.num_classes, num_classes)
