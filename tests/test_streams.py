"""Standard output and error: closed, full, without a reader; and what a terminal would obey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cli import app, streams
from kdcache.cli.output import printable
from kdcache.data.beton import Dataset
from tests.conftest import Result

Run = Callable[..., Result]
STUDENT = "python:tests.conftest:convolutional_student"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    line = line.replace("kdcache", f"{sys.executable} -m kdcache")
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )


def training(data: Dataset, out: str) -> str:
    options = f"--mode labels --student {STUDENT} --epochs 1 --batch-size 98 --workers 1"
    return f"kdcache train --data {data.path} --out {out} {options}"


@pytest.mark.parametrize(
    "streams", ["> /dev/full 2> /dev/full", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | true"]
)
def test_a_run_ends_whatever_becomes_of_its_output(
    digits_test: Dataset, tmp_path: Path, streams: str
) -> None:
    done = shell(training(digits_test, "r") + " " + streams, tmp_path)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "r" / "run.json").read_text())["student"] == STUDENT


@pytest.mark.parametrize(
    ("streams", "code", "err"),
    [
        ("> /dev/full", 1, "kdcache: the result could not be printed: No space left on device\n"),
        (">&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
        ("2> /dev/full >&2", 0, ""),
    ],
)
def test_a_result_that_cannot_be_printed(tmp_path: Path, streams: str, code: int, err: str) -> None:
    done = shell("kdcache recipes --no-measure " + streams, tmp_path)
    if "2> /dev/full" in streams:  # nowhere to say it
        assert done.returncode == 1
        return
    assert (done.returncode, done.stderr) == (code, err)


def test_a_closed_stream_is_not_the_next_files_place() -> None:
    """A library that prints would write into that file."""
    script = (
        "import os\nfrom kdcache.cli import streams\n"
        "with streams.tolerant_streams():\n    os._exit(os.open('/dev/zero', os.O_RDONLY))"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{script}" >&- 2>&-'])
    assert done.returncode > streams.STDERR


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines", "two\nlines"),
        ("café 猫", "café 猫"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_from_files_are_not_obeyed(kdcache: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a\x1b[2Jb"
    folder.mkdir(parents=True)
    (folder / "x\x1b[31m.jpg").write_bytes(b"\xff\xd8\xff no image")
    result = kdcache("convert", tmp_path / "images", tmp_path / "x.beton")
    assert result.code == 2
    assert "\x1b" not in result.out + result.err
    assert "a\\x1b[2Jb" in result.err


@pytest.mark.parametrize(
    "line",
    [
        ("inspect", "x" * 300),
        ("verify", "x" * 300),
        ("convert", "digits", "x" * 300 + ".beton"),
        ("train", "--mode", "labels", "--data", "x" * 300, "--out", "r"),
        ("convert", "x" * 300, "x.beton"),
    ],
)
def test_a_name_that_is_too_long_is_one_line(kdcache: Run, line: tuple[str, ...]) -> None:
    result = kdcache(*line)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "File name too long" in result.err


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (("train", "--mode", "labels", "--data", "{data}", "--out", ""), "'--out'"),
        (("precompute", "--data", "{data}", "--teacher", "x", "--out", ""), "--out is empty"),
        (("precompute", "--data", "{data}", "--teacher", "", "--out", "x"), "--teacher is empty"),
        (("convert", "", "x.beton"), "SOURCE is empty"),
        (("convert", "digits", ""), "OUT.beton"),
        (("eval", "", "--data", "{data}"), "is empty"),
    ],
)
def test_an_empty_name_is_refused(
    kdcache: Run, digits_test: Dataset, line: tuple[str, ...], name: str
) -> None:
    result = kdcache(*(word.format(data=digits_test.path) for word in line))
    assert result.code == 2
    assert name in result.err
    assert "empty" in result.err


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory (no more of it): give a smaller --batch-size or --size"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory (CUDA out of memory.): "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 7"), "out of memory (Default"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    kdcache: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    result = kdcache("recipes")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(f"kdcache: {line}")


def test_an_error_of_ours_keeps_its_traceback(
    kdcache: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(ZeroDivisionError):
        kdcache("recipes")
