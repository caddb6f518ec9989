"""Core 0 for blocking code: write trigger files and watch state files, as applications do, without an event loop."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from inco_trio.errors import STRERROR, IncoError, InvalidArgumentError, ProxyNotFoundError, ResourceError, from_os_error
from inco_trio.linux import inotify as ino
from inco_trio.signals import Direction, Signal

__all__ = ["OverflowedError", "Report", "Watch", "register_error", "trigger"]

Report = Callable[[Signal | IncoError], None]
"""A callback. It receives the signal of each notification, or an error if notifications may be missing."""

# A register directory may be the parent of another one. IN_MASK_ADD keeps the mask of the existing watch.
_PATH = ino.IN_MOVED_TO | ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR | ino.IN_MASK_ADD
_PARENT = _PATH | ino.IN_CREATE
# IN_MODIFY events separate the close events. Otherwise the kernel would merge identical unread events (inotify(7)).
_DIRECTORY = _PATH | ino.IN_CLOSE_WRITE | ino.IN_MODIFY
_CLOSE_WRITE = ino.IN_CLOSE_WRITE
_WRITES = ino.IN_CLOSE_WRITE | ino.IN_MODIFY
_ABSENT = (FileNotFoundError, NotADirectoryError)
_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class OverflowedError(ResourceError):
    """The inotify queue overflowed: notifications may be missing."""


def trigger(path: Path) -> None:
    """Open an existing trigger file, write `1` and close the file. Raises the errors that `register_error` returns."""
    try:
        fd = os.open(path, _FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError as error:
        raise register_error(error, path) from error


def register_error(error: OSError, path: Path) -> IncoError:
    """Return the error for a register or IRQ directory that cannot be used."""
    missing = ((errno.ENOENT, errno.ENOTDIR), ProxyNotFoundError, "missing: the proxy creates it (is a proxy running?)")
    unfit = ((errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EINVAL), InvalidArgumentError, "not a regular file")
    return from_os_error(error, path, STRERROR, missing, unfit)


@attrs.define(eq=False)
class _Directory:
    """A directory of registers, which may be deleted, recreated or replaced."""

    path: Path
    report: Report
    signals: dict[bytes, list[Signal]] = attrs.Factory(dict)
    """The signals by file name. Inbound signals may share a file."""
    wd: int = -1
    """The watch on the directory, or -1 while the directory is missing."""
    parent_wd: int = -1
    """The watch on the nearest ancestor directory that exists."""
    child: bytes = b""
    """The component of `path` that follows the directory watched by `parent_wd`."""


class Watch:
    """An inotify(7) watcher for registers. Programs can wait for `fileno` with select(2). Raises ResourceError.

    A notification occurs when a process closes a state or trigger file that it had opened for writing. A rename to the
    path of a trigger file is also a notification. Replaced directories are watched again.
    """

    def __init__(self) -> None:
        try:
            self._inotify = ino.Inotify()
        except OSError as error:
            hint = "raise fs.inotify.max_user_instances or ulimit -n"
            raise ResourceError(f"inotify: {error.strerror}: {hint}") from error
        self._directories: dict[int, list[_Directory]] = {}
        self._buffer = memoryview(bytearray(1 << 16))

    def fileno(self) -> int:
        """Return a descriptor that is readable when `drain` has events to read."""
        return self._inotify.fd

    def follow(self, signals: Iterable[Signal], report: Report, *, missing_ok: bool = False) -> None:
        """Report new notifications of `signals`. Directories must exist unless `missing_ok`. Raises IncoError."""
        directories: dict[Path, _Directory] = {}
        for signal in signals:
            directory = directories.setdefault(signal.directory, _Directory(signal.directory, report))
            directory.signals.setdefault(os.fsencode(signal.register), []).append(signal)
        for directory in directories.values():
            self._look(directory)
            if directory.wd < 0 and not missing_ok:
                raise register_error(FileNotFoundError(errno.ENOENT, ""), directory.path)

    def forget(self, report: Report) -> None:
        """Stop calling `report`."""
        for directory in self._all():
            if directory.report == report:
                self._release(directory, {directory.wd, directory.parent_wd})

    def _release(self, directory: _Directory, wds: set[int]) -> None:
        for wd in wds & self._directories.keys():
            self._directories[wd].remove(directory)
            if not self._directories[wd]:
                del self._directories[wd]
                self._inotify.unwatch(wd)

    def _look(self, directory: _Directory) -> None:
        """Watch the directory, if it exists, and its nearest existing ancestor."""
        before = {directory.wd, directory.parent_wd}
        directory.wd = directory.parent_wd = -1
        path = directory.path
        try:
            for parent in path.parents:
                try:
                    # Watch the ancestor first, so that an event reports the directory if it appears in between.
                    directory.parent_wd = self._inotify.watch(str(parent), _PARENT)
                    break
                except (*_ABSENT, PermissionError):
                    path = parent
            directory.child = os.fsencode(path.name)
            with contextlib.suppress(*_ABSENT):
                directory.wd = self._inotify.watch(str(directory.path), _DIRECTORY)
        except OSError as error:
            raise register_error(error, directory.path) from error
        finally:
            now = {directory.wd, directory.parent_wd} - {-1}
            for wd in now - before:
                self._directories.setdefault(wd, []).append(directory)
            self._release(directory, before - now)

    async def wait_readable(self) -> None:
        """Wait in a Trio program until `drain` has events to read."""
        await self._inotify.wait_readable()

    def drain(self) -> None:
        """Report queued notifications without waiting. Exceptions that `report` raises propagate to the caller."""
        while length := self._inotify.read_into(self._buffer):
            for wd, mask, name in ino.parse_events(self._buffer[:length]):
                if mask & _WRITES:  # Handle writes first and quickly, so that many writes do not overflow the queue.
                    if mask & _CLOSE_WRITE:
                        for directory in self._directories.get(wd, ()):
                            for signal in directory.signals.get(name, ()) if wd == directory.wd else ():
                                directory.report(signal)
                    continue
                for directory in self._affected(wd, mask):
                    self._event(directory, wd, mask, name)
                if mask & ino.IN_IGNORED:
                    self._inotify.forget(wd)

    def _all(self) -> set[_Directory]:
        return {directory for several in self._directories.values() for directory in several}

    def _affected(self, wd: int, mask: int) -> list[_Directory]:
        if mask & ino.IN_Q_OVERFLOW:
            for report in {directory.report for directory in self._all()}:
                report(OverflowedError("the inotify queue overflowed: notifications may have been missed"))
            return list(self._all())
        return list(self._directories.pop(wd, ()) if mask & ino.IN_IGNORED else self._directories.get(wd, ()))

    def _event(self, directory: _Directory, wd: int, mask: int, name: bytes) -> None:
        appeared = mask & (ino.IN_CREATE | ino.IN_MOVED_TO) and (wd, name) == (directory.parent_wd, directory.child)
        if appeared or mask & (ino.IN_Q_OVERFLOW | ino.IN_IGNORED | ino.IN_DELETE_SELF | ino.IN_MOVE_SELF):
            try:
                self._look(directory)
            except IncoError as error:
                directory.report(error)
        elif wd == directory.wd and mask & ino.IN_MOVED_TO:
            for signal in directory.signals.get(name, ()):
                if signal.direction is Direction.OUTBOUND:
                    directory.report(signal)

    def close(self) -> None:
        self._inotify.close()
