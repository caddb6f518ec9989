"""The base class of `Core0` and `Core1`, with streams of arriving notifications."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Self

import attrs
import trio

from inco_trio import real_clock
from inco_trio.errors import ClosedError
from inco_trio.nurseries import starting_and_stopping

__all__ = ["Arrival", "Core", "in_background"]


@attrs.frozen
class Arrival:
    """A notification that arrived at one core."""

    name: str
    """The wire name of the signal."""
    sequence: int
    """Sequence number of this notification among all arrivals, starting at 1."""
    monotonic_ns: int
    """When the notification was read (time.monotonic_ns())."""
    time_ns: int
    """When the notification was read (time.time_ns())."""
    frame: bytes = b""
    """The received frame. Empty for arrivals at core 0, which receives no frames."""


@asynccontextmanager
async def in_background(*tasks: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run tasks while the block runs. An error in a task cancels the block and is raised in an ExceptionGroup."""
    scopes: list[trio.CancelScope] = []

    def start(nursery: trio.Nursery) -> None:
        scopes.append(nursery.cancel_scope)
        for task in tasks:
            nursery.start_soon(task)

    async def stop() -> None:
        scopes[0].cancel()

    async with starting_and_stopping(start, stop):
        yield


class Core:
    """One core of a board. It is open while its `async with` block runs."""

    def __init__(self, title: str) -> None:
        self.lost = 0
        """Number of notifications that streams missed because their buffers were full."""
        self._title = title
        self._sequence = 0
        self._streams: dict[trio.MemorySendChannel[Arrival], Collection[str] | None] = {}
        self._resources: AsyncExitStack | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            await self._start(resources)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(self, *raised: Any) -> bool | None:
        resources, self._resources = self._resources, None
        assert resources is not None  # noqa: S101 - set by __aenter__
        try:
            return await resources.__aexit__(*raised)
        finally:
            # End the streams last: until then, the reading task may still receive notifications.
            while self._streams:
                self._streams.popitem()[0].close()

    async def _start(self, resources: AsyncExitStack) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._resources is None:
            raise ClosedError(f"{self._title} is not open: use `async with`")

    def _check_name(self, name: str) -> None:
        """Check the name of a signal to wait for. Raises IncoError if this signal can never arrive at this core."""
        raise NotImplementedError

    def _arrive(self, name: str, frame: bytes = b"") -> None:
        self._sequence += 1
        arrival = Arrival(name, self._sequence, real_clock.monotonic_ns(), real_clock.time_ns(), frame)
        for stream, names in self._streams.items():
            if names is None or name in names:
                try:
                    stream.send_nowait(arrival)
                except trio.WouldBlock:
                    self.lost += 1
                except trio.BrokenResourceError:
                    pass  # The reader has closed its stream before the end of its block.

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None
    ) -> Iterator[trio.MemoryReceiveChannel[Arrival]]:
        """Open a stream of new notifications, optionally limited to some `signals`.

        Several streams can be open at the same time. A reader that falls more than `buffer` notifications behind misses
        some; `lost` counts them. The stream ends when this core is closed. Raises ClosedError if this core is not open.
        For an invalid name, raises the same error as `send`.
        """
        self._check_open()
        if isinstance(signals, str):  # A str would count as a collection of one-letter names.
            raise TypeError(f"signals={signals!r}: expected a collection of names, such as [{signals!r}]")
        for name in signals or ():
            self._check_name(name)
        sending, stream = trio.open_memory_channel[Arrival](buffer)
        self._streams[sending] = None if signals is None else frozenset(signals)
        try:
            with sending, stream:
                yield stream
        finally:
            self._streams.pop(sending, None)

    async def wait_for(self, name: str) -> Arrival:
        """Wait for the next notification of a signal.

        Earlier notifications are ignored. To wait for the answer to an action, open `events` before the action. Raises
        the same errors as `events`, and ClosedError if this core is closed in the meantime.
        """
        with self.events(math.inf, signals=[name]) as events:
            async for arrival in events:
                return arrival
        raise ClosedError(f"{self._title} is closed")
