"""Files: their kinds (inode(7)) and the limits of their names."""

from __future__ import annotations

import os
import stat

__all__ = ["FILE_NAME_MAX", "is_path", "kind_of_file"]

FILE_NAME_MAX = 255
"""The longest file name, in bytes (NAME_MAX of limits.h)."""

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
    """Return what a file is, in words, by its `st_mode`."""
    return _KINDS[stat.S_IFMT(mode)]


def is_path(text: str) -> bool:
    """Return whether the kernel can take `text` as a path: no NUL byte, and the file system's encoding has it."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
