"""One direction of the proxy: the memory channel that joins the leg that reads to the leg that acts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, TypeVar

import attrs
import trio

from inco_trio.errors import ClosedError
from inco_trio.persist.inflight import Bank
from inco_trio.persist.tables import NumberTable
from inco_trio.proxy.supervise import Health

__all__ = ["Batch", "Handoff"]

Item = TypeVar("Item")
"""What stands for a notification: the file to write, or the signal to send."""


@attrs.define(eq=False)
class Batch(Generic[Item]):
    """Notifications on their way from one leg to the next, in order."""

    items: list[Item]
    banks: Sequence[tuple[Bank, int]] = ()
    """What they were read into, and how many bytes of it: forgotten once all of them are finished, not before."""
    watches: Mapping[bytes, int] = attrs.field(factory=dict)
    """The watches to note once all of them are finished, see `Triggered`."""
    drained: bool = True
    """Whether nothing was left to read behind it."""
    frames: Sequence[bytes] = ()
    """The frame of each item, if `Listener.wants_frames`."""
    finished: trio.Event | None = None
    """Set once all of them are finished."""


class Handoff(Generic[Item]):
    """A channel without buffer, and the batches that were made for it and are not finished.

    A leg that cannot hand over does not read, so the backlog stays in the kernel, where it is counted and outlives the
    process. `carried` is called with items and frames of every batch that is finished; `noted` is `Inflight.watches`.
    """

    def __init__(self, noted: NumberTable, carried: Callable[[Sequence[Item], Sequence[bytes]], None]) -> None:
        self._entry, self.exit = trio.open_memory_channel[Batch[Item]](0)
        self._noted = noted
        self.carried = carried
        self._reading: trio.CancelScope | None = None
        self._stopping = False
        self._handing: set[trio.CancelScope] = set()
        self.unfinished: set[Batch[Item]] = set()

    def begin(self, batch: Batch[Item]) -> Batch[Item]:
        """The batch is on its way from now on."""
        self.unfinished.add(batch)
        return batch

    def finish(self, batch: Batch[Item]) -> None:
        """All of the batch is done."""
        if batch.items:
            # Before it is forgotten: who is killed in between has told of it twice, not never.
            self.carried(batch.items, batch.frames)
        for key, wd in batch.watches.items():
            self._noted[key] = wd
        for bank, length in batch.banks:
            bank.clear(length)
        if batch.finished is not None:
            batch.finished.set()
        self.unfinished.discard(batch)

    async def hand_over(self, batch: Batch[Item]) -> None:
        """Hand a batch to the next leg; not to be interrupted, as it is read already.

        Once this returns, every earlier batch is finished: the next leg takes one when it is done with the last.
        """
        try:
            self._entry.send_nowait(batch)
        except trio.WouldBlock:
            with trio.CancelScope(shield=True) as scope:
                self._handing.add(scope)
                await self._send(batch)
            self._handing.discard(scope)
            if scope.cancelled_caught:
                # The leg is being ended too: reading on would overwrite what is in flight.
                await trio.lowlevel.checkpoint()
                raise ClosedError("the proxy is closed") from None
        except trio.ClosedResourceError:
            raise ClosedError("the proxy is closed") from None

    async def offer(self, batch: Batch[Item]) -> None:
        """Hand over a batch that is forgotten when this is cancelled. Raises ClosedError."""
        self.begin(batch)
        try:
            await self._send(batch)
        except BaseException:
            self.unfinished.discard(batch)
            raise

    async def _send(self, batch: Batch[Item]) -> None:
        try:
            await self._entry.send(batch)
        except trio.ClosedResourceError:
            raise ClosedError("the proxy is closed") from None

    async def run_reader(
        self, wait_readable: Callable[[], Awaitable[None]], read_queued: Callable[[], Awaitable[None]], health: Health
    ) -> None:
        """Call `read_queued` at once, and after each `wait_readable`; after `stop_reading` once more, then return."""
        with trio.CancelScope() as self._reading:
            while not self._stopping:
                await read_queued()
                health.well()
                await wait_readable()
        await read_queued()

    def stop_reading(self) -> None:
        """Let `run_reader` return once nothing is left to read."""
        self._stopping = True
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Let the leg that acts return once it has finished what was handed over."""
        self._entry.close()

    def abort(self) -> None:
        """Give up what is being handed over; to be followed by the cancellation of the legs."""
        for scope in self._handing:
            scope.cancel()
