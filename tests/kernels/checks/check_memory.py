"""Check of a board on a machine with 128 MiB of memory and one CPU."""

from __future__ import annotations

import subprocess
import sys
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

HOG = """
held = []
while True:
    held.append(bytearray(1 << 20))
"""


def mib(kib: int) -> str:
    return f"{kib / 1024:.1f} MiB"


def machine_kib(what: str) -> int:
    """Return a value of proc_meminfo(5) in KiB."""
    return int(Path("/proc/meminfo").read_text().partition(f"{what}:")[2].split()[0])


@pytest.mark.parametrize("options", [(), ("--lock-memory",)], ids=["", "--lock-memory"])
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
        hog = subprocess.run([*LIKE_OTHERS, sys.executable, "-c", HOG], check=False, capture_output=True, text=True)
        # The kernel either kills the process that uses the most memory (SIGKILL) or refuses to give it more memory.
        assert hog.returncode == -9 or "MemoryError" in hog.stderr
        record_property("resident after memory ran out", mib(resident_kib(running.pid)))
        board.exchange()
        record_property("peak", mib(resident_kib(running.pid, "VmHWM")))
