"""Run a program as an ordinary user: `python unprivileged.py PATH... -- PROGRAM ARGUMENT...`.

This script needs root's capabilities. The program must be able to read each PATH (an interpreter, a package) even below
a directory that only root can enter, such as /root. Therefore, in a new mount namespace (mount_namespaces(7)), a tmpfs
that contains only PATH is mounted over each such directory.

If an ordinary user created the user namespace, it maps only this user. The program then runs as the same user, but
without capabilities.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from inco_trio.linux.capabilities import clear_capabilities
from inco_trio.linux.libc import check, libc
from inco_trio.linux.netns import CLONE_NEWNS, unshare

ORDINARY = 1
"""The user ID of `daemon`. The proxy does not trust `nobody`, because its ID stands for all unmapped users."""

# Constants from <linux/mount.h>.
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    texts = (source.encode(), os.fsencode(target), kind.encode())
    check(libc.mount(*texts, ctypes.c_ulong(flags), options.encode()))


def _closed_to_others(path: Path) -> Path | None:
    return next((part for part in reversed(path.parents) if not part.stat().st_mode & 0o001), None)


def _of_pytest(path: Path) -> Path | None:
    """Return the directory above `path` that every start of pytest closes to other users, whatever its mode is now."""
    return next((part for part in path.parents if part.name.startswith("pytest-of-")), None)


def uncover(paths: list[Path], *, private: Path | None = None) -> None:
    """Make all `paths` accessible to every user, but only in this process and its children.

    For these processes, the directory `private`, such as /tmp, contains only those `paths` that are below it.
    """
    unshare(CLONE_NEWNS)
    _mount("none", Path("/"), "none", MS_REC | MS_PRIVATE, "")
    opened = {path: os.open(path, os.O_PATH) for path in paths}

    def cover(above: Path, mode: str) -> None:
        _mount("none", above, "tmpfs", 0, f"mode={mode}")
        for path in sorted(path for path in paths if path.is_relative_to(above)):
            path.mkdir(parents=True, exist_ok=True)
            _mount(f"/proc/self/fd/{opened[path]}", path, "none", MS_BIND | MS_REC, "")

    if private is not None:
        cover(private, "1777")
    for above in {above for path in paths if (above := _of_pytest(path))}:
        cover(above, "755")
    while closed := {path: above for path in paths if (above := _closed_to_others(path))}:
        cover(min(closed.values()), "755")


def cover_run() -> None:
    """Give this process and its children a private, empty /run/inco-trio. Raises PermissionError if CAP_SYS_ADMIN is
    missing.

    Root's proxies create their control sockets, named after the link, in this directory. Without a private directory,
    parallel tests would use the same names: most tests use the link rpmsg4000.
    """
    unshare(CLONE_NEWNS)
    _mount("none", Path("/"), "none", MS_REC | MS_PRIVATE, "")
    directory = Path("/run/inco-trio")
    directory.mkdir(mode=0o755, exist_ok=True)
    _mount("none", directory, "tmpfs", 0, "mode=755")


def drop() -> None:
    """Become an ordinary user permanently."""
    try:
        os.setgroups([])
        os.setresgid(ORDINARY, ORDINARY, ORDINARY)
        os.setresuid(ORDINARY, ORDINARY, ORDINARY)
    except OSError:
        # The user namespace does not map the ordinary user. Keep the current user, but drop the capabilities.
        clear_capabilities()


if __name__ == "__main__":
    split = sys.argv.index("--")
    program = sys.argv[split + 1 :]
    uncover([Path(path).resolve() for path in sys.argv[1:split]])
    drop()
    os.execve(program[0], program, {"PATH": os.environ["PATH"]})  # noqa: S606 - this script exists to run the program
