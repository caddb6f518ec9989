"""Check of a board on a machine with 128 MiB of memory and one CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inco_trio.simulation.world import Cores
from netns.fixtures import StartProxy
from tests.kernels.checks.conftest import Board

HOG = """
import mmap
held = []
while True:
    held.append(bytearray(1 << 20))
"""


@pytest.mark.parametrize("options", [(), ("--lock-memory",)], ids=["", "--lock-memory"])
def test_the_proxy_survives_a_process_that_takes_all_memory(
    make_board: StartProxy, cores: Cores, options: tuple[str, ...]
) -> None:
    assert cores
    board = make_board(*options)
    assert isinstance(board, Board)
    board.exchange()
    hog = subprocess.run([sys.executable, "-c", HOG], check=False, capture_output=True, text=True)
    # The kernel either kills the process that uses the most memory (SIGKILL) or refuses to give it more (MemoryError).
    assert hog.returncode == -9 or "MemoryError" in hog.stderr
    board.exchange()
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    sys.stderr.write(line)
