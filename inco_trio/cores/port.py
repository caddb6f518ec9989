"""The other end of a proxy's link: frames as they are, for who plays core 1 or stands between the cores."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from inco_trio.errors import LinkNotFoundError, ResourceError
from inco_trio.frame import FRAME_MAX
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.links.link import Link, LinkDownError
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.nurseries import starting_and_stopping

__all__ = ["Port", "open_port"]

TURN = 64
"""Frames that are read before other tasks have their turn."""
FULL = 0.001
"""Seconds until an interface's full queue is tried again: nothing tells when it has room (packet(7), ENOBUFS)."""


class Port:
    """An end of a link that is open; `open_port` makes one."""

    def __init__(self, link: Link, arrived: Callable[[bytes], None]) -> None:
        self._link = link
        self._arrived = arrived
        self._changed = trio.lowlevel.ParkingLot()

    def frame(self, name: str) -> bytes:
        """The frame of one notification, from this end's address."""
        return self._link.frame(name)

    @property
    def running(self) -> bool:
        """Whether somebody is at the other end, or an interface is up and has a carrier."""
        return self._link.running

    async def wait_running(self) -> None:
        """Wait until `running`."""
        while not self._link.running:
            await self._changed.park()

    async def send(self, frame: bytes) -> None:
        """Send a frame; waits for room. Raises LinkNotFoundError if nobody takes it, and ResourceError."""
        while True:
            try:
                self._link.send_frame(frame)
            except BlockingIOError:
                await self._link.wait_for_room()
            except LinkDownError as error:
                raise LinkNotFoundError(self._link.name, f"takes no frames now: {error.strerror}") from error
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise ResourceError(self._link.name, f"cannot send: {error.strerror}") from error
                await trio.sleep(FULL)
            else:
                await trio.lowlevel.checkpoint()
                return

    def receive(self) -> bool:
        """Tell of frames that are queued, without waiting; returns whether there may be more.

        Raises ResourceError.
        """
        room = memoryview(bytearray(FRAME_MAX + 1))
        try:
            for _ in range(TURN):
                length = self._link.receive_one(room)
                if length < 0:
                    return False
                # One that is longer is malformed, which the rest of it does not change.
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
    """Open this end of a link, and call `arrived` with each frame that comes, while the block runs.

    Of `unix:LOCAL,peer=REMOTE`, LOCAL is this end's path. An interface is looked for in the network namespace `netns`,
    or in our own. `around` is what the links of a program share; without it, each has an inotify instance of its own.

    Raises InvalidArgumentError for an invalid address, LinkNotFoundError, PermissionDeniedError and ResourceError; what
    fails later cancels the block and is raised in an ExceptionGroup.
    """
    parsed = parse_address(address)
    surroundings = around or Surroundings()
    try:
        link, _ = open_link(parsed, netns, None, memoryview(bytearray(16)), surroundings)
        try:
            if not _refresh(link):
                refused = link.missing()
                hint = " (core 1's path comes first here, then peer=CORE0)" if isinstance(parsed, UnixAddress) else ""
                raise type(refused)(refused.subject, refused.reason + hint)
            port = Port(link, arrived)

            def start(nursery: trio.Nursery) -> None:
                nursery.start_soon(port._receive, name=f"{link.name}: receive")
                nursery.start_soon(port._follow, name=f"{link.name}: follow")
                scopes.append(nursery.cancel_scope)

            async def stop() -> None:
                scopes[0].cancel()

            scopes: list[trio.CancelScope] = []
            async with starting_and_stopping(start, stop):
                yield port
        finally:
            link.close(remove=True)
    finally:
        if around is None:
            surroundings.close()
