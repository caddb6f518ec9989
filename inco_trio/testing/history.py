"""What happened to the two cores, in order, and how a test waits for the next of it: from any thread or event loop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import attrs

from inco_trio.signals import Direction

__all__ = ["Happening", "History", "NotificationMissingError"]


class NotificationMissingError(AssertionError):
    """What a test waited for did not come; its text says what did."""


@attrs.frozen
class Happening:
    """One notification at one core, or something that is neither's, as a link that was taken down."""

    core: int | None
    what: str
    """`triggers`, `sends` or `gets`, which the core does; otherwise the whole of it."""
    name: str
    """The wire name; empty if it is of none."""
    monotonic_ns: int
    """When it was seen, as of time.monotonic_ns()."""
    time_ns: int
    """The same, as of time.time_ns()."""
    direction: Direction | None = None
    frame: bytes | None = None


class History:
    """Happenings in the order in which they were seen. One thread adds to it; any may read it and wait."""

    def __init__(self) -> None:
        self._happenings: list[Happening] = []
        self._taken: dict[tuple[int, str], int] = {}
        self._failure: str | None = None
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
        """Add what happens now."""
        happening = Happening(core, what, name, time.monotonic_ns(), time.time_ns(), direction, frame)
        with self._lock:
            self._happenings.append(happening)
        self._tell()

    def fail(self, failure: str | None) -> None:
        """Waiting makes no sense any more, for this reason; None: again it does."""
        self._failure = failure
        self._tell()

    @property
    def failure(self) -> str | None:
        """Why waiting makes no sense."""
        return self._failure

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def all(self, core: int | None = None) -> list[Happening]:
        """Those of a core, or all."""
        with self._lock:
            return [each for each in self._happenings if core is None or each.core == core]

    def take(self, core: int, name: str) -> Happening | None:
        """The first notification of this name at a core that was not taken before, or None."""
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
        why = f"within {timeout:g} s" if self._failure is None else f"({self._failure})"
        came = ", ".join(f"{each.what} {each.name}" for each in self.all(core)[-20:]) or "nothing happened"
        return NotificationMissingError(f"{name}: did not come to core {core} {why}; there: {came}")

    def wait(self, core: int, name: str, timeout: float) -> Happening:
        """Take the next one, once it is there, within `timeout` seconds. Raises NotificationMissingError."""
        __tracebackhide__ = True  # pytest shows the line of the test.
        news = threading.Event()
        end = time.monotonic() + timeout
        with self._listening(news.set):
            while True:
                news.clear()
                failed = self._failure is not None
                if (found := self.take(core, name)) is not None:
                    return found
                if failed or not news.wait(max(0.0, end - time.monotonic())):
                    raise self._missing(core, name, timeout)

    async def wait_async(self, core: int, name: str, timeout: float) -> Happening:  # noqa: ASYNC109 - as `wait`
        """The same, in an event loop of Trio's or asyncio's, which is not held up."""
        __tracebackhide__ = True
        end = time.monotonic() + timeout
        bell = _bell()
        with self._listening(bell.ring):
            while True:
                failed = self._failure is not None
                if (found := self.take(core, name)) is not None:
                    return found
                if failed or not await bell.wait(max(0.0, end - time.monotonic())):
                    raise self._missing(core, name, timeout)


class _TrioBell:
    def __init__(self) -> None:
        import trio

        self._lot = trio.lowlevel.ParkingLot()
        self._token = trio.lowlevel.current_trio_token()

    def ring(self) -> None:
        """From any thread. Who waits is woken, also who begins to before the loop has come to it."""
        with contextlib.suppress(RuntimeError):  # The loop has ended, and with it who waits.
            self._token.run_sync_soon(self._lot.unpark_all)

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - of either loop
        """Whether it rang within `timeout` seconds."""
        import trio

        with trio.move_on_after(timeout):
            await self._lot.park()
            return True
        return False


class _AsyncioBell:
    def __init__(self) -> None:
        import asyncio

        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        """See `_TrioBell.ring`."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - of either loop
        """See `_TrioBell.wait`."""
        import asyncio

        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


def _bell() -> _TrioBell | _AsyncioBell:
    import sniffio

    return _TrioBell() if sniffio.current_async_library() == "trio" else _AsyncioBell()
