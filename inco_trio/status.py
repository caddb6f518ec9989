"""What a proxy tells of itself: `Status`, the state of one moment."""

from __future__ import annotations

import attrs

from inco_trio.signals import Signal
from inco_trio.stats import Stats

__all__ = ["LegStatus", "SignalStatus", "Status"]


@attrs.frozen
class SignalStatus:
    """One signal."""

    signal: Signal
    count: int
    """How often its state file was written, or its frame sent, since it is in the table."""
    last: float | None
    """When it was carried last, in seconds since 1970."""
    failures: int
    """Attempts to write its state file, or to send its frame, that failed."""
    owed: int
    """Notifications of it that could not be written yet."""
    problem: str | None
    """What keeps it from being carried now."""


@attrs.frozen
class LegStatus:
    """One leg."""

    leg: str
    restarts: int
    problem: str | None
    """What is wrong now."""
    last_problem: str | None
    """What was wrong last."""


@attrs.frozen
class Status:
    """One proxy."""

    link: str
    """The address of the link."""
    since: float
    """When the proxy was opened, in seconds since 1970."""
    table_since: float
    """When the signal table was taken, in seconds since 1970: at the start, or by the last reload."""
    running: bool
    """Whether the link is up and has a carrier, or a peer."""
    description: str
    """What is said of the link at the start: its address, and its receive buffer or its peer."""
    holder: str | None
    """Who keeps the descriptors over a restart: `s6-fdholder`, `systemd` or nobody."""
    stats: Stats
    signals: tuple[SignalStatus, ...]
    legs: tuple[LegStatus, ...]
