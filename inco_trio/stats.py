"""The counters of a proxy."""

from __future__ import annotations

import attrs

__all__ = ["Counters", "Stats"]


@attrs.define
class Counters:
    """Counts since the proxy was opened; only the proxy changes them."""

    received: int = 0
    """Frames read from the link."""
    delivered: int = 0
    """Writes of state files, one for each known inbound frame."""
    triggered: int = 0
    """Outbound notifications accepted from triggers and from `Proxy.send`."""
    sent: int = 0
    """Frames that the link accepted."""
    unknown: int = 0
    """Well-formed frames whose name is not an inbound signal of the table."""
    malformed: int = 0
    """Frames without a valid wire name."""
    foreign: int = 0
    """Datagrams of a `unix:` link that the peer did not send; `malformed` counts them, too."""
    dropped: int = 0
    """Frames that the kernel dropped because the receive queue was full (PACKET_STATISTICS, packet(7))."""
    overflowed: int = 0
    """Overflows of the inotify queue (IN_Q_OVERFLOW, inotify(7)). After each, every trigger sends one frame."""
    write_failures: int = 0
    """Failed attempts to write a state file; the proxy retries."""
    send_failures: int = 0
    """Failed attempts to send a frame; the proxy retries, except for those counted in `unsendable`."""
    unsendable: int = 0
    """Outbound notifications dropped because their frame is too long for this link (EMSGSIZE)."""
    unfinished: int = 0
    """Notifications that were in flight when the proxy closed; a successor that inherits them processes them."""
    recovered: int = 0
    """Notifications that a predecessor read, and this proxy delivered."""
    events_lost: int = 0
    """Events that a slow reader of an event stream did not get; the notifications themselves are not lost."""
    restarts: int = 0
    """Restarts of a failed task."""

    def snapshot(self) -> Stats:
        """Return the current counts."""
        return Stats(**attrs.asdict(self))


@attrs.frozen
class Stats(Counters):
    """The counts at one time; see `Counters`."""

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return attrs.asdict(self)
