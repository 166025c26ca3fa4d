"""Signals that end a command in an orderly way: they are noted, and the command looks at them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class StopSignal:
    """Call it for the number of the signal that came; 0: none."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> int:
        return self.number

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.number:
            raise KeyboardInterrupt


@contextmanager
def stop_signal(
    numbers: Sequence[signal.Signals] = (signal.SIGINT,), patience_s: float | None = None
) -> Iterator[StopSignal]:
    """Within, these signals only set the value. A second Ctrl-C raises KeyboardInterrupt at once.

    patience_s   raise KeyboardInterrupt when the value was not looked at for so long

    An exception that is raised in a signal handler may come within a destructor or a callback,
    where Python prints it and continues: hence the value.
    """
    stop = StopSignal()

    def handle(number: int, frame: object) -> None:
        stop.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if patience_s is not None:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, patience_s)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        if stop.number and patience_s is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
