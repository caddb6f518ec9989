"""Store many descriptors in one entry of the fd store: s6-fdholder-getdump fails with several hundred entries.

The descriptors are queued in a Unix stream socket, as SCM_RIGHTS messages (unix(7)), and the fd store keeps the socket.
The next process peeks at the messages (MSG_PEEK), which opens copies of the descriptors and leaves the queue unchanged.
Each later change adds a message. When the queue is full or contains many changes, a new socket with all descriptors
replaces the old socket. Until then, the descriptors of both sockets are in transit, which the kernel limits.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from inco_trio.errors import STRERROR, IncoError, from_os_error
from inco_trio.linux.sockets import RECEIVED_WITH_DATA, SO_PEEK_OFF, set_send_buffer
from inco_trio.persist.fdstore import IN_TRANSIT, FdStore, OverfullError, inherited_fd

__all__ = ["Bundle"]

logger = logging.getLogger(__name__)

NAME = "bundle"
SCM_MAX_FD = 253
"""The kernel's limit of descriptors in one message."""
MESSAGE_FDS = 250
"""Maximum number of descriptors in one message of a bundle."""
SEND_BUFFER = 1 << 24
"""Requested size of the send buffer in bytes, which limits the queue. It is enough for 400,000 descriptors."""
READ_SIZE = 1 << 18
"""Bytes per read; every message is shorter. The kernel returns the descriptors again with each part of a message."""
FULL = f"{STRERROR}: raise ulimit -n"
OVERFULL = "%d descriptors exceed a send buffer: raise net.core.wmem_max, or run fewer boards in a process"
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""Errors that occur if the process cannot receive the descriptors at the moment, although the bundle may be valid."""
_REFUSED = ((errno.ETOOMANYREFS,), OverfullError, IN_TRANSIT)
STORED, REMOVED = b"+", b"-"
INVALID = "fd store: the stored bundle of descriptors is invalid: starting without it; the notifications in it are lost"
_LINES = re.compile(rb"(?:[+-][^\0\n]+\n)*")


class Bundle:
    """An `FdStore` that uses one entry of `outer`, another fd store. `kept` has open copies of all descriptors."""

    def __init__(self, outer: FdStore) -> None:
        self.supervisor = outer.supervisor
        self._outer = outer
        self.kept: dict[str, int] = {}
        self._inherited: set[str] = set()
        """The descriptors in `kept` that a former process has stored."""
        self._outdated = False
        """Whether the queue contains such a descriptor that has been replaced or removed."""
        held = inherited_fd(outer.inherited, NAME)
        if held is not None:
            with socket.socket(fileno=os.dup(held)) as former:
                self._look(former)
        self._entry: socket.socket | None = None
        self._changes = 0
        """The number of changes since the last attempt to replace the queue.

        Descriptors that have been replaced or removed stay open until the queue is replaced.
        """
        self._renew()

    def _look(self, former: socket.socket) -> None:
        """Add copies of the descriptors queued in `former` to `kept`. If the queue is invalid, log a warning instead.

        Raises ResourceError.
        """
        fds: list[int] = []
        try:
            text = _peek(former, fds)
            if not _LINES.fullmatch(text) or sum(line.startswith(STORED) for line in text.splitlines()) != len(fds):
                logger.warning(INVALID)
                return
            for line in text.split(b"\n")[:-1]:
                name = os.fsdecode(line[1:])
                self._forget(name)
                if line.startswith(STORED):
                    self.kept[name] = fds.pop(0)
        except OSError as error:
            if error.errno in _LIMITS:
                raise from_os_error(error, "cannot take over the stored descriptors", FULL) from error
            logger.warning(INVALID)  # EINVAL: the socket listens, or is not connected.
            return
        finally:
            for fd in fds:
                os.close(fd)
        for name in tuple(self.kept):
            inherited_fd(self.kept, name)
        self._inherited = {*self.kept}

    def store(self, name: str, fd: int) -> None:
        try:
            kept = os.dup(fd)
        except OSError as error:
            raise from_os_error(error, "cannot store descriptors", FULL, _REFUSED) from error
        self._forget(name)
        self.kept[name] = kept
        self._append(STORED + os.fsencode(name) + b"\n", [kept])

    def remove(self, name: str) -> None:
        if name in self.kept:
            self._forget(name)
            self._append(REMOVED + os.fsencode(name) + b"\n", [])

    def tidy(self) -> None:
        """Close inherited descriptors that have been replaced or removed. Raises ResourceError.

        A socket of a former process would otherwise remain bound to its path, although no process reads from it.
        """
        if self._outdated:
            self._renew()

    def _forget(self, name: str) -> None:
        if name in self._inherited:
            self._inherited.remove(name)
            self._outdated = True
        if (fd := self.kept.pop(name, None)) is not None:
            os.close(fd)

    def _append(self, text: bytes, fds: Sequence[int]) -> None:
        assert self._entry is not None  # noqa: S101 - set by `__init__`
        try:
            _send(self._entry, text, fds)
        except BlockingIOError:
            self._renew()
            return
        except OSError as error:
            raise from_os_error(error, "cannot store descriptors", FULL, _REFUSED) from error
        self._changes += 1
        if self._changes > max(MESSAGE_FDS, len(self.kept) // 4):
            # The queue contains the change. If a second queue exceeds a limit, keep this one, and try again later.
            self._changes = 0
            with suppress(OverfullError):
                self._renew()

    def _renew(self) -> None:
        """Queue all descriptors in a new socket, and store that socket.

        Raises OverfullError if a limit prevents this, and ResourceError if the fd store does not answer.
        """
        try:
            entry, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise _overfull(error) from error
        with ExitStack() as failed, queue:
            failed.callback(entry.close)
            try:
                self._fill(entry)
            except BlockingIOError as error:  # No process reads the queue, so waiting for room would never end.
                raise OverfullError("cannot store descriptors", OVERFULL % len(self.kept)) from error
            except OSError as error:
                raise _overfull(error) from error
            self._outer.store(NAME, queue.fileno())
            failed.pop_all()
        if self._entry is not None:
            self._entry.close()
        self._entry, self._changes, self._outdated = entry, 0, False

    def _fill(self, entry: socket.socket) -> None:
        """Queue all descriptors. Raises OSError, for example BlockingIOError if they do not fit."""
        set_send_buffer(entry, SEND_BUFFER)
        entry.setblocking(False)
        names = list(self.kept)
        for start in range(0, len(names), MESSAGE_FDS):
            some = names[start : start + MESSAGE_FDS]
            text = b"".join(STORED + os.fsencode(name) + b"\n" for name in some)
            _send(entry, text, [self.kept[name] for name in some])

    def close(self) -> None:
        """Close the copies of the descriptors. The fd store keeps its own copies."""
        for name in tuple(self.kept):
            self._forget(name)
        if self._entry is not None:
            self._entry.close()


def _overfull(error: OSError) -> IncoError:
    return from_os_error(error, "cannot store descriptors", FULL, _REFUSED, otherwise=OverfullError)


def _send(entry: socket.socket, text: bytes, fds: Sequence[int]) -> None:
    """Queue a message. Raises OSError, for example BlockingIOError if the queue has no room for the whole message."""
    if socket.send_fds(entry, [text], fds) < len(text):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _peek(queue: socket.socket, fds: list[int]) -> bytes:
    """Return the queued data, and add copies of the queued descriptors to `fds`. Raises OSError (recvmsg(2)).

    `socket.recv_fds` cannot be used: it ignores its flags, so it would remove the messages (python/cpython#128881).
    """
    queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    for option in RECEIVED_WITH_DATA:
        with suppress(OSError):  # Older kernels do not have all options.
            queue.setsockopt(socket.SOL_SOCKET, option, 0)
    # There is room for SCM_MAX_FD descriptors, so MSG_CTRUNC means that this process may not open more descriptors.
    room = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)
    text = b""
    while True:
        try:
            data, ancillary, received, _ = queue.recvmsg(READ_SIZE, room, flags)
        except BlockingIOError:  # The queue is empty, but another process still has the other end open.
            return text
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                fds += found
        if received & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if not data:
            return text
        text += data
