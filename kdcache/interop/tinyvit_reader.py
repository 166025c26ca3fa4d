"""Teacher answers as TinyViT saves them: a folder of them, looked through and read.

In: the folder that TinyViT's `save_logits.py` writes. Out: records by epoch and sample. The layout:

    logits_top{k}_epoch{e}/rank{r}-keys.txt     a key a line: the sample's index, or its file name
    logits_top{k}_epoch{e}/rank{r}-values.bin   a record for each key: int32 seed, then k classes as
                                                int16, then k probabilities at T = 1 as float16,
                                                falling; little-endian, 4 + 4k bytes

What stays true: nothing is read from a folder before every byte of it has been looked at. Cost: the
files are read twice, and 4 bytes are held for each sample of an epoch that is being read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.data.beton import Dataset
from kdcache.errors import UsageError
from kdcache.paths import PathLike

Progress = Callable[[int], None]
Rows = NDArray[Any]  # structured, of `record_dtype`

MAX_CLASSES = 1 << 15  # that an int16 can name
# k numbers that sum to 1, each rounded to float16, sum to at most 1 + 2^-11.
LARGEST_SUM = 1 + 2.0**-10
CHECKED_ROWS = 1 << 16

_FOLDER = re.compile(r"logits_top([1-9]\d*)_epoch(0|[1-9]\d*)")
_KEYS = re.compile(r"rank(0|[1-9]\d*)-keys\.txt")


def record_dtype(top_k: int) -> np.dtype[Any]:
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (top_k,)), ("values", "<f2", (top_k,))])


# --- in --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """One folder: for each rank its keys, its records and how many they are."""

    number: int
    keys: tuple[Path, ...]
    values: tuple[Path, ...]
    counts: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class SavedLogits:
    """A folder of TinyViT's, checked: every epoch answers every sample, and every record is sane.

    digest   of all keys and records: the content_hash of a teacher that we do not have
    places   from a key to the sample that it names
    """

    folder: Path
    num_classes: int
    num_samples: int
    top_k: int
    epochs: tuple[Epoch, ...]
    digest: str
    places: dict[str, int]


def read_keys(path: PathLike) -> list[str]:
    """The key of each sample, one per line. Raises UsageError for a file that is no text."""
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def open_saved(
    folder: PathLike,
    dataset: Dataset,
    names: Sequence[str] | None = None,
    progress: Progress = lambda records: None,
) -> SavedLogits:
    """Read and check everything below `folder`; `progress` is called with the records so far.

    names   the key of each sample, where keys are not the samples' indices

    Raises UsageError that names the file, and the line or record, which cannot be.
    """
    folder, samples, classes = Path(folder), len(dataset), len(dataset.class_names)
    if names is not None and len(names) != samples:
        raise UsageError(f"{dataset.path} has {samples} samples, and {len(names)} names were given")
    found = [str(i) for i in range(samples)] if names is None else names
    places = {key: sample for sample, key in enumerate(found)}
    if len(places) != samples:
        double = next(key for sample, key in enumerate(found) if places[key] != sample)
        raise UsageError(f"two samples have the name {double!r}: a key must name one")
    top_k, epochs = _epochs(folder)
    if top_k > classes:
        raise UsageError(
            f"{folder} keeps {top_k} classes, {dataset.path} has {classes}: it is of other data"
        )
    h, done = hashlib.sha256(), 0
    for epoch in epochs:
        rows_of(epoch, places, dataset.path)
        for keys, values, count in zip(epoch.keys, epoch.values, epoch.counts, strict=True):
            h.update(f"{epoch.number} {keys.name} {count} {top_k}\n".encode())
            # The teacher is not here: a digest of its records stands for that of its parameters.
            h.update(keys.read_bytes())
            for start in range(0, count, CHECKED_ROWS):
                rows = min(CHECKED_ROWS, count - start)
                part = np.fromfile(values, epoch.dtype, rows, offset=start * epoch.dtype.itemsize)
                _check(part, classes, values, start)
                h.update(part.tobytes())
                done += len(part)
                progress(done)
    return SavedLogits(folder, classes, samples, top_k, epochs, h.hexdigest()[:16], places)


def rows_of(epoch: Epoch, places: dict[str, int], data: Path) -> NDArray[np.int32]:
    """For each sample its record, counted through all ranks.

    TinyViT deals the samples out in equal parts, and so repeats up to two a rank. As there, the
    first one counts.
    """
    rows_N = np.full(len(places), -1, np.int32)
    first, repeats, folder = 0, 0, epoch.keys[0].parent
    for path, values, count in zip(epoch.keys, epoch.values, epoch.counts, strict=True):
        samples = _samples(path, places, data)
        if len(samples) != count:
            raise UsageError(
                f"{path} has {len(samples)} keys and {values.name} {count} records: one is "
                "truncated, copy both again"
            )
        if len(np.unique(samples)) < len(samples):
            s = int(np.flatnonzero(np.bincount(samples) > 1)[0])
            raise UsageError(f"{path} has two records of sample {s}: a rank saves each once")
        new = rows_N[samples] < 0
        rows_N[samples[new]] = first + np.flatnonzero(new)
        repeats += int((~new).sum())
        first += count
    # Padding repeats fewer than two samples a rank; more is a file of another run.
    if repeats >= 2 * len(epoch.keys):
        raise UsageError(
            f"{folder} answers {repeats} samples twice, in different ranks' files, where padding "
            f"repeats fewer than {2 * len(epoch.keys)}: some are of another run, remove them"
        )
    missing = np.flatnonzero(rows_N < 0)
    if len(missing):
        raise UsageError(
            f"{folder} lacks {len(missing)} of {len(rows_N)} samples, the first is {missing[0]}: "
            f"a rank's files are missing, or it is of other data than {data}"
        )
    return rows_N


def read(epoch: Epoch, rows_B: NDArray[np.int32]) -> Rows:
    """These records of an epoch, counted through all ranks."""
    out = np.empty(len(rows_B), epoch.dtype)
    first = 0
    for path, count in zip(epoch.values, epoch.counts, strict=True):
        mine = (rows_B >= first) & (rows_B < first + count)
        if mine.any():  # mapped while it is read: hundreds of epochs are too many open files
            out[mine] = np.memmap(path, epoch.dtype, "r")[rows_B[mine] - first]
        first += count
    return out


def _epochs(folder: Path) -> tuple[int, tuple[Epoch, ...]]:
    """k, and the epochs in order, none missing between the first and the last."""
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    found = {p: m for p in folder.iterdir() if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()}
    if not found:
        raise UsageError(
            f"{folder} holds no folder such as logits_top100_epoch0: give the folder that TinyViT "
            "calls TEACHER_LOGITS_PATH"
        )
    kinds = sorted({int(m[1]) for m in found.values()})
    if len(kinds) > 1:
        raise UsageError(
            f"{folder} holds logits of several k ({', '.join(map(str, kinds))}): "
            "move all but one elsewhere"
        )
    numbers = sorted(int(m[2]) for m in found.values())
    gap = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if gap:
        raise UsageError(
            f"{folder} lacks epoch {gap[0]} between {numbers[0]} and {numbers[-1]}: save it, or "
            "move the epochs after it elsewhere"
        )
    top_k = kinds[0]
    paths = {int(m[2]): path for path, m in found.items()}
    return top_k, tuple(_epoch(paths[n], n, top_k) for n in numbers)


def _epoch(folder: Path, number: int, top_k: int) -> Epoch:
    ranks = sorted(int(m[1]) for p in folder.iterdir() if (m := _KEYS.fullmatch(p.name)))
    keys = tuple(folder / f"rank{r}-keys.txt" for r in ranks)
    values = tuple(folder / f"rank{r}-values.bin" for r in ranks)
    strays = set(folder.glob("rank*-values.bin")) - set(values)
    if strays or not keys:
        what = f"{min(strays).name} without its keys" if strays else "no rank0-keys.txt"
        raise UsageError(f"{folder} has {what}: copy the epoch again")
    dtype = record_dtype(top_k)
    return Epoch(number, keys, values, tuple(_count(v, dtype, top_k) for v in values), dtype)


def _count(path: Path, dtype: np.dtype[Any], top_k: int) -> int:
    if not path.is_file():
        raise UsageError(f"{path.parent} has keys but no {path.name}: copy the epoch again")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UsageError(
            f"{path} is truncated, or not of top {top_k}: {size} bytes are no whole number of "
            f"records of {dtype.itemsize}"
        )
    return size // dtype.itemsize


def _samples(path: Path, places: dict[str, int], data: Path) -> NDArray[np.int64]:
    # A damaged byte becomes a key that names no sample, and its line is reported.
    text = path.read_text(errors="replace")
    if text and not text.endswith("\n"):
        raise UsageError(f"{path} is truncated: its last line has no end; copy the epoch again")
    keys = text.split("\n")[:-1]
    found = [places.get(key.strip(), -1) for key in keys]
    if -1 in found:
        line = found.index(-1)
        raise UsageError(
            f"{path} line {line + 1}: {keys[line][:80]!r} names no sample of {data}: expected an "
            f"index from 0 to {len(places) - 1}, or, with --keys-file FILE, a line of that file"
        )
    return np.array(found, np.int64)


def _check(rows: Rows, num_classes: int, path: Path, start: int) -> None:
    """Raise UsageError for the first record that no teacher can have given."""
    values, classes = rows["values"].astype(np.float32), rows["classes"]
    ordered = np.sort(classes, 1)
    sums = values.sum(1)
    for bad, what in (
        (~np.isfinite(values).all(1), "a probability that is NaN or infinite"),
        ((values < 0).any(1), "a negative probability"),
        (
            (ordered[:, 0] < 0) | (ordered[:, -1] >= num_classes),
            f"a class that is not one of 0 to {num_classes - 1}",
        ),
        ((ordered[:, 1:] == ordered[:, :-1]).any(1), "a class twice"),
        (sums > LARGEST_SUM, "probabilities that sum to more than 1"),
        (sums == 0, "no probability above 0"),
    ):
        if bad.any():
            row = start + int(np.argmax(bad))
            raise UsageError(
                f"{path}: record {row} holds {what}: it is damaged, of other data, or not of top "
                f"{values.shape[1]}"
            )
