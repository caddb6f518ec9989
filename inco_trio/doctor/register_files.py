"""Checks of the registers: whether what is written there can be seen, and be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from inco_trio.doctor.processes import Process
from inco_trio.doctor.result import Result, fail, ok, permit, warn
from inco_trio.linux.files import kind_of_file
from inco_trio.registers.diagnose import UNREPORTED, filesystem, open_registers
from inco_trio.signals import Direction, Signal

__all__ = ["directory", "held_open", "kinds", "reported", "watched"]

OTHER_INODES = frozenset({"overlay", "btrfs"})
"""Filesystems whose files have other device numbers in stat(2) than in the watches that /proc tells of."""


def directory(path: Path) -> Iterator[Result]:
    """Whether an IRQ directory is there, and may be used by this user."""
    quoted, uid = shlex.quote(str(path)), os.geteuid()
    try:
        status = path.stat()
    except FileNotFoundError:
        text = "does not exist: a proxy makes it when it starts, and 60 s after it was removed"
        yield warn("directory", path, text, f"mkdir -p {quoted}")
        return
    except OSError as error:
        yield fail("directory", path, f"cannot be looked at: {error.strerror}")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield fail("directory", path, "is no directory: name another one, or remove it", f"rm {quoted}")
    elif os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        yield ok("directory", path, f"uid {uid} may read and write it")
    else:
        yield fail("directory", path, f"uid {uid} may not read and write it", permit(path, "u+rwx"))


def kinds(signals: Iterable[Signal]) -> Iterator[Result]:
    """Whether the registers of one directory are regular files that may be used; one line if all are."""
    signals = tuple(signals)
    faults = [fault for signal in signals for fault in _register(signal)]
    yield from faults
    if not faults:
        names = ", ".join(dict.fromkeys(signal.register for signal in signals))
        yield ok("registers", signals[0].directory, f"{names}: regular files, or still to be made")


def _register(signal: Signal) -> Iterator[Result]:
    path, quoted, uid = signal.path, shlex.quote(str(signal.path)), os.geteuid()
    try:
        status = path.lstat()
    except OSError:
        return  # It is made by the proxy; what is wrong with the directory is said there.
    if not stat.S_ISREG(status.st_mode):
        fix = f"rmdir {quoted}" if stat.S_ISDIR(status.st_mode) else f"rm {quoted}"
        yield fail(
            "registers", path, f"is no regular file but {kind_of_file(status.st_mode)}: the proxy refuses it", fix
        )
        return
    use, mode = (os.R_OK, "u+r") if signal.direction is Direction.OUTBOUND else (os.W_OK, "u+w")
    if not os.access(path, use, effective_ids=True):
        what = "read" if use == os.R_OK else "write"
        yield fail("registers", path, f"uid {uid} may not {what} it", permit(path, mode))


def reported(path: Path, root: Path = Path("/")) -> Iterator[Result]:
    """Whether inotify tells of what is written in an IRQ directory.

    Nothing is written to find out, as that would be a notification, or a file that others see. The type of the
    filesystem tells whether another system can write there unseen; that inotify works at all is tried by opening the
    directory for reading, which an inotify descriptor of our own has to report.
    """
    existing, kind = filesystem(path, root)
    if kind in UNREPORTED:
        text = f"is on a filesystem of type {kind}: {UNREPORTED[kind]}; use a local one, such as tmpfs"
        yield (fail if kind in ("proc", "sysfs") else warn)("filesystem", existing, text)
        return
    on = f"is on a filesystem of type {kind}" if kind else "the type of its filesystem is unknown"
    try:
        seen = _opening_is_reported(existing)
    except OSError as error:
        yield fail("filesystem", existing, f"{on}; it cannot be watched: {_reason(error)}")
        return
    if seen:
        yield ok("filesystem", existing, f"{on}, and inotify reports what is done there")
    else:
        yield fail("filesystem", existing, f"{on}, and inotify reports nothing there; use tmpfs")


def _reason(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        # inotify_init(2) gives the same number for both.
        return "raise fs.inotify.max_user_instances or ulimit -n"
    return str(error.strerror)


def _opening_is_reported(path: Path) -> bool:
    """Whether an inotify descriptor is told that a directory is opened. Raises OSError."""

    from inco_trio.linux.inotify import IN_OPEN, Inotify, parse_events

    inotify = Inotify()
    try:
        inotify.watch(str(path), IN_OPEN)
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        buffer = memoryview(bytearray(4096))
        return any(event.mask & IN_OPEN for event in parse_events(buffer[: inotify.read_into(buffer)]))
    finally:
        inotify.close()


def held_open(signals: Iterable[Signal], proxies: Iterable[Process]) -> Iterator[Result]:
    """Processes that have registers open all the time, so that they, or the proxy, see no notification."""
    ours = {process.pid for process in proxies}
    for signal, pid, text in open_registers(signals):
        if pid not in ours:
            yield warn("open", signal.path, text)


def watched(signals: Iterable[Signal], proxy: Process) -> Iterator[Result]:
    """Whether a proxy that runs watches the triggers: whether it would see what is written there."""
    triggers = {}
    for signal in signals:
        if signal.direction is Direction.OUTBOUND:
            with contextlib.suppress(OSError):  # It has no trigger now; the proxy makes it.
                status = signal.path.lstat()
                triggers[signal.path] = (status.st_dev, status.st_ino)
    if not triggers or filesystem(next(iter(triggers)))[1] in OTHER_INODES:
        return
    missed = [path for path, place in triggers.items() if place not in proxy.watches]
    for path in missed:
        text = f"process {proxy.pid} does not watch it: what is written there is not seen by that proxy"
        yield fail("watched", path, text, f"kill -HUP {proxy.pid}")
    if not missed:
        yield ok("watched", ", ".join(map(str, triggers)), f"process {proxy.pid} sees what is written there")
