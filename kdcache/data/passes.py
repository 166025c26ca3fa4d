"""FFCV's passes over a file, fed without FFCV's loader and with its hangs fixed.

In: a `Dataset`, a batch size, a decoder for each field; then tokens. Out: batch after batch of the
decoders' rows, in memory that is used again. What stays true: an error in FFCV's thread is raised
where its batches are read, at once; a pass that is left early ends its thread.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import Any

import numba
import numpy as np

from kdcache.data.beton import Dataset
from kdcache.data.ffcv import Compiler, EpochIterator, Graph, Operation, PipelineSpec, Reader
from kdcache.errors import KDCacheError

BATCHES_AHEAD = 2
# Numba has one object for this type while it is held. A loader of FFCV's own in this process sets
# it to constant (see _Memory); ours set it back.
_BYTES = numba.uint8[::1]


class _Memory:
    """The mapped file and where its payloads lie, as FFCV's passes ask for them.

    FFCV's own manager builds tables of Python objects that nobody reads (600 MB for ImageNet), and
    declares numba's type of byte arrays constant for the whole process, after which numba no
    longer finds the functions that it compiled for that type.
    """

    def __init__(self, reader: Reader) -> None:
        table = np.sort(reader.alloc_table, order="ptr")
        # The fields of a table are strided, and numba would compile the kernel again for such
        # arrays.
        pointers, sizes = np.ascontiguousarray(table["ptr"]), np.ascontiguousarray(table["size"])
        self.state = np.memmap(reader.file_name, np.uint8, "r"), pointers, sizes

    def schedule_epoch(self, batches: object) -> _Memory:
        return self

    def start_batch(self, number: int) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Engine:
    """What FFCV's passes need of a loader, without the loader.

    FFCV's own would compile each decoder for each loader, for a second, and set torch's number of
    threads. Ours call a compiled kernel themselves, so they stay plain Python.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, workers: int, decoders: dict[str, Operation]
    ) -> None:
        _BYTES.mutable = True
        self.reader = Reader(str(dataset.path))
        self.memory_manager = _Memory(self.reader)
        self.batch_size = batch_size
        self.batches_ahead = BATCHES_AHEAD
        self.num_workers = workers
        handlers = self.reader.handlers
        numbers = {name: number for number, name in enumerate(handlers)}
        specs = {name: PipelineSpec(name, decoders[name], []) for name in handlers}
        self.graph = Graph(specs, handlers, numbers, self.reader.metadata, None)
        Compiler.set_enabled(False)
        try:
            _, code = self.graph.collect_requirements()
            self.code = self.graph.codegen_all(code)
        finally:
            # FFCV's switch is for the whole process, in which its own loaders have to go on
            # compiling.
            Compiler.set_enabled(True)


class Pass(EpochIterator):
    """One run over some tokens, in FFCV's own thread.

    FFCV's iterator hangs when its pipeline raises or when it is read past its end, and leaks its
    thread when it is left early; this one raises, stops, and can be closed.
    """

    closed: bool
    ended = False

    def run(self) -> None:
        try:
            # Numba keeps this number by thread, so it has to be set in the one that renders.
            numba.set_num_threads(self.loader.num_workers)
            for number, tokens in enumerate(self.iter_ixes):
                # Besides the batches in the queue, one is being written and one is with the reader.
                slot = number % (self.loader.batches_ahead + 2)
                # No CUDA event: the loader copies a batch out of its slot before it takes the next
                # one.
                self._put(self.run_pipeline(number, tokens, slot, None))
                if self.terminate_event.is_set():
                    return
            self._put(None)
        except BaseException as error:  # it must reach the thread that waits, whatever it is
            self._put(error)

    def _put(self, item: object) -> None:
        while not self.terminate_event.is_set():
            try:
                # With a timeout, so that `close` ends a thread whose batches are no longer read.
                self.output_queue.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def __next__(self) -> tuple[Any, Any]:
        item = None if self.ended else self._take()
        if isinstance(item, tuple):
            rows, labels = item
            return rows, labels
        self.ended = True
        self.close()
        if item is None:
            raise StopIteration
        if isinstance(item, KDCacheError):
            raise item
        raise KDCacheError(f"FFCV's pipeline failed: {item!r}") from item

    def _take(self) -> tuple[Any, Any] | BaseException | None:
        """The next batch, None at the end, or the error that ended the thread."""
        while not self.terminate_event.is_set():
            running = self.is_alive()
            try:
                item: tuple[Any, Any] | BaseException | None = self.output_queue.get(timeout=0.5)
                return item
            except queue.Empty:
                # The last item may have come between the wait and the end of the thread.
                if not running:
                    return RuntimeError("its thread exited unexpectedly")
        return KDCacheError("the loader was closed while a pass was under way")

    def close(self) -> None:
        """End the thread; a reader that still waits gets an error, not a short pass."""
        self.terminate_event.set()
        # While the interpreter ends, a thread stands still for good: it cannot be waited for.
        alone = threading.current_thread() is self or sys.is_finalizing()
        if self.is_alive() and not alone:
            self.join()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)
