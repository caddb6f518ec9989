"""The random walk over registers, long: 100,000 steps in the full form."""

from __future__ import annotations

from tests.faults.supervised import environment_form
from tests.test_registers_machine import walk


def test_a_long_walk() -> None:
    if environment_form() == "short":
        walk(steps=5000, walks=50)
    else:
        walk(steps=100_000, walks=1000)
