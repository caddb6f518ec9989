"""The in-flight buffer: data read from the kernel but not processed yet, in a memfd that outlives the process.

The kernel forgets a frame or an inotify event once it has been read. If the process died before it had processed the
data, the notification would be lost. The proxy therefore reads into this memory, which the fd store keeps (see
`fdstore`), and blanks it only after processing the data. The next process repeats unfinished work, so each notification
is delivered at least once.

recv(2) and read(2) copy the data before they return, and a fatal signal does not interrupt the copy. All data that has
left the kernel's queue is therefore complete in this memory. The proxy stores no length, because it could die before
storing it. Unused memory is blank (zeros), which shows where the data ends. Each slot for a frame ends with 8 random
bytes (the mark). Only a frame that is too long for a slot overwrites the mark.

Layout: a header page; room for two batches of frames and two batches of inotify events; two tables (`tables`); a queue
of events for processes with many boards (`queue`, `proxy.share`); a history (`followed`); the flight recorder
(`recorder`).
"""

from __future__ import annotations

import functools
import logging
import os

import attrs

from inco_trio import real_clock
from inco_trio.frame import FRAME_MAX, is_wire_name
from inco_trio.linux.inotify import EVENT, PADDED_MAX, parse_events
from inco_trio.persist.followed import HISTORY, History
from inco_trio.persist.memory import check_memory, map_memory, new_memory
from inco_trio.persist.queue import LOST, EventQueue
from inco_trio.persist.recorder import AREA
from inco_trio.persist.tables import PAGE, TABLE, NumberTable

__all__ = [
    "FRAMES",
    "FRAME_MAX",
    "FRAME_STEP",
    "LAST_EVENTS",
    "PENDING",
    "SHORT",
    "UNREAD_EVENTS",
    "UNREAD_FRAMES",
    "Bank",
    "Inflight",
    "frames_in",
]

logger = logging.getLogger(__name__)

MAGIC = b"inco-trio inflight 5, batches of %6d frames\n"
MARK = 8
"""Size of the mark at the end of each slot, in bytes."""
FRAME_STEP = 128
"""Size in bytes of the slot for one frame, small enough that all slots of a batch fit into the CPU cache."""
SHORT = FRAME_STEP - MARK
"""Size in bytes of the longest frame that fits into one slot. inco-trio's own frames are at most 82 bytes long."""
FRAMES = 256
"""Maximum number of frames in a batch. Large batches reduce the cost of handing frames to another task."""
EVENT_BANK = 4 * PAGE
"""Size in bytes of the memory for a batch of inotify events. It has room for 1,024 events without a name."""
LAST_EVENTS = EVENT_BANK - EVENT.size - PADDED_MAX
"""After a read of at most this number of bytes, the queue was empty: even the largest event would have fitted."""
SEQUENCE_MAX = 1 << 62
"""Maximum sequence number of a batch. A higher number means that the memory is corrupt."""
WATCH_MAX = (1 << 31) - 1
"""Maximum value of a watch descriptor, which the kernel stores as an int."""
PENDING_MAX = 1 << 40
"""Maximum number of pending notifications per signal: at 50,000 per second, it is reached after eight months."""
PENDING, UNREAD_FRAMES, UNREAD_EVENTS = range(3)
"""Indexes in `Inflight.times`: when the oldest notification in `Inflight.pending` became pending; since when the
kernel's queue of frames or of inotify events has not been read, or 0 if a process has been reading it."""
QUEUE = 256 * PAGE
"""Size of the event queue in bytes: four times the 16,384 events that the kernel queues by default."""


