"""What would keep notifications from coming although everything works: looked for once, when the daemon starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from inco_trio.signals import Direction, Signal

__all__ = ["diagnose", "filesystem_type", "unreported"]

UNREPORTED = {
    "proc": "inotify reports nothing there",
    "sysfs": "inotify reports nothing there",
    **dict.fromkeys(
        ("9p", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "ceph", "vboxsf"),
        "inotify does not report what is written on the other side",
    ),
}
"""Filesystems on which a trigger can be closed without an event (inotify(7), Limitations)."""


def diagnose(signals: Iterable[Signal]) -> Iterator[str]:
    """One line for each thing to know: filesystems without inotify, processes that hold registers open.

    Reads /proc; what may not be read there is passed over.
    """
    signals = tuple(signals)
    for directory in dict.fromkeys(signal.directory for signal in signals):
        if problem := unreported(directory):
            yield problem
    yield from _open_registers({str(signal.path): signal for signal in signals})


def unreported(path: Path) -> str | None:
    """Why inotify does not report all that happens in `path`, or in the directory that it would be made in."""
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        kind = filesystem_type(mounts, path.stat().st_dev)
    except OSError:
        return None  # Gone meanwhile, or no descriptor is left to look with.
    if kind in UNREPORTED:
        return f"{path}: is on a filesystem of type {kind}: {UNREPORTED[kind]}; use a local one, such as tmpfs"
    return None


def filesystem_type(mountinfo: str, device: int) -> str | None:
    """The type of the filesystem with device number `device`, by the text of /proc/self/mountinfo (proc(5))."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return None


def _open_registers(registers: dict[str, Signal]) -> Iterator[str]:
    try:
        processes = [name for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]  # noqa: PTH208
    except OSError:
        return  # Not mounted: what cannot be looked at is passed over.
    for number in processes:
        process = Path("/proc", number)
        try:
            for fd in (process / "fd").iterdir():
                signal = registers.get(str(fd.readlink()))
                if signal is None:
                    continue
                flags = re.search(rb"^flags:\s*([0-7]+)", (process / "fdinfo" / fd.name).read_bytes(), re.MULTILINE)
                writes = flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
                # A process may give itself any bytes for a name.
                name = (process / "comm").read_text(encoding="utf-8", errors="backslashreplace").rstrip("\n")
                who = f"{signal.path}: process {number} ({name}) holds it open"
                if signal.direction is Direction.INBOUND:
                    yield f"{who}: it sees a notification only when it reads again, or watches the file"
                elif writes:
                    yield f"{who} for writing: what it writes is a notification only when it closes it"
        except OSError:
            continue  # Ended meanwhile, or another user's.
