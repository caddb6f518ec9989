"""Clients that receive events. A slow `Monitor` misses events. A `Follower` gets all notifications of its boards."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence

import attrs
import trio

from inco_trio import real_clock
from inco_trio.control.feed import Batch, Waiting
from inco_trio.control.protocol import AHEAD, Event, encode_alone, encode_event, encode_notifications, event_now
from inco_trio.notifications import Times
from inco_trio.persist.followed import History, Merged, Record
from inco_trio.persist.recorder import waited
from inco_trio.signals import Direction, Signal

__all__ = ["Follower", "Monitor"]

WAITING_MAX = 8192
"""Maximum number of events that are queued for one client."""
WAITING_BYTES_MAX = 2 << 20
"""Maximum size in bytes of the frames in the events that are queued for one client. The last event may exceed it.

If another client has already received the events with their frames, their text needs twice as much in addition.
"""
QUEUES_MAX = 8
"""Maximum number of full queues whose content the monitors of other users may have queued together."""
CROWDED = 1 / 32
"""The part of its queue that each monitor of another user may use beyond that."""
PIECE = 128
"""Number of events after which `take` lets other tasks run. The last batch may exceed it."""
PAUSE = 0.02
"""Maximum pause in seconds between writes to a follower. Each write wakes the follower, which delays notifications."""
PAUSE_EACH = 0.005
"""Seconds to pause for each notification in the last write. After a single notification, the pause is short."""


@attrs.define(eq=False)
class Monitor:
    """A client that receives the events that its filters accept."""

    board: str | None = None
    direction: Direction | None = None
    signals: Collection[str] | None = None
    frames: bool = False
    """Whether events contain the frames."""
    share: Callable[[], float] = float
    """A function that returns how long to pause (seconds) after events that the filters refused."""
    total: Waiting = attrs.Factory(Waiting)
    """What is queued for all monitors that share a limit with this one, including this one."""
    _waiting: deque[Batch | Event] = attrs.Factory(deque)
    _number: int = 0
    """The number of events in `_waiting`, counting each notification in a batch."""
    _bytes: int = 0
    """The size of the frames in `_waiting`."""
    _lost: int = 0
    _ended: bool = False
    _rest: str = ""
    """The unsent remainder of lines that were only partially sent."""
    _is_idle: bool = False
    """Whether `take` is waiting for events."""
    _arrived: trio.Event = attrs.Factory(trio.Event)
    _ending: trio.Event = attrs.Factory(trio.Event)

    def carried(self, batch: Batch) -> None:
        self._put(batch, len(batch.signals))

    def offer(self, event: Event) -> None:
        self._put(event, 1)

    def _put(self, what: Batch | Event, number: int) -> None:
        if self.board is not None and what.board != self.board:
            return
        # After a loss, accept no events until half of the queue is empty. Otherwise, each second event would be `lost`.
        if _used(self._number, self._bytes) >= self._room() * (0.5 if self._lost else 1):
            self._lost += number
            return
        self._append_lost()
        self._append(what, number)

    def _room(self) -> float:
        """Return which part of its queue this monitor may use."""
        return 1.0 if _used(self.total.number, self.total.bytes) < QUEUES_MAX else CROWDED

    def _count(self, number: int, size: int) -> None:
        self._number += number
        self._bytes += size
        self.total.add(number, size)

    def leave(self) -> None:
        """No longer count this monitor in `total`, because it will receive no further events."""
        self.total.add(-self._number, -self._bytes)
        self.total = Waiting()

    def _append(self, what: Batch | Event, number: int = 1) -> None:
        """Queue events, even if the queue is full."""
        self._count(number, what.frame_bytes)
        self._waiting.append(what)
        self._arrived.set()

    def _append_lost(self) -> None:
        """Queue the number of lost events, if any, at the position where they are missing."""
        if self._lost:
            self._append(event_now("lost", count=self._lost))
            self._lost = 0

    def flush(self) -> None:
        """Queue a `flushed` event after all earlier events, even if the queue is full."""
        self._append_lost()
        self._append(event_now("flushed"))

    def end(self) -> None:
        """Make `take` return b"" once the queue is empty."""
        self._ended = True
        self._arrived.set()
        self._ending.set()

    async def take(self) -> bytes:
        """Wait for events, and return some of them as lines. After `end`, return b"" once the queue is empty."""
        while True:
            await self.pause()
            lines = [rest] if (rest := self.take_rest()) else []
            before = self._number
            while self._waiting and before - self._number < PIECE:
                what = self._waiting.popleft()
                self._count(-len(what.signals) if isinstance(what, Batch) else -1, -what.frame_bytes)
                lines += self._wanted(what)
            if self._lost and not self._waiting:
                lines.append(encode_event(event_now("lost", count=self._lost)))
                self._lost = 0
            lines += self._stored()
            if lines or (self._ended and not self._waiting):
                self._taken()
                return "".join(lines).encode()
            if self._number < before:
                with trio.move_on_after(self.share()):
                    await self._ending.wait()
            if not self._waiting:
                self._arrived = trio.Event()
                self._is_idle = True
                try:
                    await self._arrived.wait()
                finally:
                    self._is_idle = False

    def take_rest(self) -> str:
        """Return the unsent part of partially sent lines. The caller must send it before any other line."""
        rest, self._rest = self._rest, ""
        return rest

    async def pause(self) -> None:
        """Wait until `take` may return the next events."""

    def _taken(self) -> None:
        """Record that lines were sent."""

    def _stored(self) -> Iterator[str]:
        """Yield the next events from the histories of a follower, as lines. A monitor has no histories."""
        yield from ()

    def _wanted(self, what: Batch | Event) -> Iterator[str]:
        """Yield, as lines, the events that the filters accept. `what` is one event or a batch of events."""
        if isinstance(what, Event):
            if self._accepts(what.direction, what.signal):
                yield encode_event(what, frames=self.frames)
            return
        for number, signal in enumerate(what.signals):
            if self._accepts(signal.direction, signal.name):
                yield _line(what, number, self.frames)

    def _accepts(self, direction: Direction | None, name: str | None) -> bool:
        """Return whether the filters accept an event. An argument is None if the event has no direction or signal."""
        return (self.direction is None or direction in (None, self.direction)) and (
            self.signals is None or name is None or name in self.signals
        )


def _used(number: int, size: int) -> float:
    """Return how many full queues `number` events with `size` bytes of frames would need."""
    return max(number / WAITING_MAX, size / WAITING_BYTES_MAX)


def _line(batch: Batch, number: int, frames: bool) -> str:
    """Return an event of a batch as a line. Encode it once, and keep the line for other monitors."""
    line = batch.lines.get((number, frames))
    if line is None:
        signal, delay = batch.signals[number], waited(batch.monotonic_ns, batch.since)
        line = batch.lines[number, frames] = encode_event(
            Event(
                batch.kind, batch.board, batch.time_ns / 1e9, batch.monotonic_ns, signal.direction, signal.name,
                str(signal.path), batch.sequence and batch.sequence + number,
                frame=batch.frames[number].hex() if frames and batch.frames else None,
                reason=batch.reason, delay=max(0.0, delay), delay_max=max(0.0, -delay),
            ),
            frames=frames,
        )  # fmt: skip
    return line


@attrs.define
class _Cursor:
    """The position of a follower in the history of a board."""

    history: History
    sent: int
    """Sequence number of the last notification that was sent to the follower."""
    records: deque[Record] = attrs.Factory(deque)
    """Notifications that have been sent to the follower but not acknowledged yet."""
    merged: Sequence[Merged] = ()
    """Merged notifications that have been sent to the follower but not acknowledged yet."""
    merged_to: int = 0
    """Sequence number that the follower sends to acknowledge `merged`."""
    _checked: int = -1
    """The value of `History.merged_ever` when the last check found no further merged notifications."""

    @property
    def must_wait(self) -> bool:
        """Whether merged notifications that are older than the next record must be sent first.

        They are sent once the follower has acknowledged the earlier ones in `merged`.
        """
        return bool(self.merged) and self.history.merged_to > self.merged_to

    def take(self, room: int, board: str) -> Iterator[Event]:
        """Yield the next events of the history, with at most `room` notifications."""
        yield from self._take_merged(board)
        yield from self._take_records(room, board)

    def _take_records(self, room: int, board: str) -> Iterator[Event]:
        for record in self._next(room):
            yield Event(
                "notification", board, record.time_ns / 1e9, record.monotonic_ns, record.direction, record.name,
                sequence=record.sequence, boot=self.history.boot,
            )  # fmt: skip

    def take_batch(self, room: int, board: str) -> Iterator[str]:
        """Yield the same events as `take`, but as lines. One line contains all notifications."""
        yield from map(encode_event, self._take_merged(board))
        if records := self._next(room):
            numbers: dict[tuple[Direction, str], int] = {}
            items = [
                (numbers.setdefault((each.direction, each.name), len(numbers)), each.time_ns / 1e9, each.monotonic_ns)
                for each in records
            ]
            yield encode_notifications(board, self.history.boot, records[0].sequence, tuple(numbers), items)

    def take_alone(self, board: str, signals: Sequence[Signal], at: Times) -> str:
        """Return the line of a single notification that was just stored, or "" if `take_batch` must be used.

        This method is faster. The run time of `take_batch` would add to the latency of the notification.
        """
        history, sequence = self.history, self.sent + 1
        if (
            len(signals) != 1
            or history.sequence != sequence
            or history.merged_ever != self._checked  # If both are equal, `merged` is empty.
            or len(self.records) >= AHEAD
        ):
            return ""
        (signal,), (time_ns, monotonic_ns) = signals, at
        self.sent = sequence
        self.records.append(Record(sequence, signal.direction, signal.name, time_ns, monotonic_ns))
        return encode_alone(board, history.boot, sequence, (signal.direction, signal.name), at)

    def _take_merged(self, board: str) -> Iterator[Event]:
        self.sent = max(self.sent, self.history.floor)
        if self.merged or self.history.merged_ever == self._checked:
            return
        if merged := self._merged():
            self.merged, self.merged_to = merged, self.history.floor
            yield from self._events(merged, board)
        else:
            self._checked = self.history.merged_ever

    def _events(self, merged: Sequence[Merged], board: str) -> Iterator[Event]:
        # Each event has its own number, so that the proxy does not repeat events that the follower has acknowledged.
        for sequence, each in enumerate(merged, self.history.floor - len(merged) + 1):
            yield Event(
                "merged", board, direction=each.direction, signal=each.name, count=each.count,
                sequence=sequence, boot=self.history.boot,
            )  # fmt: skip

    def _next(self, room: int) -> list[Record]:
        """Return the next notifications of the history, which the follower must acknowledge."""
        records = self.history.after(self.sent, min(room, AHEAD - len(self.records)))
        if records:
            self.sent = records[-1].sequence
            self.records += records
        return records

    def rest(self, board: str) -> Iterator[Event]:
        """Yield all remaining events before another history replaces this history."""
        yield from self._events(self._merged(), board)
        self.sent = max(self.sent, self.history.floor)
        while self.sent < self.history.sequence:
            self.records.clear()  # Acknowledgements of these notifications will be ignored.
            yield from self._take_records(AHEAD, board)

    def _merged(self) -> list[Merged]:
        """Return the notifications that were merged before they were sent to the follower."""
        sent = Counter((r.direction, r.name) for r in self.records if r.sequence <= self.history.merged_to)
        sent.update({(each.direction, each.name): each.count for each in self.merged})
        return [
            Merged(each.direction, each.name, count)
            for each in self.history.merged()
            if (count := each.count - sent[each.direction, each.name]) > 0
        ]

    def acknowledge(self, sequence: int) -> int:
        sequence = min(sequence, self.sent)
        done: list[Merged] = []
        while self.records and self.records[0].sequence <= sequence:
            record = self.records.popleft()
            if record.sequence <= self.history.merged_to:  # The history merged this record after it was sent.
                done.append(Merged(record.direction, record.name, 1))
        # Each `merged` event has its own number; see `_take_merged`.
        number = max(0, sequence - self.merged_to + len(self.merged))
        done += self.merged[:number]
        self.merged = self.merged[number:]
        self.history.acknowledge(sequence, done)
        return sequence


@attrs.define(eq=False)
class Follower(Monitor):
    """A monitor that receives all notifications of its boards from their histories. The client acknowledges them."""

    boards: Collection[str] | None = None
    """The boards to follow (default: all)."""
    batches: bool = False
    """Whether one line may report several notifications."""
    process: int = 0
    """The PID of the client."""
    gone: Callable[[], bool] = bool
    """A function that returns whether the client has closed its connection."""
    transmit: Callable[[bytes], int] | None = None
    """A function that sends lines without waiting, and returns how many bytes it has sent."""
    cursors: dict[str, _Cursor] = attrs.Factory(dict)
    _behind: dict[str, None] = attrs.Factory(dict)
    """The boards whose histories may have unsent events, in round-robin order."""
    _last_of_rest: Event | None = None
    """The last queued event of a replaced history, or None once `take` has returned it."""
    _pause: float = 0.0
    """Seconds between the last write and the next one; 0 if more events may be waiting."""
    _due_ns: int = 0
    """The time of the next write (real_clock.monotonic_ns())."""

    def follows(self, board: str) -> bool:
        return self.boards is None or board in self.boards

    def begin(self, board: str, history: History) -> None:
        """Follow `history` from its oldest notification. First queue the rest of the history that it replaces.

        If the board was reopened with the same memory, continue after the last notification that was sent, so that no
        notification is sent twice.
        """
        before = self.cursors.get(board)
        if before is not None and before.history.boot == history.boot:
            before.history = history
        else:
            for event in before.rest(board) if before is not None else ():
                self._append(event)
                self._last_of_rest = event
            self.cursors[board] = _Cursor(history, history.floor)
        self._turn_of(board)

    def _turn_of(self, board: str) -> None:
        self._behind[board] = None
        self._arrived.set()

    def carried(self, batch: Batch) -> None:
        """Queue pending notifications. `appended` handles all other notifications."""
        if self.follows(batch.board):
            self._put(batch, len(batch.signals))

    def appended(self, board: str, signals: Sequence[Signal], at: Times) -> None:
        """Send notifications that were just stored in a board's history. An idle follower sends them immediately."""
        cursor = self.cursors.get(board)
        if cursor is None:
            return
        if self._is_idle and not self._arrived.is_set() and self.transmit and at[1] >= self._due_ns:
            # Do not wake the task that calls `take`, because waking takes longer than the write itself.
            self._pause = PAUSE_EACH
            lines = cursor.take_alone(board, signals, at) if self.batches else ""
            if not lines:
                self._behind[board] = None
                lines = "".join(self._stored())
            self._rest = lines[self.transmit(lines.encode()) :]  # The lines are ASCII.
            self._taken()
            if self._rest or self._behind:
                self._arrived.set()
        else:
            self._turn_of(board)

    def offer(self, event: Event) -> None:
        if self.follows(event.board):
            self._put(event, 1)

    def offer_always(self, event: Event) -> None:
        """Queue an event even if the queue is full."""
        if self.follows(event.board):
            self._append(event)

    async def pause(self) -> None:
        left_ns = self._due_ns - real_clock.monotonic_ns()
        if left_ns > 0:
            with trio.move_on_after(left_ns / 1e9):
                await self._ending.wait()

    def _taken(self) -> None:
        self._due_ns = real_clock.monotonic_ns() + round(self._pause * 1e9)

    def acknowledge(self, board: str, sequence: int) -> int:
        """Acknowledge notifications of a board up to `sequence`. Return the last acknowledged number."""
        done = self.cursors[board].acknowledge(sequence)
        self._turn_of(board)
        return done

    def _wanted(self, what: Batch | Event) -> Iterator[str]:
        if what is self._last_of_rest:
            self._last_of_rest = None
        return super()._wanted(what)

    def _stored(self) -> Iterator[str]:
        number = 0
        if self._last_of_rest is not None:
            self._pause = 0.0  # The rest of a replaced history must be sent before the next history.
            return
        while self._behind and number < PIECE:
            board = next(iter(self._behind))
            del self._behind[board]
            cursor = self.cursors[board]
            before, room = cursor.sent, 0 if cursor.must_wait else PIECE - number
            if self.batches:
                yield from cursor.take_batch(room, board)
            else:
                yield from map(encode_event, cursor.take(room, board))
            number += cursor.sent - before
            if cursor.sent < cursor.history.sequence and len(cursor.records) < AHEAD and not cursor.must_wait:
                self._behind[board] = None
        self._pause = 0.0 if number >= PIECE else min(PAUSE, number * PAUSE_EACH)
