"""Damaged and absurd files: each format changed at random, and sealed again as its writer would.

A command then succeeds or says one line. It never ends in a traceback, hangs or aborts, which for
training on compiled code's tables would be worse. In CI some hundred changes; with `make test-slow`
some ten thousand.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.cache.cache import LogitCache
from kdcache.cache.manifest import GROUP, KEY, NO_DIGEST
from kdcache.cli import app
from kdcache.data.beton import (
    METADATA,
    SIDECAR_VERSION,
    Dataset,
    content_hash_of,
    field_descriptors,
    sidecar_path,
)
from kdcache.data.ffcv import ALLOC_TABLE_TYPE, HeaderType
from kdcache.errors import KDCacheError
from kdcache.models.run_json import sealed
from kdcache.training import checkpoint
from tests.conftest import subset, synthetic_cache

STUDENT = "kdcache:small"
LIMIT_S = 60
NUMBERS = [0, 1, -1, -4, 3, 255, 1 << 24, 1 << 31, 1 << 50, 1 << 63, 1 << 64, 1 << 300]
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, None, True, False, "", "x", "a" * 300, "\x1b[2J", [], {}, [[]]]),
    st.sampled_from([float("nan"), float("inf"), -0.0, 0.5, 1e308]),
    st.integers(),
    st.text(max_size=8),
    st.recursive(st.none(), lambda x: st.lists(x, max_size=3), max_leaves=4),
)
DELETED = object()
HEADER_BYTES = HeaderType.itemsize + field_descriptors().nbytes


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A hang fails the test."""

    def end(*_: object) -> None:
        raise AssertionError(f"it has not ended in {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def says_one_line(*line: object) -> None:
    """The command succeeds, or ends with one line; any other exception is the test's."""
    err, argv = io.StringIO(), sys.argv
    sys.argv = ["kdcache", *map(str, line)]
    code: Any = 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_limited())
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            app.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    lines = [x for x in err.getvalue().splitlines() if "resumes after" not in x]
    assert code in (0, 1, 2, None), lines
    if code == 2:
        assert lines, line
        assert lines[-1].startswith("kdcache: "), lines
    assert "\x1b" not in err.getvalue()


# --- changes -------------------------------------------------------------------------------------


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if here:
        yield here
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, x in pairs:
        yield (*here, key)
        if isinstance(x, dict | list) and x:
            yield from list(places(x, (*here, key)))[1:]


def changed(document: Any, draw: st.DataObject) -> Any:
    """A copy with one to three values replaced or removed."""
    document = copy.deepcopy(document)
    for _ in range(draw.draw(st.integers(1, 3))):
        found = list(places(document))
        if not found:
            break
        *path, last = draw.draw(st.sampled_from(found))
        holder = document
        for key in path:
            holder = holder[key]
        value = draw.draw(st.one_of(VALUES, st.just(DELETED)))
        if value is DELETED:
            del holder[last]
        else:
            holder[last] = value
    return document


