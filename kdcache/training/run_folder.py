"""A run's folder: its spec, its log, its checkpoints, and at the end its weights.

    spec.json            what decides the run, written first
    log.jsonl            a line for every logged step and every evaluation
    checkpoints/         the newest ones, by step
    tensorboard/         the log for TensorBoard, if requested
    best/                the weights with the best evaluation so far: a run's folder
    student.safetensors  the final weights
    run.json             written last: with it the run is finished

What stays true: a run is resumed only if its spec.json agrees, from the newest checkpoint, with the
log cut back to that step.
"""

from __future__ import annotations

import contextlib
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
from kdcache.errors import (
    CheckpointCorrupt,
    KDCacheError,
    MissingDependency,
    StorageError,
    UsageError,
)
from kdcache.evaluation.evaluate import Evaluation
from kdcache.files import PARTIAL, Taken, hold, remove_abandoned, replace_file, write_file
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.models.run_json import RUN_FILE, RUN_VERSION, read_run_json, sealed
from kdcache.models.weights import save_weights
from kdcache.spec import differences, parse_json
from kdcache.training import checkpoint
from kdcache.training.identity import RunIdentity
from kdcache.training.spec import TrainSpec

SPEC_FILE = "spec.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
BEST = "best"
TENSORBOARD = "tensorboard"
LOCK = ".lock"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"{step:010d}{checkpoint.SUFFIX}"


