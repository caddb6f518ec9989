"""The state of a proxy. A proxy imports this module when it returns its first `Status`."""

from __future__ import annotations

import attrs

from inco_trio.signals import Direction
from inco_trio.stats import Stats

__all__ = ["RecorderStatus", "RivalStatus", "SignalStatus", "Status", "TaskStatus"]


@attrs.frozen(slots=False, repr=False)
class SignalStatus:
    """The state of one signal."""

    signal: str
    direction: Direction
    register: str
    """The path of the trigger or state file."""
    count: int
    """How many times the state file was written or the frame was sent since the signal was added to the table."""
    last: float | None
    """When the state file was last written or the frame last sent, in seconds since 1970."""
    failures: int
    """Failed attempts to write the state file or to send the frame."""
    pending: int
    """Number of accepted notifications whose state file has not been written or whose frame has not been sent yet."""
    problem: str | None
    """Why the signal does not work at the moment, or None."""


@attrs.frozen(slots=False, repr=False)
class TaskStatus:
    """The state of one task of the proxy."""

    task: str
    restarts: int
    problem: str | None
    """The current problem, or None."""
    last_problem: str | None
    """The most recent problem, even if it has been fixed, or None."""


@attrs.frozen(slots=False, repr=False)
class RecorderStatus:
    """The content of the flight recorder, which `inco-trio history` prints."""

    boot: str
    """A random identifier of the recorder. It changes only when a restart loses the recorder's content."""
    sequence: int
    """The sequence number of the last notification."""
    since: float | None
    """When the oldest record was written, in seconds since 1970, or None if the recorder is empty."""
    notifications: int
    """Number of notification records. Each record contains all notifications of a signal in one batch."""
    events: int
    kept: int
    """Maximum number of notification records."""


@attrs.frozen(slots=False, repr=False)
class RivalStatus:
    """Another running proxy that serves the same link or watches the same triggers."""

    pid: int
    since: float
    """When this proxy noticed it, in seconds since 1970."""
    shared: tuple[str, ...]
    """The name of the link, the IRQ directories, or both."""


@attrs.frozen(slots=False, repr=False)
class Status:
    """The state of one proxy."""

    link: str
    """The address of the link."""
    since: float
    """When the proxy was opened, in seconds since 1970."""
    table_since: float
    """When the signal table was last loaded, in seconds since 1970."""
    running: bool
    """Whether the link is up and has a carrier or a peer."""
    description: str
    """The address of the link, with the size of its receive buffer or with its peer."""
    descriptors: str | None
    """The fd store that keeps the descriptors across a restart: `s6-fdholder`, `systemd` or None."""
    counters: Stats
    signals: tuple[SignalStatus, ...]
    tasks: tuple[TaskStatus, ...]
    uptime: float = 0.0
    """How long the proxy has been open, in seconds."""
    last_down: float | None = None
    """When the link last went down, in seconds since 1970, or None."""
    last_down_reason: str | None = None
    """Why the link last went down, or None if that is unknown."""
    last_down_duration: float | None = None
    """How long the link was down the last time, in seconds. None if it has not come up again, or if that is unknown."""
    down_reason: str | None = None
    """Why the link is not running, or None if it is running."""
    recorded: RecorderStatus | None = None
    """The content of the flight recorder, or None if it is off."""
    capabilities: tuple[str, ...] = ()
    """The capabilities that the process has, such as CAP_NET_RAW (capabilities(7))."""
    mac: str | None = None
    """The MAC address of the link, or None if the interface has never existed."""
    receive_buffer: int | None = None
    """The size of the receive buffer of an interface in bytes, or None for a `unix:` link."""
    peer: str | None = None
    """The path of the peer's socket, or None for an interface."""
    netns: str | None = None
    """The path of the link's network namespace (None: the namespace of the process)."""
    owner: int | None = None
    """The user ID that may own IRQ directories, besides root and the user of the process, or None."""
    group: int | None = None
    """The group ID that may write to IRQ directories, or None."""
    rivals: tuple[RivalStatus, ...] = ()
    """The other running proxies that serve the same link or watch the same triggers, as far as they were noticed."""
