"""The schedule of retries in directories where an operation failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from inco_trio import real_clock
from inco_trio.registers.directory import Directory

__all__ = ["FALLBACK", "Retries"]

FALLBACK = 1.0
"""Maximum number of seconds between checks for a missing directory. Events do not always report that it reappeared."""


class Retries:
    """The directories in which operations must be retried. `announce` is called when a directory is added."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self.announce = announce
        self._troubled: set[Directory] = set()

    def add(self, directory: Directory) -> None:
        directory.retry_at = real_clock.monotonic()
        directory.troubled_again = True
        directory.backoff.reset()
        self._troubled.add(directory)
        self.announce()

    def discard(self, directory: Directory) -> None:
        self._troubled.discard(directory)

    def due(self) -> Iterator[Directory]:
        """Yield each directory in which a retry is due. The caller retries the operations and calls `retried`."""
        now = real_clock.monotonic()
        for directory in tuple(self._troubled):
            if directory.retry_at <= now and directory in self._troubled:
                directory.troubled_again = False
                yield directory

    def next(self) -> float:
        """Return the time of the next retry (real_clock.monotonic()), or infinity."""
        return min((directory.retry_at for directory in self._troubled), default=math.inf)

    def retried(self, directory: Directory, earliest: float | None, spent: float) -> None:
        """Schedule the next retry. The last retry took `spent` seconds; `earliest` is None if all work is done."""
        if directory.troubled_again:
            directory.retry_at = real_clock.monotonic() + directory.backoff.next()
        elif earliest is None:
            self._troubled.discard(directory)
            directory.retry_at = math.inf
        else:
            # Pause nine times as long as the retry took, so that retries use at most a tenth of the CPU time.
            pause = max(directory.backoff.next(), min(9 * spent, FALLBACK))
            directory.retry_at = max(earliest, real_clock.monotonic() + pause)
