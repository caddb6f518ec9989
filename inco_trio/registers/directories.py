"""One IRQ directory: what is done to its files. All of it is relative to a descriptor of the directory."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import attrs

from inco_trio.registers import inotify as ino
from inco_trio.registers.inotify import Inotify
from inco_trio.signals import Signal

__all__ = ["ANCESTOR_MASK", "IrqDirectory"]

STATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
FILE_MODE = 0o666 | stat.S_IFREG
TRIGGER_MASK = ino.IN_CLOSE_WRITE | ino.IN_MODIFY | ino.IN_DONT_FOLLOW
NAMES_MASK = (
    ino.IN_CREATE
    | ino.IN_DELETE
    | ino.IN_MOVED_FROM
    | ino.IN_MOVED_TO
    | ino.IN_DELETE_SELF
    | ino.IN_MOVE_SELF
    | ino.IN_ONLYDIR
)
# Added to the mask, as the directory above one may be an IRQ directory itself.
ANCESTOR_MASK = ino.IN_MOVE_SELF | ino.IN_DELETE_SELF | ino.IN_ONLYDIR | ino.IN_MASK_ADD

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a symlink", stat.S_IFSOCK: "a socket"}


@attrs.define(eq=False)
class IrqDirectory:
    """The directory at `path`, with its registers; `fd` is -1 until it is opened.

    Every method raises OSError for what the kernel refuses; nothing waits.
    """

    path: Path
    states: set[str] = attrs.Factory(set)
    outbound: list[Signal] = attrs.Factory(list)
    fd: int = -1
    wd: int = -1
    _identity: tuple[int, int] = (0, 0)

    @property
    def current(self) -> bool:
        """Whether the path leads to the directory that is open."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - twice as fast as Path.stat, and run for every batch
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def open(self, inotify: Inotify, *, make: bool) -> None:
        """Open the directory that the path leads to now, and watch its names; `make` it and its parents if missing."""
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wd = inotify.watch(f"/proc/self/fd/{fd}/.", NAMES_MASK)
            found = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        self.close(inotify)
        self.fd, self.wd, self._identity = fd, wd, (found.st_dev, found.st_ino)

    def close(self, inotify: Inotify) -> None:
        """Close the directory, and end the watch on its names."""
        if self.wd >= 0:
            inotify.unwatch(self.wd)
            self.wd = -1
        self.release()

    def release(self) -> None:
        """Close the directory; the watch stays, for a successor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def make_states(self) -> None:
        """Make missing state registers; existing ones are left as they are. The OSError has the path."""
        for register in self.states:
            try:
                # mknod, not open: nothing is closed that somebody may be watching.
                os.mknod(register, FILE_MODE, dir_fd=self.fd)
            except FileExistsError:
                continue
            except OSError as error:
                error.filename = str(self.path / register)
                raise

    def write(self, register: str) -> None:
        """Write a state register: an open, write and close of its own, as consumers may count them."""
        fd = os.open(register, STATE_FLAGS, 0o666, dir_fd=self.fd)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)

    def watch_trigger(self, register: str, inotify: Inotify) -> int:
        """Watch a trigger's file; 0 if there is none. What is no regular file is refused with EINVAL."""
        try:
            mode = os.stat(register, dir_fd=self.fd, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, f"is no regular file but {_KINDS.get(stat.S_IFMT(mode), 'a device')}")
            return inotify.watch(f"/proc/self/fd/{self.fd}/{register}", TRIGGER_MASK)
        except FileNotFoundError:
            return 0

    def make_trigger(self, register: str, inotify: Inotify, note: Callable[[int], None]) -> int:
        """Make a missing trigger; 0 if somebody else made it first.

        It is watched, and `note` is called with its watch descriptor, before it is visible.
        """
        temporary = f".inco-trio.{os.getpid()}"
        self._unlink(temporary)  # A namesake may have been killed here; in a container, numbers recur.
        try:
            os.mknod(temporary, FILE_MODE, dir_fd=self.fd)
            wd = inotify.watch(f"/proc/self/fd/{self.fd}/{temporary}", TRIGGER_MASK)
            note(wd)
            try:
                os.link(temporary, register, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            except FileExistsError:
                return 0
            except OSError:
                # A filesystem without hard links: make it in place, visible an instant before it is watched.
                os.mknod(register, FILE_MODE, dir_fd=self.fd)
                note(wd := self.watch_trigger(register, inotify))
            return wd
        finally:
            self._unlink(temporary)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)
