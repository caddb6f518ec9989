"""One IRQ directory: its descriptor, and the files that the proxy creates and watches in it."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from inco_trio.backoff import Backoff
from inco_trio.linux import inotify as ino
from inco_trio.linux.files import fuse_user, kind_of_file, mount_id
from inco_trio.linux.inotify import Watcher
from inco_trio.trust import Trust, UnfitFileError, open_trusted

__all__ = ["EMPTIED", "PATIENCE", "TEMPORARY", "Directory", "proc_is_mounted", "temporary_name", "watch_key"]

PATIENCE = 0.03
"""Seconds to wait before recreating a deleted file, because another process may be about to replace it."""
EMPTIED = 1.0
"""Seconds to wait before recreating a deleted file in an empty directory, which is probably being removed."""
WRITE_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
TEMPORARY = ".inco-trio."
"""The prefix of the temporary file names that all proxies use."""
SEARCHED_MAX = 4096
"""Maximum number of files in a directory that are searched for temporary names. A search takes some milliseconds."""
KIND = stat.S_IFMT(0xFFFF)
"""The bits of `st_mode` that contain the type of the file."""
OTHER_FILESYSTEM = "not on the same filesystem as its directory"
FILE_MODE = 0o666 | stat.S_IFREG
TRIGGER_MASK = ino.IN_CLOSE_WRITE | ino.IN_MODIFY | ino.IN_DONT_FOLLOW


def watch_key(path: Path) -> bytes:
    """Return the key of a path in `Inflight.watches`."""
    # Use hexadecimal digits, because a key must not end in NUL.
    return blake2b(os.fsencode(path), digest_size=32).hexdigest().encode()


def temporary_name() -> str:
    """Return the temporary name of a new trigger file that is not watched yet."""
    return f"{TEMPORARY}{os.getpid()}"


class Directory:
    """An IRQ directory. `fd` is -1 while the directory is not open.

    Methods do not block. They raise OSError, or UnfitFileError for a file that is not regular.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: set[str] = set()
        """The names of the state files."""
        self.fd = -1
        self.wd = 0
        """The watch descriptor of the directory, or 0 if the directory is not watched."""
        self.identity: tuple[int, int] = 0, 0
        self.shared = False
        """Whether a user other than root and the proxy's own user may change the file names in the directory."""
        self.trust = Trust()
        """The users whom the proxy trusted when it last opened or checked the directory."""
        self.checked: set[bytes] = set()
        """The names of state files that passed `check` and that no event has reported as changed since.

        This set is empty while the directory is not open or is `shared`. In a shared directory, another user could
        replace a file before the proxy reads the event.
        """
        self.devices: set[int] = set()
        """The device numbers of files on the directory's filesystem. An overlayfs may have several device numbers."""
        self.above: set[int] = set()
        """The watch descriptors of the ancestor directories."""
        self.openings = 0
        """A number that changes whenever this process opens or loses the directory; 0 before that."""
        self.awaited_in = 0
        """While the directory is missing, the watch descriptor of its nearest existing ancestor; otherwise 0."""
        self.missing_since: float | None = None
        """When the path was first found missing or could not be opened (real_clock.monotonic())."""
        self.states_missing_since: float | None = None
        self.vanished_at = -math.inf
        """When a name in the directory was last deleted or moved away."""
        self.making_in = 0
        """Equal to `wd` between the events IN_CREATE and IN_DELETE of the file `temporary_name`; otherwise 0."""
        self.any_making_in = 0
        """Like `making_in`, but for the temporary file of any proxy, such as a predecessor that was killed."""
        self.retry_at = math.inf
        self.troubled_again = False
        """Whether another operation in the directory failed during the last retry."""
        self.backoff = Backoff()
        self._path = os.fsencode(path)

    @property
    def current(self) -> bool:
        """Whether `path` still refers to the open directory."""
        if self.fd < 0:
            return False
        try:
            if self.shared:
                # A plain stat(2) could block on a FUSE filesystem that another user has mounted over the path.
                fd, found = open_trusted(self.path, self.trust)
                os.close(fd)
            else:
                found = os.stat(self._path)  # noqa: PTH116 - twice as fast as Path.stat, and run for every batch
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.identity

    @property
    def patience(self) -> float:
        """Seconds to wait before recreating a deleted file."""
        try:
            with os.scandir(self.name(".")) as entries:
                return PATIENCE if next(entries, None) is not None else EMPTIED
        except OSError:
            return PATIENCE

    def found_trusted(self, trust: Trust, found: os.stat_result) -> None:
        """Store the users whom the proxy trusted when it opened or checked the directory. `found` is its status."""
        self.shared, self.trust = trust.shares(found), trust
        if self.shared:
            self.checked.clear()

    def name(self, register: str) -> str:
        """Return a path to a file in the open directory that stays valid if the directory is moved."""
        # Without /proc, the path may refer to a different directory by now. The caller checks for this afterwards.
        return f"/proc/self/fd/{self.fd}/{register}" if proc_is_mounted() else str(self.path / register)

    def release(self) -> None:
        """Close the descriptor. The watch remains for the next process."""
        self.checked.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def make_state(self, register: str) -> None:
        """Create a state file unless it exists. Raises OSError with the path as `filename`."""
        try:
            # Use mknod(2), because closing a file after open(2) would count as a notification.
            os.mknod(register, FILE_MODE, dir_fd=self.fd)
        except FileExistsError:
            pass
        except OSError as error:
            error.filename = str(self.path / register)
            raise

    def status(self, register: str | bytes) -> os.stat_result:
        """Return the status of the file with the name `register`, without following a symlink. Raises OSError."""
        if not self.shared:
            return os.stat(register, dir_fd=self.fd, follow_symlinks=False)
        with self._pinned(register) as fd:
            return os.fstat(fd)

    @contextlib.contextmanager
    def _pinned(self, register: str | bytes) -> Iterator[int]:
        """Open a register with O_PATH while the block runs. Raise UnfitFileError if a FUSE filesystem is mounted over
        it.

        The descriptor refers to the same file even if another user mounts a filesystem over its name afterwards.
        """
        fd = os.open(register, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            # Check this before fstat(2), which can block on a FUSE filesystem.
            if proc_is_mounted() and mount_id(fd) != mount_id(self.fd) and fuse_user(fd) is not None:
                raise UnfitFileError(self.path / os.fsdecode(register), OTHER_FILESYSTEM, "unmount it")
            yield fd
        finally:
            os.close(fd)

    def open_shared(self, register: str | bytes) -> int:
        """Check a state file in a `shared` directory and open it for writing, without waiting for another user."""
        with self._pinned(register) as pinned:
            self.check(register, pinned)  # Check before open(2), which has side effects on some devices.
            if proc_is_mounted():
                fd = os.open(f"/proc/self/fd/{pinned}", WRITE_FLAGS & ~os.O_NOFOLLOW)
            else:
                fd = os.open(register, WRITE_FLAGS, dir_fd=self.fd)
        try:
            self.check(register, fd)  # Another user may have replaced or hard-linked the file before open(2).
            if not os.fstat(fd).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the file has been removed")
        except OSError:
            os.close(fd)
            raise
        return fd

    def check(self, register: str | bytes, opened: int | None = None) -> None:
        """Check that a register is a regular file with only one name, on the directory's filesystem.

        `opened` is an open descriptor of the register. If it is None, check the file that has the name `register`.
        """
        found = self.status(register) if opened is None else os.fstat(opened)
        if found.st_mode & KIND != stat.S_IFREG or found.st_nlink != 1 or found.st_dev not in self.devices:
            self._check_unusual(os.fsdecode(register), found)

    def _check_unusual(self, register: str, found: os.stat_result) -> None:
        path = self.path / register
        if not stat.S_ISREG(found.st_mode):
            what = f"not a regular file but {kind_of_file(found.st_mode)}"
            raise UnfitFileError(path, what, "remove it, or configure another register")
        if found.st_nlink > 1 and not self._unlink_temporaries(found):
            remedy = "replace it with a new file, or remove its other names"
            raise UnfitFileError(path, f"has {found.st_nlink} names (hard links)", remedy)
        if found.st_dev not in self.devices:
            if not self._is_on_same_mount(register):
                raise UnfitFileError(path, OTHER_FILESYSTEM, "unmount it")
            self.devices.add(found.st_dev)

    def _unlink_temporaries(self, found: os.stat_result) -> bool:
        """Remove temporary names of a trigger that a killed proxy left behind. Return whether only one name remains.

        Search only part of a large directory, because an application could create millions of files.
        """
        names = 0
        with contextlib.suppress(OSError), os.scandir(self.name(".")) as entries:
            for entry in islice(entries, SEARCHED_MAX):
                if entry.name.startswith(TEMPORARY) and entry.inode() == found.st_ino:
                    self._unlink(entry.name)
                    names += 1
        return found.st_nlink - names == 1

    def _is_on_same_mount(self, register: str) -> bool:
        """Return whether a register is on the directory's mount. An overlayfs has a device number for each layer."""
        fd = os.open(register, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return mount_id(fd) == mount_id(self.fd)
        finally:
            os.close(fd)

    def watch_trigger(self, register: str, inotify: Watcher) -> int:
        """Watch a trigger and return the watch descriptor, or 0 if the file is missing."""
        try:
            if self.shared:
                return self._watch_shared(register, inotify)
            self.check(register)
            return inotify.watch(self.name(register), TRIGGER_MASK)
        except FileNotFoundError:
            return 0

    def _watch_shared(self, register: str, inotify: Watcher) -> int:
        """Check a file in a `shared` directory and watch it, without waiting for another user."""
        with self._pinned(register) as pinned:
            self.check(register, pinned)
            if not proc_is_mounted():
                return inotify.watch(self.name(register), TRIGGER_MASK)
            # Follow the link in /proc to the pinned file. The file itself is not a symlink.
            return inotify.watch(f"/proc/self/fd/{pinned}", TRIGGER_MASK & ~ino.IN_DONT_FOLLOW)

    def make_trigger(self, register: str, inotify: Watcher, note: Callable[[int], None]) -> int:
        """Create a missing trigger and return its watch descriptor. Return 0 if another process has created the file.

        Before the file becomes visible, it is watched and `note` is called with the watch descriptor.
        """
        temporary = temporary_name()
        self._unlink(temporary)  # An earlier process with our PID may have left this file; PIDs repeat in containers.
        try:
            os.mknod(temporary, FILE_MODE, dir_fd=self.fd)
            if self.shared:
                wd = self._watch_shared(temporary, inotify)
            else:
                wd = inotify.watch(self.name(temporary), TRIGGER_MASK)
            note(wd)
            try:
                os.link(temporary, register, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            except FileExistsError:
                return 0
            except OSError:
                # The filesystem does not support hard links. The new file is briefly visible before it is watched.
                os.mknod(register, FILE_MODE, dir_fd=self.fd)
                note(wd := self.watch_trigger(register, inotify))
            return wd
        finally:
            self._unlink(temporary)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:  # Such as a directory with this name.
            error.filename = str(self.path / name)
            raise


def proc_is_mounted() -> bool:
    return os.path.exists("/proc/self/fd")  # noqa: PTH110 - faster than Path.exists, and called for each watched file
