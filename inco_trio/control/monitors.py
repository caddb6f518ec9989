"""The two kinds of clients that receive events.

A `Monitor` receives events from now on, and misses events if it reads too slowly. A `Follower` receives every
notification of its boards.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence

import attrs
import trio

from inco_trio.control.feed import Batch
from inco_trio.control.protocol import Event, encode_event, event_now
from inco_trio.persist.history import History, Merged, Record
from inco_trio.signals import Direction

__all__ = ["Follower", "Monitor"]

WAITING_MAX = 8192
"""Limit of the events that wait for a client."""
PIECE = 128
"""Limit of the events that are encoded at once."""
PAUSE = 0.1
"""Seconds between two writes to a follower that is up to date. Each write wakes other processes, which would compete
with the next notification."""
AHEAD = 1024
"""Limit of the notifications of a board that a follower receives beyond the last acknowledged one."""


@attrs.define(eq=False)
class Monitor:
    """A client that receives the events that its filters accept."""

    board: str | None = None
    direction: Direction | None = None
    signals: Collection[str] | None = None
    frames: bool = False
    """Whether events contain the frames."""
    _waiting: deque[Batch | Event] = attrs.Factory(deque)
    _number: int = 0
    """The number of notifications and other events in `_waiting`."""
    _lost: int = 0
    _ended: bool = False
    _arrived: trio.Event = attrs.Factory(trio.Event)
    _ending: trio.Event = attrs.Factory(trio.Event)

    def carried(self, batch: Batch) -> None:
        """Queue notifications for the client."""
        self._put(batch, len(batch.signals))

    def offer(self, event: Event) -> None:
        """Queue another event for the client."""
        self._put(event, 1)

    def _put(self, what: Batch | Event, number: int) -> None:
        if self.board is not None and what.board != self.board:
            return
        if self._number >= WAITING_MAX:
            self._lost += number
            return
        self._number += number
        self._waiting.append(what)
        self._arrived.set()

    def flush(self) -> None:
        """Queue the event `flushed` behind all earlier events, even above the limit."""
        self._waiting.append(event_now("flushed"))
        self._number += 1
        self._arrived.set()

    def end(self) -> None:
        """Let `take` return no lines once no events wait."""
        self._ended = True
        self._arrived.set()
        self._ending.set()

    async def take(self) -> bytes:
        """Wait for events and return the lines of some of them; return no lines after the end."""
        while True:
            lines: list[str] = []
            while self._waiting and len(lines) < PIECE:
                what = self._waiting.popleft()
                self._number -= len(what.signals) if isinstance(what, Batch) else 1
                lines += (encode_event(event, frames=self.frames) for event in self._wanted(what))
            if self._lost and not self._waiting:
                lines.append(encode_event(event_now("lost", count=self._lost)))
                self._lost = 0
            lines += map(encode_event, self._stored())
            if lines or (self._ended and not self._waiting):
                return "".join(lines).encode()
            if not self._waiting:
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def pause(self) -> None:
        """Wait before the next `take`."""

    def _stored(self) -> Iterator[Event]:
        """Return events from a history."""
        yield from ()

    def _wanted(self, what: Batch | Event) -> Iterator[Event]:
        """Return the events that the filters accept."""
        if isinstance(what, Event):
            if self._accepts(what.direction, what.signal):
                yield what
            return
        for number, signal in enumerate(what.signals):
            if self._accepts(signal.direction, signal.name):
                yield Event(
                    "notification", what.board, what.time_ns / 1e9, what.monotonic_ns, signal.direction, signal.name,
                    str(signal.path), what.sequence + number,
                    frame=what.frames[number].hex() if self.frames and what.frames else None,
                )  # fmt: skip

    def _accepts(self, direction: Direction | None, name: str | None) -> bool:
        """Return whether the filters accept an event; None stands for an event without a direction or signal."""
        return (self.direction is None or direction in (None, self.direction)) and (
            self.signals is None or name is None or name in self.signals
        )


@attrs.define
class _Cursor:
    """The position of a follower in the history of a board."""

    history: History
    sent: int
    """The number of the last notification that the follower received."""
    records: deque[Record] = attrs.Factory(deque)
    """Notifications that the follower received and has not acknowledged."""
    merged: Sequence[Merged] = ()
    """Merged notifications that the follower received and has not acknowledged."""
    merged_to: int = 0
    """The number that acknowledges `merged`."""

    def take(self, room: int, board: str) -> Iterator[Event]:
        """Return the next events of the history, at most `room` notifications."""
        history, boot = self.history, self.history.boot
        self.sent = max(self.sent, history.floor)
        if not self.merged and (merged := self._merged()):
            self.merged, self.merged_to = merged, history.floor
            for each in merged:
                yield Event(
                    "merged", board, direction=each.direction, signal=each.name, count=each.count,
                    sequence=self.merged_to, boot=boot,
                )  # fmt: skip
        for record in history.after(self.sent, min(room, AHEAD - len(self.records))):
            self.sent = record.sequence
            self.records.append(record)
            yield Event(
                "notification", board, record.time_ns / 1e9, record.monotonic_ns, record.direction, record.name,
                sequence=record.sequence, boot=boot,
            )  # fmt: skip

    def rest(self, board: str) -> Iterator[Event]:
        """Return all remaining events, because another history replaces this one."""
        while self.sent < self.history.sequence:
            self.records.clear()
            yield from self.take(AHEAD, board)

    def _merged(self) -> list[Merged]:
        """Return the merged notifications that the follower did not receive before they were merged."""
        sent = Counter((r.direction, r.name) for r in self.records if r.sequence <= self.history.merged_to)
        return [
            attrs.evolve(each, count=count)
            for each in self.history.merged()
            if (count := each.count - sent[each.direction, each.name]) > 0
        ]

    def acknowledge(self, sequence: int) -> int:
        sequence = min(sequence, self.sent)
        done: list[Merged] = []
        while self.records and self.records[0].sequence <= sequence:
            record = self.records.popleft()
            if record.sequence <= self.history.merged_to:  # It was merged after the follower received it.
                done.append(Merged(record.direction, record.name, 1))
        if self.merged and sequence >= self.merged_to:
            done += self.merged
            self.merged = ()
        self.history.acknowledge(sequence, done)
        return sequence


@attrs.define(eq=False)
class Follower(Monitor):
    """A monitor that receives and acknowledges all notifications of its boards, from their histories."""

    boards: Collection[str] | None = None
    """The boards to follow; None: all."""
    process: int = 0
    """The process id of the client."""
    gone: Callable[[], bool] = bool
    """Whether the client has closed its connection."""
    cursors: dict[str, _Cursor] = attrs.Factory(dict)
    _behind: dict[str, None] = attrs.Factory(dict)
    """The boards that may have more events, in round-robin order."""

    def follows(self, board: str) -> bool:
        return self.boards is None or board in self.boards

    def begin(self, board: str, history: History) -> None:
        """Start at the oldest notification of a history, after the rest of the history that it replaces."""
        if (before := self.cursors.get(board)) is not None:
            for event in before.rest(board):
                self._put(event, 1)
        self.cursors[board] = _Cursor(history, history.floor)
        self._turn_of(board)

    def _turn_of(self, board: str) -> None:
        self._behind[board] = None
        self._arrived.set()

    def carried(self, batch: Batch) -> None:
        if batch.board in self.cursors:
            self._turn_of(batch.board)

    def offer(self, event: Event) -> None:
        if self.follows(event.board):
            self._put(event, 1)

    async def pause(self) -> None:
        if not self._behind and not self._waiting:
            with trio.move_on_after(PAUSE):
                await self._ending.wait()

    def acknowledge(self, board: str, sequence: int) -> int:
        """Acknowledge notifications of a board up to `sequence`; return the last one accepted."""
        done = self.cursors[board].acknowledge(sequence)
        self._turn_of(board)
        return done

    def _stored(self) -> Iterator[Event]:
        number = 0
        while self._behind and number < PIECE:
            board = next(iter(self._behind))
            del self._behind[board]
            cursor = self.cursors[board]
            for event in cursor.take(PIECE - number, board):
                number += 1
                yield event
            if cursor.sent < cursor.history.sequence and len(cursor.records) < AHEAD:
                self._behind[board] = None
