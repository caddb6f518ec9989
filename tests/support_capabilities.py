"""Drop capabilities of the calling thread (capabilities(7)), so that the kernel refuses access even to root."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator

from inco_trio.linux.libc import check, libc

__all__ = ["without_capability"]

_VERSION_3 = 0x20080522


def _call(function: str, data: ctypes.Array[ctypes.c_char]) -> None:
    # struct __user_cap_header_struct: the version, and PID 0 for the calling thread.
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    check(getattr(libc, function)(header, data), function)


@contextlib.contextmanager
def without_capability(number: int) -> Iterator[None]:
    """Remove a capability (0 to 31) from the effective set inside the block. This does nothing for an ordinary user."""
    # Two struct __user_cap_data_struct (effective, permitted, inheritable), low 32 bits first.
    before = ctypes.create_string_buffer(24)
    _call("capget", before)
    fields = list(struct.unpack("=6I", before.raw[:24]))
    fields[0] &= ~(1 << number)
    _call("capset", ctypes.create_string_buffer(struct.pack("=6I", *fields), 24))
    try:
        yield
    finally:
        _call("capset", before)
