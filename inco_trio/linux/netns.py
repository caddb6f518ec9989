"""Network namespaces: the calling thread is in another one while a socket is made, which then belongs to that."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from inco_trio.errors import IncoError, LinkNotFoundError, PermissionDeniedError, ResourceError

__all__ = ["belongs_to", "identity", "inside"]

CLONE_NEWNET = 0x40000000
SIOCGSKNS = 0x894C
"""The network namespace of a socket, see the kernel's include/uapi/linux/sockios.h."""
OURS = Path("/proc/thread-self/ns/net")

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def inside(netns: Path | None, asking: str) -> Iterator[None]:
    """Have the calling thread inside `netns` while the block runs; None is where it is. `asking` is for errors.

    Raises LinkNotFoundError, PermissionDeniedError, ResourceError.
    """
    if netns is None:
        yield
        return
    with ExitStack() as stack:
        try:
            here, there = (_opened(path, stack) for path in (OURS, netns))
            _enter(there)
        except OSError as error:
            raise _refusal(error, netns, asking) from error
        stack.callback(_enter, here)
        yield


def _opened(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _refusal(error: OSError, netns: Path, asking: str) -> IncoError:
    if isinstance(error, FileNotFoundError):
        return LinkNotFoundError(f"{asking}: there is no network namespace {netns}: make it (`ip netns add NAME`)")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{asking}: entering the network namespace {netns} needs CAP_SYS_ADMIN")
    return ResourceError(f"{asking}: the network namespace {netns} cannot be entered: {error.strerror}")


def identity(netns: Path | None) -> tuple[int, int]:
    """What tells a network namespace from every other; (0, 0) if there is none."""
    try:
        found = (OURS if netns is None else netns).stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


def belongs_to(sock: int, netns: Path | None) -> bool:
    """Whether a socket is of the namespace `netns`, as far as one may know (CAP_NET_ADMIN)."""
    try:
        fd = fcntl.ioctl(sock, SIOCGSKNS)
    except OSError:
        return True
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return (found.st_dev, found.st_ino) == identity(netns)
