"""What every spec needs: canonical JSON, digests, checks of fields, differences between two."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields, is_dataclass
from typing import Literal

from kdcache.errors import UsageError

Precision = Literal["float32", "bfloat16", "float16"]


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """The first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def require(ok: bool, field: str, expected: str, found: object) -> None:
    if not ok:
        raise UsageError(f"{field} must be {expected}, not {found!r}")


def differences(expected: object, found: object) -> list[str]:
    """The fields in which two specs of one type differ, as "field: expected, found" phrases."""
    out: list[str] = []
    for field in fields(expected):  # type: ignore[arg-type]
        a, b = getattr(expected, field.name), getattr(found, field.name)
        if is_dataclass(a) and type(a) is type(b):
            out += differences(a, b)
        elif a != b:
            out.append(f"{field.name}: {_short(a)} here, {_short(b)} there")
    return out


def _short(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
