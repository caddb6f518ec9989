"""One inotify descriptor for many boards: by default a user may have 128 (fs.inotify.max_user_instances).

Each board has a `Share`, which works like an `Inotify`: it has watches, and a queue in the in-flight buffer, which
overflows by itself. The reader of the descriptor moves each event to the queues of the boards that watch its subject.
So no board waits until another one has read its events.

Two boards may watch the same directory, such as the parent of both, and then share a watch descriptor. A board that
ends such a watch gets an IN_IGNORED at once. If it watches the directory again before it has read that, its watch gets
another number: the watch descriptor plus a multiple of `GENERATION`.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Inotify, parse_events
from inco_trio.persist.inflight import Bank, Inflight
from inco_trio.persist.queue import EventQueue
from inco_trio.proxy.supervise import Health

__all__ = ["GENERATION", "Share", "SharedInotify"]

GENERATION = 1 << 27
GENERATIONS = 16
"""The most numbers of one watch descriptor."""
ALWAYS = ino.IN_IGNORED | ino.IN_UNMOUNT | ino.IN_Q_OVERFLOW
"""Events that the kernel reports whatever the mask."""
FLAGS = ino.IN_ONLYDIR | ino.IN_DONT_FOLLOW


@attrs.define
class _Watch:
    """A watch of a board: its number, and its events."""

    number: int
    mask: int | None
    """None for a predecessor's watch, whose mask only the kernel knows."""

    @property
    def wanted(self) -> int:
        return ino.IN_ALL_EVENTS if self.mask is None else self.mask & ino.IN_ALL_EVENTS


class SharedInotify:
    """The descriptor. `bank`, in the in-flight buffer, has the events that are not moved to their boards yet."""

    def __init__(self, held: int | None, bank: Bank) -> None:
        """Open a descriptor, or take over `held`. Raises OSError (inotify_init(2))."""
        self.inotify = Inotify(held)
        self._bank = bank
        self._watches: dict[int, dict[Share, _Watch]] = {}
        self._shares: set[Share] = set()

    def share(self, inflight: Inflight) -> Share:
        """Return the share of one board, with the watches of its predecessor."""
        share = Share(self, inflight.queue)
        self.adopt(share, inflight)
        return share

    def adopt(self, share: Share, inflight: Inflight) -> None:
        """See `share`."""
        self._shares.add(share)
        unread: list[bytes | memoryview] = [inflight.queue.copy(), *(bank.view for bank in inflight.events)]
        # Such a watch may still be stored.
        share.given_up = {wd for events in unread for wd, mask, _ in parse_events(events) if mask & ino.IN_IGNORED}
        for number in {inflight.watches[key] for key in inflight.watches} - share.given_up:
            self._watches.setdefault(number % GENERATION, {})[share] = _Watch(number, None)

    def recover(self) -> None:
        """Move the events that a predecessor read. Call this once all its boards have their shares."""
        self._move(len(self._bank.view))

    async def run(self, health: Health) -> None:
        """Read the descriptor, for ever."""
        while True:
            while self._pump():
                await trio.lowlevel.checkpoint()
            health.well()
            await self.inotify.wait_readable()

    def drain(self) -> None:
        """Move all events that are queued now, and perhaps more."""
        target = self.inotify.read + self.inotify.queued
        while self.inotify.read < target and self._pump():
            pass

    def _pump(self) -> bool:
        """Read once, and move the events; return whether there were any."""
        if length := self.inotify.read_into(self._bank.view):
            self._move(length)
        return length > 0

    def _move(self, length: int) -> None:
        """Move the events in the first `length` bytes of the bank to their boards, and wake the boards."""
        view, moved = self._bank.view, dict[Share, list[bytes]]()
        offset = 0
        while offset + ino.EVENT.size <= length:
            wd, mask, cookie, name_length = ino.EVENT.unpack_from(view, offset)
            if not mask:
                break
            end = offset + ino.EVENT.size + name_length
            event = bytes(view[offset:end])
            offset = end
            if mask & ino.IN_Q_OVERFLOW:
                for share in self._shares:
                    moved.setdefault(share, []).append(event)
                continue
            watches = self._watches.get(wd)
            if watches is None:
                if not mask & ino.IN_IGNORED:
                    self.inotify.unwatch(wd)  # Of a board that was removed.
                continue
            for share, watch in watches.items():
                if mask & (watch.wanted | ALWAYS):
                    head = ino.EVENT.pack(watch.number, mask, cookie, name_length)
                    moved.setdefault(share, []).append(head + event[ino.EVENT.size :])
            if mask & ino.IN_IGNORED:
                self._forget(wd)
        for share, events in moved.items():
            share.queue.append(b"".join(events))
        self._bank.clear(length)
        for share in moved:
            share.wake()

    def _forget(self, wd: int) -> None:
        del self._watches[wd]
        self.inotify.forget(wd)

    # ---------------------------------------------------------------------------------------------- for the shares

    def watch(self, share: Share, path: str, mask: int) -> int:
        """Watch `path` for a board; return the number. Raises OSError."""
        # IN_MASK_ADD keeps the events of other boards.
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
        """Reduce the watch `wd` to the events that its boards need."""
        wanted = 0
        for watch in self._watches[wd].values():
            wanted |= watch.wanted
        found = self.inotify.watch(path, wanted | flags)
        if found == wd:
            return
        # The path leads to another directory now, which an event reports.
        if found not in self._watches:
            self.inotify.unwatch(found)
        else:
            for watch in self._watches[found].values():
                self.inotify.watch(path, watch.wanted | flags | ino.IN_MASK_ADD)

    def unwatch(self, share: Share, number: int) -> None:
        """End a board's watch."""
        wd = number % GENERATION
        watches = self._watches.get(wd, {})
        watch = watches.get(share)
        if watch is None or watch.number != number:
            return  # It has ended already.
        if len(watches) == 1:
            self.inotify.unwatch(wd)  # The queued events come first, and IN_IGNORED last.
            return
        self.drain()  # The queued events come first, as from the kernel.
        if self._watches.get(wd, {}).pop(share, None) is None:
            return  # Its IN_IGNORED was among them.
        share.given_up.add(number)
        share.queue.append(ino.pack_event(number, ino.IN_IGNORED))
        share.wake()

    def end(self, share: Share) -> None:
        """End all watches of a board that is removed."""
        self._shares.discard(share)
        for wd, watches in tuple(self._watches.items()):
            if watches.pop(share, None) is not None and not watches:
                del self._watches[wd]
                self.inotify.unwatch(wd)


