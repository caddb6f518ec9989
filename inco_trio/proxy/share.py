"""One inotify descriptor for many boards, because a user may open only 128 by default (max_user_instances).

Each board has a `Share`, which has the same methods as an `Inotify` and queues events in the board's in-flight buffer.
One task reads the descriptor and moves each event to the queue of every board that watches the file or directory.

Two boards that watch the same directory, such as a common parent, share a watch descriptor. If one board ends its
watch, it receives IN_IGNORED immediately. If it watches the directory again before it has read IN_IGNORED, its new
watch gets a different number: the watch descriptor plus a multiple of `GENERATION`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import attrs
import trio

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Inotify, parse_events
from inco_trio.persist.inflight import LAST_EVENTS, Bank, Inflight
from inco_trio.persist.queue import EventQueue
from inco_trio.proxy.supervise import Health

__all__ = ["GENERATION", "Share", "SharedInotify"]

GENERATION = 1 << 27
GENERATIONS = 16
"""How many different watch numbers one watch descriptor can have."""
UNKNOWN = 1 << 40
"""What `Share.queued` returns while the number of bytes is unknown; more than a board can have queued."""
NOTHING = ino.pack_event(0, ino.IN_MODIFY)
"""An event without effect: the kernel numbers watches from 1."""
ALWAYS = ino.IN_IGNORED | ino.IN_UNMOUNT | ino.IN_Q_OVERFLOW
"""Events that the kernel reports even if a watch does not request them."""
FLAGS = ino.IN_ONLYDIR | ino.IN_DONT_FOLLOW
READS = 8
"""Maximum number of consecutive reads of the descriptor before the boards process what they received."""


@attrs.define
class _Watch:
    """A watch of one board: the number that the board uses for the watch, and the requested events."""

    number: int
    mask: int | None
    """The requested events, or None for an inherited watch, because its mask is unknown."""

    @property
    def wanted(self) -> int:
        return ino.IN_ALL_EVENTS if self.mask is None else self.mask & ino.IN_ALL_EVENTS


class SharedInotify:
    """The descriptor that all boards share. `bank` stores events that are not yet in a board's queue."""

    def __init__(self, held: int | None, bank: Bank) -> None:
        """Open a descriptor, or use the inherited descriptor `held`. Raises OSError (inotify_init(2))."""
        self.inotify = Inotify(held)
        self._bank = bank
        self._watches: dict[int, dict[Share, _Watch]] = {}
        self._shares: set[Share] = set()
        self.held = False
        """Whether `hold` was called, but not `release`."""
        self._released = trio.Event()

    def hold(self) -> None:
        """Read nothing until `release`: a board has lost the numbers of its watches and must watch its files again.

        Until then, the board of an event is unknown. The events stay in the kernel's queue and in `bank`.
        """
        self.held = True

    def release(self) -> None:
        """Read events from now on. Call this once all boards have watched their files."""
        if self.held:
            self.held = False
            self.recover()
            self.drain()
            for share in self._shares:
                share.released()
            self._released.set()

    def share(self, inflight: Inflight) -> Share:
        """Create and return a board's share, which includes the board's inherited watches."""
        share = Share(self, inflight.queue)
        self.adopt(share, inflight)
        return share

    def adopt(self, share: Share, inflight: Inflight) -> None:
        """Add a share and the inherited watches of its board."""
        self._shares.add(share)
        unread: list[bytes | memoryview] = [inflight.queue.copy(), *(bank.view for bank in inflight.events)]
        # A stored watch may have ended already. Its IN_IGNORED is then among the unread events.
        share.given_up = {wd for events in unread for wd, mask, _ in parse_events(events) if mask & ino.IN_IGNORED}
        for number in {inflight.watches[key] for key in inflight.watches} - share.given_up:
            self._watches.setdefault(number % GENERATION, {})[share] = _Watch(number, None)

    def recover(self) -> None:
        """Move a predecessor's events from `bank` to their boards. Call `share` for all inherited boards first."""
        if not self.held:
            self._move(len(self._bank.view))

    async def run(self, health: Health) -> None:
        """Read the descriptor until cancelled."""
        if self.held:
            await self._released.wait()
        while True:
            reads = 0
            while length := self._pump():
                reads += 1
                # During a flood, move events faster than the flooded board processes them, so that only the queue of
                # this board overflows, not the kernel's.
                if length <= LAST_EVENTS or not reads % READS:
                    await trio.lowlevel.checkpoint()
            health.well()
            await self.inotify.wait_readable()

    def drain(self) -> None:
        """Move queued events to the boards. Include at least all events that were queued before the call.

        Do nothing between `hold` and `release`.
        """
        target = self.inotify.read + self.inotify.queued
        while self.inotify.read < target and self._pump():
            pass

    def _pump(self) -> int:
        """Read the descriptor once and move the events to their boards. Return their size in bytes."""
        length = 0 if self.held else self.inotify.read_into(self._bank.view)
        if length:
            self._move(length)
        return length

    def _move(self, length: int) -> None:
        """Move the events in the first `length` bytes of the shared memory to their boards, and wake the boards."""
        view, offset = self._bank.view, 0
        moved: dict[Share, list[bytes]] = {}
        attributes: set[bytes] = set()
        while offset + ino.EVENT.size <= length:
            wd, mask, cookie, name_length = ino.EVENT.unpack_from(view, offset)
            end = offset + ino.EVENT.size + name_length
            if not mask or end > length:
                break
            event = bytes(view[offset:end])
            offset = end
            if name_length > ino.PADDED_MAX:
                continue  # No register has such a name, and `EventQueue` refuses such an event.
            if mask & ino.IN_Q_OVERFLOW:
                for share in self._shares:
                    moved.setdefault(share, []).append(event)
                continue
            watches = self._watches.get(wd)
            if watches is None:
                if not mask & ino.IN_IGNORED:
                    self.inotify.unwatch(wd)  # The board that used this watch was removed.
                continue
            if mask & ino.IN_ATTRIB:
                # All boards below the directory receive this event, and repeating it has no effect.
                if event in attributes:
                    continue
                attributes.add(event)
            for share, watch in watches.items():
                if mask & (watch.wanted | ALWAYS):
                    numbered = event
                    if watch.number != wd:
                        head = ino.EVENT.pack(watch.number, mask, cookie, name_length)
                        numbered = head + event[ino.EVENT.size :]
                    moved.setdefault(share, []).append(numbered)
            if mask & ino.IN_IGNORED:
                del self._watches[wd]
                self.inotify.forget(wd)
        for share, events in moved.items():
            share.queue.append(b"".join(events))
        self._bank.clear(length)
        for share in moved:
            share.wake()

    def watch(self, share: Share, path: str, mask: int) -> int:
        """Watch `path` for a board and return the number of the watch. Raises OSError."""
        # IN_MASK_ADD keeps the events that other boards have requested for the same inode.
        wd = self.inotify.watch(path, mask | ino.IN_MASK_ADD)
        watches = self._watches.setdefault(wd, {})
        watch = watches.get(share)
        if watch is None:
            numbers = range(wd, wd + GENERATION * GENERATIONS, GENERATION)
            watch = watches[share] = _Watch(next((n for n in numbers if n not in share.given_up), wd), 0)
        before = watch.wanted
        added = watch.mask if mask & ino.IN_MASK_ADD and watch.mask is not None else 0
        watch.mask = added | mask & ino.IN_ALL_EVENTS
        if before & ~watch.mask:
            self._narrow(wd, path, mask & FLAGS)
        return watch.number

    def _narrow(self, wd: int, path: str, flags: int) -> None:
        """Reduce the watch `wd` to the events that its boards need.

        Do nothing until each board has watched an inherited `wd` again: until then, its mask is unknown, and a guess
        could add events. After a close event of an unknown watch, a board sends a frame for each of its triggers.
        """
        wanted = 0
        for watch in self._watches[wd].values():
            if watch.mask is None:
                return
            wanted |= watch.wanted
        found = self.inotify.watch(path, wanted | flags)
        if found == wd:
            return
        # The path now refers to a different directory. An event will report the change.
        if found not in self._watches:
            self.inotify.unwatch(found)
        else:
            for watch in self._watches[found].values():
                self.inotify.watch(path, watch.wanted | flags | ino.IN_MASK_ADD)

    def unwatch(self, share: Share, number: int) -> None:
        wd = number % GENERATION
        watches = self._watches.get(wd, {})
        watch = watches.get(share)
        if watch is None or watch.number != number:
            return  # The watch has ended already.
        if len(watches) == 1:
            self.inotify.unwatch(wd)  # The kernel queues IN_IGNORED after the other events.
            return
        self.drain()  # Move the queued events first, so that IN_IGNORED comes last, as in the kernel's queue.
        if self._watches.get(wd, {}).pop(share, None) is None:
            return  # The kernel had already ended the watch: IN_IGNORED was among the queued events.
        share.given_up.add(number)
        share.queue.append(ino.pack_event(number, ino.IN_IGNORED))
        share.wake()

    def end(self, share: Share) -> Generator[None, None, None]:
        """Remove a share, and end its watches in steps."""
        self._shares.discard(share)
        for wd in tuple(self._watches):
            watches = self._watches.get(wd, {})
            if watches.pop(share, None) is not None and not watches:
                del self._watches[wd]
                self.inotify.unwatch(wd)
            yield


