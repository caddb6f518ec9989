"""The proxy as its users run it: under s6-svscan, in the scan directory that `inco-trio s6` writes."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from inco_trio.linux.inotify import IN_CREATE, IN_MODIFY, IN_MOVED_TO, Inotify
from inco_trio.simulation.world import Namespace
from netns.hang import HANG

__all__ = [
    "Service",
    "environment_form",
    "is_proxy",
    "main_process",
    "resident_kib",
    "wait_path",
    "watched_inodes",
    "write_scandir",
]


def write_scandir(scandir: Path, link: str, config: Path, *options: str) -> None:
    """Use `inco-trio s6` to write the scan directory for a proxy on `link`."""
    user = [] if "--user" in options else ["--user", "root"]
    command = [sys.executable, "-m", "inco_trio", "s6", str(scandir), "--iface", link, "--config", str(config)]
    subprocess.run([*command, *user, *options], check=True, stdout=subprocess.DEVNULL)


def wait_path(path: Path, ready: Callable[[], bool] | None = None) -> None:
    """Wait until `path` exists, or until `ready()` is true. Check again after each change to the path or a parent."""
    ready = ready or path.exists
    changes = Inotify()
    deadline = time.monotonic() + HANG
    while not ready():
        for place in (path, *path.parents):
            with contextlib.suppress(OSError):
                changes.watch(str(place), IN_MODIFY | IN_CREATE | IN_MOVED_TO)
        # The file might have appeared before the watches were added.
        if not ready():
            left = max(0.0, deadline - time.monotonic())
            ready_to_read = select.poll()  # select(2) handles only descriptors below 1024.
            ready_to_read.register(changes.fd, select.POLLIN)
            assert ready_to_read.poll(left * 1000), f"{path} is not as expected after {HANG:g} s"
            changes.read_into(memoryview(bytearray(1 << 16)))
    changes.close()


class Service:
    """The service of `link` in a scan directory, and the s6-svscan that runs it in `namespace`."""

    def __init__(self, namespace: Namespace, scandir: Path, link: str) -> None:
        assert shutil.which("s6-svscan"), "this test needs s6"
        self.scandir = scandir
        self.directory = scandir / f"inco-trio-{link}"
        start = functools.partial(
            subprocess.Popen[bytes], ["s6-svscan", str(scandir)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._svscan = namespace.run(start)

    @property
    def log(self) -> str:
        """Return the log of the service, or its newest file if s6-log has rotated the log."""
        current = self.directory / "log/main/current"
        return current.read_text(errors="replace") if current.exists() else ""

    def control(self, *options: str) -> None:
        """Run s6-svc with `options` on the service."""
        subprocess.run(["s6-svc", *options, str(self.directory)], check=True)

    def wait(self, state: str) -> None:
        """Wait with s6-svwait until the service reaches `state`.

        The states are ready (U), up (u), down (d), and down with its finish script ended (D).
        """
        # s6-svwait needs the directories that s6-svscan creates when it starts the service.
        wait_path(self.directory / "supervise/status")
        command = ["s6-svwait", f"-{state}", "-t", str(int(HANG * 1000)), str(self.directory)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}not {state} within {HANG:g} s; log:\n{self.log[-4000:]}"

    def wait_log(self, text: str, *, after: int = 0) -> str:
        """Wait for a line with `text` after the first `after` characters of the log, and return the line."""

        def found() -> list[str]:
            return [line for line in self.log[after:].splitlines() if text in line]

        wait_path(self.directory / "log/main/current", lambda: bool(found()))
        return found()[0]

    def close(self) -> None:
        """End s6-svscan and all of its services."""
        if self._svscan.poll() is None:
            subprocess.run(["s6-svscanctl", "-t", str(self.scandir)], check=False)
        try:
            self._svscan.wait(HANG)
        finally:
            self._svscan.kill()
            self._svscan.wait()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        if kind is not None:
            # pytest shows this output together with the failure.
            sys.stderr.write(f"log of the service:\n{self.log[-8000:]}")


def main_process(service: Path) -> int:
    """Return the PID of a service's process (0 if none runs), from the file that s6-svstat reads."""
    try:
        status = (service / "supervise/status").read_bytes()
    except OSError:
        return 0
    # The PID follows two TAI64N time stamps of 12 bytes each (s6_svstatus_pack.c).
    return int.from_bytes(status[24:32], "big")


def watched_inodes(pid: int) -> set[int]:
    """Return the inodes that the inotify descriptors of a process watch (proc_pid_fdinfo(5))."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fdinfo").iterdir():
        for line in fd.read_text().splitlines():
            if line.startswith("inotify "):
                inodes.add(int(line.partition(" ino:")[2].split()[0], 16))
    return inodes


def resident_kib(pid: int, what: str = "VmRSS") -> int:
    """Return the value `what` of proc_pid_status(5) in KiB, or 0 if the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int((status.partition(f"{what}:")[2].split() or ["0"])[0])


def is_proxy(pid: int) -> bool:
    """Return whether the process is already inco-trio, and not the shell or s6 tool that will execute it."""
    try:
        return b"inco_trio\0run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def environment_form() -> str:
    """Return which form of the fault suite runs: `short` or `full`."""
    return os.environ.get("INCO_TRIO_FAULTS", "short")
