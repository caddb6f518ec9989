"""Write to a standard stream without waiting for its reader, and escape the text of a line."""

from __future__ import annotations

import os
import select

__all__ = ["STANDARD_ERROR", "STANDARD_OUTPUT", "printable", "write_at_once"]

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
PIECE = 4096
"""PIPE_BUF of pipe(7): a pipe that is writable takes this many bytes without blocking."""


def printable(text: str) -> str:
    """Return `text` with escapes for line breaks and terminal controls, which paths and process names may contain."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def write_at_once(fd: int, data: bytes, patience_ms: int = 0) -> tuple[int, str | None]:
    """Write `data` to `fd`, and wait at most `patience_ms` milliseconds until it is writable. Raises nothing.

    Return the number of bytes written, and the reason if some were not.
    """
    written = 0
    try:
        while written < len(data):
            # Not poll(2), which fails if the limit of open descriptors is 0.
            if not select.select((), (fd,), (), patience_ms / 1000)[1]:
                return written, "the reader is too slow"
            written += os.write(fd, data[written : written + PIECE])
    except OSError as error:
        return written, error.strerror
    return written, None
