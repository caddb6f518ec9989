"""Test the guard alongside a real proxy; the tests act as core 1."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inco_trio.testing import Board

GUARD = Path(__file__).with_name("guard.py")


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    """Return the path of a file to which each started service appends its PID."""
    return tmp_path / "starts"


@pytest.fixture
def guard(inco_board: Board, starts: Path) -> Iterator[subprocess.Popen[str]]:
    service = ["sh", "-c", 'echo $$ >> "$0"; exec sleep 1000', str(starts)]
    command = [sys.executable, str(GUARD), *service]
    with subprocess.Popen(command, env=inco_board.core0.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "sh runs as process" in process.stdout.readline()
        yield process
        if process.poll() is None:
            # Announce a reset: the guard stops its service and exits.
            inco_board.core1.send("ihub_reset_irq")
        process.wait()


@pytest.mark.usefixtures("guard")
def test_the_watchdog_restarts_the_service(inco_board: Board, starts: Path) -> None:
    for runs in range(2, 5):
        inco_board.core1.send("ihub_hwwd_irq")
        inco_board.core1.expect("redun_notify_irq")
        assert inco_board.core0.count("ihub_hwwd_irq") == runs - 1
    inco_board.core1.send("ihub_reset_irq")
    inco_board.core1.expect("redun_notify_irq")
    # The last service might have been stopped before it wrote its PID.
    services = [int(line) for line in starts.read_text().split()]
    assert 1 <= len(services) <= 4
    assert not [service for service in services if Path(f"/proc/{service}").exists()]


def test_a_reset_ends_the_guard(inco_board: Board, guard: subprocess.Popen[str]) -> None:
    inco_board.core1.send("ihub_reset_irq")
    inco_board.core1.expect("redun_notify_irq")
    assert guard.wait() == 0


@pytest.mark.usefixtures("guard")
def test_a_killed_proxy_loses_nothing(inco_board: Board) -> None:
    inco_board.proxy.kill()
    inco_board.core1.send("ihub_hwwd_irq")
    inco_board.proxy.start()
    inco_board.core1.expect("redun_notify_irq")
    assert inco_board.core0.count("ihub_hwwd_irq") == 1


def test_each_interrupt_of_a_burst_is_answered(inco_board: Board, guard: subprocess.Popen[str]) -> None:
    guard.send_signal(signal.SIGSTOP)
    for _ in range(5):
        inco_board.core1.send("ihub_hwwd_irq")
        inco_board.core0.expect("ihub_hwwd_irq")
    guard.send_signal(signal.SIGCONT)
    for _ in range(5):
        inco_board.core1.expect("redun_notify_irq")
