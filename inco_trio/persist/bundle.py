"""Store many descriptors as one, because s6-fdholder-getdump fails with several hundred descriptors.

The descriptors are queued in a Unix stream socket, as SCM_RIGHTS messages (unix(7)), and the fd store keeps the socket.
A successor peeks at the messages (MSG_PEEK), which opens copies of the descriptors and leaves the queue unchanged.
Later changes are appended as a line of text and a descriptor. When the queue is full, a new socket is stored instead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from inco_trio.errors import STRERROR, from_os_error
from inco_trio.linux.sockets import SO_PEEK_OFF
from inco_trio.persist.fdstore import FdStore

__all__ = ["Bundle"]

NAME = "bundle"
MESSAGE_FDS = 250
"""Maximum number of descriptors in one message; SCM_MAX_FD is 253."""
MESSAGE_SIZE = 1 << 16
FULL = f"{STRERROR}: raise ulimit -n"
STORED, REMOVED = b"+", b"-"


class Bundle:
    """An `FdStore` that stores only one descriptor in `outer`. `kept` has open copies of all stored descriptors."""

    def __init__(self, outer: FdStore) -> None:
        self.supervisor = outer.supervisor
        self._outer = outer
        self.kept: dict[str, int] = {}
        held = outer.inherited.get(NAME)
        if held is not None:
            with socket.socket(fileno=os.dup(held)) as former:
                self._look(former)
        self._entry: socket.socket | None = None
        self._renew()

    def _look(self, former: socket.socket) -> None:
        """Open copies of the queued descriptors."""
        former.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(former, MESSAGE_SIZE, MESSAGE_FDS, flags)
            except BlockingIOError:
                return
            if not text:
                return
            following = iter(fds)
            for line in text.splitlines():
                name = os.fsdecode(line[1:])
                self._forget(name)
                if line.startswith(STORED):
                    self.kept[name] = next(following)

    def store(self, name: str, fd: int) -> None:
        try:
            kept = os.dup(fd)
        except OSError as error:
            raise from_os_error(error, "cannot store descriptors", FULL) from error
        self._forget(name)
        self.kept[name] = kept
        self._append(STORED + os.fsencode(name) + b"\n", [kept])

    def remove(self, name: str) -> None:
        if name in self.kept:
            self._forget(name)
            self._append(REMOVED + os.fsencode(name) + b"\n", [])

    def _forget(self, name: str) -> None:
        if (fd := self.kept.pop(name, None)) is not None:
            os.close(fd)

    def _append(self, text: bytes, fds: Sequence[int]) -> None:
        assert self._entry is not None  # noqa: S101 - see `__init__`
        try:
            socket.send_fds(self._entry, [text], fds)
        except BlockingIOError:
            self._renew()
        except OSError as error:
            raise from_os_error(error, "cannot store descriptors", FULL) from error

    def _renew(self) -> None:
        """Queue all descriptors in a new socket, and store that socket."""
        try:
            entry, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            names = list(self.kept)
            for start in range(0, len(names), MESSAGE_FDS):
                some = names[start : start + MESSAGE_FDS]
                text = b"".join(STORED + os.fsencode(name) + b"\n" for name in some)
                socket.send_fds(entry, [text], [self.kept[name] for name in some])
        except OSError as error:
            raise from_os_error(error, "cannot store descriptors", FULL) from error
        entry.setblocking(False)
        with queue:
            self._outer.store(NAME, queue.fileno())
        if self._entry is not None:
            self._entry.close()
        self._entry = entry

    def close(self) -> None:
        """Close the copies of the descriptors. The fd store keeps its own."""
        for name in tuple(self.kept):
            self._forget(name)
        if self._entry is not None:
            self._entry.close()
