"""The signals that the daemon's process is sent, from its first instant to its last.

They are held until somebody takes them: a stop that comes while modules are imported, or while the proxy stops already,
is a stop like any other. This module is the first one that is imported, and so imports next to nothing itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from inco_trio.service.lines import STANDARD_ERROR, write_at_once

__all__ = ["STOPS", "end_by_interrupt", "hold", "ignore", "listening", "take"]

STOPS = (signal.SIGTERM, signal.SIGINT)
HELD = (*STOPS, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 2
"""Signals to stop that are taken in peace; one more ends the process at once."""


class _Held:
    def __init__(self) -> None:
        # In the order in which they came; one that comes again before it was taken is the same one.
        self.arrived: dict[int, None] = {}
        self.stops = 0
        self.tell: Callable[[], object] | None = None

    def arrive(self, number: int, _frame: object) -> None:
        """The handler. It never raises, whatever it interrupts."""
        if number in STOPS:
            self.stops += 1
            if self.stops > PATIENCE:
                write_at_once(STANDARD_ERROR, b"inco-trio: warning: told to stop a third time: ended at once\n")
                os._exit(0)
        self.arrived[number] = None
        if self.tell is not None:
            self.tell()


_held = _Held()


def hold() -> None:
    """Hold SIGTERM, SIGINT, SIGHUP and SIGUSR1 from now on, in place of what they did."""
    for number in HELD:
        signal.signal(number, _held.arrive)
    # What the parent blocked to be sure of not being too early arrives now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def take() -> list[int]:
    """The signals that came since the last call."""
    arrived, _held.arrived = _held.arrived, {}
    return list(arrived)


@contextmanager
def listening(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` whenever a signal arrives, in its handler, and once at the beginning for those that came before."""
    _held.tell = tell
    try:
        tell()
        yield
    finally:
        _held.tell = None


def ignore() -> None:
    """Ignore the signals from now on: the process has done its work, and the end of the interpreter is not theirs."""
    for number in HELD:
        signal.signal(number, signal.SIG_IGN)


def end_by_interrupt() -> None:
    """End the process by SIGINT, as a program does that does not handle it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
