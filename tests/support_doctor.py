"""Fake /proc and /sys trees for tests of the doctor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from inco_trio.linux.processes import Process

__all__ = ["BOOTED", "FIRST", "Tree", "process"]

BOOTED = 1_700_000_000
FIRST = "         0          0 4294967295"
"""The uid_map of the initial user namespace."""


class Tree:
    """A fake root directory, initially with an empty /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc").mkdir(parents=True)

    def put(self, path: str, text: str) -> None:
        """Write a file at `path` below the fake root directory."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def status(self, who: str, uid: int = 0, capabilities: int = 0, parent: int = 0) -> None:
        """Write /proc/WHO/status, where `who` is a PID or `self`."""
        text = f"Name:\tx\nPPid:\t{parent}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t7\t7\t7\t7\n"
        self.put(f"proc/{who}/status", f"{text}CapEff:\t{capabilities:016x}\n")

    def process(
        self,
        pid: int,
        command: str = "program",
        *,
        name: str = "program",
        uid: int = 0,
        capabilities: int = 0,
        seconds: int = 1,
        fds: Mapping[int, str] | None = None,
        watches: Mapping[int, str] | None = None,
        parent: int = 0,
    ) -> None:
        """Write the /proc files of a process that started `seconds` after boot, with its descriptors and watches."""
        self.status(str(pid), uid, capabilities, parent)
        ticks = seconds * os.sysconf("SC_CLK_TCK")
        self.put(f"proc/{pid}/stat", f"{pid} (a ) b) S {' '.join(['1'] * 18)} {ticks} 0\n")
        self.put(f"proc/{pid}/comm", f"{name}\n")
        self.put(f"proc/{pid}/cmdline", command.replace(" ", "\0") + "\0")
        directory = self.root / f"proc/{pid}/fd"
        directory.mkdir()
        for fd, target in (fds or {}).items():
            (directory / str(fd)).symlink_to(target)
        for fd, text in (watches or {}).items():
            (directory / str(fd)).symlink_to("anon_inode:inotify")
            self.put(f"proc/{pid}/fdinfo/{fd}", f"pos:\t0\nflags:\t02004000\n{text}")


def process(
    pid: int,
    command: str = "",
    *,
    name: str = "program",
    uid: int = 0,
    started: float = BOOTED,
    sockets: tuple[int, ...] = (),
    instances: int = 0,
    watches: tuple[tuple[int, int], ...] = (),
) -> Process:
    """Return a `Process` object as the doctor would read it from /proc."""
    return Process(pid, name, uid, tuple(command.split()), started, frozenset(sockets), instances, watches)
