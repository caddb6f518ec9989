"""Run the scenarios of tests/core1.py over a Unix socket and over the network of a simulated board.

The network consists of core 0's interface, a veth pair, a bridge and QEMU's tap.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from inco_trio.simulation.guest import tap_netdev
from inco_trio.simulation.world import two_cores
from tests.core1 import SCENARIOS, Board, Scenario

pytestmark = [pytest.mark.qemu, pytest.mark.s6, pytest.mark.netns]

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)


@each_scenario
def test_scenario_over_a_unix_socket_as_ordinary_user(scenario: Scenario, nobody: list[str]) -> None:
    # pytest's tmp_path is too long for a socket's path (unix(7)).
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o1777)
        script = Path(__file__).with_name("core1_over_a_socket.py")
        pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", f"{home}/t"]
        done = subprocess.run(
            [*nobody, *pytest_, "-k", scenario.__name__, str(script)],
            cwd=script.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "1 passed" in done.stdout


@each_scenario
def test_scenario_over_bridge_and_tap(scenario: Scenario, tmp_path: Path) -> None:
    with two_cores(chain=True) as cores:
        assert cores.switch is not None
        # Replace the veth to core 1 with QEMU's tap.
        make = (
            "ip link del tap_rpmsg && ip tuntap add tap_rpmsg mode tap && ip link set tap_rpmsg master br_rpmsg"
            " && ip link set tap_rpmsg up"
        )
        cores.switch.run(functools.partial(subprocess.run, ["sh", "-c", make], check=True))
        netdev = tap_netdev("tap_rpmsg")
        with Board(tmp_path, cores.link, netdev, core0=cores.core0, core1=cores.switch) as board:
            scenario(board)