def _bank_of(frames: int) -> int:
    """Return the size in bytes of the memory for a batch of frames, rounded up to whole pages."""
    return -(-(FRAME_STEP * (frames - 1) + FRAME_MAX) // PAGE) * PAGE


FRAME_BANK = _bank_of(FRAMES)
BEFORE_HISTORY = PAGE + 2 * FRAME_BANK + 2 * EVENT_BANK + 2 * TABLE + PAGE + QUEUE
BEFORE_RECORDER = BEFORE_HISTORY + HISTORY
SIZE = BEFORE_RECORDER + AREA
_NO_EVENTS = bytes(EVENT_BANK)
_MARK = bytes(0x80 | byte for byte in os.urandom(MARK))
"""The random bytes at the end of each empty slot in memory that this process creates.

None of them is an ASCII character. The end of a long frame is its last byte that differs from the mark. A frame that
ends with ASCII text is therefore never truncated.
"""


@functools.cache
def _no_frames(mark: bytes, frames: int) -> bytes:
    """Return the content of unused memory for a batch of frames."""
    return (bytes(SHORT) + mark) * (_bank_of(frames) // FRAME_STEP)


class Bank:
    """Memory for one batch of frames or events. Its content is `blank` while it is unused."""

    def __init__(self, view: memoryview, sequence: memoryview, since: memoryview, blank: bytes) -> None:
        self.view = view
        self._sequence = sequence
        self._since = since
        self.blank = blank
        """The content of the memory while it is unused."""

    @property
    def sequence(self) -> int:
        """The sequence number of the batch. Batches are numbered in the order in which they were read."""
        return int.from_bytes(self._sequence, "little")

    @property
    def pending_since(self) -> int:
        """When the notifications of the batch became pending if this was reported, or 0; see `Listener.carried`."""
        now = real_clock.monotonic_ns()
        return max(-now, min(int.from_bytes(self._since, "little", signed=True), now))

    @pending_since.setter
    def pending_since(self, time_ns: int) -> None:
        self._since[:] = time_ns.to_bytes(8, "little", signed=True)

    def begin(self, sequence: int) -> None:
        """Store the sequence number of the next batch. Call this method before reading the batch."""
        self._sequence[:] = sequence.to_bytes(8, "little")

    def clear(self, length: int) -> None:
        """Overwrite the first `length` bytes with `blank`, because their content has been processed."""
        self.view[:length] = self.blank[:length]


@attrs.define(eq=False, repr=False)
class Inflight:
    """The in-flight buffer of one proxy."""

    fd: int
    frames: tuple[Bank, Bank]
    events: tuple[Bank, Bank]
    pending: NumberTable
    """The number of pending inbound notifications per signal, keyed by wire name."""
    watches: NumberTable
    """Watch descriptors, keyed by the watched path (see `registers.directory.watch_key`), or by `Trigger.made_key`."""
    queue: EventQueue
    """Unread events of an inotify descriptor that several boards share."""
    history: memoryview
    """The memory that holds the history: a page, two tables and a ring (see `persist.followed`)."""
    recorder: memoryview
    """The memory of the flight recorder (see `persist.recorder`)."""
    note: memoryview
    """16 bytes for use by the link (see `links.unix`)."""
    times: memoryview
    """Times (real_clock.monotonic_ns()) at the indexes PENDING, UNREAD_FRAMES and UNREAD_EVENTS; 0 if unknown."""
    at_once: int
    """Maximum number of frames in a batch."""
    inherited: bool

    @classmethod
    def open(cls, held: int | None = None, at_once: int = FRAMES) -> Inflight:
        """Map the inherited descriptor `held` if its memory is valid. Otherwise log the reason and map new memory.

        `at_once` is the maximum number of frames in a batch. If it is less than FRAMES, the buffer uses less memory.
        Raises OSError (memfd_create(2), mmap(2)).
        """
        magic = MAGIC % at_once
        if held is not None:
            try:
                check_memory(held, SIZE, magic)
                return cls._map_memory(held, at_once, inherited=True)
            except ValueError as error:
                logger.warning(
                    "in-flight buffer: cannot use the stored memory (%s): starting with an empty buffer; "
                    "notifications in the stored memory are lost", error
                )  # fmt: skip
        fd = new_memory("inco-trio", SIZE, magic + _MARK)
        if held is not None:
            # Close `held` last, so that the new descriptor gets a different number: callers compare the numbers.
            os.close(held)
        return cls._map_memory(fd, at_once, inherited=False)

    @classmethod
    def _map_memory(cls, fd: int, at_once: int, *, inherited: bool) -> Inflight:
        """Map the memory. Raises ValueError if the content is invalid, or OSError after closing `fd`."""
        try:
            view = map_memory(fd, SIZE)
        except BaseException:
            os.close(fd)
            raise
        mark = len(MAGIC % at_once)
        no_frames = _no_frames(bytes(view[mark : mark + MARK]), at_once)
        banks = []
        offset = PAGE
        for number, (blank, size) in enumerate(2 * [(no_frames, FRAME_BANK)] + 2 * [(_NO_EVENTS, EVENT_BANK)]):
            sequence = view[PAGE - 32 + 8 * number : PAGE - 24 + 8 * number]
            since = view[PAGE - 80 + 8 * number : PAGE - 72 + 8 * number]
            banks.append(Bank(view[offset : offset + len(blank)], sequence, since, blank))
            offset += size
        if not inherited:
            for bank in banks[:2]:
                bank.clear(len(bank.view))
        elif max(bank.sequence for bank in banks) > SEQUENCE_MAX:
            raise ValueError("a batch has an invalid sequence number")
        history = view[BEFORE_HISTORY:BEFORE_RECORDER]
        if inherited:
            History(history).check()
        return cls(
            fd,
            frames=(banks[0], banks[1]),
            events=(banks[2], banks[3]),
            pending=NumberTable(view[offset : offset + TABLE], PENDING_MAX, is_wire_name),
            watches=NumberTable(view[offset + TABLE : offset + 2 * TABLE], WATCH_MAX),
            queue=EventQueue(view[offset + 2 * TABLE : BEFORE_HISTORY]),
            history=history,
            recorder=view[BEFORE_RECORDER:],
            note=view[PAGE - 48 : PAGE - 32],
            times=view[PAGE - 104 : PAGE - 80].cast("Q"),
            at_once=at_once,
            inherited=inherited,
        )

    def forget_watches(self) -> None:
        """Forget the watches of a lost inotify descriptor: in a new one, the same numbers stand for other files.

        Replace unfinished events of these watches by `LOST`, so that each trigger is sent at least once.
        """
        first, second = self.events
        times = [abs(bank.pending_since) for bank in self.events if bank.pending_since and parse_events(bank.view)]
        # It is unknown which of the triggers were pending.
        first.pending_since = -min(times, default=0)
        if len(self.queue) or any(parse_events(bank.view) for bank in self.events):
            first.view[:] = LOST + first.blank[len(LOST) :]
            second.clear(len(second.view))
            self.queue.clear()
        for key in self.watches:
            self.watches[key] = 0

    def close(self) -> None:
        """Close the descriptor. The memory persists as long as another process holds a descriptor for it."""
        os.close(self.fd)


def frames_in(bank: Bank) -> list[bytes]:
    """Return the frames of a batch in the in-flight buffer, without NUL padding, in order of arrival."""
    if bytes(bank.view) == bank.blank:
        return []  # Usually there are no frames. Skipping the scan saves time when many boards start.
    frames, mark = [], bank.blank[SHORT:FRAME_STEP]
    for start in range(0, len(bank.view) - FRAME_MAX + 1, FRAME_STEP):
        step = bytes(bank.view[start : start + FRAME_STEP])
        if not step.endswith(mark):
            frames.append(_long_frame(bytes(bank.view[start : start + FRAME_MAX]), bank.blank))
            break
        frames.append(step[:SHORT].rstrip(b"\0"))
    return [*filter(None, frames)]


def _long_frame(room: bytes, blank: bytes) -> bytes:
    """Return the frame at the beginning of `room`. After the frame, all bytes equal those of `blank`."""
    length = len(room)
    while room[length - 1] == blank[length - 1]:
        length -= 1
    return room[:length].rstrip(b"\0")
