"""The device that a command computes on."""

from __future__ import annotations

import torch

from kdcache.errors import UsageError
from kdcache.torchrun import current_process


def choose_device(name: str | None) -> str:
    """The device of this name, checked to work; None: cuda if available.

    The processes that torchrun starts on a machine divide its GPUs among them. Raises UsageError
    for a device that does not work.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    process = current_process()
    if name == "cuda" and torch.cuda.is_available() and process.world_size > 1:
        return f"cuda:{process.local_rank % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return name