def changed_bytes(data: bytes, draw: st.DataObject) -> bytes:
    """With some bytes changed, or its end cut off or repeated."""
    found = bytearray(data)
    how = draw.draw(st.sampled_from(["change", "cut", "more"]))
    if how == "cut":
        return bytes(found[: draw.draw(st.integers(0, len(found)))])
    if how == "more":
        return bytes(found + found[: draw.draw(st.integers(0, 64))])
    for _ in range(draw.draw(st.integers(1, 4))):
        found[draw.draw(st.integers(0, len(found) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(found)


# --- the corpus ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data, a cache of it, a begun run and a finished one."""
    folder = tmp_path_factory.mktemp("corpus")
    data = subset(digits_test, 40, folder / "d.beton")
    synthetic_cache(folder / "c", torch.randn(2, 20, 10), top_k=4)
    line = ["train", "--mode", "labels", "--data", data.path, "--student", STUDENT, "--epochs", 2]
    line += ["--batch-size", 16, "--workers", 1, "--checkpoint-every", 2]
    says_one_line(*line, "--out", folder / "finished")
    with pytest.MonkeyPatch.context() as patch:
        finish = "kdcache.training.run_folder.RunFolder.finish"
        patch.setattr(finish, lambda self, record, _: record)
        says_one_line(*line, "--out", folder / "begun")
    assert (folder / "finished" / "run.json").exists()
    assert (folder / "begun" / "checkpoints").exists()
    return folder


Change = Callable[[Path, st.DataObject], list[tuple[object, ...]]]


def sidecar(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    path = sidecar_path(folder / "d.beton")
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))
    return [evaluating(folder)]


def evaluating(folder: Path) -> tuple[object, ...]:
    return "eval", folder / "finished", "--data", folder / "d.beton", "--workers", 1


def tables(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    """Of the .beton file, with a sidecar that agrees."""
    path = folder / "d.beton"
    beton, about = bytearray(path.read_bytes()), json.loads(sidecar_path(path).read_text())
    samples = about["samples"]
    start = len(beton) - samples * ALLOC_TABLE_TYPE.itemsize
    table = np.frombuffer(beton, ALLOC_TABLE_TYPE, samples, start)
    metadata = np.frombuffer(beton, METADATA, samples, HEADER_BYTES)
    checksums = np.frombuffer(base64.b64decode(about["checksums"]), np.uint32).copy()
    columns = [metadata["f0"][name] for name in ("mode", "width", "height", "data_ptr")]
    columns += [metadata["f1"], *(table[name] for name in table.dtype.names or ()), checksums]
    for _ in range(draw.draw(st.integers(1, 3))):
        column = draw.draw(st.sampled_from(columns))
        limits = np.iinfo(column.dtype)
        value = draw.draw(st.one_of(st.sampled_from(NUMBERS), st.integers()))
        column[draw.draw(st.integers(0, samples - 1))] = min(max(value, limits.min), limits.max)
    about["checksums"] = base64.b64encode(checksums.tobytes()).decode()
    about["fingerprint"] = content_hash_of(
        SIDECAR_VERSION, tuple(about["classes"]), metadata, table, checksums
    )
    path.write_bytes(beton)
    sidecar_path(path).write_text(json.dumps(about))
    return [evaluating(folder)]


def header(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    path = folder / "d.beton"
    beton = path.read_bytes()
    path.write_bytes(changed_bytes(beton[:HEADER_BYTES], draw) + beton[HEADER_BYTES:])
    return [evaluating(folder)]


def write_manifest(path: Path, found: Any) -> None:
    with contextlib.suppress(KeyError, TypeError):
        found["attributes"][KEY]["digest"] = NO_DIGEST
    text = json.dumps(found)
    path.write_text(text.replace(NO_DIGEST, hashlib.sha256(text.encode()).hexdigest()))


def manifest(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    path = folder / "c" / GROUP
    write_manifest(path, changed(json.loads(path.read_text()), draw))
    return [("inspect", folder / "c"), ("verify", folder / "c")]


def array(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    """An array's zarr.json, with a manifest that agrees."""
    name = draw.draw(st.sampled_from(["logits", "classes", "tail", "seals"]))
    path, group = folder / "c" / name / GROUP, folder / "c" / GROUP
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))
    found = json.loads(group.read_text())
    found["attributes"][KEY]["arrays"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(group, found)
    return [("inspect", folder / "c"), ("verify", folder / "c")]


def run_json(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    path = folder / "finished" / "run.json"
    path.write_text(json.dumps(sealed(changed(json.loads(path.read_text()), draw))))
    return [evaluating(folder)]


def spec_json(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    path = folder / "begun" / "spec.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))
    return [resuming(folder)]


def resuming(folder: Path) -> tuple[object, ...]:
    line = ("train", "--mode", "labels", "--data", folder / "d.beton", "--student", STUDENT)
    line = (*line, "--epochs", 2, "--batch-size", 16, "--workers", 1, "--checkpoint-every", 2)
    return *line, "--out", folder / "begun", "--resume"


def checkpoint_header(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    """Its values, with a digest that agrees."""
    path = max((folder / "begun" / "checkpoints").iterdir())
    with safetensors.safe_open(path, "pt") as file:
        about, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    about["state"] = json.dumps(changed(json.loads(about["state"]), draw))
    about["sha256"] = checkpoint._digest(about["state"], tensors)
    safetensors.torch.save_file(tensors, path, about)
    return [resuming(folder)]


def any_bytes(folder: Path, draw: st.DataObject) -> list[tuple[object, ...]]:
    """Of any of the files, as they come."""
    names = ("d.beton.json", "c/zarr.json", "finished/run.json", "begun/spec.json")
    path = folder / draw.draw(st.sampled_from([*names, "finished/student.safetensors"]))
    path.write_bytes(changed_bytes(path.read_bytes(), draw))
    return [evaluating(folder), ("inspect", folder / "c"), resuming(folder)]


CHANGES = [
    sidecar,
    tables,
    header,
    manifest,
    array,
    run_json,
    spec_json,
    checkpoint_header,
    any_bytes,
]


def fuzz(corpus: Path, work: Path, change: Change, count: int) -> None:
    tried = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        nonlocal tried
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(corpus, work)
        for line in change(work, draw):
            says_one_line(*line)
        tried += 1

    run()
    print(f"{change.__name__}: {tried} of {tried} held")


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("spec", "num_views", 1 << 24, "16,777,216 shards, and at most 1,048,576 can be"),
        ("spec", "num_samples", 1 << 50, "samples must be 1 to 1099511627776"),
        ("spec", "num_samples", 21, "the array logits has the shape"),
        ("spec", "num_classes", "x", "classes must be 2 to"),
        ("layout", "shard_rows", 0, "a chunk or a shard has 0 rows"),
        ("layout", "shard_rows", -4, "a chunk or a shard has -4 rows"),
        ("layout", "chunk_rows", "x", "a chunk or a shard has 'x' rows"),
    ],
)
def test_absurd_numbers_are_one_line(
    corpus: Path, tmp_path: Path, part: str, name: str, value: object, words: str
) -> None:
    shutil.copytree(corpus / "c", tmp_path / "c")
    path = tmp_path / "c" / GROUP
    found = json.loads(path.read_text())
    found["attributes"][KEY][part][name] = value
    write_manifest(path, found)
    with pytest.raises(KDCacheError, match=re.escape(words)):
        LogitCache.open(tmp_path / "c")


@pytest.mark.parametrize(
    "name", ["c/zarr.json", "d.beton.json", "finished/run.json", "begun/spec.json"]
)
def test_deep_json_is_one_line(corpus: Path, tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    shutil.copytree(corpus, work)
    (work / name).write_text("[" * 200_000)
    for line in (evaluating(work), ("inspect", work / "c"), resuming(work)):
        says_one_line(*line)


@pytest.mark.parametrize("change", CHANGES, ids=lambda x: x.__name__)
def test_a_damaged_file_is_one_line(corpus: Path, tmp_path: Path, change: Change) -> None:
    fuzz(corpus, tmp_path / "work", change, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("change", CHANGES, ids=lambda x: x.__name__)
def test_many_damaged_files_are_one_line(corpus: Path, tmp_path: Path, change: Change) -> None:
    fuzz(corpus, tmp_path / "work", change, 1000)
