"""Tests of task restarts with a simulated clock."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from inco_trio.backoff import Backoff
from inco_trio.counters import Counters
from inco_trio.proxy.supervise import TRANSIENT, Health, supervise
from inco_trio.stats import Stats

Task = Callable[[Health], Awaitable[None]]


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def run(task: Task) -> tuple[Stats, float]:
    """Run a task under supervision; return the counters and the elapsed time in seconds."""
    stats = Counters()

    async def main() -> float:
        start = trio.current_time()
        await supervise(Health("rpmsg4000: receive"), task, stats)
        return trio.current_time() - start

    elapsed = trio.run(main, clock=MockClock(autojump_threshold=0))
    return stats.snapshot(), elapsed


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_task_that_returns_is_not_restarted(caplog: pytest.LogCaptureFixture) -> None:
    async def task(health: Health) -> None:
        await trio.lowlevel.checkpoint()

    assert run(task) == (Stats(), 0)
    assert messages(caplog) == []


@pytest.mark.parametrize("number", sorted(TRANSIENT), ids=errno.errorcode.get)
def test_a_temporary_error_is_retried(number: int) -> None:
    failures = [failure(number)] * 3

    async def task(health: Health) -> None:
        await trio.lowlevel.checkpoint()
        if failures:
            raise failures.pop()

    stats, took = run(task)
    assert stats.restarts == 3
    assert 0.8 * (0.005 + 0.01 + 0.02) <= took <= 1.2 * (0.005 + 0.01 + 0.02)


def test_each_problem_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    numbers = [errno.ENOMEM, errno.ENOMEM, errno.EMFILE, errno.EMFILE, 0, errno.EMFILE]

    async def task(health: Health) -> None:
        await trio.lowlevel.checkpoint()
        while numbers:
            number = numbers.pop(0)
            if number:
                raise failure(number)
            health.well()
            health.well()

    stats, _ = run(task)
    assert stats.restarts == 5
    assert messages(caplog) == [
        ("WARNING", "rpmsg4000: receive: Cannot allocate memory; restarting the task"),
        ("WARNING", "rpmsg4000: receive: Too many open files; restarting the task"),
        ("INFO", "rpmsg4000: receive: works again"),
        ("WARNING", "rpmsg4000: receive: Too many open files; restarting the task"),
    ]


def test_success_shortens_the_next_pause() -> None:
    starts: list[float] = []

    async def task(health: Health) -> None:
        await trio.lowlevel.checkpoint()
        starts.append(trio.current_time())
        if len(starts) == 10:
            health.well()
        if len(starts) < 12:
            raise failure(errno.EIO)

    run(task)
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0.8 * 0.08 <= pause <= 1.2 * 0.08 for pause in pauses[4:9])
    assert 0.8 * 0.005 <= pauses[9] <= 1.2 * 0.005


@pytest.mark.parametrize("error", [failure(errno.EBADF), failure(errno.EINVAL), RuntimeError("a fault")], ids=repr)
def test_an_unexpected_error_is_raised(error: Exception) -> None:
    async def task(health: Health) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(type(error)) as caught:
        run(task)
    assert caught.value is error


def test_cancellation_is_not_a_failure() -> None:
    stats = Counters()

    async def task(health: Health) -> None:
        await trio.sleep_forever()

    async def main() -> bool:
        with trio.move_on_after(1) as scope:  # one second of simulated time
            await supervise(Health("task"), task, stats)
        return scope.cancelled_caught

    assert trio.run(main, clock=MockClock(autojump_threshold=0))
    assert stats.snapshot() == Stats()


def test_pauses_grow_to_the_cap() -> None:
    backoff = Backoff()
    centres = [0.005, 0.01, 0.02, 0.04, 0.08, 0.08, 0.08]
    for centre in centres:
        assert 0.8 * centre <= backoff.next() <= 1.2 * centre
    backoff.reset()
    assert backoff.next() <= 1.2 * 0.005


def test_pauses_are_randomised() -> None:
    first, second = ([backoff.next() for backoff in [Backoff()] for _ in range(20)] for _ in range(2))
    assert first != second
