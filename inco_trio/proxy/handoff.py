"""One direction of the proxy: the memory channel between the task that reads and the task that acts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, NoReturn, TypeVar

import attrs
import trio

from inco_trio.errors import ClosedError
from inco_trio.persist.inflight import Bank
from inco_trio.persist.tables import NumberTable
from inco_trio.proxy.supervise import Health

__all__ = ["Batch", "Handoff"]

Item = TypeVar("Item")
"""A notification: the file to write, or the signal to send."""


@attrs.define(eq=False)
class Batch(Generic[Item]):
    """Notifications in flight from one task to the next, in order."""

    items: list[Item]
    banks: Sequence[tuple[Bank, int]] = ()
    """The banks that they were read into, with the lengths. Cleared after all of them are finished."""
    watches: Mapping[bytes, int] = attrs.field(factory=dict)
    """The watches to note after all of them are finished, see `Triggered`."""
    drained: bool = True
    """Whether the queue was empty afterwards."""
    frames: Sequence[bytes] = ()
    """The frame of each item, if `Listener.wants_frames`."""
    finished: trio.Event | None = None
    """Set after all of them are finished."""


class Handoff(Generic[Item]):
    """An unbuffered channel, and the batches that are not finished.

    A task that cannot hand over does not read. The backlog thus stays in the kernel, where it is counted and outlives
    the process. `carried` is called with items and frames of every finished batch; `noted` is `Inflight.watches`.
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
        """Register a batch as in flight."""
        self.unfinished.add(batch)
        return batch

    def finish(self, batch: Batch[Item]) -> None:
        """Finish a batch: report its items, and clear its memory."""
        if batch.items:
            # Before the memory is cleared: a kill in between leads to a duplicate report instead of a lost one.
            self.carried(batch.items, batch.frames)
        for key, wd in batch.watches.items():
            self._noted[key] = wd
        for bank, length in batch.banks:
            bank.clear(length)
        if batch.finished is not None:
            batch.finished.set()
        self.unfinished.discard(batch)

    async def hand_over(self, batch: Batch[Item]) -> None:
        """Hand a batch to the next task. Shielded from cancellation, because the batch has been read already.

        When this returns, every earlier batch is finished, because the next task takes one batch at a time.
        """
        try:
            self._entry.send_nowait(batch)
        except trio.WouldBlock:
            with trio.CancelScope(shield=True) as scope:
                self._handing.add(scope)
                await self._send(batch)
            self._handing.discard(scope)
            if scope.cancelled_caught:
                await self._refuse()
        except trio.ClosedResourceError:
            # An abort can come when the next leg has taken the batch before this one.
            await self._refuse()

    async def _refuse(self) -> NoReturn:
        """End a leg that is being ended too, as reading on would overwrite what is in flight, or raise ClosedError."""
        await trio.lowlevel.checkpoint()
        raise ClosedError("the proxy is closed") from None

    async def offer(self, batch: Batch[Item]) -> None:
        """Hand over a batch, which is dropped if this is cancelled. Raises ClosedError."""
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
        """Call `read_queued` now and after each `wait_readable`. After `stop_reading`, call it once more and return."""
        with trio.CancelScope() as self._reading:
            while not self._stopping:
                await read_queued()
                health.well()
                await wait_readable()
        await read_queued()

    def stop_reading(self) -> None:
        """Let `run_reader` return after it has read the rest."""
        self._stopping = True
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Let the task that acts return after it has finished the batches handed over."""
        self._entry.close()

    def abort(self) -> None:
        """Abandon hand-overs in progress. The caller then cancels the tasks."""
        for scope in self._handing:
            scope.cancel()
