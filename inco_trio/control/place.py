"""Where the control socket is: its path, taking over what a process that ended has left there, and its end."""

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

BACKLOG = 16
MODE = 0o660


def runtime_directories() -> list[Path]:
    """Where sockets are looked for: those of root, and those of this user."""
    mine = os.environ.get("XDG_RUNTIME_DIR")
    return [Path(base, "inco-trio") for base in dict.fromkeys(("/run", mine)) if base]


def default_path(label: str) -> Path | None:
    """Where the socket of a proxy is that is called `label`; None for a user without a runtime directory."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        return None
    path = Path(base, "inco-trio", f"{label}.sock")
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        path = path.with_name(f"{blake2b(os.fsencode(label), digest_size=4).hexdigest()}.sock")
    return path


def is_live(path: Path) -> bool:
    """Whether a process listens there. Raises OSError, as for a path that is missing or no socket."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            pass  # Its queue of connections is full.
    return True


def bind(path: Path) -> socket.socket:
    """A socket that listens at `path`. Raises OSError: EADDRINUSE if another process listens there."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Against a second process that takes the same path over at this instant; whoever keeps the lock blocks nobody.
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if is_live(path):
                raise OSError(errno.EADDRINUSE, "another process listens there")
            path.unlink()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.bind(os.fspath(path))
            path.chmod(MODE)  # Nobody can connect before it listens.
            made.listen(BACKLOG)
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(directory)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """As `bind`; the path is removed at the end, if it still leads to this socket. Raises OSError."""
    made = bind(path)
    with made:
        mine = path.lstat()
        try:
            yield made
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(mine, path.lstat()):
                    path.unlink()
