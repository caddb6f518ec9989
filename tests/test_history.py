"""Tests of the history of unacknowledged notifications, with random followers, restarts and kills."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.config import Config
from inco_trio.control.answering import Connection
from inco_trio.control.feed import Feed
from inco_trio.control.monitors import PIECE, Follower
from inco_trio.control.protocol import Event, Notifications, decode_reply
from inco_trio.control.server import Peer
from inco_trio.errors import ResourceError
from inco_trio.persist import followed as room
from inco_trio.persist.fdstore import NoFdStore
from inco_trio.persist.followed import History
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.proxy import Proxy, open_supervised
from inco_trio.signals import Direction, Signal
from inco_trio.testing.layout import make_layout
from netns.hang import HANG

SIGNALS = [Signal(f"in{n}_irq", Direction.INBOUND, Path("/irq"), f"in{n}") for n in range(2)]
SIGNALS += [Signal(f"out{n}_irq", Direction.OUTBOUND, Path("/irq"), f"out{n}") for n in range(2)]
BOARD = "board"
NOW = (2 * 10**9, 10**17)
"""The wall-clock and monotonic times of all notifications. Any pause of a follower ends before this monotonic time."""
FEW = 6


def single_events(line: str) -> list[Event]:
    """Return the events in one line. A `notifications` event contains several events."""
    reply = decode_reply(line.encode())
    if isinstance(reply, Event):
        return [reply]
    assert isinstance(reply, Notifications)
    return [
        Event(
            "notification", reply.board, time, monotonic_ns, *reply.signals[index], sequence=sequence, boot=reply.boot
        )
        for sequence, (index, time, monotonic_ns) in enumerate(reply.items, reply.sequence)
    ]  # fmt: skip


class ServedBoard:
    """A stand-in for the boards that a control socket serves, without any proxies."""

    name = BOARD

    def proxies(self) -> dict[str, Proxy]:
        return {}

    def not_open(self) -> dict[str, str]:
        return {}


class Walk(RuleBasedStateMachine):
    """A random test with successive followers of a board, a small history limit and an even smaller read-ahead."""

    steady = False
    """Whether the walk has only one follower and one process."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(room, "KEPT", FEW)
        self.patch.setattr("inco_trio.control.monitors.AHEAD", 3)
        self.inflight = Inflight.open()
        self.history = History(self.inflight.history)
        self.history.begin(41)
        self.boot = self.history.boot
        self.handled: list[Signal] = []
        self.received: dict[int, str] = {}
        self.counted: Counter[str] = Counter()
        self.merged: Counter[str] = Counter()
        self.follower: Follower | None = None
        self.unacknowledged: list[Event] = []
        self.last = 0
        """The number of the last event that the follower received."""
        self.killed = False

    def teardown(self) -> None:
        if self.follower is None:
            self.follow(batches=True)
        while self.history.waiting:
            self.read()
            self.acknowledge(len(self.unacknowledged))
        sent = Counter(signal.name for signal in self.handled)
        told = Counter(self.received.values())
        for name, number in sent.items():
            assert told[name] + self.merged[name] >= number
        if not self.killed:
            # Unless a process is killed, no notification arrives twice.
            assert told + self.merged == sent
        assert self.history.sequence == 41 + len(self.handled)
        self.patch.undo()
        os.close(self.inflight.fd)

    @rule(signals=st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=FEW + 2))
    def handle(self, signals: list[Signal]) -> None:
        self.history.append(signals, NOW)
        self.handled += signals
        if self.follower is not None:
            self.follower.appended(BOARD, signals, NOW)

    @precondition(lambda self: not self.steady or self.follower is None)
    @rule(batches=st.booleans())
    def follow(self, batches: bool) -> None:
        """Start another follower, which can receive unacknowledged notifications a second time."""
        self.killed |= bool(self.unacknowledged)
        self.unacknowledged, self.last = [], 0
        self.follower = Follower(batches=batches, transmit=self._receive)
        self.follower.begin(BOARD, self.history)

    @precondition(lambda self: not self.steady)
    @rule()
    def restart(self) -> None:
        """Reopen the history, as a new process that inherits the memory does."""
        self.killed |= bool(self.unacknowledged)
        self.unacknowledged, self.follower = [], None
        other = Inflight.open(os.dup(self.inflight.fd))
        os.close(self.inflight.fd)
        self.inflight, self.history = other, History(other.history)
        self.history.begin(7)  # This has no effect, because the history has already begun.

    @precondition(lambda self: self.follower is not None)
    @rule()
    def read(self) -> None:
        follower = self.follower
        assert follower is not None
        self._receive("".join(follower._stored()).encode())
        if not follower._behind:  # Wait for events, as `take` does. The follower then transmits new events immediately.
            follower._arrived, follower._is_idle = trio.Event(), True

    def _receive(self, lines: bytes) -> int:
        events = [event for line in lines.decode().splitlines() for event in single_events(line)]
        # An acknowledgement covers all lower numbers, so the numbers must arrive in ascending order.
        numbers = [self.last, *(event.sequence for event in events)]
        assert numbers == sorted(set(numbers))
        self.last = numbers[-1]
        for event in events:
            assert (event.board, event.boot) == (BOARD, self.boot)
        self.unacknowledged += events
        return len(lines)

    @precondition(lambda self: self.follower is not None)
    @rule(number=st.integers(1, 5))
    def acknowledge(self, number: int) -> None:
        assert self.follower is not None
        done, self.unacknowledged = self.unacknowledged[:number], self.unacknowledged[number:]
        for event in done:
            name = str(event.signal)
            if event.event == "merged":
                self.merged[name] += event.count
            else:
                assert self.handled[event.sequence - 42].name == name
                self.received[event.sequence] = name
        if done:
            last = done[-1].sequence
            assert self.follower.acknowledge(BOARD, last) == last

    @precondition(lambda self: self.follower is not None)
    @rule(signals=st.lists(st.sampled_from(SIGNALS), min_size=FEW + 1, max_size=FEW + 2), number=st.integers(1, 2))
    def overflow(self, signals: list[Signal], number: int) -> None:
        """While some notifications are unacknowledged, handle more than the history keeps."""
        self.read()
        self.handle(signals)
        self.acknowledge(number)
        self.read()

    @invariant()
    def history_is_consistent(self) -> None:
        history = self.history
        assert history.sequence - history.floor <= FEW
        kept = history.after(0, 100)
        assert [record.sequence for record in kept] == list(range(history.floor + 1, history.sequence + 1))
        for record in kept:
            signal = self.handled[record.sequence - 42]
            assert (record.name, record.direction) == (signal.name, signal.direction)


