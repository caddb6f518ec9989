"""The history: delivered and sent notifications that a client, such as the gateway, has not acknowledged yet.

The history is part of the in-flight buffer (`inflight`), so it survives when the client or the proxy process ends. It
is empty until a client asks for it. A ring stores the newest `KEPT` notifications. Older notifications are merged: only
their number remains for each signal.

Layout: a page of numbers, a table of merged notifications for each direction, and the ring. Each number is updated
after the data that it counts. If the process dies in between, one notification is missing or is counted twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from inco_trio.frame import is_wire_name
from inco_trio.persist.tables import PAGE, TABLE, NumberTable
from inco_trio.signals import Direction, Signal

__all__ = ["HISTORY", "KEPT", "History", "Merged", "Record"]

_RECORD = struct.Struct("=QQB7x64s8x")
"""Layout of a notification: wall-clock and CLOCK_MONOTONIC time in ns, direction, and wire name."""
RING = 192 * PAGE
"""Size of the ring in bytes."""
HISTORY = PAGE + 2 * TABLE + RING
"""Total size of a history in bytes."""
KEPT = RING // _RECORD.size
"""Number of notifications that fit into the ring."""
_DIRECTIONS = (Direction.INBOUND, Direction.OUTBOUND)
_KEEPING, _BOOT, _BASE, _SEQUENCE, _ACKNOWLEDGED, _MERGED_TO, _MERGED = range(7)
"""Indexes of the 64-bit numbers in the first page of the memory."""
NUMBER_MAX = 1 << 62
"""Maximum stored number. A larger number means that the memory is corrupt."""


class Record(NamedTuple):
    """A notification in the ring."""

    sequence: int
    """The sequence number of the notification."""
    direction: Direction
    name: str
    time_ns: int
    """When the notification was delivered or sent (real_clock.time_ns())."""
    monotonic_ns: int
    """The same time on the monotonic clock (real_clock.monotonic_ns())."""


class Merged:
    """The number of merged notifications for one signal."""

    def __init__(self, direction: Direction, name: str, count: int) -> None:
        self.direction = direction
        self.name = name
        self.count = count


class History:
    """A history stored in the memory `view`. Raises ValueError if a table in the memory is invalid."""

    def __init__(self, view: memoryview) -> None:
        self._numbers = view[:PAGE].cast("Q")
        tables = (view[PAGE + n * TABLE : PAGE + (n + 1) * TABLE] for n in range(2))
        self._merged = tuple(NumberTable(table, NUMBER_MAX, is_wire_name) for table in tables)
        self._ring = view[PAGE + 2 * TABLE :]
        self.keeping = bool(self._numbers[_KEEPING])
        """Whether a client has asked for the history."""

    def check(self) -> None:
        """Check the numbers and the notifications in inherited memory. Raises ValueError with the reason."""
        if not self.keeping:
            return
        sequence, floor = self.sequence, self.floor
        if (
            not self._numbers[_BASE] <= floor <= sequence <= floor + KEPT
            or max(sequence, self.merged_ever, self.waiting) > NUMBER_MAX
            # If the process died while it merged a notification, the table already contains its signal.
            or sum(map(len, self._merged)) > floor + 1
        ):
            raise ValueError("the history contains invalid numbers")
        for number in range(floor + 1, sequence + 1):
            wall, monotonic, direction, name = self._record(number)
            if max(wall, monotonic) > NUMBER_MAX or direction >= len(_DIRECTIONS) or not is_wire_name(name):
                raise ValueError("the history contains an invalid notification")

    @property
    def boot(self) -> str:
        """A random identifier of the history. It changes when the history ends and a new one begins."""
        return f"{self._numbers[_BOOT]:016x}"

    @property
    def sequence(self) -> int:
        """The sequence number of the last notification."""
        return self._numbers[_SEQUENCE]

    @property
    def acknowledged(self) -> int:
        """The sequence number of the last acknowledged notification."""
        return self._numbers[_ACKNOWLEDGED]

    @property
    def floor(self) -> int:
        """The sequence number up to which all notifications have been acknowledged or merged."""
        return max(self._numbers[_ACKNOWLEDGED], self._numbers[_MERGED_TO])

    @property
    def merged_to(self) -> int:
        """The sequence number of the last merged notification."""
        return self._numbers[_MERGED_TO]

    @property
    def waiting(self) -> int:
        """The number of unacknowledged notifications, including merged ones."""
        return self.sequence - self.floor + sum(merged.count for merged in self.merged())

    @property
    def merged_ever(self) -> int:
        """The number of notifications that have been merged since the history began."""
        return self._numbers[_MERGED]

    def begin(self, sequence: int) -> None:
        """Start storing notifications unless already started. The next one is numbered `sequence` + 1."""
        if self.keeping:
            return
        self._numbers[_BOOT] = int.from_bytes(os.urandom(8), "little")
        for place in (_BASE, _SEQUENCE, _ACKNOWLEDGED):
            self._numbers[place] = sequence
        self._numbers[_MERGED_TO] = self._numbers[_MERGED] = 0
        self._numbers[_KEEPING] = self.keeping = True

    def end(self) -> None:
        """Delete all notifications and stop storing new ones."""
        self._numbers[_KEEPING] = self.keeping = False
        for table in self._merged:
            for name in table:
                table[name] = 0

    def append(self, signals: Sequence[Signal], at: tuple[int, int]) -> None:
        """Store notifications. `at` is the time of delivery or sending on the wall clock and monotonic clock, in ns."""
        numbers, ring = self._numbers, self._ring
        wall, monotonic = at
        sequence, floor = numbers[_SEQUENCE], self.floor
        if sequence == floor:
            numbers[_BASE] = sequence  # The ring is empty: restart at its beginning to use fewer pages of memory.
        base = numbers[_BASE]
        for signal in signals:
            if sequence - floor == KEPT:
                floor = self._merge(floor + 1)
            _RECORD.pack_into(
                ring,
                (sequence - base) % KEPT * _RECORD.size,
                wall,
                monotonic,
                signal.direction is Direction.OUTBOUND,
                signal.name.encode("ascii"),
            )
            sequence += 1
            numbers[_SEQUENCE] = sequence

    def _merge(self, sequence: int) -> int:
        """Merge the oldest notification, which has the sequence number `sequence`. Return `sequence`."""
        record = self._at(sequence)
        self._merged[record.direction is Direction.OUTBOUND][record.name.encode("ascii")] += 1
        self._numbers[_MERGED_TO] = sequence
        self._numbers[_MERGED] += 1
        return sequence

    def _at(self, sequence: int) -> Record:
        wall, monotonic, outbound, name = self._record(sequence)
        return Record(sequence, _DIRECTIONS[outbound], name.decode("ascii"), wall, monotonic)

    def _record(self, sequence: int) -> tuple[int, int, int, bytes]:
        place = (sequence - self._numbers[_BASE] - 1) % KEPT
        wall, monotonic, direction, name = _RECORD.unpack_from(self._ring, place * _RECORD.size)
        return wall, monotonic, direction, name.rstrip(b"\0")

    def after(self, sequence: int, most: int) -> list[Record]:
        """Return up to `most` notifications from the ring, starting after the sequence number `sequence`."""
        first = max(sequence, self.floor) + 1
        return [self._at(number) for number in range(first, min(self.sequence, first + most - 1) + 1)]

    def merged(self) -> Iterator[Merged]:
        """Yield the unacknowledged merged notifications. They are older than all notifications in the ring."""
        for direction, table in zip(_DIRECTIONS, self._merged, strict=True):
            for name in table:
                yield Merged(direction, name.decode("ascii"), table[name])

    def acknowledge(self, sequence: int, merged: Sequence[Merged] = ()) -> None:
        """Delete all notifications up to the sequence number `sequence`, and the merged notifications in `merged`."""
        for each in merged:
            table, name = self._merged[each.direction is Direction.OUTBOUND], each.name.encode("ascii")
            table[name] = max(0, table[name] - each.count)
        self._numbers[_ACKNOWLEDGED] = max(self.acknowledged, min(sequence, self.sequence))
