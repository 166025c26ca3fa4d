"""Waits with an end: a line when one gets long, an error when it gets too long.

The line goes to the logger "kdcache", which the command line prints.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.errors import TimedOut

SAID_AFTER_S = 30.0
PAUSE_S = 0.05, 1.0  # the first and the longest
DEFAULT_TIMEOUT_S = 1800.0

_log = logging.getLogger("kdcache")


class Wait:
    """Waiting for something that others do.

    what      is waited for
    limit_s   seconds; without progress for so long, `pause` raises TimedOut
    remedy    what to do then
    """

    def __init__(self, what: str, limit_s: float, remedy: str) -> None:
        self.what, self.limit_s, self.remedy = what, limit_s, remedy
        self.progressed()

    def progressed(self) -> None:
        """Begin anew: what is waited for has come nearer."""
        self._begun, self._said, self._pause = time.monotonic(), False, PAUSE_S[0]

    def pause(self, state: str = "") -> None:
        """Sleep a little. Raises TimedOut after the limit.

        state   what is known of it, for the line and the error
        """
        waited_s = time.monotonic() - self._begun
        what = f"{self.what} ({state})" if state else self.what
        if waited_s > self.limit_s:
            raise TimedOut(f"waited {waited_s:,.0f} s for {what}: {self.remedy}")
        if waited_s > SAID_AFTER_S and not self._said:
            self._said = True
            _log.warning("still waiting for %s, for %.0f s at most", what, self.limit_s)
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, PAUSE_S[1])


@contextmanager
def told(what: str, limit_s: float) -> Iterator[None]:
    """Within a call that waits by itself, `limit_s` at most: the line when it gets long."""
    line = "still waiting for %s, for %.0f s at most"
    timer = threading.Timer(SAID_AFTER_S, _log.warning, (line, what, limit_s))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
