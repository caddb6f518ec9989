"""Wait for events in the demonstration. A process signal can stop the demonstration only while it is waiting."""

from __future__ import annotations

import contextlib
import functools
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from inco_trio.service.process_signals import wakeups

__all__ = ["Stopped", "Waiter", "stoppable"]


class Stopped(BaseException):
    """The process signal `number` stopped the demonstration. Like KeyboardInterrupt, this is not an error."""

    def __init__(self, number: int) -> None:
        self.number = number


class Waiter:
    """A selector that calls the registered function when a descriptor becomes readable."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.close = self._selector.close

    def on(self, fd: int, ready: Callable[[], None]) -> None:
        """Register the function `ready`, which `wait` calls when `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, ready)

    def wait(self, until: float) -> None:
        """Wait until a descriptor is readable, or until the monotonic time `until`."""
        for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
            key.data()

    def readable(self, fds: Sequence[int], timeout: float) -> list[int]:
        """Wait at most `timeout` seconds until a descriptor is readable. Return those of `fds` that are readable."""
        found: list[int] = []
        for fd in fds:
            self.on(fd, functools.partial(found.append, fd))
        try:
            self.wait(time.monotonic() + timeout)
        finally:
            for fd in fds:
                self._selector.unregister(fd)
        return found


@contextlib.contextmanager
def stoppable(waiter: Waiter) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise `Stopped` only in `waiter.wait`, where no operation is half done."""
    with wakeups((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)) as arrived:

        def stop() -> None:
            raise Stopped(arrived.recv(1)[0])

        waiter.on(arrived.fileno(), stop)
        yield
