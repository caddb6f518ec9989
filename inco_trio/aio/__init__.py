"""The proxy for asyncio code.

`open_proxy` is for asyncio programs: the proxy runs in a separate thread, alongside the asyncio loop. `on_notification`
and `run` are for asyncio code in a Trio program. On first use, they import trio-asyncio. This import replaces asyncio's
event loop policy for the whole process.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import trio

from inco_trio.aio.thread import Beside
from inco_trio.config import Config
from inco_trio.errors import ClosedError
from inco_trio.notification import Notification
from inco_trio.proxy import proxy as trio_proxy
from inco_trio.proxy_status import Status
from inco_trio.signals import Direction
from inco_trio.stats import Stats

__all__ = ["AsyncioProxy", "Proxy", "on_notification", "open_proxy", "run"]

T = TypeVar("T")

BATCH = 64
"""Maximum number of notifications that are passed to the asyncio loop at once."""


def open_proxy(config: Config) -> AbstractAsyncContextManager[Proxy]:
    """Run a proxy in a separate thread while the block runs, and stop the proxy cleanly when the block ends.

    The proxy continues while the asyncio loop sleeps or waits in a system call. While the loop runs Python code, the
    threads take turns (GIL): a notification can take longer by about `sys.getswitchinterval()` (5 ms). A C function
    that does not release the GIL stops the proxy until it returns. Raises the errors of `inco_trio.open_proxy`.
    """
    return _Opening(config)


class _Opening(AbstractAsyncContextManager["Proxy"]):
    """The context manager of `open_proxy`."""

    # This is a class because, before Python 3.13, closing a coroutine did not close asynchronous generators inside it.
    def __init__(self, config: Config) -> None:
        self._config = config

    async def __aenter__(self) -> Proxy:
        self._beside = Beside(self._config)
        return Proxy(await self._beside.__aenter__())

    async def __aexit__(self, *error: Any) -> None:
        await self._beside.__aexit__(*error)


class Proxy:
    """A running proxy for an asyncio program. Use it only in the loop in which `open_proxy` opened it.

    When a method raises `asyncio.CancelledError`, the cancelled operation has already ended.
    """

    def __init__(self, beside: Beside) -> None:
        self._beside, self._proxy = beside, beside.proxy

    @property
    def config(self) -> Config:
        """The configuration with which the proxy was opened or last reloaded."""
        return self._proxy.config

    async def stats(self) -> Stats:
        """Return the current counters."""
        return await self._beside.read(lambda: self._proxy.stats)

    async def status(self) -> Status:
        """Return the current state."""
        return await self._beside.read(lambda: self._proxy.status)

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal, and wait until the link has accepted the frame.

        If the link is down and `send` is cancelled, the proxy may still send the frame later. Raises
        UnknownSignalError, and ClosedError once the proxy is closing.
        """
        await self._beside.call(functools.partial(self._proxy.send, name))

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | str | None = None
    ) -> Iterator[AsyncIterator[Notification]]:
        """Open a stream of new notifications, for `signals` (default: all) and `direction` (default: both).

        The loop receives notifications in batches of at most 64. The proxy never waits for the reader. A reader that
        falls behind by more than `buffer` and one batch misses notifications; `Stats.events_lost` counts them. If
        `anext` is cancelled, for example by `asyncio.timeout`, no notification is lost. The stream ends when the proxy
        closes. Raises UnknownSignalError, and ClosedError if the proxy is already closed.
        """
        stream = _Events(self._beside, int(min(buffer, BATCH)))
        self._beside.ask(lambda: stream.open(self._proxy.events(buffer, signals=signals, direction=direction)))
        try:
            yield stream
        finally:
            self._beside.ask(stream.close)

    async def wait_for(self, name: str) -> Notification:
        """Wait for the next notification of a signal. Raises UnknownSignalError, or ClosedError if the proxy closes."""
        return await self._beside.call(functools.partial(self._proxy.wait_for, name))

    async def reload(self, config: Config) -> None:
        """Replace the signal table; see `inco_trio.Proxy.reload`."""
        await self._beside.call(functools.partial(self._proxy.reload, config))


class _Events(AsyncIterator[Notification]):
    """An asyncio view of the proxy's Trio event stream."""

    def __init__(self, beside: Beside, batch: int) -> None:
        self._beside, self._batch = beside, batch
        self._stack = ExitStack()
        self._closed = False
        # The Trio thread appends batches. If the waiting reader is cancelled, the next reader gets the batch.
        self._fetched: deque[Notification] = deque()
        self._fetching = asyncio.Lock()

    async def __anext__(self) -> Notification:
        while not (self._fetched or self._closed):
            # Another reader may have fetched notifications while this reader waited for the lock.
            async with self._fetching:
                if not self._fetched and not await self._fetch():
                    raise StopAsyncIteration
        if self._closed:
            raise ClosedError("the event stream is closed")
        return self._fetched.popleft()

    async def _fetch(self) -> bool:
        """Wait for notifications, which other readers may take first; return False at the end of the stream."""
        try:
            await self._beside.call(self._receive)
        except ClosedError:
            if not self._closed:
                # Wait until Trio has stopped and `_end` has fetched the last notifications.
                await self._beside.ended()
            return bool(self._fetched) or self._closed
        return True

    # Only the Trio thread calls the methods below.

    def open(self, events: AbstractContextManager[trio.MemoryReceiveChannel[Notification]]) -> None:
        """Read from Trio's stream until `close` is called or the proxy closes."""
        self._stream = self._stack.enter_context(events)
        self._beside.at_the_end.add(self._end)

    def close(self) -> None:
        self._closed = True
        self._beside.at_the_end.discard(self._end)
        self._stack.close()

    def _end(self) -> None:
        """Fetch all notifications that are still buffered after the proxy has closed."""
        self._take(sys.maxsize)
        self._stack.close()

    async def _receive(self) -> None:
        """Wait for a notification, and fetch it together with the notifications queued behind it."""
        try:
            self._fetched.append(await self._stream.receive())
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise ClosedError("the event stream has ended") from None
        self._take(self._batch - 1)

    def _take(self, most: int) -> None:
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            for _ in range(most):
                self._fetched.append(self._stream.receive_nowait())


