"""What was read from the kernel and is not finished yet, in memory that outlives the process.

The kernel forgets a frame or an inotify event once it is read. A process that is killed between reading and acting
would lose it, so reads go straight into this memory (a memfd that a supervisor holds, see `held`), and a part of it is
blanked only when everything in it has been acted upon. A successor that inherits the memory finds in it what was in
flight, and does it again: at least once.

Why that is enough: recv(2) and read(2) copy before they return, and a fatal signal does not interrupt the copying, so
that what left the kernel's queue stands here whole. Frames and inotify events delimit themselves in blank memory; no
length has to be noted, and so there is no instant in which one is missing. Blank are zeros, and between the frames of a
bank a mark that no frame can contain but by guessing 8 bytes: only a frame that is longer than its step overwrites it.

Layout: a header page; two banks of frames; two banks of inotify events; two tables of numbers by key; a queue of
inotify events, where a process has many boards, see `registers.share`; a history, see `keep.history`.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Iterator

import attrs

from inco_trio.frame import FRAME_MAX
from inco_trio.linux.inotify import EVENT, IN_Q_OVERFLOW, pack_event

__all__ = [
    "FRAMES",
    "FRAME_MAX",
    "FRAME_STEP",
    "KEY",
    "PAGE",
    "RING",
    "SHORT",
    "TABLE",
    "Bank",
    "EventQueue",
    "Inflight",
    "NumberTable",
    "frames_in",
]

MAGIC = b"inco-trio inflight 4, batches of %6d frames\n"
PAGE = 4096
MARK = 8
"""Bytes of the mark behind each frame."""
FRAME_STEP = 128
"""Bytes from one frame of a bank to the next: few, to stay cached."""
SHORT = FRAME_STEP - MARK
"""Bytes of the longest frame that has others behind it: more than 18 + 64, the longest of ours."""
FRAMES = 256
"""Frames of one batch, at most: enough to make the cost of a hand-over small."""
EVENT_BANK = 4 * PAGE
"""Bytes of inotify events of one batch: 1024 events without a name."""
KEY = 64
RECORD = KEY + 8
RECORDS = 65536
"""Entries of a table; untouched ones take no memory."""
TABLE = -(-RECORD * RECORDS // PAGE) * PAGE
RING = 192 * PAGE
"""Bytes of the ring of a history."""
QUEUE = 256 * PAGE
"""Bytes of queued inotify events: four times the 16,384 that the kernel queues by default."""


def _bank_of(frames: int) -> int:
    """Bytes of a bank for so many frames, in whole pages."""
    return -(-(FRAME_STEP * (frames - 1) + FRAME_MAX) // PAGE) * PAGE


FRAME_BANK = _bank_of(FRAMES)
HISTORY = PAGE + 2 * TABLE + RING
SIZE_BEFORE = PAGE + 2 * FRAME_BANK + 2 * EVENT_BANK + 2 * TABLE + PAGE + QUEUE
"""Bytes of a memory that was made before there was a history."""
SIZE = SIZE_BEFORE + HISTORY
OVERFLOW = pack_event(-1, IN_Q_OVERFLOW)
_BLANKEVENTS = bytes(EVENT_BANK)
_MARK = os.urandom(MARK)
"""That of the memories that this process makes."""


@functools.cache
def _blank_frames(mark: bytes, frames: int) -> bytes:
    """A bank of frames in which there are none."""
    return (bytes(SHORT) + mark) * (_bank_of(frames) // FRAME_STEP)


class Bank:
    """A part of the memory that one batch is read into: free, or holding what is in flight."""

    def __init__(self, view: memoryview, sequence: memoryview, blank: bytes) -> None:
        self.view = view
        self._sequence = sequence
        self.blank = blank
        """What stands in it where nothing was read to."""

    @property
    def sequence(self) -> int:
        """The order in which the banks were filled; the lower one is older."""
        return int.from_bytes(self._sequence, "little")

    def begin(self, sequence: int) -> None:
        """Note, before the first read, that this bank is filled as number `sequence`."""
        self._sequence[:] = sequence.to_bytes(8, "little")

    def clear(self, length: int) -> None:
        """Forget the first `length` bytes: all that was read into them is finished."""
        self.view[:length] = self.blank[:length]


class NumberTable:
    """Numbers (1 or more) by key (1 to 64 bytes, no trailing NUL), in shared memory; a missing key is 0."""

    def __init__(self, view: memoryview) -> None:
        self._keys = view
        self._numbers = view[RECORDS * KEY : RECORDS * RECORD].cast("Q")
        self.places: dict[bytes, int] = {}
        """Where the number of each key stands that is not 0."""
        self._free: list[int] = []
        self._end = 0
        # Entries are made without gaps, so the first empty key ends the table.
        while self._end < RECORDS and (key := self._key(self._end)):
            if self._numbers[self._end]:
                self.places[key] = self._end
            else:
                self._free.append(self._end)
            self._end += 1

    def _key(self, index: int) -> bytes:
        return bytes(self._keys[index * KEY : (index + 1) * KEY]).rstrip(b"\0")

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self.places))

    def __getitem__(self, key: bytes) -> int:
        index = self.places.get(key)
        return 0 if index is None else self._numbers[index]

    def __setitem__(self, key: bytes, number: int) -> None:
        index = self.places.get(key)
        if index is None:
            if not number:
                return
            if self._free:
                index = self._free.pop()
            else:
                index, self._end = self._end, self._end + 1
            # The key first: while its number is 0 the entry does not count.
            self._keys[index * KEY : (index + 1) * KEY] = key.ljust(KEY, b"\0")
            self.places[key] = index
        self._numbers[index] = number
        if not number:
            del self.places[key]
            self._free.append(index)


class EventQueue:
    """A queue of whole inotify events in shared memory: its two ends stand in the first page, then it goes round."""

    def __init__(self, view: memoryview) -> None:
        self._ends = view[:16].cast("Q")
        self._room = view[PAGE:]
        self._overflowed = False
        if not len(self):
            self._begin_again()

    def _begin_again(self) -> None:
        # This end first: less than none is none, if it is the last thing that a process does.
        self._ends[1] = 0
        self._ends[0] = 0

    def __len__(self) -> int:
        """The bytes that are queued."""
        return max(0, self._ends[1] - self._ends[0])

    def copy(self) -> bytes:
        """All that is queued; no page is touched besides, as each would be memory."""
        place, length = self._ends[0] % len(self._room), len(self)
        behind = bytes(self._room[place : place + length])
        return behind + bytes(self._room[: length - len(behind)])

    def append(self, events: bytes) -> None:
        """Queue some events; where there is no room for them, that of an overflow instead, as the kernel does."""
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
        # Last of all, so that who is killed before has queued nothing.
        self._ends[1] = end + len(events)

    def finish_alone(self, act: Callable[[memoryview, int], bool]) -> int:
        """Have `act` do all that is queued where it stands; returns its bytes, or 0 if it did not."""
        length = len(self)
        if not length or self._ends[1] > len(self._room) or not act(self._room[self._ends[0] :], length):
            return 0
        self._begin_again()
        return length

    def read_into(self, buffer: memoryview) -> int:
        """Move queued events into `buffer`, as many as fit whole; returns their bytes."""
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
            self._begin_again()  # So that few pages are ever used.
        else:
            self._ends[0] = start + length
        return length


@attrs.define
class Inflight:
    """The memory: `frames` and `events` are two banks each, `owed` and `watches` the tables."""

    fd: int
    frames: tuple[Bank, Bank]
    events: tuple[Bank, Bank]
    owed: NumberTable
    """By wire name: notifications whose state register could not be written yet."""
    watches: NumberTable
    """By the key of a trigger: its watch descriptor."""
    queue: EventQueue
    """Events that one descriptor for many boards has brought, and that are not read yet."""
    history: memoryview
    """For `keep.history`: a page, two tables and a ring."""
    note: memoryview
    """16 bytes for the link, see `links.unix`."""
    at_once: int
    """The most frames of one batch."""
    inherited: bool
    _map: mmap.mmap

    @classmethod
    def open(cls, held: int | None = None, at_once: int = FRAMES) -> Inflight:
        """Map the inherited descriptor `held` if it is such a memory of this version, else make a new one.

        Of banks for less than FRAMES frames `at_once`, the rest is never touched, and takes no memory. Raises OSError
        (memfd_create(2), mmap(2)).
        """
        magic = MAGIC % at_once
        size = 0 if held is None else os.fstat(held).st_size
        inherited = held is not None and size in (SIZE, SIZE_BEFORE) and os.pread(held, len(magic), 0) == magic
        if held is not None and inherited:
            fd = held
            os.ftruncate(fd, SIZE)
        else:
            fd = os.memfd_create("inco-trio", os.MFD_CLOEXEC)
            os.ftruncate(fd, SIZE)
            os.pwrite(fd, magic + _MARK, 0)
            if held is not None:
                # Only now, so that the new one has another number and its holder is told.
                os.close(held)
        try:
            memory = mmap.mmap(fd, SIZE)
        except BaseException:
            os.close(fd)
            raise
        view = memoryview(memory)
        blank = _blank_frames(bytes(view[len(magic) : len(magic) + MARK]), at_once)
        banks = []
        offset = PAGE
        for number, (empty, size) in enumerate(2 * [(blank, FRAME_BANK)] + 2 * [(_BLANKEVENTS, EVENT_BANK)]):
            sequence = view[PAGE - 32 + 8 * number : PAGE - 24 + 8 * number]
            banks.append(Bank(view[offset : offset + len(empty)], sequence, empty))
            offset += size
        if not inherited:
            for bank in banks[:2]:
                bank.clear(len(bank.view))
        owed = NumberTable(view[offset : offset + TABLE])
        watches = NumberTable(view[offset + TABLE : offset + 2 * TABLE])
        queue = EventQueue(view[offset + 2 * TABLE : SIZE_BEFORE])
        note = view[PAGE - 48 : PAGE - 32]
        frames, events = (banks[0], banks[1]), (banks[2], banks[3])
        history = view[SIZE_BEFORE:]
        return cls(fd, frames, events, owed, watches, queue, history, note, at_once, inherited, memory)

    def close(self) -> None:
        """Close this process's descriptor; the memory lives on if somebody else holds one."""
        os.close(self.fd)
        # The map itself goes with its last view: closing it now would raise BufferError.


def frames_in(bank: Bank) -> list[bytes]:
    """The frames that stand in a bank, NUL padding stripped, in the order of their arrival."""
    if bytes(bank.view) == bank.blank:
        return []  # As a rule, and with many boards at a start it matters.
    frames, mark = [], bank.blank[SHORT:FRAME_STEP]
    for start in range(0, len(bank.view) - FRAME_MAX + 1, FRAME_STEP):
        step = bytes(bank.view[start : start + FRAME_STEP])
        if not step.endswith(mark):
            frames.append(_long_frame(bytes(bank.view[start : start + FRAME_MAX]), bank.blank))
            break
        if frame := step[:SHORT].rstrip(b"\0"):
            frames.append(frame)
    return frames


def _long_frame(room: bytes, blank: bytes) -> bytes:
    """The frame at the beginning of `room`: up to where all is blank again."""
    length = len(room)
    while room[length - 1] == blank[length - 1]:
        length -= 1
    return room[:length].rstrip(b"\0")
