"""The inbound direction: read frames from the link and write state files."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import select
import struct
from collections.abc import Sequence

import trio

from inco_trio.counters import Counters
from inco_trio.frame import ADDRESSES, FRAME_MAX, decode
from inco_trio.links.link import Link
from inco_trio.notifications import Deaf, Events, Listener
from inco_trio.persist.inflight import FRAME_STEP, FRAMES, SHORT, Inflight, frames_in
from inco_trio.problems import report
from inco_trio.proxy.flood import Flood
from inco_trio.proxy.handoff import Batch, Handoff
from inco_trio.proxy.supervise import Health
from inco_trio.registers.states import StateFile, StateFiles

__all__ = ["Inbound"]

FORMS = 4
"""Maximum average number of cached frames per signal. A signal's frames may differ in their VLAN tags."""
DRAINED_MAX = 1 << 17
"""Maximum number of frames to read from a link that is being replaced. A receive buffer of 24 MiB holds fewer."""
_SLOT = struct.Struct(f"{ADDRESSES}x{FRAME_STEP - ADDRESSES}s")
"""One slot of the in-flight buffer. The bytes after the MAC addresses are the key of the cache `StateFiles.by_frame`. A
frame that is too long for a slot overwrites the mark at the end of the slot, so its key is never in the cache."""

logger = logging.getLogger(__name__)


