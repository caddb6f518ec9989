"""Write to a standard stream without waiting for its reader, and escape the text of a line."""

from __future__ import annotations

import os
import select

__all__ = ["STANDARD_ERROR", "STANDARD_OUTPUT", "printable", "write_at_once"]

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
PIECE = 4096
"""PIPE_BUF (pipe(7)): a writable pipe accepts this many bytes without blocking."""


def printable(text: str) -> str:
    """Escape line breaks and terminal controls in `text`. Paths and process names may contain them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def write_at_once(fd: int, data: bytes, patience_ms: int = 0) -> tuple[int, str | None]:
    """Write `data` to `fd`, and wait at most `patience_ms` milliseconds for it to become writable.

    Never raise. Return the number of bytes written and, if that is not all of them, the reason.
    """
    written = 0
    try:
        while written < len(data):
            # Do not use poll(2), which fails if the limit on open descriptors is 0.
            if not select.select((), (fd,), (), patience_ms / 1000)[1]:
                return written, "the reader is too slow"
            written += os.write(fd, data[written : written + PIECE])
    except OSError as error:
        return written, error.strerror
    return written, None
