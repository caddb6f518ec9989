"""Landlock, which lets a thread restrict its own access to files (landlock(7), <linux/landlock.h>)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from inco_trio.linux.files import EXHAUSTED, pinned
from inco_trio.linux.libc import check, libc

__all__ = ["abi", "restrict_files"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""The system call numbers, which are the same on all architectures."""
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, TRUNCATE, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 14, 1 << 15
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
READ = 1 << 2 | 1 << 3
_FILE = EXECUTE | WRITE_FILE | TRUNCATE
"""The access rights that a Landlock rule for a single file can grant. Rules for directories can grant more."""
_ALL = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
"""For each Landlock ABI version that added rights: the lowest bit above all rights that this version supports."""
_TCP = 0b11
"""The rights to bind and to connect TCP sockets (since ABI 4)."""
_SCOPE_SIGNAL = 0b10
"""LANDLOCK_SCOPE_SIGNAL: a sandboxed thread can send signals only to processes in its sandbox (since ABI 6)."""


def abi() -> int:
    """Return the version of the Landlock interface (ABI) in the kernel, or 0 if the kernel lacks Landlock."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_CREATE_RULESET_VERSION))))


def restrict_files(writable: Iterable[Path], executable: Iterable[Path]) -> dict[Path, OSError]:
    """Allow this thread and the threads that it creates to write only below `writable` and execute only `executable`.

    Reading remains allowed. Since ABI 4, the kernel also refuses TCP. Requires no_new_privs. Return the errors of the
    `writable` paths that cannot be opened, for example on a FUSE filesystem of another user. The kernel refuses to
    write there. Raises OSError.
    """
    refused: dict[Path, OSError] = {}
    version = abi()
    handled = next(end - 1 for since, end in sorted(_ALL.items(), reverse=True) if since <= max(version, 1)) & ~READ
    attributes = struct.pack("=QQQ", handled & ~IOCTL_DEV, _TCP, _SCOPE_SIGNAL)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)))
    try:
        changes = WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK
        for path in writable:
            with contextlib.ExitStack() as opened:
                try:
                    fd = opened.enter_context(pinned(path))
                except OSError as error:
                    if error.errno in EXHAUSTED:
                        raise
                    refused[path] = error
                else:
                    _allow(ruleset, fd, changes & handled)
        for path in executable:
            with pinned(path) as fd:
                _allow(ruleset, fd, EXECUTE)
        check(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)))
    finally:
        os.close(ruleset)
    return refused


def _allow(ruleset: int, fd: int, rights: int) -> None:
    rights = rights if stat.S_ISDIR(os.fstat(fd).st_mode) else rights & _FILE
    rule = struct.pack("=Qi", rights, fd)
    check(libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0)))
