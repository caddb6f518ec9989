"""The watchdog in QEMU, in the place of core 1; the tests are core 0."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from inco_trio.testing import Board, Guest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def firmware() -> Path:
    subprocess.run(["make", "-s", "-C", HERE], check=True)
    return HERE / "watchdog.elf"


@pytest.fixture
def watchdog(board: Board, firmware: Path) -> Iterator[Guest]:
    with board.guest(firmware, ready="watchdog: ready") as guest:
        yield guest


@pytest.mark.usefixtures("watchdog")
def test_who_is_silent_is_warned_and_then_reset(board: Board) -> None:
    board.core0.trigger("redun_notify_irq")
    warned = board.core0.wait_for("ihub_hwwd_irq")
    reset = board.core0.wait_for("ihub_reset_irq")
    assert reset.monotonic_ns > warned.monotonic_ns
    assert (board.core0.count("ihub_hwwd_irq"), board.core0.count("ihub_reset_irq")) == (1, 1)


def test_who_answers_the_warning_is_not_reset(board: Board, watchdog: Guest) -> None:
    board.core0.trigger("redun_notify_irq")
    for _ in range(3):
        board.core0.wait_for("ihub_hwwd_irq")
        # The guest's time stands still, however long core 0 takes.
        watchdog.stop()
        assert board.core0.count("ihub_reset_irq") == 0
        board.core0.trigger("redun_notify_irq")
        watchdog.cont()


def test_a_reset_watchdog_sleeps_until_it_is_asked_to_watch(board: Board, watchdog: Guest) -> None:
    board.core0.trigger("redun_notify_irq")
    watchdog.wait_for("watchdog: received redun_notify_irq")
    watchdog.system_reset()
    watchdog.wait_ready()
    board.core0.trigger("redun_notify_irq")
    board.core0.wait_for("ihub_hwwd_irq")
    assert board.core0.count("ihub_hwwd_irq") == 1


def test_a_warning_waits_for_a_proxy_that_is_killed(board: Board, watchdog: Guest) -> None:
    board.core0.trigger("redun_notify_irq")
    watchdog.wait_for("watchdog: received redun_notify_irq")
    board.faults.kill_proxy()
    watchdog.wait_for("watchdog: sends ihub_hwwd_irq")
    board.faults.start_proxy()
    board.core0.wait_for("ihub_hwwd_irq")
