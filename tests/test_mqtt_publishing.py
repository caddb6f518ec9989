"""Tests of a board's publisher, with a session that does no I/O."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import mqtt5
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.control.protocol import Event, Notifications
from inco_trio.mqtt.backlog import Board
from inco_trio.mqtt.publishing import REFUSED_AGAIN, Publisher
from inco_trio.mqtt.session import Answered, Message, Session
from inco_trio.mqtt.topics import Topics
from inco_trio.problems import Problems
from inco_trio.signals import Direction

TOPICS = Topics("lab", "b1")


class Connection:
    """A fake connection. Sent packets stay in the session, and the broker answers only when the test calls `answer`."""

    def __init__(self, **connack: Any) -> None:
        self.session = Session("broker", mqtt5.ConnectPacket("me"))
        self.session.feed(mqtt5.ConnAckPacket(**connack).write())
        self.session.out.clear()
        self.room_changed: Callable[[], None] = lambda: None
        self.writes = 0

    @property
    def window(self) -> int:
        return self.session.window

    @property
    def room(self) -> int:
        return self.session.room

    def send(self, receipts: Answered, messages: Sequence[tuple[int, Message]]) -> None:
        self.writes += bool(messages)
        for number, message in messages:
            self.session.publish(message, receipts, number)

    def sent(self) -> list[mqtt5.PublishPacket]:
        """Return the packets that have been sent since the last call."""
        packets: list[Any] = []
        while self.session.out:
            packet, length = mqtt5.read(memoryview(bytes(self.session.out)))
            packets.append(packet)
            del self.session.out[:length]
        return packets

    def answer(self, *packets: mqtt5.PublishPacket, reason: str = "SUCCESS") -> None:
        """Acknowledge packets, as if a single read had returned all acknowledgements."""
        code = getattr(mqtt5.PubAckReasonCode, reason)
        self.session.feed(b"".join(mqtt5.PubAckPacket(p.packet_id or 0, reason_code=code).write() for p in packets))
        self.room_changed()


class Source:
    """A stand-in for a connection to a proxy."""

    path = Path("/control.sock")

    def __init__(self) -> None:
        self.acknowledged: list[int] = []

    def acknowledge(self, _board: str, _boot: str, sequence: int) -> None:
        self.acknowledged.append(sequence)


@asynccontextmanager
async def publishing(board: Board, connection: Connection, problems: Problems | None = None) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        publisher = Publisher(board, TOPICS, connection, problems or Problems())  # type: ignore[arg-type]
        nursery.start_soon(publisher.run)
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def followed() -> tuple[Board, Any]:
    board, source = Board("b1"), Source()
    board.follow(source)  # type: ignore[arg-type]
    return board, source


def add(board: Board, first: int, last: int, boot: str = "5f") -> None:
    """Queue notifications with the sequence numbers from `first` to `last`."""
    signals = ((Direction.INBOUND, "s_irq"),)
    board.add_all(Notifications("b1", boot, first, signals, [(0, 1.5, 7)] * (last + 1 - first)))


def numbers(packets: list[mqtt5.PublishPacket]) -> list[int]:
    return [int(packet.payload.split(b",")[0].rpartition(b" ")[2]) for packet in packets]


def run(test: Callable[[], Any]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


def test_a_notification_is_sent_without_waking_a_task() -> None:
    async def main() -> None:
        (board, source), connection = followed(), Connection()
        add(board, 1, 2)
        async with publishing(board, connection):
            packets = connection.sent()
            assert numbers(packets) == [1, 2]
            board.add(Event("notification", "b1", 1.5, 7, Direction.INBOUND, "s_irq", sequence=3, boot="5f"))
            packets += connection.sent()
            assert numbers(packets) == [1, 2, 3]
            connection.answer(*packets)
            assert source.acknowledged == [1, 2, 3]
            assert (board.published, list(board.waiting)) == (3, [])
        add(board, 4, 4)
        assert connection.sent() == []
        assert len(board.waiting) == 1

    run(main)


def test_notifications_are_acknowledged_in_order() -> None:
    async def main() -> None:
        (board, source), connection = followed(), Connection()
        async with publishing(board, connection):
            add(board, 1, 3)
            first, *others = connection.sent()
            connection.answer(*reversed(others))
            assert (source.acknowledged, len(board.waiting)) == ([], 3)
            connection.answer(first)
            assert (source.acknowledged, len(board.waiting)) == ([1, 2, 3], 0)

    run(main)


@pytest.mark.parametrize("window", [1, 2, 20])
def test_a_flow_obeys_the_receive_maximum_and_sends_several_at_once(window: int) -> None:
    async def main() -> None:
        (board, source), connection = followed(), Connection(receive_max=window)
        async with publishing(board, connection):
            add(board, 1, 200)
            flying: list[mqtt5.PublishPacket] = []
            seen: list[int] = []
            while flying := flying + (new := connection.sent()):
                seen += numbers(new)
                assert len(flying) <= window
                connection.answer(flying.pop(0))
            assert seen == source.acknowledged == list(range(1, 201))
            assert connection.writes <= 200 // max(1, window // 2) + 1

    run(main)


@pytest.mark.parametrize("ending", ["works again", "another proxy"])
def test_refused_notifications_are_sent_again_before_later_ones(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        (board, source), connection = followed(), Connection()
        async with publishing(board, connection):
            add(board, 1, 3)
            first, second, third = connection.sent()
            connection.answer(second, reason="NOT_AUTHORIZED")
            add(board, 4, 4)
            connection.answer(first, third)
            assert (connection.sent(), source.acknowledged) == ([], [1])
            assert board.published == 1
            if ending == "another proxy":
                board.follow(Source())  # type: ignore[arg-type]
                add(board, 2, 4)
                packets = connection.sent()
                assert numbers(packets) == [2, 3, 4]
                connection.answer(*packets)
                assert board.published == 4
                return
            await trio.sleep(REFUSED_AGAIN + 1)  # The clock is simulated.
            (again,) = connection.sent()
            assert numbers([again]) == [2]
            connection.answer(again, reason="QUOTA_EXCEEDED")
            await trio.sleep(REFUSED_AGAIN + 1)  # The clock is simulated.
            connection.answer(*connection.sent())
            assert source.acknowledged == [1, 2, 3]
            later = connection.sent()
            assert numbers(later) == [4]
            connection.answer(*later)
            assert source.acknowledged == [1, 2, 3, 4]

    run(main)
    is_logged = ending == "works again"  # The broker accepts the other proxy's notifications immediately.
    assert caplog.text.count("the broker refused notifications: Not authorized") == is_logged
    assert caplog.text.count("works again") == is_logged


def test_a_recovery_is_logged_only_once_the_broker_accepts_a_notification(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        (board, source), connection, other, problems = followed(), Connection(), Connection(), Problems()
        async with publishing(board, connection, problems):
            add(board, 1, 2)
            first, second = connection.sent()
            connection.answer(first)
            connection.answer(second, reason="NOT_AUTHORIZED")
            await trio.sleep(1)  # The clock is simulated.
        board.leave(source)
        board.follow(source)  # This clears the queue.
        async with publishing(board, other, problems):
            add(board, 1, 1)  # A duplicate.
            assert (source.acknowledged, "works again" in caplog.text) == ([1, 1], False)
            add(board, 2, 2)
            other.answer(*other.sent())
            assert "works again" in caplog.text

    run(main)


def test_a_refusal_before_another_proxy_begins_is_no_recovery(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        (board, _), connection, problems = followed(), Connection(), Problems()
        problems.failed(board, "the broker refused notifications", board.name)
        async with publishing(board, connection, problems):
            add(board, 1, 2)
            first, second = connection.sent()
            connection.answer(second, reason="NOT_AUTHORIZED")
            board.follow(Source())  # type: ignore[arg-type]
            connection.answer(first)
            assert "works again" not in caplog.text
            add(board, 1, 2)
            connection.answer(*connection.sent())
            assert "works again" in caplog.text

    run(main)


def test_a_notification_that_is_too_large_for_the_broker_stays_pending(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        (board, source), connection = followed(), Connection(max_packet_size=64)
        async with publishing(board, connection):
            add(board, 1, 3)
            await trio.sleep(3 * REFUSED_AGAIN)  # The clock is simulated.
            assert (connection.sent(), source.acknowledged, len(board.waiting)) == ([], [], 3)

    run(main)
    assert caplog.text.count("but the broker allows only 64; they stay pending; retrying") == 1


def test_what_another_proxy_repeats_is_not_published_twice() -> None:
    async def main() -> None:
        (board, source), connection, other = followed(), Connection(), Source()
        async with publishing(board, connection):
            add(board, 1, 3)
            packets = connection.sent()
            board.leave(source)
            board.follow(other)  # type: ignore[arg-type]
            add(board, 1, 4)
            assert connection.sent() == []
            connection.answer(*packets)
            packets = connection.sent()
            assert numbers(packets) == [4]
            connection.answer(*packets)
            assert (other.acknowledged, board.published) == ([1, 2, 3, 4], 4)

    run(main)


def test_the_next_connection_publishes_what_the_last_one_did_not() -> None:
    async def main() -> None:
        (board, source), connection, other = followed(), Connection(), Connection()
        async with publishing(board, connection):
            add(board, 1, 3)
            connection.answer(*connection.sent()[:2])
            connection.session.abandon()
        async with publishing(board, other):
            packets = other.sent()
            assert numbers(packets) == [3]
            other.answer(*packets)
        assert source.acknowledged == [1, 2, 3]

    run(main)
