"""The C library, for system calls that Python lacks."""

from __future__ import annotations

import ctypes
import os

__all__ = ["check", "libc"]

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, path: str | None = None) -> int:
    """Return the result of a C library call. Raises OSError if the result is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
