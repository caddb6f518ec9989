"""Descriptors that outlive the process, in an fd store: s6-fdholder-daemon, or that of systemd.

A descriptor is stored under its name and a number (`link.2`). A replacement is stored under the next number before the
old descriptor is deleted, so one of them is always stored. If a crash leaves both, the higher number is the newer one.
A number that is already taken shows that a second process uses the same names.

See https://skarnet.org/software/s6/s6-fdholderd.html and sd_pid_notify_with_fds(3).
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

from inco_trio.errors import InvalidArgumentError, ResourceError
from inco_trio.notify import sd_notify

__all__ = ["FdStore", "NoFdStore", "S6FdStore", "SystemdFdStore", "fd_store_from_environment"]

_TIMEOUT_MS = 5000
"""The daemon answers within a millisecond or never; without a limit, s6's tools would wait for ever."""

_LISTEN_FDS_START = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""

_Found = tuple[str, int, int]
"""Name, number and descriptor of an entry."""


class FdStore(Protocol):
    """Keeps descriptors while the proxy is not running."""

    holder: str | None
    """The supervisor: `s6-fdholder`, `systemd`, or None without an fd store."""
    inherited: dict[str, int]
    """The descriptors of an earlier process, by name; close-on-exec. The caller owns them."""

    def store(self, name: str, fd: int) -> None:
        """Store a copy of `fd` as `name`, and delete the former one with all that is queued in it.

        Blocks for some milliseconds. Raises ResourceError.
        """

    def remove(self, name: str) -> None:
        """Delete `name` if it is stored. Raises as `store` does."""


class NoFdStore:
    """Stores nothing, and inherits nothing."""

    holder: str | None = None

    def __init__(self) -> None:
        self.inherited: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None:
        """Do nothing."""

    def remove(self, name: str) -> None:
        """Do nothing."""


class _NumberedFdStore(ABC):
    """The numbering: no supervisor replaces a descriptor in one step."""

    holder: str | None = None

    def __init__(self, found: Iterable[_Found]) -> None:
        self.inherited: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        for name, number, fd in sorted(found, key=lambda entry: entry[1]):
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
    """Stores descriptors in the s6-fdholder-daemon at `socket`, under identifiers that start with `prefix`.

    Removes the variables of `s6-fdholder-getdump` from the environment, and closes descriptors of other prefixes.
    Raises InvalidArgumentError if that program did not start this process.
    """

    holder: str | None = "s6-fdholder"

    def __init__(self, socket: str, prefix: str) -> None:
        self._socket = socket
        self._prefix = prefix
        super().__init__(_take_dump(socket, prefix))

    def _put(self, identifier: str, fd: int) -> None:
        code, reason = self._run("s6-fdholder-store", identifier, fd)
        if code:
            hint = (
                "its rules must allow this user, and no other process may use the same interface"
                if code == 1
                else "is s6-fdholder-daemon running there?"
            )
            raise ResourceError(f"cannot keep {self._prefix}{identifier} in {self._socket}: {reason}; {hint}")

    def _drop(self, identifier: str) -> None:
        code, reason = self._run("s6-fdholder-delete", identifier, subprocess.DEVNULL)
        # 1 is a denial. We may delete what we stored, so the daemon has restarted and does not know the identifier.
        if code not in (0, 1):
            raise ResourceError(f"cannot drop {self._prefix}{identifier} from {self._socket}: {reason}")

    def _run(self, tool: str, identifier: str, stdin: int) -> tuple[int, str]:
        command = [tool, "-t", str(_TIMEOUT_MS), self._socket, self._prefix + identifier]
        try:
            done = subprocess.run(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        except OSError as error:
            raise ResourceError(f"cannot run {tool}: {error.strerror}; is s6 installed, and on PATH?") from error
        return done.returncode, done.stderr.decode(errors="replace").strip()


class SystemdFdStore(_NumberedFdStore):
    """Stores descriptors in the FD store of the systemd unit whose main process this is.

    Removes the variables of sd_listen_fds(3) from the environment, and closes unknown descriptors. systemd does not
    answer: its journal has what it refuses (see `FileDescriptorStoreMax=`).
    """

    holder: str | None = "systemd"

    def __init__(self) -> None:
        super().__init__(_take_listen_fds())

    def _put(self, identifier: str, fd: int) -> None:
        # FDPOLL=0: else systemd drops a socket with a pending error, as while its link is down.
        self._tell(f"FDSTORE=1\nFDNAME={identifier}\nFDPOLL=0", [fd])

    def _drop(self, identifier: str) -> None:
        self._tell(f"FDSTOREREMOVE=1\nFDNAME={identifier}")

    def _tell(self, state: str, fds: Sequence[int] = ()) -> None:
        try:
            sd_notify(state, fds)
        except OSError as error:
            address = os.environ["NOTIFY_SOCKET"]
            raise ResourceError(f"cannot reach systemd's FD store at $NOTIFY_SOCKET ({address}): {error}") from error


def fd_store_from_environment(fd_holder: str | None, interface: str) -> FdStore:
    """Return the fd store of the supervisor: s6's at the socket `fd_holder` if given, systemd's, or none.

    Call this once, before other descriptors are opened. Raises InvalidArgumentError.
    """
    if fd_holder is not None:
        return S6FdStore(fd_holder, f"inco-trio/{interface}/")
    if os.environ.get("NOTIFY_SOCKET") and (os.environ.get("FDSTORE", "0") != "0" or _listen_fds_are_ours()):
        return SystemdFdStore()
    return NoFdStore()


def _take_dump(socket: str, prefix: str) -> list[_Found]:
    count = os.environ.pop("S6_FD#", None)
    if count is None:
        raise InvalidArgumentError(
            f"--fd-holder {socket}: there is no S6_FD# in the environment; start inco-trio directly through "
            f"`s6-fdholder-getdump {socket} inco-trio run ...` (a shell in between drops that variable)"
        )
    entries = []
    for i in range(int(count)):
        os.environ.pop(f"S6_FDLIMIT_{i}", None)
        identifier, fd = os.environ.pop(f"S6_FDID_{i}"), int(os.environ.pop(f"S6_FD_{i}"))
        # An identifier without the prefix becomes "", which is unknown.
        entries.append((identifier.removeprefix(prefix) if identifier.startswith(prefix) else "", fd))
    return _ours(entries)


def _listen_fds_are_ours() -> bool:
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def _take_listen_fds() -> list[_Found]:
    if not _listen_fds_are_ours():
        return []
    del os.environ["LISTEN_PID"]
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":") + [""] * count
    return _ours((names[i], _LISTEN_FDS_START + i) for i in range(count))


def _ours(entries: Iterable[tuple[str, int]]) -> list[_Found]:
    """Return the entries (identifier, descriptor) with a numbered name; close all others."""
    found = []
    for identifier, fd in entries:
        name, _, number = identifier.rpartition(".")
        try:
            if name and number.isdecimal():
                os.set_inheritable(fd, False)
                found.append((name, int(number), fd))
            else:
                os.close(fd)
        except OSError:
            raise InvalidArgumentError(
                f"the environment names descriptor {fd} as held, but it is not open; start inco-trio without a program "
                "in between that closes descriptors"
            ) from None
    return found
