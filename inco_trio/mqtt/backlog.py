"""The boards of a gateway, each with a queue of notifications to publish and counters of published notifications."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import attrs
import trio

from inco_trio.control.follower import Conversation
from inco_trio.control.protocol import BoardStatus, Event, Notifications
from inco_trio.mqtt.session import Received, do_nothing
from inco_trio.signals import Direction

__all__ = ["Board", "Entry"]

HISTORIES = 16
"""For how many histories of a board the gateway remembers what it has published."""


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
    path: Path | None = None
    """The control socket of the last `source`, whose events are in the queue."""
    owners: dict[Conversation, None] = attrs.Factory(dict)
    """The connections to all proxies that have the board open, last opened last. Normally there is at most one."""
    is_open: bool = False
    """Whether the proxy has the board open."""
    replacement: Path | None = None
    """The control socket of the proxy that replaces `source` as soon as the gateway has connected to it again."""
    is_drained: bool = False
    """Whether `source` has closed the board, and no events have arrived between the last two calls of `heir`."""
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
    """The sequence number of the last published notification for each of the last histories (`Event.boot`)."""
    _left: tuple[Conversation | None, int] | None = None
    """`source` and `published` at the last call of `heir`, if `source` had closed the board and no event was queued."""

    def follow(self, source: Conversation) -> None:
        """Take events from a new connection. The proxy repeats all unacknowledged events on this connection."""
        self.source, self.path, self.is_open = source, source.path, True
        self.replacement, self.is_drained = None, False
        self.waiting.clear()
        self.generation += 1
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
        self.is_open = self.running = False
        self.replacement = None
        self.change()

    def heir(self) -> Conversation | None:
        """Return the owner that should replace `source`, or None. The caller calls this method at regular intervals.

        A source that has closed the board is replaced once the broker has acknowledged the queued events, and none
        have arrived between two calls. `Gateway._flush` decides when another source is replaced.
        """
        before, self._left = self._left, None
        if self.source not in self.owners and not self.waiting:
            self._left = self.source, self.published
        self.is_drained = self._left is not None and self._left == before
        if self.source not in self.owners:
            if not self.is_drained:
                self.replacement = None
            elif self.owners:
                self.replacement = next(reversed(self.owners)).path
        return next((owner for owner in self.owners if owner.path == self.replacement), None)

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
            if entry.boot not in self._last and len(self._last) == HISTORIES:
                del self._last[next(iter(self._last))]
            self._last[entry.boot] = entry.sequence
