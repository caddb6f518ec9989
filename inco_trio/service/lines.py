"""Write to a standard stream without waiting for its reader, and escape and shorten the text of a line."""

from __future__ import annotations

import os
import select

__all__ = ["STANDARD_ERROR", "STANDARD_OUTPUT", "TEXT_MAX", "printable", "shortened", "write_at_once"]

STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
TEXT_MAX = 6000
"""Maximum size of the text of a log line in bytes.

s6-log(1) splits lines of more than 8,192 bytes, and systemd's journal those of more than 48 KiB. The end of a long
key or path would then look like another line of the log.
"""
PIECE = 4096
"""PIPE_BUF (pipe(7)): a writable pipe accepts this many bytes without blocking."""


def printable(text: str) -> str:
    """Escape line breaks and terminal controls in `text`. Paths and process names may contain them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, size_max: int = TEXT_MAX) -> str:
    """Return `text`, or its two ends if it is larger than `size_max` bytes. The reason of an error is at the end."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= size_max:
        return text
    half = size_max // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[-half:]))
    return f"{head}... ({len(data) - 2 * half} bytes omitted) ...{tail}"


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