def _import_trio_asyncio() -> Any:
    """Import trio-asyncio. Raises ImportError if it does not work with this Python version."""
    try:
        import trio_asyncio
    except AttributeError as error:
        # trio-asyncio 0.16 uses names that Python 3.14 removed from asyncio (trio-asyncio issue 160).
        from importlib.metadata import version

        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"trio-asyncio {version('trio-asyncio')} does not work with Python {python} ({error}): "
            "install a newer trio-asyncio or an older Python"
        ) from error
    return trio_asyncio


class AsyncioProxy:
    """A running proxy for asyncio code in a trio-asyncio loop. It closes when the Trio proxy closes."""

    def __init__(self, proxy: trio_proxy.Proxy) -> None:
        self._proxy = proxy

    async def stats(self) -> Stats:
        """Return the current counters."""
        return self._proxy.stats

    async def status(self) -> Status:
        """Return the current state."""
        return self._proxy.status

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal, like `Proxy.send`. Raises the same errors."""
        await _await_trio(self._proxy.send, name)

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | None = None
    ) -> Iterator[AsyncIterator[Notification]]:
        """Open a stream of notifications, like `Proxy.events`. Cancelling `anext` loses no notification."""
        with self._proxy.events(buffer, signals=signals, direction=direction) as stream:
            yield _AsyncioEvents(stream)


class _AsyncioEvents(AsyncIterator[Notification]):
    def __init__(self, stream: trio.MemoryReceiveChannel[Notification]) -> None:
        self._stream = stream
        # If a reader is cancelled after the fetch but before it resumes, another reader gets the notification.
        self._fetched: deque[Notification] = deque()
        # Use Trio's lock: asyncio resumes a cancelled reader before the fetch, a Trio task, has ended.
        self._fetching = trio.Lock()

    async def __anext__(self) -> Notification:
        while not self._fetched:
            try:
                await _await_trio(self._fetch)
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
            except trio.ClosedResourceError:
                raise ClosedError("the event stream is closed") from None
        return self._fetched.popleft()

    async def _fetch(self) -> None:
        """Wait for a notification, which another reader may take first."""
        async with self._fetching:
            if not self._fetched:
                self._fetched.append(await self._stream.receive())


async def _await_trio(function: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Await a Trio function. If the task is cancelled, raise CancelledError once the function has ended.

    trio-asyncio drops a cancellation that arrives when the function can only end normally.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - only a task can await this function
    requests = task.cancelling()
    try:
        await _import_trio_asyncio().trio_as_aio(function)(*arguments)
    finally:
        if task.cancelling() > requests:
            raise asyncio.CancelledError


async def on_notification(
    proxy: trio_proxy.Proxy,
    callback: Callable[[Notification], Awaitable[object]],
    *,
    buffer: int = 1024,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Await the asyncio `callback` for each notification, one at a time, until the proxy closes.

    `task_status.started` is called once the stream is open. From then on, the callback misses notifications only if it
    falls more than `buffer` behind; see `Proxy.events`. Exceptions from the callback are raised unchanged. Raises
    ImportError if trio-asyncio does not work with this Python version.
    """

    async def call() -> None:
        with proxy.events(buffer) as events:
            task_status.started()
            async for notification in events:
                await _import_trio_asyncio().aio_as_trio(callback)(notification)

    await _in_loop(call)


async def run(proxy: trio_proxy.Proxy, main: Callable[[AsyncioProxy], Awaitable[T]]) -> T:
    """Run the asyncio function `main` and return its result. If `main` raises an exception, raise it unchanged.

    If no trio-asyncio loop is open, `main` runs in a new loop. When `main` ends, the remaining tasks of this loop are
    cancelled, as with `asyncio.run`. Raises ImportError if trio-asyncio does not work with this Python version.
    """

    async def call() -> T:
        result: T = await _import_trio_asyncio().aio_as_trio(main)(AsyncioProxy(proxy))
        return result

    return await _in_loop(call)


async def _in_loop(function: Callable[[], Awaitable[T]]) -> T:
    trio_asyncio = _import_trio_asyncio()
    if trio_asyncio.current_loop.get() is not None:
        return await function()
    # Raise the exception outside the loop: the loop's nurseries would wrap it in exception groups.
    failures: list[BaseException] = []
    try:
        async with trio_asyncio.open_loop():
            try:
                return await function()
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised below, outside of the loop
                failures.append(error)
    except BaseException as error:
        if failures:
            text = "asyncio code failed, and its remaining tasks failed when they were cancelled"
            raise BaseExceptionGroup(text, [*failures, error]) from None
        raise
    raise failures[0]