class Inbound:
    """Reads frames into the in-flight buffer and writes the state files of their signals."""

    def __init__(
        self,
        handoff: Handoff[StateFile],
        link: Link,
        states: StateFiles,
        inflight: Inflight,
        counters: Counters,
        events: Events | None = None,
    ) -> None:
        self._handoff = handoff
        self._link = link
        self._states = states
        self._inflight = inflight
        self._counters = counters
        self._events: Events | Deaf = events or Deaf()
        self._listener: Listener = Deaf() if events is None else events.listener
        self._flood = Flood(link)
        self.filter = self._flood.filter
        """The task that reports a flood of ignored frames and lifts the kernel's filter afterwards."""
        self._at_once = inflight.at_once
        self._lone_room = inflight.frames[0].view[:FRAME_MAX]
        self._lone_key = self._lone_room[ADDRESSES:FRAME_STEP]
        self._fills = max(bank.sequence for bank in inflight.frames)

    @functools.cached_property
    def _rooms(self) -> list[list[memoryview]]:
        """The in-flight buffer's frame slots, created on first use because many boards receive only single frames."""
        starts = range(0, self._at_once * FRAME_STEP, FRAME_STEP)
        return [[bank.view[i : i + FRAME_MAX] for i in starts] for bank in self._inflight.frames]

    def recover(self) -> None:
        """Deliver the frames that an earlier process read but did not deliver."""
        known = self._states.known
        for bank in sorted(self._inflight.frames, key=lambda bank: bank.sequence):
            files = [known[name] for name in map(decode, frames_in(bank)) if name in known]
            self._counters.recovered += len(files)
            self._deliver(Batch(files, ((bank, len(bank.view)),), pending_since=self._handoff.unread_since))

    def drain(self, stale: Link) -> None:
        """Deliver the frames that are still queued in `stale`, an inherited link that is being replaced.

        Its sender may still be running, so read no more frames than a queue can contain.
        """
        end = self._counters.received + DRAINED_MAX
        while self._counters.received < end and (batch := self._read(stale)):
            self._deliver(batch)
        with contextlib.suppress(OSError):  # The fd store may have handed over a socket of another family.
            self._count_dropped(stale)

    def count_dropped(self) -> None:
        self._counters.foreign = self._link.foreign
        self._count_dropped(self._link)

    def _count_dropped(self, link: Link) -> None:
        if dropped := link.dropped():
            self._counters.dropped += dropped
            text = f"{self._link.name}: {dropped} frames dropped: the receive queue was full"
            report(logger, logging.WARNING, text, "dropped", dropped, cause="dropped")

    def _read(self, link: Link) -> Batch[StateFile] | None:
        """Read queued frames into a new batch until it is full. Return None if the queue is empty."""
        turn = self._fills & 1
        bank, rooms = self._inflight.frames[turn], self._rooms[turn]
        bank.begin(self._fills + 1)
        lengths = link.receive_into(rooms, SHORT)
        if not lengths:
            if self._handoff.unread_since:
                self.check_unread()
            return None
        self._fills += 1
        self._counters.received += len(lengths)
        used = FRAME_STEP * len(lengths) + min(lengths[-1], FRAME_MAX)
        slots = _SLOT.iter_unpack(bank.view[: FRAME_STEP * len(lengths)])
        try:
            files = list(map(self._states.by_frame.__getitem__, itertools.chain.from_iterable(slots)))
        except KeyError:
            files = [file for file in map(self._file_of, rooms, lengths) if file is not None]
        batch = Batch(files, ((bank, used),), drained=len(lengths) < self._at_once and lengths[-1] <= SHORT)
        batch.pending_since = self._handoff.unread_since
        if batch.drained and batch.pending_since:
            self.check_unread()
        if self._listener.wants_frames:
            batch.frames = self._frames_of(files, rooms, lengths)
        return self._handoff.begin(batch)

    def _frames_of(
        self, files: Sequence[StateFile], rooms: Sequence[memoryview], lengths: Sequence[int]
    ) -> list[bytes]:
        """Return the frame of each file in `files`. `rooms` contain all frames of the batch, including ignored ones."""
        names = [file.signal.name.encode() for file in files]
        frames: list[bytes] = []
        for room, length in zip(rooms, lengths, strict=False):
            if len(frames) < len(names) and decode(room, length) == names[len(frames)]:
                frames.append(bytes(room[:length]))
        return frames

    def _file_of(self, room: memoryview, length: int) -> StateFile | None:
        """Return the state file for the frame in `room`. If no signal matches, count the frame and return None."""
        file = self._states.by_frame.get(room[ADDRESSES:FRAME_STEP].tobytes())
        return self._decode(room, length) if file is None else file

    def _decode(self, room: memoryview, length: int) -> StateFile | None:
        name = decode(room, length)
        if name is None:
            self._counters.malformed += self._stands_for(room[:length], length)
            self._ignore("malformed", None, room, length)
            return None
        known, by_frame = self._states.known, self._states.by_frame
        file = known.get(name)
        if file is None:
            self._counters.unknown += self._stands_for(room[:length], length)
            # Rate-limit all unknown names as one cause. Otherwise, core 1 could fill the log with different names.
            logger.debug("%s: unknown signal", name.decode(), extra={"cause": "unknown signal"})
            self._ignore("unknown", name.decode(), room, length)
        elif length <= SHORT and len(by_frame) < FORMS * len(known):
            by_frame[room[ADDRESSES:FRAME_STEP].tobytes()] = file
        return file

    def _stands_for(self, frame: memoryview, length: int) -> int:
        """Count the ignored frames that `frame` represents: one, or more during a flood. Return their number."""
        frames = self._link.stands_for(frame, length)
        self._counters.received += frames - 1
        self._flood.ignored(frames)
        return frames

    def _ignore(self, reason: str, name: str | None, room: memoryview, length: int) -> None:
        frame = bytes(room[:length]) if self._listener.wants_frames else None
        self._events.ignored(reason, name, frame)

    async def receive(self, health: Health) -> None:
        """Run the task that reads the link."""
        await self._handoff.run_reader(self._link.wait_readable, self._receive_queued, health)

    def check_unread(self) -> None:
        """Reset `unread_since` if no frame is queued."""
        self._handoff.check_unread(self._is_queued)

    def _is_queued(self) -> bool:
        poll = select.poll()
        if self._link.fd >= 0:
            poll.register(self._link.fd, select.POLLIN)
        return bool(poll.poll(0))

    async def _receive_queued(self) -> None:
        if not self._handoff.unfinished and not self._receive_lone():
            return
        burst = False
        while batch := self._read(self._link):
            if len(self._handoff.unfinished) == 1 and (batch.drained or self._at_once < FRAMES):
                # All other batches are finished, so a hand-over would only delay this batch.
                self._deliver(batch)
                if batch.drained:
                    break
                await trio.lowlevel.checkpoint()  # Let the tasks of other boards run.
                continue
            burst = True
            await self._handoff.hand_over_read(batch)
        if burst:
            self.count_dropped()

    def _receive_lone(self) -> bool:
        """Read and deliver one frame without a hand-over. Return False if no frame is queued."""
        room = self._lone_room
        length = self._link.receive_one(room)
        if length < 0:
            if self._handoff.unread_since:
                self.check_unread()
            return False
        states = self._states
        file = states.by_frame.get(self._lone_key.tobytes()) or self._decode(room, length)
        if file is not None:
            outcomes = states.write_alone(file, self._handoff.unread_since)
            frames = (bytes(room[:length]),) if self._listener.wants_frames else ()
            if outcomes is None:
                self._handoff.report((file,), frames, self._handoff.unread_since)
            else:
                batch = Batch([file], frames=frames, pending_since=self._handoff.unread_since)
                self._report_outcomes(batch, outcomes)
                self._handoff.finish(batch)
        self._counters.received += 1
        self._inflight.frames[0].clear(min(length, FRAME_MAX))
        return True

    async def write(self, health: Health) -> None:
        """Run the task that writes the state files."""
        async for batch in self._handoff.exit:
            self._deliver(batch)
            health.well()

    def _deliver(self, batch: Batch[StateFile]) -> None:
        if (outcomes := self._states.write(batch.items, batch.pending_since)) is not None:
            self._report_outcomes(batch, outcomes)
        self._handoff.finish(batch)

    def _report_outcomes(self, batch: Batch[StateFile], outcomes: Sequence[str | None]) -> None:
        """Report the notifications of a batch according to `outcomes` (see `StateFiles.write`), and remove them.

        Report the delivered notifications first: of each signal, they are older than those that became pending.
        """
        files, frames = batch.items, batch.frames
        if delivered := [number for number, outcome in enumerate(outcomes) if outcome == ""]:
            some = [frames[number] for number in delivered] if frames else []
            self._handoff.report([files[number] for number in delivered], some, batch.pending_since)
        for outcome, group in itertools.groupby(range(len(files)), outcomes.__getitem__):
            numbers = list(group)
            some = [frames[number] for number in numbers] if frames else []
            if outcome is None:
                for number in numbers:
                    self._events.ignored("unknown", files[number].signal.name, frames[number] if frames else None)
            elif outcome:
                self._events.pending([files[number].signal for number in numbers], outcome, some)
        batch.items, batch.frames = [], ()
