"""Who has which sockets and inotify watches, as proc(5) tells: one look at all processes.

All paths are below `root`, where tests have a /proc that they wrote.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

__all__ = ["Process", "Processes", "lines_of", "look", "named", "packet_sockets", "read", "unix_sockets"]

_SOCKET = re.compile(r"socket:\[([0-9]+)\]")
_INOTIFY = re.compile(r"(anon_inode:)?\[?inotify\]?")
_WATCH = re.compile(r"^inotify wd:[0-9a-f]+ ino:([0-9a-f]+) sdev:([0-9a-f]+) ", re.MULTILINE)
_MINOR_BITS = 20
"""Of the numbers of devices in fdinfo, which are the kernel's own (include/linux/kdev_t.h)."""


def read(path: Path) -> str | None:
    """The text of a file of /proc or /sys, without the line break at its end; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
    except OSError:
        return None


def lines_of(path: Path) -> list[str]:
    """The lines of a file of /proc, none if it cannot be read."""
    # Not splitlines(), which knows line breaks that names may contain.
    return (read(path) or "").split("\n")


@attrs.frozen
class Process:
    """A process, and the descriptors of it that matter here."""

    pid: int
    name: str
    uid: int
    """Its effective user."""
    command: tuple[str, ...]
    started: float
    """Seconds since 1970."""
    sockets: frozenset[int]
    """Inodes."""
    instances: int
    """Its inotify descriptors."""
    watches: tuple[tuple[int, int], ...]
    """What they watch: device and inode."""

    @property
    def is_proxy(self) -> bool:
        """Whether its command is that of a proxy, ours or the one that came before."""
        words = [os.path.basename(word) for word in self.command]  # noqa: PTH119 - a word need not be a path
        return "inco_proxy" in words[:2] or ("run" in words and not {"inco-trio", "inco_trio"}.isdisjoint(words))

    @property
    def is_holder(self) -> bool:
        """Whether it keeps the descriptors of others."""
        return self.name == "systemd" or self.name.startswith("s6-fdholder")


def named(processes: list[Process]) -> str:
    """Their numbers and names, for a line."""
    return ", ".join(f"{process.pid} ({process.name})" for process in processes)


@attrs.frozen
class Processes:
    """All processes that could be looked at."""

    all: tuple[Process, ...]
    unseen: bool
    """Whether there are some whose descriptors root may look at, and this user may not."""
    mounted: bool
    """Whether there is a /proc."""

    def with_socket(self, inode: int) -> list[Process]:
        """Those that have a socket open."""
        return [process for process in self.all if inode in process.sockets]

    def watching(self, device: int, inode: int) -> list[Process]:
        """Those that watch a file or a directory, but for the holders of others' descriptors."""
        return [process for process in self.all if (device, inode) in process.watches and not process.is_holder]

    def by_pid(self, pid: int) -> Process | None:
        """That of a number, None if there is none."""
        return next((process for process in self.all if process.pid == pid), None)


def look(root: Path = Path("/"), booted: float | None = None) -> Processes:
    """Look at all processes below `root`/proc; one that ends meanwhile is left out.

    `booted` is when the machine was (seconds since 1970); None: find out.
    """
    if booted is None:
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    proc = root / "proc"
    try:
        numbers = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())
    except OSError:
        numbers = []
    found, unseen = [], False
    for number in numbers:
        place = proc / str(number)
        status = dict(line.partition(":")[::2] for line in lines_of(place / "status"))
        times = (read(place / "stat") or "").rpartition(")")[2].split()
        if "Uid" not in status or len(times) < 20:
            continue
        try:
            sockets, instances, watches = _descriptors(place)
        except PermissionError:
            # What root may not look at, nobody may.
            sockets, instances, watches, unseen = frozenset(), 0, (), os.geteuid() != 0
        except OSError:
            continue
        found.append(
            Process(
                pid=number,
                name=(read(place / "comm") or ""),
                uid=int(status["Uid"].split()[1]),
                command=tuple((read(place / "cmdline") or "").rstrip("\0").split("\0")),
                # Field 22 of proc_pid_stat(5), of which the first two are before the parenthesis.
                started=booted + int(times[19]) / os.sysconf("SC_CLK_TCK"),
                sockets=sockets,
                instances=instances,
                watches=watches,
            )
        )
    return Processes(tuple(found), unseen, bool(numbers))


def _descriptors(place: Path) -> tuple[frozenset[int], int, tuple[tuple[int, int], ...]]:
    """Sockets, the number of inotify descriptors, and what they watch. Raises OSError."""
    sockets: set[int] = set()
    instances = 0
    watches: list[tuple[int, int]] = []
    for fd in (place / "fd").iterdir():
        try:
            target = str(fd.readlink())
        except FileNotFoundError:
            continue  # Closed meanwhile.
        if match := _SOCKET.fullmatch(target):
            sockets.add(int(match[1]))
        elif _INOTIFY.fullmatch(target):
            instances += 1
            watches += _watches(read(place / "fdinfo" / fd.name) or "")
    return frozenset(sockets), instances, tuple(watches)


def _watches(fdinfo: str) -> Iterator[tuple[int, int]]:
    for inode, device in _WATCH.findall(fdinfo):
        number = int(device, 16)
        yield os.makedev(number >> _MINOR_BITS, number & (1 << _MINOR_BITS) - 1), int(inode, 16)


def packet_sockets(index: int, ethertype: int, root: Path = Path("/")) -> list[int]:
    """The inodes of the packet sockets that are bound to an interface and an EtherType."""
    # That of the thread, which may be in another network namespace.
    # sk, references, type, protocol, interface, running, memory, user, inode.
    rows = (line.split() for line in lines_of(root / "proc/thread-self/net/packet")[1:])
    return [int(row[8]) for row in rows if len(row) == 9 and int(row[3], 16) == ethertype and int(row[4]) == index]


def unix_sockets(path: str, root: Path = Path("/")) -> list[int]:
    """The inodes of the sockets that were bound at a path, as far as they are of this network namespace."""
    # Num, references, protocol, flags, type, state, inode, path; the path may have spaces.
    rows = (line.split(None, 7) for line in lines_of(root / "proc/thread-self/net/unix")[1:])
    return [int(row[6]) for row in rows if len(row) == 8 and row[7] == path]
