"""A seccomp filter, which restricts the system calls of a process: seccomp(2), <linux/seccomp.h>, <linux/audit.h>.

`system_calls.txt` lists the numbers of the system calls that a running proxy may use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Collection, Iterator
from importlib import resources

from inco_trio.linux.bpf import AND, JUMP_IF_EQUAL, JUMP_IF_GREATER, LOAD_WORD, RETURN, Instruction, program
from inco_trio.linux.libc import check, libc

__all__ = ["filter_code", "install", "machine"]

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "armv7l": 0x40000028, "s390x": 0x80000016}
"""The AUDIT_ARCH constant of <linux/audit.h> for each supported machine type."""
SPECIAL = frozenset({"clone3", "execve", "execveat", "fchownat", "fork", "kill", "setns", "vfork", "socket", "clone"})
"""System calls that the filter allows or refuses depending on their arguments or on the features in use."""
NEWEST = 451
"""Highest system call number of Linux 6.1. Newer calls fail with ENOSYS; the C library then uses older ones."""
CLONE_NAMESPACES = 0x7E020080
"""The flags CLONE_NEW* of clone(2) and unshare(2)."""

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
ALLOW: Instruction = (RETURN, 0, 0, 0x7FFF0000)
LOG: Instruction = (RETURN, 0, 0, 0x7FFC0000)
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data."""


def machine() -> str | None:
    """Return the machine type of this process, or None if the filter does not support it."""
    name, is_narrow = os.uname().machine, struct.calcsize("P") == 4
    if is_narrow:
        return "armv7l" if name.startswith(("arm", "aarch64")) else None
    return name if name in MACHINES else None


def numbers(name: str) -> dict[str, int]:
    """Return the system call numbers of a machine type, keyed by name."""
    text = resources.files(__package__).joinpath("system_calls.txt").read_text()
    columns, *rows = (line.split() for line in text.splitlines()[1:])
    place = columns.index(name)
    return {row[0]: int(row[place]) for row in rows if row[place] != "-"}


def filter_code(
    name: str,
    *,
    families: Collection[int],
    also: Collection[str] = (),
    log: bool = False,
    byteorder: str = sys.byteorder,
) -> bytes:
    """Return the filter for a machine type. It also allows sockets of `families` and the system calls in `also`.

    The kernel refuses other system calls with EPERM. With `log`, it allows and logs them (see journalctl -k).
    """
    return program(_instructions(name, families, also, log, byteorder))


def _instructions(
    name: str, families: Collection[int], also: Collection[str], log: bool, byteorder: str
) -> Iterator[Instruction]:
    calls = numbers(name)
    refuse = LOG if log else _error(errno.EPERM)
    yield (LOAD_WORD, 0, 0, _MACHINE)
    yield (JUMP_IF_EQUAL, 1, 0, MACHINES[name])
    yield refuse
    yield (LOAD_WORD, 0, 0, _NUMBER)
    for call, number in calls.items():
        if call not in SPECIAL or call in also:
            yield (JUMP_IF_EQUAL, 0, 1, number)
            yield ALLOW
    # Without clone3, the C library uses clone, whose flags a filter can read.
    yield (JUMP_IF_EQUAL, 0, 1, calls["clone3"])
    yield _error(errno.ENOSYS)
    low = 4 if byteorder == "big" else 0
    # On s390x, the flags are the second argument of clone(2).
    flags = _ARGUMENTS + low + (8 if name == "s390x" else 0)
    yield (JUMP_IF_EQUAL, 0, 5, calls["clone"])
    yield (LOAD_WORD, 0, 0, flags)
    yield (AND, 0, 0, CLONE_NAMESPACES)
    yield (JUMP_IF_EQUAL, 0, 1, 0)
    yield ALLOW
    yield refuse
    yield (JUMP_IF_EQUAL, 0, 2 * len(families) + 2, calls["socket"])
    yield (LOAD_WORD, 0, 0, _ARGUMENTS + low)
    for family in families:
        yield (JUMP_IF_EQUAL, 0, 1, family)
        yield ALLOW
    yield refuse
    if not log:
        yield (JUMP_IF_GREATER, 0, 1, NEWEST)
        yield _error(errno.ENOSYS)
    yield refuse


def _error(number: int) -> Instruction:
    return (RETURN, 0, 0, 0x00050000 | number)


def install(code: bytes) -> None:
    """Filter the system calls of this thread and of threads that it creates. Requires no_new_privs. Raises OSError."""
    kept = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog contains the number of instructions and their address.
    fprog = struct.pack("HP", len(code) // 8, ctypes.addressof(kept))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog, 0, 0))
