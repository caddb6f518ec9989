"""The HTTP server for Prometheus, which queries every proxy on this host for each scrape. See docs/metrics.md."""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import attrs
import trio

from inco_trio.backoff import Backoff
from inco_trio.control.accepting import accept
from inco_trio.control.client import sockets
from inco_trio.control.follower import converse
from inco_trio.control.protocol import BoardStatus, StatusRequest
from inco_trio.errors import IncoError, InvalidArgumentError, PermissionDeniedError, ResourceError
from inco_trio.metrics.openmetrics import Reported, openmetrics_of_proxies
from inco_trio.nurseries import read_aside
from inco_trio.problems import Problems
from inco_trio.service.privileges import raise_descriptor_limit

__all__ = ["Boards", "serve"]

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Timeout in seconds for a proxy's greeting, so that a suspended proxy does not delay the scrape."""
BUSY = 2.0
"""Seconds for which the exporter retries its query to a proxy that has too many clients."""
ALL = 5.0
"""Timeout in seconds for all proxies. Prometheus waits 10 seconds for the response by default."""
AT_ONCE = 256
"""Maximum number of proxies that are queried concurrently."""
CONNECTIONS_MAX = 1024
"""Maximum number of HTTP connections, or half of the limit on open descriptors (RLIMIT_NOFILE) if that is lower."""
REQUEST_MAX = 8192
"""Maximum size of a request in bytes."""
REQUEST_PATIENCE = 5.0
"""Timeout in seconds for receiving a request, and again for sending the response."""
CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Answer = tuple[BoardStatus, ...] | str | None
"""The boards of a proxy, the reason why the proxy does not answer, or None for a stale control socket."""


class Boards:
    """The proxies with the control sockets `controls` (default: all proxies on this host)."""

    def __init__(self, controls: Sequence[Path] | None = None) -> None:
        self._controls = controls
        self._paths: Sequence[Path] = controls or ()
        self._problems = Problems()
        self._names: dict[Path, str] = {}
        """The last known name of each proxy, which is used while the proxy does not answer."""
        self._asking = trio.Lock()
        self._metrics, self._number = "", 0

    async def metrics(self) -> str:
        """Query all proxies and return their metrics. Concurrent callers share one query."""
        wanted = self._number + 1
        async with self._asking:
            if self._number < wanted:
                self._metrics = openmetrics_of_proxies(await self._ask_all())
                self._number += 1
            return self._metrics

    async def _ask_all(self) -> list[Reported]:
        if self._controls is None:
            try:
                self._paths = await read_aside(sockets)
                self._problems.well("control")
            except ResourceError as error:
                self._problems.failed("control", f"{error}; querying the known proxies")
        answers: dict[Path, Answer] = dict.fromkeys(self._paths, "the proxy does not answer")
        limit = trio.CapacityLimiter(AT_ONCE)
        with trio.move_on_after(ALL):
            async with trio.open_nursery() as nursery:
                for path in self._paths:
                    nursery.start_soon(self._ask, path, answers, limit)
        reported: list[Reported] = []
        names: set[str] = set()
        for path, answer in answers.items():
            if answer is None:
                self._names.pop(path, None)
                continue
            if isinstance(answer, str):
                self._problems.failed(path, answer)
            # Interfaces in two network namespaces may have the same name, but metrics need different labels.
            name = self._names.get(path, str(path))
            reported.append(Reported(str(path) if name in names else name, None if isinstance(answer, str) else answer))
            names.add(name)
        return reported

    async def _ask(self, path: Path, answers: dict[Path, Answer], limit: trio.CapacityLimiter) -> None:
        """Store the answer of a proxy. Retry for BUSY seconds while the proxy has too many clients."""
        end, backoff = trio.current_time() + BUSY, Backoff()
        async with limit:
            while True:
                try:
                    async with converse(path, PATIENCE) as (conversation, greeting):
                        self._names[path] = greeting.name
                        answers[path] = (await conversation.request(StatusRequest())).status
                    self._problems.well(path)
                except ResourceError as error:
                    answers[path] = ()  # The proxy is not down, but its boards are unknown.
                    if trio.current_time() < end:
                        await trio.sleep(backoff.next())
                        continue
                    self._problems.failed(path, error.reason)
                except IncoError as error:
                    causes = (FileNotFoundError, ConnectionRefusedError)
                    has_left = self._controls is None and isinstance(error.__cause__, causes)
                    answers[path] = None if has_left else error.reason
                return


