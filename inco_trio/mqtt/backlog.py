"""The boards of a gateway, each with a queue of notifications to publish and counters of published notifications."""

from __future__ import annotations

import itertools
from collections import deque
from typing import NamedTuple

import attrs
import trio

from inco_trio.control.follower import Conversation
from inco_trio.control.protocol import BoardStatus, Event, Notifications
from inco_trio.signals import Direction

__all__ = ["BATCH", "Board", "Entry"]

BATCH = 256
"""Maximum number of notifications that are published concurrently."""


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
    """The connection to the proxy that last opened the board, even if the proxy has closed it."""
    owners: set[Conversation] = attrs.Factory(set)
    """The connections to all proxies that have the board open. Normally there is at most one."""
    is_open: bool = False
    """Whether the proxy has the board open."""
    running: bool | None = None
    """Whether the link is up, or None if unknown."""
    status: BoardStatus | None = None
    """The last status from the proxy."""
    published: int = 0
    """Number of notifications that the broker has acknowledged."""
    merged: int = 0
    """How many of the `published` notifications the proxy had merged."""
    arrived: trio.Event = attrs.Factory(trio.Event)
    """An event that wakes `batch` when notifications arrive."""
    changed: trio.Event = attrs.Factory(trio.Event)
    _waiting: deque[Entry] = attrs.Factory(deque)
    _last: tuple[str, int] = ("", 0)
    """The history (`Event.boot`) and sequence number of the last published notification."""

    def follow(self, source: Conversation) -> None:
        """Take events from a new connection. The proxy repeats all unacknowledged events on it."""
        self.source, self.is_open = source, True
        self._waiting.clear()
        self.change()

    def leave(self, source: Conversation) -> None:
        """Stop taking events from a connection."""
        self.owners.discard(source)
        if self.source is source:
            self.source = self.running = None
            self.is_open = False
            self.change()

    def change(self) -> None:
        """Wake the tasks that wait for `changed`."""
        self.changed.set()
        self.changed = trio.Event()

    def add(self, event: Event) -> None:
        """Queue a notification or merged notifications from the proxy."""
        self._waiting.append(
            Entry(
                event.boot, event.sequence, event.direction, event.signal or "", event.count, event.time,
                event.monotonic_ns,
            )
        )  # fmt: skip
        self.arrived.set()

    def add_all(self, batch: Notifications) -> None:
        """Queue several notifications from the proxy."""
        signals = batch.signals
        for sequence, (index, time, monotonic_ns) in enumerate(batch.items, batch.sequence):
            self._waiting.append(Entry(batch.boot, sequence, *signals[index], 0, time, monotonic_ns))
        self.arrived.set()

    async def batch(self) -> tuple[Conversation | None, list[Entry]]:
        """Wait for entries to publish; return some of them, and the connection that they came from."""
        while not self._waiting:
            self.arrived = trio.Event()
            await self.arrived.wait()
        number = min(len(self._waiting), BATCH)
        # A single number acknowledges all merged notifications, so publish them together.
        while number < len(self._waiting) and self._waiting[number].merged:
            number += 1
        return self.source, list(itertools.islice(self._waiting, number))

    def is_duplicate(self, entry: Entry) -> bool:
        """Return whether a notification was published before."""
        boot, number = self._last
        return not entry.merged and entry.boot == boot and entry.sequence <= number

    def done(self, source: Conversation | None, entries: list[Entry], new: list[Entry]) -> None:
        """Remove `entries` from the queue if they came from `source`. Count those in `new` as published."""
        if self.source is source:
            for _ in entries:
                self._waiting.popleft()
        for entry in new:
            self.published += entry.merged or 1
            self.merged += entry.merged
        if new:
            self._last = new[-1].boot, new[-1].sequence
