"""Tests of the parts of the benchmark in which errors would go unnoticed: statistics and process figures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.config import read_board
from inco_trio.signals import Direction

from .figures import Figure, Goal, quantile
from .processes import memory_kib, switches, system_calls, wake_ups
from .results import Results
from .rivals import PYTHON, BenchError, Flow, another
from .search import RESOLUTION, Found, Outcome, Tried, highest_kept
from .tables import signals, write_table, write_udrv


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([7.0], 0.5, 7.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (list(range(1, 101)), 0.99, 99), ([1.0, 2.0], 0.0, 1.0)],
)
def test_quantile_is_the_nearest_rank(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == expected


def test_ratios_are_taken_pair_by_pair() -> None:
    figure = Figure("x", "us", {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}, Goal("<=", 3.0, "x b"), ("a", "b"))
    assert (figure.values, figure.result, figure.spread, figure.met) == ([2.0, 3.0, 4.0], 3.0, (2.0, 4.0), True)


def test_unequal_numbers_of_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        _ = Figure("x", "us", {"a": [2.0, 3.0], "b": [1.0]}, None, ("a", "b")).values


@pytest.mark.parametrize(("samples", "worst"), [([0.0, 0.0, 5.0], 5.0), ([0.0, 0.0, 0.0], 0.0), ([-3.0, 1.0], -3.0)])
def test_a_goal_of_equality_is_judged_by_the_worst_run(samples: list[float], worst: float) -> None:
    figure = Figure("lost", "frames", {"a": samples}, Goal("=", 0.0))
    assert (figure.result, figure.met) == (worst, worst == 0)


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [(Goal("<=", 2.0), 2.0, 2.1), (Goal("<", 2.0), 1.9, 2.0), (Goal(">=", 0.8), 0.8, 0.7)]
)
def test_each_relation_of_a_goal_is_checked(goal: Goal, met: float, missed: float) -> None:
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


def test_rounds_of_a_closed_loop_are_one_flow() -> None:
    rounds = [Flow(3, 3, 0, 0, 1.0, 1.5, [10, 20, 30]), Flow(3, 2, 1, 0, 1.0, 1.5, [40, 50])]
    assert rounds[0] + rounds[1] == Flow(6, 5, 1, 0, 2.0, 3.0, [10, 20, 30, 40, 50])


def _make_checkout(place: Path, text: str) -> Path:
    (place / "inco_trio").mkdir(parents=True)
    (place / "inco_trio/__init__.py").write_text(text)
    return place


def test_another_checkout_uses_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = another(_make_checkout(tmp_path / "before", ""))
    monkeypatch.chdir(_make_checkout(tmp_path / "elsewhere", "raise SystemExit"))
    code = "import inco_trio; print(inco_trio.__file__)"
    done = subprocess.run([*PYTHON, "-c", code], env=before.environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path / "before/inco_trio"
    assert before.name == "inco-trio before"


def test_a_checkout_is_named_by_its_directory_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = _make_checkout(tmp_path / "before", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert another(checkout).name == "inco-trio before"


@pytest.mark.parametrize("text", [None, "import nothing_of_that_name"])
def test_a_checkout_whose_package_cannot_be_imported_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        _make_checkout(tmp_path, text)
    with pytest.raises(BenchError, match=f"{tmp_path}: not a checkout of inco-trio"):
        another(tmp_path)


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
def test_wake_ups_of_new_and_ended_threads_count(before: dict[int, int], after: dict[int, int], expected: int) -> None:
    assert wake_ups(before, after) == expected


@pytest.fixture
def python() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Run a Python program that prints a line when it is ready, and kill the process at the end of the test."""
    with ExitStack() as stack:

        def run(code: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-uc", code], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        yield run


def test_a_waiting_process_makes_no_system_calls_and_a_ticking_one_does(
    python: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    waits = python("print('up'); import sys; sys.stdin.read()")
    ticks = python("print('up'); import time\nwhile True: time.sleep(0.01); print('tick')")
    before = [switches(process.pid) for process in (waits, ticks)]
    calls = [system_calls(process.pid, 0.3, tmp_path / "trace") for process in (waits, ticks)]
    assert memory_kib(ticks.pid, "VmHWM") >= memory_kib(ticks.pid, "VmRSS") > 0
    # Without strace, the test gets here before the first tick. So wait for ten ticks; one read can return several.
    assert ticks.stdout is not None
    for _ in range(10):
        os.read(ticks.stdout.fileno(), 65536)
    # strace interrupts the running system call when it attaches and when it detaches.
    idle, busy = (wake_ups(old, switches(process.pid)) for old, process in zip(before, (waits, ticks), strict=True))
    assert busy > idle
    assert calls == [None, None] or (calls[0] == 0 and (calls[1] or 0) > 0)


def _model(capacity: float, generator: float = 1e9, queue: float = 0.0) -> Callable[[float], Tried]:
    """Return a model of a program and its load generator. The arguments are in notifications per second."""

    def attempt(rate: float) -> Tried:
        offered = min(rate, generator)
        kept = offered <= capacity + queue
        return Tried(Outcome.KEPT if kept else Outcome.LOST, offered, min(offered, capacity))

    return attempt


@pytest.mark.parametrize("start", [5e3, 5e4, 9e4, 1e5, 1.1e5, 5e5])
def test_the_sustained_rate_is_found_from_either_side(start: float) -> None:
    found = highest_kept(_model(1e5), _model(1e5), start)
    assert found is not None
    assert 1e5 / RESOLUTION <= found.rate <= 1e5
    assert not found.at_least


def test_a_loss_hidden_in_a_short_try_shows_in_full_length() -> None:
    found = highest_kept(_model(1e5, queue=2e4), _model(1e5), 1e5)
    assert found == Found(1e5, at_least=False)


def test_the_limit_of_the_generator_is_not_a_failure_of_the_program() -> None:
    assert highest_kept(_model(1e5, generator=8e4), _model(1e5, generator=8e4), 9e4) == Found(8e4, at_least=True)


def test_a_slow_moment_of_the_generator_does_not_end_the_search() -> None:
    tries = []

    def slow_at_first(rate: float) -> Tried:
        tries.append(rate)
        return _model(1e5, generator=5e4 if len(tries) == 1 else 1e9)(rate)

    found = highest_kept(slow_at_first, _model(1e5), 9e4)
    assert found is not None
    assert 1e5 / RESOLUTION <= found.rate <= 1e5
    assert not found.at_least


def test_an_uncounted_rate_is_a_limit_of_the_generator() -> None:
    def uncounted_above_8e4(rate: float) -> Tried:
        return Tried(Outcome.UNCOUNTED if rate > 8e4 else Outcome.KEPT, rate, rate)

    for confirm in (_model(1e9), uncounted_above_8e4):
        found = highest_kept(uncounted_above_8e4, confirm, 9e4)
        assert found is not None
        assert 8e4 / RESOLUTION <= found.rate <= 8e4
        assert found.at_least


def test_the_search_ends_when_no_rate_is_sustained() -> None:
    assert highest_kept(_model(0), _model(0), 1e5) is None
    assert highest_kept(_model(1e5), _model(0), 1e5) is None


def test_a_figure_measured_again_replaces_only_its_earlier_result(tmp_path: Path) -> None:
    machine = {"cpu": "a CPU", "cpus": 2, "kernel": "6", "python": "3", "load average": 0.25}
    figures = [Figure(name, "us", {"a": [2.0], "b": [1.0]}, Goal("<=", 3.0), ("a", "b")) for name in ("x", "y", "z")]
    results = Results([{"machine": machine | {"date": "Monday"}}])
    results.add("one", 1.0, figures[:1], {"a": [1]})
    results.add("two", 1.0, figures[1:2], None)
    results.save(tmp_path, ["one", "two"])
    again = Results.load(tmp_path)
    again.runs.append({"machine": machine | {"date": "Friday"}})
    again.add("two", 1.0, figures[2:], None)
    again.save(tmp_path, ["one", "two"])
    merged = Results.load(tmp_path)
    assert [figure.as_dict() for figure in merged.figures(["two", "one"])] == [
        figure.as_dict() for figure in (figures[2], figures[0])
    ]
    assert merged.series == {"one": {"a": [1]}}
    monday, friday = merged.origins
    assert "load average 0.2 at the start, Monday (one)" in monday
    assert "Friday (two)" in friday
    assert friday in (tmp_path / "results.md").read_text()
