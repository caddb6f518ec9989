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
    may_replace: bool = False
    """Whether another proxy that has the board open may replace `source`: the last events of `source` were read."""
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
    _last: tuple[str, int] = ("", 0)
    """The history (`Event.boot`) and sequence number of the last published notification."""
    _left: tuple[Conversation | None, int] | None = None
    """`source` and `published` at the last call of `heir`, if only other proxies had the board open then."""

    def follow(self, source: Conversation) -> None:
        """Take events from a new connection. The proxy repeats all unacknowledged events on this connection."""
        self.source, self.path, self.is_open, self.may_replace = source, source.path, True, False
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
        self.source = self.running = None
        self.is_open = False
        self.change()

    def heir(self) -> Conversation | None:
        """Return the owner that should replace `source`, or None. The caller calls this method at regular intervals.

        A source that has closed the board is replaced once the broker has acknowledged the queued events, and none
        have arrived between two calls. A source that has the board open is replaced if `may_replace` is set.
        """
        before, self._left = self._left, None
        heir = next(reversed(self.owners), None)
        if heir is None or heir is self.source:
            self.may_replace = False
        elif self.source not in self.owners:
            self._left = None if self.waiting else (self.source, self.published)
            self.may_replace = self._left is not None and self._left == before
        return heir if self.may_replace else None

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
        boot, number = self._last
        return not entry.merged and entry.boot == boot and entry.sequence <= number

    def finish(self, entry: Entry, generation: int, *, counts: bool) -> None:
        """Remove `entry` from the queue unless a new `generation` has begun. With `counts`, count it as published."""
        if generation == self.generation:
            self.waiting.popleft()
        if counts:
            self.published += entry.merged or 1
            self.merged += entry.merged
            self._last = entry.boot, entry.sequence
