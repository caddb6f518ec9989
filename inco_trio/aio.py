"""Let asyncio code take part: a callback for each notification, or a main function that is given the proxy.

Importing this module imports trio-asyncio, which replaces asyncio's event loop policy in the whole process; nothing
else of the package imports it. The functions here are Trio's; what they are given is asyncio's. Both run in the
trio-asyncio loop that is open where they are called, or in one of their own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
import trio_asyncio

from inco_trio.events import Notification
from inco_trio.proxy import Proxy
from inco_trio.stats import Stats

__all__ = ["AsyncioProxy", "on_notification", "run"]

T = TypeVar("T")


class AsyncioProxy:
    """A running proxy as asyncio code uses it, in a trio-asyncio loop; it closes with the Trio proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    @property
    def stats(self) -> Stats:
        """The counters, up to date."""
        return self._proxy.stats

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal: `Proxy.send`, with the same errors."""
        await trio_asyncio.trio_as_aio(self._proxy.send)(name)

    @contextmanager
    def events(self, buffer: int = 1024) -> Iterator[AsyncIterator[Notification]]:
        """A stream of what is carried from now on, in both directions: `Proxy.events`, for asyncio's `async for`.

        A cancelled `anext`, for instance by `asyncio.timeout`, loses no notification.
        """
        with self._proxy.events(buffer) as stream:
            yield _Events(stream)


class _Events(AsyncIterator[Notification]):
    def __init__(self, stream: trio.MemoryReceiveChannel[Notification]) -> None:
        self._stream = stream
        # A task that is cancelled after the fetch and before it runs again leaves the notification to the next reader.
        self._fetched: deque[Notification] = deque()

    async def __anext__(self) -> Notification:
        while not self._fetched:
            try:
                await trio_asyncio.trio_as_aio(self._fetch)()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
        return self._fetched.popleft()

    async def _fetch(self) -> None:
        self._fetched.append(await self._stream.receive())


async def on_notification(
    proxy: Proxy,
    callback: Callable[[Notification], Awaitable[object]],
    *,
    buffer: int = 1024,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Await the asyncio `callback` for each notification, one after the other, until the proxy closes.

    `task_status.started` is called once no notification is missed any more. While the callback is `buffer`
    notifications behind, further ones pass it by, see `Proxy.events`. What it raises is raised here, as it is.
    """

    async def call() -> None:
        with proxy.events(buffer) as events:
            task_status.started()
            async for notification in events:
                await trio_asyncio.aio_as_trio(callback)(notification)

    await _in_loop(call)


async def run(proxy: Proxy, main: Callable[[AsyncioProxy], Awaitable[T]]) -> T:
    """Return what the asyncio function `main` returns. What it raises is raised here, as it is.

    If no trio-asyncio loop is open, `main` has one of its own: the asyncio tasks that it leaves are cancelled at its
    end, as by `asyncio.run`.
    """

    async def call() -> T:
        result: T = await trio_asyncio.aio_as_trio(main)(AsyncioProxy(proxy))
        return result

    return await _in_loop(call)


async def _in_loop(function: Callable[[], Awaitable[T]]) -> T:
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
