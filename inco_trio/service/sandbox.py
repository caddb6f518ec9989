"""The sandbox of a running daemon: Landlock for files, and a seccomp filter for system calls."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from inco_trio.config import Config
from inco_trio.links.address import InterfaceAddress, UnixAddress
from inco_trio.linux import landlock, seccomp
from inco_trio.linux.files import EXHAUSTED, ForeignFuseError, pinned

__all__ = ["enter_sandbox"]

logger = logging.getLogger(__name__)

FD_STORE_PROGRAMS = ("s6-fdholder-store", "s6-fdholder-delete")
PROCESSES = frozenset({"execve", "fork", "kill", "vfork"})
"""System calls for starting and stopping the s6 programs that store descriptors."""


def enter_sandbox(
    configs: Collection[Config], *, control: Path | None, grows: bool, has_fd_holder: bool, log: bool
) -> None:
    """Restrict this thread and the threads that it creates. With `log`, the kernel only logs violations.

    `control` is the control socket. With `grows`, a reload may add boards. The capabilities must already be dropped. If
    the kernel does not support a part of the sandbox, log this and continue without that part.
    """
    try:
        if not log:
            writable = sorted(_writable(configs, control))
            programs = _programs() if has_fd_holder else ()
            refused = landlock.restrict_files([*writable, Path("/dev/null")], programs)
            for path, error in refused.items():
                if isinstance(error, ForeignFuseError):
                    reason, remedy = "it is a FUSE filesystem of another user", "unmount it and restart"
                else:
                    reason, remedy = f"it cannot be opened: {error.strerror}", "correct the path and restart"
                logger.warning("%s: the sandbox does not permit writing there, because %s (%s)", path, reason, remedy)
            places = ", ".join(str(path) for path in writable if path not in refused)
            logger.info("sandbox: writing is limited to %s (restart after adding a directory elsewhere)", places)
    except OSError as error:
        logger.warning("sandbox: cannot restrict writing (Landlock: %s): continuing without it", error.strerror)
    name = seccomp.machine()
    if name is None:
        logger.warning(
            "sandbox: cannot filter system calls (unknown processor architecture): continuing without the filter"
        )
        return
    families = [socket.AF_UNIX, socket.AF_NETLINK]
    if grows or any(isinstance(config.address, InterfaceAddress) for config in configs):
        families.append(socket.AF_PACKET)
    also = set(PROCESSES) if has_fd_holder else set()
    if any(config.netns is not None for config in configs):
        also.add("setns")
    if any((config.owner, config.group) != (None, None) for config in configs):
        also.add("fchownat")
    try:
        seccomp.install(seccomp.filter_code(name, families=families, also=also, log=log))
    except OSError as error:
        logger.warning("sandbox: cannot filter system calls (seccomp: %s): continuing without it", error.strerror)


def _writable(configs: Collection[Config], control: Path | None) -> set[Path]:
    """Return the parents of all IRQ directories and sockets, so that a recreated directory is also writable."""
    paths = {signal.directory for config in configs for signal in config.signals}
    paths |= {Path(config.address.local) for config in configs if isinstance(config.address, UnixAddress)}
    if control is not None:
        paths.add(control)
    return {_existing(path) for path in paths}


def _existing(path: Path) -> Path:
    """Return the parent of `path`, or its nearest existing ancestor. For /NAME, return /NAME instead of /."""
    parent = path.parent
    while not _exists(parent):
        parent = parent.parent
    return parent if parent != parent.parent or not _exists(path, stat.S_IFDIR) else path


def _exists(path: Path, kind: int | None = None) -> bool:
    """Return whether a file can be opened with O_PATH, or has the file type `kind`.

    Do not enter a FUSE filesystem of another user. Raises OSError if no descriptors or memory are left.
    """
    try:
        with pinned(path) as fd:
            return kind is None or stat.S_IFMT(os.fstat(fd).st_mode) == kind
    except ForeignFuseError:
        return True
    except OSError as error:
        # An application can cause many errors for the path of its board. They must not disable the sandbox.
        if error.errno in EXHAUSTED:
            raise
        return False


def _programs() -> Iterator[Path]:
    """Yield the s6 programs that store descriptors, and the dynamic loaders that execve(2) opens."""
    for name in FD_STORE_PROGRAMS:
        if found := shutil.which(name):
            yield Path(found)
    for directory in ("/lib", "/lib64", "/usr/lib"):
        for pattern in ("ld-*.so*", "ld64.so*", "*/ld-*.so*"):
            yield from Path(directory).glob(pattern)
