"""Tests of how the outbound direction handles a lone trigger, with a fake link and the real inotify."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.counters import Counters
from inco_trio.links.link import Link, LinkDownError
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import EVENT, Inotify, parse_events
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.handoff import Batch, Handoff
from inco_trio.proxy.outbound import Outbound
from inco_trio.proxy.supervise import Health, supervise
from inco_trio.registers.registers import Registers
from inco_trio.signals import Direction, Signal, SignalTable
from netns.hang import HANG
from tests.support_registers import finish_steps


class FakeLink:
    """A link that records each frame with the number of events in flight; it refuses frames while `down`."""

    fd = -1

    def __init__(self, inflight: Inflight) -> None:
        self.inflight = inflight
        self.sent: list[tuple[str, int]] = []
        self.down = False

    def send(self, name: str) -> None:
        if self.down:
            raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        self.sent.append((name, sum(len(parse_events(bank.view)) for bank in self.inflight.events)))


class World:
    """Two triggers and a link, with the hand-off and the tasks that connect them."""

    def __init__(self, irq: Path, ending: ExitStack) -> None:
        self.notify = Signal("redun_notify_irq", Direction.OUTBOUND, irq, "message_6_trig")
        self.uart = Signal("uart_irq", Direction.OUTBOUND, irq, "message_1_trig")
        self.counters = Counters()
        self.inotify, self.inflight = Inotify(), Inflight.open()
        self.registers = Registers(self.inotify, self.inflight, self.counters)
        for part in (self.inflight, self.inotify, self.registers):
            ending.callback(part.close)
        finish_steps(self.registers.open(SignalTable([self.notify, self.uart])))
        self.triggers = self.registers.triggers
        self.follow_queued()
        self.link = FakeLink(self.inflight)
        self.carried: list[str] = []
        self.begin()

    def begin(self) -> None:
        """Create the outbound direction of a new process with the in-flight buffer of the previous one."""
        self.handoff = Handoff[Signal](
            self.inflight.watches, lambda signals, *_: self.carried.extend(signal.name for signal in signals)
        )
        self.outbound = Outbound(
            self.handoff, cast(Link, self.link), self.triggers, self.inotify, self.inflight, self.counters
        )

    def queued(self) -> bytes:
        buffer = memoryview(bytearray(1 << 16))
        return bytes(buffer[: self.inotify.read_into(buffer)])

    def follow_queued(self) -> None:
        while data := self.queued():
            self.triggers.follow(parse_events(data))

    def wd_of(self, signal: Signal) -> int:
        return self.triggers.by_path[signal.path].wd

    def closed_alone(self, data: bytes) -> Signal | None:
        return self.triggers.closed_alone(memoryview(data.ljust(4096, b"\0")), len(data))

    @property
    def in_flight(self) -> int:
        return sum(len(parse_events(bank.view)) for bank in self.inflight.events)

    def run(self, *acts: Callable[[], None]) -> None:
        """Run the tasks. Whenever all of them are blocked, call the next function in `acts`; stop after the last."""

        async def main() -> None:
            with trio.fail_after(HANG):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.outbound.send, Health("send"))
                    nursery.start_soon(self.outbound.triggers, Health("triggers"))
                    await wait_all_tasks_blocked()
                    for act in acts:
                        act()
                        # Trio notices a readable descriptor only when its event loop runs again.
                        while self.inotify.queued:
                            await trio.lowlevel.checkpoint()
                        await wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()

        trio.run(main)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as ending:
        yield World(tmp_path / "irq", ending)


def write(*signals: Signal) -> None:
    for signal in signals:
        signal.path.write_text("1")


def test_a_lone_trigger_is_in_flight_only_until_it_is_sent(world: World) -> None:
    world.run(lambda: write(world.notify))
    assert world.link.sent == [("redun_notify_irq", 2)]
    assert world.in_flight == 0
    assert world.carried == ["redun_notify_irq"]
    assert (world.counters.triggered, world.counters.sent, world.counters.send_failures) == (1, 1, 0)


def test_a_lone_trigger_makes_no_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def act() -> None:
        monkeypatch.setattr(Handoff, "begin", lambda *_: pytest.fail("a batch was created"))
        write(world.notify)

    world.run(act)
    assert world.link.sent == [("redun_notify_irq", 2)]


def test_a_lone_trigger_that_the_link_refuses_stays_in_flight_and_is_sent_once(world: World) -> None:
    def act() -> None:
        world.link.down = True
        write(world.notify)

    world.run(act)
    assert (world.link.sent, world.in_flight, world.carried) == ([], 2, [])
    assert (world.counters.triggered, world.counters.sent) == (1, 0)
    world.link.down = False
    world.begin()
    world.outbound.recover()
    world.run()
    assert [name for name, _ in world.link.sent] == ["redun_notify_irq"]
    assert world.in_flight == 0


def test_a_lone_trigger_does_not_overtake_pending_ones(world: World) -> None:
    def trigger_while_down() -> None:
        world.link.down = True
        write(world.uart)

    def trigger_when_up() -> None:
        world.link.down = False
        write(world.notify)

    def change() -> None:
        assert world.link.sent == []
        world.outbound.link_changed()

    world.run(trigger_while_down, trigger_when_up, change)
    assert [name for name, _ in world.link.sent] == ["uart_irq", "redun_notify_irq"]


def test_a_flood_of_events_lets_other_tasks_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = turns = 0
    stranger = world.notify.directory / "stranger"
    read_into = world.inotify.read_into

    def read(buffer: memoryview) -> int:
        """Cause more events than one read returns."""
        nonlocal reads
        if reads < 20:
            for _ in range(512):
                stranger.touch()
                stranger.unlink()
            reads += 1
        return read_into(buffer)

    monkeypatch.setattr(world.inotify, "read_into", read)

    async def main() -> None:
        nonlocal turns
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.outbound.triggers, Health("triggers"))
            while reads < 20:
                await trio.lowlevel.checkpoint()
                turns += 1
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert turns >= 20


def test_a_lone_close_with_or_without_a_write_is_recognised(world: World) -> None:
    write(world.notify)
    assert world.closed_alone(world.queued()) == world.notify
    world.notify.path.open("a").close()
    assert world.closed_alone(world.queued()) == world.notify


def test_a_lone_close_of_a_trigger_outside_the_table_is_ignored(world: World) -> None:
    write(world.notify)
    data = world.queued()
    trio.run(world.registers.reload, SignalTable([world.uart]))
    assert world.closed_alone(data) is None


def test_no_close_counts_as_lone_while_a_replaced_trigger_is_uncounted(world: World) -> None:
    """If no event reports that a trigger was replaced, the proxy counts the trigger with the next events."""
    new = world.notify.path.with_name("new")
    new.write_text("1")
    new.rename(world.notify.path)
    world.queued()  # Discard the events, as if they had been lost.
    world.triggers.look(world.triggers.by_path[world.notify.path], make=False)
    write(world.uart)
    data = world.queued()
    assert world.closed_alone(data) is None
    assert world.triggers.follow(parse_events(data)).signals == [world.uart, world.notify]


def test_the_lone_path_agrees_with_the_full_path(world: World) -> None:
    wds = [world.wd_of(world.notify), world.wd_of(world.uart), 4711]
    masks = [ino.IN_MODIFY, ino.IN_CLOSE_WRITE, ino.IN_CLOSE_WRITE | ino.IN_UNMOUNT, ino.IN_CREATE, ino.IN_Q_OVERFLOW]
    single = list(itertools.product(wds, masks))
    lone = 0
    for events in [[], *([one] for one in single), *map(list, itertools.product(single, repeat=2)), single]:
        data = b"".join(EVENT.pack(wd, mask, 0, 0) for wd, mask in events)
        if signal := world.closed_alone(data):
            assert world.triggers.follow(parse_events(data)).signals == [signal]
            lone += 1
    assert lone == 2 + 3 * 2


@pytest.mark.parametrize("offered", ["offer", "hand_over_read"])
def test_a_notification_that_waited_for_a_blocked_link_is_reported_as_late(
    world: World, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch arrives before the proxy reports that the link is blocked, so it is never reported as pending."""
    monkeypatch.setattr("inco_trio.proxy.handoff.LATE", 0)
    reported: list[int] = []
    world.handoff.report = lambda _signals, _frames, since: reported.append(since)
    room = trio.Event()

    class FullLink(FakeLink):
        def send(self, name: str) -> None:
            if not room.is_set():
                raise BlockingIOError
            super().send(name)

        async def wait_for_room(self) -> None:
            await room.wait()

    world.outbound._link = cast(Link, FullLink(world.inflight))

    async def main() -> None:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.outbound.send, Health("send"))
                await world.handoff.hand_over(world.handoff.begin(Batch([world.notify])))
                second = world.handoff.begin(Batch([world.uart], finished=trio.Event()))
                nursery.start_soon(getattr(world.handoff, offered), second)
                await wait_all_tasks_blocked()
                room.set()
                assert second.finished is not None
                await second.finished.wait()
                assert reported[1] == second.offered > 0
                await wait_all_tasks_blocked()
                assert world.handoff.unread_since == (-second.offered if offered == "hand_over_read" else 0)
                nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("first", [1, 2])
