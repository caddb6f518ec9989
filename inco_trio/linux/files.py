"""File types (inode(7)), file name limits, and mount IDs (proc_pid_fdinfo(5))."""

from __future__ import annotations

import os
import stat

__all__ = ["FILE_NAME_MAX", "is_path", "kind_of_file", "mount_id"]

FILE_NAME_MAX = 255
"""Maximum length of a file name in bytes (NAME_MAX of limits.h)."""

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
