"""The memory channel from the task that reads notifications to the task that writes or sends them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, NoReturn, TypeVar

import trio

from inco_trio import real_clock
from inco_trio.errors import ClosedError
from inco_trio.persist.inflight import Bank
from inco_trio.persist.tables import NumberTable
from inco_trio.proxy.supervise import Health

__all__ = ["LATE", "Batch", "Handoff"]

LATE = 0.1
"""How long (seconds) a notification may wait for room in a queue before it is reported as pending."""
Item = TypeVar("Item")
"""The type of an item in a batch: a state file to write, or a signal to send."""


class Batch(Generic[Item]):
    """Notifications, in order, that one task reads and another task writes or sends."""

    def __init__(
        self,
        items: list[Item],
        banks: Sequence[tuple[Bank, int]] = (),
        watches: Mapping[bytes, int] | None = None,
        drained: bool = True,
        frames: Sequence[bytes] = (),
        pending_since: int = 0,
        finished: trio.Event | None = None,
    ) -> None:
        self.items = items
        self.banks = banks
        """The parts of the in-flight buffer to clear once all items are finished, each with its used size in bytes."""
        self.watches = {} if watches is None else watches
        """The watches to store once all items are finished; see `Triggered.watches`."""
        self.drained = drained
        """Whether the kernel's queue was empty after the read."""
        self.frames = frames
        """The frame of each item. Empty unless `Listener.wants_frames` is set."""
        self.pending_since = pending_since
        """When the items became pending, or 0; see `Listener.carried`."""
        self.is_reported = False
        """Whether the items were reported as pending."""
        self.offered = 0
        """When the hand-over began (real_clock.monotonic_ns()), or 0 if the consumer took the batch immediately."""
        self.finished = finished
        """An event that is set once all items are finished."""

    @property
    def has_waited(self) -> bool:
        """Whether the consumer took the batch only after LATE, or after it was reported as pending."""
        return self.offered > 0 and (self.is_reported or real_clock.monotonic_ns() - self.offered > LATE * 1e9)


class Handoff(Generic[Item]):
    """An unbuffered channel from a reading task to a consumer, a task that writes or sends.

    It also keeps the unfinished batches. The reading task waits until the consumer takes a batch. Meanwhile, the
    backlog stays in the kernel's queue, which survives the process. `report` receives `items`, `frames` and
    `pending_since` of each finished batch.
    """

    def __init__(
        self,
        noted: NumberTable,
        report: Callable[[Sequence[Item], Sequence[bytes], int], None],
        unread: memoryview | None = None,
    ) -> None:
        """`unread` is the number in `Inflight.times` for the kernel's queue, as a view."""
        self._entry, self.exit = trio.open_memory_channel[Batch[Item]](0)
        self._noted = noted
        self.report = report
        self._reading: trio.CancelScope | None = None
        self._stopping = False
        self._unread = memoryview(bytearray(8)).cast("Q") if unread is None else unread
        self.unread_since = -min(self._unread[0], real_clock.monotonic_ns())
        """The `since` of the next notifications to read; see `Listener.carried`.

        It is negative if nothing may have read the kernel's queue since then. `check_unread` resets it.
        """
        self._times_left = 0
        """The number of calls of `leave_unread`."""
        self._handing: set[trio.CancelScope] = set()
        self.unfinished: set[Batch[Item]] = set()

    def begin(self, batch: Batch[Item]) -> Batch[Item]:
        """Register a batch as unfinished, and return it."""
        self.unfinished.add(batch)
        return batch

    def finish(self, batch: Batch[Item]) -> None:
        """Finish a batch: report its items and clear its memory."""
        if batch.items:
            # Report first: if the process is killed before it clears the memory, a report is repeated instead of lost.
            self.report(batch.items, batch.frames, batch.pending_since)
        for key, wd in batch.watches.items():
            self._noted[key] = wd
        for bank, length in batch.banks:
            bank.clear(length)
        if batch.finished is not None:
            batch.finished.set()
        self.unfinished.discard(batch)

    async def hand_over(self, batch: Batch[Item]) -> None:
        """Hand a batch to the consumer, shielded from cancellation because the kernel no longer has the data.

        When the call returns, all earlier batches are finished, because the consumer takes one batch at a time.
        """
        try:
            self._entry.send_nowait(batch)
        except trio.WouldBlock:
            batch.offered = real_clock.monotonic_ns()
            with trio.CancelScope(shield=True) as scope:
                self._handing.add(scope)
                await self._send(batch)
            self._handing.discard(scope)
            if scope.cancelled_caught:
                await self._refuse()
        except trio.ClosedResourceError:
            # The channel is closed: `abort` and `close` ran after the consumer had taken the previous batch.
            await self._refuse()

    async def hand_over_read(self, batch: Batch[Item]) -> None:
        """Hand over a batch as the reading task does, which reads nothing while it waits."""
        await self.hand_over(batch)
        if batch.has_waited:
            self.leave_unread(batch.offered)

    def leave_unread(self, since: int) -> None:
        """Record that nothing may have read the kernel's queue since this time. Signal handlers may call this."""
        self._times_left += 1
        # Call nothing between the comparison and the assignment: CPython runs signal handlers after a call.
        if not self.unread_since or since < -self.unread_since:
            self.unread_since = -since

    def check_unread(self, is_queued: Callable[[], object]) -> None:
        """Reset `unread_since`, unless a notification is queued or a signal handler calls `leave_unread` meanwhile.

        `is_queued` may process events (see `proxy.share`), so keep `unread_since` until it returns.
        """
        before = self._times_left
        if not is_queued() and self._times_left == before:
            self.unread_since = 0

    async def _refuse(self) -> NoReturn:
        """Raise Cancelled or ClosedError to stop the reading task before it overwrites unfinished batches."""
        await trio.lowlevel.checkpoint()
        raise ClosedError("the proxy is closed") from None

    async def offer(self, batch: Batch[Item]) -> None:
        """Hand over a batch; drop the batch if the call is cancelled. Raises ClosedError."""
        self.begin(batch)
        batch.offered = real_clock.monotonic_ns()
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
                if not self._stopping:
                    self._unread[0] = 0
                health.well()
                await wait_readable()
        await read_queued()

    def stop_reading(self) -> None:
        """Make `run_reader` read the rest of the queue and return."""
        self._stopping = True
        times = [real_clock.monotonic_ns(), -self.unread_since, *(batch.offered for batch in self.unfinished)]
        self._unread[0] = min(filter(None, times))
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Make the consumer return once it has finished its current batch."""
        self._entry.close()

    def abort(self) -> None:
        """Cancel hand-overs that are waiting. The caller must then cancel the tasks."""
        for scope in self._handing:
            scope.cancel()