class Share:
    """The part of one board, which works like an `Inotify`."""

    def __init__(self, shared: SharedInotify, queue: EventQueue) -> None:
        self._shared = shared
        self.queue = queue
        self.given_up: set[int] = set()
        """Ended watches whose IN_IGNORED is not read yet."""
        self._arrived = trio.Event()
        self._waiting = False
        self.read = 0
        self.finish_alone: Callable[[memoryview, int], bool] | None = None
        """Process some events at once, if that is simple and nothing is in flight; return whether it did.

        Waking a task of the board instead would take half the time of a single notification.
        """

    @property
    def fd(self) -> int:
        """The descriptor of all boards."""
        return self._shared.inotify.fd

    def wake(self) -> None:
        """Have the board read its queue."""
        if self._waiting and self.finish_alone is not None and (done := self.queue.finish_alone(self.finish_alone)):
            self.read += done
        else:
            self._arrived.set()

    async def wait_readable(self) -> None:
        """See `Inotify.wait_readable`."""
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
        """See `Inotify.watch`."""
        return self._shared.watch(self, path, mask)

    def unwatch(self, wd: int) -> None:
        """See `Inotify.unwatch`."""
        self._shared.unwatch(self, wd)

    def forget(self, wd: int) -> None:
        """See `Inotify.forget`."""
        self.given_up.discard(wd)

    @property
    def queued(self) -> int:
        """See `Inotify.queued`."""
        self._shared.drain()
        return len(self.queue)

    def read_into(self, buffer: memoryview) -> int:
        """See `Inotify.read_into`."""
        length = self.queue.read_into(buffer)
        self.read += length
        return length

    def leave(self) -> None:
        """The proxy of this share has ended; another one may follow."""
        self.finish_alone = None

    def close(self) -> None:
        """Do nothing: watches stay for a successor; see `SharedInotify.end`."""
