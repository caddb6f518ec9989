"""Checks of a proxy under an s6-svscan that runs as process 1."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.simulation.world import Namespace, Peer
from netns.hang import HANG
from tests.faults.applications import Applications, Wire, write_config
from tests.faults.processes import wait_stopped
from tests.faults.supervised import main_process, wait_path, write_scandir
from tests.kernels.checks.check_systemd import CONFIG, DIRECTORY, INBOUND, LINK, OUTBOUND, Board, make_link

SCANDIR = Path("/run/service")
"""The scan directory of process 1; see tests/kernels/s6_init."""
SERVICE = SCANDIR / f"inco-trio-{LINK}"


def s6(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=HANG)


@pytest.fixture(scope="module")
def board() -> Iterator[Board]:
    """Start the proxy as a service of the s6-svscan that runs as process 1."""
    assert Path("/proc/1/comm").read_text() == "s6-svscan\n"
    with ExitStack() as stack:
        machine = stack.enter_context(Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)))
        other = stack.enter_context(Namespace())
        make_link(machine, other)
        write_config(CONFIG, DIRECTORY, INBOUND, OUTBOUND)
        write_scandir(SCANDIR, LINK, CONFIG)
        s6("s6-svscanctl", "-a", SCANDIR)
        wait_path(SERVICE / "supervise/status")
        s6("s6-svwait", "-U", SERVICE)
        applications = Applications(DIRECTORY, INBOUND, OUTBOUND)
        stack.callback(applications.close)
        core1 = stack.enter_context(Peer(LINK, run=other.run))
        wire = Wire(core1)
        stack.callback(wire.close)
        yield Board(applications, core1, wire)


@pytest.mark.parametrize("end", ["-k", "-r", "-h"])
def test_nothing_is_lost_under_process_1(board: Board, end: str) -> None:
    pid = main_process(SERVICE)
    wait_stopped(pid)
    board.send_all()
    s6("s6-svc", end, SERVICE)
    if end != "-k":
        os.kill(pid, signal.SIGCONT)
    board.all_arrived()
