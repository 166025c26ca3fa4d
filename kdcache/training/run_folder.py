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
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from kdcache import __version__
from kdcache.data.beton import Dataset
from kdcache.errors import CheckpointCorrupt, MissingDependency, StorageError, UsageError
from kdcache.evaluation.evaluate import Evaluation
from kdcache.files import commit_file
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.models.run_json import RUN_FILE, RUN_VERSION
from kdcache.models.weights import save_weights
from kdcache.spec import differences
from kdcache.training import checkpoint
from kdcache.training.identity import RunIdentity
from kdcache.training.spec import TrainSpec

SPEC_FILE = "spec.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
BEST = "best"
BOARD = "tensorboard"
MAX_CHECKPOINTS = 2


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"{step:010d}{checkpoint.SUFFIX}"


def checkpoints(folder: Path) -> list[Path]:
    """A run's, the oldest first."""
    return sorted((folder / CHECKPOINTS).glob("[0-9]" * 10 + checkpoint.SUFFIX))


def last_step(folder: Path) -> dict[str, Any]:
    """The last line of a run's log that is of a step. Raises UsageError where there is none."""
    try:
        records = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
        return dict([record for record in records if "loss" in record][-1])
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{folder / LOG_FILE} is no log of a run: {error}") from error


def is_finished(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


class RunFolder:
    """A run's folder, for the one process that writes it. A resource: use it with `with`.

    resume       go on with what the folder holds; where there is none, begin
    keep         how many checkpoints
    tensorboard  also write the log for TensorBoard, to tensorboard/

    Raises UsageError where the folder holds another run, or any while `resume` is off;
    CheckpointCorrupt where the newest checkpoint is not what was written. A run that fails before
    its first log line leaves nothing. A finished run stays as it is.

    resumed   what the newest checkpoint holds; None where there is none
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        *,
        resume: bool = False,
        keep: int = MAX_CHECKPOINTS,
        tensorboard: bool = False,
    ) -> None:
        if keep < 1:
            raise UsageError(f"keep must be at least 1 checkpoint, not {keep}")
        self.folder, self.keep, self.identity = folder, keep, identity
        self.finished = is_finished(folder)
        self.resumed: dict[str, Any] | None = None
        self._log: TextIO | None = None
        self._board: Any = None
        self._lock: int | None = None
        self._logged = False
        # A kill may have left nothing but a folder, or the first file's beginning.
        held = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
        self._begun = not held - {SPEC_FILE + checkpoint.PARTIAL}
        if not self._begun and resume:
            self._require(identity)
        elif folder.exists() and not (resume and folder.is_dir()):
            line = f"{folder} exists; choose another --out, or remove it"
            if SPEC_FILE in held and not self.finished:
                line += ", or give --resume to go on with the run in it"
            raise UsageError(line)
        if self.finished:
            self._forget_checkpoints()  # a kill may have come between
            return
        try:
            self._open(tensorboard)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(f"cannot write {folder}: {error.strerror}") from error
            raise

    def _open(self, tensorboard: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._begun = False  # what is there is the other one's
            raise UsageError(
                f"another process trains in {self.folder}: wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        if self._begun:
            _write(self.folder / SPEC_FILE, self.identity.to_json())
        for part in (self.folder, self.folder / CHECKPOINTS, self.folder / BEST):
            for left in (left for pattern in checkpoint.LEFT for left in part.glob(pattern)):
                left.unlink()
        for newest in checkpoints(self.folder)[-1:]:
            self.resumed = checkpoint.load(newest)
            different = _different(self.identity, self.resumed["run"])
            if different:
                raise UsageError(
                    f"{newest} is a checkpoint of another run ({different}): {checkpoint.REMEDY}"
                )
            if self.resumed["step"] != int(newest.stem):
                raise CheckpointCorrupt(
                    f"{newest} is of step {self.resumed['step']}: {checkpoint.REMEDY}"
                )
        step = self.resumed["step"] if self.resumed else 0
        self._cut_log(step)
        self._log = (self.folder / LOG_FILE).open("a")
        if tensorboard:
            self._board = _board(self.folder / BOARD, step)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            with contextlib.suppress(OSError):  # what did not fit was reported when it was written
                self._log.close()
        if self._board:
            self._board.close()
        if self._lock is not None:
            os.close(self._lock)
        if self._begun and not (
            is_finished(self.folder) or checkpoints(self.folder) or self._logged
        ):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _require(self, identity: RunIdentity) -> None:
        path = self.folder / SPEC_FILE
        try:
            different = _different(identity, json.loads(path.read_text()))
        except FileNotFoundError:
            raise UsageError(
                f"{self.folder} holds no run to go on with (no {SPEC_FILE}): choose another --out"
            ) from None
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {error}; choose another --out") from error
        if different:
            raise UsageError(
                f"{self.folder} holds another run ({different}): give the options that it was "
                "begun with, or choose another --out"
            )

    def _cut_log(self, step: int) -> None:
        """Take off the log what comes after the checkpoint of this step: lines of later steps, the
        evaluation after it, and a line that was not written to its end."""
        path = self.folder / LOG_FILE
        if not path.exists():
            return
        lines = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["step"] + ("evaluation" in record) <= step:
                    lines.append(line)
        partial = path.with_name(path.name + checkpoint.PARTIAL)
        partial.write_text("".join(lines))
        commit_file(partial, path)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line. Raises StorageError."""
        with self._writing_log() as log:
            log.write(json.dumps(record) + "\n")
            log.flush()
        self._logged = True
        if self._board:
            for name, value in {**record, **record.get("evaluation", {})}.items():
                if isinstance(value, int | float) and name not in ("step", "steps", "samples"):
                    self._board.add_scalar(name, value, record["step"])

    def save(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint, and of the older ones the last few. Raises StorageError; what was
        kept before is then still there."""
        with self._writing_log() as log:
            os.fsync(log.fileno())
        path = checkpoint_path(self.folder, state["step"])
        checkpoint.save(path, {**state, "run": self.identity.to_json()})
        for old in checkpoints(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing_log(self) -> Iterator[TextIO]:
        assert self._log is not None
        try:
            yield self._log
        except OSError as error:
            path = self.folder / LOG_FILE
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def finish(self, record: dict[str, Any], student: Classifier) -> None:
        """Write weights and run.json; checkpoints have served."""
        write_result(self.folder, record, student)
        self._forget_checkpoints()

    def _forget_checkpoints(self) -> None:
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


def _different(here: RunIdentity, there: Any) -> str:
    """The fields in which a stored identity differs, as "field: expected, found" phrases."""
    return "; ".join(differences(here, RunIdentity.from_json(there)))


def make_run_json(
    spec: TrainSpec,
    dataset: Dataset,
    student: Classifier,
    evaluation: Evaluation | None,
    class_names: tuple[str, ...] | None = None,
    **extra: str | float | list[str] | None,
) -> dict[str, Any]:
    """What run.json says: the spec, what was trained on what, and its evaluation.

    class_names   where they are not the data's
    """
    names = dataset.class_names if class_names is None else class_names
    return {
        "version": RUN_VERSION,
        "spec": spec.to_json(),
        "student": student.name,
        "num_classes": student.num_classes,
        "class_names": list(names),
        "data": dataset.content_hash,
        "num_samples": len(dataset),
        **extra,
        "weights": student.content_hash(),
        "kdcache": __version__,
        "torch": torch.__version__,
        "evaluation": asdict(evaluation) if evaluation else None,
    }


def write_result(folder: Path, record: dict[str, Any], student: Classifier) -> None:
    """The student's weights, then run.json, which makes the folder a finished run's."""
    weights = folder / load.WEIGHTS_FILE
    partial = weights.with_name(weights.name + checkpoint.PARTIAL)
    try:
        save_weights(student, partial)
        commit_file(partial, weights)
        _write(folder / RUN_FILE, record)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; with room for it, --resume goes on"
        ) from error


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + checkpoint.PARTIAL)
    partial.write_text(json.dumps(record, indent=2) + "\n")
    commit_file(partial, path)
