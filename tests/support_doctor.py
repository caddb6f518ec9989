"""Fake /proc and /sys trees for tests of the doctor."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from inco_trio.control import client
from inco_trio.doctor import services, space
from inco_trio.errors import IncoError
from inco_trio.linux.processes import Process, is_stopped
from netns.hang import HANG

__all__ = ["BOOTED", "DOCTOR", "FIRST", "Tree", "be_patient", "process"]

BOOTED = 1_700_000_000
FIRST = "         0          0 4294967295"
"""The uid_map of the initial user namespace."""

PATIENT = """
import sys
from inco_trio.cli import main
from tests.support_doctor import be_patient
be_patient(setattr)
sys.exit(main())
"""
"""A program that runs inco-trio after `be_patient`."""
DOCTOR = (sys.executable, "-c", PATIENT, "doctor")
"""The command `inco-trio doctor` after `be_patient`."""


def be_patient(change: Callable[[object, str, object], None]) -> None:
    """Let the doctor wait for slow programs, filesystems and proxies, so that the machine's speed decides nothing.

    A stopped proxy does not answer before it continues. The doctor still waits only SEARCH for it. `change` is setattr,
    or the method of a MonkeyPatch.
    """
    for module in (services, space):
        change(module, "PATIENCE", HANG)
    change(client, "_attempt", _attempt)
    change(client.Client.status, "__defaults__", (None, HANG))


def _attempt(path: Path) -> client.Client | IncoError:
    try:
        return client.Client(path, client.SEARCH if _is_stopped(path) else HANG)
    except IncoError as error:
        return error


def _is_stopped(path: Path) -> bool:
    """Return whether the process that listens at `path` is stopped."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.connect(str(path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        return is_stopped(struct.unpack("iII", credentials)[0])
    return False


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
