"""File types (inode(7)), file name limits, mount IDs (proc_pid_fdinfo(5)), and mounts (proc_pid_mountinfo(5))."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

__all__ = ["FILE_NAME_MAX", "fuse_user", "is_path", "kind_of_file", "mount_id", "open_output"]

FILE_NAME_MAX = 255
"""Maximum length of a file name in bytes (NAME_MAX of limits.h)."""

_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_SYMLINKS_MAX = 40
"""Maximum number of symlinks that are followed, as in the kernel."""
_OF_PROCESS = re.compile("/proc/[0-9]+/")
_FUSE_USER = re.compile(rb" - fuse\S* .*\buser_id=([0-9]+)")

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
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:  # noqa: PTH123 - faster than Path.open
        return next(int(value) for name, _, value in (line.partition(b":") for line in lines) if name == b"mnt_id")


def fuse_user(fd: int) -> int | None:
    """Return the ID of the user who serves the files of a FUSE filesystem (fuse(4)), or None for other filesystems."""
    try:
        number = b"%d" % mount_id(fd)
        with open("/proc/self/mountinfo", "rb") as lines:  # noqa: PTH123
            found = next((_FUSE_USER.search(line) for line in lines if line.split(None, 1)[0] == number), None)
    except FileNotFoundError:
        return None  # /proc is not mounted.
    return None if found is None else int(found[1])


def open_output(path: Path) -> int:
    """Open a file for writing; create it if it is missing. Do not truncate it, and do not wait for readers of a FIFO.

    If the last component is a symlink, follow it only if root or this user owns it. Otherwise, another user could make
    root overwrite any file. The sysctl fs.protected_symlinks checks this only in sticky directories. The check and the
    open use the same parent directory. The parent directories are not checked: their owners decide where they lead.
    Raises OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    parent, name = os.open(path.parent, _PARENT), path.name or "."
    try:
        for _ in range(_SYMLINKS_MAX):
            try:
                return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=parent)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if os.fstat(found).st_uid not in (0, os.geteuid()):
                    raise PermissionError(errno.EACCES, "it is a symlink that another user owns")
                target = Path(os.readlink("", dir_fd=found))
            finally:
                os.close(found)
            if _OF_PROCESS.match(os.path.realpath(f"/proc/self/fd/{parent}")):
                # A link to an open descriptor, such as /dev/stdout, does not contain a path.
                return os.open(name, flags, dir_fd=parent)
            before, parent, name = parent, os.open(target.parent, _PARENT, dir_fd=parent), target.name or "."
            os.close(before)
    finally:
        os.close(parent)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
