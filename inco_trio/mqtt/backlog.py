"""What a gateway knows of a board: what it has to publish, and what is published."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import attrs
import trio

from inco_trio.control.follower import Conversation

__all__ = ["BATCH", "Board", "Source"]

BATCH = 256
"""Notifications that are published at once."""


@attrs.define(eq=False)
class Source:
    """A proxy that is followed: `requests` are written to it in their order."""

    conversation: Conversation


@attrs.define(eq=False)
class Board:
    """A board; what it is told by its proxy waits here until the broker has acknowledged it."""

    name: str
    source: Source | None = None
    """The proxy that has it now, or had it last and tells what it carried."""
    is_open: bool = False
    """Whether that carries it."""
    running: bool | None = None
    """Whether its link is up."""
    counters: Mapping[str, Any] | None = None
    """What its proxy last counted."""
    published: int = 0
    """Notifications that the broker has acknowledged."""
    merged: int = 0
    """Of these, how many were only counted."""
    arrived: trio.Event = attrs.Factory(trio.Event)
    """Set when there is something to publish."""
    changed: trio.Event = attrs.Factory(trio.Event)
    """Set when the status or the counters are others."""
    _waiting: deque[Mapping[str, Any]] = attrs.Factory(deque)
    _last: tuple[str, int] = ("", 0)
    """Boot and number of the last one that was published."""

    def follow(self, source: Source) -> None:
        """Another proxy tells of it from now on, and tells all again that it does not know to be published."""
        self.source, self.is_open = source, True
        self._waiting.clear()
        self.change()

    def leave(self, source: Source) -> None:
        """That proxy tells of it no more."""
        if self.source is source:
            self.source = self.running = None
            self.is_open = False
            self.change()

    def change(self) -> None:
        """Its status is another one."""
        self.changed.set()
        self.changed = trio.Event()

    def told(self, event: Mapping[str, Any]) -> None:
        """Its proxy told of one notification, or of merged ones."""
        self._waiting.append(event)
        self.arrived.set()

    async def batch(self) -> tuple[Source | None, list[Mapping[str, Any]]]:
        """What is to be published next, once there is something, and who told of it."""
        while not self._waiting:
            self.arrived = trio.Event()
            await self.arrived.wait()
        number = min(len(self._waiting), BATCH)
        # What is acknowledged together is published together, or merged ones were told again.
        while number < len(self._waiting) and self._waiting[number]["event"] == "merged":
            number += 1
        return self.source, [self._waiting[n] for n in range(number)]

    def is_double(self, event: Mapping[str, Any]) -> bool:
        """Whether this one was published before."""
        boot, number = self._last
        return bool(event["event"] == "notification" and event["boot"] == boot and event["sequence"] <= number)

    def done(self, source: Source | None, events: list[Mapping[str, Any]], new: list[Mapping[str, Any]]) -> None:
        """The broker has acknowledged the `new` ones of these, which `source` told of."""
        if self.source is source:
            for _ in events:
                self._waiting.popleft()
        for event in new:
            count = event.get("count", 1)
            self.published += count
            if event["event"] == "merged":
                self.merged += count
            self._last = event["boot"], event["sequence"]
