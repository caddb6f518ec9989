"""Capabilities of the calling thread (capabilities(7)), with the constants of <linux/capability.h> and <linux/prctl.h>.

The kernel keeps capabilities per thread. A new thread inherits the capabilities of the thread that creates it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Collection

from inco_trio.linux.libc import check, libc

__all__ = ["clear_capabilities", "held_capabilities", "keep_capabilities", "names_of", "no_new_privileges"]

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21

# fmt: off
NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# fmt: on
"""The name of each capability without the prefix CAP_, indexed by its number."""

PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECBIT_NOROOT_LOCKED = 0b11

_VERSION_3 = 0x20080522
_HEADER = struct.Struct("=Ii")
"""struct __user_cap_header_struct: version, and PID (0: the calling thread)."""
_SETS = struct.Struct("=6I")
"""Two struct __user_cap_data_struct (effective, permitted, inheritable): the low 32 bits, then the high 32 bits."""


def held_capabilities() -> frozenset[int]:
    """Return the numbers of the permitted capabilities. Raises OSError (capget(2))."""
    data = ctypes.create_string_buffer(_SETS.size)
    check(libc.capget(_HEADER.pack(_VERSION_3, 0), data))
    _, low, _, _, high, _ = _SETS.unpack(data.raw)
    return frozenset(number for number in range(64) if (low | high << 32) >> number & 1)


def names_of(capabilities: Collection[int]) -> list[str]:
    """Return the names of capabilities, such as CAP_NET_RAW."""
    known = enumerate(NAMES)
    named = [f"CAP_{name}" for number, name in known if number in capabilities]
    return named + [f"CAP_{number}" for number in sorted(capabilities) if number >= len(NAMES)]


def keep_capabilities(kept: Collection[int]) -> None:
    """Drop all capabilities that are not in `kept`, for this thread and for the programs that it starts.

    Raises OSError (capset(2), prctl(2)). Without CAP_SETPCAP, the bounding set cannot change. In that case, call
    `no_new_privileges`, which has the same effect.
    """
    with contextlib.suppress(OSError):
        for number in range(64):  # EINVAL: the kernel does not know this capability.
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    bits = sum(1 << number for number in held_capabilities() & frozenset(kept))
    low, high = bits & 0xFFFFFFFF, bits >> 32
    check(libc.capset(_HEADER.pack(_VERSION_3, 0), _SETS.pack(low, low, 0, high, high, 0)))


def no_new_privileges() -> None:
    """Prevent programs that this thread starts from gaining privileges (PR_SET_NO_NEW_PRIVS). Raises OSError."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def clear_capabilities() -> None:
    """Drop the capabilities that execve(2) would keep or grant to root (capabilities(7)). Raises OSError."""
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    check(libc.prctl(PR_SET_SECUREBITS, SECBIT_NOROOT_LOCKED, 0, 0, 0))
