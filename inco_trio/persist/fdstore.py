"""Descriptors that outlive the process, kept by s6-fdholder-daemon or by systemd's FD store.

Each is stored under its name and a number (`link.2`). To replace one, the new descriptor is stored under the next
number before the old is deleted, so at no instant is none stored; where a crash left both, the higher number is the
newer. A number that is taken already shows that a second process uses the same names.

See https://skarnet.org/software/s6/s6-fdholderd.html and sd_pid_notify_with_fds(3).
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

from inco_trio.errors import InvalidArgumentError, ResourceError
from inco_trio.service.notify import sd_notify

__all__ = ["FdStore", "NoFdStore", "S6FdStore", "SystemdFdStore", "fd_store_from_environment"]

_TIMEOUT_MS = 5000
"""The holder answers in a millisecond or not at all; s6's tools would wait for ever."""

_LISTEN_FDS_START = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""

_Found = tuple[str, int, int]
"""The name, number and descriptor of something that was kept for us."""


class FdStore(Protocol):
    """Keeps descriptors while no process of ours runs."""

    holder: str | None
    """Who keeps them: `s6-fdholder`, `systemd` or nobody."""
    inherited: dict[str, int]
    """The descriptors that an earlier process stored: name to descriptor, close-on-exec. They belong to the caller."""

    def store(self, name: str, fd: int) -> None:
        """Keep a copy of `fd` as `name`, instead of what was kept under that name.

        What waits in the one that is replaced is lost with it unless this process has read it before.
        Blocks for some milliseconds. Raises ResourceError.
        """

    def remove(self, name: str) -> None:
        """Stop keeping `name`; nothing happens if it is not kept. Raises as `store` does."""


class NoFdStore:
    """Keeps nothing: without a supervisor that holds descriptors there is nothing to inherit."""

    holder: str | None = None

    def __init__(self) -> None:
        self.inherited: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None:
        """Do nothing."""

    def remove(self, name: str) -> None:
        """Do nothing."""


class _NumberedFdStore(ABC):
    """The numbering that both supervisors need, as neither replaces a descriptor in one step."""

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
    """Keeps descriptors in the s6-fdholder-daemon that listens on `socket`, under identifiers that start with `prefix`.

    The process must have been started through `s6-fdholder-getdump`, whose variables are taken out of the environment;
    descriptors of other prefixes are closed. Raises InvalidArgumentError if it was not.
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
        # 1 is a denial. Who may store may delete, so the holder has been restarted and does not know the identifier.
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
    """Keeps descriptors in the FD store of the systemd unit that this process is the main process of.

    The variables of sd_listen_fds(3) are taken out of the environment; descriptors that are not ours are closed.
    systemd takes what it is sent without an answer: what it refuses (see `FileDescriptorStoreMax=`) is in its journal.
    """

    holder: str | None = "systemd"

    def __init__(self) -> None:
        super().__init__(_take_listen_fds())

    def _put(self, identifier: str, fd: int) -> None:
        # systemd would drop a descriptor that polls as an error, which a socket does while its link is down.
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
    """The holder that this process was started with: s6's at the socket `fd_holder` if given, systemd's, or none.

    Call it once, before other descriptors are opened. Raises InvalidArgumentError.
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
        # Without the prefix a name has no number, and so is foreign.
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
    """Those of `entries` (identifier, descriptor) that are numbered names; all others are closed."""
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
