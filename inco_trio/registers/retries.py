"""The directories in which something failed, and when to retry."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from inco_trio.registers.directory import Directory

__all__ = ["FALLBACK", "Retries"]

FALLBACK = 1.0
"""The longest pause before a directory is looked for again, in seconds: perhaps no event reports that it reappears."""


class Retries:
    """The directories to retry in. `announce` is called when there is a new one."""

    def __init__(self, announce: Callable[[], None]) -> None:
        self.announce = announce
        self._troubled: set[Directory] = set()

    def add(self, directory: Directory) -> None:
        """Retry in a directory soon."""
        directory.retry_at = time.monotonic()
        directory.troubled_again = True
        directory.backoff.reset()
        self._troubled.add(directory)
        self.announce()

    def discard(self, directory: Directory) -> None:
        """Do not retry in a directory any more."""
        self._troubled.discard(directory)

    def due(self) -> Iterator[Directory]:
        """Yield the directories to retry in now. Call `retried` after each."""
        now = time.monotonic()
        for directory in tuple(self._troubled):
            if directory.retry_at <= now and directory in self._troubled:
                directory.troubled_again = False
                yield directory

    def next(self) -> float:
        """Return the time of the next retry (time.monotonic()); infinity for never."""
        return min((directory.retry_at for directory in self._troubled), default=math.inf)

    def retried(self, directory: Directory, earliest: float | None, spent: float) -> None:
        """Schedule the next retry, after one that took `spent` seconds. `earliest` is None if nothing is left to do."""
        if directory.troubled_again:
            # Something failed that had been retried already.
            directory.retry_at = time.monotonic() + directory.backoff.next()
        elif earliest is None:
            self._troubled.discard(directory)
            directory.retry_at = math.inf
        else:
            # A retry that never succeeds takes at most a tenth of the time.
            pause = max(directory.backoff.next(), min(9 * spent, FALLBACK))
            directory.retry_at = max(earliest, time.monotonic() + pause)
