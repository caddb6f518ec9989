"""The log, on a standard stream: text for people, or one JSON object a line.

Text has no time stamps: the supervisor's logger writes them. Carrying never waits for who reads the log, and goes on
where it is on a full disk or closed: then lines are lost, which is said in the next one that is not.

What goes wrong for the same cause, as a link that goes up and down, is said once a second: the first time at once, and
after that second the last time, with the number that was left out between.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import threading
import time

import attrs

from inco_trio.problems import board_name
from inco_trio.service.lines import STANDARD_ERROR, printable, write_at_once

__all__ = ["log_statistics", "set_up_logging"]

logger = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds for which the same cause is said once."""
PATIENCE_MS = 10
"""How long a line may wait for a reader that is merely slow. Nobody waits for one that has left this pass."""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
        }
        if board := board_name.get():
            entry["board"] = board
        entry |= getattr(record, "fields", {})
        if left_out := getattr(record, "left_out", 0):
            entry["left_out"] = left_out
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        board = board_name.get()
        text = f"inco-trio: {record.levelname.lower()}: {board}{': ' if board else ''}{printable(record.message)}"
        left_out = getattr(record, "left_out", 0)
        return f"{text} ({left_out} lines like this were left out)" if left_out else text


@attrs.define
class _Later:
    """The last line of a cause that is to be said, and how many it stands for."""

    record: logging.LogRecord
    context: contextvars.Context
    number: int


class _Lines(logging.Handler):
    """Writes each record to the descriptor `fd` at once, or loses it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._torn = False
        self._complained = fd == STANDARD_ERROR
        self._said: dict[object, float] = {}
        self._later: dict[object, _Later] = {}
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless its cause was said just now: then later."""
        if record.levelno < logging.WARNING and getattr(record, "event", "") != "works":
            self._write(record)
            return
        args = record.args if isinstance(record.args, tuple) else ()
        cause = (board_name.get(), record.msg, *(arg for arg in args if not isinstance(arg, int)))
        now = time.monotonic()
        self._said = {each: when for each, when in self._said.items() if now - when < PERIOD}
        if cause not in self._said:
            self._said[cause] = now
            self._write(record)
            return
        before = self._later.pop(cause, None)
        number = 1 if before is None else before.number + 1
        self._later[cause] = _Later(record, contextvars.copy_context(), number)
        if self._timer is None:
            self._timer = threading.Timer(PERIOD, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Say what is to be said later, in the order of its last time; also called at the end of the process."""
        with self.lock or contextlib.nullcontext():
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            later, self._later = self._later, {}
            for cause, each in later.items():
                self._said[cause] = time.monotonic()
                each.record.left_out = each.number - 1
                each.context.run(self._write, each.record)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            lines = self._line(record)
        except Exception:  # noqa: BLE001 - a mistake in the call, which logging shows with its place
            self.handleError(record)
            return
        if self._lost:
            note = f"{self._lost} lines of the log were lost here"
            lines = self._line(logging.LogRecord(logger.name, logging.WARNING, __file__, 0, note, None, None)) + lines
        if self._torn:
            lines = b"\n" + lines
        written, reason = write_at_once(self._fd, lines, 0 if self._lost else PATIENCE_MS)
        if written:
            self._torn = reason is not None
        if reason is None:
            self._lost = 0
        else:
            self._lost += 1
            if not self._complained:
                self._complained = True
                write_at_once(STANDARD_ERROR, f"inco-trio: warning: the log loses lines: {reason}\n".encode())

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")


def set_up_logging(log_format: str, *, verbose: bool, fd: int = STANDARD_ERROR) -> None:
    """Send the package's log to the descriptor `fd` as `text` or `json`; `verbose` shows each notification."""
    handler = _Lines(fd)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    package = logging.getLogger("inco_trio")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)


def log_statistics(counters: dict[str, int]) -> None:
    """Log the counters, by name."""
    text = " ".join(f"{name}={count}" for name, count in counters.items())
    logger.info("statistics: %s", text, extra={"event": "statistics", "fields": counters})
