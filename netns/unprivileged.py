"""Run a program as the user nobody, with nothing inherited: `python unprivileged.py PATH... -- PROGRAM ARGUMENT...`.

Needs root, or its capabilities. Nobody must be able to reach each PATH (an interpreter, a package), though often it
lies below a directory that is closed to others, such as /root. In a mount namespace of its own, an empty directory that
is open to all covers such a directory, with nothing in it but PATH, at its usual place (mount_namespaces(7)).

Where there is no such user, in a user namespace made by an ordinary one, the program runs without any capability
instead: that is what the ordinary user is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from inco_trio.linux.libc import check, libc
from inco_trio.linux.netns import CLONE_NEWNS, unshare
from inco_trio.linux.process import clear_capabilities

NOBODY = 65534

# <linux/mount.h>
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    texts = (source.encode(), os.fsencode(target), kind.encode())
    check(libc.mount(*texts, ctypes.c_ulong(flags), options.encode()))


def _closed_to_others(path: Path) -> Path | None:
    return next((part for part in reversed(path.parents) if not part.stat().st_mode & 0o001), None)


def uncover(paths: list[Path]) -> None:
    """Make every one of `paths` reachable for everyone, in this process and its children only."""
    unshare(CLONE_NEWNS)
    _mount("none", Path("/"), "none", MS_REC | MS_PRIVATE, "")
    opened = {path: os.open(path, os.O_PATH) for path in paths}
    while closed := {path: above for path in paths if (above := _closed_to_others(path))}:
        above = min(closed.values())
        _mount("none", above, "tmpfs", 0, "mode=755")
        for path in sorted(path for path in paths if path.is_relative_to(above)):
            path.mkdir(parents=True, exist_ok=True)
            _mount(f"/proc/self/fd/{opened[path]}", path, "none", MS_BIND | MS_REC, "")


def cover_run() -> None:
    """Give this process and its children an empty /run/inco-trio of their own.

    All proxies of root put their control sockets there, named after the link, and all tests name their link rpmsg4000.
    Raises PermissionError without CAP_SYS_ADMIN.
    """
    unshare(CLONE_NEWNS)
    _mount("none", Path("/"), "none", MS_REC | MS_PRIVATE, "")
    directory = Path("/run/inco-trio")
    directory.mkdir(mode=0o755, exist_ok=True)
    _mount("none", directory, "tmpfs", 0, "mode=755")


def drop() -> None:
    """Become nobody, for good."""
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        # Not mapped: keep the user, and lose what execve(2) would leave or give (capabilities(7)).
        clear_capabilities()


if __name__ == "__main__":
    split = sys.argv.index("--")
    program = sys.argv[split + 1 :]
    uncover([Path(path).resolve() for path in sys.argv[1:split]])
    drop()
    os.execve(program[0], program, {"PATH": os.environ["PATH"]})  # noqa: S606 - to run this program is the purpose
