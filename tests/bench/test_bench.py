"""What could be wrong in the benchmark without anyone noticing: its statistics, and what it reads of processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.config import read_board
from inco_trio.signals import Direction

from .figures import Figure, Goal, quantile
from .processes import memory_kib, switches, system_calls, wake_ups
from .tables import signals, write_table, write_udrv


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([7.0], 0.5, 7.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (list(range(1, 101)), 0.99, 99), ([1.0, 2.0], 0.0, 1.0)],
)
def test_quantile_is_the_nearest_rank(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == expected


def test_a_ratio_is_taken_pair_by_pair() -> None:
    figure = Figure("x", "us", {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}, Goal("<=", 3.0, "x b"), ("a", "b"))
    assert (figure.values, figure.result, figure.spread, figure.met) == ([2.0, 3.0, 4.0], 3.0, (2.0, 4.0), True)


def test_pairs_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        _ = Figure("x", "us", {"a": [2.0, 3.0], "b": [1.0]}, None, ("a", "b")).values


@pytest.mark.parametrize(("samples", "worst"), [([0.0, 0.0, 5.0], 5.0), ([0.0, 0.0, 0.0], 0.0), ([-3.0, 1.0], -3.0)])
def test_a_goal_of_equality_is_judged_by_the_worst_run(samples: list[float], worst: float) -> None:
    figure = Figure("lost", "frames", {"a": samples}, Goal("=", 0.0))
    assert (figure.result, figure.met) == (worst, worst == 0)


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [(Goal("<=", 2.0), 2.0, 2.1), (Goal("<", 2.0), 1.9, 2.0), (Goal(">=", 0.8), 0.8, 0.7)]
)
def test_goal(goal: Goal, met: float, missed: float) -> None:
    assert goal.met(met)
    assert not goal.met(missed)


@pytest.mark.parametrize("count", [3, 30, 3000])
def test_both_forms_of_a_table_name_the_same_signals(tmp_path: Path, count: int) -> None:
    entries = signals(count)
    write_table(tmp_path / "table", entries)
    write_udrv(tmp_path / "udrv.json", tmp_path / "irq", entries)
    board = read_board(tmp_path / "udrv.json")
    assert len(entries) == count
    assert sum(entry.direction is Direction.OUTBOUND for entry in entries) == count // 3
    assert {f"{s.name} {s.direction.value} {s.register}" for s in board.signals} == set(
        (tmp_path / "table").read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({1: 5}, {1: 5}, 0),
        ({1: 5, 2: 9}, {1: 6, 2: 11}, 3),
        ({1: 5, 2: 9}, {1: 5}, 1),
        ({1: 5}, {1: 6, 2: 2}, 3),
    ],
    ids=["none", "each thread", "a thread ended", "a thread began"],
)
def test_wake_ups(before: dict[int, int], after: dict[int, int], expected: int) -> None:
    assert wake_ups(before, after) == expected


@pytest.fixture
def python() -> Callable[[str], subprocess.Popen[bytes]]:
    def run(code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    return run


def test_a_process_that_waits_makes_no_calls_and_one_that_ticks_does(
    python: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    with (
        python("print('up'); import sys; sys.stdin.read()") as waits,
        python("print('up'); import time\nwhile True: time.sleep(0.01)") as ticks,
    ):
        before = [switches(process.pid) for process in (waits, ticks)]
        calls = [system_calls(process.pid, 0.3, tmp_path / "trace") for process in (waits, ticks)]
        assert memory_kib(ticks.pid, "VmHWM") >= memory_kib(ticks.pid, "VmRSS") > 0
        # strace interrupts the call that is under way when it comes and when it goes.
        idle, busy = (wake_ups(old, switches(process.pid)) for old, process in zip(before, (waits, ticks), strict=True))
        assert busy > idle
        assert calls == [None, None] or (calls[0] == 0 and (calls[1] or 0) > 0)
        ticks.kill()