class SteadyWalk(Walk):
    """A random test with a single follower, which receives nothing twice."""

    steady = True


@pytest.mark.parametrize("machine", [Walk, SteadyWalk])
def test_random_walk_loses_nothing_unless_killed(machine: type[Walk]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40))


def test_later_notifications_wait_for_merged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge more notifications before the follower acknowledges the earlier merged ones. Then kill the follower."""
    monkeypatch.setattr(room, "KEPT", FEW)
    monkeypatch.setattr("inco_trio.control.monitors.AHEAD", 3)
    inflight = Inflight.open()
    history = History(inflight.history)
    history.begin(0)
    received = 0

    def follow() -> Follower:
        follower = Follower()
        follower.begin(BOARD, history)
        return follower

    def handle(follower: Follower, number: int) -> list[tuple[str, int, int]]:
        history.append(SIGNALS[:1] * number, NOW)
        follower.appended(BOARD, SIGNALS[:1] * number, NOW)
        return read(follower)

    def read(follower: Follower) -> list[tuple[str, int, int]]:
        events = [event for line in follower._stored() for event in single_events(line)]
        return [(event.event, event.sequence, event.count) for event in events]

    def acknowledge(follower: Follower, *events: tuple[str, int, int]) -> None:
        nonlocal received
        received += sum(count or 1 for _, _, count in events)
        follower.acknowledge(BOARD, events[-1][1])

    first = follow()
    one, two, three = handle(first, 3)
    (merged,) = handle(first, 7)
    assert merged == ("merged", 4, 1)
    assert handle(first, 2) == []
    acknowledge(first, one, two)
    assert read(first) == []  # 5 and 6 are merged, but `merged` has not been acknowledged yet.
    acknowledge(first, three, merged)
    second, *others = read(first)
    assert (second, others[0]) == (("merged", 6, 2), ("notification", 7, 0))
    acknowledge(first, second, others[0])
    last = follow()
    while events := read(last):
        acknowledge(last, *events)
    assert (received, history.waiting) == (12, 0)
    inflight.close()


def test_an_ended_history_is_empty() -> None:
    inflight = Inflight.open()
    history = History(inflight.history)
    history.begin(0)
    history.append(SIGNALS * (room.KEPT // len(SIGNALS) + 1), NOW)
    assert history.waiting == len(SIGNALS) * (room.KEPT // len(SIGNALS) + 1)
    assert history.merged_ever == len(SIGNALS)
    history.end()
    assert (history.keeping, list(history.merged())) == (False, [])
    before = history.boot
    history.begin(5)
    assert (history.waiting, history.sequence) == (0, 5)
    assert history.boot != before
    inflight.close()


@pytest.fixture
def new_history() -> Iterator[Callable[[], History]]:
    """Yield a function that begins a history in new memory."""
    with ExitStack() as stack:

        def make() -> History:
            inflight = Inflight.open()
            stack.callback(inflight.close)
            history = History(inflight.history)
            history.begin(0)
            return history

        yield make


def test_a_replaced_history_is_read_to_its_end_first(new_history: Callable[[], History]) -> None:
    """A board that is removed and added again starts a new history; the rest of the old history is not lost."""

    async def main() -> list[tuple[str, int]]:
        follower = Follower()
        boots = []
        for _ in range(2):
            history = new_history()
            boots.append(history.boot)
            follower.begin(BOARD, history)
            history.append(SIGNALS[:1] * 3, NOW)
        lines: list[dict[str, Any]] = []
        while len(lines) < 6:
            lines += map(json.loads, (await follower.take()).splitlines())
        return [(str(boots.index(line["boot"])), line["sequence"]) for line in lines]

    # Both histories are filled before the follower reads.
    assert trio.run(main) == [(boot, sequence) for boot in "01" for sequence in (1, 2, 3)]


def test_a_long_rest_of_a_replaced_history_precedes_the_next_history(new_history: Callable[[], History]) -> None:
    """The rest of the old history does not fit into the lines that a single call to `take` returns."""

    async def main() -> None:
        follower, read = Follower(), list[tuple[str, int]]()
        old, new = new_history(), new_history()
        for history in (old, new):
            follower.begin(BOARD, history)
            history.append(SIGNALS[:1] * (3 * PIECE), NOW)
        while len(read) < 6 * PIECE:
            for line in (await follower.take()).splitlines():
                event = json.loads(line)
                read.append((event["boot"], event["sequence"]))
        assert read == [(history.boot, number + 1) for history in (old, new) for number in range(3 * PIECE)]

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("batches", [False, True])
def test_a_reopened_board_continues_its_history(batches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next proxy uses the same memory. Merged, sent and unsent notifications each arrive exactly once."""
    monkeypatch.setattr(room, "KEPT", FEW)
    monkeypatch.setattr("inco_trio.control.monitors.AHEAD", 3)
    inflight, follower, events = Inflight.open(), Follower(batches=batches), list[Event]()
    History(inflight.history).begin(0)
    for number in (3, 7, 4, 2):
        history = History(inflight.history)
        follower.begin(BOARD, history)
        history.append(SIGNALS[:1] * number, NOW)
        follower.appended(BOARD, SIGNALS[:1] * number, NOW)
        events += [event for line in follower._stored() for event in single_events(line)]
    while history.waiting:
        assert follower.acknowledge(BOARD, events[-1].sequence) == events[-1].sequence
        events += [event for line in follower._stored() for event in single_events(line)]
    numbers = [event.sequence for event in events]
    assert numbers == sorted(set(numbers))
    assert sum(event.count or 1 for event in events) == history.sequence == 16
    inflight.close()


