"""The process signals of a service, from the start of the process to its end.

The handlers record each signal until the runner takes it. A stop signal is therefore not lost if it arrives while
modules are imported or while the service is stopping. The command line imports this module first, so this module
imports almost nothing.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from inco_trio.service.lines import STANDARD_ERROR, write_at_once

__all__ = ["STOPS", "continuing", "end_by_interrupt", "held", "hold", "listening", "take", "wakeups"]

STOPS = (signal.SIGTERM, signal.SIGINT)
HELD = (*STOPS, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 2
"""Number of stop signals after which the process still stops cleanly. The next stop signal ends it immediately."""


class _Held:
    def __init__(self) -> None:
        # The signals in order of arrival. A signal that arrives twice before `take` is recorded once.
        self.arrived: dict[int, None] = {}
        self.stops = 0
        self.tell: Callable[[], object] | None = None

    def arrive(self, number: int, _frame: object) -> None:
        """Record a signal. This is the signal handler: it must not raise, because it may interrupt any code."""
        if number in STOPS:
            self.stops += 1
            if self.stops > PATIENCE:
                write_at_once(STANDARD_ERROR, b"inco-trio: warning: third stop signal: exiting immediately\n")
                os._exit(0)
        self.arrived[number] = None
        if self.tell is not None:
            self.tell()


_held = _Held()


def hold() -> None:
    """Record SIGTERM, SIGINT, SIGHUP and SIGUSR1 from now on. Their default actions would end the process."""
    for number in HELD:
        signal.signal(number, _held.arrive)
    # The parent may have blocked the signals, so that none arrives before the handlers are set.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


@contextmanager
def held() -> Iterator[None]:
    """Record the signals while the block runs. Ignore them afterwards, while the interpreter shuts down."""
    hold()
    try:
        yield
    finally:
        for number in HELD:
            signal.signal(number, signal.SIG_IGN)


def take() -> list[int]:
    """Return the signals that have arrived since the last call."""
    arrived, _held.arrived = _held.arrived, {}
    return list(arrived)


@contextmanager
def listening(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` whenever a signal arrives, and once at the start for signals that arrived earlier.

    At the end, also reset the wakeup fd of the event loop. Trio closes this descriptor before it resets the wakeup fd
    itself, and Python prints a traceback if a signal arrives in between.
    """
    _held.tell = tell
    try:
        tell()
        yield
    finally:
        _held.tell = None
        signal.set_wakeup_fd(-1)


@contextmanager
def continuing(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` in the signal handler of SIGCONT while the block runs, unless a stop signal has arrived.

    With the stop signal, s6 and systemd also send SIGCONT to processes that were never stopped.
    """
    signal.signal(signal.SIGCONT, lambda *_: None if _held.stops else tell())
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, signal.SIG_DFL)


@contextmanager
def wakeups(numbers: Sequence[signal.Signals]) -> Iterator[socket.socket]:
    """Yield a socket that receives the number of each arriving signal as a byte, for use with select(2)."""
    receive, send = socket.socketpair()
    with receive, send:
        send.setblocking(False)
        before_fd = signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield receive
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)


def end_by_interrupt() -> None:
    """End this process with the default action of SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
