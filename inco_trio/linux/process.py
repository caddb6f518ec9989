"""Processes: prctl(2), mlockall(2) and user_namespaces(7), with the constants of the kernel's headers."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

from inco_trio.linux.libc import check, libc

__all__ = ["end_with_parent", "lock_memory", "overflow_uid"]

PR_SET_PDEATHSIG = 1

MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4


def end_with_parent(parent: int) -> bool:
    """Make the kernel kill this process when the thread that started it ends. Return False if `parent` has ended.

    This function can be the `preexec_fn` of a subprocess: it imports nothing and takes no lock.
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def lock_memory() -> None:
    """Lock all present and future pages of the process in memory (mlockall(2)). Raises OSError.

    MCL_ONFAULT avoids allocating unused pages: most pages of an in-flight buffer are never used.
    """
    check(libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))


@functools.cache
def overflow_uid() -> int:
    """Return the user ID that stands for all users not mapped in this user namespace, usually the ID of `nobody`."""
    try:
        return int(Path("/proc/sys/fs/overflowuid").read_text())
    except OSError:
        return 65534  # /proc is not mounted: use the kernel's DEFAULT_OVERFLOWUID.
