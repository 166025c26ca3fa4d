"""Weights in and out: initial weights of a student, and the file that a run leaves."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from kdcache.errors import UsageError
from kdcache.files import save_tensors
from kdcache.models import pretrained
from kdcache.models.classifier import Classifier
from kdcache.models.load import WEIGHTS_FILE, first_line, from_run
from kdcache.models.run_json import read_run_json, split_run

PRETRAINED = "pretrained"


def load_initial_weights(student: Classifier, source: str) -> list[str]:
    """Give the student these weights; the keys that stay fresh.

    source   a .safetensors file of the network's keys, the folder of a finished run, or
             "pretrained": torchvision's or timm's own, where a head of another class count stays
             fresh

    Raises UsageError, and leaves the student as it was, where any other key is missing, unknown or
    of another shape, or the weights cannot be read.
    """
    own = student.network.state_dict()
    fresh: list[str] = []
    counters: list[str] = []
    if source == PRETRAINED:
        weights, classes = pretrained.pretrained(student.name)
        where = f"the pretrained {student.name}"
        if classes != student.num_classes:
            fresh = _rows_of_classes(own, student.num_classes, weights, classes)
        # Weights of an old torch lack these, and torch then starts them at 0.
        counters = [key for key in own if key.endswith("num_batches_tracked")]
    elif run := split_run(source):
        folder, given = run
        network = read_run_json(folder)["student"]
        # The user has named the student, and so its code.
        given = given or (network if network == student.name else "")
        weights = from_run(folder, given, "student").network.state_dict()
        where = str(folder / WEIGHTS_FILE)
    else:
        weights, where = _read_weights(Path(source)), source
    for key in fresh:
        del weights[key]
    optional = {*fresh, *counters} - weights.keys()
    # Before anything is loaded: load_state_dict changes what fits before it raises.
    _require_fit(student, weights, optional, where)
    student.network.load_state_dict(weights, strict=not optional)
    return fresh


def _require_fit(
    student: Classifier, weights: dict[str, torch.Tensor], optional: set[str], where: str
) -> None:
    own = student.network.state_dict()
    unfit = f"{where} does not fit {student.name}: "
    for key, weight in own.items():
        if key in optional:
            continue
        expected = list(weight.shape)
        found = list(weights[key].shape) if key in weights else "none"
        if found != expected:
            raise UsageError(f"{unfit}expected {key} of shape {expected}, found {found}")
    for key in weights:
        if key not in own:
            raise UsageError(f"{unfit}found {key}, which {student.name} does not have")


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot read {file}: {first_line(error)}; expected a .safetensors file, the folder of "
            f"a finished run, or '{PRETRAINED}'"
        ) from error
    return weights


def _rows_of_classes(
    own: dict[str, torch.Tensor], count: int, weights: dict[str, torch.Tensor], num_classes: int
) -> list[str]:
    """The keys of one row for each class, of which there are `count` here and `classes` there."""
    return [
        key
        for key, found in weights.items()
        if key in own
        and own[key].shape[:1] == (count,)
        and found.shape == (num_classes, *own[key].shape[1:])
    ]


def save_weights(model: Classifier, path: Path) -> None:
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    weights = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.network.state_dict().items()
    }
    save_tensors(path, weights)
