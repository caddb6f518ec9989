"""Start `inco-trio` as a child process, for the demonstration and for tests.

The child sets up its namespace and descriptors itself, because a process with threads must not run Python code between
fork(2) and exec(2).
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from inco_trio import real_clock
from inco_trio.linux.inotify import IN_MODIFY, Inotify
from inco_trio.linux.netns import set_network
from inco_trio.linux.process import end_with_parent

__all__ = ["Launched", "Wait", "run_child", "wait_readable"]

STOP = 60.0
"""Seconds between the stop signal and SIGKILL. A proxy normally stops within 5 s."""

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
"""The Python program of the child. It imports this copy of the package, even if the copy is not installed."""
_OF_OUR_SUPERVISOR = {"NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}

Wait = Callable[[Sequence[int], float], Sequence[int]]
"""A function that waits for readable descriptors, up to a timeout in seconds, and returns them. It may raise."""


def wait_readable(fds: Sequence[int], timeout: float) -> Sequence[int]:
    """Implement `Wait` with select(2)."""
    return select.select(fds, [], [], timeout)[0]


class Launched:
    """A running `inco-trio ARGUMENT...`, whose output is appended to the file `log`.

    The process ends when the thread that started it ends (PR_SET_PDEATHSIG of prctl(2)). Ctrl-C does not reach it.
    `netns` is a descriptor of its network namespace. `listen_fds` are passed as in sd_listen_fds(3). The process gets
    the variables in `environment`, but not those that the caller's supervisor set. `prefix` is a command that runs the
    rest of the command line, such as setpriv(1). With `ready`, the process uses `--notification-fd`. Raises OSError.
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
        """A descriptor that becomes readable when the process is ready or has exited. Then call `see_ready`."""
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
        """A pidfd that becomes readable once the process has exited."""

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def see_ready(self) -> bool:
        """Read `ready_fd`; return whether the process is ready. If not, it has exited or does not report readiness."""
        self.is_ready = self.is_ready or os.read(self.ready_fd, 1) == b"\n"
        return self.is_ready

    def wait_ready(self, timeout: float, wait: Wait = wait_readable) -> bool:
        """Wait at most `timeout` seconds until the process is ready or has exited; return whether it is ready."""
        return bool(wait([self.ready_fd], timeout)) and self.see_ready()

    def wait_log(self, text: str, timeout: float, *, after: int = 0) -> str | None:
        """Wait until the log has a complete line that contains `text` after the first `after` characters.

        Return the first such line, or None if the process exits first or after `timeout` seconds.
        """
        deadline = real_clock.monotonic() + timeout
        with contextlib.closing(Inotify()) as changes:
            changes.watch(str(self._log), IN_MODIFY)
            while True:
                left = deadline - real_clock.monotonic()
                over = self.process.poll() is not None or left <= 0
                for line in self.log[after:].splitlines(keepends=True):
                    if text in line and line.endswith("\n"):
                        return line.rstrip("\n")
                if over:
                    return None
                select.select([changes.fd, self.end_fd], [], [], left)
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
        self.stop()
        os.close(self.ready_fd)
        os.close(self.end_fd)


def _isolation() -> str:
    """Return Python's option -I, or -P if trio is installed in the user's site directory or in PYTHONPATH."""
    trio = Path(getattr(importlib.util.find_spec("trio"), "origin", None) or "")
    return "-I" if any(trio.is_relative_to(place) for place in site.getsitepackages()) else "-P"


def run_child() -> int:
    """Run in the child process that `Launched` starts; return the exit code. Raises OSError."""
    settings = json.loads(os.environ.pop(_SETTINGS))
    if not end_with_parent(settings["parent"]):
        return 1
    if settings["netns"] is not None:
        set_network(settings["netns"])
        os.close(settings["netns"])
    inherited, ready, arguments = settings["fds"], settings["ready"], sys.argv[2:]
    if inherited:
        # The numbers that sd_listen_fds(3) requires may be in use, so first move all descriptors to higher numbers.
        passed = [*inherited, *([] if ready is None else [ready])]
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in passed]
        for fd in passed:
            os.close(fd)
        for number, fd in enumerate(moved[: len(inherited)], _LISTEN_FDS_START):
            os.dup2(fd, number)
            os.close(fd)
        ready = ready and moved[-1]
    if ready is not None:
        arguments += ["--notification-fd", str(ready)]
    if settings["names"] is not None:
        os.environ |= {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(inherited)),
            "LISTEN_FDNAMES": ":".join(settings["names"]),
        }
    from inco_trio.cli import main

    return main(arguments)
