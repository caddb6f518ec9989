"""A client of the control socket, with blocking sockets and nothing else: tools of a shell have to start quickly.

docs/control.md says what is asked and answered.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from inco_trio.control.place import runtime_directories
from inco_trio.errors import (
    IncoError,
    InvalidArgumentError,
    PermissionDeniedError,
    ProxyNotFoundError,
    ResourceError,
)
from inco_trio.links.address import parse_address

__all__ = ["Client", "client_of", "connect", "sockets"]

PROTOCOL = 1
UNINTERRUPTED = 1.0
"""Seconds of one select(2): a signal that comes just before it does not end it."""
PATIENCE = 10.0
"""Seconds in which a proxy greets, and answers what it need not wait for."""
ERRORS: dict[str, type[IncoError]] = {
    "not-permitted": PermissionDeniedError,
    "closed": ProxyNotFoundError,
    "busy": ResourceError,
}
"""What an error of the proxy is here; InvalidArgumentError for the others."""


class Client:
    """A connection to the proxy that listens at `path`.

    Raises ProxyNotFoundError if nobody does, PermissionDeniedError, and ResourceError for a proxy that has no room.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = bytearray()
        self._events: deque[dict[str, Any]] = deque()
        try:
            self._sock.settimeout(patience)
            self._connect()
            self.greeting = self._read()
            self._check(self.greeting)
            self._check_greeting()
        except BaseException:
            self._sock.close()
            raise

    def _check_greeting(self) -> None:
        greeting = self.greeting
        if not isinstance(greeting.get("protocol"), int) or not isinstance(greeting.get("boards"), list):
            raise ProxyNotFoundError(self.path, "who listens there is no inco-trio")

    def _connect(self) -> None:
        try:
            self._sock.connect(os.fspath(self.path))
        except PermissionError as error:
            raise PermissionDeniedError(
                self.path, "only root, the user of the proxy and its group may ask it (run as one of them)"
            ) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise ProxyNotFoundError(self.path, "no proxy listens there") from error
        except OSError as error:
            raise ProxyNotFoundError(self.path, f"cannot ask there: {error.strerror or error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def request(self, request: Mapping[str, object], patience: float | None = PATIENCE) -> dict[str, Any]:
        """The answer to a request, within `patience` seconds. Raises IncoError for one that is refused."""
        self._sock.settimeout(patience)
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._gone() from error
        while "event" in (line := self._read()):
            self._events.append(line)
        self._check(line)
        return line

    def events(self, patience: float | None = None) -> Iterator[dict[str, Any]]:
        """The events of a monitor, until the proxy ends; TimeoutError if none comes for `patience` seconds."""
        while True:
            while self._events:
                yield self._events.popleft()
            self._sock.settimeout(patience)
            try:
                self._events.append(self._read())
            except ProxyNotFoundError:
                return

    def fileno(self) -> int:
        """The descriptor that is readable when `arrived` has something new."""
        return self._sock.fileno()

    def arrived(self) -> list[dict[str, Any]]:
        """The events of a monitor that are there, without waiting. Raises ProxyNotFoundError once the proxy has
        ended.
        """
        if not self._events and b"\n" not in self._received and select.select([self._sock], [], [], 0)[0]:
            self._receive()
        while (line := self._line()) is not None:
            self._events.append(line)
        events = list(self._events)
        self._events.clear()
        return events

    def wait(self, seconds: float) -> None:
        """Wait, while the proxy says nothing. Raises ProxyNotFoundError if it ends meanwhile."""
        if select.select([self._sock], [], [], seconds)[0]:
            self._sock.settimeout(0)
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while (line := self._line()) is None:
            self._receive()
        return line

    def _receive(self) -> None:
        try:
            while self._sock.gettimeout() is None and not select.select([self._sock], [], [], UNINTERRUPTED)[0]:
                pass
            data = self._sock.recv(1 << 16)
        except TimeoutError as error:
            raise ProxyNotFoundError(self.path, "the proxy does not answer") from error
        except OSError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        self._received += data

    def _line(self) -> dict[str, Any] | None:
        """The next line, or None if it is not there yet."""
        end = self._received.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            read: object = json.loads(line)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise ProxyNotFoundError(self.path, "who listens there is no inco-trio")
        return read

    def _gone(self) -> ProxyNotFoundError:
        return ProxyNotFoundError(self.path, "the proxy has ended")

    def _check(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise ERRORS.get(answer["error"], InvalidArgumentError)(str(answer.get("message", answer["error"])))


def connect(link: str | None, control: str | None) -> Client:
    """Connect to the proxy of `link`, to the one with the socket `control`, or to the only one.

    Raises ProxyNotFoundError, PermissionDeniedError, and InvalidArgumentError if several run.
    """
    if control is not None:
        if link is not None:
            raise InvalidArgumentError("--control and LINK exclude each other: both name a proxy")
        return Client(Path(control))
    found: list[Client] = []
    refused: IncoError | None = None
    for path in sockets():
        try:
            client = Client(path)
        except ProxyNotFoundError:
            continue  # Left over.
        except IncoError as error:
            refused = error
            continue
        if link is None or _is_called(client, link):
            found.append(client)
        else:
            client.close()
    if len(found) == 1:
        return found[0]
    for client in found:
        client.close()
    if found:
        named = ", ".join(f"{client.greeting['name']} (--control {client.path})" for client in found)
        raise InvalidArgumentError(f"{len(found)} proxies answer: name one of {named}")
    if refused is not None:
        raise refused
    whose = "no running proxy" if link is None else f"no proxy of {link}"
    places = " or ".join(map(str, runtime_directories()))
    raise ProxyNotFoundError(f"{whose} answers in {places}: start one, or name its socket with --control PATH")


def client_of(pid: int) -> Client | None:
    """The proxy of a process, if it answers where sockets are looked for."""
    for path in sockets():
        try:
            client = Client(path)
        except IncoError:
            continue
        if client.greeting.get("pid") == pid:
            return client
        client.close()
    return None


def sockets() -> list[Path]:
    """The control sockets of this host, also those that processes that ended have left."""
    found: list[Path] = []
    for directory in runtime_directories():
        # A systemd unit has its socket in a directory of its own.
        found += sorted(path for pattern in ("*.sock", "*/*.sock") for path in directory.glob(pattern))
    return found


def _is_called(client: Client, link: str) -> bool:
    name = client.greeting["name"]
    try:
        called = parse_address(link).name
    except ValueError:
        called = link
    return name in (called, link, os.path.abspath(link)) or link in client.greeting["boards"]  # noqa: PTH100 - no symlinks
