"""Network namespaces: setns(2), unshare(2) and network_namespaces(7), with the constants of <linux/sched.h>.

A socket belongs to the network namespace of the thread that created it.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from inco_trio.linux.libc import check, libc

__all__ = ["belongs_here", "entered", "identity", "set_network", "unshare"]

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
SIOCGSKNS = 0x894C
"""The ioctl that opens the network namespace of a socket (the kernel's include/uapi/linux/sockios.h)."""
OURS = Path("/proc/thread-self/ns/net")


def set_network(fd: int) -> None:
    """Move the calling thread into the network namespace that a descriptor refers to (setns(2)). Raises OSError."""
    check(libc.setns(fd, CLONE_NEWNET))


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (unshare(2)). Raises OSError."""
    check(libc.unshare(flags))


def entered(netns: Path | None) -> ExitStack:
    """Move the calling thread into `netns` (None: do nothing). Closing the result moves it back. Raises OSError."""
    with ExitStack() as stack:
        if netns is not None:
            here, there = (_opened(path, stack) for path in (OURS, netns))
            set_network(there)
            stack.callback(set_network, here)
        return stack.pop_all()


def _opened(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def identity(netns: Path | None) -> tuple[int, int]:
    """Return the device and inode that identify a network namespace, or (0, 0) if the path does not exist."""
    try:
        found = (OURS if netns is None else netns).stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


def belongs_here(sock: int) -> bool:
    """Return whether a socket belongs to this thread's network namespace.

    Return True if the check fails because CAP_NET_ADMIN is missing.
    """
    try:
        fd = fcntl.ioctl(sock, SIOCGSKNS)
    except OSError:
        return True
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return (found.st_dev, found.st_ino) == identity(None)
