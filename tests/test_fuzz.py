"""Tests of the fuzz targets: all seeds pass, and a target detects faulty code."""

from __future__ import annotations

import pytest

from inco_trio.frame import encode
from tests.fuzz.targets import MAC, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_no_faults(name: str) -> None:
    target = TARGETS[name]
    for seed in (*target.seeds, b"", b"\0", b"\xff" * 100):
        target.run(seed)


def test_a_fault_fails_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.targets.decode", lambda *_: b"ihub_hwwd_irq")
    with pytest.raises(AssertionError):
        TARGETS["frames"].run(encode(b"stranger", MAC))
