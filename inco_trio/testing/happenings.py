"""The events at both cores of a board under test. Tests can wait for them in any thread or event loop."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import attrs

from inco_trio import real_clock
from inco_trio.errors import ResourceError
from inco_trio.signals import Direction

__all__ = ["Happening", "History", "NotificationMissingError", "runs", "summary"]

SINGLE = 3
"""Maximum number of consecutive identical events that are shown individually."""
LISTED = 20
"""Maximum number of events, or of runs of identical events, in an error message."""


class NotificationMissingError(AssertionError):
    """An expected notification did not arrive. The message lists the events at the core."""


@attrs.frozen
class Happening:
    """A notification at a core, or an event between the cores, such as a link that was taken down."""

    core: int | None
    what: str
    """`triggers`, `sends` or `gets` for a notification; otherwise a description."""
    name: str
    """The wire name, or an empty string."""
    monotonic_ns: int
    """The time (time.monotonic_ns()) at which the test saw the event."""
    time_ns: int
    """The time (time.time_ns()) at which the test saw the event."""
    direction: Direction | None = None
    frame: bytes | None = None


def runs(happenings: Iterable[Happening]) -> list[Sequence[Happening]]:
    """Group consecutive identical events if there are more than `SINGLE`. Every other event forms a group by itself."""
    found: list[Sequence[Happening]] = []
    for _, group in itertools.groupby(happenings, key=lambda each: (each.core, each.what, each.name)):
        equal = list(group)
        found += [equal] if len(equal) > SINGLE else [[each] for each in equal]
    return found


def summary(run: Sequence[Happening], within: str = "") -> str:
    """Describe a group of identical events. `within` follows their number."""
    text = f"{run[0].what} {run[0].name}".rstrip()
    return text if len(run) == 1 else f"{text} ({len(run)} times{within})"


class History:
    """The events in the order in which they occurred. One thread adds events. Any thread may wait for them."""

    def __init__(self) -> None:
        self._happenings: list[Happening] = []
        self._taken: dict[tuple[int, str], int] = {}
        self.failure: str | None = None
        """The reason why no more events are expected, or None."""
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], object]] = set()

    def add(
        self,
        core: int | None,
        what: str,
        name: str = "",
        direction: Direction | None = None,
        frame: bytes | None = None,
    ) -> None:
        happening = Happening(core, what, name, real_clock.monotonic_ns(), real_clock.time_ns(), direction, frame)
        with self._lock:
            self._happenings.append(happening)
        self._wake()

    def fail(self, failure: str | None) -> None:
        """Make current and later waits fail with the reason `failure`. With None, allow waits again."""
        self.failure = failure
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def all(self, core: int | None = None) -> list[Happening]:
        """Return the events at a core, or all events."""
        with self._lock:
            return [each for each in self._happenings if core is None or each.core == core]

    def take(self, core: int, name: str) -> Happening | None:
        """Return the first notification of a signal at a core that no earlier call has returned, or None."""
        with self._lock:
            taken = self._taken.get((core, name), 0)
            for number, each in enumerate(self._happenings[taken:], taken):
                if each.core == core and each.name == name:
                    self._taken[core, name] = number + 1
                    return each
            return None

    @contextlib.contextmanager
    def _listening(self, listener: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            self._listeners.add(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def _missing(self, core: int, name: str, timeout: float) -> NotificationMissingError:
        why = f"within {timeout:g} s" if self.failure is None else f"({self.failure})"
        came = ", ".join(summary(run) for run in runs(self.all(core))[-LISTED:]) or "nothing"
        return NotificationMissingError(f"{name}: did not arrive at core {core} {why}; events at this core: {came}")

    def wait(self, core: int, name: str, timeout: float) -> Happening:
        """Wait until `take` returns a notification. Raises NotificationMissingError after `timeout` seconds."""
        __tracebackhide__ = True  # Make pytest show the caller's line instead of this line.
        news = threading.Event()
        end = real_clock.monotonic() + timeout
        with self._listening(news.set):
            while True:
                news.clear()
                left = end - real_clock.monotonic()
                over = self.failure is not None or left <= 0
                if (found := self.take(core, name)) is not None:
                    return found
                if over:
                    raise self._missing(core, name, timeout)
                news.wait(left)

    async def wait_async(self, core: int, name: str, timeout: float) -> Happening:  # noqa: ASYNC109 - as `wait`
        """Wait as `wait` does, without blocking the event loop of Trio or asyncio."""
        __tracebackhide__ = True
        end = real_clock.monotonic() + timeout
        ring, wait_rung = _bell()
        with self._listening(ring), _ringing_after(timeout, ring):
            while True:
                over = self.failure is not None or real_clock.monotonic() >= end
                if (found := self.take(core, name)) is not None:
                    return found
                if over:
                    raise self._missing(core, name, timeout)
                await wait_rung()


@contextlib.contextmanager
def _ringing_after(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    """Call `ring` from a thread after `seconds`. Timeouts of Trio and asyncio would stop when a test freezes time."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), ring)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:
        raise ResourceError(f"expect_async: cannot start a thread: {error}") from error
    try:
        yield
    finally:
        timer.cancel()


def _bell() -> tuple[Callable[[], None], Callable[[], Awaitable[None]]]:
    """Return a function that any thread may call, and a function that waits for such a call in this event loop."""
    import sniffio

    if sniffio.current_async_library() == "trio":
        import trio

        lot, token = trio.lowlevel.ParkingLot(), trio.lowlevel.current_trio_token()
        wake: Callable[[], object] = functools.partial(token.run_sync_soon, lot.unpark_all)

        async def wait_rung() -> None:
            await lot.park()
    else:
        import asyncio

        event, loop = asyncio.Event(), asyncio.get_running_loop()
        wake = functools.partial(loop.call_soon_threadsafe, event.set)

        async def wait_rung() -> None:
            await event.wait()
            event.clear()

    def ring() -> None:
        with contextlib.suppress(RuntimeError):  # Ignore the call if the event loop has ended.
            wake()

    return ring, wait_rung
