"""Helpers that cancel a Trio program, or an asyncio program with Trio in a second thread, at each of its steps."""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Literal, TypeVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.aio import thread as aio_thread

__all__ = ["CancelAt", "Steps", "Turns", "at_each_step"]

T = TypeVar("T")
Steps = Literal["turns of the loop", "steps of Trio"]


class CancelAt(trio.abc.Instrument):
    """An instrument that cancels `scope` before task step number `step`, counted over all tasks; 0 means never."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self.steps = 0
        self._step = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - signature of trio.abc.Instrument
        self.steps += 1
        if self.steps == self._step:
            self.scope.cancel()


class _AtEachStep(trio.abc.Instrument):
    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - signature of trio.abc.Instrument
        self._act()


@contextmanager
def at_each_step(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` before each step of any Trio task while the block runs."""
    instrument = _AtEachStep(act)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


class _Selector(selectors.PollSelector):
    """A selector for an asyncio loop that lets Trio run before each turn of the loop."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return self._turns.next(timeout, super().select)


class Turns(trio.abc.Instrument):
    """A scheduler that lets only one of two threads run at a time: an asyncio loop or the Trio thread of a `Beside`.

    Before each turn of the loop, Trio runs until all of its tasks are waiting. Trio also runs while the loop's thread
    is blocked in a call. Trio's clock stands still, so the order of the steps does not depend on the threads' speed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._free = False
        """Whether waiting for the other thread has failed, so that both threads run without taking turns."""
        self._trio_ended = False
        self._keeper: trio.lowlevel.Task | None = None
        self._act: Callable[[], bool] | None = None
        """The function to call after `_left` more steps of `_kind`."""
        self._kind: Steps = "turns of the loop"
        self._left = 0
        self._held = False
        """Whether Trio is suspended at the step where the loop must call `_act`."""
        self._acted = False
        self._feed: Callable[[], None] | None = None
        self._before = set(threading.enumerate())
        """Threads that were running before this test, such as the thread `inco-trio testing` of the pytest plugin."""

        turns, self._trio_run = self, trio.run
        monkeypatch.setattr(trio, "run", self._run_trio)

        class Answer(Future[T]):
            """A Future that lets Trio run while the loop's thread waits for its result."""

            def result(self, timeout: float | None = None) -> T:
                with turns._asking():
                    self.exception(timeout)
                return super().result()

        monkeypatch.setattr(aio_thread, "Future", Answer)

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Run `main` like `asyncio.run`."""
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(self))) as runner:
            runner.run(main)

    async def at_each(
        self,
        kind: Steps,
        once: Callable[[], Coroutine[Any, Any, object]],
        act: Callable[[asyncio.Task[object]], bool] = asyncio.Task.cancel,
        check: Callable[[], object] = lambda: None,
    ) -> int:
        """Run `once()` repeatedly and call `act` one step later in each run; return the number of successful calls.

        The last run is the one in which `act` returns False, or in which `once()` ends before `act` is due. By default,
        `act` cancels the task of `once()`. If `act` is due at a step of Trio, Trio pauses before this step until the
        loop has handled the effects of `act`. Call `check` after each run.
        """
        for number in count():
            task = asyncio.create_task(once())
            self._act, self._kind, self._left, self._acted = partial(act, task), kind, number, False
            await asyncio.wait({task})
            self._act = None
            check()
            # The task returns normally if it finished its work before the cancellation arrived.
            if not (self._acted and task.cancelled()):
                await task
            if not self._acted:
                break
        return number

    @contextmanager
    def feeding(self, feed: Callable[[], None]) -> Iterator[None]:
        """Call `feed` before each of Trio's turns; `feed` must cause an event that wakes Trio."""
        self._feed = feed
        try:
            yield
        finally:
            self._feed = None

    def next(self, timeout: float | None, select: Callable[[float | None], T]) -> T:
        """Let Trio run, then return the result of `select`."""
        if self._free:
            return select(timeout)
        if self._held:
            found = select(0)
            if found or timeout == 0:
                return found
            self._held = False
        # Count one step before Trio runs and one after it, so that `_act` can be called at either point.
        due = self._reached("turns of the loop")
        if not due:
            if self._feed is not None:
                self._feed()
            with self._trio_running():
                pass
            due = self._held or self._reached("turns of the loop")
        if due:
            assert self._act is not None
            act, self._act = self._act, None
            self._acted = act()
        found = select(0)
        if not (found or due or timeout == 0 or self._feed):
            self.free()
            raise AssertionError("the loop and Trio both wait, and no event can wake them (deadlock)")
        return found

    @contextmanager
    def _trio_running(self) -> Iterator[None]:
        """Let Trio run during the block, and afterwards until all of its tasks are waiting or a step suspends Trio."""
        started = set(threading.enumerate()) - self._before
        threads = [thread for thread in started if thread.name.startswith("inco-trio ")]
        if self._free or not threads:
            yield
            return
        (thread,) = threads
        try:
            self._go.release()
            yield
            self._back.acquire()
        except BaseException:
            self.free()
            raise
        if self._trio_ended:
            thread.join()
            self._trio_ended = False

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Let Trio run while the loop's thread blocks in the middle of a turn and cannot call `_act`."""
        act, self._act = self._act, None
        with self._trio_running():
            yield
        self._act = act

    def free(self) -> None:
        """Let both threads run without taking turns."""
        self._free = True
        self._go.release()

    def _run_trio(self, main: Callable[[], Awaitable[None]], clock: trio.abc.Clock) -> None:  # noqa: ARG002
        """Run `main` as `trio.run` does, but with a stopped clock, and take turns with the asyncio loop."""

        # The shield lets Trio take turns even while it shuts down after a system task has failed.
        keeping = trio.CancelScope(shield=True)

        async def kept() -> None:
            self._keeper = trio.lowlevel.spawn_system_task(self._keep, keeping)
            try:
                await main()
            finally:
                keeping.cancel()

        if not self._free:
            self._go.acquire()
        try:
            self._trio_run(kept, clock=MockClock(), instruments=[self])
        finally:
            self._keeper = None
            self._trio_ended = True
            self._back.release()

    async def _keep(self, scope: trio.CancelScope) -> None:
        """Give the loop a turn whenever all other Trio tasks are waiting."""
        with scope:
            while not self._free:
                await wait_all_tasks_blocked()
                self._give_turn()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `trio.abc.Instrument`."""
        if task is not self._keeper and self._reached("steps of Trio"):
            self._held = True
            self._give_turn()

    def _give_turn(self) -> None:
        if not self._free:
            self._back.release()
            self._go.acquire()

    def _reached(self, kind: Steps) -> bool:
        """Count a step; return whether `_act` is due at this step."""
        if self._act is None or self._kind != kind:
            return False
        self._left -= 1
        return self._left < 0
