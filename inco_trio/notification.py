"""`Notification`, the item of an event stream. A proxy imports this module when it opens its first stream."""

from __future__ import annotations

import attrs

from inco_trio.signals import Direction, Signal

__all__ = ["Notification"]


@attrs.frozen
class Notification:
    """One notification that was delivered or sent."""

    signal: Signal
    sequence: int
    """Sequence number among all notifications of the proxy, starting at 1."""
    monotonic_ns: int
    """When the notification was delivered or sent (time.monotonic_ns())."""
    time_ns: int
    """When the notification was delivered or sent (time.time_ns())."""

    @property
    def direction(self) -> Direction:
        """The direction of the signal."""
        return self.signal.direction
