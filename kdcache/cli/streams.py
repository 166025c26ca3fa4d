"""Standard output and error that no reader who goes away, and no full disk, can end a command by.

What is written after a failure is lost; a command whose result is lost so ends with 1.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

STDERR = 2


class TolerantStream:
    """A text stream that raises nothing when it is written to.

    error   the first failure, after which nothing is written
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.error = self.error or error
        # What is in the buffer would fail again, when Python ends at the latest.
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Within, sys.stdout and sys.stderr are tolerant.

    At the end SystemExit(1) where a result could not be written, unless its reader has gone away.
    """
    _open_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file's name may hold bytes that are no text.
            stream.reconfigure(errors="backslashreplace")
    before = sys.stdout, sys.stderr
    if sys.stderr is not None:
        sys.stderr = TolerantStream(sys.stderr)
    out = None
    if sys.stdout is not None:
        sys.stdout = out = TolerantStream(sys.stdout)
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise
    finally:
        if out is not None:
            out.flush()
        sys.stdout, sys.stderr = before
    if out is not None and out.error and out.error.errno != errno.EPIPE:
        print(f"kdcache: the result could not be printed: {out.error.strerror}", file=sys.stderr)
        sys.exit(1)


def _open_standard_files() -> None:
    """Where one is closed, the next file that is opened would take its place, and what a library
    prints would go into that file."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)
