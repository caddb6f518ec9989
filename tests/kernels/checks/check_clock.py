"""Checks that wall-clock jumps and suspend-to-RAM do not disturb a proxy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from inco_trio.simulation.world import Cores
from tests.kernels.checks.conftest import Board, run

YEAR = 365 * 24 * 3600


@pytest.fixture
def set_clock() -> Iterator[None]:
    """Restore the wall clock after the check."""
    offset = time.time() - time.monotonic()
    yield
    time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + offset)


@pytest.mark.usefixtures("set_clock")
@pytest.mark.parametrize("years", [11, -11])
def test_a_jump_of_the_wall_clock_disturbs_nothing(board: Board, cores: Cores, years: int) -> None:
    board.exchange()
    started = time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, time.time() + years * YEAR)
    board.exchange()
    status = json.loads(run(cores.core0, f"{sys.executable} -m inco_trio status rpmsg4000 --json"))["boards"][0]
    # An uptime computed from the wall clock would be negative or years too long.
    assert 0 <= status["uptime"] <= started + HOUR


HOUR = 3600


def test_a_suspended_machine_loses_nothing(board: Board) -> None:
    for name in ("ihub_reset_irq", "ihub_hwwd_irq"):
        board.core1.send(name.encode())
    # The alarm must not go off before the machine sleeps, even if the host is busy.
    done = subprocess.run(["rtcwake", "-m", "mem", "-s", "60"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    board.applications.wait_for(lambda: len(board.applications.seen) == 2)
    board.exchange()
