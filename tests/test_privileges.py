"""Tests of what a running daemon may do: its locked memory, its capabilities and its sandbox."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support_control import COMMAND, Board

CAP_SYS_RESOURCE = 24
LOCKED = "--lock-memory: cannot lock memory (its size is limited): set `ulimit -l unlimited`"


def status_of(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_limit_of_locked_memory_is_one_error_line(tmp_path: Path) -> None:
    command = [*COMMAND, "run", f"unix:{tmp_path}/a,peer={tmp_path}/b", "--irq-dir", str(tmp_path), "--lock-memory"]
    script = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
os.execv(sys.argv[1], sys.argv[1:])
"""
    limited = ["setpriv", "--bounding-set=-all", sys.executable, "-c", script, *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        71, f"inco-trio: error: {LOCKED}, or LimitMEMLOCK=infinity in the unit\n"
    )  # fmt: skip


def test_used_memory_is_locked_and_unused_memory_is_not_allocated(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] != resource.RLIM_INFINITY and not _may_raise_limits():
        pytest.fail("this test needs root, or `ulimit -l unlimited`")
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        proxy = board.running("--lock-memory")
        status = status_of(proxy.pid)
        locked, size = (int(status[name].split()[0]) for name in ("VmLck", "VmSize"))
        # The kernel counts whole mappings as locked. The difference is the vdso and the like.
        assert locked > size * 0.9
        # The in-flight buffer has 20 MB, of which only the used pages are in memory.
        assert int(status["RssShmem"].split()[0]) < 4096
        board.trigger()
        assert peer.recv(100)


def _may_raise_limits() -> bool:
    return bool(int(status_of(os.getpid())["CapEff"], 16) >> CAP_SYS_RESOURCE & 1)
