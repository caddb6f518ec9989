"""A proxy in a Trio thread. Trio calls asyncio with `call_soon_threadsafe`; asyncio calls Trio with `run_sync_soon`."""

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
from inco_trio.trio_clock import RealClock

__all__ = ["Beside"]

T = TypeVar("T")


@attrs.define(eq=False)
class _Call(Generic[T]):
    """A call to a Trio function that the asyncio thread awaits."""

    function: Callable[[], Awaitable[T]]
    ended: asyncio.Future[None]
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    results: list[T] = attrs.Factory(list)
    """The result of the function; empty until the function has returned."""
    error: Exception = attrs.Factory(lambda: ClosedError("the proxy is closed"))
    """The exception that the function raised, or the reason why the function was not called."""

    def result(self) -> T:
        if not self.results:
            raise self.error
        return self.results[0]


class Beside:
    """A proxy that runs in a Trio thread during the `async with` block. Raises the errors of `proxy.open_proxy`."""

    proxy: Proxy
    """The Trio proxy. Only the Trio thread may use it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[bool] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=f"inco-trio {config.address.label}", daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._block_ended = trio.Event()
        self._ending = self._over = self._block_cancelled = False
        self._failure: BaseException | None = None
        self.at_the_end: set[Callable[[], None]] = set()
        """Functions that the Trio thread calls once the proxy is closed and all calls have ended."""

    async def __aenter__(self) -> Beside:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - only a task can await `__aenter__`
        self._task, self._cancelling = task, task.cancelling()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError(self._config.link, f"cannot start a thread: {error}") from error
        # The thread must be a daemon: Python joins all other threads before it calls exit handlers such as `_abandon`.
        atexit.register(self._abandon)
        try:
            await asyncio.wait({self._opened})
        except GeneratorExit:
            self._abandon()
            raise
        except asyncio.CancelledError:
            await self._stop()
            raise
        if not self._opened.result():
            await self._stop()
            assert self._failure is not None  # noqa: S101 - `_run` has set it
            raise self._failure
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, GeneratorExit):  # The event loop was discarded, so nothing can be awaited.
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
            # The error hides the cancellation, so cancel the task again at its next `await`, as asyncio.TaskGroup does.
            self._task.uncancel()
            self._task.cancel()
        if self._failure is None:
            return
        if error is None:
            raise self._failure from None
        raise BaseExceptionGroup("the proxy and the block that used it failed", [error, self._failure]) from None

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a Trio function in the Trio thread and return its result. Raises ClosedError once Trio has stopped.

        If the caller is cancelled, cancel the Trio function, and raise the cancellation once the function has ended.
        """
        call = _Call(function, self._loop.create_future())
        self._in_trio(self._start, call)
        cancelled: asyncio.CancelledError | None = None
        while not (call.ended.done() or self._ended.done()):
            try:
                await asyncio.wait({call.ended, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError as error:
                if cancelled is None:
                    with contextlib.suppress(ClosedError):
                        self._in_trio(call.scope.cancel)
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return call.result()

    def ask(self, function: Callable[[], T]) -> T:
        """Run a plain function in the Trio thread and block until it returns. If Trio has stopped, call it directly."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 - `answer.result` raises the error
                answer.set_exception(error)

        try:
            self._in_trio(run)
        except ClosedError:
            return function()
        return answer.result()

    async def read(self, function: Callable[[], T]) -> T:
        """Run a plain function in the Trio thread without blocking the loop, and return its result."""

        async def call() -> T:
            return function()

        try:
            return await self.call(call)
        except ClosedError:
            return function()  # Trio has stopped, so the proxy's state can no longer change.

    async def ended(self) -> None:
        await asyncio.wait({self._ended})

    def _in_trio(self, function: Callable[..., object], *args: object) -> None:
        """Schedule a function call in the Trio thread. Raises ClosedError once Trio has stopped."""
        assert self._token is not None  # noqa: S101 - the block is entered
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise ClosedError("the proxy is closed") from None

    async def _stop(self) -> asyncio.CancelledError | None:
        """Stop the proxy and its thread, even if the caller is cancelled. Return the cancellation, or None."""
        self._end()
        cancelled = None
        try:
            # Wait at least once, even if Trio has stopped: this wait raises a cancellation that was requested earlier.
            while True:
                try:
                    await asyncio.wait({self._ended})
                    break
                except asyncio.CancelledError as error:
                    cancelled = error
        finally:
            # The thread has usually ended already. `_join` blocks only after a second Ctrl-C, or if the loop was
            # discarded.
            self._join()
        return cancelled

    def _abandon(self) -> None:
        """Stop the proxy and its thread when no event loop is running."""
        self._end()
        self._join()

    def _end(self) -> None:
        self._ending = True
        # If `_token` is None, `_main` has not started yet and will check `_ending` itself.
        if self._token is not None:
            with contextlib.suppress(ClosedError):
                self._in_trio(self._end_block)

    def _join(self) -> None:
        self._thread.join()
        atexit.unregister(self._abandon)

    def _cancel_block(self) -> None:
        """Cancel the block because the proxy has failed."""
        if not self._ending:
            self._block_cancelled = True
            self._task.cancel()

    def _has_ended(self) -> None:
        self._ended.set_result(None)
        if not self._opened.done():
            self._opened.set_result(False)
        else:
            self._cancel_block()

    # Only the Trio thread calls the methods below.

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=RealClock())
        except IncoError as error:
            self._failure = error
        except OSError as error:
            self._failure = refusal(error, f"Trio for {self._config.link}")
            self._failure.__cause__ = error
        except BaseException as error:  # noqa: BLE001 - the asyncio thread raises the error
            self._failure = error
        self._in_loop(self._has_ended)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._ending:
            self._end_block()
        async with trio.open_nursery() as self._calls:
            try:
                await self._keep_open()
            except Exception as error:  # noqa: BLE001 - the asyncio thread raises the error; calls still end
                self._failure = error
            self._over = True
        for function in tuple(self.at_the_end):
            function()

    async def _keep_open(self) -> None:
        with self._scope:
            async with open_proxy(self._config) as self.proxy:
                self._in_loop(self._opened.set_result, True)
                try:
                    await trio.sleep_forever()
                finally:
                    if not self._scope.cancel_called:
                        # A task of the proxy failed. Keep the other tasks running until the block ends, as in Trio.
                        self._in_loop(self._cancel_block)
                        with trio.CancelScope(shield=True):
                            await self._block_ended.wait()

    def _end_block(self) -> None:
        self._scope.cancel()
        self._block_ended.set()

    def _start(self, call: _Call[object]) -> None:
        if self._over:
            self._in_loop(call.ended.set_result, None)
        else:
            self._calls.start_soon(self._run_call, call)

    async def _run_call(self, call: _Call[object]) -> None:
        try:
            with call.scope:
                try:
                    call.results.append(await call.function())
                except Exception as error:  # noqa: BLE001 - `_Call.result` raises the error
                    call.error = error
        finally:
            self._in_loop(call.ended.set_result, None)

    def _in_loop(self, function: Callable[..., object], *args: object) -> None:
        """Schedule a function call in the asyncio loop. Do nothing if the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
