"""The outbound way: triggers, as inotify reports them, to frames on the link."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

import trio

from .errors import ClosedError
from .inflight import EVENT_BANK, Bank, Inflight
from .inotify import Inotify, parse_events
from .link import DOWN, Link
from .registers import Registers, Triggered
from .signals import Signal
from .stats import Stats
from .supervise import Health
from .way import Batch, Way

__all__ = ["Outbound"]

EVENT_ROOM = 16 + 256
"""Bytes of the largest inotify event: with less room than this left in the buffer, more may be queued."""


class Outbound:
    """Reads inotify events into the in-flight memory, and sends the frames of what was triggered."""

    def __init__(
        self,
        way: Way,
        link: Link,
        registers: Registers,
        inotify: Inotify,
        inflight: Inflight,
        stats: Stats,
        read: Callable[[], None],
    ) -> None:
        self._way = way
        self._link = link
        self._registers = registers
        self._inotify = inotify
        self._inflight = inflight
        self._stats = stats
        self._read = read
        self._changed = trio.Event()
        self._fills = max(bank.sequence for bank in inflight.events)
        self._recovered: tuple[Batch, trio.Event] | None = None
        self._waiting: set[trio.Event] = set()

    def recover(self, replaced: Triggered) -> None:
        """Take up what a predecessor had read and not finished, and the triggers `replaced` since."""
        triggered = Triggered([], {})
        banks = sorted(self._inflight.events, key=lambda bank: bank.sequence)
        for bank in banks:
            triggered.extend(self._registers.triggered(parse_events(bank.view)))
        self._stats.recovered += len(triggered.signals)
        triggered.extend(replaced)
        finished = trio.Event()

        def done() -> None:
            for bank in banks:
                bank.clear(len(bank.view))
            finished.set()

        self._recovered = (self._batch(triggered, done), finished)

    def _batch(self, triggered: Triggered, done: Callable[[], None], *, drained: bool = True) -> Batch:
        watches = self._inflight.watches

        def finished() -> None:
            for key, wd in triggered.watches.items():
                watches[key] = wd
            done()

        self._stats.triggered += len(triggered.signals)
        return self._way.batch(triggered.signals, finished, drained=drained)

    async def trigger(self, triggered: Triggered) -> None:
        """Send what was found to be triggered without an event of its own.

        What is not handed over before the proxy closes is not noted, so that a successor finds it again.
        """
        if triggered.signals:
            with contextlib.suppress(ClosedError):
                await self._way.hand_over(self._batch(triggered, lambda: None))

    async def send_signal(self, signal: Signal) -> None:
        """Send one notification; returns once the link has accepted it. Raises ClosedError."""
        finished = trio.Event()
        batch = self._batch(Triggered([signal], {}), finished.set)
        await self._way.offer(batch)
        self._waiting.add(finished)
        try:
            await finished.wait()
        finally:
            self._waiting.discard(finished)
        if batch in self._way.open:
            raise ClosedError("the proxy was closed before the link accepted the frame")

    def closed(self) -> None:
        """Wake those who wait for what will not be sent any more."""
        for finished in self._waiting:
            finished.set()

    async def triggers(self, health: Health) -> None:
        """The leg that reads inotify."""
        if self._recovered is not None:
            (batch, finished), self._recovered = self._recovered, None
            await self._way.hand_over(batch)
            await finished.wait()  # Its events stand in both banks.
        await self._way.read(self._inotify.fd, self._read_queued, health)

    async def _read_queued(self) -> None:
        while batch := self._read_batch():
            if batch.drained and len(self._way.open) == 1 and self._send_now(batch):
                return
            await self._way.hand_over(batch)

    def _read_batch(self) -> Batch | None:
        """Read what is queued into the next bank, as far as it fits; None if nothing is."""
        bank: Bank = self._inflight.events[self._fills & 1]
        bank.begin(self._fills + 1)
        length = self._inotify.read_into(bank.view)
        if not length:
            return None
        self._fills += 1
        triggered = self._registers.triggered(parse_events(bank.view[:length]))
        self._read()
        return self._batch(triggered, lambda: bank.clear(length), drained=length < EVENT_BANK - EVENT_ROOM)

    def _send_now(self, batch: Batch) -> bool:
        """Send a batch here and now, if the link takes it; what it does not take stays in the batch."""
        for number, signal in enumerate(batch.signals):
            try:
                self._link.send(signal.name)
            except OSError:
                # The leg that sends knows what to do.
                self._way.carried(batch.signals[:number])
                del batch.signals[:number]
                return False
            self._stats.sent += 1
        self._way.finish(batch)
        return True

    async def send(self, health: Health) -> None:
        """The leg that sends frames."""
        async for batch in self._way.exit:
            batch.signals = [signal for signal in batch.signals if await self._send(signal, health)]
            self._way.finish(batch)
            health.well()

    async def _send(self, signal: Signal, health: Health) -> bool:
        """Send one frame, waiting for a link that cannot take it now; False if it never will be taken.

        Raises OSError for what is nobody's to wait for.
        """
        changed = None
        while True:
            before, changed = changed, self._changed
            try:
                self._link.send(signal.name)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._link.fd)
            except OSError as error:
                self._stats.send_failures += 1
                if error.errno in DOWN and before is not changed:
                    continue  # The socket may have kept the error of a link that is up again: ask once more.
                if error.errno in DOWN:
                    health.failed(f"cannot send: {error.strerror}; notifications are kept")
                    await changed.wait()
                elif error.errno == errno.ENOBUFS:
                    # A full queue of the device, or no carrier.
                    health.failed(f"cannot send: {error.strerror}; notifications are kept and retried")
                    with trio.move_on_after(health.backoff.next()):
                        await changed.wait()
                elif error.errno == errno.EMSGSIZE:
                    health.failed(f"{signal.name} is longer than the MTU and cannot be sent: raise the MTU")
                    self._stats.unsendable += 1
                    return False
                else:
                    raise
            else:
                self._stats.sent += 1
                return True

    def link_changed(self) -> None:
        """The interface was changed: try again to send."""
        self._changed.set()
        self._changed = trio.Event()
