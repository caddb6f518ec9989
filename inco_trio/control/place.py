"""Choose the path of the control socket, replace a stale socket, bind a new one, and remove it at the end."""

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

from inco_trio.linux.sockets import SOCKET_PATH_MAX, refuse_descriptors
from inco_trio.trust import Trust, open_trusted

__all__ = [
    "bind", "default_path", "is_live", "is_stale", "listening", "make_directory", "runtime_directories",
    "silent_services",
]  # fmt: skip

BACKLOG = 128
MODE = 0o660
_TEMPORARY = "/tmp"  # noqa: S108 - `make_directory` refuses a directory of another user


def runtime_directories() -> list[Path]:
    """Return the directories in which root and this user keep control sockets."""
    bases = dict.fromkeys(("/run", os.environ.get("XDG_RUNTIME_DIR")))
    private = _private_directory()
    return [*(Path(base, "inco-trio") for base in bases if base), *([private] if _is_private(private) else [])]


def silent_services() -> list[str]:
    """Return the names of the services whose proxies have no control socket.

    A service creates the directory of its proxy's socket before the proxy starts. The directory remains afterwards.
    """
    names = []
    for place in runtime_directories():
        for path in sorted(place.glob("*/")):
            with contextlib.suppress(OSError):  # This user cannot read the directory, or it was removed.
                if not any(path.iterdir()):
                    names.append(path.name)
    return names


def default_path(label: str) -> Path:
    """Return the default socket path of a proxy named `label`."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    path = (Path(base, "inco-trio") if base else _private_directory()) / f"{label}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        path = path.with_name(f"{blake2b(os.fsencode(label), digest_size=4).hexdigest()}.sock")
    return path


def make_directory(path: Path) -> None:
    """Create the directory of a control socket if it is missing. Raises OSError.

    All users may create files in /tmp, so refuse a directory in /tmp that another user created or can access.
    """
    if path != _private_directory():
        path.mkdir(mode=0o755, exist_ok=True)
        return
    path.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(path):
        text = "only this user may have access to this directory (remove it or set XDG_RUNTIME_DIR)"
        raise PermissionError(errno.EPERM, text, str(path))


def _private_directory() -> Path:
    """Return the directory for the control sockets of a user without XDG_RUNTIME_DIR."""
    return Path(_TEMPORARY, f"inco-trio-{os.geteuid()}")


def _is_private(path: Path) -> bool:
    """Return whether `path` is a directory (not a symlink) that this user owns and no other user can access."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def is_live(path: Path) -> bool:
    """Return whether a process listens at `path`. Raises OSError, for example if the path is not a socket."""
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


def is_stale(path: Path) -> bool:
    """Return whether `path` is the socket of a process that ended without removing it, for example after SIGKILL."""
    try:
        return not is_live(path)
    except OSError:
        return False


def bind(path: Path) -> socket.socket:
    """Return a socket that listens at `path`. Raises OSError (EADDRINUSE if another process listens)."""
    # No untrusted user can redirect a path that is trusted here. So bind(2) and unlink(2) may use it.
    os.close(open_trusted(path.parent.absolute(), Trust(), entries=False)[0])
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The lock keeps two processes from replacing a stale socket at the same time. If locking fails, continue.
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if is_live(path):
                raise OSError(errno.EADDRINUSE, "another process is already listening on this socket")
            path.unlink()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            refuse_descriptors(made)  # Accepted sockets inherit this option.
            # bind(2) creates the path with the mode of the socket, minus the umask. Do not use chmod(2) after bind(2):
            # the owner of the directory could replace the path with a symlink in between.
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
