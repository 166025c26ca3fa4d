"""Checkpoints: nested Python values with tensors, each in one safetensors file.

In: dicts, lists and tuples of tensors, numbers, strings and None, as optimizers keep them. Out: a
file, and from it the same values. What stays true: a checkpoint is there whole or not at all, also
after a power cut; a changed byte is an error; nothing is unpickled.

Tensors lie in the file under numbers; what they belong to is JSON in its header:

    {"t": 3}            tensor number 3            {"d": [[key, value], ...]}   a dict
    {"l": [...]}        a list                     {"u": [...]}                 a tuple
    null, true, 1.5, "text"                        themselves
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from kdcache.errors import CheckpointCorrupt, StorageError
from kdcache.files import commit_file

VERSION = "1"
SUFFIX = ".safetensors"
PARTIAL = ".partial"
LEFT = ("*" + PARTIAL, ".tmp*")  # what a kill may leave; safetensors writes the latter
REMEDY = "remove it, and --resume goes on from the checkpoint before, or from the start"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`. Raises StorageError; what was at `path` before is then still there.

    Tensors of any device are kept as the CPU's, in contiguous memory.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_packed(state, tensors))
    about = {"kdcache": VERSION, "state": text, "sha256": _digest(text, tensors)}
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(exist_ok=True)
        save_tensors(partial, tensors, about)
        commit_file(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; earlier ones are "
            "still there"
        ) from error


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None
) -> None:
    """A safetensors file with the rights of any new file: the library's own is its owner's alone.
    Raises OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, about)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def load(path: Path) -> dict[str, Any]:
    """The values that were saved, on the CPU. Raises CheckpointCorrupt, naming the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if about.get("kdcache") != VERSION:
            raise CheckpointCorrupt(f"{path} is no checkpoint of version {VERSION}: {REMEDY}")
        if _digest(about["state"], tensors) != about["sha256"]:
            raise CheckpointCorrupt(f"{path} is damaged: its digest is another; {REMEDY}")
        state: dict[str, Any] = _unpacked(json.loads(about["state"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointCorrupt(f"cannot read {path}: {error}; {REMEDY}") from error
    return state


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256(text.encode())
    for key, tensor in sorted(tensors.items()):
        h.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        # A clone: safetensors refuses tensors that share memory, as tied weights do.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"t": key}
    if isinstance(value, dict):
        return {"d": [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        name = "l" if isinstance(value, list) else "u"
        return {name: [_packed(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
    items = [_unpacked(v, tensors) for v in content]
    return items if kind == "l" else tuple(items)
