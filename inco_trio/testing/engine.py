"""The thread that runs all boards of a test process in one Trio loop. Tests call it from their own threads."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from inco_trio.cores.watch import Watch
from inco_trio.errors import IncoError, ResourceError, unwrapped
from inco_trio.links.opening import Surroundings
from inco_trio.trio_clock import RealClock

__all__ = ["Engine", "engine", "stop_engine"]

T = TypeVar("T")
ENDED = "all boards of this process are closed"


class Engine:
    """The thread that serves all boards. The function `engine` returns the only instance."""

    def __init__(self) -> None:
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="inco-trio testing", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError("the boards under test", f"cannot start a thread: {error}") from error
        self._started.result()

    def _run(self) -> None:
        try:
            trio.run(self._serve, clock=RealClock())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(unwrapped(error))

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.around = Surroundings()
        self.watch = Watch()
        try:
            async with trio.open_nursery() as self.nursery:
                self._started.set_result(None)
                while True:
                    await self.watch.wait_readable()
                    self.watch.drain()
        finally:
            self.watch.close()
            self.around.close()

    def run(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run an async function in the thread and return its result, or raise its exception."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def call() -> None:
            try:
                done.set_result(await function(*args))
            except Exception as error:  # noqa: BLE001 - the calling thread raises the error
                done.set_exception(error)
            except BaseException:
                done.set_exception(IncoError(ENDED))
                raise

        def begin() -> None:
            try:
                self.nursery.start_soon(call)
            except RuntimeError:  # The nursery is closed: the engine has ended.
                done.set_exception(IncoError(ENDED))

        self.soon(begin)
        return done.result()

    def soon(self, function: Callable[..., object], *args: object) -> None:
        """Schedule a function call in the thread, and return immediately. Calls keep their order. Raises IncoError."""
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise IncoError(ENDED) from None

    def stop(self) -> None:
        """End the thread and its boards."""
        with contextlib.suppress(IncoError):
            self.soon(self.nursery.cancel_scope.cancel)
        self._thread.join()

    @property
    def running(self) -> bool:
        """Whether the thread is running. A bug in this package can end the thread and its boards."""
        return self._thread.is_alive()


_engine: Engine | None = None
_making = threading.Lock()


def engine() -> Engine:
    """Return the engine of this process. The first call starts it. Raises ResourceError."""
    global _engine
    with _making:
        if _engine is None or not _engine.running:
            _engine = Engine()
            atexit.register(stop_engine)
        return _engine


def stop_engine() -> None:
    """Stop the engine if it is running. The next board starts a new one."""
    global _engine
    with _making:
        if _engine is not None:
            _engine.stop()
            _engine = None
