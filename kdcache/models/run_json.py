"""run.json: what a finished run's folder says of its network.

In: the folder. Out: the content of run.json as the current version writes it, whichever version
wrote it. `training/run_folder.py` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.views.spec import ViewSpec

RUN_FILE = "run.json"
RUN_VERSION = 2

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
        record = json.loads(path.read_text())
        if "version" not in record:
            record = _from_version_1(record)
        if record["version"] != RUN_VERSION:
            raise UsageError(
                f"{path} has version {record['version']!r}, this kdcache reads versions 1 to "
                f"{RUN_VERSION}: install the kdcache that wrote it, or a later one"
            )
        for field, kind in (("student", str), ("weights", str), ("num_classes", int)):
            if not isinstance(record[field], kind):
                raise TypeError(f"{field} is {record[field]!r}")
        view_spec_of(record)
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a finished run: it has no {RUN_FILE}") from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error
    if record["num_classes"] < 1 or Path(record["student"]).is_dir():
        raise UsageError(f"{path} is damaged: it does not describe a network")
    return dict(record)


def view_spec_of(record: dict[str, Any]) -> ViewSpec:
    """What the student of a run saw."""
    spec = record["spec"]
    return ViewSpec.from_json(spec["view_spec" if "view_spec" in spec else "view"])


def _from_version_1(record: dict[str, Any]) -> dict[str, Any]:
    beside = {new: record[old] for old, new in _BESIDE_SPEC.items() if old in record}
    spec = {name: x for name, x in record.items() if name not in _BESIDE_SPEC}
    return {"version": RUN_VERSION, "spec": spec, **beside}
