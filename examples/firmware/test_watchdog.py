"""Test the watchdog, which runs in QEMU as core 1; the tests act as core 0."""

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
def watchdog(inco_board: Board, firmware: Path) -> Iterator[Guest]:
    with inco_board.guest(firmware, ready="watchdog: ready") as guest:
        yield guest


@pytest.mark.usefixtures("watchdog")
def test_a_silent_core0_is_warned_and_then_reset(inco_board: Board) -> None:
    inco_board.core0.trigger("redun_notify_irq")
    warned = inco_board.core0.expect("ihub_hwwd_irq")
    reset = inco_board.core0.expect("ihub_reset_irq")
    assert reset.monotonic_ns > warned.monotonic_ns
    assert (inco_board.core0.count("ihub_hwwd_irq"), inco_board.core0.count("ihub_reset_irq")) == (1, 1)


def test_an_answered_warning_prevents_the_reset(inco_board: Board, watchdog: Guest) -> None:
    inco_board.core0.trigger("redun_notify_irq")
    for _ in range(3):
        inco_board.core0.expect("ihub_hwwd_irq")
        # Stop the guest's clock, so that a slow test cannot cause a reset.
        watchdog.stop()
        assert inco_board.core0.count("ihub_reset_irq") == 0
        inco_board.core0.trigger("redun_notify_irq")
        watchdog.cont()


def test_a_reset_watchdog_sleeps_until_it_is_armed_again(inco_board: Board, watchdog: Guest) -> None:
    inco_board.core0.trigger("redun_notify_irq")
    watchdog.wait_for("watchdog: received redun_notify_irq")
    watchdog.system_reset()
    watchdog.wait_ready()
    inco_board.core0.trigger("redun_notify_irq")
    inco_board.core0.expect("ihub_hwwd_irq")
    assert inco_board.core0.count("ihub_hwwd_irq") == 1


def test_a_warning_is_delivered_after_the_proxy_was_killed(inco_board: Board, watchdog: Guest) -> None:
    inco_board.core0.trigger("redun_notify_irq")
    watchdog.wait_for("watchdog: received redun_notify_irq")
    inco_board.proxy.kill()
    watchdog.wait_for("watchdog: sends ihub_hwwd_irq")
    inco_board.proxy.start()
    inco_board.core0.expect("ihub_hwwd_irq")
