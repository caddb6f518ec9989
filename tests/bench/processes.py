"""Memory, wake-ups and system calls of a process, as the kernel reports them (proc(5), strace(1))."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["memory_kib", "switches", "system_calls", "wake_ups"]

_SETTLE = 0.5
"""Seconds to wait after strace has attached, because attaching interrupts a running system call."""


def memory_kib(pid: int, field: str) -> int:
    """Return VmRSS or VmHWM (the peak since exec) in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def switches(pid: int) -> dict[int, int]:
    """Return the voluntary context switches of each thread so far, keyed by thread ID."""
    statuses = {int(path.name): (path / "status").read_text() for path in Path(f"/proc/{pid}/task").iterdir()}
    return {
        thread: int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for thread, status in statuses.items()
    }


def wake_ups(before: Mapping[int, int], after: Mapping[int, int]) -> int:
    """Return the voluntary context switches between two readings; a thread that ended counts as one wake-up."""
    return sum(count - before.get(thread, 0) for thread, count in after.items()) + len(before.keys() - after.keys())


def system_calls(pid: int, seconds: float, trace: Path) -> int | None:
    """Count the system calls of all threads for `seconds`. Return None if strace is missing or not permitted."""
    if shutil.which("strace") is None:
        return None
    command = ["strace", "-f", "-ttt", "-p", str(pid), "-o", str(trace)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        if "attached" not in tracer.stderr.readline():
            return None
        time.sleep(_SETTLE)  # Exclude the effects of attaching strace.
        start = time.time()
        time.sleep(seconds)  # Count the system calls during this time.
        end = time.time()
        tracer.send_signal(signal.SIGINT)
    times = (float(match[1]) for match in re.finditer(r"^\d+ +(\d+\.\d+) ", trace.read_text(), re.MULTILINE))
    return sum(start <= at <= end for at in times)
