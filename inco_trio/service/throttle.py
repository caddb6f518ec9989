"""A rate limit for log lines with the same cause: the first line immediately, then at most one line per period."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

import attrs

__all__ = ["PERIOD", "Throttle"]

PERIOD = 1.0
"""Minimum number of seconds between two log lines with the same cause."""


@attrs.define
class _Cause:
    """When a cause was last logged, and the latest record and the number of records since then."""

    logged: float
    held: tuple[logging.LogRecord, contextvars.Context] | None = None
    number: int = 0


class Throttle:
    """A rate limiter that decides which records to write now and which to hold. `now` is the clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._causes: dict[object, _Cause] = {}

    def admit(self, cause: object, record: logging.LogRecord) -> bool:
        """Return whether to write the record now. If not, hold it until `release`."""
        now = self._now()
        self._causes = {key: each for key, each in self._causes.items() if each.held or now - each.logged < PERIOD}
        found = self._causes.pop(cause, None)
        if found is None:
            self._causes[cause] = _Cause(now)
            return True
        found.held, found.number = (record, contextvars.copy_context()), found.number + 1
        self._causes[cause] = found  # Move to the end: `release` writes the latest record last.
        return False

    def release(self, write: Callable[[logging.LogRecord], None]) -> None:
        """Write the held records, each in its context. Set `record.left_out` to the number of omitted records."""
        now = self._now()
        for found in self._causes.values():
            if found.held:
                (record, context), number = found.held, found.number
                found.logged, found.held, found.number = now, None, 0
                record.left_out = number - 1
                context.run(write, record)