def checkpoints(folder: Path) -> list[Path]:
    """Of a run, the oldest first."""
    return sorted((folder / CHECKPOINTS).glob("[0-9]" * 10 + checkpoint.SUFFIX))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log of a run. Raises UsageError where there is none, or where lines of it are lost."""
    path, record = folder / LOG_FILE, read_run_json(folder) if is_finished(folder) else {}
    try:
        lines = [dict(parse_json(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not the log of a run: {error}") from error
    _require_lines(path, len(lines), record.get("log_lines"))
    return lines


def last_step(folder: Path) -> dict[str, Any]:
    """The last log line of a training step. Raises what `read_log` does."""
    return [line for line in read_log(folder) if "loss" in line][-1]


def _require_lines(path: Path, found: int, expected: int | None) -> None:
    """Raise UsageError where a log has other than the lines that were written."""
    if expected is not None and found != expected:
        raise UsageError(
            f"{path} has lost lines or got others: expected {expected}, found {found}; restore "
            "it, or remove it to go on without them"
        )


def is_finished(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


class RunFolder:
    """A run's folder, for the one process that writes it. A resource: use it with `with`.

    resume           resume the run in the folder; where there is none, begin
    max_checkpoints  older ones are deleted
    tensorboard      write the log for TensorBoard too

    resumed   content of the newest checkpoint; None where there is none

    Raises UsageError where the folder holds a different run, or any run without `resume`;
    CheckpointCorrupt where the newest checkpoint is damaged. A run that fails before its first log
    line leaves no folder. A finished run is not changed.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        *,
        resume: bool = False,
        max_checkpoints: int = 2,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.identity, self.max_checkpoints = folder, identity, max_checkpoints
        self.finished = is_finished(folder)
        self.resumed: dict[str, Any] | None = None
        self._log: TextIO | None = None
        self._tensorboard: Any = None
        self._exit = contextlib.ExitStack()
        self._logged = False
        self._num_lines = 0
        # A killed process may have left an empty folder, its lock, or a part of the first file.
        names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
        self._is_new = not {name for name in names - {LOCK} if not name.endswith(PARTIAL)}
        if not self._is_new and resume:
            self._require(identity)
        elif folder.exists() and not (resume and folder.is_dir()):
            line = f"{folder} exists; choose another --out, or remove it"
            if SPEC_FILE in names and not self.finished:
                line += ", or give --resume to resume the run in it"
            raise UsageError(line)
        if self.finished:
            self._remove_checkpoints()  # a killed process may have left them
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
        try:
            # Before anything in the folder is read or removed: it may be another process's.
            self._exit.enter_context(hold(self.folder / LOCK))
        except Taken as taken:
            self._is_new = False  # the files there belong to the other process
            raise UsageError(
                f"another process trains in {self.folder} ({taken}): wait for it, or choose "
                "another --out"
            ) from None
        if self._is_new:
            # First of all files, so that whatever is in the folder later can be told from another
            # run's.
            _write_json(self.folder / SPEC_FILE, self.identity.to_json())
        for part in (self.folder, self.folder / CHECKPOINTS, self.folder / BEST):
            remove_abandoned(part)
        for newest in checkpoints(self.folder)[-1:]:
            self.resumed = self._load(newest)
        step = self.resumed["step"] if self.resumed else 0
        # The steps after the checkpoint are made again, and logged again.
        self._cut_log(step, (self.resumed or {}).get("log_lines"))
        self._log = (self.folder / LOG_FILE).open("a")
        if tensorboard:
            self._tensorboard = _open_tensorboard(self.folder / TENSORBOARD, step)

    def _load(self, path: Path) -> dict[str, Any]:
        content = checkpoint.load(path)
        # Each checkpoint has the run's identity too: it may have been copied from another run.
        with checkpoint.using(path):
            different, step = _different(self.identity, content["run"]), int(content["step"])
        if different:
            raise UsageError(
                f"{path} is a checkpoint of a different run ({different}): {checkpoint.REMEDY}"
            )
        # A file that was renamed would be resumed from at another step.
        if step != int(path.stem):
            raise CheckpointCorrupt(f"{path} is a checkpoint of step {step}: {checkpoint.REMEDY}")
        return content

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            with contextlib.suppress(OSError):  # a full disk was reported by `log`
                self._log.close()
        if self._tensorboard:
            self._tensorboard.close()
        self._exit.close()
        holds_work = is_finished(self.folder) or checkpoints(self.folder) or self._logged
        if self._is_new and not holds_work:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _require(self, identity: RunIdentity) -> None:
        path = self.folder / SPEC_FILE
        try:
            different = _different(identity, parse_json(path.read_text()))
        except FileNotFoundError:
            raise UsageError(
                f"{self.folder} holds no run to resume (no {SPEC_FILE}): choose another --out"
            ) from None
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged: {error}; choose another --out") from error
        if different:
            raise UsageError(
                f"{self.folder} holds a different run ({different}): give the options that it was "
                "started with, or choose another --out"
            )

    def _cut_log(self, step: int, num_lines: int | None) -> None:
        """Remove log lines from after the checkpoint of this step: those of later steps, the
        evaluation of this step, and an incomplete line.

        num_lines   that the log had then
        """
        path = self.folder / LOG_FILE
        if not path.exists():  # removed by the user, or of a run that has logged nothing
            return
        lines = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = parse_json(line)
                # An evaluation comes after its step's checkpoint, and is made again by a resumed
                # run.
                if record["step"] + ("evaluation" in record) <= step:
                    lines.append(line)
        _require_lines(path, len(lines), num_lines)
        write_file(path, "".join(lines).encode())
        self._num_lines = len(lines)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line. Raises StorageError."""
        with self._writing_log() as log:
            log.write(json.dumps(record) + "\n")
            log.flush()
        self._logged = True
        self._num_lines += 1
        if self._tensorboard:
            for name, value in {**record, **record.get("evaluation", {})}.items():
                if isinstance(value, int | float) and name not in ("step", "steps", "samples"):
                    self._tensorboard.add_scalar(name, value, record["step"])

    def save(self, state: dict[str, Any]) -> None:
        """Save a checkpoint and delete the oldest ones. Raises StorageError; all earlier ones are
        then unchanged."""
        # The log first: a resumed run cuts it back to the checkpoint, so it must reach that far.
        with self._writing_log() as log:
            os.fsync(log.fileno())
        path = checkpoint_path(self.folder, state["step"])
        about = {"run": self.identity.to_json(), "log_lines": self._num_lines}
        checkpoint.save(path, {**state, **about})
        # Only once the new one is durable.
        for old in checkpoints(self.folder)[: -self.max_checkpoints]:
            old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing_log(self) -> Iterator[TextIO]:
        assert self._log is not None
        try:
            yield self._log
        except OSError as error:
            path = self.folder / LOG_FILE
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def finish(self, record: dict[str, Any], student: Classifier) -> dict[str, Any]:
        """Write weights and run.json, and delete the checkpoints. What `read_run_json` gives."""
        record = {**record, "log_lines": self._num_lines}
        write_result(self.folder, record, student)
        # Only now: until run.json is there, a rerun resumes from them.
        self._remove_checkpoints()
        return record

    def _remove_checkpoints(self) -> None:
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def save_best(self, record: dict[str, Any], student: Classifier) -> None:
        """Write the current weights as the best ones."""
        write_result(self.folder / BEST, record, student)


def begun_spec(folder: Path) -> TrainSpec | None:
    """Of the run in this folder; None where there is none, or none that can be read."""
    try:
        return RunIdentity.from_json(parse_json((folder / SPEC_FILE).read_text())).spec
    except (KDCacheError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `RunFolder` says what is wrong with it


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency(
            "TensorBoard is not installed: pip install 'kdcache[tensorboard]'"
        ) from error
    # TensorBoard cannot cut its files, but hides what was logged after this step.
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
    """The content of run.json: the spec, the student, the data and the evaluation.

    class_names   where they are not the dataset's
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
    try:
        # Weights first: run.json is what makes the folder a finished run's.
        with replace_file(folder / load.WEIGHTS_FILE) as partial:
            save_weights(student, partial)
        _write_json(folder / RUN_FILE, sealed(record))
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; free space, then resume with "
            "--resume"
        ) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())
