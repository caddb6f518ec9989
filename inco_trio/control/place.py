"""The path of the control socket: choose a default path, bind the socket, replace a stale one, and remove it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from inco_trio.linux.sockets import SOCKET_PATH_MAX

__all__ = ["bind", "default_path", "is_live", "listening", "runtime_directories"]

BACKLOG = 128
MODE = 0o660


def runtime_directories() -> list[Path]:
    """Return the directories in which root and this user keep control sockets."""
    bases = dict.fromkeys(("/run", os.environ.get("XDG_RUNTIME_DIR")))
    return [Path(base, "inco-trio") for base in bases if base]


def default_path(label: str) -> Path | None:
    """Return the default socket path of a proxy named `label`, or None for a user without a runtime directory."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        return None
    path = Path(base, "inco-trio", f"{label}.sock")
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        path = path.with_name(f"{blake2b(os.fsencode(label), digest_size=4).hexdigest()}.sock")
    return path


def is_live(path: Path) -> bool:
    """Return whether a process listens at `path`. Raises OSError, also if the path is missing or not a socket."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            pass  # The backlog of the listening process is full.
    return True


def bind(path: Path) -> socket.socket:
    """Return a socket that listens at `path`. Raises OSError (EADDRINUSE if another process listens)."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The lock keeps two processes from replacing a stale path at once. If locking fails, continue without it.
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if is_live(path):
                raise OSError(errno.EADDRINUSE, "another process listens there")
            path.unlink()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # bind(2) creates the path with the mode of the socket, minus the umask. A chmod(2) after bind(2) would be
            # a race, because the owner of the directory may replace the path with a symlink.
            os.fchmod(made.fileno(), MODE)
            umask = os.umask(0o777 & ~MODE)
            try:
                made.bind(os.fspath(path))
            finally:
                os.umask(umask)
            made.listen(BACKLOG)
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(directory)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen at `path` while the block runs. Remove the path at the end unless another socket has replaced it."""
    made = bind(path)
    with made:
        mine = path.lstat()
        try:
            yield made
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(mine, path.lstat()):
                    path.unlink()
