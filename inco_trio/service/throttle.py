"""The limit for repeated log lines: one line at once, then at most one summary per period for the same cause."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

import attrs

__all__ = ["PERIOD", "Throttle"]

PERIOD = 1.0
"""Seconds in which the same cause is logged once."""


@attrs.define
class _Cause:
    """When a cause was logged, the latest record since then, and the number of records since then."""

    logged: float
    held: tuple[logging.LogRecord, contextvars.Context] | None = None
    number: int = 0


class Throttle:
    """Decides which records are written now. It reads the clock `now`, and does no I/O."""

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
        self._causes[cause] = found  # The last position: summaries are written in the order of the latest records.
        return False

    def release(self, write: Callable[[logging.LogRecord], None]) -> None:
        """Write the held records, each in its context; `record.left_out` is the number of records that it replaces."""
        now = self._now()
        for found in self._causes.values():
            if found.held:
                (record, context), number = found.held, found.number
                found.logged, found.held, found.number = now, None, 0
                record.left_out = number - 1
                context.run(write, record)
