"""A Trio client of the control socket, for programs that run other tasks at the same time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from inco_trio.control.client import AGAIN, CHUNK, PATIENCE, Channel, dial
from inco_trio.control.protocol import AcknowledgeAllRequest, Greeting, Reply, Request, Response, encode_request
from inco_trio.errors import ResourceError
from inco_trio.linux.sockets import refuse_descriptors

__all__ = ["Conversation", "converse"]

DELAY = 0.02
"""Seconds for which `send_acknowledgements` collects acknowledgements, because each request delays the proxy."""
URGENT = 256
"""Number of acknowledgements to send without delay. The proxy's limit on unacknowledged notifications is higher."""
POSITIONS_MAX = 100
"""Maximum number of boards in one request. It keeps the request's line shorter than `protocol.LINE_MAX`."""


class Conversation(Channel):
    """A connection to a proxy. One task may read while others write. Raises ProxyNotFoundError once the proxy exits."""

    def __init__(self, path: Path, stream: trio.SocketStream) -> None:
        super().__init__(path, is_subject=True)
        self._stream = stream
        self._writing = trio.Lock()
        self._ahead: list[Reply] = []
        self._positions: dict[str, tuple[str, int]] = {}
        """For each board, the history (`boot`) and the last sequence number to acknowledge."""
        self._has_positions, self._has_many = trio.Event(), trio.Event()
        self._number = 0
        """How many times `acknowledge` has been called since the last request."""

    async def write(self, request: Request) -> None:
        """Send a request, without waiting for the response."""
        async with self._writing:
            try:
                await self._stream.send_all(encode_request(request))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._ended() from error

    def acknowledge(self, board: str, boot: str, sequence: int) -> None:
        """Make `send_acknowledgements` acknowledge the notifications of a board up to `sequence`."""
        self._positions[board] = boot, sequence
        self._has_positions.set()
        self._number += 1
        if self._number >= URGENT:
            self._has_many.set()

    async def send_acknowledgements(self) -> None:
        """Send acknowledgements until cancelled. One request acknowledges notifications of several boards."""
        while True:
            await self._has_positions.wait()
            with trio.move_on_after(DELAY):
                await self._has_many.wait()
            for request in self._take_positions():
                await self.write(request)

    def _take_positions(self) -> list[AcknowledgeAllRequest]:
        positions = [(board, *position) for board, position in self._positions.items()]
        self._positions.clear()
        self._has_positions, self._has_many, self._number = trio.Event(), trio.Event(), 0
        starts = range(0, len(positions), POSITIONS_MAX)
        return [AcknowledgeAllRequest(positions[start : start + POSITIONS_MAX]) for start in starts]

    def acknowledge_at_end(self) -> None:
        """Send acknowledgements without waiting, before the connection is closed. No other task may be writing."""
        with contextlib.suppress(OSError):
            for request in self._take_positions():
                os.write(self._stream.socket.fileno(), encode_request(request))

    async def read(self) -> list[Reply]:
        """Wait for responses and events, and return those that have arrived."""
        if self._ahead:
            replies, self._ahead = self._ahead, []
            return replies
        await self._await_line()
        return [self._next() for _ in range(len(self._lines))]

    async def request(self, request: Request) -> Response:
        """Send a request and return the response. No other task may read. Raises IncoError if the proxy refuses."""
        events: list[Reply] = []
        with trio.move_on_after(PATIENCE):
            await self.write(request)
            while True:
                replies = await self.read()
                for number, reply in enumerate(replies):
                    if isinstance(reply, Response):
                        self._ahead = [*events, *replies[number + 1 :]]
                        return self._checked(reply, request)
                    events.append(reply)
        raise self._silent()

    async def _await_line(self) -> None:
        sock = self._stream.socket
        while not self._lines:
            try:  # `receive_some` would read before it waits, and usually find no data.
                await trio.lowlevel.wait_readable(sock)
                data = os.read(sock.fileno(), CHUNK)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError) as error:
                raise self._ended() from error
            self._feed(data)


@asynccontextmanager
async def converse(path: Path, patience: float = PATIENCE) -> AsyncIterator[tuple[Conversation, Greeting]]:
    """Connect to the proxy at `path`, which must send its greeting within `patience` seconds. Raises IncoError.

    Raises ResourceError if the proxy has too many clients, or if this process has too many open descriptors.
    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ResourceError(path, f"cannot connect: {error.strerror}") from error
    refuse_descriptors(sock)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
        conversation = Conversation(path, stream)
        greeting: Greeting | None = None
        with trio.move_on_after(patience):
            # connect(2) returns EAGAIN if the backlog is full. Trio's connect() would mistake this for EINPROGRESS.
            while not dial(sock, path):  # noqa: ASYNC110 - no event reports space in a backlog
                await trio.sleep(AGAIN)
            await conversation._await_line()
            greeting = conversation._next_greeting()
        if greeting is None:
            raise conversation._silent()
        yield conversation, greeting
