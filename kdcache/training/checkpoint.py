"""Checkpoint format: nested Python values with tensors, in one safetensors file.

In: dicts, lists and tuples of tensors, numbers, strings and None, as in an optimizer's state. Out:
a file, and from it the same values. What stays true: a checkpoint is complete or absent, also after
a power cut; a changed byte is an error; nothing is unpickled.

Tensors are in the file under numbers; the values that hold them are JSON in its header:

    {"t": 3}            tensor number 3            {"d": [[key, value], ...]}   a dict
    {"l": [...]}        a list                     {"u": [...]}                 a tuple
    null, true, 1.5, "text"                        themselves
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError

from kdcache.errors import CheckpointCorrupt, KDCacheError, StorageError
from kdcache.files import replace_file, save_tensors
from kdcache.spec import parse_json

VERSION = "1"
SUFFIX = ".safetensors"
REMEDY = "remove it; --resume then resumes from the checkpoint before, or from the start"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`. Raises StorageError; an earlier file at `path` is then unchanged.

    Tensors of any device are saved as contiguous tensors of the CPU.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_packed(state, tensors))
    metadata = {"kdcache": VERSION, "state": text, "sha256": _digest(text, tensors)}
    try:
        with replace_file(path) as partial:
            save_tensors(partial, tensors, metadata)
    except OSError as error:
        raise StorageError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; earlier ones are "
            "unchanged"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """The values that were saved, on the CPU. Raises CheckpointCorrupt, naming the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if metadata.get("kdcache") != VERSION:
            raise CheckpointCorrupt(f"{path} is not a checkpoint of version {VERSION}: {REMEDY}")
        if _digest(metadata["state"], tensors) != metadata["sha256"]:
            raise CheckpointCorrupt(f"{path} is damaged: its digest differs; {REMEDY}")
        state: dict[str, Any] = _unpacked(parse_json(metadata["state"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointCorrupt(f"cannot read {path}: {error}; {REMEDY}") from error
    return state


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Within, CheckpointCorrupt is raised where the content of this checkpoint does not fit."""
    try:
        yield
    except (KDCacheError, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise CheckpointCorrupt(
            f"{path} does not hold the state of this run ({type(error).__name__}: {line}): {REMEDY}"
        ) from error


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    # Over the tensors too: safetensors itself has no checksum.
    h = hashlib.sha256(text.encode())
    for key, tensor in sorted(tensors.items()):
        # Type and shape too: equal bytes may be other numbers.
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
        # Pairs: an optimizer's state has integer keys, and those of JSON objects are strings.
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
