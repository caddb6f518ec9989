"""The proxy for asyncio code.

`open_proxy` is for a program of asyncio: the proxy runs beside its loop, in a thread of its own. `on_notification` and
`run` let asyncio code take part in a Trio program, through trio-asyncio. They import it when they are first used, and
that replaces asyncio's event loop policy in the whole process; nothing else of the package does so.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from inco_trio.aio.thread import Beside
from inco_trio.config import Config
from inco_trio.errors import ClosedError
from inco_trio.notifications import Notification
from inco_trio.proxy import proxy as trio_proxy
from inco_trio.proxy_status import Stats
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from inco_trio.proxy_status import Status

__all__ = ["AsyncioProxy", "Proxy", "on_notification", "open_proxy", "run"]

T = TypeVar("T")

BATCH = 64
"""The most notifications that come to the loop at once."""


# ------------------------------------------------------------------------------------------------ an asyncio program


def open_proxy(config: Config) -> AbstractAsyncContextManager[Proxy]:
    """Open a proxy that carries signals while the block runs, and is stopped cleanly however that ends.

    As `inco_trio.open_proxy`, with the same errors. It runs in a thread of its own, which has ended when this has: what
    the loop is busy with never holds a notification up.
    """
    return _Opening(config)


class _Opening(AbstractAsyncContextManager["Proxy"]):
    """No generator: before Python 3.13, closing a coroutine does not close what an asynchronous generator awaits."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def __aenter__(self) -> Proxy:
        self._beside = Beside(self._config)
        return Proxy(await self._beside.__aenter__())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._beside.__aexit__(kind, error, traceback)


class Proxy:
    """A running proxy as an asyncio program uses it, in the loop in which it was opened; `open_proxy` makes one.

    What is cancelled has ended when `asyncio.CancelledError` is raised.
    """

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self._proxy = beside.proxy

    @property
    def config(self) -> Config:
        """The configuration from the start or from the last reload."""
        return self._proxy.config

    async def stats(self) -> Stats:
        """Return the current counters."""
        return await self._beside.read(lambda: self._proxy.stats)

    async def status(self) -> Status:
        """Return the current state."""
        return await self._beside.read(lambda: self._proxy.status)

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal; returns once the link has accepted it.

        Waits while the link is down; when cancelled then, the frame may still be sent later. Raises
        UnknownSignalError, or ClosedError once the proxy is closing.
        """
        await self._beside.call(functools.partial(self._proxy.send, name))

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | str | None = None
    ) -> Iterator[AsyncIterator[Notification]]:
        """A stream of what is carried from now on: of these signals, or all, in one direction or both.

        Notifications come to the loop in batches of at most 64. A reader that is more than `buffer` of them and a batch
        behind misses some, which `Stats.events_lost` counts; the proxy never waits for it. A cancelled `anext`, as by
        `asyncio.timeout`, loses none. The stream ends when the proxy closes. Raises ClosedError if it is closed
        already, and UnknownSignalError.
        """
        stream = _Events(self._beside, int(min(buffer, BATCH)))
        self._beside.ask(lambda: stream.open(self._proxy.events(buffer, signals=signals, direction=direction)))
        try:
            yield stream
        finally:
            self._beside.ask(stream.close)

    async def wait_for(self, name: str) -> Notification:
        """Wait for the next notification of a signal that is carried from now on, in whichever direction it goes.

        Raises UnknownSignalError, and ClosedError, also if the proxy closes meanwhile.
        """
        return await self._beside.call(functools.partial(self._proxy.wait_for, name))

    async def reload(self, config: Config) -> None:
        """Take another signal table, see `inco_trio.Proxy.reload`."""
        await self._beside.call(functools.partial(self._proxy.reload, config))


class _Events(AsyncIterator[Notification]):
    """An asyncio view of the proxy's Trio event stream."""

    def __init__(self, beside: Beside, batch: int) -> None:
        self._beside = beside
        self._batch = batch
        self._stack = ExitStack()
        self._closed = False
        # Trio's thread appends and asyncio's takes. The next reader gets what was fetched for a cancelled one.
        self._fetched: deque[Notification] = deque()
        self._fetching = asyncio.Lock()

    async def __anext__(self) -> Notification:
        while not (self._fetched or self._closed):
            # Another reader may have fetched some for this one too.
            async with self._fetching:
                if not self._fetched and not await self._fetch():
                    raise StopAsyncIteration
        if self._closed:
            raise ClosedError("the stream of events is closed")
        return self._fetched.popleft()

    async def _fetch(self) -> bool:
        """Wait for notifications; return whether there are any."""
        try:
            await self._beside.call(self._receive)
        except ClosedError:
            if not self._closed:
                # The rest has arrived once Trio has ended.
                await self._beside.ended()
        return bool(self._fetched) or self._closed

    # ----------------------------------------------------------------------------------------------------- there

    def open(self, events: AbstractContextManager[trio.MemoryReceiveChannel[Notification]]) -> None:
        """Use Trio's stream until `close` or until the proxy closes."""
        self._stream = self._stack.enter_context(events)
        self._beside.at_the_end.add(self._end)

    def close(self) -> None:
        self._closed = True
        self._beside.at_the_end.discard(self._end)
        self._stack.close()

    def _end(self) -> None:
        """The proxy has closed; hand over what is still buffered."""
        self._take(sys.maxsize)
        self._stack.close()

    async def _receive(self) -> None:
        """Wait for one notification, and take it and those that are queued behind it."""
        try:
            self._fetched.append(await self._stream.receive())
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise ClosedError("the stream of events has ended") from None
        self._take(self._batch - 1)

    def _take(self, most: int) -> None:
        """Take at most `most` queued notifications."""
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            for _ in range(most):
                self._fetched.append(self._stream.receive_nowait())


