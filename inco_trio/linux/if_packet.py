"""Packet sockets: packet(7), <linux/if_packet.h>, and the kernel's Documentation/networking/filter.rst."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterable

from inco_trio.linux.libc import libc

__all__ = ["attach_filter", "filter_of", "program"]

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_OUTGOING = 4
"""The packet type of frames that this host sends."""
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
SO_ATTACH_FILTER = SO_GET_FILTER = 26
SO_LOCK_FILTER = 44
GONE = frozenset({errno.ENODEV, errno.ENXIO})
"""Error numbers if the interface does not exist."""

_INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter: the operation code, two jump offsets and an operand."""


def program(instructions: Iterable[tuple[int, int, int, int]]) -> bytes:
    """Return the machine code of a filter."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def attach_filter(sock: socket.socket, code: bytes) -> None:
    """Let the kernel queue only frames that the filter accepts. The filter cannot be removed later. Raises OSError."""
    kept = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog contains the number of instructions and their address.
    fprog = struct.pack("HP", len(code) // _INSTRUCTION.size, ctypes.addressof(kept))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
    # Lock the filter, so that a process that gets the descriptor cannot remove it.
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def filter_of(sock: socket.socket, size: int) -> bytes:
    """Return the attached filter, or b"" if the socket has none or one of more than `size` bytes."""
    # SO_GET_FILTER counts instructions instead of bytes, so socket.getsockopt would truncate the answer.
    code = ctypes.create_string_buffer(size)
    length = ctypes.c_uint(size // _INSTRUCTION.size)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, code, ctypes.byref(length)) < 0:
        return b""
    return code.raw[: length.value * _INSTRUCTION.size]
