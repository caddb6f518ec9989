"""The counters of a proxy at one moment. A proxy imports this module when it returns its first `Stats`."""

from __future__ import annotations

import attrs

__all__ = ["Stats"]


@attrs.frozen(slots=False, repr=False)
class Stats:
    """The counters of a proxy at one moment."""

    received: int = 0
    """Frames read from the link."""
    delivered: int = 0
    """Writes of state files, one for each frame of an inbound signal."""
    triggered: int = 0
    """Outbound notifications accepted from trigger files and from `Proxy.send`."""
    sent: int = 0
    """Frames that the link accepted."""
    unknown: int = 0
    """Well-formed frames whose name is not an inbound signal of the table. Estimated from a sample during a flood."""
    malformed: int = 0
    """Frames without a valid wire name. Estimated from a sample during a flood."""
    foreign: int = 0
    """Datagrams that a process other than the peer sent to a `unix:` link. They also count as malformed."""
    dropped: int = 0
    """Frames that the kernel dropped because the receive queue was full (PACKET_STATISTICS, packet(7))."""
    overflowed: int = 0
    """Overflows of the inotify queue (inotify(7)). After each one, the proxy sends a frame for every trigger file."""
    write_failures: int = 0
    """Failed attempts to write a state file. The proxy keeps the notification and retries."""
    send_failures: int = 0
    """Failed attempts to send a frame. The proxy keeps the notification and retries, unless it is `unsendable`."""
    unsendable: int = 0
    """Outbound notifications that were discarded because the link can never send their frame (EMSGSIZE)."""
    unfinished: int = 0
    """Notifications that were still pending when the proxy closed. A proxy that inherits them finishes them."""
    recovered: int = 0
    """Notifications that a previous process had read but not delivered, and that this process delivered."""
    events_lost: int = 0
    """Events that a slow reader of an event stream missed. The notifications themselves were delivered or sent."""
    restarts: int = 0
    """Restarts of failed tasks."""
    link_downs: int = 0
    """How many times the link has gone down."""
    rivals: int = 0
    """Other proxies that were noticed because they served the same link or watched the same triggers."""

    def as_dict(self) -> dict[str, int]:
        """Return the counts, keyed by name."""
        return attrs.asdict(self)
