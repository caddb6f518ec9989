"""A queue of inotify events in shared memory."""

from __future__ import annotations

from collections.abc import Callable

from inco_trio.linux.inotify import EVENT, IN_Q_OVERFLOW, PADDED_MAX, pack_event
from inco_trio.persist.tables import PAGE

__all__ = ["LOST", "LOST_WATCH", "OVERFLOW", "EventQueue"]

OVERFLOW = pack_event(-1, IN_Q_OVERFLOW)
LOST_WATCH = 0
"""The watch descriptor in `LOST`. The kernel never uses it: it numbers watches from 1 and reports overflows with -1."""
LOST = pack_event(LOST_WATCH, IN_Q_OVERFLOW)
"""An event for the unfinished events of a lost inotify descriptor. Like an overflow, it goes to all boards."""
POSITION_MAX = 1 << 62
"""Maximum position in valid memory. A position is the number of bytes since the queue was last empty."""


class EventQueue:
    """A ring buffer of inotify events. The first page contains the positions of the start and the end of the queue.

    Raises ValueError if the memory is invalid or contains an invalid event.
    """

    def __init__(self, view: memoryview) -> None:
        self._ends = view[:16].cast("Q")
        self._room = view[PAGE:]
        self._overflowed = False
        if max(self._ends[0], self._ends[1]) > POSITION_MAX:
            raise ValueError("the event queue has invalid positions")
        if len(self):
            self._check()
        else:
            self._begin_again()

    def _check(self) -> None:
        if len(self) > len(self._room):
            raise ValueError("the event queue has invalid positions")
        events, offset, longest = self.copy(), 0, 0
        while offset + EVENT.size <= len(events):
            _wd, mask, _cookie, length = EVENT.unpack_from(events, offset)
            offset += EVENT.size + length
            longest = max(longest, length)
            if not mask:
                break
        if offset != len(events):
            raise ValueError("the event queue contains an incomplete event")
        if longest > PADDED_MAX:  # `read_into` could wait forever for a buffer in which the event fits.
            raise ValueError("the event queue contains an event with too long a name")

    def _begin_again(self) -> None:
        # Reset the end first: if the process dies between the two stores, the negative length reads as empty.
        self._ends[1] = 0
        self._ends[0] = 0

    def clear(self) -> None:
        """Remove all events."""
        self._begin_again()

    def __len__(self) -> int:
        """Return the number of queued bytes."""
        return max(0, self._ends[1] - self._ends[0])

    def copy(self) -> bytes:
        """Return a copy of the queued events. Do not read unused pages, because reading them would allocate memory."""
        place, length = self._ends[0] % len(self._room), len(self)
        behind = bytes(self._room[place : place + length])
        return behind + bytes(self._room[: length - len(behind)])

    def append(self, events: bytes) -> None:
        """Queue events. If the queue is full, queue an overflow event instead, as the kernel does."""
        room = len(self._room) - len(self)
        if len(events) + len(OVERFLOW) <= room:
            self._overflowed = False
            self._put(events)
        elif not self._overflowed and len(OVERFLOW) <= room:
            self._overflowed = True
            self._put(OVERFLOW)

    def _put(self, events: bytes) -> None:
        end, size = self._ends[1], len(self._room)
        place = end % size
        first = min(len(events), size - place)
        self._room[place : place + first] = events[:first]
        self._room[: len(events) - first] = events[first:]
        # Move the end last: if the process is killed before this line, the queue is unchanged.
        self._ends[1] = end + len(events)

    def finish_alone(self, act: Callable[[memoryview, int], bool]) -> int:
        """Call `act` with the queued events. If it returns True, empty the queue. Return the number of bytes freed."""
        length = len(self)
        if not length or self._ends[1] > len(self._room) or not act(self._room[self._ends[0] :], length):
            return 0
        self._begin_again()
        return length

    def read_into(self, buffer: memoryview) -> int:
        """Move as many whole events as fit into `buffer`. Return the number of bytes moved."""
        start, size = self._ends[0], len(self._room)
        available = min(len(self), len(buffer))
        place = start % size
        first = min(available, size - place)
        buffer[:first] = self._room[place : place + first]
        buffer[first:available] = self._room[: available - first]
        length = available
        if available < len(self):
            length = 0
            while length + EVENT.size <= available:
                following = length + EVENT.size + EVENT.unpack_from(buffer, length)[3]
                if following > available:
                    break
                length = following
            buffer[length:available] = bytes(available - length)
        if length == len(self):
            self._begin_again()  # The ring is empty: restart at its beginning to use fewer pages of memory.
        else:
            self._ends[0] = start + length
        return length
