"""Core 1 as a program: the other side of a proxy's link, for tests, tools and simulations."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from inco_trio.cores.core import Core
from inco_trio.cores.port import Port, open_port
from inco_trio.errors import InvalidArgumentError
from inco_trio.frame import decode
from inco_trio.signals import name_fault

__all__ = ["Core1"]


class Core1(Core):
    """Core 1 on a link while the block runs: `async with Core1("unix:/tmp/core1,peer=/tmp/core0") as core1:`.

    `link` is an address; of two sockets, core 1's path comes first. An interface is looked up in the network namespace
    at the path `netns`, or in the current one.

    Entering raises InvalidArgumentError for an invalid address, LinkNotFoundError, PermissionDeniedError and
    ResourceError. What fails later cancels the block and is raised in an ExceptionGroup.
    """

    def __init__(self, link: str, *, netns: Path | None = None) -> None:
        super().__init__(f"{link}: core 1")
        self.malformed = 0
        """Frames that carry no wire name."""
        self._link = link
        self._netns = netns
        self._open_port: Port | None = None

    async def _start(self, resources: AsyncExitStack) -> None:
        self._open_port = await resources.enter_async_context(open_port(self._link, self._take, netns=self._netns))

    def _take(self, frame: bytes) -> None:
        name = decode(frame)
        if name is None:
            self.malformed += 1
        else:
            self._arrive(name.decode("ascii"), frame)

    @property
    def _port(self) -> Port:
        self._check_open()
        assert self._open_port is not None  # noqa: S101 - it is open
        return self._open_port

    def _check_name(self, name: str) -> None:
        if fault := name_fault(name):
            raise InvalidArgumentError(f"{name!r}: {fault}")

    async def send(self, name: str) -> None:
        """Send an inbound signal. Wait while the link has no room, and return once it has accepted the frame.

        Raises InvalidArgumentError for an invalid wire name, LinkNotFoundError if the link is down, and ResourceError.
        """
        self._check_name(name)
        await self._port.send(self._port.frame(name))

    async def send_frame(self, frame: bytes) -> None:
        """Send a frame as it is, even if no core would send it. Raises as `send` does."""
        await self._port.send(frame)

    async def wait_running(self) -> None:
        """Wait until the other side of a socket exists, or until an interface is up and has a carrier."""
        await self._port.wait_running()
