"""File types (inode(7)), file name limits, mount IDs (proc_pid_fdinfo(5)), and mounts (proc_pid_mountinfo(5)).

An access to a FUSE filesystem (fuse(4)) waits for the program of the user who mounted it, and not even SIGKILL may end
the wait. `Resolver` and `pinned` do not enter the FUSE filesystems of other users.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = [
    "EXHAUSTED",
    "FILE_NAME_MAX",
    "PATH_MAX",
    "TARGETS_MAX",
    "ForeignFuseError",
    "Resolver",
    "fuse_user",
    "is_path",
    "kind_of_file",
    "mount_id",
    "open_output",
    "open_output_directory",
    "pinned",
    "remove_output",
    "replace_output",
    "unlink_if_exists",
]

FILE_NAME_MAX = 255
"""Maximum length of a file name in bytes (NAME_MAX of limits.h)."""
PATH_MAX = 4095
"""Maximum length of a path in bytes (PATH_MAX of limits.h, without the NUL byte)."""

_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PINNED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_SYMLINKS_MAX = 40
"""Maximum number of symlinks that are followed, as in the kernel."""
TARGETS_MAX = 256
"""Maximum number of components in the targets of the symlinks on a path. With 40 targets such as a/../a/../..., of 4095
bytes each, the resolution would otherwise take seconds."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Error numbers that report a lack of descriptors or memory."""
_DESCRIPTORS = "/proc/self/fd"
# These expressions are compiled only once they are needed, because the proxy starts faster that way.
_OF_PROCESS = "/proc/[0-9]+/"
_FUSE_USER = rb" - fuse[^ ]* .*\buser_id=([0-9]+)"

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symlink",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind_of_file(mode: int) -> str:
    """Return the type of a file in words, for example "a directory"."""
    return _KINDS[stat.S_IFMT(mode)]


def is_path(text: str) -> bool:
    """Return whether `text` can be a path: it has no NUL byte and can be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def mount_id(fd: int) -> int:
    """Return the ID of the mount on which a descriptor was opened. Raises OSError if /proc is not mounted."""
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(info, 4096)  # The line with the ID is one of the first lines.
    finally:
        os.close(info)
    return int(text.partition(b"\nmnt_id:")[2].partition(b"\n")[0])


def fuse_user(fd: int) -> int | None:
    """Return the ID of the user who serves the files of a FUSE filesystem (fuse(4)), or None for other filesystems."""
    try:
        number = b"%d" % mount_id(fd)
        with open("/proc/self/mountinfo", "rb") as lines:  # noqa: PTH123
            found = next((re.search(_FUSE_USER, line) for line in lines if line.split(None, 1)[0] == number), None)
    except FileNotFoundError:
        return None  # /proc is not mounted.
    return None if found is None else int(found[1])


class ForeignFuseError(OSError):
    """A path leads to a FUSE filesystem of another user than root and the user of this process."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EACCES, "on a FUSE filesystem of another user", path)


