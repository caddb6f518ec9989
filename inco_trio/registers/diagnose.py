"""Find problems that raise no error but prevent notifications. The daemon runs these checks when it starts."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from inco_trio.linux.files import ForeignFuseError, pinned
from inco_trio.signals import Direction, Signal

if TYPE_CHECKING:
    from inco_trio.linux.processes import Search

__all__ = ["UNREPORTED", "diagnose", "filesystem", "filesystem_type", "open_registers", "unreported", "unreported_type"]

UNREPORTED = {
    "proc": "inotify reports no events on it",
    "sysfs": "inotify reports no events on it",
    **dict.fromkeys(
        ("9p", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "ceph", "vboxsf"),
        "inotify does not report writes by other hosts",
    ),
}
"""Filesystem types on which inotify may not report that a trigger was closed, each with the reason (inotify(7))."""


def diagnose(signals: Iterable[Signal]) -> Iterator[str]:
    """Yield a line for each filesystem that inotify cannot watch, and for each process that holds a register open."""
    signals = tuple(signals)
    for directory in dict.fromkeys(signal.directory for signal in signals):
        if problem := unreported(directory):
            yield problem
    for signal, _, problem in open_registers(signals):
        yield f"{signal.path}: {problem}"


def unreported(path: Path) -> str | None:
    """Return why inotify misses events in `path`, or None. If `path` is missing, check its nearest ancestor."""
    existing, kind = filesystem(path)
    if reason := unreported_type(kind):
        return f"{existing}: on a filesystem of type {kind}: {reason} (use a local filesystem, such as tmpfs)"
    return None


def unreported_type(kind: str | None) -> str | None:
    """Return why inotify may miss events on a filesystem of type `kind`, or None."""
    if kind is not None and (kind == "fuse" or kind.startswith("fuse.")):
        return "the kernel may use several inodes for one file, so inotify can miss writes"
    return UNREPORTED.get(kind or "")


def filesystem(path: Path, root: Path = Path("/")) -> tuple[Path, str | None]:
    """Return `path` or its nearest existing ancestor, and the filesystem type if known. `root` contains /proc."""
    for existing in (path, *path.parents):
        try:
            with pinned(existing) as fd:
                device = os.fstat(fd).st_dev
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ForeignFuseError:
            return existing, "fuse"
        except OSError:
            return existing, None  # The process cannot open more descriptors, or may not search a directory.
        try:
            mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return existing, None
        return existing, filesystem_type(mounts, device)
    return path, None  # The working directory has been removed.


def filesystem_type(mountinfo: str, device: int) -> str | None:
    """Return the type of the filesystem with device number `device` from /proc/self/mountinfo (proc(5))."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    # The kernel escapes only spaces, tabs, backslashes and line feeds. A name may contain other separators of str.
    for line in mountinfo.split("\n"):
        mount, is_complete, source = line.partition(" - ")
        if is_complete and mount.split(" ")[2] == wanted:
            return source.partition(" ")[0]
    return None


def open_registers(signals: Iterable[Signal]) -> Iterator[tuple[Signal, int, str]]:
    """Yield the signal, the PID and a warning for each process that holds a register open."""
    # Import the module lazily, because the import would delay the start of the daemon.
    from inco_trio.linux.processes import Search, processes_in

    registers = {str(signal.path): signal for signal in signals}
    try:
        processes = processes_in(Path("/proc"))
    except OSError:
        return  # /proc is not mounted.
    search = Search()
    for process in processes:
        number = process.name
        if number == str(os.getpid()):
            continue
        yield from search.inspect(process, functools.partial(_held, process, registers, search))
        if search.is_over:
            return


def _held(process: Path, registers: Mapping[str, Signal], search: Search) -> list[tuple[Signal, int, str]]:
    """Return what `open_registers` yields for one process: once, even if it has opened a file many times."""
    found = dict[tuple[Signal, int, str], None]()
    number = process.name
    # The process may have ended or belong to another user. TimeoutError is an OSError, too.
    with contextlib.suppress(OSError):
        for fd, target in search.descriptors(process):
            signal = registers.get(target)
            if signal is None:
                continue
            flags = re.search(rb"^flags:\s*([0-7]+)", (process / "fdinfo" / fd).read_bytes(), re.MULTILINE)
            writes = flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
            # A process name may contain any bytes.
            name = (process / "comm").read_text(encoding="utf-8", errors="backslashreplace").rstrip("\n")
            who = f"process {number} ({name}) holds the file open"
            if signal.direction is Direction.INBOUND:
                what = f"{who}: it must read the file again, or watch it, to see a notification"
                found[signal, int(number), what] = None
            elif writes:
                what = f"{who} for writing: only closing the file causes a notification"
                found[signal, int(number), what] = None
    return [*found]
