"""Tests of `Handoff`, the channel between the two tasks that handle one direction."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.errors import ClosedError
from inco_trio.persist.inflight import Bank, Inflight
from inco_trio.proxy.handoff import Batch, Handoff
from inco_trio.proxy.supervise import Health
from inco_trio.signals import Signal, builtin_signals
from netns.hang import HANG

RESET, HWWD, NOTIFY = builtin_signals(Path("/irq"))


class Recorder(Bank):
    """An in-flight buffer that only records that it was cleared."""

    def __init__(self, name: str, done: list[str]) -> None:
        super().__init__(memoryview(bytearray(7)), memoryview(bytearray(8)), memoryview(bytearray(8)), bytes(7))
        self._name = name
        self._done = done

    def clear(self, length: int) -> None:
        assert length == 7
        self._done.append(self._name)


class World:
    """A hand-off that records the names of finished batches (`done`) and their signals (`handled`)."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.handled: list[list[Signal]] = []
        self.inflight = Inflight.open()
        self.handoff = Handoff[Signal](self.inflight.watches, lambda signals, *_: self.handled.append(list(signals)))

    def batch(self, name: str, *signals: Signal) -> Batch[Signal]:
        return self.handoff.begin(Batch(list(signals), ((Recorder(name, self.done), 7),)))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.inflight.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def run(main: Callable[[], Coroutine[object, object, None]]) -> None:
    """Run `main`, and fail if it does not finish in time."""

    async def guarded() -> None:
        with trio.fail_after(HANG):
            await main()

    trio.run(guarded, clock=MockClock(autojump_threshold=0))


def test_a_batch_is_open_until_it_is_finished(world: World) -> None:
    batch = world.batch("first", RESET, HWWD, RESET)
    assert world.handoff.unfinished == {batch}
    world.handoff.finish(batch)
    assert world.handoff.unfinished == set()
    assert world.done == ["first"]
    assert world.handled == [[RESET, HWWD, RESET]]


def test_an_empty_batch_reports_no_signals(world: World) -> None:
    world.handoff.finish(world.batch("empty"))
    assert (world.done, world.handled) == (["empty"], [])


def test_batches_are_handed_over_in_order_one_at_a_time(world: World) -> None:
    taken: list[Batch[Signal]] = []
    batches = [world.batch(str(number), NOTIFY) for number in range(3)]

    async def read() -> None:
        for number, batch in enumerate(batches):
            await world.handoff.hand_over(batch)
            # The previous batch is finished, so its memory can be reused.
            assert len(world.done) >= number
        world.handoff.close()

    async def act() -> None:
        async for batch in world.handoff.exit:
            taken.append(batch)
            await trio.sleep(1)  # MockClock simulates this second.
            world.handoff.finish(batch)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(act)

    run(main)
    assert taken == batches
    assert world.done == ["0", "1", "2"]


def test_a_read_batch_is_handed_over_despite_cancellation(world: World) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.handoff.hand_over, world.batch("first", NOTIFY))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                world.handoff.finish(await world.handoff.exit.receive())

    run(main)
    assert world.done == ["first"]


def test_an_aborted_hand_over_ends_with_its_task(world: World) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.handoff.hand_over, world.batch("first", NOTIFY))
            await wait_all_tasks_blocked()
            world.handoff.abort()
            nursery.cancel_scope.cancel()

    run(main)
    assert (world.done, len(world.handoff.unfinished)) == ([], 1)


def test_a_hand_over_after_an_abort_ends_with_its_task(world: World) -> None:
    """Abort after the first batch has been taken: the task then hands over the second batch on a closed channel."""

    async def hand_over_two() -> None:
        await world.handoff.hand_over(world.batch("first", NOTIFY))
        await world.handoff.hand_over(world.batch("second", NOTIFY))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over_two)
            await wait_all_tasks_blocked()
            world.handoff.exit.receive_nowait()
            world.handoff.abort()
            world.handoff.close()
            nursery.cancel_scope.cancel()

    run(main)
    assert (world.done, len(world.handoff.unfinished)) == ([], 2)


def test_an_aborted_hand_over_fails_in_a_task_that_continues(world: World) -> None:
    async def hand_over() -> None:
        with pytest.raises(ClosedError):
            await world.handoff.hand_over(world.batch("first", NOTIFY))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over)
            await wait_all_tasks_blocked()
            world.handoff.abort()

    run(main)


def test_closing_the_channel_fails_a_waiting_hand_over(world: World) -> None:
    async def hand_over() -> None:
        with pytest.raises(ClosedError):
            await world.handoff.hand_over(world.batch("first", NOTIFY))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over)
            await wait_all_tasks_blocked()
            world.handoff.close()

    run(main)


def test_a_closed_channel_accepts_no_batch(world: World) -> None:
    async def main() -> None:
        world.handoff.close()
        with pytest.raises(ClosedError):
            await world.handoff.hand_over(world.batch("first", NOTIFY))
        with pytest.raises(ClosedError):
            await world.handoff.offer(world.batch("second", NOTIFY))
        assert [batch async for batch in world.handoff.exit] == []

    run(main)


def test_an_offer_can_be_withdrawn(world: World) -> None:
    async def main() -> None:
        with trio.move_on_after(1) as scope:  # MockClock simulates this second.
            await world.handoff.offer(world.batch("first", NOTIFY))
        assert scope.cancelled_caught
        assert world.handoff.unfinished == set()
        assert world.done == []

    run(main)


def test_a_taken_offer_is_an_unfinished_batch(world: World) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            batch = world.batch("first", NOTIFY)
            nursery.start_soon(world.handoff.offer, batch)
            assert await world.handoff.exit.receive() is batch
            assert world.handoff.unfinished == {batch}

    run(main)


def test_stopping_the_reader_reads_once_more(world: World, pipe: tuple[int, int]) -> None:
    reads: list[bytes] = []
    health = Health("task")
    health.failed("was broken")

    async def read_queued() -> None:
        await trio.lowlevel.checkpoint()
        try:
            reads.append(os.read(pipe[0], 100))
        except BlockingIOError:
            reads.append(b"")

    readable = functools.partial(trio.lowlevel.wait_readable, pipe[0])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.handoff.run_reader, readable, read_queued, health)
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"one")
            while len(reads) < 2:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            world.handoff.stop_reading()

    trio.run(main)
    assert reads == [b"", b"one", b""]
    assert health.problem is None


def test_data_that_arrives_with_the_stop_is_read(world: World, pipe: tuple[int, int]) -> None:
    reads: list[bytes] = []

    async def read_queued() -> None:
        await trio.lowlevel.checkpoint()
        reads.append(os.read(pipe[0], 100))

    readable = functools.partial(trio.lowlevel.wait_readable, pipe[0])

    async def main() -> None:
        world.handoff.stop_reading()
        os.write(pipe[1], b"late")
        await world.handoff.run_reader(readable, read_queued, Health("task"))

    trio.run(main)
    assert reads == [b"late"]
