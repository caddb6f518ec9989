"""Long random tests of registers: 100,000 steps each when the full fault suite runs."""

from __future__ import annotations

import pytest

from tests.faults.supervised import environment_form
from tests.test_registers_calm import calm
from tests.test_registers_machine import SharedWalk, Walk, walk


@pytest.mark.parametrize("machine", [Walk, SharedWalk])
def test_a_long_random_walk_loses_nothing(machine: type[Walk]) -> None:
    if environment_form() == "short":
        # These walks are three times as long as those of the unit tests.
        walk(steps=2500, walks=20, machine=machine)
    else:
        # Ask for more than 100,000 steps, because some walks end early.
        walk(steps=120_000, walks=1200, machine=machine)


def test_a_long_calm_walk_reports_each_notification_once() -> None:
    if environment_form() == "short":
        calm(steps=1500, walks=10)
    else:
        calm(steps=120_000, walks=3000)
