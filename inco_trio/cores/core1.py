"""Core 1 for Trio programs. `Core1` handles notifications; its `Port` also handles frames without a valid name."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from inco_trio.cores.core import Core, in_background
from inco_trio.errors import InvalidArgumentError, LinkNotFoundError, ResourceError
from inco_trio.frame import FRAME_MAX, decode
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.links.link import Link, LinkDownError
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.signals import name_fault

__all__ = ["Core1", "Port", "open_port"]

TURN = 64
"""Maximum number of frames that are read before other tasks run."""
FULL = 0.001
"""Seconds between attempts to send while the interface's queue is full, because no event reports free space."""
LOOK_AGAIN = 1.0
"""Seconds between checks of a link that is down. For example, no event reports the target of a symlink."""


class Port:
    """Core 1's end of a link. Use `open_port` to open one."""

    def __init__(self, link: Link, arrived: Callable[[bytes], None]) -> None:
        self._link = link
        self._arrived = arrived
        self._changed = trio.lowlevel.ParkingLot()
        self.frame = link.frame

    async def wait_running(self) -> None:
        """Wait until the link is up: its socket has a peer, or its interface is up and has a carrier."""
        while not self._link.running:
            with trio.move_on_after(LOOK_AGAIN):
                await self._changed.park()

    async def send(self, frame: bytes) -> None:
        """Send a frame; wait if the queue is full. Raises ResourceError, or LinkNotFoundError if the link is down."""
        while True:
            try:
                self._link.send_frame(frame)
            except BlockingIOError:
                await self._link.wait_for_room()
            except LinkDownError as error:
                raise LinkNotFoundError(self._link.name, f"the link accepts no frames: {error.strerror}") from error
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise ResourceError(self._link.name, f"cannot send: {error.strerror}") from error
                await trio.sleep(FULL)
            else:
                await trio.lowlevel.checkpoint()
                return

    def receive(self) -> bool:
        """Pass queued frames to `arrived` without waiting. Return whether more may be queued. Raises ResourceError."""
        room = memoryview(bytearray(FRAME_MAX + 1))
        try:
            for _ in range(TURN):
                length = self._link.receive_one(room)
                if length < 0:
                    return False
                # A frame longer than FRAME_MAX is truncated, which does no harm: it is malformed anyway.
                self._arrived(bytes(room[:length]))
        except OSError as error:
            raise ResourceError(self._link.name, f"cannot receive: {error.strerror}") from error
        return True

    async def _receive(self) -> None:
        while True:
            await self._link.wait_readable()
            self.receive()

    async def _follow(self) -> None:
        while True:
            await self._link.changed()
            _refresh(self._link)
            self._changed.unpark_all()


def _refresh(link: Link) -> bool:
    try:
        return link.refresh()
    except OSError as error:
        raise LinkNotFoundError(link.name, error.strerror) from error


@asynccontextmanager
async def open_port(
    address: str, arrived: Callable[[bytes], None], *, netns: Path | None = None, around: Surroundings | None = None
) -> AsyncIterator[Port]:
    """Open core 1's end of a link while the block runs, and pass received frames to `arrived`. See `Core1`."""
    parsed = parse_address(address)
    async with AsyncExitStack() as resources:
        if around is None:
            around = Surroundings()
            resources.callback(around.close)
        link, _ = open_link(parsed, netns, None, memoryview(bytearray(16)), around)
        resources.callback(link.close, remove=True)
        if not _refresh(link):
            refused = link.missing()
            hint = " (core 1's path comes first here, then peer=CORE0)" if isinstance(parsed, UnixAddress) else ""
            raise type(refused)(refused.subject, refused.reason + hint)
        port = Port(link, arrived)
        async with in_background(port._receive, port._follow):
            yield port


class Core1(Core):
    """Simulated core 1 on a link, for use as `async with Core1("unix:/tmp/core1,peer=/tmp/core0"):`.

    `link` is the address of the link. For a pair of sockets, core 1's path comes first. An interface is looked up in
    the network namespace at the path `netns`, or in the current namespace.

    Entering the block raises InvalidArgumentError if the address is invalid. It may also raise LinkNotFoundError,
    PermissionDeniedError and ResourceError. A later error cancels the block and is raised in an ExceptionGroup.
    """

    def __init__(self, link: str, *, netns: Path | None = None) -> None:
        super().__init__(f"{link}: core 1")
        self.malformed = 0
        """Number of frames without a valid wire name."""
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
        assert self._open_port is not None  # noqa: S101 - set by `_start`
        return self._open_port

    def _check_name(self, name: str) -> None:
        if fault := name_fault(name):
            raise InvalidArgumentError(f"{name!r}: {fault}")

    async def send(self, name: str) -> None:
        """Send an inbound signal. Wait while the link's queue is full, and return once the link has accepted the frame.

        Raises InvalidArgumentError for an invalid wire name, LinkNotFoundError if the link is down, and ResourceError.
        """
        self._check_name(name)
        await self._port.send(self._port.frame(name))

    async def send_frame(self, frame: bytes) -> None:
        """Send a frame unchanged, even if it is invalid. Raises LinkNotFoundError and ResourceError."""
        await self._port.send(frame)

    async def wait_running(self) -> None:
        """Wait until the link is up: its socket has a peer, or its interface is up and has a carrier."""
        await self._port.wait_running()
