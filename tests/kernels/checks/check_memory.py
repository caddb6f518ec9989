"""Check of a board on a machine with little memory and one CPU."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.simulation.world import Peer
from netns.fixtures import StartProxy
from tests.faults.supervised import resident_kib
from tests.kernels.checks.conftest import Applications, Board
from tests.support_proxy import INBOUND

# The checks are exempt from the OOM killer, and their child processes inherit the exemption. choom(1) ends it.
LIKE_THE_UNIT = ("choom", "-n", "-900", "--")
LIKE_OTHERS = ("choom", "-n", "0", "--")

# dd(1) needs little memory until a single system call fills its buffer. If a program filled the memory page by page,
# the kernel would also discard the pages of its code and read them from the disk again, for hours if it is emulated.
HOG = ("dd", "if=/dev/zero", "of=/dev/null", "count=1", "status=none")


def mib(kib: int) -> str:
    return f"{kib / 1024:.1f} MiB"


def machine_kib(what: str) -> int:
    """Return a value of proc_meminfo(5) in KiB."""
    return int(Path("/proc/meminfo").read_text().partition(f"{what}:")[2].split()[0])


@pytest.mark.parametrize("options", [(), ("--lock-memory",)], ids=["default", "locked"])
def test_the_proxy_survives_a_process_that_takes_all_memory(
    proxy: StartProxy,
    udrv: Path,
    irq_dir: Path,
    core1: Peer,
    options: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("memory", mib(machine_kib("MemTotal")))
    record_property("available", mib(machine_kib("MemAvailable")))
    began = time.monotonic()
    running = proxy("--config", udrv, *options, prefix=LIKE_THE_UNIT)
    record_property("proxy ready after", f"{time.monotonic() - began:.1f} s")
    with Applications(irq_dir, list(INBOUND)) as applications:
        board = Board(core1, irq_dir, applications)
        board.exchange()
        record_property("resident", mib(resident_kib(running.pid)))
        # The kernel would refuse a buffer that is larger than the memory.
        size = f"bs={machine_kib('MemTotal') * 9 // 10}K"
        hog = subprocess.run([*LIKE_OTHERS, *HOG, size], check=False)
        assert hog.returncode == -signal.SIGKILL  # The OOM killer has ended it.
        record_property("resident after memory ran out", mib(resident_kib(running.pid)))
        board.exchange()
        record_property("peak", mib(resident_kib(running.pid, "VmHWM")))
