"""The process as torchrun describes it, in environment variables. Imports no torch.

torchrun starts `WORLD_SIZE` processes, of which `LOCAL_WORLD_SIZE` are on this machine. Without its
variables there is one process, of rank 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kdcache.errors import UsageError


@dataclass(frozen=True)
class Process:
    """rank, world_size: of all processes; local_rank, local_world_size: of this machine's."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def current_process() -> Process:
    """Raises UsageError where a variable is not a number."""
    local_rank, local_world_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Process(local_rank=local_rank, local_world_size=local_world_size)
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    return Process(rank, world_size, local_rank, local_world_size)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UsageError(
            f"{name} must be a number, not {value!r}: start with torchrun, or unset it"
        ) from None
