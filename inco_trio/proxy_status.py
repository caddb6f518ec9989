"""The state and counters of a proxy. `Status` and `Stats` are snapshots; `Counters` changes while the proxy runs."""

from __future__ import annotations

import attrs

from inco_trio.signals import Direction

__all__ = ["Counters", "RecorderStatus", "RivalStatus", "SignalStatus", "Stats", "Status", "TaskStatus"]


@attrs.define
class Counters:
    """Counts since the proxy was opened. Only the proxy changes them."""

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

    def snapshot(self) -> Stats:
        return Stats(**attrs.asdict(self))


# attrs builds these classes at every proxy start. Omitting slots and repr halves the time.
@attrs.frozen(slots=False, repr=False)
class Stats(Counters):
    """The counters of a proxy at one moment."""

    def as_dict(self) -> dict[str, int]:
        """Return the counts, keyed by name."""
        return attrs.asdict(self)


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
