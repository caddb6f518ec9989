"""Tests of the gateway with several proxies that have boards with the same name, with real control sockets.

Most tests replace the broker with a list, and the boards with histories, so that the clock can be simulated.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import mqtt5
import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from inco_trio.config import Config
from inco_trio.control.follower import Conversation
from inco_trio.control.place import listening
from inco_trio.control.protocol import AHEAD, Reply, SendRequest
from inco_trio.control.server import Control
from inco_trio.cores.core1 import Core1
from inco_trio.counters import Counters
from inco_trio.mqtt.backlog import HISTORIES, Board, Entry
from inco_trio.mqtt.configuration import GatewayConfig, parse_broker
from inco_trio.mqtt.gateway import FLUSH_PATIENCE, Gateway
from inco_trio.mqtt.publishing import BATCH, Publisher
from inco_trio.mqtt.session import Received
from inco_trio.mqtt.topics import Topics
from inco_trio.notifications import Events
from inco_trio.persist.fdstore import NoFdStore
from inco_trio.persist.followed import HISTORY, History
from inco_trio.problems import working_for
from inco_trio.proxy.proxy import open_supervised
from inco_trio.proxy_status import SignalStatus, Status
from inco_trio.signals import Direction, Signal
from inco_trio.testing.layout import make_layout
from netns.hang import HANG
from tests.test_mqtt_publishing import Connection

BROKER = parse_broker("mqtt://h/lab")
READ = Conversation.read
SIGNAL = Signal("s_irq", Direction.INBOUND, Path("/irq"), "s_state")
STATUS = Status("c0", 0.0, 0.0, True, "", None, Counters().snapshot(), (), ())
LATER = 5.0
"""Seconds of simulated time in which the gateway connects again and publishes what it can."""
ENDINGS = pytest.mark.parametrize("ending", ["the process ends", "the board is closed"])


async def _reload() -> tuple[str, ...]:
    return ()


class Opened:
    """An open board of a stand-in for a proxy. Its history is real."""

    def __init__(self, memory: bytearray, control: Control) -> None:
        self.events = Events(Counters(), History(memoryview(memory)), control.feed)
        control.feed.opened(self.events.keep)

    def _history(self) -> History:
        return self.events.history

    def _status(self) -> Status:
        return STATUS

    def _signals(self) -> tuple[SignalStatus, ...]:
        return STATUS.signals


class Process:
    """A stand-in for a proxy process. Its control socket is real. The memory of its boards outlives the process."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = "host", path
        self.open = dict[str, Any]()
        self.is_ready = True
        self.control: Control | None = None
        self._memories = dict[str, bytearray]()
        self._stopping = contextlib.ExitStack()

    def proxies(self) -> Mapping[str, Any]:
        return self.open if self.is_ready else {}

    def not_open(self) -> Mapping[str, str]:
        return dict.fromkeys(self._memories.keys() - self.open.keys(), "closed by the test")

    def start(self, nursery: trio.Nursery) -> None:
        listener = self._stopping.enter_context(listening(self.path))
        self.control = Control(self, listener, _reload)
        nursery.start_soon(self.control.serve)

    async def stop(self) -> None:
        assert self.control is not None
        for name in [*self.open]:
            self.close_board(name)
        self.control.close()
        await self.control.closed.wait()
        self.control = None
        self.remove_socket()

    def lose_histories(self) -> None:
        self._memories.clear()

    def remove_socket(self) -> None:
        self._stopping.close()

    def open_board(self, name: str = "b1") -> None:
        assert self.control is not None
        memory = self._memories.setdefault(name, bytearray(HISTORY))
        with working_for(name):
            self.open[name] = Opened(memory, self.control)

    def close_board(self, name: str = "b1") -> None:
        events = self.open.pop(name).events
        with working_for(name):
            events.close()

    def deliver(self, number: int = 1, name: str = "b1") -> None:
        with working_for(name):
            self.open[name].events.carried([SIGNAL] * number, ())

    def delivered(self, name: str = "b1") -> tuple[str, int]:
        """Return the history of a board and the number of its last notification."""
        history = History(memoryview(self._memories[name]))
        return history.boot, history.sequence


