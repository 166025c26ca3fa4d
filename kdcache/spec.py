"""What every spec needs: canonical JSON, digests, checks of fields, old versions, differences.

A spec is a frozen dataclass that checks itself when it is built. Its JSON holds its version and the
fields that differ from that version's defaults: a new field with a default leaves the JSON, and so
the digest, of every older spec as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from kdcache.choices import Precision as Precision
from kdcache.errors import UsageError


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """The value of JSON that may be damaged. Raises ValueError, for too deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def digest(value: object) -> str:
    """The first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def require(ok: bool, field: str, expected: str, found: object) -> None:
    """Raise UsageError unless `ok`."""
    if not ok:
        raise UsageError(f"{field} must be {expected}, not {found!r}")


def spec_to_json(spec: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; specs in it by their `to_json`."""
    values = ((field, getattr(spec, field.name)) for field in fields(spec))
    # Defaults are left out, so that a new field changes no older spec's digest.
    return {f.name: _to_json(f, v) for f, v in values if f.default is MISSING or v != f.default}


def _to_json(field: Field[Any], value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    # 1 and 1.0 are equal in Python and two texts in JSON; equal specs have one digest.
    return float(value) if field.type == "float" and value is not None else value


def require_known_fields(cls: type, value: Mapping[str, Any], what: str) -> None:
    """Raise UsageError for a field that `cls` lacks: a later kdcache has written it."""
    for name in value.keys() - {field.name for field in fields(cls)}:
        raise UsageError(
            f"{what} has the field {name!r}, which this kdcache does not know: install the "
            "kdcache that wrote it, or a later one"
        )


def require_version(what: str, found: object, newest: int) -> int:
    """The version, checked to be one that this kdcache reads. Raises UsageError for another."""
    # type and not isinstance: True is an int in Python.
    if type(found) is not int or not 1 <= found <= newest:
        raise UsageError(
            f"this kdcache reads {what} of versions 1 to {newest}, found version {found!r}: "
            "install the kdcache that wrote it, or a later one"
        )
    return found


def differences(expected: object, found: object) -> list[str]:
    """The fields in which two specs of one type differ, as "field: expected, found" phrases."""
    out: list[str] = []
    for field in fields(expected):  # type: ignore[arg-type]
        a, b = getattr(expected, field.name), getattr(found, field.name)
        if is_dataclass(a) and type(a) is type(b):
            out += differences(a, b)
        elif a != b:
            out.append(f"{field.name}: {format_value(a)} here, {format_value(b)} there")
    return out


def facts(spec: object) -> dict[str, str]:
    """Every field as text, those of specs in it beside its own."""
    out: dict[str, str] = {}
    for field in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if is_dataclass(value):
            out |= {f"{field.name} {name}": x for name, x in facts(value).items()}
        else:
            out[field.name] = format_value(value)
    return out


def format_value(value: object) -> str:
    """A value as a message shows it: numbers short where that loses nothing."""
    if isinstance(value, float) and math.isfinite(value) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
