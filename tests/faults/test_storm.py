"""Tests that send every signal exactly once while faults hit the proxy, which must not lose any notification."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from inco_trio.simulation.world import two_cores
from tests.faults.storm import FAULTS, MEMORY_FILES, Storm
from tests.faults.supervised import environment_form

SIGNALS = 1000
ROUNDS = 1 if environment_form() == "short" else 5


def rain(faults: list[str], *, interval: float = 0.7) -> None:
    seed = int(os.environ.get("INCO_TRIO_SEED") or int.from_bytes(os.urandom(4), "big"))
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_FILES) as work,
        two_cores() as cores,
        Storm(cores, Path(work), count=SIGNALS, seed=seed) as storm,
    ):
        for _ in range(ROUNDS):
            storm.round(faults, interval=interval)
            assert storm.report.lost == 0, f"lost with INCO_TRIO_SEED={seed}:\n{storm.story}"
    report = storm.report
    sys.stdout.write(f"{report.summary(0)}\n")
    assert report.faults.total() >= ROUNDS


@pytest.mark.parametrize(
    "faults",
    [
        ["SIGKILL"],
        ["s6-svc -r"],
        ["link down, up"],
        ["link deleted, made"],
        ["directory replaced"],
        ["directory moved", "parent moved"],
        ["registers replaced", "registers removed", "registers blocked"],
        ["SIGSTOP, SIGCONT", "SIGSTOP, SIGKILL", "s6-svc -h", "s6-svc -t", "s6-svc -d, -u"],
        sorted(FAULTS),
    ],
    ids=["sigkill", "sigterm", "flap", "relink", "replace", "move", "registers", "supervisor", "all"],
)
def test_nothing_is_lost(faults: list[str]) -> None:
    rain(faults)
