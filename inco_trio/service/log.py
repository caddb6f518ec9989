"""Write the log to a standard stream, as text or as one JSON object per line.

Text has timestamps unless the supervisor's logger adds them. In systemd's journal, each line has its priority
(sd-daemon(3)). The proxy does not wait for a slow reader of its log. If the stream is full or closed, lines are lost,
and the next line that can be written reports their number.

Warnings and errors with the same cause, such as a link that goes up and down, are logged at most once per second: the
first one immediately, then the latest one with the number of omitted lines (see `service.throttle`). The
attribute `cause` of a record names its cause, if other users or the link peer can vary its text.

A Trio task writes the omitted lines. A thread would keep privileges that the process drops later.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable

import trio

from inco_trio import real_clock
from inco_trio.problems import board_name
from inco_trio.service import throttle
from inco_trio.service.lines import STANDARD_ERROR, TEXT_MAX, printable, shortened, write_at_once

__all__ = ["log_statistics", "needs_timestamps", "set_up_logging"]

logger = logging.getLogger(__name__)

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))
"""Pairs of a minimum level of the logging module and its syslog(3) priority, highest level first."""
PATIENCE_MS = 10
"""Maximum time in milliseconds to wait for a slow reader. After a lost line, the limit is 0 until a write succeeds."""
JSON_GROWTH = 6
"""Maximum number of bytes in JSON for one byte of text: a control character becomes \\u0001."""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage()
        if len(json.dumps(message)) > TEXT_MAX:
            message = shortened(message, TEXT_MAX // JSON_GROWTH)
        entry: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": message,
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
    def __init__(self, *, stamped: bool) -> None:
        super().__init__()
        self._stamped = stamped

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        board = board_name.get()
        message = shortened(printable(record.message))
        text = f"inco-trio: {record.levelname.lower()}: {board}{': ' if board else ''}{message}"
        left_out = getattr(record, "left_out", 0)
        if left_out:
            text += f" ({left_out} similar lines omitted)"
        if not self._stamped:
            return text
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{stamp}.{int(record.msecs):03d} {text}"


class _Lines(logging.Handler):
    """A handler that writes each record to the descriptor `fd`, or drops it if `fd` is not writable."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._is_journal = _is_journal(fd)
        self._lost = 0
        self._torn = False
        self._complained = fd == STANDARD_ERROR
        self._throttle = throttle.Throttle(real_clock.monotonic)
        self._wake: Callable[[], None] | None = None
        """Wakes the task that writes held records. None if it is awake or not running."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or hold it if its cause was logged less than a second ago."""
        cause = getattr(record, "cause", None)
        if cause is None:
            if record.levelno < logging.WARNING:
                self._write(record)
                return
            args = record.args if isinstance(record.args, tuple) else ()
            cause = (record.msg, *(arg for arg in args if not isinstance(arg, int)))
        if self._throttle.admit(board_name.get(), cause, record):
            self._write(record)
        elif self._wake is not None:
            wake, self._wake = self._wake, None
            wake()

    async def write_held(self) -> None:
        """Write held records once per period until cancelled. Other threads may log at the same time."""
        token = trio.lowlevel.current_trio_token()
        try:
            while True:
                held = trio.Event()
                with self.lock or contextlib.nullcontext():
                    if self._throttle.is_holding:
                        held.set()
                    else:
                        self._wake = functools.partial(token.run_sync_soon, held.set)
                await held.wait()
                await trio.sleep(throttle.PERIOD)
                self._release()
        finally:
            with self.lock or contextlib.nullcontext():
                self._wake = None

    def _release(self) -> None:
        with self.lock or contextlib.nullcontext():
            self._throttle.release(self._write)

    def flush(self) -> None:
        """Write all held records. The logging module calls this at the end of the process."""
        with self.lock or contextlib.nullcontext():
            self._throttle.release(self._write, everything=True)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            lines = self._line(record)
        except Exception:  # noqa: BLE001 - a logging call with wrong arguments; the logging module prints where it is
            self.handleError(record)
            return
        if self._lost:
            note = f"log lines lost before this line: {self._lost}"
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
                write_at_once(STANDARD_ERROR, f"inco-trio: warning: log lines are lost: {reason}\n".encode())

    def _line(self, record: logging.LogRecord) -> bytes:
        text = self.format(record)
        if self._is_journal:
            priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
            text = "\n".join(f"<{priority}>{line}" for line in text.splitlines())
        return f"{text}\n".encode(errors="backslashreplace")


def _is_journal(fd: int) -> bool:
    """Return whether `fd` is the stream to systemd's journal that $JOURNAL_STREAM identifies (systemd.exec(5))."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def needs_timestamps(when: str, fd: int, *, is_s6_service: bool = False) -> bool:
    """Return whether text lines need timestamps if `--log-timestamps` is `when` (auto, always or never).

    With `auto`, lines on a terminal, in a file, a pipe or a socket have timestamps. Lines for systemd's journal or for
    an s6 service's logger do not, because these add their own timestamps.
    """
    if when != "auto":
        return when == "always"
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    if _is_journal(fd):
        return False
    if stat.S_ISFIFO(mode):
        return not is_s6_service
    return stat.S_ISREG(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


def set_up_logging(
    log_format: str, *, verbose: bool, fd: int = STANDARD_ERROR, stamped: bool = False
) -> Callable[[], Awaitable[None]]:
    """Write the package's log to the descriptor `fd` as `text` or `json`; `verbose` also logs each notification.

    With `stamped`, text lines start with the local time. Return the function that writes held lines: run it in a task.
    """
    handler = _Lines(fd)
    handler.setFormatter(_Json() if log_format == "json" else _Text(stamped=stamped))
    package = logging.getLogger("inco_trio")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    return handler.write_held


def log_statistics(counters: dict[str, int]) -> None:
    text = " ".join(f"{name}={count}" for name, count in counters.items())
    logger.info("statistics: %s", text, extra={"event": "statistics", "fields": counters})
