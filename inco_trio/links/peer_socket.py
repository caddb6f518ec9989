"""Find the socket at the peer's path so that no untrusted user can direct frames to another user's socket."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inco_trio.linux.files import fuse_user, kind_of_file
from inco_trio.linux.users import user_name
from inco_trio.trust import SYMLINKS_MAX, Trust, UnfitFileError, open_trusted

__all__ = ["directory_of", "open_socket"]

_OF_PROCESS = "/proc/self/fd"


@contextmanager
def directory_of(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Open the directory of the socket at `path` while the block runs, with O_PATH, and return its status, too.

    Any user may change its entries. Raises OSError, or UnfitFileError if an untrusted user could replace the directory.
    """
    fd, found = open_trusted(Path(path).parent, Trust(), entries=False)
    try:
        yield fd, found
    finally:
        os.close(fd)


def open_socket(path: str) -> int | None:
    """Open the socket at `path` with O_PATH. Return None if only trusted users can replace it: `path` is safe then.

    Symlinks must belong to root or to this user. Raises OSError, or UnfitFileError if the file is not a socket, or is
    not trusted.
    """
    place = path
    for _ in range(SYMLINKS_MAX):
        with directory_of(place) as (directory, found):
            if place is path and _is_safe(directory, found, place):
                return None
            fd = os.open(Path(place).name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            found = _checked(fd, place)
            if not stat.S_ISLNK(found.st_mode):
                fd, opened = -1, fd
                return opened
            place = str(Path(place).parent / os.readlink("", dir_fd=fd))
        finally:
            if fd >= 0:
                os.close(fd)
    raise UnfitFileError(Path(path), "too many symlinks", "use the path of the socket")


def _is_safe(directory: int, found: os.stat_result, place: str) -> bool:
    """Return whether only trusted users can change the entries of a directory, and `place` is not a symlink in it.

    Raises UnfitFileError if it is neither a socket nor a symlink.
    """
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    try:
        mode = os.lstat(Path(place).name, dir_fd=directory).st_mode
    except FileNotFoundError:
        return True
    _check_kind(mode, place)
    return not stat.S_ISLNK(mode)


def _check_kind(mode: int, place: str) -> None:
    if not (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
        what = f"not a socket but {kind_of_file(mode)}"
        raise UnfitFileError(Path(place), what, "remove it, or use another path")


def _checked(fd: int, place: str) -> os.stat_result:
    """Return the status of a socket or symlink in a directory that other users may change. Raises UnfitFileError."""
    users = (0, os.geteuid())
    if not os.path.exists(_OF_PROCESS):  # noqa: PTH110 - `links` uses this path as a string
        raise UnfitFileError(Path(place), "not trusted: other users can replace it", "mount /proc")
    # Call this before fstat(2), which waits for the process that serves the files.
    if fuse_user(fd) not in (None, *users):
        what = "not trusted: a FUSE filesystem of another user is mounted over it"
        raise UnfitFileError(Path(place), what, "use a directory on another filesystem")
    found = os.fstat(fd)
    _check_kind(found.st_mode, place)
    if stat.S_ISLNK(found.st_mode):
        if found.st_uid not in users:
            what = f"not trusted: a symlink of {user_name(found.st_uid)}, who could direct frames elsewhere"
            raise UnfitFileError(Path(place), what, "use the path of the socket")
    elif found.st_nlink > 1:
        what = "not trusted: a hard link, possibly to a socket of another user"
        raise UnfitFileError(Path(place), what, "let core 1 bind its socket at this path")
    return found
