"""A run's folder: what the run is, its log, its checkpoints, and at the end its weights.

    spec.json            what decides the run, written first
    log.jsonl            a line for every logged step and every evaluation
    checkpoints/         the last few, by step
    tensorboard/         the log once more, where that was asked for
    best/                the weights that did best so far on the validation images: a run's folder
    student.safetensors  the weights at the end
    run.json             written last: with it the run is finished

What stays true: a run that goes on is the one that was begun (its spec.json must agree), from the
newest checkpoint, with the log cut back to it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__, checkpoint, models
from kdcache.dataset import Dataset
from kdcache.errors import MissingDependency, StorageError, UsageError
from kdcache.evaluate import Evaluation
from kdcache.models import Classifier
from kdcache.spec import TrainSpec, canonical_json, digest
from kdcache.store import keep

SPEC_FILE = "spec.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
BEST = "best"
BOARD = "tensorboard"
KEPT = 2


def identity(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    *,
    tape: str | None = None,
    teacher: str | None = None,
) -> dict[str, Any]:
    """All that decides a run, as spec.json has it: its spec, and digests of what it reads.

    student   as it starts
    tape      digest of the tape's spec; teacher: fingerprint of a live teacher
    """
    return {
        **spec.to_json(),
        "student": student.name,
        "first_weights": student.fingerprint(),
        "data": dataset.fingerprint,
        "tape": tape,
        "teacher": teacher,
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"{step:010d}{checkpoint.SUFFIX}"


def checkpoints(folder: Path) -> list[Path]:
    """A run's, the oldest first."""
    return sorted((folder / CHECKPOINTS).glob("[0-9]*" + checkpoint.SUFFIX))


def is_finished(folder: Path) -> bool:
    return (folder / models.RUN_FILE).is_file()


class Run:
    """A run's folder, for the one process that writes it. A resource: use it with `with`.

    resume       go on with what the folder holds; where there is none, begin
    keep         how many checkpoints
    tensorboard  also write the log for TensorBoard, to tensorboard/

    Raises UsageError where the folder holds another run, or any while `resume` is off. A run that
    fails before its first log line leaves nothing.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        resume: bool = False,
        keep: int = KEPT,
        tensorboard: bool = False,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = digest(identity)
        goes_on = resume and folder.is_dir() and any(folder.iterdir())
        if goes_on:
            self._require(identity)
        elif folder.exists() and not (resume and folder.is_dir()):
            line = f"{folder} exists; choose another --out, or remove it"
            if (folder / SPEC_FILE).exists() and not is_finished(folder):
                line += ", or give --resume to go on with the run in it"
            raise UsageError(line)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                _write(folder / SPEC_FILE, identity)
            newest = checkpoints(self.folder)[-1:]
            self.resumed = checkpoint.load(newest[0]) if newest else None
            step = int(newest[0].stem) if newest else 0
            self._cut_log(step)
            self._log = (folder / LOG_FILE).open("a")
            self._board = _board(folder / BOARD, step) if tensorboard else None
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot make {folder}: {error.strerror}") from error
        if self.resumed is not None and self.resumed["run"] != self.identity:
            raise UsageError(f"{newest[0]} is a checkpoint of another run: remove it")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if self._board:
            self._board.close()
        if (self.folder / LOG_FILE).stat().st_size == 0 and not (
            is_finished(self.folder) or checkpoints(self.folder)
        ):
            shutil.rmtree(self.folder)

    def _require(self, identity: dict[str, Any]) -> None:
        path = self.folder / SPEC_FILE
        try:
            found = json.loads(path.read_text())
            different = [
                f"{name}: {identity[name]} here, {found.get(name)} there"
                for name in identity
                if canonical_json(found.get(name)) != canonical_json(identity[name])
            ]
        except FileNotFoundError:
            raise UsageError(
                f"{self.folder} holds no run to go on with (no {SPEC_FILE}): choose another --out"
            ) from None
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {error}; choose another --out") from error
        if different:
            raise UsageError(
                f"{self.folder} holds another run ({'; '.join(different)}): give the options that "
                "it was begun with, or choose another --out"
            )

    def _cut_log(self, step: int) -> None:
        """Take lines of later steps, and one that was not written to its end, off the log."""
        path = self.folder / LOG_FILE
        if not path.exists():
            return
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError):
                if json.loads(line)["step"] <= step:
                    lines.append(line)
        path.write_text("".join(lines))

    def log(self, record: dict[str, Any]) -> None:
        try:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        except OSError as error:
            raise StorageError(
                f"cannot write {self.folder / LOG_FILE}: {error.strerror}"
            ) from error
        if self._board:
            for name, value in {**record, **record.get("evaluation", {})}.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def save(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint, and of the older ones the last few. Raises StorageError; what was
        kept before is then still there."""
        path = checkpoint_path(self.folder, state["step"])
        checkpoint.save(path, {**state, "run": self.identity})
        for old in checkpoints(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)

    def finish(self, record: dict[str, Any], student: Classifier) -> None:
        """Write weights and run.json; checkpoints have served."""
        write_result(self.folder, record, student)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def keep_best(self, record: dict[str, Any], student: Classifier) -> None:
        """Write the weights of now as those that did best."""
        try:
            (self.folder / BEST).mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {self.folder / BEST}: {error.strerror}") from error
        write_result(self.folder / BEST, record, student)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency(
            "TensorBoard is not installed: pip install 'kdcache[tensorboard]'"
        ) from error
    return SummaryWriter(folder, purge_step=step + 1)


def run_record(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    evaluation: Evaluation | None,
    class_names: tuple[str, ...] | None = None,
    **extra: str | float | list[str] | None,
) -> dict[str, Any]:
    """What run.json says: the spec, what was trained on what, and how good it became.

    class_names   where they are not the data's
    """
    names = dataset.classes if class_names is None else class_names
    return {
        **spec.to_json(),
        "student": student.name,
        "classes": student.num_classes,
        "class_names": list(names),
        "data": dataset.fingerprint,
        "samples": len(dataset),
        **extra,
        "weights": student.fingerprint(),
        "kdcache": __version__,
        "torch": torch.__version__,
        "evaluation": asdict(evaluation) if evaluation else None,
    }


def write_result(folder: Path, record: dict[str, Any], student: Classifier) -> None:
    """The student's weights, then run.json, which makes the folder a finished run's."""
    try:
        weights = folder / models.WEIGHTS_FILE
        partial = weights.with_name(weights.name + checkpoint.PARTIAL)
        models.save_weights(student, partial)
        keep(partial, weights)
        _write(folder / models.RUN_FILE, record)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + checkpoint.PARTIAL)
    partial.write_text(json.dumps(record, indent=2) + "\n")
    keep(partial, path)