@pytest.mark.parametrize("acknowledged", [0, 4], ids=["merged unacknowledged", "merged acknowledged"])
def test_a_replaced_history_with_merged_notifications_is_read_once(
    acknowledged: int, monkeypatch: pytest.MonkeyPatch, new_history: Callable[[], History]
) -> None:
    """The follower's queue is full from the second event onwards."""
    monkeypatch.setattr(room, "KEPT", FEW)
    monkeypatch.setattr("inco_trio.control.monitors.AHEAD", 3)
    monkeypatch.setattr("inco_trio.control.monitors.WAITING_MAX", 1)
    old, new = new_history(), new_history()
    events: list[Event] = []

    async def main() -> None:
        feed, follower = Feed(ServedBoard()), Follower()

        async def read() -> None:
            for line in (await follower.take()).decode().splitlines():
                events.extend(single_events(line))

        def handle(number: int) -> None:
            old.append(SIGNALS[:1] * number, NOW)
            follower.appended(BOARD, SIGNALS[:1] * number, NOW)

        feed.add(follower)
        feed.opened(lambda: old)
        handle(3)
        await read()
        handle(7)
        await read()
        assert (events[-1].event, events[-1].count) == ("merged", 1)
        if acknowledged:
            follower.acknowledge(BOARD, acknowledged)
            await read()
        handle(4)
        feed.ended()
        feed.opened(lambda: new)
        with trio.fail_after(HANG):
            while events[-1].event != "opened":
                await read()
        feed.remove(follower)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert sum(event.count or 1 for event in events if event.event in ("notification", "merged")) == old.sequence
    assert [event.event for event in events if event.event in ("opened", "closed")] == ["opened", "closed", "opened"]