# ---------------------------------------------------------------------------- asyncio code in a Trio program


def _import_trio_asyncio() -> Any:
    """Return trio-asyncio. Raise ImportError if it does not work with this Python."""
    try:
        import trio_asyncio
    except AttributeError as error:
        # trio-asyncio 0.16 needs names of asyncio that Python 3.14 removed (its issue 160).
        from importlib.metadata import version

        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"trio-asyncio {version('trio-asyncio')} does not work with Python {python} ({error}): "
            "install a newer trio-asyncio or an older Python"
        ) from error
    return trio_asyncio


class AsyncioProxy:
    """A running proxy as asyncio code uses it, in a trio-asyncio loop; it closes with the Trio proxy."""

    def __init__(self, proxy: trio_proxy.Proxy) -> None:
        self._proxy = proxy

    async def stats(self) -> Stats:
        """Return the current counters."""
        return self._proxy.stats

    async def status(self) -> Status:
        """Return the current state."""
        return self._proxy.status

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal: `Proxy.send`, with the same errors."""
        trio_asyncio = _import_trio_asyncio()

        await trio_asyncio.trio_as_aio(self._proxy.send)(name)

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | None = None
    ) -> Iterator[AsyncIterator[Notification]]:
        """Open a stream of notifications for asyncio's `async for`, with the filters of `Proxy.events`.

        A cancelled `anext`, for example by `asyncio.timeout`, loses no notification.
        """
        with self._proxy.events(buffer, signals=signals, direction=direction) as stream:
            yield _AsyncioEvents(stream)


class _AsyncioEvents(AsyncIterator[Notification]):
    def __init__(self, stream: trio.MemoryReceiveChannel[Notification]) -> None:
        self._stream = stream
        # A task that is cancelled after the fetch and before it runs again leaves the notification to the next reader.
        self._fetched: deque[Notification] = deque()

    async def __anext__(self) -> Notification:
        trio_asyncio = _import_trio_asyncio()

        while not self._fetched:
            try:
                await trio_asyncio.trio_as_aio(self._fetch)()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
        return self._fetched.popleft()

    async def _fetch(self) -> None:
        self._fetched.append(await self._stream.receive())


async def on_notification(
    proxy: trio_proxy.Proxy,
    callback: Callable[[Notification], Awaitable[object]],
    *,
    buffer: int = 1024,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Await the asyncio `callback` for each notification, one after the other, until the proxy closes.

    `task_status.started` is called once no notification is missed any more. While the callback is `buffer`
    notifications behind, further ones pass it by, see `Proxy.events`. What it raises is raised here, as it is.

    Raises ImportError where trio-asyncio does not work with this Python.
    """
    trio_asyncio = _import_trio_asyncio()

    async def call() -> None:
        with proxy.events(buffer) as events:
            task_status.started()
            async for notification in events:
                await trio_asyncio.aio_as_trio(callback)(notification)

    await _in_loop(call)


async def run(proxy: trio_proxy.Proxy, main: Callable[[AsyncioProxy], Awaitable[T]]) -> T:
    """Return what the asyncio function `main` returns. What it raises is raised here, as it is.

    If no trio-asyncio loop is open, `main` has one of its own: the asyncio tasks that it leaves are cancelled at its
    end, as by `asyncio.run`.

    Raises ImportError where trio-asyncio does not work with this Python.
    """
    trio_asyncio = _import_trio_asyncio()

    async def call() -> T:
        result: T = await trio_asyncio.aio_as_trio(main)(AsyncioProxy(proxy))
        return result

    return await _in_loop(call)


async def _in_loop(function: Callable[[], Awaitable[T]]) -> T:
    trio_asyncio = _import_trio_asyncio()

    if trio_asyncio.current_loop.get() is not None:
        return await function()
    # Kept away from the nurseries of the loop, which would wrap it in groups.
    failures: list[BaseException] = []
    try:
        async with trio_asyncio.open_loop():
            try:
                return await function()
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised below, outside of the loop
                failures.append(error)
    except BaseException as error:
        if failures:
            raise BaseExceptionGroup(
                "asyncio code failed, and more of it when it was ended", [*failures, error]
            ) from None
        raise
    raise failures[0]
