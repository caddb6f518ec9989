"""The history: delivered and sent notifications that a client, such as the gateway, has not acknowledged yet.

It is in the in-flight buffer (`inflight`), so it survives the end of the client and of the process. It stores nothing
until a client asks for it. The ring has room for `KEPT` notifications. Older ones are merged: for each signal, only
their number remains.

Layout: a page of numbers, a table of merged notifications for each direction, and the ring. A number is written after
what it stands for: a process that dies in between stored a notification twice, or not yet.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence

import attrs

from inco_trio.persist.inflight import RING
from inco_trio.persist.tables import PAGE, TABLE, NumberTable
from inco_trio.signals import Direction, Signal

__all__ = ["KEPT", "History", "Merged", "Record"]

_RECORD = struct.Struct("=QQB7x64s8x")
"""A notification: wall clock and CLOCK_MONOTONIC in ns, the direction, and the wire name."""
KEPT = RING // _RECORD.size
"""Notifications that the ring has room for."""
_DIRECTIONS = (Direction.INBOUND, Direction.OUTBOUND)
_KEEPING, _BOOT, _BASE, _SEQUENCE, _ACKNOWLEDGED, _MERGED_TO, _MERGED = range(7)
"""Indexes of the numbers in the first page."""


@attrs.frozen
class Record:
    """A notification in the ring."""

    sequence: int
    """Its number in the history, from 1."""
    direction: Direction
    name: str
    time_ns: int
    """time.time_ns() at that time."""
    monotonic_ns: int
    """time.monotonic_ns() at that time."""


@attrs.frozen
class Merged:
    """Merged notifications of one signal: only their number is known."""

    direction: Direction
    name: str
    count: int


class History:
    """The history in `view`, see `Inflight.history`."""

    def __init__(self, view: memoryview) -> None:
        self._numbers = view[:PAGE].cast("Q")
        self._merged = tuple(NumberTable(view[PAGE + n * TABLE : PAGE + (n + 1) * TABLE]) for n in range(2))
        self._ring = view[PAGE + 2 * TABLE :]
        self.keeping = bool(self._numbers[_KEEPING])
        """Whether a client has asked for the history."""

    @property
    def boot(self) -> str:
        """A random name of the numbering, in hexadecimal: a history that starts over has another one."""
        return f"{self._numbers[_BOOT]:016x}"

    @property
    def sequence(self) -> int:
        """The number of the last notification."""
        return self._numbers[_SEQUENCE]

    @property
    def acknowledged(self) -> int:
        """The number of the last acknowledged notification."""
        return self._numbers[_ACKNOWLEDGED]

    @property
    def floor(self) -> int:
        """All notifications up to this number are acknowledged or merged."""
        return max(self._numbers[_ACKNOWLEDGED], self._numbers[_MERGED_TO])

    @property
    def merged_to(self) -> int:
        """The number of the last merged notification."""
        return self._numbers[_MERGED_TO]

    @property
    def waiting(self) -> int:
        """Notifications that are not acknowledged, merged ones included."""
        return self.sequence - self.floor + sum(merged.count for merged in self.merged())

    @property
    def merged_ever(self) -> int:
        """Notifications that were merged since the history began."""
        return self._numbers[_MERGED]

    def begin(self, sequence: int) -> None:
        """Keep what is carried after notification number `sequence`, if nothing is kept yet."""
        if self.keeping:
            return
        self._numbers[_BOOT] = int.from_bytes(os.urandom(8), "little")
        for place in (_BASE, _SEQUENCE, _ACKNOWLEDGED):
            self._numbers[place] = sequence
        self._numbers[_MERGED_TO] = self._numbers[_MERGED] = 0
        self._numbers[_KEEPING] = self.keeping = True

    def end(self) -> None:
        """Forget everything, and store nothing from now on."""
        self._numbers[_KEEPING] = self.keeping = False
        for table in self._merged:
            for name in table:
                table[name] = 0

    def append(self, signals: Sequence[Signal]) -> None:
        """Store notifications that were delivered or sent just now."""
        numbers, ring = self._numbers, self._ring
        wall, monotonic = time.time_ns(), time.monotonic_ns()
        sequence, floor = numbers[_SEQUENCE], self.floor
        if sequence == floor:
            numbers[_BASE] = sequence  # Starting again uses few pages.
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
        """Merge the oldest notification; return its number."""
        record = self._at(sequence)
        table, name = self._merged[record.direction is Direction.OUTBOUND], record.name.encode("ascii")
        table[name] += 1
        self._numbers[_MERGED_TO] = sequence
        self._numbers[_MERGED] += 1
        return sequence

    def _at(self, sequence: int) -> Record:
        place = (sequence - self._numbers[_BASE] - 1) % KEPT
        wall, monotonic, outbound, name = _RECORD.unpack_from(self._ring, place * _RECORD.size)
        return Record(sequence, _DIRECTIONS[outbound], name.rstrip(b"\0").decode("ascii"), wall, monotonic)

    def after(self, sequence: int, most: int) -> list[Record]:
        """Return up to `most` notifications of the ring after number `sequence`."""
        first = max(sequence, self.floor) + 1
        return [self._at(number) for number in range(first, min(self.sequence, first + most - 1) + 1)]

    def merged(self) -> Iterator[Merged]:
        """Yield what is merged and not acknowledged; all of it is older than the ring."""
        for direction, table in zip(_DIRECTIONS, self._merged, strict=True):
            for name in table:
                yield Merged(direction, name.decode("ascii"), table[name])

    def acknowledge(self, sequence: int, merged: Sequence[Merged] = ()) -> None:
        """Forget all notifications up to number `sequence`, and the given merged ones."""
        for each in merged:
            table, name = self._merged[each.direction is Direction.OUTBOUND], each.name.encode("ascii")
            table[name] = max(0, table[name] - each.count)
        self._numbers[_ACKNOWLEDGED] = max(self.acknowledged, min(sequence, self.sequence))
