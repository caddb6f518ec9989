"""An inotify descriptor with its watches, and a decoder of events (inotify(7)).

pyinotify's WatchManager manages the watches. Its Notifier is not used: it is ten times slower than this decoder and
hides overflows of the queue.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import termios
import warnings
from typing import NamedTuple, Protocol

with warnings.catch_warnings():
    # pyinotify imports asyncore, which is deprecated. Python 3.12 removed it, and the package pyasyncore replaces it.
    warnings.simplefilter("ignore", DeprecationWarning)
    import pyinotify

from inco_trio.linux.libc import libc

__all__ = ["EVENT", "PADDED_MAX", "Event", "Inotify", "Watcher", "pack_event", "parse_events"]

IN_OPEN: int = pyinotify.IN_OPEN
IN_MODIFY: int = pyinotify.IN_MODIFY
IN_CLOSE_WRITE: int = pyinotify.IN_CLOSE_WRITE
IN_ATTRIB: int = pyinotify.IN_ATTRIB
IN_MOVED_FROM: int = pyinotify.IN_MOVED_FROM
IN_MOVED_TO: int = pyinotify.IN_MOVED_TO
IN_CREATE: int = pyinotify.IN_CREATE
IN_DELETE: int = pyinotify.IN_DELETE
IN_DELETE_SELF: int = pyinotify.IN_DELETE_SELF
IN_MOVE_SELF: int = pyinotify.IN_MOVE_SELF
IN_UNMOUNT: int = pyinotify.IN_UNMOUNT
IN_Q_OVERFLOW: int = pyinotify.IN_Q_OVERFLOW
IN_IGNORED: int = pyinotify.IN_IGNORED
IN_DONT_FOLLOW: int = pyinotify.IN_DONT_FOLLOW
IN_ONLYDIR: int = pyinotify.IN_ONLYDIR
IN_MASK_ADD: int = pyinotify.IN_MASK_ADD
IN_ISDIR: int = pyinotify.IN_ISDIR
IN_ALL_EVENTS: int = pyinotify.ALL_EVENTS

EVENT = struct.Struct("=iIII")
"""struct inotify_event: wd, mask, cookie, and the length of the NUL-padded name that follows."""
PADDED_MAX = 256
"""Maximum length of a NUL-padded name in an event. A name has at most 255 bytes (NAME_MAX)."""


class Event(NamedTuple):
    """One event: watch descriptor (-1 for an overflow), IN_* mask, and name (only for watches on directories)."""

    wd: int
    mask: int
    name: bytes


def pack_event(wd: int, mask: int) -> bytes:
    """Return the bytes that read(2) returns for an event without a name."""
    return EVENT.pack(wd, mask, 0, 0)


def parse_events(data: bytes | memoryview) -> list[Event]:
    """Return the events in `data`, in order. Stop at an empty mask or an incomplete event."""
    events = []
    unpack, head = EVENT.unpack_from, EVENT.size
    offset, end = 0, len(data)
    while offset + head <= end:
        wd, mask, _cookie, length = unpack(data, offset)
        offset += head
        if not mask or offset + length > end:
            break
        name = bytes(data[offset : offset + length]).rstrip(b"\0") if length else b""
        offset += length
        events.append(Event(wd, mask, name))
    return events


class Watcher(Protocol):
    """The watches of one proxy: an `Inotify`, or a part of a shared one (`proxy.share`)."""

    read: int

    def watch(self, path: str, mask: int) -> int: ...
    def unwatch(self, wd: int) -> None: ...
    def forget(self, wd: int) -> None: ...
    @property
    def queued(self) -> int: ...
    def read_into(self, buffer: memoryview) -> int: ...
    async def wait_readable(self) -> None: ...


libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


class _Libc(pyinotify.INotifyWrapper):  # type: ignore[misc]  # pyinotify has no types
    """The system calls for WatchManager. pyinotify's own wrapper would run ldconfig to find the C library."""

    def __init__(self) -> None:
        """Do nothing: the C library is already loaded."""

    def _get_errno(self) -> int:
        return ctypes.get_errno()

    def _inotify_init(self) -> int:
        return int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def _inotify_add_watch(self, fd: int, path: str, mask: int) -> int:
        return int(libc.inotify_add_watch(fd, os.fsencode(path), mask))

    def _inotify_rm_watch(self, fd: int, wd: int) -> int:
        return int(libc.inotify_rm_watch(fd, wd))


class _Watches(pyinotify.WatchManager):  # type: ignore[misc]  # pyinotify has no types
    """A WatchManager with an inherited or new descriptor."""

    def __init__(self, held: int | None) -> None:
        self._exclude_filter = lambda _path: False
        self._ignore_events = False
        self._wmd: dict[int, object] = {}
        self._inotify_wrapper = _Libc()
        self._fd: int = self._inotify_wrapper.inotify_init() if held is None else held
        if self._fd < 0:
            number = self._inotify_wrapper.get_errno()
            raise OSError(number, os.strerror(number), "inotify")


class Inotify:
    """A non-blocking inotify descriptor (`fd`) and its watches."""

    def __init__(self, held: int | None = None) -> None:
        """Open a descriptor, or take over `held` with its watches and queue. Raises OSError (inotify_init(2))."""
        if held is not None:
            os.set_blocking(held, False)  # Another process that shares the open file may have changed this flag.
        self._watches = _Watches(held)
        self.fd: int = self._watches.get_fd()
        self.read = 0
        """Total number of bytes read so far."""

    async def wait_readable(self) -> None:
        import trio  # Import Trio only here: the import takes 0.1 s, and blocking programs do not need it.

        await trio.lowlevel.wait_readable(self.fd)

    def watch(self, path: str, mask: int) -> int:
        """Watch `path`, and return the watch descriptor of the inode. Raises OSError (inotify_add_watch(2))."""
        try:
            (wd,) = self._watches.add_watch(path, mask, quiet=False).values()
        except pyinotify.WatchManagerError:
            number = ctypes.get_errno()
            reason = os.strerror(number)
            if number == errno.ENOSPC:
                # Replace the kernel's misleading message, "No space left on device".
                reason = "the limit of inotify watches is reached: raise fs.inotify.max_user_watches"
            raise OSError(number, reason, path) from None
        return int(wd)

    def unwatch(self, wd: int) -> None:
        """Remove a watch, or forget it if the kernel has already removed it."""
        if self._watches.get_watch(wd) is None:
            # WatchManager has no record of the watches of an inherited descriptor.
            self._watches._inotify_wrapper.inotify_rm_watch(self.fd, wd)
        else:
            try:
                self._watches.rm_watch(wd, quiet=False)
            except pyinotify.WatchManagerError:
                self._watches.del_watch(wd)

    def forget(self, wd: int) -> None:
        """Forget a watch that the kernel has removed (IN_IGNORED)."""
        if self._watches.get_watch(wd) is not None:
            self._watches.del_watch(wd)

    @property
    def queued(self) -> int:
        """Return the size of the unread events in bytes."""
        return int(struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0])

    def read_into(self, buffer: memoryview) -> int:
        """Read as many events as fit into `buffer`. Return the number of bytes, or 0 if no event is queued."""
        try:
            length = os.readv(self.fd, (buffer,))
        except BlockingIOError:
            return 0
        self.read += length
        return length

    def close(self) -> None:
        """Close the descriptor. The queue and the watches persist as long as another process holds the descriptor."""
        os.close(self.fd)
