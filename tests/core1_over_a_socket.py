"""Tests that tests/test_core1.py runs as an ordinary user; pytest does not collect this file by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inco_trio.simulation.guest import unix_netdev
from tests.core1 import SCENARIOS, Board, Scenario

pytestmark = [pytest.mark.qemu, pytest.mark.s6]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario_over_a_unix_socket(scenario: Scenario, tmp_path: Path) -> None:
    assert os.geteuid() != 0
    host, guest = tmp_path / "core0", tmp_path / "core1"
    with Board(tmp_path, f"unix:{host},peer={guest}", unix_netdev(guest, host)) as board:
        scenario(board)
