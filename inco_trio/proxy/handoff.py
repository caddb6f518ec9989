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
"""One notification: the file to write or the signal to send."""


@attrs.define(eq=False)
class Batch(Generic[Item]):
    """Notifications in flight from one task to the next, in order."""

    items: list[Item]
    banks: Sequence[tuple[Bank, int]] = ()
    """The banks that the items were read into, with the used lengths. Cleared once all items are finished."""
    watches: Mapping[bytes, int] = attrs.field(factory=dict)
    """The watches to note once all items are finished, see `Triggered`."""
    drained: bool = True
    """Whether the kernel's queue was empty after the read."""
    frames: Sequence[bytes] = ()
    """The frame of each item, if `Listener.wants_frames`."""
    finished: trio.Event | None = None
    """Set once all items are finished."""


class Handoff(Generic[Item]):
    """An unbuffered channel, and the batches that are not finished.

    A task that cannot hand over does not read. The backlog thus stays in the kernel, where it is counted and outlives
    the process. `report` is called with items and frames of every finished batch; `noted` is `Inflight.watches`.
    """

    def __init__(self, noted: NumberTable, report: Callable[[Sequence[Item], Sequence[bytes]], None]) -> None:
        self._entry, self.exit = trio.open_memory_channel[Batch[Item]](0)
        self._noted = noted
        self.report = report
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
            # Report before the memory is cleared: a kill in between causes a duplicate report instead of a lost one.
            self.report(batch.items, batch.frames)
        for key, wd in batch.watches.items():
            self._noted[key] = wd
        for bank, length in batch.banks:
            bank.clear(length)
        if batch.finished is not None:
            batch.finished.set()
        self.unfinished.discard(batch)

    async def hand_over(self, batch: Batch[Item]) -> None:
        """Hand a batch to the next task. The call is shielded from cancellation: the kernel has forgotten the content.

        When the call returns, all earlier batches are finished, because the next task takes one batch at a time.
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
            # `abort` and `close` ran after the next task had taken the previous batch.
            await self._refuse()

    async def _refuse(self) -> NoReturn:
        """Stop the reading task, which would overwrite batches in flight: raise Cancelled, or else ClosedError."""
        await trio.lowlevel.checkpoint()
        raise ClosedError("the proxy is closed") from None

    async def offer(self, batch: Batch[Item]) -> None:
        """Hand over a batch; drop the batch if the call is cancelled. Raises ClosedError."""
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
        """Call `read_queued` now and after each `wait_readable`. After `stop_reading`, read once more and return."""
        with trio.CancelScope() as self._reading:
            while not self._stopping:
                await read_queued()
                health.well()
                await wait_readable()
        await read_queued()

    def stop_reading(self) -> None:
        """Let `run_reader` read the rest of the queue and return."""
        self._stopping = True
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Let the acting task return after it has finished the batches that it got."""
        self._entry.close()

    def abort(self) -> None:
        """Abandon hand-overs in progress. The caller then cancels the tasks."""
        for scope in self._handing:
            scope.cancel()
