"""The counters of a running proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inco_trio.stats import Stats

__all__ = ["Counters"]


class Counters:
    """Counts since the proxy was opened; `Stats` describes each of them. Only the proxy changes them."""

    def __init__(self) -> None:
        self.received = 0
        self.delivered = 0
        self.triggered = 0
        self.sent = 0
        self.unknown = 0
        self.malformed = 0
        self.foreign = 0
        self.dropped = 0
        self.overflowed = 0
        self.write_failures = 0
        self.send_failures = 0
        self.unsendable = 0
        self.unfinished = 0
        self.recovered = 0
        self.events_lost = 0
        self.restarts = 0
        self.link_downs = 0
        self.rivals = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts, keyed by name."""
        return dict(vars(self))

    def snapshot(self) -> Stats:
        # Import the module lazily, because the import would delay the start of the daemon.
        from inco_trio.stats import Stats

        return Stats(**vars(self))