class Share:
    """One board's share of the inotify descriptor. It has the same methods as `Inotify`."""

    def __init__(self, shared: SharedInotify, queue: EventQueue) -> None:
        self._shared = shared
        self.queue = queue
        self.given_up: set[int] = set()
        """Numbers of ended watches for which the board has not read IN_IGNORED yet."""
        self._arrived = trio.Event()
        self._waiting = False
        self._is_unknown = False
        """Whether `queued` has returned UNKNOWN, and the board has not read all events of that time yet."""
        self.read = 0
        self.finish_alone: Callable[[memoryview, int], bool] | None = None
        """The board's `Outbound.finish_alone`. Calling it directly halves the latency of a single notification."""

    @property
    def fd(self) -> int:
        return self._shared.inotify.fd

    def wake(self) -> None:
        """Process the queued events with `finish_alone` if possible; otherwise wake the board's task."""
        if self._waiting and self.finish_alone is not None and (done := self.queue.finish_alone(self.finish_alone)):
            self.read += done
        else:
            self._arrived.set()

    async def wait_readable(self) -> None:
        if len(self.queue):
            await trio.lowlevel.checkpoint()
            return
        self._arrived = trio.Event()
        self._waiting = True
        try:
            await self._arrived.wait()
        finally:
            self._waiting = False

    def watch(self, path: str, mask: int) -> int:
        return self._shared.watch(self, path, mask)

    def unwatch(self, wd: int) -> None:
        self._shared.unwatch(self, wd)

    def forget(self, wd: int) -> None:
        self.given_up.discard(wd)

    @property
    def queued(self) -> int:
        if self._shared.held:
            # The board's events are still in the kernel's queue, together with those of other boards.
            self._is_unknown = True
            return UNKNOWN
        self._shared.drain()
        return len(self.queue)

    def released(self) -> None:
        """Make the board read its queue up to this point, if it needs to know when it has done so."""
        if self._is_unknown:
            self.queue.append(NOTHING)
            self.wake()

    def read_into(self, buffer: memoryview) -> int:
        length = self.queue.read_into(buffer)
        self.read += length
        if self._is_unknown and not self._shared.held and not len(self.queue):
            self._is_unknown = False
            self.read += UNKNOWN
        return length

    def leave(self) -> None:
        """Detach the board's proxy, which has stopped."""
        self.finish_alone = None
