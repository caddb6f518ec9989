"""Run the scenarios of tests/core1.py with a proxy and a QEMU guest that are connected through an MQTT broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.simulation.guest import unix_netdev
from tests.core1 import SCENARIOS, Board, Scenario
from tests.mosquitto import Gateway, Mosquitto

pytestmark = pytest.mark.qemu


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        broker = Mosquitto(tmp_path / "broker", "allow_anonymous true", verbose=False)
        stack.callback(broker.end)
        broker.start()
        near, far = tmp_path / "near", tmp_path / "far"
        ends = {"core0": (near, tmp_path / "core0"), "core1": (far, tmp_path / "guest")}
        for end, (local, peer) in ends.items():
            words = ["mqtt-link", f"{broker.url}/wire", f"unix:{local},peer={peer}", "--end", end]
            bridge = Gateway(tmp_path / f"{end}.log", *words)
            stack.callback(bridge.close)
            bridge.wait_ready()
        link = f"unix:{tmp_path}/core0,peer={near}"
        yield stack.enter_context(Board(tmp_path, link, unix_netdev(tmp_path / "guest", far)))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario_over_a_broker(board: Board, scenario: Scenario) -> None:
    scenario(board)