def test_a_stop_just_after_a_read_marks_the_following_notification(
    world: World, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler of SIGCONT runs after the proxy has read the first events, and before it has processed them."""
    reported: list[tuple[str, int]] = []
    world.handoff.report = lambda signals, _frames, since: reported.extend((each.name, since) for each in signals)
    read_into, since = world.inotify.read_into, time.monotonic_ns()

    def read_and_stop(buffer: memoryview) -> int:
        length = read_into(buffer)
        if length:
            monkeypatch.undo()
            write(world.uart)
            world.handoff.leave_unread(since)
        return length

    monkeypatch.setattr(world.inotify, "read_into", read_and_stop)
    world.run(lambda: write(*[world.notify, world.uart][:first]), lambda: write(world.notify))
    assert reported[first:] == [("uart_irq", -since), ("redun_notify_irq", 0)]


def test_a_stop_while_the_queue_is_examined_marks_the_following_notification(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = time.monotonic_ns(), time.monotonic_ns()

    def stop(_: Inotify) -> int:
        world.handoff.leave_unread(second)
        return 0

    monkeypatch.setattr(Inotify, "queued", property(stop))
    world.handoff.leave_unread(first)
    world.outbound.check_unread()
    assert 0 < -world.handoff.unread_since <= second


class SlowLink(FakeLink):
    """A link with a queue for one frame. The frame leaves the queue after `duration` seconds."""

    def __init__(self, inflight: Inflight, duration: float) -> None:
        super().__init__(inflight)
        self.duration = duration
        self.free_at = 0.0

    def send(self, name: str) -> None:
        if trio.current_time() < self.free_at:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        super().send(name)
        self.free_at = trio.current_time() + self.duration


@pytest.mark.parametrize("duration", [0.002, 0.0058, 0.03])
def test_a_queue_of_one_frame_takes_at_most_twice_the_time_of_the_link(world: World, duration: float) -> None:
    link = SlowLink(world.inflight, duration)
    world.outbound._link = cast(Link, link)

    async def main() -> float:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.outbound.send, Health("send"))
                started = trio.current_time()
                # Hand over one batch, as after a burst of triggers.
                batch = Batch([world.notify] * 500, finished=trio.Event())
                await world.handoff.hand_over(world.handoff.begin(batch))
                assert batch.finished is not None
                await batch.finished.wait()
                nursery.cancel_scope.cancel()
        return trio.current_time() - started

    # The test's clock advances only while all tasks are waiting.
    took = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(link.sent) == 500
    assert took <= 2 * 500 * duration


def test_a_failure_of_the_task_loses_no_notification_of_its_batch(world: World) -> None:
    """The report of the first notification fails once the second one has to wait for the link."""
    batch = Batch([world.notify, world.uart, world.uart], finished=trio.Event())
    failures = iter([OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))])

    def report(signals: Sequence[Signal], *_: object) -> None:
        for failure in failures:
            raise failure
        world.carried.extend(signal.name for signal in signals)

    class FallingLink(FakeLink):
        def send(self, name: str) -> None:
            super().send(name)
            self.down = len(self.sent) == 1

    link = FallingLink(world.inflight)
    world.outbound._link = cast(Link, link)
    world.handoff.report = report

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervise, Health("send"), world.outbound.send, world.counters)
            await world.handoff.hand_over(world.handoff.begin(batch))
            while not world.carried:  # noqa: ASYNC110 - no event reports the end of the pause before the restart
                await trio.sleep(0.1)  # The clock is simulated.
            assert world.carried == ["redun_notify_irq"]
            link.down = False
            world.outbound.link_changed()
            assert batch.finished is not None
            await batch.finished.wait()
            following = world.handoff.begin(Batch([world.notify], finished=trio.Event()))
            await world.handoff.hand_over(following)
            assert following.finished is not None
            await following.finished.wait()
            nursery.cancel_scope.cancel()

    async def limited() -> None:
        with trio.fail_after(HANG):
            await main()

    trio.run(limited, clock=MockClock(autojump_threshold=0))
    names = ["redun_notify_irq", "uart_irq", "uart_irq", "redun_notify_irq"]
    assert ([name for name, _ in link.sent], world.carried) == (names, names)
    assert not world.handoff.unfinished
    assert world.counters.restarts == 1
