"""Core 1, played by a program: the other end of a proxy's link, for tests, tools and simulations."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import attrs
import trio

from inco_trio.cores.port import Port, open_port
from inco_trio.errors import ClosedError, InvalidArgumentError
from inco_trio.frame import decode
from inco_trio.signals import name_fault

__all__ = ["Arrival", "Core1"]


@attrs.frozen
class Arrival:
    """A notification of core 0 that came to core 1."""

    name: str
    """The wire name; core 1 has no table of signals."""
    sequence: int
    """Its number among all that came, from 1."""
    monotonic_ns: int
    """When it was read from the link, as of time.monotonic_ns()."""
    time_ns: int
    """The same, as of time.time_ns()."""
    frame: bytes


class Core1:
    """Core 1 on a link while the block runs: `async with Core1("unix:/tmp/core1,peer=/tmp/core0") as core1:`.

    `link` is an address; of two sockets, core 1's path comes first. An interface is looked for in the network namespace
    at the path `netns`, or in our own. Frames are read as they come, also while nobody waits for them. Each is given to
    one reader; of more than `buffer` that nobody has taken the oldest are dropped, which `lost` counts.

    Entering raises InvalidArgumentError for an invalid address, LinkNotFoundError, PermissionDeniedError and
    ResourceError. What fails later cancels the block and is raised in an ExceptionGroup.
    """

    def __init__(self, link: str, *, netns: Path | None = None, buffer: int = 1024) -> None:
        self.lost = 0
        """Arrivals that nobody took in time."""
        self.malformed = 0
        """Frames that carry no wire name."""
        self._link = link
        self._netns = netns
        self._buffer = buffer
        self._arrived: deque[Arrival] = deque()
        self._sequence = 0
        self._news = trio.lowlevel.ParkingLot()
        self._port: Port | None = None
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Core1:
        self._port = await self._closing.enter_async_context(open_port(self._link, self._take, netns=self._netns))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        self._port = None
        self._news.unpark_all()
        return await self._closing.__aexit__(kind, error, at)

    def _take(self, frame: bytes) -> None:
        name = decode(frame)
        if name is None:
            self.malformed += 1
            return
        self._sequence += 1
        if len(self._arrived) == self._buffer:
            self._arrived.popleft()
            self.lost += 1
        self._arrived.append(Arrival(name.decode("ascii"), self._sequence, time.monotonic_ns(), time.time_ns(), frame))
        self._news.unpark_all()

    def _open(self) -> Port:
        if self._port is None:
            raise ClosedError(f"{self._link}: core 1 is not open: use `async with`")
        return self._port

    async def send(self, name: str) -> None:
        """Send an inbound signal; returns once the link has accepted its frame, and waits for room.

        Raises InvalidArgumentError for what is no wire name, LinkNotFoundError if nobody takes it, and ResourceError.
        """
        if fault := name_fault(name):
            raise InvalidArgumentError(f"{name!r}: {fault}")
        port = self._open()
        await port.send(port.frame(name))

    async def send_frame(self, frame: bytes) -> None:
        """Send a frame as it is, also one that no core would send. Raises as `send` does."""
        await self._open().send(frame)

    async def wait_running(self) -> None:
        """Wait until somebody is at the other end, or until an interface is up and has a carrier."""
        await self._open().wait_running()

    def __aiter__(self) -> Core1:
        return self

    async def __anext__(self) -> Arrival:
        """The next arrival that nobody has taken. Ends when this is closed."""
        await trio.lowlevel.checkpoint()
        while not self._arrived:
            if self._port is None:
                raise StopAsyncIteration
            await self._news.park()
        return self._arrived.popleft()

    async def wait_for(self, name: str, *, timeout: float | None = None) -> Arrival:  # noqa: ASYNC109 - as of a proxy
        """Take the first arrival with this name that nobody has taken, now or once it comes; others stay.

        Raises TimeoutError after `timeout` seconds, and ClosedError.
        """
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(math.inf if timeout is None else timeout):
            while True:
                for arrival in self._arrived:
                    if arrival.name == name:
                        self._arrived.remove(arrival)
                        return arrival
                self._open()
                await self._news.park()
        raise TimeoutError(f"{name}: did not come within {timeout:g} s")
