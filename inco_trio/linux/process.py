"""Processes: capabilities(7), prctl(2), user_namespaces(7), and constants of <linux/capability.h>, <linux/prctl.h>."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

from inco_trio.linux.libc import check, libc

__all__ = ["clear_capabilities", "end_with_parent", "overflow_uid"]

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


@functools.cache
def overflow_uid() -> int:
    """Return the user ID that stands for all users who are not mapped in this user namespace; usually also `nobody`."""
    try:
        return int(Path("/proc/sys/fs/overflowuid").read_text())
    except OSError:
        return 65534  # DEFAULT_OVERFLOWUID of the kernel, if /proc is not mounted.
