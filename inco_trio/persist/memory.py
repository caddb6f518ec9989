"""Memory that outlives the process: a memfd of fixed size that begins with a known header (memfd_create(2)).

Seals prevent changes to the size (fcntl(2)). Otherwise, a process that holds a copy of the descriptor could shrink the
memory, and SIGBUS would kill the proxy at its next access.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

from inco_trio.linux.libc import libc

__all__ = ["check_memory", "map_memory", "new_memory"]

# glibc's mmap64 and musl's mmap have a 64-bit offset even on 32-bit machines.
_mmap = getattr(libc, "mmap64", libc.mmap)
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
"""MAP_FAILED, the result of mmap(2) on error."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_F_SEAL_FUTURE_WRITE = 0x10
_READ_ONLY = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
"""The seals that make mmap(2) refuse a writable mapping."""


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
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # EINVAL: the descriptor is not a memfd.
        seals = 0
    if seals & _SEALS != _SEALS:
        raise ValueError("not a sealed memfd")
    if seals & _READ_ONLY or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ValueError("not writable")
    if os.fstat(fd).st_size != size or os.pread(fd, len(head), 0) != head:
        raise ValueError("written by another version")


def map_memory(fd: int, size: int) -> memoryview:
    """Map `size` bytes of a memfd, and return a view of them. Raises OSError (mmap(2)).

    The memory stays mapped until the last view is deleted, even if `fd` is closed earlier. The class `mmap.mmap` would
    keep a duplicate of `fd` open until then.
    """
    address = _mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # At the end of the process, threads may still use the memory, and the kernel unmaps it anyway.
    weakref.finalize(memory, libc.munmap, address, size).atexit = False
    return memoryview(memory).cast("B")
