"""A proxy beside an asyncio loop: its Trio runs in a thread of its own, so that a busy loop holds nothing up.

*Here* is asyncio's thread, *there* is Trio's. Nothing but `run_sync_soon` and `call_soon_threadsafe` goes between them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import attrs
import trio

from inco_trio.config import Config
from inco_trio.errors import ClosedError, IncoError, ResourceError
from inco_trio.proxy.proxy import Proxy, open_proxy
from inco_trio.registers.refusals import refusal

__all__ = ["Beside"]

T = TypeVar("T")


@attrs.define(eq=False)
class _Call(Generic[T]):
    """A Trio function that runs there, awaited here."""

    function: Callable[[], Awaitable[T]]
    ended: asyncio.Future[None]
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    results: list[T] = attrs.Factory(list)
    """What it returned, if it did."""
    error: Exception = attrs.Factory(lambda: ClosedError("the proxy is closed"))
    """What it raised, or why it was not called."""

    async def run(self) -> None:
        """There: call it."""
        with self.scope:
            try:
                self.results.append(await self.function())
            except Exception as error:  # noqa: BLE001 - raised here
                self.error = error

    def result(self) -> T:
        """What it returned, or raises what it raised."""
        if not self.results:
            raise self.error
        return self.results[0]


class Beside:
    """A proxy that runs while the `async with` block does; raises as `proxy.open_proxy`."""

    proxy: Proxy
    """Trio's; to be used there, once the block is entered."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=f"inco-trio {config.address.label}", daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._block_ended = trio.Event()
        self._ending = self._open = self._over = self._block_cancelled = False
        self._failure: BaseException | None = None
        self.at_the_end: set[Callable[[], None]] = set()
        """What is called there once the proxy is closed and no call runs any more."""

    # ------------------------------------------------------------------------------------------------------ here

    async def __aenter__(self) -> Beside:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - only a task can await this
        self._task, self._cancelling = task, task.cancelling()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError(f"a thread for {self._config.link}: {error}") from error
        # A thread that Python waited for at its exit would keep it from ending if the loop is left without a word.
        atexit.register(self._abandon)
        try:
            await asyncio.wait({self._opened})
        except GeneratorExit:
            self._abandon()
            raise
        except asyncio.CancelledError:
            await self._stop()
            raise
        if not self._open:
            await self._stop()
            assert self._failure is not None  # noqa: S101 - see `_main`
            raise self._failure
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, GeneratorExit):  # The loop has gone: there is nothing to await.
            self._abandon()
            return
        cancelled = await self._stop()
        if self._block_cancelled:
            self._task.uncancel()
        if isinstance(error, asyncio.CancelledError):
            cancelled, error = error, None
        if error is None and self._failure is None:
            if cancelled is not None:
                raise cancelled
            return
        if cancelled is not None and self._task.cancelling() > self._cancelling:
            # An error hides the cancellation: it comes again where the task waits next, as with asyncio.TaskGroup.
            self._task.uncancel()
            self._task.cancel()
        if self._failure is None:
            return
        if error is None:
            raise self._failure from None
        raise BaseExceptionGroup("the proxy and the block that used it failed", [error, self._failure]) from None

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """What a Trio function returns or raises there; raises ClosedError where there is no Trio any more.

        A cancellation is passed on to it, and raised here once it has ended.
        """
        call = _Call(function, self._loop.create_future())
        self._there(self._start, call)
        cancelled: asyncio.CancelledError | None = None
        while not (call.ended.done() or self._ended.done()):
            try:
                await asyncio.wait({call.ended, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError as error:
                if cancelled is None:
                    with contextlib.suppress(ClosedError):
                        self._there(call.scope.cancel)
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return call.result()

    def ask(self, function: Callable[[], T]) -> T:
        """What a plain function returns or raises there; this thread waits for it. Once Trio has ended it runs here."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 - raised here
                answer.set_exception(error)

        try:
            self._there(run)
        except ClosedError:
            return function()
        return answer.result()

    async def read(self, function: Callable[[], T]) -> T:
        """Return the result of a plain function of the Trio thread without blocking the loop."""

        async def call() -> T:
            return function()

        try:
            return await self.call(call)
        except ClosedError:
            return function()  # Trio has ended, and nothing changes any more.

    async def ended(self) -> None:
        """Wait until Trio has ended."""
        await asyncio.wait({self._ended})

    def _there(self, function: Callable[..., object], *args: object) -> None:
        """Call it there. Raises ClosedError once Trio has ended; what does not raise it is called."""
        assert self._token is not None  # noqa: S101 - the block is entered
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise ClosedError("the proxy is closed") from None

    async def _stop(self) -> asyncio.CancelledError | None:
        """Have the proxy stopped and its thread end, whoever cancels that; returns how."""
        self._end()
        cancelled = None
        try:
            # At least once, even if it has ended: a cancellation that was asked for and not met yet is met here.
            while True:
                try:
                    await asyncio.wait({self._ended})
                    break
                except asyncio.CancelledError as error:
                    cancelled = error
        finally:
            # It ends now, unless Ctrl-C came again, or the loop has gone.
            self._join()
        return cancelled

    def _abandon(self) -> None:
        """The same without a loop."""
        self._end()
        self._join()

    def _end(self) -> None:
        self._ending = True
        # Otherwise `_main` sees it.
        if self._token is not None:
            with contextlib.suppress(ClosedError):
                self._there(self._end_block)

    def _join(self) -> None:
        self._thread.join()
        atexit.unregister(self._abandon)

    def _cancel_block(self) -> None:
        """The proxy has failed."""
        if not self._ending:
            self._block_cancelled = True
            self._task.cancel()

    def _has_opened(self) -> None:
        self._open = True
        self._opened.set_result(None)

    def _has_ended(self) -> None:
        self._ended.set_result(None)
        if not self._opened.done():
            self._opened.set_result(None)
        else:
            self._cancel_block()

    # ----------------------------------------------------------------------------------------------------- there

    def _run(self) -> None:
        """The thread."""
        try:
            trio.run(self._main)
        except IncoError as error:
            self._failure = error
        except OSError as error:
            self._failure = refusal(error, f"Trio for {self._config.link}")
            self._failure.__cause__ = error
        except BaseException as error:  # noqa: BLE001 - raised here
            self._failure = error
        self._here(self._has_ended)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._ending:
            self._end_block()
        async with trio.open_nursery() as self._calls:
            try:
                await self._carry()
            except Exception as error:  # noqa: BLE001 - raised here, and calls end by themselves
                self._failure = error
            self._over = True
        for function in tuple(self.at_the_end):
            function()

    async def _carry(self) -> None:
        """Have the proxy open until the block ends."""
        with self._scope:
            async with open_proxy(self._config) as self.proxy:
                self._here(self._has_opened)
                try:
                    await trio.sleep_forever()
                finally:
                    if not self._scope.cancel_called:
                        # A leg has failed. The others go on until the block has ended, as they do for Trio's.
                        self._here(self._cancel_block)
                        with trio.CancelScope(shield=True):
                            await self._block_ended.wait()

    def _end_block(self) -> None:
        self._scope.cancel()
        self._block_ended.set()

    def _start(self, call: _Call[object]) -> None:
        if self._over:
            self._here(call.ended.set_result, None)
        else:
            self._calls.start_soon(self._run_call, call)

    async def _run_call(self, call: _Call[object]) -> None:
        try:
            await call.run()
        finally:
            self._here(call.ended.set_result, None)

    def _here(self, function: Callable[..., object], *args: object) -> None:
        """Call it in the loop; one that has been closed is told nothing."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
