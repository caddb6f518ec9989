"""The thread behind the boards of a test process: one Trio loop, one inotify instance, and what all boards share.

A test calls it from its own thread, and may be in an event loop of its own, of any kind.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import math
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from inco_trio.errors import IncoError, from_os_error, unwrapped
from inco_trio.links.opening import Surroundings
from inco_trio.linux.inotify import (
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_TO,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
    parse_events,
)
from inco_trio.signals import Direction, Signal

__all__ = ["Engine", "Watcher", "engine", "stop_engine"]

T = TypeVar("T")

_DIRECTORY = IN_CLOSE_WRITE | IN_MODIFY | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
_PARENT = IN_CREATE | IN_MOVED_TO | IN_ONLYDIR


class _Followed:
    """A directory of registers, which may be replaced by another one of the same path."""

    def __init__(self, path: Path, told: Callable[[Signal | None], None]) -> None:
        self.path = path
        self.told = told
        self.signals: dict[bytes, list[Signal]] = {}
        self.written: set[bytes] = set()
        """Files that were written, and not closed since."""


class Watcher:
    """Tells of each notification at the registers of core 0, as inotify(7) reports it.

    One of an inbound signal is a close of its state file after a write; one of an outbound signal is any close of its
    trigger after it was opened for writing, or a file that is renamed onto it. The proxy makes triggers without.
    """

    def __init__(self) -> None:
        try:
            self._inotify = Inotify()
        except OSError as error:
            raise from_os_error(error, "inotify") from error
        self._followed: dict[int, _Followed] = {}
        self._parents: dict[int, dict[bytes, _Followed]] = {}
        self._buffer = memoryview(bytearray(1 << 16))

    def follow(self, signals: tuple[Signal, ...], told: Callable[[Signal | None], None]) -> None:
        """Tell `told` of each notification of these signals, and None if some may have been missed.

        Their directories are made. Raises OSError.
        """
        directories: dict[Path, _Followed] = {}
        for signal in signals:
            path = signal.directory
            if path not in directories:
                path.mkdir(parents=True, exist_ok=True)
                followed = directories[path] = _Followed(path, told)
                parent = self._inotify.watch(str(path.parent), _PARENT)
                self._parents.setdefault(parent, {})[os.fsencode(path.name)] = followed
                self._watch(followed)
            directories[path].signals.setdefault(os.fsencode(signal.register), []).append(signal)

    def forget(self, told: Callable[[Signal | None], None]) -> None:
        """Follow no more."""
        for wd in [wd for wd, followed in self._followed.items() if followed.told == told]:
            del self._followed[wd]
            self._inotify.unwatch(wd)
        for wd, names in list(self._parents.items()):
            if all(followed.told == told for followed in names.values()):
                del self._parents[wd]
                self._inotify.unwatch(wd)

    def _watch(self, followed: _Followed) -> None:
        try:
            wd = self._inotify.watch(str(followed.path), _DIRECTORY)
        except OSError:
            return  # It is told of when it comes.
        for old in [old for old, each in self._followed.items() if each is followed and old != wd]:
            del self._followed[old]
            self._inotify.unwatch(old)
        self._followed[wd] = followed

    async def run(self) -> None:
        """Tell, until cancelled."""
        while True:
            await self._inotify.wait_readable()
            self.drain()

    def drain(self) -> None:
        """Tell of what is queued."""
        while length := self._inotify.read_into(self._buffer):
            for wd, mask, name in parse_events(self._buffer[:length]):
                if mask & IN_Q_OVERFLOW:
                    for told in {followed.told for followed in self._followed.values()}:
                        told(None)
                elif wd in self._parents and name in self._parents[wd]:
                    self._watch(self._parents[wd][name])
                elif (followed := self._followed.get(wd)) is not None:
                    self._event(wd, followed, mask, name)

    def _event(self, wd: int, followed: _Followed, mask: int, name: bytes) -> None:
        if mask & IN_IGNORED:
            self._inotify.forget(wd)
            self._followed.pop(wd, None)
            self._watch(followed)
        elif mask & IN_MOVE_SELF:
            self._watch(followed)
        elif name not in followed.signals:
            pass
        elif mask & IN_MODIFY:
            followed.written.add(name)
        else:
            written = name in followed.written
            followed.written.discard(name)
            for signal in followed.signals[name]:
                inbound = signal.direction is Direction.INBOUND
                if (mask & IN_CLOSE_WRITE and (written or not inbound)) or (mask & IN_MOVED_TO and not inbound):
                    followed.told(signal)

    def close(self) -> None:
        """Close the descriptor."""
        self._inotify.close()


class Engine:
    """The running thread; `engine` has the only one."""

    def __init__(self) -> None:
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="inco-trio testing", daemon=True)
        self._thread.start()
        self._started.result()

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(unwrapped(error))

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.around = Surroundings()
        self.watcher = Watcher()
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.watcher.run)
                self._started.set_result(None)
                await trio.sleep(math.inf)
        finally:
            self.watcher.close()
            self.around.close()

    def run(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """The result of an async function, run in the thread; what it raises is raised here."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def call() -> None:
            try:
                done.set_result(await function(*args))
            except Exception as error:  # noqa: BLE001 - raised in the other thread
                done.set_exception(error)
            except BaseException:
                done.set_exception(IncoError("the boards of this process were ended"))
                raise

        def begin() -> None:
            try:
                self.nursery.start_soon(call)
            except RuntimeError:  # It is about to end.
                done.set_exception(IncoError("the boards of this process were ended"))

        self.soon(begin)
        return done.result()

    def soon(self, function: Callable[..., object], *args: object) -> None:
        """Call a function in the thread, in the order of these calls, without waiting for it. Raises IncoError."""
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            raise IncoError("the boards of this process were ended") from None

    def stop(self) -> None:
        """End the thread, and with it what runs in there."""
        with contextlib.suppress(IncoError):
            self.soon(self.nursery.cancel_scope.cancel)
        self._thread.join()

    @property
    def running(self) -> bool:
        """Whether its thread goes on: a fault of ours ends it, and the boards that it has."""
        return self._thread.is_alive()


_engine: Engine | None = None
_making = threading.Lock()


def engine() -> Engine:
    """The engine of this process, started when it is first asked for. Raises ResourceError."""
    global _engine
    with _making:
        if _engine is None or not _engine.running:
            _engine = Engine()
            atexit.register(stop_engine)
        return _engine


def stop_engine() -> None:
    """End the engine, if there is one; the next board has another one."""
    global _engine
    with _making:
        if _engine is not None:
            _engine.stop()
            _engine = None
