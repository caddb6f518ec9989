"""Checks of a power cut and of a soft-reboot. Each check starts the machine again, and then continues."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from inco_trio.simulation.world import Namespace, Peer, veth
from netns.hang import HANG
from tests.faults.applications import Applications, Wire
from tests.faults.processes import wait_stopped
from tests.faults.supervised import wait_path
from tests.kernels.checks.check_systemd import (
    DIRECTORY,
    INBOUND,
    LINK,
    OUTBOUND,
    UNIT,
    Board,
    install_unit,
    main_pid,
    systemctl,
)
from tests.kernels.checks.conftest import add_vlan, ip

POWER_CUT = Path("/var/lib/power-cut")
"""This file exists after the power was cut."""
SOFT_REBOOT = Path("/run/soft-reboot")
"""This file exists after the soft-reboot, which keeps /run (systemd-soft-reboot.service(8))."""


@pytest.fixture
def machine() -> Iterator[Namespace]:
    with Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)) as namespace:
        yield namespace


@pytest.fixture
def board(machine: Namespace) -> Iterator[Board]:
    """Create the link of a unit that waits for it, and yield the board. Core 1 sees all frames of the unit."""
    with ExitStack() as stack:
        other = stack.enter_context(Namespace())
        veth(machine, "eth_rpmsg", other, "eth_rpmsg")
        ip(machine, "link set eth_rpmsg up")
        ip(other, "link set eth_rpmsg up")
        add_vlan(other)
        core1 = stack.enter_context(Peer(LINK, run=other.run))
        wire = Wire(core1)
        stack.callback(wire.close)
        add_vlan(machine)
        systemctl("start", UNIT)
        applications = Applications(DIRECTORY, INBOUND, OUTBOUND)
        stack.callback(applications.close)
        yield Board(applications, core1, wire)


def test_notifications_pass_after_a_power_cut(machine: Namespace, request: pytest.FixtureRequest) -> None:
    if POWER_CUT.exists():
        # The unit was started at boot and waits for its link.
        assert systemctl("show", "--value", "--property", "ActiveState", UNIT) == "activating"
        board: Board = request.getfixturevalue("board")
    else:
        install_unit()
        systemctl("enable", UNIT)
        board = request.getfixturevalue("board")
    board.send_all()
    board.all_arrived()
    if not POWER_CUT.exists():
        wait_stopped(main_pid())
        board.send_all()
        POWER_CUT.touch()
        os.sync()
        Path("/proc/sysrq-trigger").write_text("b")
        wait_for_the_end()


def test_a_soft_reboot_loses_nothing(machine: Namespace, request: pytest.FixtureRequest) -> None:
    if SOFT_REBOOT.exists():
        board: Board = request.getfixturevalue("board")
        for name in INBOUND:
            state = DIRECTORY / f"{name}_state"
            wait_path(state, lambda: state.read_text() == "1")  # noqa: B023 - called before the next iteration
        board.all_sent()
        board.send_all()
        board.all_arrived()
        return
    install_unit()
    systemctl("enable", UNIT)
    board = request.getfixturevalue("board")
    wait_stopped(main_pid())
    board.send_all()
    # Without a link, the proxy keeps the outbound notifications. The link disappears with the namespace of core 1.
    ip(machine, f"link set {LINK} down")
    SOFT_REBOOT.touch()
    systemctl("soft-reboot")
    wait_for_the_end()


def wait_for_the_end() -> NoReturn:
    time.sleep(HANG)  # This process ends earlier, unless the machine does not restart.
    pytest.fail("the machine has not restarted")
