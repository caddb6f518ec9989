"""The current problems, which are logged only when they change, and the board name that log lines contain."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator

__all__ = ["Note", "Problems", "board_name", "noted_by", "noting", "report", "times", "working_for"]

logger = logging.getLogger(__name__)

board_name: contextvars.ContextVar[str] = contextvars.ContextVar("inco_trio.board", default="")
"""The name of the board that the current task serves, or "" if the process has only one. Log lines contain it."""

Note = Callable[[str, str, int], tuple[int, int]]
"""A function that records an event of a proxy. It takes an event kind, a message and a log level.

It returns the wall-clock time and the monotonic time of the event, in nanoseconds.
"""
noting: contextvars.ContextVar[Note | None] = contextvars.ContextVar("inco_trio.noting", default=None)
"""The function that records events of the current task's proxy."""


def times(count: int) -> str:
    """Return `1 time`, `2 times` and so on."""
    return f"{count} time{'' if count == 1 else 's'}"


def report(
    line: logging.Logger, level: int, text: str, kind: str = "message", count: int = 0, cause: object = None
) -> None:
    """Log a line, and record it in the history of the proxy that the current task serves.

    Lines with the same `cause` (default: the text) are rate-limited. Set `cause` if the text contains a varying value.
    """
    # Record first: otherwise, a monitor could report an event before the history contains it.
    at = None if (note := noting.get()) is None else note(kind, text, level)
    fields = {"fields": {"count": count}} if count else {}
    line.log(level, "%s", text, extra={"event": kind, "cause": cause, "at": at} | fields)


@contextlib.contextmanager
def noted_by(note: Note) -> Iterator[None]:
    """Make `report` record events by calling `note` while the block runs."""
    token = noting.set(note)
    try:
        yield
    finally:
        noting.reset(token)


@contextlib.contextmanager
def working_for(board: str) -> Iterator[None]:
    """Add the board name `board` to log lines while the block runs."""
    token = board_name.set(board)
    try:
        yield
    finally:
        board_name.reset(token)


class Problems:
    """The current problems, each with a key. A problem is logged when it appears, changes or ends."""

    def __init__(self) -> None:
        self._current: dict[object, str] = {}

    def failed(
        self, key: object, problem: str, what: object = None, event: str = "problem", cause: object = None
    ) -> None:
        """Set the current problem of `key`. If it has changed, log it with the prefix `what` (default: the key).

        The default of `cause` is the key; see `report`.
        """
        if self._current.get(key) != problem:
            self._current[key] = problem
            text = f"{key if what is None else what}: {problem}"
            report(logger, logging.WARNING, text, event, cause=cause or (event, key))

    def well(self, key: object, what: object = None) -> bool:
        """Clear the problem that is recorded for `key`, and log the recovery. Return whether `key` had a problem."""
        if self._current.pop(key, None) is None:
            return False
        report(logger, logging.INFO, f"{key if what is None else what}: works again", "works", cause=("works", key))
        return True

    def said(self, key: object) -> str | None:
        """Return the current problem of `key`, or None."""
        return self._current.get(key)

    def forget(self, key: object) -> None:
        """Clear the problem that is recorded for `key`, without logging."""
        self._current.pop(key, None)
