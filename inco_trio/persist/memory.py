"""Memory that outlives the process: a memfd of fixed size that begins with a known header (memfd_create(2)).

Seals prevent changes to the size (fcntl(2)). Otherwise, a process that holds a copy of the descriptor could shrink the
memory, and SIGBUS would kill the proxy at its next access.
"""

from __future__ import annotations

import fcntl
import os

__all__ = ["check_memory", "new_memory"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def new_memory(name: str, size: int, head: bytes) -> int:
    """Create a sealed memfd of `size` bytes that begins with `head`, and return its descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, head, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_memory(fd: int, size: int, head: bytes) -> None:
    """Check that `fd` is a sealed memfd of `size` bytes that begins with `head`. Raises ValueError with the reason."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # EINVAL: the descriptor is not a memfd.
        sealed = False
    if not sealed:
        raise ValueError("not a sealed memfd")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ValueError("not writable")
    if os.fstat(fd).st_size != size or os.pread(fd, len(head), 0) != head:
        raise ValueError("written by another version")
