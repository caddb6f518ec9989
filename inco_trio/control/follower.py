"""A Trio client of the control socket, for programs that do other work at the same time."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from inco_trio.control.client import AGAIN, CHUNK, PATIENCE, dial, error_of
from inco_trio.control.protocol import (
    REPLY_MAX,
    Event,
    Greeting,
    LineBuffer,
    MessageError,
    Request,
    Response,
    decode_greeting,
    decode_reply,
    encode_request,
)
from inco_trio.errors import ProtocolError, ProxyNotFoundError

__all__ = ["Conversation", "converse"]


class Conversation:
    """A connection to a proxy. One task may read while several write.

    All methods raise ProxyNotFoundError once the proxy has ended, and ProtocolError if it does not obey the protocol.
    """

    def __init__(self, path: Path, stream: trio.SocketStream) -> None:
        self.path = path
        self._stream = stream
        self._writing = trio.Lock()
        self._received = LineBuffer(REPLY_MAX)
        self._lines: deque[bytes] = deque()
        self._ahead: list[Event | Response] = []

    async def greeting(self) -> Greeting:
        """Return the greeting, which must be read first. Raises IncoError if the proxy refuses the client."""
        await self._fill()
        try:
            greeting = decode_greeting(self._lines.popleft())
        except MessageError as error:
            raise self._broken(error) from error
        if isinstance(greeting, Response):
            raise self._refused(greeting)
        return greeting

    async def write(self, request: Request) -> None:
        """Send a request."""
        async with self._writing:
            try:
                await self._stream.send_all(encode_request(request))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._ended() from error

    async def read(self) -> list[Event | Response]:
        """Wait for responses and events, and return those that have arrived."""
        if self._ahead:
            replies, self._ahead = self._ahead, []
            return replies
        await self._fill()
        try:
            replies = [decode_reply(line) for line in self._lines]
        except MessageError as error:
            raise self._broken(error) from error
        self._lines.clear()
        return replies

    async def request(self, request: Request) -> Response:
        """Return the response to a request, while no other task reads. Raises IncoError if the proxy refuses it."""
        events: list[Event | Response] = []
        with trio.move_on_after(PATIENCE):
            await self.write(request)
            while True:
                replies = await self.read()
                for number, reply in enumerate(replies):
                    if isinstance(reply, Response):
                        self._ahead = [*events, *replies[number + 1 :]]
                        return self._checked(reply, request)
                    events.append(reply)
        raise self.silent()

    def _checked(self, response: Response, request: Request) -> Response:
        if response.error:
            raise self._refused(response)
        try:
            response.check(request)
        except MessageError as error:
            raise self._broken(error) from error
        return response

    async def _fill(self) -> None:
        """Wait until a whole line has arrived."""
        while not self._lines:
            try:
                data = await self._stream.receive_some(CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._ended() from error
            if not data:
                raise self._ended()
            self._received.feed(data)
            try:
                self._lines += self._received.lines()
            except MessageError as error:
                raise self._broken(error) from error

    def _refused(self, response: Response) -> Exception:
        return error_of(response)(f"{self.path}: {response.message or response.error}")

    def _ended(self) -> ProxyNotFoundError:
        return ProxyNotFoundError(f"{self.path}: the proxy has ended")

    def silent(self) -> ProxyNotFoundError:
        """Return the error for a proxy that missed a deadline."""
        return ProxyNotFoundError(f"{self.path}: the proxy does not answer")

    def _broken(self, error: MessageError) -> ProtocolError:
        return ProtocolError(f"{self.path}: the process listening there is not inco-trio, or another version: {error}")


@asynccontextmanager
async def converse(path: Path, patience: float = PATIENCE) -> AsyncIterator[tuple[Conversation, Greeting]]:
    """Connect to the proxy that listens at `path`, which must greet within `patience` seconds.

    Raises ProxyNotFoundError, PermissionDeniedError, ResourceError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
        conversation = Conversation(path, stream)
        greeting: Greeting | None = None
        with trio.move_on_after(patience):
            # Trio would take EAGAIN, which means a full backlog here, for a connection in progress.
            while not dial(sock, path):  # noqa: ASYNC110 - the kernel does not report room in a backlog
                await trio.sleep(AGAIN)
            greeting = await conversation.greeting()
        if greeting is None:
            raise conversation.silent()
        yield conversation, greeting
