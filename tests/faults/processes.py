"""CPU time, wake-ups and thread states of a running proxy, and injected faults in its system calls."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from netns.hang import HANG

__all__ = ["INOTIFY", "Work", "injected", "packet_socket", "wait_idle", "wait_stopped", "work"]

INOTIFY = "anon_inode:inotify"
"""What the kernel calls an inotify descriptor in /proc/PID/fd."""


@attrs.frozen
class Work:
    """The CPU time and the voluntary context switches of a process since its start."""

    cpu_ns: int
    switches: int

    def __sub__(self, earlier: Work) -> Work:
        return Work(self.cpu_ns - earlier.cpu_ns, self.switches - earlier.switches)


def work(pid: int) -> Work:
    """Return the CPU time and voluntary context switches of all threads (proc_pid_status(5), sched-stats.rst)."""
    cpu_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread has just ended.
            schedstat, status = (task / "schedstat").read_text(), (task / "status").read_text()
            cpu_ns += int(schedstat.split()[0])
            switches += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return Work(cpu_ns, switches)


def states(pid: int) -> set[str]:
    """Return the states of all threads (proc_pid_stat(5)): S sleeps, R runs or is runnable, T is stopped."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread has just ended.
            found.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def wait_idle(pid: int) -> None:
    """Wait until the process is idle; fail if it spins or polls.

    A process with work to do is runnable, not asleep, even if it gets no CPU on a busy machine.
    """
    deadline = time.monotonic() + HANG
    before = work(pid)
    while True:
        time.sleep(0.2)  # A process that polls more often than this is not idle.
        now = work(pid)
        if now == before and states(pid) == {"S"}:
            return
        before = now
        assert time.monotonic() < deadline, f"still busy after {HANG:g} s"


def wait_stopped(pid: int) -> None:
    """Stop a process with SIGSTOP and wait until it has stopped."""
    os.kill(pid, 19)
    deadline = time.monotonic() + HANG
    while states(pid) != {"T"}:
        assert time.monotonic() < deadline, "the process has not stopped"


@contextmanager
def injected(pid: int, descriptor: str, fault: str) -> Iterator[None]:
    """Use strace to make system calls of the process fail: `injected(pid, INOTIFY, "readv:error=ENOMEM:when=1")`.

    Only calls that use `descriptor` (its name in /proc/PID/fd) fail. Otherwise, a call for a client could fail instead,
    for example for doctor in another test.
    """
    call = fault.partition(":")[0]
    which = ["-P", descriptor, "-e", f"trace={call}", "-e", f"inject={fault}"]
    command = ["strace", "-f", "-p", str(pid), *which, "-o", "/dev/null"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        try:
            _wait_traced(strace)
            yield
        finally:
            strace.terminate()
            strace.communicate()  # strace also reports that it detaches.


def packet_socket(pid: int) -> str:
    """Return the name in /proc/PID/fd of the only packet socket in the process's network namespace."""
    [row] = Path(f"/proc/{pid}/net/packet").read_text().splitlines()[1:]
    return f"socket:[{row.split()[-1]}]"


def _wait_traced(strace: subprocess.Popen[bytes]) -> None:
    """Wait until strace reports that it has attached to all threads. It has then also interrupted their system calls.

    The kernel shows the tracer (TracerPid) before that, when a thread can still make calls without strace.
    """
    assert strace.stderr is not None
    told = b""
    while b" attached" not in told:
        line = strace.stderr.readline()
        told += line
        assert line, f"strace ended: {told!r}"
