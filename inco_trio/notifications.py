"""Who is told of what a proxy does: streams of events, a listener, and the counts of each signal."""

from __future__ import annotations

import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import attrs
import trio

from inco_trio.persist.history import History
from inco_trio.registers.states import StateFile
from inco_trio.signals import Direction, Signal
from inco_trio.stats import Counters

__all__ = ["Deaf", "Events", "Listener", "Notification"]

logger = logging.getLogger(__name__)

Wanted = Callable[[Signal], bool]

_signal_of = operator.attrgetter("signal")


@attrs.frozen
class Notification:
    """One notification that was carried."""

    signal: Signal
    sequence: int
    """Its number among all that the proxy carried, from 1."""
    monotonic_ns: int
    """When it was written or sent, as of time.monotonic_ns()."""
    time_ns: int
    """The same, as of time.time_ns()."""

    @property
    def direction(self) -> Direction:
        """Which core it went to."""
        return self.signal.direction


class Listener(Protocol):
    """Who is told of everything, at once; `problems.board_name` says of which board. Nothing here waits or raises."""

    wants_frames: bool
    """Whether it is told the frames of the link, too."""

    def carried(self, signals: Sequence[Signal], sequence: int, frames: Sequence[bytes]) -> None:
        """These were written or sent; the first is the proxy's notification number `sequence`, from 1.

        `frames` are those that came, one for each, if they are wanted and came.
        """

    def ignored(self, reason: str, name: str | None, frame: bytes | None) -> None:
        """A frame is no notification, or one is given up, for `reason`: the name of the counter that counts it."""

    def link_changed(self, running: bool) -> None:
        """The link went up, or down."""

    def opened(self, keep: Callable[[str], History]) -> None:
        """The proxy is being opened; `keep` is its `Events.keep`."""

    def ended(self) -> None:
        """The proxy carries nothing any more."""


class Deaf:
    """A listener that does not care."""

    wants_frames = False

    def carried(self, signals: Sequence[Signal], sequence: int, frames: Sequence[bytes]) -> None:
        """See `Listener.carried`."""

    def ignored(self, reason: str, name: str | None, frame: bytes | None) -> None:
        """See `Listener.ignored`."""

    def link_changed(self, running: bool) -> None:
        """See `Listener.link_changed`."""

    def opened(self, keep: Callable[[str], History]) -> None:
        """See `Listener.opened`."""

    def ended(self) -> None:
        """See `Listener.ended`."""


class Events:
    """Tells streams and the listener; nobody waits for them."""

    def __init__(self, counters: Counters, history: History, listener: Listener | None = None) -> None:
        self.history = history
        self.listener: Listener = listener or Deaf()
        self.sent: Counter[str] = Counter()
        """Frames that the link has accepted, by the wire name; what is written is counted where the file is."""
        self.sent_last: dict[str, int] = {}
        """When that was, the last time, as of time.time_ns()."""
        self._counters = counters
        # Where the history outlived a process, its numbers go on.
        self._sequence = history.sequence if history.keeping else 0
        self._entries: dict[trio.MemorySendChannel[Notification], Wanted] = {}

    def written(self, files: Sequence[StateFile], frames: Sequence[bytes]) -> None:
        """State files were written, or are owed, for these frames."""
        self.carried(list(map(_signal_of, files)), frames)

    def accepted(self, signals: Sequence[Signal], frames: Sequence[bytes] = ()) -> None:
        """The link has accepted frames."""
        now = time.time_ns()
        for signal in signals:
            self.sent[signal.name] += 1
            self.sent_last[signal.name] = now
        self.carried(signals, frames)

    def carried(self, signals: Sequence[Signal], frames: Sequence[bytes]) -> None:
        """Tell of what was carried."""
        if self.history.keeping:
            self.history.append(signals)
        self.listener.carried(signals, self._sequence + 1, frames)
        self._sequence += len(signals)
        if logger.isEnabledFor(logging.DEBUG):
            for signal in signals:
                logger.debug("%s: %s", signal.direction.value, signal.name)
        if not self._entries:
            return
        now, wall = time.monotonic_ns(), time.time_ns()
        first = self._sequence - len(signals) + 1
        told = [Notification(signal, number, now, wall) for number, signal in enumerate(signals, first)]
        for entry, wanted in self._entries.items():
            some = [each for each in told if wanted(each.signal)]
            for number, notification in enumerate(some):
                try:
                    entry.send_nowait(notification)
                except trio.WouldBlock:
                    self._counters.events_lost += len(some) - number
                    break

    def keep(self, boot: str) -> History:
        """The history, which keeps what is carried from now on, if it did not before; `boot` names the process."""
        self.history.begin(boot, self._sequence)
        return self.history

    @contextmanager
    def open(self, buffer: float, wanted: Wanted) -> Iterator[trio.MemoryReceiveChannel[Notification]]:
        """A stream of what is carried from now on, of the signals that are `wanted`."""
        entry, stream = trio.open_memory_channel[Notification](buffer)
        self._entries[entry] = wanted
        try:
            with entry, stream:
                yield stream
        finally:
            del self._entries[entry]

    def close(self) -> None:
        """End all streams."""
        self.listener.ended()
        for entry in self._entries:
            entry.close()
