"""The outbound direction: read inotify events of triggers and send frames on the link."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence

import trio

from inco_trio import real_clock
from inco_trio.backoff import Backoff
from inco_trio.counters import Counters
from inco_trio.errors import ClosedError
from inco_trio.links.link import Link, LinkDownError
from inco_trio.linux.inotify import Watcher, parse_events
from inco_trio.notifications import Deaf, Events
from inco_trio.persist.inflight import LAST_EVENTS, Bank, Inflight
from inco_trio.proxy.handoff import LATE, Batch, Handoff
from inco_trio.proxy.supervise import TRANSIENT, Health
from inco_trio.registers.triggers import Triggered, Triggers
from inco_trio.signals import Signal

__all__ = ["Outbound"]


class Outbound:
    """Reads inotify events into the in-flight buffer, and sends the frames of the triggered signals."""

    def __init__(
        self,
        handoff: Handoff[Signal],
        link: Link,
        triggers: Triggers,
        inotify: Watcher,
        inflight: Inflight,
        counters: Counters,
        events: Events | None = None,
    ) -> None:
        self._handoff = handoff
        self._link = link
        self._triggers = triggers
        self._inotify = inotify
        self._inflight = inflight
        self._counters = counters
        self._events = events or Deaf()
        self.failures: Counter[str] = Counter()
        """Number of failed attempts to send a frame, keyed by signal name."""
        # The pauses grow slowly, so that even a device that queues only one frame soon gets its next frame.
        self._room = Backoff(first=0.0005, factor=1.4)
        self._changed = trio.Event()
        self._fills = max(bank.sequence for bank in inflight.events)
        self._bank = inflight.events[self._fills & 1]
        self._recovered: list[Batch[Signal]] = []
        self._waiting: set[trio.Event] = set()
        self._sending: Batch[Signal] = Batch([])
        """The batch that the task `send` is sending. Its items are in `_sent` or `_rest`, or were reported as sent."""
        self._sent: list[Signal] = []
        self._rest: deque[Signal] = deque()
        self._delay = ""
        """Why the link accepts no frames at the moment, or "" if it accepts them."""

    def recover(self) -> None:
        """Recover events that an earlier process read but did not finish. The task `triggers` passes them on."""
        in_order = sorted(self._inflight.events, key=lambda bank: bank.sequence)
        for since, banks in itertools.groupby(in_order, key=lambda bank: bank.pending_since):
            triggered, used = Triggered(), []
            for bank in banks:
                triggered.extend(self._triggers.follow(parse_events(bank.view)))
                used.append((bank, len(bank.view)))
            self._counters.recovered += len(triggered.signals)
            batch = self._batch(triggered, banks=used)
            batch.pending_since, batch.is_reported = since or self._handoff.unread_since, since != 0
            self._recovered.append(batch)

    def _batch(self, triggered: Triggered, *, sent: int = 0, banks: Sequence[tuple[Bank, int]] = ()) -> Batch[Signal]:
        """Return a batch of the triggered signals without the first `sent` signals."""
        self._counters.triggered += len(triggered.signals)
        return self._handoff.begin(Batch(triggered.signals[sent:], banks, triggered.watches))

    async def send_found(self, found: Triggered) -> None:
        """Send notifications of replaced triggers. If the proxy closes first, the next proxy detects them again."""
        with contextlib.suppress(ClosedError):
            await self._handoff.hand_over(self._batch(found))

    async def send_signal(self, signal: Signal) -> None:
        """Send one notification and return after the link has accepted it. Raises ClosedError."""
        finished = trio.Event()
        batch = Batch([signal], finished=finished)
        await self._handoff.offer(batch)
        self._counters.triggered += 1
        self._waiting.add(finished)
        try:
            await finished.wait()
        finally:
            self._waiting.discard(finished)
        if batch in self._handoff.unfinished:
            raise ClosedError("the proxy was closed before the link accepted the frame")

    def closed(self) -> None:
        """Wake callers of `send_signal` whose frames will not be sent."""
        for finished in self._waiting:
            finished.set()

    async def triggers(self, health: Health) -> None:
        """Run the task that reads inotify."""
        while self._recovered:
            batch = self._recovered.pop(0)
            batch.finished = trio.Event()
            await self._handoff.hand_over(batch)
            await batch.finished.wait()  # Wait, because the recovered events occupy the memory for new events.
        if self._handoff.unread_since:
            self.check_unread()  # This also gets the events that a descriptor of many boards has queued.
        self._begin_bank()
        await self._handoff.run_reader(self._inotify.wait_readable, self._read_queued, health)

    def _begin_bank(self) -> None:
        self._bank = self._inflight.events[self._fills & 1]
        self._bank.begin(self._fills + 1)
        self._bank.pending_since = 0

    def check_unread(self) -> None:
        """Reset `unread_since` if no event is queued."""
        self._handoff.check_unread(lambda: self._inotify.queued)

    async def _read_queued(self) -> None:
        """Read inotify until the queue is empty, and send or hand over the triggered signals."""
        while True:
            bank = self._bank
            length = self._inotify.read_into(bank.view)
            if self.finish_alone(bank.view, length):
                bank.clear(length)
                return
            last = length <= LAST_EVENTS
            since = self._handoff.unread_since
            if since and last:
                self.check_unread()
            triggered = self._triggers.follow(parse_events(bank.view[:length]))
            # If all earlier notifications are finished and no more are queued, a hand-over would only delay these
            # signals.
            sent = 0 if self._handoff.unfinished or not last else self._send_now(triggered.signals, since)
            batch = self._batch(triggered, sent=sent, banks=((bank, length),))
            batch.pending_since = since
            if batch.items:
                if self._delay:
                    self._report_pending(batch)
                self._fills += 1
                await self._handoff.hand_over_read(batch)
                self._begin_bank()
            else:
                self._handoff.finish(batch)
            if last:
                return
            # A flood of events without notifications must not keep other tasks from running.
            await trio.lowlevel.checkpoint()

    def finish_alone(self, events: memoryview, length: int) -> bool:
        """If `events` reports only one closed trigger and no batch is in progress, send the frame and return True.

        Return False if the event may have waited: only `_read_queued` may examine the kernel's queue afterwards.
        """
        if self._handoff.unfinished or self._handoff.unread_since:
            return False
        signal = self._triggers.closed_alone(events, length)
        if signal is None:
            return False
        try:
            self._link.send(signal.name)
        except OSError:
            return False  # The task `send` will retry and handle errors.
        self._counters.triggered += 1
        self._counters.sent += 1
        self._handoff.report((signal,), (), 0)
        return True

    def _send_now(self, signals: Sequence[Signal], since: int) -> int:
        """Send as many of `signals` as the link accepts without waiting. Return their number."""
        sent = 0
        try:
            for signal in signals:
                self._link.send(signal.name)
                sent += 1
        except OSError:
            pass  # The task `send` will retry and handle errors.
        self._counters.sent += sent
        if sent:
            self._handoff.report(signals[:sent], (), since)
        return sent

    async def send(self, health: Health) -> None:
        """Run the task that sends frames. If it failed before, it first sends the rest of that batch."""
        if self._sending in self._handoff.unfinished:
            await self._send_rest(health)
        async for batch in self._handoff.exit:
            self._sending, self._sent, self._rest = batch, [], deque(batch.items)
            if not batch.pending_since and batch.has_waited:
                batch.pending_since = batch.offered
            await self._send_rest(health)

    async def _send_rest(self, health: Health) -> None:
        """Send the notifications in `_rest`, and finish the batch."""
        while self._rest:
            if await self._send(self._rest[0], health):
                self._sent.append(self._rest[0])
            self._rest.popleft()
        self._sending.items = self._sent
        self._handoff.finish(self._sending)
        health.well()

    def _delayed(self, reason: str) -> None:
        """Report which notifications of the batch were sent. Report the others as pending because of `reason`."""
        batch = self._sending
        if self._sent:
            self._handoff.report(self._sent, (), batch.pending_since)
        self._sent, batch.items = [], list(self._rest)
        self._delay = reason
        self._report_pending(batch)

    def _report_pending(self, batch: Batch[Signal]) -> None:
        if not batch.is_reported:
            batch.is_reported = True
            batch.pending_since = batch.pending_since or real_clock.monotonic_ns()
            self._events.pending(batch.items, self._delay, ())
            for bank, _ in batch.banks:
                bank.pending_since = batch.pending_since  # The next process must not report the batch again.

    async def _send(self, signal: Signal, health: Health) -> bool:
        """Send one frame, waiting until the link accepts it. Return False if the frame is too long for the link.

        Raises OSError for other errors that waiting cannot fix.
        """
        changed = None
        late_at = math.inf
        while True:
            before, changed = changed, self._changed
            try:
                self._link.send(signal.name)
            except BlockingIOError:
                with trio.move_on_after(LATE) as short:
                    await self._link.wait_for_room()
                if short.cancelled_caught:
                    self._delayed("the other side does not read: the queue of the link is full")
                    await self._link.wait_for_room()
            except LinkDownError as error:
                self._counters.send_failures += 1
                self.failures[signal.name] += 1
                if before is changed:  # If the link has changed, retry immediately: it may have come up.
                    health.failed(f"cannot send: {error.strerror}; notifications are kept")
                    self._delayed(error.strerror)
                    await changed.wait()
            except OSError as error:
                self._counters.send_failures += 1
                self.failures[signal.name] += 1
                if error.errno in TRANSIENT:
                    # For example, ENOBUFS means that the device queue is full. No event reports when it has room again.
                    health.failed(f"cannot send: {error.strerror}; notifications are kept and retried")
                    late_at = min(late_at, trio.current_time() + LATE)
                    if trio.current_time() >= late_at:
                        self._delayed(str(error.strerror))
                    with trio.move_on_after(self._room.next()):
                        await changed.wait()
                elif error.errno == errno.EMSGSIZE:
                    health.failed(f"{signal.name}: the frame is longer than the MTU and is not sent: raise the MTU")
                    self._counters.unsendable += 1
                    self._events.ignored("unsendable", signal.name, None)
                    return False
                else:
                    raise
            else:
                self._delay = ""
                self._counters.sent += 1
                self._room.reset()
                return True

    def link_changed(self) -> None:
        """Make the task `send` retry, because the link has changed."""
        self._changed.set()
        self._changed = trio.Event()