class Resolver:
    """Resolves paths, and keeps descriptors (O_PATH) of the last one. `close` closes them.

    It opens each component of a path in turn, and follows symlinks. It checks the mount of each component before it
    looks up the next one, so a mount cannot get in between. Without /proc, it cannot check mounts.

    With `wary`, it follows a symlink only if root or the user of this process owns it. Other symlinks cause
    PermissionError.
    """

    def __init__(self, *, wary: bool = False) -> None:
        self._wary = wary
        self._names: list[str] = []
        """The components of the last path that exist, without symlinks."""
        self._fds = [os.open("/", _PARENT)]
        """The descriptors of the root directory and of these components."""
        self._foreign: dict[int, bool] = {}
        """Whether a mount ID belongs to a FUSE filesystem of another user."""

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def resolve(self, path: Path | str) -> str:
        """Return the path without symlinks, as os.path.realpath does. A component that cannot be opened may be one.

        Raises OSError if no descriptors or memory are left.
        """
        left = self._open_existing(path)
        return os.path.normpath("/" + "/".join([*self._names, *left]))

    def open(self, path: Path | str, *, follow: bool = True) -> int:
        """Return a descriptor of the file at `path`, which is valid until the next call. Raises OSError.

        If the last component is a symlink, follow it only with `follow`.
        """
        _, error = self._reach(path, follow=follow)
        if error is not None:
            raise error
        return self._fds[-1]

    def approach(
        self, path: Path | str, followed: Callable[[list[str], str], object] | None = None
    ) -> tuple[list[str], list[str]]:
        """Open the components of a path that exist. Return the directories, and the components that are left.

        Each directory, from the root directory on, is a path of its descriptor, which is valid until the next call.
        Without /proc, it is the path without symlinks. Raises OSError if no descriptors or memory are left.

        For each symlink, call `followed` with the directories that lead to the symlink, and its name. The symlink is
        read again after that.
        """
        left = self._open_existing(path, followed)
        if not stat.S_ISDIR(os.fstat(self._fds[-1]).st_mode):
            left = [self._names[-1], *left]
            self._go_up(len(self._names) - 1)
        return self._directories(), left

    def _directories(self) -> list[str]:
        if os.path.exists(_DESCRIPTORS):  # noqa: PTH110 - faster
            return [f"{_DESCRIPTORS}/{fd}/." for fd in self._fds]
        return ["/" + "/".join(self._names[:depth]) for depth in range(len(self._fds))]

    def is_current(self) -> bool:
        """Return whether the last path still leads to the same file. Forget the path if the file was moved or removed.

        Without /proc, return True.
        """
        try:
            found = os.readlink(f"{_DESCRIPTORS}/{self._fds[-1]}")  # noqa: PTH115 - faster
        except OSError:
            return True
        current = found == "/" + "/".join(self._names)
        if not current:
            self._go_up(0)
        return current

    def _open_existing(self, path: Path | str, followed: Callable[[list[str], str], object] | None = None) -> list[str]:
        """Open the components of a path that exist. Return those that are left.

        Raises OSError if no descriptors or memory are left.
        """
        left, error = self._reach(path, follow=True, followed=followed)
        if error is not None and error.errno in EXHAUSTED:
            raise error
        return left

    def _reach(
        self, path: Path | str, *, follow: bool, followed: Callable[[list[str], str], object] | None = None
    ) -> tuple[list[str], OSError | None]:
        """Open the components of a path. At the first error, return the components that are left, and the error."""
        text = os.fspath(path)
        left = deque(_components(text if text.startswith("/") else f"{os.getcwd()}/{text}"))  # noqa: PTH109 - as fast
        common = 0
        while common < min(len(left), len(self._names)) and left[common] == self._names[common]:
            common += 1
        self._go_up(common)
        for _ in range(common):
            left.popleft()
        symlinks = in_targets = 0
        while left:
            name = left.popleft()
            if name == "..":
                self._go_up(max(len(self._names) - 1, 0))
                continue
            try:
                target = self._enter(name, follow=follow or bool(left))
                if target is not None and followed is not None:
                    followed(self._directories(), name)
                    target = self._enter(name, follow=True)
            except OSError as error:
                return [name, *left], error
            if target is None:
                continue
            names = _components(target)
            symlinks += 1
            in_targets += len(names)
            if symlinks > _SYMLINKS_MAX or in_targets > TARGETS_MAX:
                return [name, *left], OSError(errno.ELOOP, os.strerror(errno.ELOOP), text)
            if target.startswith("/"):
                self._go_up(0)
            left.extendleft(reversed(names))
        return [], None

    def _enter(self, name: str, *, follow: bool) -> str | None:
        """Open one component. If it is a symlink to follow, close it and return its target. Raises OSError."""
        is_directory = True
        try:
            fd = os.open(name, _PINNED | os.O_DIRECTORY, dir_fd=self._fds[-1])
        except NotADirectoryError:
            fd, is_directory = os.open(name, _PINNED, dir_fd=self._fds[-1]), False
        target = None
        try:
            self._check_mount(fd, name)
            if follow and not is_directory:
                with contextlib.suppress(FileNotFoundError):  # ENOENT means that `fd` is not a symlink.
                    target = os.readlink("", dir_fd=fd)
            refused = target is not None and self._wary and os.fstat(fd).st_uid not in (0, os.geteuid())
        except BaseException:
            os.close(fd)
            raise
        if target is not None:
            os.close(fd)
            if refused:
                raise PermissionError(errno.EACCES, "a symlink of another user", "/" + "/".join([*self._names, name]))
        else:
            self._names.append(name)
            self._fds.append(fd)
        return target

    def _check_mount(self, fd: int, name: str) -> None:
        try:
            number = mount_id(fd)
        except FileNotFoundError:
            return  # /proc is not mounted.
        if number not in self._foreign:
            self._foreign[number] = fuse_user(fd) not in (None, 0, os.geteuid())
        if self._foreign[number]:
            raise ForeignFuseError("/" + "/".join([*self._names, name]))

    def _go_up(self, depth: int) -> None:
        del self._names[depth:]
        while len(self._fds) > depth + 1:
            os.close(self._fds.pop())


