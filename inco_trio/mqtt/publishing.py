"""Publish a board's queue on one connection to the broker.

`Publisher.push` sends packets from the task that has received a notification or an acknowledgement. Waking another
task would take longer than the rest of the gateway's work for a notification.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import attrs
import trio

from inco_trio.control.follower import Conversation
from inco_trio.mqtt.backlog import Board, Entry
from inco_trio.mqtt.connection import Connection
from inco_trio.mqtt.session import Message, Refusal, do_nothing
from inco_trio.mqtt.topics import Topics
from inco_trio.problems import Problems

__all__ = ["REFUSED_AGAIN", "Publisher"]

BATCH = 256
"""Maximum number of notifications of a board that the broker has not acknowledged."""
REFUSED_AGAIN = 2.0
"""Seconds until the next attempt after the broker has refused a message or a proxy has refused the gateway."""


@attrs.define(eq=False)
class _Flight:
    """A notification that was sent to the broker."""

    entry: Entry
    source: Conversation | None
    """The connection that the notification came from."""
    generation: int
    """The value of `Board.generation` when the notification was sent."""
    counts: bool
    """Whether `Board.published` includes the notification. It does not include duplicates."""
    is_done: bool = False


class Publisher:
    """Publishes the queue of `board` and acknowledges notifications to the proxy once the broker has done so."""

    heard = False
    """Notifications without subscribers do not count as refused; see `Receipts.heard`."""

    def __init__(self, board: Board, topics: Topics, connection: Connection, problems: Problems) -> None:
        self._board, self._topics, self._connection, self._problems = board, topics, connection, problems
        self._flights: deque[_Flight] = deque()
        """The notifications at the head of the queue that have been sent, numbered from `_first`."""
        self._first = self._unanswered = 0
        self._refused: dict[int, Refusal] = {}
        """The reason for each refusal, keyed by the notification's number, even if the notification was sent again."""
        self._again: deque[int] = deque()
        """The numbers of the refused notifications to send again."""
        self._stuck = trio.Event()

    async def run(self) -> None:
        """Publish until cancelled. Send refused notifications again every REFUSED_AGAIN seconds."""
        self._board.push = self._connection.room_changed = self.push
        try:
            self.push()
            while True:
                await self._stuck.wait()
                for refusal in islice(self._refused.values(), 1):
                    what = f"the broker refused notifications: {refusal}; they stay pending; retrying"
                    self._problems.failed(self._board, what, self._board.name)
                await trio.sleep(REFUSED_AGAIN)
                self._stuck = trio.Event()
                self._again.extend(sorted(self._refused))
                self.push()
        finally:
            self._board.push = self._connection.room_changed = do_nothing

    def settle(self, number: int, refusal: Refusal | None) -> None:
        """Record the broker's answer to a notification; see `session.Receipts`."""
        self._unanswered -= 1
        if refusal is None:
            self._flights[number - self._first].is_done = True
            self._refused.pop(number, None)
        else:
            self._refused[number] = refusal

    def abandon(self) -> None:
        """Do nothing at the end of the connection: the next publisher of the board sends the queue again."""

    def push(self) -> None:
        """Send as many notifications as the broker accepts, and remove those that it has acknowledged."""
        board, flights = self._board, self._flights
        if not flights and len(board.waiting) == 1 and self._connection.room:
            self._push_alone(board.waiting[0])
            if self._unanswered:
                return
        while True:
            self._collect()
            if self._refused and not (self._unanswered or self._again):
                self._stuck.set()
            room = self._room()
            numbers = [self._again.popleft() for _ in range(min(room, len(self._again)))] if self._again else []
            # Send refused notifications before new ones, so that the order changes as little as possible.
            new = () if self._refused or not room else tuple(islice(board.waiting, len(flights), len(flights) + room))
            for entry in new:
                flight = _Flight(entry, board.source, board.generation, not board.is_duplicate(entry))
                if flight.counts:
                    numbers.append(self._first + len(flights))
                else:
                    flight.is_done = True
                flights.append(flight)
            self._unanswered += len(numbers)
            first, topics = self._first, self._topics
            self._connection.send(
                self, [(number, _notification(topics, flights[number - first].entry)) for number in numbers]
            )
            if self._unanswered or not (numbers or new):
                return

    def _push_alone(self, entry: Entry) -> None:
        """Send the only notification in the queue. This is faster than `push` and keeps the latency low."""
        board = self._board
        is_new = not board.is_duplicate(entry)
        self._flights.append(_Flight(entry, board.source, board.generation, is_new, is_done=not is_new))
        if is_new:
            self._unanswered = 1
            self._connection.send(self, ((self._first, _notification(self._topics, entry)),))

    def _room(self) -> int:
        """Return how many notifications to send now."""
        flights = self._flights
        if not flights:
            return min(BATCH, self._connection.room)
        if flights[0].generation != self._board.generation:
            return 0  # Another proxy repeats these notifications. Wait, so that they count as duplicates.
        limit = min(BATCH, self._connection.window)
        if self._unanswered > limit // 2:
            return 0  # Send many notifications at once instead of one for each acknowledgement.
        return min(limit - self._unanswered, self._connection.room)

    def _collect(self) -> None:
        """Remove acknowledged notifications from the queue, and acknowledge them to the proxy."""
        board, flights, is_accepted = self._board, self._flights, False
        while flights and flights[0].is_done:
            flight = flights.popleft()
            is_accepted |= flight.counts
            self._first += 1
            board.finish(flight.entry, flight.generation, counts=flight.counts)
            if flight.source is not None:
                flight.source.acknowledge(board.name, flight.entry.boot, flight.entry.sequence)
        if flights and flights[0].generation != board.generation and not self._unanswered:
            # The broker has refused the first notification. The next proxy repeats it and all later notifications.
            self._first += len(flights)
            for each in (flights, self._refused, self._again):
                each.clear()
        elif is_accepted and not flights:
            self._problems.well(board, board.name)


def _notification(topics: Topics, entry: Entry) -> Message:
    # Formatting the text takes a quarter of the time that json.dumps() takes, and none of these values needs escapes.
    if entry.merged:
        body = f'{{"sequence": {entry.sequence}, "boot": "{entry.boot}", "count": {entry.merged}}}'
    else:
        body = (
            f'{{"sequence": {entry.sequence}, "boot": "{entry.boot}", '
            f'"time": {entry.time!r}, "monotonic_ns": {entry.monotonic_ns}}}'
        )
    return Message(topics.notification(entry.direction, entry.signal), body.encode())
