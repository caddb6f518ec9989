"""Store descriptors in s6-fdholder-daemon or in the fd store of systemd, so that they survive a restart of the proxy.

A descriptor is stored under its name and a number (`link.2`). A replacement is stored under the next number before the
old descriptor is deleted, so the fd store always has at least one of the two. After a crash, the descriptor with the
higher number is the newer one. If the next number is already taken, another process is using the same names.

See https://skarnet.org/software/s6/s6-fdholderd.html and sd_pid_notify_with_fds(3).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket as sockets
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from inco_trio.errors import InvalidArgumentError, ResourceError
from inco_trio.notify import sd_notify

__all__ = [
    "IN_TRANSIT",
    "FdStore",
    "NoFdStore",
    "OverfullError",
    "S6FdStore",
    "SystemdFdStore",
    "fd_store_from_environment",
    "inherited_fd",
    "report_missing",
]

logger = logging.getLogger(__name__)

_TIMEOUT_MS = 5000
"""Timeout of the s6 tools in milliseconds. The daemon normally answers within 1 ms."""
_LISTEN_FDS_START = 3
"""The first descriptor that systemd passes to a process (SD_LISTEN_FDS_START, sd_listen_fds(3))."""
_FD_MAX = (1 << 31) - 1
IN_TRANSIT = "too many descriptors of this user are in transit in Unix sockets: raise ulimit -Hn"
"""The message for ETOOMANYREFS. The sender's limit on open descriptors applies to all the user's processes."""
MISSING = "fd store: the stored descriptor %s is missing: starting without it; the data in it is lost"
DIRECTLY = "let the supervisor start inco-trio directly"
_STORED = r"(?:link|inotify|inflight|bundle|memory)\.[0-9]+"  # Compiled only once it is needed.
"""An entry of the fd store that an inco-trio process has stored."""
_LINKS = {(sockets.AF_PACKET, sockets.SOCK_RAW), (sockets.AF_UNIX, sockets.SOCK_DGRAM)}
"""The socket families and types that a link may have."""
_SOCKETS = {"link": _LINKS, "bundle": {(sockets.AF_UNIX, sockets.SOCK_STREAM)}}
_Found = tuple[str, int, int]
"""The name, the number and the descriptor of an entry of the fd store."""


class OverfullError(ResourceError):
    """A limit prevents storing more descriptors. The contents of the fd store are unchanged."""


class FdStore(Protocol):
    """A store that keeps descriptors while the proxy is not running."""

    supervisor: str | None
    """The name of the supervisor: `s6-fdholder`, `systemd`, or None if there is no fd store."""
    inherited: dict[str, int]
    """The descriptors that an earlier process stored, keyed by name. They are close-on-exec. The caller owns them."""

    def store(self, name: str, fd: int) -> None:
        """Store a copy of `fd` as `name`. Delete the descriptor previously stored as `name`, and its unread data.

        The call blocks for a few milliseconds. Raises ResourceError.
        """

    def remove(self, name: str) -> None:
        """Delete the descriptor `name` if it is stored. Raises ResourceError."""


def inherited_fd(fds: dict[str, int], name: str) -> int | None:
    """Return the inherited descriptor `name`. If it is of the wrong kind, log a warning, and close and remove it."""
    fd = fds.get(name)
    if fd is None or _is_right_kind(name.rpartition("/")[2], fd):
        return fd
    logger.warning("fd store: the stored descriptor %s is of the wrong kind: starting without it", name)
    os.close(fds.pop(name))
    return None


def report_missing(fds: Container[str], names: Sequence[str]) -> None:
    """Log a warning for each descriptor in `names` that is missing. A proxy stores the descriptors in this order.

    If a descriptor was stored, all descriptors before it were stored too, so the fd store has lost the missing ones.
    """
    last = max((number for number, name in enumerate(names) if name in fds), default=0)
    for name in names[:last]:
        if name not in fds:
            logger.warning(MISSING, name)


def _is_right_kind(name: str, fd: int) -> bool:
    if name == "inotify":
        try:
            return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:inotify"
        except OSError:
            return True  # /proc is not mounted.
    if name not in _SOCKETS:
        return True  # The descriptor is a memfd, which `check_memory` checks later.
    try:
        sock = sockets.socket(fileno=fd)
    except OSError:
        return False
    try:
        return (sock.family, sock.type) in _SOCKETS[name]
    finally:
        sock.detach()


class NoFdStore:
    """An fd store that stores nothing and inherits nothing."""

    supervisor: str | None = None

    def __init__(self) -> None:
        self.inherited: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None: ...
    def remove(self, name: str) -> None: ...


class _NumberedFdStore(ABC):
    """An fd store that numbers its descriptors, because no supervisor can replace a descriptor in a single step."""

    supervisor: str | None = None

    def __init__(self, found: Iterable[_Found]) -> None:
        self.inherited: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        for name, number, fd in sorted(found, key=lambda entry: entry[1]):
            if self._numbers.get(name) == number:
                # systemd can store several descriptors under one name, and lists the newest first. FDSTOREREMOVE=1
                # would remove all of them.
                logger.warning("fd store: several descriptors are stored as %s.%d: using the newest one", name, number)
                os.close(fd)
                continue
            if name in self.inherited:
                os.close(self.inherited[name])
                self.remove(name)
            self.inherited[name] = fd
            self._numbers[name] = number

    def store(self, name: str, fd: int) -> None:
        old = self._numbers.get(name, 0)
        self._put(f"{name}.{old + 1}", fd)
        self._numbers[name] = old + 1
        if old:
            self._drop(f"{name}.{old}")

    def remove(self, name: str) -> None:
        if name in self._numbers:
            self._drop(f"{name}.{self._numbers.pop(name)}")

    @abstractmethod
    def _put(self, identifier: str, fd: int) -> None: ...

    @abstractmethod
    def _drop(self, identifier: str) -> None: ...


class S6FdStore(_NumberedFdStore):
    """An fd store in the s6-fdholder-daemon at `socket`, with identifiers that start with `prefix`.

    The constructor removes the variables of `s6-fdholder-getdump` from the environment and closes descriptors with
    other prefixes. It raises InvalidArgumentError if `s6-fdholder-getdump` did not start this process.
    """

    supervisor: str | None = "s6-fdholder"

    def __init__(self, socket: str, prefix: str) -> None:
        self._socket = socket
        self._prefix = prefix
        super().__init__(_take_dump(socket, prefix))

    def _put(self, identifier: str, fd: int) -> None:
        code, reason = self._run("s6-fdholder-store", identifier, fd)
        if os.strerror(errno.ETOOMANYREFS) in reason:
            raise OverfullError(f"cannot store {self._prefix}{identifier} in {self._socket}: {IN_TRANSIT}")
        if code:
            hint = "is s6-fdholder-daemon running on this socket?"
            if code == 1:
                hint = "the daemon's rules must allow this user, and no other process may use the same interface"
            raise ResourceError(f"cannot store {self._prefix}{identifier} in {self._socket}: {reason} ({hint})")

    def _drop(self, identifier: str) -> None:
        code, reason = self._run("s6-fdholder-delete", identifier, subprocess.DEVNULL)
        # Exit code 1 means denied. This process is allowed to delete its own identifiers, so the daemon must have
        # restarted and lost them.
        if code not in (0, 1):
            raise ResourceError(f"cannot delete {self._prefix}{identifier} from {self._socket}: {reason}")

    def _run(self, tool: str, identifier: str, stdin: int) -> tuple[int, str]:
        command = [tool, "-t", str(_TIMEOUT_MS), self._socket, self._prefix + identifier]
        try:
            done = subprocess.run(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        except OSError as error:
            raise ResourceError(f"cannot run {tool}: {error.strerror} (is s6 installed and on PATH?)") from error
        return done.returncode, done.stderr.decode(errors="replace").strip()


class SystemdFdStore(_NumberedFdStore):
    """The fd store of this process's systemd unit.

    The constructor removes the variables of sd_listen_fds(3) from the environment and closes unknown descriptors.
    systemd does not report whether it stored a descriptor. It logs refusals (see `FileDescriptorStoreMax=`).
    """

    supervisor: str | None = "systemd"

    def __init__(self) -> None:
        super().__init__(_take_listen_fds())

    def _put(self, identifier: str, fd: int) -> None:
        # Without FDPOLL=0, systemd drops a socket that has a pending error, for example because its link is down.
        self._notify(f"FDSTORE=1\nFDNAME={identifier}\nFDPOLL=0", [fd])

    def _drop(self, identifier: str) -> None:
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={identifier}")

    def _notify(self, state: str, fds: Sequence[int] = ()) -> None:
        try:
            sd_notify(state, fds)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise OverfullError(f"cannot store a descriptor in systemd's fd store: {IN_TRANSIT}") from error
            address = os.environ["NOTIFY_SOCKET"]
            raise ResourceError(f"cannot reach systemd's fd store at $NOTIFY_SOCKET ({address}): {error}") from error


def fd_store_from_environment(fd_holder: str | None, interface: str) -> FdStore:
    """Return the fd store: s6 at the socket `fd_holder` if given, else systemd if available, else a NoFdStore.

    Call this function once, before the process opens other descriptors. Raises InvalidArgumentError.
    """
    if fd_holder is not None:
        return S6FdStore(fd_holder, f"inco-trio/{interface}/")
    if os.environ.get("NOTIFY_SOCKET") and (os.environ.get("FDSTORE", "0") != "0" or _listen_fds_are_ours()):
        return SystemdFdStore()
    return NoFdStore()


def _take_dump(socket: str, prefix: str) -> list[_Found]:
    if "S6_FD#" not in os.environ:
        raise InvalidArgumentError(
            f"--fd-holder {socket}: S6_FD# is not in the environment (start inco-trio directly through "
            f"`s6-fdholder-getdump {socket} inco-trio run ...`; a shell in between drops that variable)"
        )
    entries = []
    for i in range(_take_number("S6_FD#")):
        os.environ.pop(f"S6_FDLIMIT_{i}", None)
        identifier, fd = os.environ.pop(f"S6_FDID_{i}", ""), _take_number(f"S6_FD_{i}")
        # An identifier without the prefix becomes "", so that `_numbered` closes its descriptor.
        entries.append((identifier.removeprefix(prefix) if identifier.startswith(prefix) else "", fd))
    return _numbered(entries)


def _take_number(variable: str) -> int:
    """Remove a variable from the environment and return its value. Raises InvalidArgumentError if it is invalid."""
    text = os.environ.pop(variable, "")
    if re.fullmatch("[0-9]{1,10}", text) and int(text) <= _FD_MAX:
        return int(text)
    raise InvalidArgumentError(f"${variable}", f"{text!r} is not a descriptor number or count ({DIRECTLY})")


def _listen_fds_are_ours() -> bool:
    """Return whether systemd passed descriptors to this process.

    Raises InvalidArgumentError if it passed stored descriptors to another process, such as a shell that started this
    one. New descriptors would be stored under the same names, and the queues of the old ones would be lost.
    """
    pid, ours = os.environ.get("LISTEN_PID"), os.getpid()
    if pid not in (None, str(ours)) and any(re.fullmatch(_STORED, name) for name in _listen_names()):
        text = f"{pid!r} is not this process, {ours}, which therefore cannot take over the stored descriptors"
        raise InvalidArgumentError("$LISTEN_PID", f"{text} ({DIRECTLY})")
    return pid == str(ours)


def _listen_names() -> list[str]:
    return os.environ.get("LISTEN_FDNAMES", "").split(":")


def _take_listen_fds() -> list[_Found]:
    if not _listen_fds_are_ours():
        return []
    names, number = _listen_names(), _take_number("LISTEN_FDS")
    del os.environ["LISTEN_PID"]
    os.environ.pop("LISTEN_FDNAMES", None)
    if len(names) > max(number, 1):
        text = f"{len(names)} names for {number} descriptor{'' if number == 1 else 's'} ({DIRECTLY})"
        raise InvalidArgumentError("$LISTEN_FDNAMES", text)
    fds = range(_LISTEN_FDS_START, _LISTEN_FDS_START + number)
    return _numbered((names[i] if i < len(names) else "", fd) for i, fd in enumerate(fds))


def _numbered(entries: Iterable[tuple[str, int]]) -> list[_Found]:
    """Return the entries whose identifiers have a name and a number. Close the descriptors of all other entries."""
    found: list[_Found] = []
    seen = {0, 1, 2}
    for identifier, fd in entries:
        if fd in seen:
            text = "listed in the environment twice, or a standard stream"
            raise InvalidArgumentError(f"descriptor {fd}", f"{text} ({DIRECTLY})")
        seen.add(fd)
        numbered = re.fullmatch(r"(.+)\.([0-9]{1,18})", identifier, re.DOTALL)
        try:
            if numbered:
                os.set_inheritable(fd, False)
                found.append((numbered[1], int(numbered[2]), fd))
            else:
                os.close(fd)
        except OSError:
            raise InvalidArgumentError(
                f"descriptor {fd}: listed in the environment as a stored descriptor, but not open (a program between "
                "the supervisor and inco-trio closed it: start inco-trio directly)"
            ) from None
    return found
