"""A rate limit for log lines, so that other users and the link peer cannot fill the disk.

The first line of a cause is written immediately, and further lines of this cause at most once per period. If one board
has many causes, at most LINES_MAX of its lines are written per period; other lines wait. While a line of a board waits,
later lines with a cause wait too: otherwise, the log could end with `cannot write` although the file works again.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

__all__ = ["PERIOD", "Throttle"]

PERIOD = 1.0
"""Minimum number of seconds between two log lines with the same cause."""
LINES_MAX = 20
"""Maximum number of log lines per board and period."""
CAUSES_MAX = 1000
"""Maximum number of causes with waiting lines, per board. Lines of further causes are only counted."""


class _Cause:
    """The time when a cause was last logged, the latest record, and the number of records since then."""

    def __init__(self, logged: float) -> None:
        self.logged = logged
        self.held: tuple[logging.LogRecord, contextvars.Context] | None = None
        self.number = 0


class Throttle:
    """A rate limiter that decides which records to write now and which to hold. `now` is the clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._boards: dict[str, dict[object, _Cause]] = {}

    @property
    def is_holding(self) -> bool:
        """Whether any record is waiting to be written."""
        return any(each.held for causes in self._boards.values() for each in causes.values())

    def admit(self, board: str, cause: object, record: logging.LogRecord) -> bool:
        """Return whether to write the record now. If not, hold it until `release`."""
        now = self._now()
        before = self._boards.get(board, {})
        causes = {key: each for key, each in before.items() if each.held or now - each.logged < PERIOD}
        self._boards[board] = causes
        found = causes.pop(cause, None)
        if found is None:
            # Causes without a held record were logged less than a period ago.
            if len(causes) < LINES_MAX and not any(each.held for each in causes.values()):
                causes[cause] = _Cause(now)
                return True
            if len(causes) >= CAUSES_MAX:
                causes[next(reversed(causes))].number += 1
                return False
            found = _Cause(now - PERIOD)
        found.held, found.number = (record, contextvars.copy_context()), found.number + 1
        causes[cause] = found  # Move to the end: `release` writes the latest record last.
        return False

    def release(self, write: Callable[[logging.LogRecord], None], *, everything: bool = False) -> None:
        """Write held records, each in its context. Set `record.left_out` to the number of omitted records.

        Write the records that have been held longest, at most LINES_MAX per board. With `everything`, write all
        records.
        """
        now = self._now()
        for causes in self._boards.values():
            held = [(each, *each.held) for each in causes.values() if each.held]
            for found, record, context in held if everything else held[:LINES_MAX]:
                record.left_out = found.number - 1
                found.logged, found.held, found.number = now, None, 0
                context.run(write, record)
        self._boards = {board: causes for board, causes in self._boards.items() if causes}
