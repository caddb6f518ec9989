"""The flight recorder: a board's most recent notifications and events, in memory that outlives the process.

The recorder is part of the in-flight buffer (`inflight`), so its content survives even if SIGKILL ends the process. It
has a fixed size: once it is full, each new record replaces the oldest one.

Layout: numbers and the signal names; a ring of notifications; a ring of events. Each ring has one spare slot, and the
number of records is updated only after a record is complete. A record that a killed process was writing is therefore
never read. One record contains all notifications of a signal in one batch.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import logging
import math
import os
import struct
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from inco_trio import real_clock
from inco_trio.frame import is_wire_name
from inco_trio.signals import Direction, Signal
from inco_trio.wall_clock import WallClock, step_text

if TYPE_CHECKING:
    from inco_trio.proxy_status import RecorderStatus

__all__ = [
    "AREA",
    "EVENTS_SHARE",
    "KEPT",
    "KEPT_MAX",
    "KINDS",
    "Note",
    "Recorded",
    "Recorder",
    "events_kept",
    "truncated",
    "waited",
]

logger = logging.getLogger(__name__)

KEPT = 4096
"""Default number of notifications that the recorder of a single board keeps."""
KEPT_MAX = 65_536
EVENTS_SHARE = 8
"""Ratio of the sizes of the two rings: the recorder has room for one event per EVENTS_SHARE notifications."""
EVENTS_MIN = 16
RECENT = 16
"""Number of recent events that a new event is compared with. If one is equal, only its count is incremented."""
FROM_OUTSIDE = ("ignored", "link")
"""The kinds of events that the link peer can cause without limit. Each kind may fill at most a quarter of the ring."""
NAMES_MAX = (1 << 15) - 1
NAME = 64
_RECORD = struct.Struct("=QQQHHf")
"""A notification record: wall-clock and monotonic time in ns, last sequence number, count, signal, `Recorded.delay`."""
_TEXT = 156
_EVENT = struct.Struct(f"=QQQIHBB{_TEXT}sf")
"""An event record: wall-clock and monotonic time of the first occurrence in ns, monotonic time of the last occurrence,
count, signal, kind, level or state, text, and a duration in s."""
_MAGIC = int.from_bytes(b"recorder", "little")
_MAGIC_AT, _KEPT, _EVENTS_KEPT, _BOOT, _WRITTEN, _NOTED, _NAMES = range(7)
"""Indexes of the 64-bit numbers at the beginning of the memory."""
_NUMBERS = 256
_RING = _NUMBERS + NAMES_MAX * NAME
_EVENTS = _RING + (KEPT_MAX + 1) * _RECORD.size
AREA = -(-(_EVENTS + (KEPT_MAX // EVENTS_SHARE + 1) * _EVENT.size) // 4096) * 4096
"""Size of the recorder's memory in bytes. The kernel allocates only the pages in use."""
NUMBER_MAX = 1 << 62
"""Maximum of an inherited time, sequence number or number of records. New ones never exceed 64 bits."""
COUNT_MAX = 0xFFFF
_OUTBOUND = 1 << 15
"""The bit that marks the number of an outbound signal."""
_BITS = {Direction.INBOUND: 0, Direction.OUTBOUND: _OUTBOUND}
"""The bits to set in the number of a signal. In Python 3.11, a lookup here is faster than `Direction.OUTBOUND`."""
_NO_SIGNAL = 0xFFFF
KINDS = (
    "message", "started", "stopped", "link", "pending", "dropped", "overflow", "problem", "works", "reloaded", "clock",
    "ignored",
)  # fmt: skip
"""The kinds of events. Records store an index into this tuple, so append new kinds at the end."""
LEVELS = ("info", "warning", "error")


