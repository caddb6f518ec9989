"""A client of the control socket for a program that waits for much else: a follower under Trio. See docs/control.md."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from inco_trio.control.client import ERRORS
from inco_trio.errors import IncoError, PermissionDeniedError, ProxyNotFoundError

__all__ = ["Conversation", "converse"]

PATIENCE = 10.0
"""Seconds in which a proxy greets, and answers what it need not wait for."""
CHUNK = 1 << 16


class Conversation:
    """A connection to a proxy; one task reads it, several may write."""

    def __init__(self, path: Path, stream: trio.SocketStream) -> None:
        self.path = path
        self.greeting: dict[str, Any] = {}
        self._stream = stream
        self._writing = trio.Lock()
        self._received = bytearray()
        self._ahead: list[dict[str, Any]] = []

    async def write(self, request: Mapping[str, object]) -> None:
        """Ask something. Raises ProxyNotFoundError once the proxy has ended."""
        line = json.dumps(request).encode() + b"\n"
        async with self._writing:
            try:
                await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._gone() from error

    async def read(self) -> list[dict[str, Any]]:
        """Some answers and events, once there are any. Raises ProxyNotFoundError once the proxy has ended."""
        if self._ahead:
            lines, self._ahead = self._ahead, []
            return lines
        while True:
            try:
                data = await self._stream.receive_some(CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            whole, newline, rest = data.rpartition(b"\n")
            self._received += whole + newline
            if newline:
                text, self._received = bytes(self._received), bytearray(rest)
                return [self._parsed(line) for line in text.splitlines()]
            self._received += rest

    async def request(self, request: Mapping[str, object]) -> dict[str, Any]:
        """The answer to a request, where nobody else reads. Raises IncoError for one that is refused."""
        with trio.move_on_after(PATIENCE):
            await self.write(request)
            before: list[dict[str, Any]] = []
            while True:
                lines = await self.read()
                for number, line in enumerate(lines):
                    if "event" not in line:
                        self._ahead = [*before, *lines[:number], *lines[number + 1 :]]
                        self.check(line)
                        return line
                before += lines
        raise ProxyNotFoundError(self.path, "the proxy does not answer")

    def check(self, answer: Mapping[str, Any]) -> None:
        """Raise the error that an answer is, if it is one."""
        if "error" in answer:
            raise ERRORS.get(answer["error"], IncoError)(self.path, str(answer.get("message", answer["error"])))

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            read: object = json.loads(line)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise ProxyNotFoundError(self.path, "who listens there is no inco-trio")
        return read

    def _gone(self) -> ProxyNotFoundError:
        return ProxyNotFoundError(self.path, "the proxy has ended")


@asynccontextmanager
async def converse(path: Path) -> AsyncIterator[Conversation]:
    """A connection to the proxy that listens at `path`. Raises ProxyNotFoundError, PermissionDeniedError,
    ResourceError.
    """
    try:
        stream = await trio.open_unix_socket(os.fspath(path))
    except PermissionError as error:
        raise PermissionDeniedError(path, "only root, the user of the proxy and its group may ask it") from error
    except OSError as error:
        raise ProxyNotFoundError(path, f"no proxy answers there: {error.strerror or error}") from error
    async with stream:
        conversation = Conversation(path, stream)
        with trio.move_on_after(PATIENCE):
            (conversation.greeting, *conversation._ahead) = await conversation.read()
        conversation.check(conversation.greeting)
        if not isinstance(conversation.greeting.get("boards"), list):
            raise ProxyNotFoundError(path, "who listens there does not answer as inco-trio does")
        yield conversation
