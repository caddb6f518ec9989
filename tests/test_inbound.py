"""Tests of how the inbound direction reports late notifications, with a fake link and real registers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
import trio

from inco_trio.counters import Counters
from inco_trio.frame import encode
from inco_trio.links.link import Link
from inco_trio.linux.inotify import Inotify
from inco_trio.persist.inflight import PENDING, Inflight
from inco_trio.proxy.handoff import Handoff
from inco_trio.proxy.inbound import Inbound
from inco_trio.registers.registers import Registers
from inco_trio.registers.states import RUNS, StateFile
from inco_trio.signals import SignalTable, builtin_signals
from netns.hang import HANG
from tests.support_registers import finish_steps

RESET, HWWD = "ihub_reset_irq", "ihub_hwwd_irq"


class FakeLink:
    """A link over a socket pair. It calls `after_read` once, after the first read that empties the queue."""

    name, foreign = "a socket", 0

    def __init__(self, ending: ExitStack) -> None:
        self._ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in self._ends:
            ending.callback(end.close)
            end.setblocking(False)
        self.fd = self._ends[0].fileno()
        self.after_read: Callable[[], None] | None = None

    def put(self, *names: str) -> None:
        for name in names:
            self._ends[1].send(encode(name.encode(), bytes(6)))

    def receive_one(self, room: memoryview) -> int:
        try:
            return self._ends[0].recv_into(room)
        except BlockingIOError:
            act, self.after_read = self.after_read, None
            if act is not None:
                act()
            return -1

    def receive_into(self, rooms: Sequence[memoryview], _step: int) -> list[int]:
        lengths = []
        for room in rooms:
            if (length := self.receive_one(room)) < 0:
                break
            lengths.append(length)
        return lengths

    def dropped(self) -> int:
        return 0


class World:
    """The built-in state files, and the inbound direction without its tasks."""

    def __init__(self, irq: Path, ending: ExitStack) -> None:
        counters, inotify, self.inflight = Counters(), Inotify(), Inflight.open()
        self.registers = Registers(inotify, self.inflight, counters)
        for part in (self.inflight, inotify, self.registers):
            ending.callback(part.close)
        finish_steps(self.registers.open(SignalTable(builtin_signals(irq))))
        self.link = FakeLink(ending)
        self.reported: list[tuple[str, int]] = []
        self.handoff = Handoff[StateFile](self.inflight.watches, self.report)
        self.registers.states.delivered_late = lambda files, since: self.report(files, (), since)
        self.inbound = Inbound(self.handoff, cast(Link, self.link), self.registers.states, self.inflight, counters)

    def report(self, files: Sequence[StateFile], _frames: Sequence[bytes], since: int) -> None:
        self.reported += [(file.signal.name, since) for file in files]

    def restore(self) -> None:
        """Write the pending notifications."""
        assert all(self.registers.states.write_pending(self.registers.states.file_of(RESET).directory))

    def receive(self) -> None:
        """Read the link until it is empty, and write the state files."""

        async def main() -> None:
            with trio.fail_after(HANG):
                await self.inbound._receive_queued()

        trio.run(main)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as ending:
        yield World(tmp_path / "irq", ending)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_stop_just_after_the_queue_was_emptied_marks_the_following_notification(world: World, first: int) -> None:
    """The handler of SIGCONT runs after the read that found the queue empty, and before the proxy processes this."""
    since = time.monotonic_ns()

    def stop() -> None:
        world.link.put(HWWD)
        world.handoff.leave_unread(since)

    world.link.put(*[RESET] * first)
    world.link.after_read = stop
    world.receive()
    world.receive()
    world.link.put(RESET)
    world.receive()
    assert world.reported[first:] == [(HWWD, -since), (RESET, 0)]


@pytest.mark.parametrize("number", [1, 3])
def test_a_notification_that_waited_in_the_kernel_and_then_becomes_pending_has_no_exact_delay(
    world: World, number: int
) -> None:
    file = world.registers.states.file_of(RESET)
    state = file.signal.path
    state.unlink()
    state.mkdir()
    world.link.put(RESET)
    world.receive()
    ((exactly_since, _),) = file.runs
    # For example, no event was recorded since this time, and SIGSTOP had stopped the process.
    since = exactly_since - 10**9
    world.handoff.leave_unread(since)
    world.link.put(*[RESET] * number)
    world.receive()
    assert world.inflight.times[PENDING] == since
    world.link.put(RESET)
    world.receive()
    state.rmdir()
    state.touch()
    world.restore()
    last = world.reported.pop()
    assert world.reported == [(RESET, exactly_since), *[(RESET, -since)] * number]
    assert last[1] > exactly_since


def test_the_times_of_many_pending_notifications_are_equally_exact(world: World) -> None:
    file = world.registers.states.file_of(RESET)
    for total in range(1, 20 * RUNS):
        file.pend()
        numbers = [number for _, number in file.runs]
        assert sum(numbers) == total
        assert len(set(numbers[:-1])) <= 1
        assert numbers[-1] <= numbers[0]
        assert min(total, RUNS // 2) <= len(numbers) <= RUNS
    for _ in file.unpend(total):
        pass
    for _ in range(RUNS):
        file.pend()
    assert [number for _, number in file.runs] == [1] * RUNS


def test_merged_times_are_no_later_than_each_of_them(world: World) -> None:
    file = world.registers.states.file_of(RESET)
    times = [number * 10**6 - (number % 3 == 1) * 5 * 10**6 for number in range(10, 10 + 3 * RUNS)]
    for number, since in enumerate(times):
        file.pend(-since if number % 2 else since)
    found = [since for since, number in file.unpend(len(times)) for _ in range(number)]
    assert len(found) == len(times)
    for since, bound in zip(times, found, strict=True):
        assert bound == since or 0 < -bound <= since
