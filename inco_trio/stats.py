"""The counters of a proxy: everything that was carried, and everything that could not be."""

from __future__ import annotations

import attrs

__all__ = ["Counters", "Stats"]


@attrs.define
class Counters:
    """Counts since the proxy was opened; only the proxy has them."""

    received: int = 0
    """Frames taken from the link."""
    delivered: int = 0
    """State registers written, one for each known inbound frame."""
    triggered: int = 0
    """Outbound notifications accepted from triggers and from `Proxy.send`."""
    sent: int = 0
    """Frames that the link accepted."""
    unknown: int = 0
    """Well-formed frames whose name is not an inbound signal of the table."""
    malformed: int = 0
    """Frames that carry no wire name."""
    foreign: int = 0
    """Datagrams of a `unix:` link that somebody else than the peer sent; they are counted as malformed, too."""
    dropped: int = 0
    """Frames that the kernel dropped because the receive queue was full (PACKET_STATISTICS, packet(7))."""
    overflowed: int = 0
    """Overflows of the inotify queue (IN_Q_OVERFLOW, inotify(7)): after each, every trigger sends one frame."""
    write_failures: int = 0
    """Attempts to write a state register that failed; the notification is kept and retried."""
    send_failures: int = 0
    """Attempts to send a frame that failed; the notification is kept and retried unless counted in `unsendable`."""
    unsendable: int = 0
    """Outbound notifications given up, because their frame can never be sent on this link (EMSGSIZE)."""
    unfinished: int = 0
    """Notifications accepted but not finished when the proxy closed; a successor that inherits them finishes them."""
    recovered: int = 0
    """Notifications that a predecessor had read and not finished, delivered now."""
    events_lost: int = 0
    """Events that a slow reader of an event stream did not get; the signals themselves were carried."""
    restarts: int = 0
    """Restarts of a failed leg."""

    def snapshot(self) -> Stats:
        """The counts of this moment."""
        return Stats(**attrs.asdict(self))


@attrs.frozen
class Stats(Counters):
    """The counts of one moment, see `Counters`."""

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return attrs.asdict(self)
