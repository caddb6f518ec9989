"""Checks of the unit that `inco-trio service systemd` prints, under a systemd that runs as process 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.simulation.world import Namespace, Peer, veth
from netns.hang import HANG
from tests.faults.applications import Applications, Wire, write_config
from tests.faults.processes import wait_stopped
from tests.kernels.checks.conftest import add_vlan, ip

LINK = "rpmsg4000"
UNIT = f"inco-trio-{LINK}.service"
INBOUND = [f"in_{number:03}" for number in range(100)]
OUTBOUND = [f"out_{number:03}" for number in range(100)]
CONFIG, DIRECTORY = Path("/etc/udrv.json"), Path("/srv/irq")
BEFORE_254 = "the store of a stopped unit is emptied before systemd 254"


def systemctl(*words: str, check: bool = True) -> str:
    """Run systemctl and return its output. If systemctl fails, the check fails, unless `check` is false."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0 or not check, done.stderr + journal()
    return done.stdout.strip()


def journal(*options: str) -> str:
    """Return the unit's journal."""
    subprocess.run(["journalctl", "--sync"], check=True)
    command = ["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_journal(text: str) -> None:
    """Wait until the unit has logged `text`."""
    command = ["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager", "--lines", "all", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        for line in following.stdout:
            if text in line:
                break
        following.kill()


def systemd_version() -> int:
    return int(systemctl("--version").split()[1])


def main_pid() -> int:
    return int(systemctl("show", "--value", "--property", "MainPID", UNIT))


@pytest.fixture
def core1() -> Iterator[Peer]:
    """Create the board's link (VLAN 4000 on `eth_rpmsg`) from the machine to core 1 in a network namespace."""
    with ExitStack() as stack:
        machine = stack.enter_context(Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)))
        other = stack.enter_context(Namespace())
        stack.callback(ip, machine, "link del eth_rpmsg")
        make_link(machine, other)
        yield stack.enter_context(Peer(LINK, run=other.run))


def make_link(machine: Namespace, other: Namespace) -> None:
    veth(machine, "eth_rpmsg", other, "eth_rpmsg")
    for core in (machine, other):
        ip(core, "link set eth_rpmsg up")
        add_vlan(core)


class Board:
    """The unit's proxy, with its core 1 and its applications."""

    def __init__(self, applications: Applications, core1: Peer, wire: Wire) -> None:
        self._applications = applications
        self._core1 = core1
        self._wire = wire

    def send_all(self) -> None:
        """Send each signal once in both directions."""
        self._applications.reset()
        self._wire.seen.clear()
        for name in INBOUND:
            self._core1.send(name.encode())
        for name in OUTBOUND:
            self._applications.trigger(name)

    def all_arrived(self) -> None:
        """Wait until all notifications have arrived."""
        closes = self._applications.closes
        self._applications.wait(lambda: all(closes[name] for name in INBOUND), "not all have been delivered")
        self.all_sent()

    def all_sent(self) -> None:
        """Wait until all outbound notifications have arrived."""
        self._wire.wait(lambda: all(self._wire.seen[name] for name in OUTBOUND), "not all have been sent")


def install_unit() -> Path:
    """Install the unit and its configuration, and return the path of the unit."""
    write_config(CONFIG, DIRECTORY, INBOUND, OUTBOUND)
    command = [sys.executable, "-m", "inco_trio", "service", "systemd", LINK, "--config", str(CONFIG), "--user", "root"]
    path = Path("/etc/systemd/system") / UNIT
    path.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    systemctl("daemon-reload")
    return path


@pytest.fixture
def unit() -> Iterator[None]:
    """Install the unit, and remove it after the check."""
    path = install_unit()
    yield
    systemctl("stop", UNIT)
    path.unlink()
    systemctl("daemon-reload")


@pytest.fixture
def board(core1: Peer, unit: None) -> Iterator[Board]:
    """Start the unit and yield the board once it is ready."""
    systemctl("start", UNIT)
    with ExitStack() as stack:
        applications = Applications(DIRECTORY, INBOUND, OUTBOUND)
        stack.callback(applications.close)
        wire = Wire(core1)
        stack.callback(wire.close)
        yield Board(applications, core1, wire)


def kill_proxy() -> None:
    os.kill(main_pid(), signal.SIGKILL)


def stop_and_start() -> None:
    systemctl("stop", UNIT)
    systemctl("start", UNIT)


def freeze_and_thaw() -> None:
    systemctl("freeze", UNIT)
    systemctl("thaw", UNIT)


ACTIONS: dict[str, Callable[[], object]] = {
    "kill -9": kill_proxy,
    "restart": lambda: systemctl("restart", UNIT),
    "reload": lambda: systemctl("reload", UNIT),
    "daemon-reload": lambda: systemctl("daemon-reload"),
    "daemon-reexec": lambda: systemctl("daemon-reexec"),
    "restart of journald": lambda: systemctl("restart", "systemd-journald"),
    "freeze and thaw": freeze_and_thaw,
}
NEEDS_THE_PROXY = ("reload", "freeze and thaw")
"""Actions that complete only while the proxy is running."""


@pytest.mark.parametrize("action", list(ACTIONS))
def test_nothing_is_lost(board: Board, action: str) -> None:
    pid = main_pid()
    wait_stopped(pid)
    board.send_all()
    if action in NEEDS_THE_PROXY:
        os.kill(pid, signal.SIGCONT)
    ACTIONS[action]()
    if main_pid() == pid:
        os.kill(pid, signal.SIGCONT)
    board.all_arrived()


def test_stop_and_start_lose_nothing_since_systemd_254(board: Board) -> None:
    wait_stopped(main_pid())
    board.send_all()
    stop_and_start()
    if systemd_version() >= 254:
        board.all_arrived()
    else:
        board.send_all()
        board.all_arrived()


def test_a_unit_without_its_link_waits_and_does_not_restart(unit: None) -> None:
    systemctl("start", "--no-block", UNIT)
    wait_journal("waiting")
    assert systemctl("show", "--value", "--property", "NRestarts", UNIT) == "0"
    assert systemctl("show", "--value", "--property", "ActiveState", UNIT) == "activating"


def test_a_refused_reload_is_reported(board: Board) -> None:
    good = CONFIG.read_text()
    CONFIG.write_text("{")
    try:
        systemctl("reload", UNIT, check=False)
        wait_journal("udrv.json")
        assert "udrv.json" in journal("--priority", "warning")
    finally:
        CONFIG.write_text(good)
    systemctl("reload", UNIT)
    board.send_all()
    board.all_arrived()