async def serve(address: str, port: int, controls: Sequence[Path] | None, ready: Callable[[], None]) -> None:
    """Answer scrapes until cancelled. Raises InvalidArgumentError, PermissionDeniedError, ResourceError."""
    listen = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        listeners = await trio.open_tcp_listeners(port, host=address)
    except RuntimeError as error:  # Trio cannot start a thread to look up the address.
        raise ResourceError(f"--listen {listen}: cannot look up this address: {error}") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"--listen {listen}: {error.strerror} (use port 1024 or higher)") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = "another process already uses this port (stop it or use another port)"
            raise ResourceError(f"--listen {listen}: {text}") from error
        raise InvalidArgumentError(f"--listen {listen}: cannot listen on this address: {error.strerror}") from error
    logger.info("serving metrics at http://%s/metrics", listen)
    ready()
    raise_descriptor_limit()
    scrapes = _Scrapes(Boards(controls))
    await trio.serve_listeners(scrapes.answer, [_LimitedListener(each, scrapes.wait_for_room) for each in listeners])


@attrs.frozen
class _LimitedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that accepts a connection only after `wait_for_room`. Until then, the kernel queues the connection."""

    _listener: trio.SocketListener
    _wait_for_room: Callable[[], Awaitable[None]]
    _problems: Problems = attrs.field(factory=Problems, init=False)

    async def accept(self) -> trio.SocketStream:
        await self._wait_for_room()
        return await accept(self._listener, "metrics", self._problems)

    async def aclose(self) -> None:
        await self._listener.aclose()


class _Scrapes:
    """A handler of HTTP connections. Each connection serves one request."""

    def __init__(self, boards: Boards) -> None:
        self._boards = boards
        self._most = min(CONNECTIONS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open = 0
        self._closed = trio.Event()
        self._reading: dict[trio.CancelScope, None] = {}
        """The scopes of connections without a complete request, oldest first."""
        self._limits = Problems()

    async def wait_for_room(self) -> None:
        """Wait until the limit permits another connection. If all clients are silent, close the oldest connection."""
        while self._open >= self._most:
            text = f"{self._most} are open: new ones wait, and replace old ones that send no request"
            self._limits.failed("connections", text)
            if len(self._reading) == self._open:
                next(iter(self._reading)).cancel()
            await self._closed.wait()

    async def answer(self, stream: trio.SocketStream) -> None:
        self._open += 1
        try:
            async with stream:
                with trio.move_on_after(REQUEST_PATIENCE) as reading:
                    self._reading[reading] = None
                    try:
                        method = await _method(stream)
                    finally:
                        del self._reading[reading]
                if reading.cancelled_caught or not method:
                    return
                is_read = method in (b"GET", b"HEAD")
                body = (await self._boards.metrics()).encode() if is_read else b""
                with trio.move_on_after(REQUEST_PATIENCE):
                    await stream.send_all(_head(is_read, len(body)) + (body if method == b"GET" else b""))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The client has closed the connection.
        finally:
            self._open -= 1
            self._closed.set()
            self._closed = trio.Event()
            if not self._open:
                self._limits.forget("connections")


async def _method(stream: trio.SocketStream) -> bytes:
    """Return the HTTP method of a request, or b'' if the client does not send a complete request."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = await stream.receive_some(REQUEST_MAX)
        request += data
        if not data or len(request) > REQUEST_MAX:
            return b""
    return request.split(b" ", 1)[0]


def _head(is_read: bool, length: int) -> bytes:
    status = "200 OK" if is_read else "405 Method Not Allowed\r\nAllow: GET, HEAD"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()