def _components(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


@contextlib.contextmanager
def pinned(path: Path | str, *, follow: bool = True) -> Iterator[int]:
    """Open the file at a path with O_PATH while the block runs. See `Resolver.open`. Raises OSError.

    The descriptor refers to the same file even if another user mounts a filesystem over the path afterwards.
    """
    with contextlib.closing(Resolver()) as resolver:
        yield resolver.open(path, follow=follow)


def open_output(path: Path) -> int:
    """Open a file for writing; create it if it is missing. Do not truncate it, and do not wait for readers of a FIFO.

    Follow a symlink in any component of the path only if root or this user owns it. Otherwise, another user could make
    root overwrite any file. The sysctl fs.protected_symlinks checks only the last component, and only in sticky
    directories. Each check and the next open use the same directory. Refuse a hard link if other users may write to
    its directory. Raises OSError.
    """
    return _open_way(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, check=_check_names)


def open_output_directory(path: Path, *, within: int | None = None, make: bool = False, mode: int | None = None) -> int:
    """Open a directory, in which the caller will change files, with O_PATH. Follow symlinks as `open_output` does.

    `within` is the directory of a relative path (default: the working directory). With `make`, create missing
    directories, which have the mode `mode` despite the umask. Raises OSError.
    """
    return _open_way(path, _PARENT, within=within, make=functools.partial(_make_directory, mode) if make else None)


def replace_output(name: str, data: bytes, mode: int, parent: int) -> None:
    """Atomically replace the file `name` in an open directory with a new file. Raises OSError."""
    new = f".{name}.new"
    try:
        unlink_if_exists(new, parent)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=parent)
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(data)
            os.fchmod(fd, mode)
        os.replace(new, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(OSError):  # The removal may fail for the same reason.
            unlink_if_exists(new, parent)
        raise


def unlink_if_exists(name: str, parent: int) -> None:
    """Remove the file `name` in an open directory unless it is missing. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def remove_output(path: Path) -> None:
    """Remove a file that this process has written. Follow symlinks as `open_output` does. Raises OSError."""
    parent = open_output_directory(path.parent)
    try:
        os.unlink(path.name, dir_fd=parent)
    finally:
        os.close(parent)


def _open_way(
    path: Path,
    flags: int,
    *,
    within: int | None = None,
    make: Callable[[str, int], None] | None = None,
    check: Callable[[int, str, int], None] = lambda *_: None,
) -> int:
    """Open one component of a path after the other; see `open_output`. Open the last one with `flags`.

    `make` is called with the name of a missing directory and the descriptor of its parent, but not if a symlink leads
    to it (as in mkdir(1)). `check` is called with the descriptor and name of the last component, and the descriptor of
    its directory. In an error, `filename` is the part of `path` that has failed.
    """
    left, symlinks = deque(path.parts or (".",)), 0
    after = len(left)
    """How many components of `path` come after the last symlink that was followed; all if none was followed."""
    parent = os.open("/" if path.is_absolute() else ".", _PARENT, dir_fd=within)
    try:
        while True:
            name = left.popleft()
            try:
                fd = os.open(name, (_PARENT if left else flags) | os.O_NOFOLLOW, 0o666, dir_fd=parent)
            except FileNotFoundError:
                if make is None:
                    raise
                if len(left) >= after:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
                make(name, parent)
                left.appendleft(name)
                continue
            except OSError as error:
                # O_DIRECTORY causes ENOTDIR for a symlink.
                if (
                    error.errno not in (errno.ELOOP, errno.ENOTDIR)
                    or (target := _target(name, parent, is_last=not left and not flags & os.O_PATH)) is None
                ):
                    raise
                symlinks += 1
                if symlinks > _SYMLINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                if not re.match(_OF_PROCESS, os.path.realpath(f"/proc/self/fd/{parent}")):
                    after = min(after, len(left))
                    left.extendleft(reversed(target.parts or (".",)))
                    continue
                # A link to an open descriptor, such as /dev/stdout, does not contain a path.
                fd = os.open(name, _PARENT if left else flags, dir_fd=parent)
                if not left:
                    return fd
            if not left:
                try:
                    check(fd, name, parent)
                except BaseException:
                    os.close(fd)
                    raise
                return fd
            before, parent = parent, fd
            os.close(before)
    except OSError as error:
        error.filename = str(Path(*path.parts[: len(path.parts) - min(after, len(left))]))
        raise
    finally:
        os.close(parent)


def _make_directory(mode: int | None, name: str, parent: int) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        return  # Another process has just created it.
    if mode is None:
        return
    # Another user may have replaced it with a symlink.
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _target(name: str, parent: int, *, is_last: bool) -> Path | None:
    """Return the target of a symlink, or None if `name` is another file. Raises OSError if another user owns it."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        status = os.fstat(found)
        if not stat.S_ISLNK(status.st_mode):
            return None
        place = os.path.join(os.path.realpath(f"/proc/self/fd/{parent}"), name)  # noqa: PTH118
        # In a user namespace, /proc/self may belong to a user that is not mapped.
        if status.st_uid not in (0, os.geteuid()) and place not in ("/proc/self", "/proc/thread-self"):
            raise PermissionError(errno.EACCES, f"{'it' if is_last else place} is a symlink that another user owns")
        return Path(os.readlink("", dir_fd=found))
    finally:
        os.close(found)


def _check_names(fd: int, name: str, parent: int) -> None:
    """Check that an open file has no other name if other users may create files in its directory. Raises OSError.

    The sysctl fs.protected_hardlinks can be 0. Then a hard link may lead to any file on the same filesystem.
    """
    place = os.fstat(parent)
    if place.st_uid in (0, os.geteuid()) and not place.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
    opened = os.fstat(fd)
    # Another user may have removed the hard link after open(2). Then only the other name is left.
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if max(opened.st_nlink, found.st_nlink) > 1 or not os.path.samestat(opened, found):
        text = "it is a hard link that another user may have made (choose a directory that only you can write)"
        raise PermissionError(errno.EACCES, text)
