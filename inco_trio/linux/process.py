"""Processes: capabilities(7), prctl(2) and mlockall(2), with the constants of the kernel's headers."""

from __future__ import annotations

import os
import signal

from inco_trio.linux.libc import check, libc

__all__ = ["clear_capabilities", "end_with_parent", "lock_memory"]

CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_SYS_ADMIN = 21

PR_SET_PDEATHSIG = 1
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECBIT_NOROOT_LOCKED = 0b11

MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4


def end_with_parent(parent: int) -> bool:
    """Let the kernel kill this process when the thread that started it ends. Return False if `parent` has ended.

    This function can be the `preexec_fn` of a subprocess: it imports nothing and takes no lock.
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def clear_capabilities() -> None:
    """Drop the capabilities that execve(2) would keep or grant to root (capabilities(7)). Raises OSError."""
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    check(libc.prctl(PR_SET_SECUREBITS, SECBIT_NOROOT_LOCKED, 0, 0, 0))


def lock_memory() -> None:
    """Keep all pages that the process uses in memory, now and later (mlockall(2)). Raises OSError.

    MCL_ONFAULT does not allocate unused pages, because most of an in-flight buffer is unused.
    """
    check(libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