@attrs.define
class Bench:
    """A gateway with two processes. `published` lists the histories and numbers that the broker has acknowledged."""

    gateway: Gateway
    nursery: trio.Nursery
    first: Process
    second: Process
    published: dict[str, list[tuple[str, int]]]
    unanswered: dict[str, list[mqtt5.PublishPacket]]
    connections: dict[str, Connection]
    held: dict[Path, trio.Event] = attrs.Factory(dict)
    """For each control socket that the gateway does not read now, an event that is set when it may read again."""

    @asynccontextmanager
    async def unread(self, process: Process) -> AsyncIterator[None]:
        """Let the gateway handle nothing that `process` sends in this block."""
        self.held[process.path] = trio.Event()
        yield
        self.held.pop(process.path).set()

    async def read(self, conversation: Conversation) -> list[Reply]:
        replies = await READ(conversation)
        if (held := self.held.get(conversation.path)) is not None:
            await held.wait()
        return replies

    async def serve(self, board: Board) -> None:
        """Publish a board to a broker that answers when the test calls `answer`."""
        connection = self.connections[board.name] = Connection()
        publisher = Publisher(board, Topics("lab", board.name), connection, self.gateway._problems)  # type: ignore[arg-type]
        await publisher.run()

    def answer(self, number: int | None = None) -> None:
        """Acknowledge the oldest packets, at most `number`, for each board."""
        for name, connection in self.connections.items():
            packets = self.unanswered.setdefault(name, [])
            packets += connection.sent()
            done, self.unanswered[name] = packets[:number], packets[len(packets[:number]) :]
            for packet in done:
                body = json.loads(packet.payload)
                assert "time" in body, "merged notifications: the test delivers too many"
                self.published.setdefault(name, []).append((body["boot"], body["sequence"]))
            if done:
                connection.answer(*done)

    async def settle(self) -> None:
        """Acknowledge all packets until the gateway has published what it can."""
        end = trio.current_time() + LATER
        while trio.current_time() < end:
            self.answer()
            await trio.sleep(LATER / 50)  # The clock is simulated.

    def published_by(self, process: Process, name: str = "b1") -> list[int]:
        """Return the numbers of a board of `process` in the order of publication, without duplicates."""
        boot = process.delivered(name)[0]
        return [*dict.fromkeys(number for each, number in self.published.get(name, []) if each == boot)]

    def boots(self, name: str = "b1") -> list[str]:
        """Return the histories of a board in the order of publication."""
        return [*dict.fromkeys(boot for boot, _ in self.published[name])]

    def source(self, name: str = "b1") -> Process | None:
        source = self.gateway._boards[name].source
        return next((each for each in (self.first, self.second) if source and source.path == each.path), None)

    def check(self, name: str = "b1") -> None:
        """Check that each delivered notification was published once, in order and without a gap."""
        assert len(set(self.published.get(name, ()))) == len(self.published.get(name, ()))
        for process in (self.first, self.second):
            assert self.published_by(process, name) == [*range(1, process.delivered(name)[1] + 1)]


@asynccontextmanager
async def benched(tmp_path: Path) -> AsyncIterator[Bench]:
    first, second = Process(tmp_path / "first.sock"), Process(tmp_path / "second.sock")
    gateway = Gateway(BROKER, GatewayConfig(status_seconds=1), [first.path, second.path])
    with pytest.MonkeyPatch.context() as patch:
        async with trio.open_nursery() as nursery:
            bench = Bench(gateway, nursery, first, second, {}, {}, {})
            gateway._serve = bench.serve  # type: ignore[method-assign]
            patch.setattr(Conversation, "read", lambda conversation: bench.read(conversation))
            for process in (first, second):
                process.start(nursery)
            await nursery.start(_run, gateway)
            try:
                yield bench
            finally:
                for process in (first, second):
                    process.remove_socket()
            nursery.cancel_scope.cancel()