def test_a_large_backlog_does_not_delay_other_boards(new_history: Callable[[], History]) -> None:
    async def main() -> None:
        follower = Follower()
        histories = {name: new_history() for name in ("a", "b")}
        for name in histories:
            follower.begin(name, histories[name])
        histories["a"].append(SIGNALS[:1] * 500, NOW)
        histories["b"].append(SIGNALS[:1], NOW)
        boards = [json.loads(line)["board"] for _ in range(2) for line in (await follower.take()).splitlines()]
        assert "b" in boards

    trio.run(main)


class SlowClient:
    """A control socket client that reads only when `read` is called. Its connection has a tiny send buffer."""

    def __init__(self, feed: Feed, user: int | None = None) -> None:
        proxy, self._client = socket.socketpair()
        proxy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._client.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(proxy))
        self.connection = Connection(stream, Peer(1, os.geteuid() if user is None else user), feed, "0", self._reload)
        self._received = b""
        self.closing = contextlib.ExitStack()
        for each in (proxy, self._client):
            self.closing.enter_context(each)

    async def _reload(self) -> list[str]:
        raise AssertionError

    async def send(self, *requests: Mapping[str, object]) -> None:
        """Send requests, and wait until the connection has handled them or is waiting for the client."""
        self.put(*requests)
        await wait_all_tasks_blocked()

    def put(self, *requests: Mapping[str, object]) -> None:
        """Send requests without waiting."""
        self._client.send(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    async def receive(self) -> bytes:
        """Return up to 64 KiB that the proxy has written, or b"" if it has written nothing."""
        await wait_all_tasks_blocked()
        try:
            return self._client.recv(1 << 16)
        except BlockingIOError:
            return b""

    def leave(self) -> None:
        """Close the connection."""
        self._client.close()

    async def read(self) -> list[dict[str, Any]]:
        """Return all lines that the proxy has written and that `read` has not returned yet."""
        while data := await self.receive():
            self._received += data
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("batches", [False, True])
def test_a_response_does_not_split_an_event_that_was_only_partly_written(batches: bool) -> None:
    """The send buffer accepts the first part of the events. The client then sends requests before it reads more."""

    async def main() -> list[dict[str, Any]]:
        feed, history = Feed(ServedBoard()), History(Inflight.open().history)
        history.begin(0)
        client = SlowClient(feed)
        with client.closing:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.connection.run)
                await client.send({"request": "follow", "batches": batches})
                feed.opened(lambda: history)
                await client.read()
                history.append(SIGNALS * 25, NOW)
                feed.carried(SIGNALS * 25, 1, (), NOW, 0)
                await client.send(*[{"request": "status"}] * 3)
                lines = await client.read()
                await trio.sleep(1)  # The clock is simulated.
                lines += await client.read()
                nursery.cancel_scope.cancel()
        return lines

    lines = trio.run(main, clock=MockClock(autojump_threshold=0))
    events = [each for line in lines if "event" in line for each in single_events(json.dumps(line))]
    assert [each.sequence for each in events] == list(range(1, 4 * 25 + 1))
    assert [line for line in lines if "event" not in line] == [{"status": []}] * 3


def test_no_event_follows_a_response_that_was_only_partly_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy shuts down while it writes a response. It completes the response, then writes the queued events."""
    missing = {f"b{number}": "the interface does not exist" for number in range(100)}

    async def main() -> list[dict[str, Any]]:
        served = ServedBoard()
        monkeypatch.setattr(served, "not_open", lambda: missing)
        feed = Feed(served)
        client = SlowClient(feed)
        with client.closing:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.connection.run)
                await client.send({"request": "monitor"})
                await client.read()
                await client.send({"request": "status"})
                feed.offer("message", message="shutting down")
                await wait_all_tasks_blocked()
                client.connection.end()
                return await client.read()

    status, event = trio.run(main)
    assert (len(status["status"]), event["message"]) == (len(missing), "shutting down")


def test_a_board_whose_opening_failed_is_not_followed(tmp_path: Path) -> None:
    class Full(NoFdStore):
        def store(self, _name: str, _fd: int) -> None:
            raise ResourceError("fd store", "no space")

    layout, feed = make_layout(tmp_path, None, None), Feed(ServedBoard())
    for signal in layout.signals:
        signal.directory.mkdir(parents=True, exist_ok=True)

    async def main() -> None:
        async with open_supervised(Config(layout.address("core0", "core1"), layout.signals), Full(), feed):
            pytest.fail("the proxy was opened")

    with pytest.raises(ResourceError, match="no space"):
        trio.run(main)
    assert feed.histories_of == {}
