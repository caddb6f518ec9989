"""Who is told what a proxy carries: a `Monitor` from now on, as far as it keeps up; a `Follower` all of it."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import trio

from inco_trio.persist.history import History, Merged, Record
from inco_trio.signals import Direction, Signal

__all__ = ["Event", "Follower", "Monitor"]

WAITING_MAX = 8192
"""Events that wait for a client."""
PIECE = 128
"""Events that are encoded at once."""
PAUSE = 0.1
"""Seconds between two writes to a follower that has heard all: each wakes others, who would be in the way of what is
carried next."""
AHEAD = 1024
"""Notifications of a board that a follower is told beyond what it has acknowledged."""


@attrs.frozen
class Event:
    """What monitors are told: `signals` that were carried, or else `fields`."""

    board: str
    time_ns: int
    monotonic_ns: int
    signals: Sequence[Signal] = ()
    sequence: int = 0
    frames: Sequence[bytes] = ()
    fields: Mapping[str, object] = attrs.Factory(dict)

    @property
    def count(self) -> int:
        return len(self.signals) or 1


@attrs.define(eq=False)
class Monitor:
    """A client that is told of events: of those that its filters let through."""

    board: str | None
    direction: Direction | None
    names: Collection[str] | None
    frames: bool
    """Whether it is told the frames, too."""
    _waiting: deque[Event] = attrs.Factory(deque)
    _number: int = 0
    """Notifications, and other events, that wait."""
    _lost: int = 0
    _ended: bool = False
    _arrived: trio.Event = attrs.Factory(trio.Event)
    _ending: trio.Event = attrs.Factory(trio.Event)

    def carried(self, event: Event) -> None:
        """Notifications were carried."""
        self.offer(event)

    def offer(self, event: Event) -> None:
        """Have it wait for the client, if there is room."""
        if self.board is not None and event.board != self.board:
            return
        if self._number >= WAITING_MAX:
            self._lost += event.count
            return
        self._number += event.count
        self._waiting.append(event)
        self._arrived.set()

    def flush(self) -> None:
        """Tell the client that everything before was told, whether there is room or not."""
        self._waiting.append(Event("", time.time_ns(), time.monotonic_ns(), fields={"event": "flushed"}))
        self._number += 1
        self._arrived.set()

    def end(self) -> None:
        """Have `take` end once nothing waits."""
        self._ended = True
        self._arrived.set()
        self._ending.set()

    async def take(self) -> bytes:
        """The lines of some events, once there are any; none at the end."""
        while True:
            lines: list[str] = []
            while self._waiting and len(lines) < PIECE:
                event = self._waiting.popleft()
                self._number -= event.count
                lines += self._lines(event)
            if self._lost and not self._waiting:
                fields = {"event": "lost", "count": self._lost}
                lines += self._lines(Event("", time.time_ns(), time.monotonic_ns(), fields=fields))
                self._lost = 0
            lines += self._kept()
            if lines or (self._ended and not self._waiting):
                return "".join(lines).encode()
            if not self._waiting:
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def pause(self) -> None:
        """Wait before the next `take`."""

    def _kept(self) -> Iterator[str]:
        """Lines of what a history keeps."""
        yield from ()

    def _lines(self, event: Event) -> Iterator[str]:
        common: dict[str, object] = {"board": event.board} if event.board else {}
        common |= {"time": event.time_ns / 1e9, "monotonic_ns": event.monotonic_ns}
        if not event.signals:
            if self._wanted(event.fields.get("direction"), event.fields.get("signal")):
                fields = {key: value for key, value in event.fields.items() if self.frames or key != "frame"}
                yield json.dumps({**fields, **common}) + "\n"
            return
        for number, signal in enumerate(event.signals):
            if not self._wanted(signal.direction.value, signal.name):
                continue
            told: dict[str, object] = {
                "event": "notification",
                "direction": signal.direction.value,
                "signal": signal.name,
                "register": str(signal.path),
                "sequence": event.sequence + number,
            }
            if self.frames:
                told["frame"] = event.frames[number].hex() if event.frames else None
            yield json.dumps(told | common) + "\n"

    def _wanted(self, direction: object, name: object) -> bool:
        """Whether the filters let through what has this direction and name, or none."""
        return (self.direction is None or direction in (None, self.direction.value)) and (
            self.names is None or name is None or name in self.names
        )


@attrs.define
class _Cursor:
    """How far a follower is in the history of a board."""

    history: History
    told: int
    """The number of the last notification that it was told."""
    records: deque[Record] = attrs.Factory(deque)
    """Those that it was told and has not acknowledged."""
    merged: Sequence[Merged] = ()
    """Merged ones that it was told and has not acknowledged."""
    merged_to: int = 0
    """The number with which it acknowledges them."""

    def take(self, room: int, common: Mapping[str, str]) -> Iterator[str]:
        """Lines of what it is to be told next, `room` of records at most."""
        history = self.history
        self.told = max(self.told, history.floor)
        if not self.merged and (merged := self._merged()):
            self.merged, self.merged_to = merged, history.floor
            for each in merged:
                told = {"event": "merged", "direction": each.direction.value, "signal": each.name, "count": each.count}
                yield json.dumps({**told, "sequence": self.merged_to, **common}) + "\n"
        for record in history.after(self.told, min(room, AHEAD - len(self.records))):
            self.told = record.sequence
            self.records.append(record)
            told = {"event": "notification", "direction": record.direction.value, "signal": record.name}
            stamps = {"time": record.time_ns / 1e9, "monotonic_ns": record.monotonic_ns}
            yield json.dumps({**told, "sequence": record.sequence, **stamps, **common}) + "\n"

    def _merged(self) -> list[Merged]:
        """Merged ones that it was not told before they were merged."""
        merged = list(self.history.merged())
        if not merged:
            return []
        told = Counter((r.direction, r.name) for r in self.records if r.sequence <= self.history.merged_to)
        return [
            attrs.evolve(each, count=count)
            for each in merged
            if (count := each.count - told[each.direction, each.name]) > 0
        ]

    @property
    def more(self) -> bool:
        """Whether there is something to tell now."""
        return self.told < self.history.sequence and len(self.records) < AHEAD

    def acknowledge(self, sequence: int) -> int:
        """See `Follower.acknowledge`."""
        sequence = min(sequence, self.told)
        done: list[Merged] = []
        while self.records and self.records[0].sequence <= sequence:
            record = self.records.popleft()
            if record.sequence <= self.history.merged_to:  # Meanwhile.
                done.append(Merged(record.direction, record.name, 1))
        if self.merged and sequence >= self.merged_to:
            done += self.merged
            self.merged = ()
        self.history.acknowledge(sequence, done)
        return sequence


@attrs.define(eq=False)
class Follower(Monitor):
    """A monitor that is told all notifications of its boards, out of their histories, as it acknowledges them."""

    boards: Collection[str] | None = None
    """Those that it follows; None: all."""
    cursors: dict[str, _Cursor] = attrs.Factory(dict)
    _behind: dict[str, None] = attrs.Factory(dict)
    """The boards that may have more for it, in the order of their turns."""

    def follows(self, board: str) -> bool:
        """Whether it wants to be told of a board."""
        return self.boards is None or board in self.boards

    def begin(self, board: str, history: History) -> None:
        """Tell it what this history keeps."""
        self.cursors[board] = _Cursor(history, history.floor)
        self._turn_of(board)

    def _turn_of(self, board: str) -> None:
        self._behind[board] = None
        self._arrived.set()

    def carried(self, event: Event) -> None:
        """See `Monitor.carried`."""
        if event.board in self.cursors:
            self._turn_of(event.board)

    def offer(self, event: Event) -> None:
        """See `Monitor.offer`."""
        if self.follows(event.board):
            Monitor.offer(self, event)

    async def pause(self) -> None:
        """See `Monitor.pause`."""
        if not self._behind and not self._waiting:
            with trio.move_on_after(PAUSE):
                await self._ending.wait()

    def acknowledge(self, board: str, sequence: int) -> int:
        """It is done with what it was told of a board up to this number; returns up to which one that is."""
        done = self.cursors[board].acknowledge(sequence)
        self._turn_of(board)
        return done

    def _kept(self) -> Iterator[str]:
        """See `Monitor._kept`."""
        told = 0
        while self._behind and told < PIECE:
            board = next(iter(self._behind))
            del self._behind[board]
            cursor = self.cursors[board]
            for line in cursor.take(PIECE - told, {"board": board, "boot": cursor.history.boot}):
                told += 1
                yield line
            if cursor.more:
                self._behind[board] = None
