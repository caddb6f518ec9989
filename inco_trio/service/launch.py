"""Start `inco-trio` as a child process, for the demonstration and for tests.

The child sets up for itself what would be unsafe between fork(2) and exec(2) in a process with threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import select
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from inco_trio.linux.inotify import IN_MODIFY, Inotify
from inco_trio.linux.netns import set_network
from inco_trio.linux.process import end_with_parent

__all__ = ["Launched", "Wait", "run_child", "wait_readable"]

STOP = 60.0
"""Seconds until a process that does not end is killed. The proxy's own deadline for a stop is 5 s."""

_LISTEN_FDS_START = 3
_ABOVE = 64
_SETTINGS = "INCO_TRIO_LAUNCH"
_CHILD = f"""\
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from inco_trio.service.launch import run_child
del sys.path[0]
sys.exit(run_child())
"""
"""The child's program: exactly this package, even if it is not installed or another one is."""
_OF_OUR_SUPERVISOR = {"NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}


Wait = Callable[[Sequence[int], float], Sequence[int]]
"""Returns which of the descriptors are readable, once one is or after that many seconds. It may raise to end a wait."""


def wait_readable(fds: Sequence[int], timeout: float) -> Sequence[int]:
    """Wait with select(2)."""
    return select.select(fds, [], [], timeout)[0]


class Launched:
    """A running `inco-trio ARGUMENT...`, whose output is appended to the file `log`.

    It ends with the thread that started it, however that ends (PR_SET_PDEATHSIG of prctl(2)), and gets no Ctrl-C. It
    runs in the network namespace `netns`, a descriptor. `listen_fds` are handed over as by sd_listen_fds(3). The
    variables of the caller's supervisor are not passed on, those of `environment` are. `prefix` starts a command that
    runs the rest, such as setpriv(1). With `ready`, it takes `--notification-fd` and reports when it is ready. Raises
    OSError.
    """

    def __init__(
        self,
        *arguments: str | Path,
        log: Path,
        netns: int | None = None,
        environment: Mapping[str, str] | None = None,
        listen_fds: Mapping[str, int] | None = None,
        prefix: Sequence[str] = (),
        ready: bool = True,
    ) -> None:
        self._log = log
        self.is_ready = False
        inherited = dict(listen_fds or {})
        self.ready_fd, write_ready = os.pipe()
        """Readable once the process is ready or has ended: call `see_ready` then."""
        settings = {
            "parent": os.getpid(),
            "names": None if listen_fds is None else list(inherited),
            "fds": list(inherited.values()),
            "ready": write_ready if ready else None,
            "netns": netns,
        }
        passed = [*inherited.values(), *(fd for fd in (settings["ready"], netns) if isinstance(fd, int))]
        command = [*prefix, sys.executable, _isolation(), "-c", _CHILD, "inco_trio", *map(str, arguments)]
        base = {name: value for name, value in os.environ.items() if name not in _OF_OUR_SUPERVISOR}
        try:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=passed,
                    process_group=0,
                    env={**base, **(environment or {}), _SETTINGS: json.dumps(settings)},
                )
        except BaseException:
            os.close(self.ready_fd)
            raise
        finally:
            os.close(write_ready)
        self.pid = self.process.pid
        self.end_fd = os.pidfd_open(self.pid)
        """Readable once the process has ended."""

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self._log.read_text(errors="replace")

    def see_ready(self) -> bool:
        """Read `ready_fd`; return whether the process is ready. It has ended or gives no notice if not."""
        self.is_ready = self.is_ready or os.read(self.ready_fd, 1) == b"\n"
        return self.is_ready

    def wait_ready(self, timeout: float, wait: Wait = wait_readable) -> bool:
        """Return whether the process is ready, once it is or has ended, or after `timeout` seconds."""
        return bool(wait([self.ready_fd], timeout)) and self.see_ready()

    def wait_log(self, text: str, timeout: float, *, after: int = 0) -> str | None:
        """Return the first line with `text` in the log, once it is complete. None: it did not come.

        Skip `after` characters of the log. Wait until the process ends, `timeout` seconds at most.
        """
        deadline = time.monotonic() + timeout
        with contextlib.closing(Inotify()) as changes:
            changes.watch(str(self._log), IN_MODIFY)
            while True:
                ended = self.process.poll() is not None
                for line in self.log[after:].splitlines(keepends=True):
                    if text in line and line.endswith("\n"):
                        return line.rstrip("\n")
                left = max(0.0, deadline - time.monotonic())
                if ended or not select.select([changes.fd, self.end_fd], [], [], left)[0]:
                    return None
                changes.read_into(memoryview(bytearray(4096)))

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = STOP) -> int:
        """Send a signal and return the exit code. Kill the process if it has not ended after `timeout` seconds."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        """Stop the process if it runs, and close the descriptors."""
        self.stop()
        os.close(self.ready_fd)
        os.close(self.end_fd)


def _isolation() -> str:
    """Return Python's option that keeps the child from importing from the current directory and the user's directories.

    An installation in the user's directories, or one that PYTHONPATH names, needs the latter.
    """
    trio = Path(getattr(importlib.util.find_spec("trio"), "origin", None) or "")
    return "-I" if any(trio.is_relative_to(place) for place in site.getsitepackages()) else "-P"


def run_child() -> int:
    """Become the process that `Launched` describes; return its exit code. Raises OSError."""
    settings = json.loads(os.environ.pop(_SETTINGS))
    if not end_with_parent(settings["parent"]):
        return 1
    if settings["netns"] is not None:
        set_network(settings["netns"])
    # The numbers that sd_listen_fds(3) prescribes may be in use: move all descriptors away first.
    inherited, ready = settings["fds"], settings["ready"]
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in inherited]
    arguments = sys.argv[2:]
    if ready is not None:
        arguments += ["--notification-fd", str(fcntl.fcntl(ready, fcntl.F_DUPFD_CLOEXEC, _ABOVE))]
    for number, fd in enumerate(moved, _LISTEN_FDS_START):
        os.dup2(fd, number)
        os.close(fd)
    for fd in {*inherited, ready, settings["netns"]} - {None}:
        if fd >= _LISTEN_FDS_START + len(moved):
            os.close(fd)
    if settings["names"] is not None:
        os.environ |= {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(moved)),
            "LISTEN_FDNAMES": ":".join(settings["names"]),
        }
    from inco_trio.cli import main

    return main(arguments)
