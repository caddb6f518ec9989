"""The events of a proxy: streams of notifications, a listener, and counters of sent signals."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import trio

from inco_trio import real_clock
from inco_trio.counters import Counters
from inco_trio.persist.followed import History
from inco_trio.persist.recorder import Recorder
from inco_trio.registers.states import StateFile
from inco_trio.signals import Direction, Signal

if TYPE_CHECKING:
    from inco_trio.notification import Notification

__all__ = ["Deaf", "Events", "Listener", "Times"]

logger = logging.getLogger(__name__)

Wanted = Callable[[Signal], bool]

Times = tuple[int, int]
"""A point in time, given as real_clock.time_ns() and as real_clock.monotonic_ns()."""
_signal_of = operator.attrgetter("signal")


def _now() -> Times:
    return real_clock.time_ns(), real_clock.monotonic_ns()


class Listener(Protocol):
    """A receiver of all events of the board `problems.board_name`. Its methods must not block or raise."""

    wants_frames: bool
    """Whether the method `carried` needs the frames."""
    after_crash: bool
    """Whether the previous process is known to have ended without a clean stop."""

    def carried(self, signals: Sequence[Signal], sequence: int, frames: Sequence[bytes], at: Times, since: int) -> None:
        """Handle notifications that were delivered or sent, numbered from `sequence`. `frames` is empty if unknown.

        `since` is the time when they became pending (real_clock.monotonic_ns()), or 0 if they were not pending. It is
        negative if they became pending at the time `-since` or later (see `persist.recorder.waited`).
        """

    def pending(self, signals: Sequence[Signal], reason: str, frames: Sequence[bytes], at: Times) -> None:
        """Handle notifications that the proxy accepted, but cannot deliver or send yet."""

    def ignored(self, reason: str, name: str | None, frame: bytes | None, at: Times) -> None:
        """Handle a frame that was ignored or discarded. `reason` is the name of the counter for such frames."""

    def link_changed(self, running: bool, text: str, seconds: float, at: Times) -> None:
        """Handle a link that has come up or gone down. `text` describes the change.

        `seconds` is how long the link was in the previous state, or 0 if that is unknown.
        """

    def opened(self, keep: Callable[[], History]) -> None:
        """Handle the start of the proxy. `keep` stores new notifications in the history (see `Events.keep`)."""

    def ended(self) -> None:
        """Handle the end of the proxy."""


class Deaf:
    """A listener that ignores everything."""

    wants_frames = after_crash = False

    def carried(self, *_: object) -> None:
        """Ignore an event."""

    pending = ignored = link_changed = opened = ended = carried


class Events:
    """A distributor that passes notifications to event streams and to the listener. It never waits for readers."""

    def __init__(
        self, counters: Counters, history: History, listener: Listener | None = None, recorder: Recorder | None = None
    ) -> None:
        self.history = history
        self.recorder = recorder
        self.listener: Listener = listener or Deaf()
        self.sent: Counter[str] = Counter()
        """Number of frames that the link accepted, keyed by wire name. Each `StateFile` counts its inbound signals."""
        self.sent_last: dict[str, int] = {}
        """When the link accepted the last frame (real_clock.monotonic_ns()), keyed by wire name."""
        self._counters = counters
        # Continue the numbering of a previous process.
        self._sequence = history.sequence if history.keeping else 0
        if recorder is not None:
            recorder.skip_to(self._sequence)
            self._sequence = recorder.sequence
        self._entries: dict[trio.MemorySendChannel[Notification], Wanted] = {}

    def written(self, files: Sequence[StateFile], frames: Sequence[bytes] = (), since: int = 0) -> None:
        """Report inbound notifications whose state files were written. For `since`, see `Listener.carried`."""
        # Single notifications are the most frequent case.
        signals = (files[0].signal,) if len(files) == 1 else list(map(_signal_of, files))
        self.carried(signals, frames, since)

    def written_late(self, files: Sequence[StateFile], since: int) -> None:
        """Report inbound notifications that had been pending before they were written."""
        self.written(files, (), since)

    def accepted(self, signals: Sequence[Signal], frames: Sequence[bytes] = (), since: int = 0) -> None:
        """Report outbound notifications whose frames the link accepted."""
        _, now = self.carried(signals, frames, since)
        for signal in signals:
            self.sent[signal.name] += 1
            self.sent_last[signal.name] = now

    def carried(self, signals: Sequence[Signal], frames: Sequence[bytes], since: int = 0) -> Times:
        """Report notifications that were delivered or sent. Return the reported time."""
        at = real_clock.time_ns(), real_clock.monotonic_ns()
        if self.history.keeping:
            self.history.append(signals, at)
        self.listener.carried(signals, self._sequence + 1, frames, at, since)
        if self.recorder is not None:
            self.recorder.append(signals, since, at)  # Append to the recorder last: followers wait for the listener.
        self._sequence += len(signals)
        if logger.isEnabledFor(logging.DEBUG):
            for signal in signals:
                logger.debug("%s: %s", signal.direction.value, signal.name)
        if not self._entries:
            return at
        from inco_trio.notification import Notification

        wall, now = at
        first = self._sequence - len(signals) + 1
        reported = [Notification(signal, number, now, wall) for number, signal in enumerate(signals, first)]
        for entry, wanted in self._entries.items():
            some = [each for each in reported if wanted(each.signal)]
            for number, notification in enumerate(some):
                try:
                    entry.send_nowait(notification)
                except trio.WouldBlock:
                    self._counters.events_lost += len(some) - number
                    break
                except trio.BrokenResourceError:
                    break  # The reader has closed its stream before the end of its block.
        return at

    def pending(self, signals: Sequence[Signal], reason: str, frames: Sequence[bytes]) -> None:
        """Report notifications that cannot be delivered or sent yet."""
        # The recorder and the listener get the same time: `record` finds events that it has received from both.
        at = _now()
        if self.recorder is not None:
            for signal, count in Counter(signals).items():
                self.recorder.note("pending", reason, signal.name, signal.direction, count=count, state=1, at=at)
        self.listener.pending(signals, reason, frames, at)

    def ignored(self, reason: str, name: str | None, frame: bytes | None) -> None:
        """Report a frame that was ignored or discarded; see `Listener.ignored`."""
        at = _now()
        if self.recorder is not None:
            direction = Direction.OUTBOUND if reason == "unsendable" else Direction.INBOUND
            self.recorder.note("ignored", reason, name, direction, state=1, at=at)
        self.listener.ignored(reason, name, frame, at)

    def link_changed(self, running: bool, text: str, seconds: float) -> None:
        """Report that the link has come up or gone down; see `Listener.link_changed`."""
        at = _now()
        if self.recorder is not None:
            self.recorder.note("link", text, state=int(running), seconds=seconds, at=at)
        self.listener.link_changed(running, text, seconds, at)

    def note(self, kind: str, text: str, level: int) -> Times:
        """Record an event with the level of its log line; see `problems.noting`. Return its time."""
        at = _now()
        if self.recorder is not None:
            self.recorder.note(kind, text, state=min(2, max(0, level - logging.INFO) // 10), at=at)
        return at

    def keep(self) -> History:
        """Start storing new notifications in the history, and return the history."""
        self.history.begin(self._sequence)
        return self.history

    @contextmanager
    def open(self, buffer: float, wanted: Wanted) -> Iterator[trio.MemoryReceiveChannel[Notification]]:
        """Open a stream of new notifications whose signals `wanted` accepts."""
        # Import the module now rather than with the first notification. The daemon opens no streams.
        from inco_trio.notification import Notification

        entry, stream = trio.open_memory_channel[Notification](buffer)
        self._entries[entry] = wanted
        try:
            with entry, stream:
                yield stream
        finally:
            del self._entries[entry]

    def close(self) -> None:
        self.listener.ended()
        for entry in self._entries:
            entry.close()
