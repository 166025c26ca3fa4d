"""run.json: what a finished run's folder says of its network.

In: the folder. Out: the content of run.json as the current version writes it, whichever version
wrote it. `training/run_folder.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.spec import parse_json, require_version
from kdcache.views.spec import ViewSpec

RUN_FILE = "run.json"
RUN_VERSION = 3
SEALED_FROM = 3  # has a digest of the rest
DIGEST = "digest"

# What version 1 had beside the fields of its spec, which lay among these, and its name now.
_BESIDE_SPEC = {
    "student": "student",
    "classes": "num_classes",
    "class_names": "class_names",
    "data": "data",
    "samples": "num_samples",
    "cache": "cache",
    "teacher": "teacher",
    "seconds": "seconds",
    "weights": "weights",
    "kdcache": "kdcache",
    "torch": "torch",
    "evaluation": "evaluation",
}


def read_run_json(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself.

    spec         its TrainSpec, as JSON
    student      the network's name; num_classes, class_names: of its classes
    weights      content hash of its network
    evaluation   figures on the validation data, or None

    and what else `training.run_folder.make_run_json` writes. Raises UsageError for any other
    folder, naming what is wrong.
    """
    path = folder / RUN_FILE
    try:
        record = parse_json(path.read_text())
        if "version" not in record:
            record = _from_version_1(record)
        version = require_version("runs", record["version"], RUN_VERSION)
        if version >= SEALED_FROM and record.get(DIGEST) != sealed(record)[DIGEST]:
            raise ValueError("its digest is not that of its contents")
        for field, kind in (("student", str), ("weights", str), ("num_classes", int)):
            if not isinstance(record[field], kind):
                raise TypeError(f"{field} is {record[field]!r}")
        names = record.get("class_names") or []
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"class_names is {names!r}")
        view_spec_of(record)
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a finished run: it has no {RUN_FILE}") from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error
    if record["num_classes"] < 1 or Path(record["student"]).is_dir():
        raise UsageError(f"{path} is damaged: it does not describe a network")
    return {name: value for name, value in record.items() if name != DIGEST}


def split_run(name: str) -> tuple[Path, str] | None:
    """`name` as the folder of a run and, of FOLDER@NETWORK, the name of its network, else "".

    None for the names of other models.
    """
    if name and Path(name).is_dir():
        return Path(name), ""
    folder, at, network = name.partition("@")
    return (Path(folder), network) if folder and at and Path(folder).is_dir() else None


def require_trusted(folder: Path, network: str, given: str) -> None:
    """Raise UsageError unless a run's network is of code that comes with a library, or was named.

    network   as run.json says; a folder from somebody else may name anything
    given     by the user, "" where nothing was
    """
    kind, _, rest = network.partition(":")
    is_code = kind == "python" or ":" in rest  # a hub's or a folder's, which timm fetches
    if given and given != network:
        raise UsageError(f"the network of {folder} is {network!r}, not {given!r}")
    if is_code and not given:
        raise UsageError(
            f"the network of {folder} is {network!r}, which is not run because a file says so: if "
            f"you trust it, give {folder}@{network}"
        )


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """With a digest of all the rest."""
    rest = {name: value for name, value in record.items() if name != DIGEST}
    # Not canonical JSON, which has no infinity; a KL may be one.
    text = json.dumps(rest, sort_keys=True)
    return {**rest, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def view_spec_of(record: dict[str, Any]) -> ViewSpec:
    """What the student of a run saw."""
    spec = record["spec"]
    return ViewSpec.from_json(spec["view_spec" if "view_spec" in spec else "view"])


def _from_version_1(record: dict[str, Any]) -> dict[str, Any]:
    beside = {new: record[old] for old, new in _BESIDE_SPEC.items() if old in record}
    spec = {name: x for name, x in record.items() if name not in _BESIDE_SPEC}
    return {"version": 2, "spec": spec, **beside}