async def _run(gateway: Gateway, task_status: trio.TaskStatus[None]) -> None:
    await gateway.run(task_status.started)


def run(main: Callable[[], Any]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


async def both_open(bench: Bench) -> None:
    """Deliver notifications on both processes while the second one is published."""
    bench.first.open_board()
    await bench.settle()
    bench.first.deliver()
    await bench.settle()
    bench.second.open_board()
    await bench.settle()
    assert bench.source() is bench.second
    bench.first.deliver(3)
    bench.second.deliver(2)
    await bench.settle()
    assert (bench.published_by(bench.first), bench.published_by(bench.second)) == ([1], [1, 2])


async def end(process: Process, ending: str) -> None:
    if ending == "the process ends":
        await process.stop()
    else:
        process.close_board()


@ENDINGS
def test_the_other_proxy_is_published_after_the_last_one_has_closed_the_board(tmp_path: Path, ending: str) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            await both_open(bench)
            await end(bench.second, ending)
            await bench.settle()
            assert bench.source() is bench.first
            assert bench.gateway._boards["b1"].is_open
            bench.first.deliver()
            await bench.settle()
            bench.check()

    run(main)


def test_a_proxy_that_reopens_the_board_is_published_from_the_first_unacknowledged_notification(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            await both_open(bench)
            bench.first.close_board()
            bench.first.open_board()
            bench.first.deliver()
            await bench.settle()
            assert bench.source() is bench.first
            bench.second.deliver()
            await bench.settle()
            assert bench.published_by(bench.second) == [1, 2]
            bench.first.close_board()
            await bench.settle()
            assert bench.source() is bench.second
            bench.check()

    run(main)


def test_a_proxy_that_reopens_the_board_after_the_last_one_has_closed_it_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            await both_open(bench)
            bench.first.close_board()
            bench.second.deliver()
            bench.second.close_board()
            bench.first.open_board()
            bench.first.deliver()
            await bench.settle()
            assert bench.source() is bench.first
            bench.check()

    run(main)


def test_the_last_notifications_of_a_board_that_moves_to_another_proxy_are_published(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await trio.sleep(LATER)  # The clock is simulated.
            bench.first.deliver(BATCH + 3)
            bench.first.close_board()
            await trio.sleep(LATER)  # The broker does not answer yet.
            bench.second.open_board()
            bench.second.deliver(2)
            await trio.sleep(LATER)  # The clock is simulated.
            assert bench.published == {}
            await bench.settle()
            assert bench.source() is bench.second
            bench.check()

    run(main)


@ENDINGS
def test_the_last_notifications_of_a_proxy_are_published_before_those_of_the_other_one(
    tmp_path: Path, ending: str
) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            await both_open(bench)
            bench.second.deliver(BATCH + 3)
            await trio.sleep(LATER)  # The clock is simulated, and the broker does not answer yet.
            await end(bench.second, ending)
            await trio.sleep(LATER)  # The clock is simulated.
            assert bench.source() is not bench.first
            await bench.settle()
            assert bench.source() is bench.first
            bench.check()

    run(main)


@pytest.mark.parametrize("number", [1, BATCH + 3])
@pytest.mark.parametrize("known", [True, False], ids=["opened before", "opened first"])
@pytest.mark.parametrize("late", ["first", "second"])
def test_a_board_moves_without_loss_in_whatever_order_the_events_are_read(
    tmp_path: Path, late: str, known: bool, number: int
) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            first, second = bench.first, bench.second
            if known:
                first.open_board()
                await bench.settle()
                first.deliver()
                await bench.settle()
                first.close_board()
                await bench.settle()
            second.open_board()
            await bench.settle()
            assert bench.source() is second
            async with bench.unread(getattr(bench, late)):
                second.deliver(number)
                second.close_board()
                first.open_board()
                first.deliver(number)
                await bench.settle()
                board = bench.gateway._boards["b1"]
                assert (board.source in board.owners) is (late == "second")
            await bench.settle()
            assert bench.source() is first
            bench.check()

    run(main)


def test_a_proxy_that_does_not_answer_does_not_delay_another_one_forever(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            async with bench.unread(bench.first):
                bench.second.open_board()
                bench.second.deliver()
                await bench.settle()
                assert bench.source() is bench.first
                await trio.sleep(FLUSH_PATIENCE)  # The clock is simulated.
                await bench.settle()
                assert bench.source() is bench.second
                bench.check()

    run(main)


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_proxy_that_is_slow_to_answer_again_replaces_the_other_one(tmp_path: Path, is_closed: bool) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            bench.second.open_board()
            bench.second.deliver()
            if is_closed:
                bench.first.close_board()
            await trio.testing.wait_all_tasks_blocked()
            assert bench.source() is bench.first
            connection = next(reversed(bench.gateway._boards["b1"].owners))
            async with bench.unread(bench.second):
                await bench.settle()  # The gateway connects to the second proxy again.
                assert connection not in bench.gateway._connections
            await bench.settle()
            assert bench.source() is bench.second
            bench.check()

    run(main)


def test_what_was_published_after_the_end_of_a_proxy_is_not_published_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            bench.first.deliver(5)
            await trio.sleep(LATER)  # The clock is simulated, and the broker does not answer yet.
            await bench.first.stop()
            bench.second.open_board()
            bench.second.deliver()
            await bench.settle()
            bench.first.start(bench.nursery)
            bench.first.open_board()
            bench.first.deliver()
            await bench.settle()
            assert bench.source() is bench.first
            bench.check()
            assert len(bench.published["b1"]) == 7

    run(main)


def test_two_proxies_that_swap_boards_lose_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            for process, name in ((bench.first, "b1"), (bench.second, "b2")):
                process.open_board(name)
            await bench.settle()
            bench.first.deliver(AHEAD + 3, "b1")  # The proxy sends the last 3 after the first acknowledgement.
            await trio.sleep(LATER)  # The clock is simulated, and the broker does not answer yet.
            bench.first.close_board("b1")
            bench.second.close_board("b2")
            bench.first.open_board("b2")
            bench.second.open_board("b1")
            bench.first.deliver(2, "b2")
            bench.second.deliver(2, "b1")
            await trio.sleep(LATER)  # The clock is simulated.
            await bench.settle()
            assert (bench.source("b1"), bench.source("b2")) == (bench.second, bench.first)
            for name, process in (("b1", bench.first), ("b1", bench.second), ("b2", bench.first)):
                assert bench.published_by(process, name) == [*range(1, process.delivered(name)[1] + 1)]

    run(main)


def test_what_an_ended_proxy_has_delivered_is_published_before_another_one_replaces_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            bench.first.deliver(BATCH + 3)
            await trio.sleep(LATER)  # The clock is simulated, and the broker does not answer yet.
            await bench.first.stop()
            await trio.sleep(LATER)  # The clock is simulated.
            bench.second.open_board()
            bench.second.deliver(2)
            await trio.sleep(LATER)  # The clock is simulated.
            await bench.settle()
            assert bench.source() is bench.second
            bench.check()
            assert bench.boots() == [process.delivered()[0] for process in (bench.first, bench.second)]

    run(main)


def test_two_proxies_that_open_each_other_s_boards_are_published_from_the_last_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            for process, name in ((bench.first, "b1"), (bench.second, "b2")):
                process.open_board(name)
            await bench.settle()
            bench.first.open_board("b2")
            bench.second.open_board("b1")
            bench.first.deliver(2, "b2")
            bench.second.deliver(2, "b1")
            await bench.settle()
            assert (bench.source("b1"), bench.source("b2")) == (bench.second, bench.first)
            for name, process in (("b1", bench.second), ("b2", bench.first)):
                assert bench.published_by(process, name) == [1, 2]

    run(main)


@pytest.mark.parametrize("number", [1, 300])
def test_a_board_that_was_open_for_a_moment_loses_nothing(tmp_path: Path, number: int) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.second.open_board()
            await bench.settle()
            bench.second.close_board()
            await bench.settle()
            bench.second.open_board()
            bench.second.deliver(number)
            bench.second.close_board()
            bench.first.open_board()
            bench.first.deliver()
            await bench.settle()
            assert bench.source() is bench.first
            bench.check()

    run(main)


def test_what_the_history_before_contained_is_published_first(tmp_path: Path) -> None:
    """The proxy has no store for its history."""

    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            bench.first.deliver(5)
            await trio.sleep(LATER)  # The clock is simulated, and the broker does not answer yet.
            before, _ = bench.first.delivered()
            await bench.first.stop()
            bench.first.lose_histories()
            bench.first.start(bench.nursery)
            bench.first.open_board()
            await trio.sleep(LATER)  # The clock is simulated. The gateway makes the proxy keep its notifications.
            bench.first.deliver(2)
            await trio.sleep(LATER)  # The clock is simulated.
            await bench.settle()
            after, _ = bench.first.delivered()
            assert bench.published["b1"] == [*((before, n) for n in range(1, 6)), (after, 1), (after, 2)]

    run(main)


def test_a_board_that_was_opened_before_the_proxy_is_ready_is_published(tmp_path: Path) -> None:
    """The link of the board does not exist yet, or the proxy is still opening other boards."""

    async def main() -> None:
        async with benched(tmp_path) as bench:
            await bench.first.stop()
            bench.first.is_ready = False
            bench.first.start(bench.nursery)
            bench.first.open_board()
            await bench.settle()
            bench.first.is_ready = True
            bench.first.deliver(2)
            await bench.settle()
            assert bench.published_by(bench.first) == [1, 2]

    run(main)


def test_a_board_that_is_opened_late_after_a_restart_is_published_at_once(tmp_path: Path) -> None:
    """The broker does not answer, so that the queue still contains notifications of the same history."""

    async def main() -> None:
        async with benched(tmp_path) as bench:
            bench.first.open_board()
            await bench.settle()
            bench.first.deliver(5)
            await trio.sleep(LATER)  # The clock is simulated.
            await bench.first.stop()
            bench.first.start(bench.nursery)
            await trio.sleep(LATER)  # The clock is simulated.
            bench.first.open_board()
            bench.first.deliver(2)
            await trio.sleep(LATER)  # The clock is simulated.
            assert bench.source() is bench.first
            await bench.settle()
            assert bench.published_by(bench.first) == [*range(1, 8)]
            assert len(bench.published["b1"]) == 7

    run(main)


def test_a_board_remembers_its_last_histories() -> None:
    board = Board("b1")
    for number in [0, *range(1, HISTORIES), 0, HISTORIES, HISTORIES + 1]:
        board.finish(Entry(f"boot {number}", 1, None, "s", 0), generation=-1, counts=True)
    entries = [Entry(f"boot {number}", 1, None, "s", 0) for number in range(HISTORIES + 2)]
    assert [board.is_duplicate(entry) for entry in entries] == [True, False, False, *[True] * (HISTORIES - 1)]


def test_other_boards_stay_with_the_proxy_that_opened_them_last(tmp_path: Path) -> None:
    async def main() -> None:
        async with benched(tmp_path) as bench:
            for process in (bench.first, bench.second):
                for name in ("b1", "b2"):
                    process.open_board(name)
                await bench.settle()
            bench.second.close_board("b1")
            await bench.settle()
            assert (bench.source("b1"), bench.source("b2")) == (bench.first, bench.second)
            bench.second.deliver(2, "b2")
            await bench.settle()
            assert bench.published_by(bench.second, "b2") == [1, 2]

    run(main)


def test_requests_are_sent_to_a_proxy_that_has_the_board_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, object]] = []

    class Asked:
        def __init__(self, path: Path) -> None:
            self.path = path

        async def write(self, request: object) -> None:
            asked.append((self.path, request))

        async def read(self) -> list[object]:
            return []

    @asynccontextmanager
    async def converse(path: Path) -> AsyncIterator[tuple[Asked, None]]:
        yield Asked(path), None

    monkeypatch.setattr("inco_trio.mqtt.gateway.converse", converse)
    gateway, board = Gateway(BROKER, GatewayConfig(send={"*": ["s1"]})), Board("b1")
    board.source, other = Asked(tmp_path / "closed"), Asked(tmp_path / "open")  # type: ignore[assignment]
    board.owners[other] = None  # type: ignore[index]
    request = Received("lab/b1/send/s1", b"", False, None, None, 1)
    assert trio.run(gateway._try_to_send, board, "s1", request) == {"sent": 1}
    assert asked == [(tmp_path / "open", SendRequest("s1", board="b1"))]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_of_two_proxies_loses_and_reorders_nothing(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - test data

    async def step(bench: Bench) -> None:
        process = dice.choice((bench.first, bench.second))
        match dice.randrange(8):
            case 0 if process.control is None:
                process.start(bench.nursery)
            case 0:
                await process.stop()
            case 1 | 2 if process.control is not None:
                if process.open:
                    process.close_board()
                else:
                    process.open_board()
            case 3 | 4 | 5 if process.open:
                process.deliver(dice.randint(1, 20))
            case 6:
                bench.answer(dice.randint(1, 30))
            case 7:
                await trio.sleep(dice.choice((0.0, 0.02, 0.3, 1.2)))  # The clock is simulated.

    async def main() -> None:
        async with benched(tmp_path) as bench:
            for process in (bench.first, bench.second):
                process.open_board()
                await bench.settle()
            for _ in range(60):
                await step(bench)
            for process in (bench.first, bench.second):
                if process.control is None:
                    process.start(bench.nursery)
                if not process.open:
                    process.open_board()
            await bench.settle()
            for process in (bench.first, bench.second):
                process.close_board()
                await bench.settle()
                process.open_board()
                await bench.settle()
            bench.check()

    run(main)


@asynccontextmanager
async def real_proxy(home: Path, control: Path, nursery: trio.Nursery) -> AsyncIterator[Core1]:
    """Run a real proxy of the board "b1", with a real control socket."""
    layout = make_layout(home, None, None)
    for signal in layout.signals:
        signal.directory.mkdir(parents=True, exist_ok=True)
    served = Process(control)
    served.name = "b1"
    served.start(nursery)
    assert served.control is not None
    config = Config(layout.address("core0", "core1"), layout.signals)
    async with (
        Core1(layout.address("core1", "core0")) as core1,
        open_supervised(config, NoFdStore(), served.control.feed) as proxy,
    ):
        served.open["b1"] = proxy
        yield core1
    served.open.clear()
    await served.stop()


def test_a_real_proxy_is_published_after_another_one_with_the_same_board_name_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.mqtt.gateway.LOOK_AGAIN", 0.01)
    paths = [tmp_path / "first.sock", tmp_path / "second.sock"]
    gateway = Gateway(BROKER, GatewayConfig(), paths)

    async def idle(_board: Board) -> None:
        await trio.sleep_forever()

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - the gateway reports no changes of its sources
            await trio.sleep(0.01)  # Short, so that the test does not take long.

    async def main() -> None:
        with trio.fail_after(HANG):
            async with trio.open_nursery() as nursery:
                gateway._serve = idle  # type: ignore[method-assign, assignment]
                await nursery.start(_run, gateway)
                async with real_proxy(tmp_path / "first", paths[0], nursery) as core1:
                    await until(lambda: "b1" in gateway._boards)
                    board = gateway._boards["b1"]
                    async with real_proxy(tmp_path / "second", paths[1], nursery):
                        await until(lambda: board.source is not None and board.source.path == paths[1])
                        await core1.send("ihub_hwwd_irq")
                    await core1.send("ihub_hwwd_irq")
                    await until(lambda: [entry.sequence for entry in board.waiting] == [1, 2])
                    assert board.source is not None
                    assert board.source.path == paths[0]
                nursery.cancel_scope.cancel()

    trio.run(main)
