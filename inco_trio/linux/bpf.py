"""Socket filters: classic BPF, see the kernel's Documentation/networking/filter.rst and <linux/filter.h>."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable

from inco_trio.linux.libc import check, libc

__all__ = ["Instruction", "attach_filter", "filter_of", "program"]

Instruction = tuple[int, int, int, int]
"""The operation code, the jump offsets after a true and after a false comparison, and the operand."""

LOAD_WORD = 0x20
LOAD_HALF = 0x28
LOAD_BYTE = 0x30
LOAD_LENGTH = 0x80
LOAD_WORD_AT_X = 0x40
LOAD_HALF_AT_X = 0x48
LOAD_BYTE_AT_X = 0x50
LOAD_MEMORY = 0x60
STORE_MEMORY = 0x02
SET_X = 0x01
COPY_TO_X = 0x07
COPY_FROM_X = 0x87
ADD = 0x04
SUBTRACT_X = 0x1C
AND = 0x54
JUMP = 0x05
JUMP_IF_EQUAL = 0x15
JUMP_IF_BITS = 0x45
JUMP_IF_GREATER = 0x25
JUMP_IF_GREATER_OR_EQUAL = 0x35
RETURN = 0x06

_ANCILLARY = 0xFFFFF000
"""SKF_AD_OFF: loads above this offset read data about the frame instead of its bytes."""
PROTOCOL = _ANCILLARY + 0
PACKET_TYPE = _ANCILLARY + 4
INTERFACE = _ANCILLARY + 8
RANDOM = _ANCILLARY + 56

ACCEPT: Instruction = (RETURN, 0, 0, 0xFFFF)
REJECT: Instruction = (RETURN, 0, 0, 0)
SHORT_JUMP = 0xFF
"""Maximum offset of a conditional jump, in instructions."""
INSTRUCTIONS_MAX = 4096
"""Maximum length of a filter (BPF_MAXINSNS)."""

SO_ATTACH_FILTER = SO_GET_FILTER = 26

_INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter, the binary form of an `Instruction`."""


def program(instructions: Iterable[Instruction]) -> bytes:
    """Encode the instructions of a filter as the kernel expects them."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def attach_filter(sock: socket.socket, code: bytes) -> None:
    """Make the kernel queue only frames that the filter accepts. An old filter is replaced atomically. Raises OSError.

    Attaching fails with ENOMEM if the filter needs more memory than net.core.optmem_max.
    """
    kept = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog contains the number of instructions and their address.
    fprog = struct.pack("HP", len(code) // _INSTRUCTION.size, ctypes.addressof(kept))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


def filter_of(sock: socket.socket) -> bytes:
    """Return the filter that is attached to a socket, or b"" if there is none. Raises OSError."""
    # SO_GET_FILTER counts instructions instead of bytes, so socket.getsockopt would truncate the answer.
    code = ctypes.create_string_buffer(INSTRUCTIONS_MAX * _INSTRUCTION.size)
    length = ctypes.c_uint(INSTRUCTIONS_MAX)
    check(libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, code, ctypes.byref(length)))
    return code.raw[: length.value * _INSTRUCTION.size]
