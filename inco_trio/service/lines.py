"""Writing lines to a standard stream without ever waiting for who reads it, and what may stand in a line."""

from __future__ import annotations

import os
import select

__all__ = ["STANDARD_ERROR", "STANDARD_OUTPUT", "printable", "write_at_once"]

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
PIECE = 4096
"""PIPE_BUF of pipe(7): as much as a pipe takes without waiting once it takes anything."""


def printable(text: str) -> str:
    """`text` with escapes for what would end its line, or command a terminal.

    Paths, and the names of processes, are any bytes.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def write_at_once(fd: int, data: bytes, patience_ms: int = 0) -> tuple[int, str | None]:
    """Write `data` to `fd`, waiting at most `patience_ms` for room.

    Returns how many bytes were written and, if that is not all, why. Raises nothing.
    """
    written = 0
    try:
        while written < len(data):
            # Not poll(2), which refuses to work once the limit of descriptors is 0.
            if not select.select((), (fd,), (), patience_ms / 1000)[1]:
                return written, "nobody reads it"
            written += os.write(fd, data[written : written + PIECE])
    except OSError as error:
        return written, error.strerror
    return written, None
