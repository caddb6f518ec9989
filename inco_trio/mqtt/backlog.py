"""The boards of a gateway, each with a queue of notifications to publish and counters of published notifications."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import attrs
import trio

from inco_trio.control.follower import Conversation
from inco_trio.control.protocol import AHEAD, BoardStatus, Event, Notifications
from inco_trio.mqtt.session import Received, do_nothing
from inco_trio.signals import Direction

__all__ = ["Board", "Entry"]

HISTORIES = 16
"""Maximum number of histories of a board for which the gateway remembers the last published notification."""


class Entry(NamedTuple):
    """A notification, or several merged notifications."""

    boot: str
    sequence: int
    direction: Direction | None
    signal: str
    merged: int
    """How many notifications were merged, or 0 for a single notification."""
    time: float = 0.0
    monotonic_ns: int = 0


@attrs.define(eq=False)
class Board:
    """A board and its queue. Events stay in the queue until the broker has acknowledged them."""

    name: str
    source: Conversation | None = None
    """The connection to the proxy that the board is published from, even if the proxy has closed the board."""
    wanted: Path | None = None
    """The control socket of the proxy that opened the board last."""
    owners: dict[Conversation, None] = attrs.Factory(dict)
    """The connections to all proxies that have the board open, last opened last. Normally there is at most one."""
    is_open: bool = False
    """Whether the proxy has the board open."""
    replacement: Path | None = None
    """The control socket of the proxy that replaces `source` as soon as the gateway has connected to it again."""
    is_idle: bool = False
    """Whether no event arrived between the last two calls of `heir`, and the proxy has no more events to send."""
    running: bool | None = None
    """Whether the link is up, or None if unknown."""
    status: BoardStatus | None = None
    """The last status from the proxy."""
    published: int = 0
    """Number of notifications that the broker has acknowledged."""
    merged: int = 0
    """How many of the `published` notifications the proxy had merged."""
    changed: trio.Event = attrs.Factory(trio.Event)
    waiting: deque[Entry] = attrs.Factory(deque)
    """The queued events, oldest first."""
    generation: int = 0
    """How many times the queue has been cleared because another proxy repeats the notifications."""
    unanswered: Received | None = None
    """The request whose response the broker has not acknowledged, also after the connection has ended."""
    attempts: int = 0
    """How many times the gateway has published the response to `unanswered`."""
    push: Callable[[], None] = do_nothing
    """A function that publishes the queue without waiting; see `Publisher.push`."""
    _last: dict[str, int] = attrs.Factory(dict)
    """For each history (`Event.boot`), the sequence number of the last published notification."""
    _before: tuple[Conversation | None, int, int] | None = None
    """`source`, `published` and the length of the queue at the last call of `heir`, or None after an event."""

    def follow(self, source: Conversation) -> None:
        """Take events from a new connection. The proxy repeats all unacknowledged events on this connection."""
        self.source = source
        self.waiting.clear()
        self.generation += 1
        self.reopen()

    def reopen(self) -> None:
        """Record that `source` has opened the board."""
        self.is_open, self.is_idle = True, False
        self.replacement = self._before = None
        self.change()

    def leave(self, source: Conversation) -> None:
        """Stop taking events from a connection that has ended."""
        self.owners.pop(source, None)
        if self.source is source:
            self.release()

    def release(self) -> None:
        """Stop taking events from `source`. The queued events are still published."""
        self.source = self.running = self.replacement = None
        self.is_open = False
        self.change()

    def close(self) -> None:
        """Record that `source` has closed the board. Its last notifications may still arrive."""
        self.is_open = self.running = self.is_idle = False
        self.replacement = self._before = None
        self.change()

    def repeats(self, boot: str | None) -> bool:
        """Return whether a proxy whose history is `boot` sends all queued events again."""
        return all(entry.boot == boot for entry in self.waiting)

    def heir(self) -> Conversation | None:
        """Return the owner that should replace `source`, or None. The caller calls this method at regular intervals.

        A source that has closed the board is replaced once the broker has acknowledged the queued events, and none
        have arrived between two calls. `Gateway._flush` decides when a source that has the board open is replaced.
        """
        now = self.source, self.published, len(self.waiting)
        self.is_idle, self._before = now == self._before and len(self.waiting) < AHEAD, now
        paths = {owner.path: owner for owner in self.owners}
        if self.source not in self.owners:
            if self.waiting or not self.is_idle:
                self.replacement = None
            elif paths:
                self.replacement = self.wanted if self.wanted in paths else next(reversed(paths))
        return None if self.replacement is None else paths.get(self.replacement)

    def change(self) -> None:
        """Wake the tasks that wait for `changed`."""
        self.changed.set()
        self.changed = trio.Event()

    def add(self, event: Event) -> None:
        """Queue a notification or merged notifications from the proxy."""
        self.waiting.append(
            Entry(
                event.boot, event.sequence, event.direction, event.signal or "", event.count, event.time,
                event.monotonic_ns,
            )
        )  # fmt: skip
        self.push()

    def add_all(self, batch: Notifications) -> None:
        """Queue several notifications from the proxy."""
        signals = batch.signals
        for sequence, (index, time, monotonic_ns) in enumerate(batch.items, batch.sequence):
            self.waiting.append(Entry(batch.boot, sequence, *signals[index], 0, time, monotonic_ns))
        self.push()

    def is_duplicate(self, entry: Entry) -> bool:
        """Return whether a notification has already been published."""
        return not entry.merged and entry.sequence <= self._last.get(entry.boot, 0)

    def finish(self, entry: Entry, generation: int, *, counts: bool) -> None:
        """Remove `entry` from the queue unless a new `generation` has begun. With `counts`, count it as published."""
        if generation == self.generation:
            self.waiting.popleft()
        if counts:
            self.published += entry.merged or 1
            self.merged += entry.merged
            if self._last.pop(entry.boot, None) is None and len(self._last) == HISTORIES:
                del self._last[next(iter(self._last))]
            self._last[entry.boot] = entry.sequence  # The last key is that of the last published history.
