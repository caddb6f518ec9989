"""Tests of long responses on the control socket, and of many clients of other users."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.control.answering import CLOSED, HISTORY_SECONDS, HISTORY_SECONDS_SHARED
from inco_trio.control.feed import HISTORIES_MAX, Feed
from inco_trio.persist.recorder import AREA, KEPT_MAX, Recorder
from inco_trio.proxy_status import SignalStatus, Status
from inco_trio.signals import Direction, Signal
from inco_trio.stats import Stats
from tests.test_history import BOARD, ServedBoard, SlowClient

SIGNALS = [Signal(name, Direction.INBOUND, Path("/irq"), name) for name in ("a_irq", "b_irq")]
OTHER = os.geteuid() + 1
"""A user who is neither root nor the user of the proxy."""
MISSING = 20_000


class RecordedBoard(ServedBoard):
    """A board whose flight recorder has `kept` notifications, and many boards that are not open."""

    def __init__(self, kept: int) -> None:
        self.recorder = Recorder(memoryview(mmap.mmap(-1, AREA)), kept)
        for signal in itertools.islice(itertools.cycle(SIGNALS), kept):
            self.recorder.append([signal])
        self._missing = {f"b{number}": "the interface does not exist " * 8 for number in range(MISSING)}

    def proxies(self) -> dict[str, Any]:
        return {BOARD: SimpleNamespace(_recorder=lambda: self.recorder)}

    def not_open(self) -> dict[str, str]:
        return self._missing


def run(
    served: ServedBoard, users: Sequence[int], test: Callable[[Feed, list[SlowClient]], Coroutine[Any, Any, None]]
) -> None:
    """Run `test` with a client of each user. It ends the connections, and sleeps in simulated time."""

    async def serve(client: SlowClient) -> None:
        try:
            await client.connection.run()
        except* OSError:
            pass  # The client has closed the connection.

    async def main() -> None:
        feed = Feed(served)
        with ExitStack() as stack:
            clients = [SlowClient(feed, user) for user in users]
            async with trio.open_nursery() as nursery:
                for client in clients:
                    stack.enter_context(client.closing)
                    nursery.start_soon(serve, client)
                    await client.read()
                await test(feed, clients)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("request_", [{"request": "status"}, {"request": "history", "board": BOARD}])
@pytest.mark.parametrize("user", [os.geteuid(), OTHER])
def test_a_response_that_is_not_read_needs_little_memory(request_: dict[str, object], user: int) -> None:
    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        tracemalloc.start()
        await clients[0].send(request_)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20  # A copy of the recorder, but neither all its events nor the status of all boards.

    run(RecordedBoard(KEPT_MAX), [user], test)


@pytest.mark.parametrize("user", [os.geteuid(), OTHER])
def test_a_slowly_read_history_is_complete(user: int) -> None:
    """The proxy records further notifications while the client reads."""
    served = RecordedBoard(1000)

    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        await clients[0].send({"request": "history", "board": BOARD})
        served.recorder.append(SIGNALS[:1] * 5000)
        for _ in range(1000):
            served.recorder.append(SIGNALS[:1])
        await clients[0].send({"request": "monitor"})
        answer, monitor = await clients[0].read()
        assert [event["sequence"] for event in answer["history"]["events"]] == [*range(1, 1001)]
        assert monitor == {"monitor": True}

    run(served, [user], test)


def test_only_a_few_histories_of_other_users_are_answered_at_once() -> None:
    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        for client in clients:
            await client.send({"request": "history", "board": BOARD})
        owner, *others = clients
        *first, last = [await client.receive() for client in others]
        assert [bool(begun) for begun in first] == [True] * HISTORIES_MAX
        assert (bool(last), bool(await owner.receive())) == (False, True)
        others[0].leave()
        await wait_all_tasks_blocked()
        assert await others[-1].receive()

    run(RecordedBoard(KEPT_MAX), [os.geteuid(), *range(OTHER, OTHER + HISTORIES_MAX + 1)], test)


def test_a_user_with_many_connections_does_not_delay_the_histories_of_other_users() -> None:
    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        for client in clients:
            await client.send({"request": "history", "board": BOARD})
        *same, other = [bool(await client.receive()) for client in clients]
        assert (same, other) == ([True, *[False] * HISTORIES_MAX], True)
        clients[0].leave()
        await wait_all_tasks_blocked()
        assert [bool(await client.receive()) for client in clients[1:3]] == [True, False]

    run(RecordedBoard(KEPT_MAX), [*[OTHER] * (HISTORIES_MAX + 1), OTHER + 1], test)


def test_an_unread_history_delays_the_histories_of_the_same_user_only_shortly() -> None:
    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        request = {"request": "history", "board": BOARD}
        await clients[0].send(request)
        await trio.sleep(HISTORY_SECONDS / 2)  # The clock is simulated.
        for client in clients[1:]:
            await client.send(request)
        begun = trio.current_time()
        for number, client in enumerate(clients[1:], 1):
            await trio.sleep_until(begun + number * HISTORY_SECONDS_SHARED + 1)  # The clock is simulated.
            faults = [bool(each.connection.fault) for each in clients]
            assert faults == [True] * number + [False] * (len(clients) - number)
            assert await client.receive()
        assert clients[0].connection.fault == "the history was not read within 34 s"
        assert clients[1].connection.fault == "the history was not read within 4 s"

    run(RecordedBoard(KEPT_MAX), [OTHER] * 3, test)


def test_a_board_that_closes_while_the_status_is_written_is_not_open() -> None:
    """Board `failed` has failed, `stopping` is being stopped, and `removed` is not configured anymore."""

    class Closing(ServedBoard):
        missing: Mapping[str, str] = {f"b{number}": "the interface does not exist" for number in range(1000)}
        closed: Mapping[str, str] | None = None

        def proxies(self) -> dict[str, Any]:
            return dict.fromkeys(("failed", "stopping", "removed")) if self.closed is None else {}

        def not_open(self) -> dict[str, str]:
            return {**self.missing, **(self.closed or {})}

    served = Closing()

    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        await clients[0].send({"request": "status"})
        served.closed = {"failed": "the link does not exist", "stopping": ""}
        (answer,) = await clients[0].read()
        assert {board["board"]: board["problem"] for board in answer["status"]} == {
            **served.missing,
            "failed": "the link does not exist",
            "stopping": CLOSED,
            "removed": CLOSED,
        }

    run(served, [os.geteuid()], test)


@pytest.mark.parametrize("user", [os.geteuid(), OTHER])
def test_the_status_of_many_signals_does_not_delay_other_tasks(user: int) -> None:
    number, done = 2000, list[str]()

    class Large:
        def _signals(self) -> Iterator[SignalStatus]:
            for each in range(number):
                done.append("signal")
                yield SignalStatus(f"{each}_irq", Direction.INBOUND, f"/irq/{each}", 1, 1.5, 0, 0, None)

        def _status(self, signals: tuple[SignalStatus, ...] = ()) -> Status:
            return Status("l0", 1, 1, True, "", None, Stats(), signals, ())

        @property
        def status(self) -> Status:
            return self._status(tuple(self._signals()))

        def _history(self) -> object:
            return SimpleNamespace(keeping=False)

    class Serving(ServedBoard):
        def proxies(self) -> dict[str, Any]:
            return {BOARD: Large()}

    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        clients[0].put({"request": "status"})
        received = b""
        while data := await clients[0].receive():
            done.append("read")
            received += data
        (board,) = json.loads(received)["status"]
        assert [each["signal"] for each in board["signals"]] == [f"{each}_irq" for each in range(number)]

    run(Serving(), [user], test)
    runs = [len([*run]) for what, run in itertools.groupby(done) if what == "signal"]
    assert (sum(runs), max(runs) < number / 10) == (number, True)


def test_a_client_that_does_not_read_the_history_is_disconnected() -> None:
    """Even if the client also receives events. Clients of the proxy's user are never disconnected."""

    async def test(feed: Feed, clients: list[SlowClient]) -> None:
        for client in clients:
            await client.send({"request": "monitor"}, {"request": "history", "board": BOARD})
        await trio.sleep(2 * HISTORY_SECONDS)  # The clock is simulated.
        assert [client.connection.fault for client in clients] == ["", "the history was not read within 60 s"]
        assert len(feed.monitors) == 1

    run(RecordedBoard(KEPT_MAX), [os.geteuid(), OTHER], test)


def test_between_two_requests_of_other_users_all_tasks_run() -> None:
    """The more clients sent requests at the same time, the later the proxy would notice a notification."""
    done: list[str] = []

    class Counting(ServedBoard):
        def not_open(self) -> dict[str, str]:
            done.append("request")
            return {}

    async def test(_feed: Feed, clients: list[SlowClient]) -> None:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def probe() -> None:
                while True:
                    done.append("task")
                    await trio.lowlevel.checkpoint()

            for client in clients:
                client.put(*[{"request": "status"}] * 5)
            while done.count("request") < 2 * 5 * len(clients):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    run(Counting(), [OTHER] * 8, test)
    longest = max(len([*run]) for what, run in itertools.groupby(done) if what == "request")
    assert longest == 2  # One request asks twice which boards are not open.
