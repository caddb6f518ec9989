"""The boards of a gateway, each with a queue of events to publish and counters of published events."""

from __future__ import annotations

from collections import deque

import attrs
import trio

from inco_trio.control.follower import Conversation
from inco_trio.control.protocol import BoardStatus, Event

__all__ = ["BATCH", "Board"]

BATCH = 256
"""Maximum number of notifications that are published concurrently."""


@attrs.define(eq=False)
class Board:
    """A board and its queue. Events stay in the queue until the broker has acknowledged them."""

    name: str
    source: Conversation | None = None
    """The connection to the board's proxy, even if the proxy has closed the board."""
    owners: set[Conversation] = attrs.Factory(set)
    """The connections to all proxies that have the board open. Normally there is at most one."""
    is_open: bool = False
    """Whether the proxy has the board open."""
    running: bool | None = None
    """Whether the link is up, or None if unknown."""
    status: BoardStatus | None = None
    """The last status from the proxy."""
    published: int = 0
    """Notifications that the broker has acknowledged."""
    merged: int = 0
    """How many of the `published` notifications the proxy had merged."""
    arrived: trio.Event = attrs.Factory(trio.Event)
    """Wakes `batch` when events arrive."""
    changed: trio.Event = attrs.Factory(trio.Event)
    _waiting: deque[Event] = attrs.Factory(deque)
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
        self._waiting.append(event)
        self.arrived.set()

    async def batch(self) -> tuple[Conversation | None, list[Event]]:
        """Wait for events to publish; return some of them, and the connection that they came from."""
        while not self._waiting:
            self.arrived = trio.Event()
            await self.arrived.wait()
        number = min(len(self._waiting), BATCH)
        # A single number acknowledges all merged notifications, so publish them together.
        while number < len(self._waiting) and self._waiting[number].event == "merged":
            number += 1
        return self.source, [self._waiting[n] for n in range(number)]

    def is_duplicate(self, event: Event) -> bool:
        """Return whether an event was published before."""
        boot, number = self._last
        return event.event == "notification" and event.boot == boot and event.sequence <= number

    def done(self, source: Conversation | None, events: list[Event], new: list[Event]) -> None:
        """Remove `events` from the queue if they came from `source`. Count the events in `new` as published."""
        if self.source is source:
            for _ in events:
                self._waiting.popleft()
        for event in new:
            self.published += event.count or 1
            self.merged += event.count
            self._last = event.boot, event.sequence