def events_kept(kept: int) -> int:
    """Return the maximum number of events that a recorder for `kept` notifications keeps."""
    return max(EVENTS_MIN, kept // EVENTS_SHARE)


def truncated(text: bytes) -> bytes:
    """Return what an event record stores of `text`, which is UTF-8."""
    return text if len(text) <= _TEXT else text[: _TEXT - 3].decode("utf-8", "ignore").encode() + b"..."


def waited(now: int, since: int) -> float:
    """Return how long notifications that became pending at `since` have been pending (seconds), or 0 if `since` is 0.

    If `since` is negative, they became pending at the time `-since` or later. The result is then the maximum, negated.
    """
    return (now - since) / 1e9 if since > 0 else -(now + since) / 1e9 if since else 0.0


class Recorded:
    """Notifications of one signal that were delivered or sent at the same time."""

    def __init__(
        self,
        time_ns: int,
        monotonic_ns: int,
        sequence: int,
        count: int,
        direction: Direction,
        signal: str,
        delay: float,
    ) -> None:
        self.time_ns = time_ns
        self.monotonic_ns = monotonic_ns
        self.sequence = sequence
        """The sequence number of the last notification."""
        self.count = count
        self.direction = direction
        self.signal = signal
        self.delay = delay
        """The result of `waited`."""


class Note:
    """An event other than a notification. `count` is the number of occurrences."""

    def __init__(
        self,
        kind: str,
        time_ns: int,
        monotonic_ns: int,
        last_ns: int,
        count: int,
        direction: Direction | None,
        signal: str | None,
        state: int,
        text: str,
        seconds: float = 0.0,
    ) -> None:
        self.kind = kind
        self.time_ns = time_ns
        self.monotonic_ns = monotonic_ns
        self.last_ns = last_ns
        """When the event last occurred (real_clock.monotonic_ns())."""
        self.count = count
        self.direction = direction
        self.signal = signal
        self.state = state
        """For the kind `link`, whether the link is running. For other kinds, the index of the level in `LEVELS`."""
        self.text = text
        self.seconds = seconds
        """For the kind `link`: how long the link was in the previous state, or 0 if that is unknown."""


class Recorder:
    """A recorder in the memory `view` (`AREA` bytes) that keeps the last `kept` notifications.

    If `kept` is None, an inherited recorder keeps its size, and a new recorder keeps `default` notifications. If the
    memory does not contain a valid recorder, start with an empty recorder and log the reason.
    """

    def __init__(self, view: memoryview, kept: int | None = None, default: int = KEPT) -> None:
        self._view = view
        self._numbers = view[:_NUMBERS].cast("Q")
        self._ring, self._events = view[_RING:_EVENTS], view[_EVENTS:]
        self._names: list[str] = []
        self._ids: dict[str, int] = {}
        self._unused: list[int] = []
        """The indexes of names that no record contains. `_ids` does not contain these names."""
        self._recent: dict[tuple[object, ...], int] = {}
        self._outside: dict[str, deque[int]] = {}
        """For each kind in `FROM_OUTSIDE`, the numbers of its latest events, up to a quarter of the ring."""
        self._clock = WallClock()
        self._written = self._noted = 0
        self.inherited = False
        """Whether an earlier process wrote to this recorder."""
        self.inherited_ns = 0
        """The value of `last_ns` at the end of the earlier process, or 0 if it is unknown."""
        self._damaged = False
        self._has_deleted = False
        """Whether records were deleted because the table of names was full."""
        before: list[Recorded] = []
        notes: list[Note] = []
        if self._numbers[_MAGIC_AT] == _MAGIC:
            try:
                before, notes = self._load()
                self.inherited = True
            except ValueError as error:
                self._damaged = True
                logger.warning("the recorded history is damaged (%s): starting with an empty history", error)
        if not self.inherited or (kept is not None and kept != self._numbers[_KEPT]):
            self._reset(default if kept is None else kept, before, notes)
        else:
            for number, note in enumerate(notes, self._noted - len(notes)):
                self._count_outside(note.kind, number)
        self._kept, self._events_kept = self._numbers[_KEPT], self._numbers[_EVENTS_KEPT]
        self._written, self._noted = self._numbers[_WRITTEN], self._numbers[_NOTED]
        self._sequence = before[-1].sequence if before else 0
        self.inherited_ns = self.last_ns if self.inherited else 0
        written = [(record.monotonic_ns, record.time_ns) for record in before[-1:]]
        written += [(note.monotonic_ns, note.time_ns) for note in notes[-1:]]
        if written:
            monotonic, wall = max(written)
            self._clock.offset = wall - monotonic
            self.check_clock()

    def _reset(self, kept: int, before: Sequence[Recorded], notes: Sequence[Note]) -> None:
        """Empty both rings, then store the newest records of `before` and `notes` again."""
        numbers, boot = self._numbers, self._numbers[_BOOT]
        numbers[_MAGIC_AT] = 0
        numbers[_BOOT] = boot if self.inherited else int.from_bytes(os.urandom(8), "little")
        numbers[_KEPT], numbers[_EVENTS_KEPT] = kept, events_kept(kept)
        numbers[_WRITTEN] = numbers[_NOTED] = numbers[_NAMES] = 0
        self._names, self._ids, self._unused, self._recent, self._outside = [], {}, [], {}, {}
        self._written = self._noted = 0
        self._kept, self._events_kept = kept, numbers[_EVENTS_KEPT]
        for each in before[-kept:]:
            bits = _BITS[each.direction]
            self._put(each.time_ns, each.monotonic_ns, each.sequence, each.count, each.signal, bits, each.delay)
        for note in notes[-self._events_kept :]:
            self._write_note(note)
        numbers[_MAGIC_AT] = _MAGIC

    def _load(self) -> tuple[list[Recorded], list[Note]]:
        """Return the recorded notifications and events. Raises ValueError if the memory is invalid."""
        numbers = self._numbers
        self._kept, self._events_kept, number = numbers[_KEPT], numbers[_EVENTS_KEPT], numbers[_NAMES]
        if not (0 < self._kept <= KEPT_MAX and 0 < self._events_kept <= events_kept(KEPT_MAX) and number <= NAMES_MAX):
            raise ValueError("invalid sizes")
        if max(numbers[_WRITTEN], numbers[_NOTED]) > NUMBER_MAX:
            raise ValueError("invalid numbers of records")
        for index in range(number):
            name = bytes(self._view[_NUMBERS + index * NAME : _NUMBERS + (index + 1) * NAME]).rstrip(b"\0")
            # An invalid name is harmless: a process was killed while it was replacing a name that no record uses.
            self._add(name.decode("ascii") if is_wire_name(name) else "")
        self._written, self._noted = numbers[_WRITTEN], numbers[_NOTED]
        before, notes = list(self.notifications()), list(self.notes())
        for earlier, later in itertools.pairwise(before):
            if later.sequence - later.count < earlier.sequence:
                raise ValueError("decreasing sequence numbers")
        if any(
            max(each.time_ns, each.monotonic_ns, each.sequence) > NUMBER_MAX or not abs(each.delay) < math.inf
            for each in before
        ):
            raise ValueError("a notification has an invalid number")
        if any(max(note.time_ns, note.monotonic_ns, note.last_ns) > NUMBER_MAX for note in notes):
            raise ValueError("an event has an invalid time")
        return before, notes

    @property
    def boot(self) -> str:
        """A random identifier of this recorder. A process that inherits the recorder keeps the identifier."""
        return f"{self._numbers[_BOOT]:016x}"

    @property
    def kept(self) -> int:
        """Maximum number of records in the ring of notifications."""
        return self._kept

    @property
    def sequence(self) -> int:
        """The sequence number of the last notification."""
        return self._sequence

    @property
    def last_ns(self) -> int:
        """The monotonic time of the newest record, or 0 if there is none."""
        times = [self._raw_notification(self._written - 1)[1]] if self._written else []
        times += [record[2] for record in itertools.islice(self._raw_notes(self._noted - 1), 1)] if self._noted else []
        return max(times, default=0)

    def skip_to(self, sequence: int) -> None:
        """Number the next notification `sequence` + 1, unless its number would already be higher."""
        self._sequence = max(self._sequence, sequence)

    def append(self, signals: Sequence[Signal], since: int = 0, at: tuple[int, int] | None = None) -> tuple[int, int]:
        """Record notifications of one direction. Return the wall-clock time and the monotonic time of the record.

        For `since`, see `waited`. `at` is the time of the record (default: now).
        """
        wall, monotonic = at or (real_clock.time_ns(), real_clock.monotonic_ns())
        if not -(10**9) < wall - monotonic - self._clock.offset < 10**9:  # The same as WallClock.step, but faster.
            self._note_step(wall, monotonic)
        delay = waited(monotonic, since) if since else 0.0
        bits = _BITS[signals[0].direction]
        if len(signals) == 1:
            self._sequence += 1
            self._put(wall, monotonic, self._sequence, 1, signals[0].name, bits, delay)
            return wall, monotonic
        for name, number in Counter([signal.name for signal in signals]).items():
            while number:
                count = min(number, COUNT_MAX)
                number -= count
                self._sequence += count
                self._put(wall, monotonic, self._sequence, count, name, bits, delay)
        return wall, monotonic

    def _put(self, wall: int, monotonic: int, sequence: int, count: int, name: str, bits: int, delay: float) -> None:
        number = self._ids.get(name)
        if number is None:
            number = self._new_name(name)
        written = self._written
        place = written % (self._kept + 1) * _RECORD.size
        _RECORD.pack_into(self._ring, place, wall, monotonic, sequence, count, number | bits, delay)
        self._written = self._numbers[_WRITTEN] = written + 1

    def _new_name(self, name: str) -> int:
        if len(self._names) == NAMES_MAX and not self._unused:
            self._find_unused_names()
        index = self._unused.pop() if self._unused else len(self._names)
        self._view[_NUMBERS + index * NAME : _NUMBERS + (index + 1) * NAME] = name.encode("ascii").ljust(NAME, b"\0")
        if index == len(self._names):
            self._numbers[_NAMES] = index + 1
            self._add(name)
        else:
            self._names[index], self._ids[name] = name, index
        return index

    def _find_unused_names(self) -> None:
        """Make room in the table of names, which can be full after many reloads. Keep the records."""
        records = itertools.chain(self._raw_notifications(), self._raw_notes())
        used = {record[4] & ~_OUTBOUND for record in records}
        self._unused = [index for index in range(NAMES_MAX) if index not in used]
        self._ids = {name: index for index, name in enumerate(self._names) if index in used}
        if not self._unused:
            if not self._has_deleted:
                self._has_deleted = True
                logger.warning("the recorded history has %d signal names: deleting its oldest records", NAMES_MAX)
            newest = slice(-NAMES_MAX // 4, None)  # These records contain far fewer names than the table can hold.
            self._reset(self._kept, [*self.notifications()][newest], [*self.notes()][newest])

    def _add(self, name: str) -> None:
        self._ids[name] = len(self._names)
        self._names.append(name)

    def _note_step(self, wall: int, monotonic: int) -> None:
        if step := self._clock.step(wall, monotonic):
            self.note("clock", step_text(step), state=1)

    def check_clock(self) -> None:
        """Record a `clock` event if the wall clock has been changed."""
        self._note_step(real_clock.time_ns(), real_clock.monotonic_ns())

    def note(
        self,
        kind: str,
        text: str,
        signal: str | None = None,
        direction: Direction | None = None,
        *,
        count: int = 1,
        state: int = 0,
        seconds: float = 0.0,
        at: tuple[int, int] | None = None,
    ) -> None:
        """Record an event. If it equals one of the last RECENT events, increment the count of that event instead.

        `at` is the wall-clock time and the monotonic time of the event (default: now).
        Once the link peer has filled its share of the ring, treat its further events as equal, regardless of their
        names. Ignored frames are still counted separately for each reason.
        """
        wall, monotonic = at or (real_clock.time_ns(), real_clock.monotonic_ns())
        key: tuple[object, ...] = kind, text, signal, direction, state
        is_crowded = kind in FROM_OUTSIDE and self._is_crowded(kind)
        if is_crowded:
            key, signal = (kind, state, text if kind == "ignored" else None), None
        number = self._recent.get(key, -1)
        if (kind != "link" or is_crowded) and number >= max(0, self._noted - RECENT):
            place = number % (self._events_kept + 1) * _EVENT.size
            first = _EVENT.unpack_from(self._events, place)
            total = min(first[3] + count, 0xFFFFFFFF)
            _EVENT.pack_into(self._events, place, *first[:2], monotonic, total, *first[4:])
            return
        self._recent[key] = self._noted
        if len(self._recent) > 2 * RECENT:
            self._recent = {key: number for key, number in self._recent.items() if number >= self._noted - RECENT}
        self._write_note(Note(kind, wall, monotonic, monotonic, count, direction, signal, state, text, seconds))

    def _is_crowded(self, kind: str) -> bool:
        """Return whether a quarter of the events in the ring are of this kind."""
        numbers = self._outside.get(kind)
        return numbers is not None and len(numbers) == numbers.maxlen and numbers[0] >= self._noted - self._events_kept

    def _count_outside(self, kind: str, number: int) -> None:
        """Count the event `number` if the link peer can cause events of this kind."""
        if kind in FROM_OUTSIDE:
            self._outside.setdefault(kind, deque(maxlen=max(1, self._events_kept // 4))).append(number)

    def _write_note(self, note: Note) -> None:
        number, text = _NO_SIGNAL, note.text.encode("utf-8", "backslashreplace")
        if note.signal is not None and is_wire_name(name := note.signal.encode("ascii", "replace")):
            known = self._ids.get(note.signal, -1)
            if known < 0 and note.kind == "ignored" and note.direction is not Direction.OUTBOUND:
                # The link peer chooses inbound names. The table holds at most 32,767 names.
                text += b" " + name
            else:
                number = self._new_name(note.signal) if known < 0 else known
                number |= _OUTBOUND * (note.direction is Direction.OUTBOUND)
        _EVENT.pack_into(
            self._events,
            self._noted % (self._events_kept + 1) * _EVENT.size,
            note.time_ns,
            note.monotonic_ns,
            note.last_ns,
            note.count,
            number,
            KINDS.index(note.kind) if note.kind in KINDS else 0,
            note.state,
            truncated(text),
            note.seconds,
        )
        self._count_outside(note.kind, self._noted)
        self._noted = self._numbers[_NOTED] = self._noted + 1

    def note_start(self, supervisor: str | None = None, *, after_crash: bool = False) -> None:
        """Record that this process has started, and whether the previous process had stopped cleanly.

        If the recorder was not inherited, also record why. `supervisor` is the name of the fd store, or None if there
        is no fd store. `after_crash` is true if the previous process is known to have ended without a clean stop.
        """
        text, rest = "started", ""
        if self.inherited:
            text += " again"
            after_crash = [note.kind for note in self.notes()][-1:] != ["stopped"]
        elif self._damaged:
            rest = "; earlier history is lost: the stored memory was damaged"
        elif supervisor is None:
            rest = "; earlier history is unknown: no fd store keeps it"
        else:
            rest = f"; earlier history is unknown: {supervisor} has none"
        if after_crash:
            text += " after the previous process had ended without a stop"
        self.note("started", f"{text} (PID {os.getpid()}){rest}")

    def status(self) -> RecorderStatus:
        from inco_trio.proxy_status import RecorderStatus

        notifications, events = min(self._written, self._kept), min(self._noted, self._events_kept)
        # Do not decode the records: a process that writes to the memory could make them invalid.
        rings = self._raw_notifications(), self._raw_notes()
        oldest = [record[1] for ring in rings for record in itertools.islice(ring, 1)]
        self.check_clock()
        since = self._clock.seconds(min(oldest)) if oldest else None
        return RecorderStatus(self.boot, self._sequence, since, notifications, events, self._kept)

    def snapshot(self) -> Recorder:
        """Return a copy for reading, which does not change when the proxy records more.

        Copying the memory is fast. Decoding all records takes much longer, so other tasks must be allowed to run in
        between.
        """
        found = copy.copy(self)
        found._ring = memoryview(bytes(self._ring[: min(self._written, self._kept + 1) * _RECORD.size]))
        found._events = memoryview(bytes(self._events[: min(self._noted, self._events_kept + 1) * _EVENT.size]))
        found._names = self._names.copy()
        return found

    def notifications(self, after: int = 0) -> Iterator[Recorded]:
        """Yield the notifications that are newer than the monotonic time `after`, oldest first.

        Raises ValueError if the memory is invalid.
        """
        for wall, monotonic, sequence, count, signal, delay in self._raw_notifications(after):
            direction = Direction.OUTBOUND if signal & _OUTBOUND else Direction.INBOUND
            yield Recorded(wall, monotonic, sequence, count, direction, self._name(signal & ~_OUTBOUND), delay)

    def _raw_notifications(self, after: int = 0) -> Iterator[tuple[Any, ...]]:
        numbers = range(max(0, self._written - self._kept), self._written)
        start = bisect.bisect(numbers, after, key=lambda number: self._raw_notification(number)[1]) if after else 0
        return map(self._raw_notification, numbers[start:])

    def _raw_notification(self, number: int) -> tuple[Any, ...]:
        return _RECORD.unpack_from(self._ring, number % (self._kept + 1) * _RECORD.size)

    def _name(self, number: int) -> str:
        if number >= len(self._names) or not self._names[number]:
            raise ValueError("unknown signal number")
        return self._names[number]

    def notes(self, after: int = 0) -> Iterator[Note]:
        """Yield the events whose last occurrence is newer than the monotonic time `after`, oldest first.

        Raises ValueError if the memory is invalid.
        """
        for wall, first, last, count, signal, kind, state, text, seconds in self._raw_notes():
            if last <= after:
                continue
            if kind >= len(KINDS):
                raise ValueError("unknown kind of event")
            direction = Direction.OUTBOUND if signal & _OUTBOUND else Direction.INBOUND
            name, words = None, text.rstrip(b"\0").decode("utf-8", "replace")
            if signal != _NO_SIGNAL:
                name = self._name(signal & ~_OUTBOUND)
            elif KINDS[kind] == "ignored" and " " in words:
                words, _, name = words.partition(" ")
                direction = Direction.INBOUND
            way = None if name is None else direction
            # Damaged memory may contain a number that JSON does not allow.
            lasted = seconds if KINDS[kind] == "link" and 0 <= seconds < math.inf else 0.0
            yield Note(KINDS[kind], wall, first, last, count, way, name, state, words, lasted)

    def _raw_notes(self, first: int = 0) -> Iterator[tuple[Any, ...]]:
        for number in range(max(first, self._noted - self._events_kept), self._noted):
            yield _EVENT.unpack_from(self._events, number % (self._events_kept + 1) * _EVENT.size)
