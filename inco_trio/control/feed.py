"""Pass events from proxies to monitors and followers, without ever waiting for a client."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from inco_trio.notifications import Times
from inco_trio.persist.followed import History
from inco_trio.problems import board_name
from inco_trio.proxy.proxy import Proxy
from inco_trio.signals import Direction, Signal

if TYPE_CHECKING:
    from inco_trio.control.monitors import Follower, Monitor
    from inco_trio.control.protocol import Event

__all__ = ["HISTORIES_MAX", "Batch", "Feed", "Followed", "HistoryTurn", "Reload", "Served", "Waiting"]

HISTORIES_MAX = 4
"""Maximum number of `history` requests of other users that are answered at the same time, one of each user.

Each needs up to 4 MB.
"""

Reload = Callable[[], Awaitable[Sequence[str]]]
"""A function that reloads the configuration and returns a description of each part that was refused."""


class Served(Protocol):
    """The proxies that the control socket reports on."""

    name: str

    def proxies(self) -> Mapping[str, Proxy]:
        """Return the open proxies, keyed by board name. This must be fast, even with many boards."""

    def not_open(self) -> Mapping[str, str]:
        """Return why each of the other boards is not open, keyed by board name."""


class Batch:
    """Notifications that the proxy delivered or sent together, or that became pending together."""

    def __init__(
        self,
        board: str,
        signals: Sequence[Signal],
        sequence: int,
        frames: Sequence[bytes],
        time_ns: int,
        monotonic_ns: int,
        since: int = 0,
        reason: str = "",
    ) -> None:
        self.board = board
        self.signals = signals
        self.sequence = sequence
        """Sequence number of the first notification; 0 for pending notifications."""
        self.frames = frames
        """The frame of each notification, or empty if the frames are unknown."""
        self.time_ns = time_ns
        self.monotonic_ns = monotonic_ns
        self.since = since
        """When the notifications became pending (real_clock.monotonic_ns()), or 0 if they were never pending."""
        self.reason = reason
        """Why pending notifications cannot be delivered or sent."""
        self.lines: dict[tuple[int, bool], str] = {}
        """Encoded events, keyed by index and whether with frames.

        The first monitor that needs one encodes it for all.
        """

    @property
    def kind(self) -> str:
        return "pending" if self.reason else "notification"

    @property
    def frame_bytes(self) -> int:
        return sum(map(len, self.frames))


class Waiting:
    """How many events are queued for monitors, and the size of their frames in bytes."""

    def __init__(self) -> None:
        self.number = self.bytes = 0

    def add(self, number: int, size: int) -> None:
        self.number += number
        self.bytes += size


class HistoryTurn:
    """The turn of a user's `history` requests. A user other than the proxy's has only one of them at a time."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.scope = trio.CancelScope()
        """The scope in which the response is written while a request holds the lock."""


class Followed:
    """The boards that clients have followed since the start of the process and have not forgotten since.

    They need not be open.
    """

    def __init__(self) -> None:
        self._is_all = False
        """Whether a client followed all boards, including later ones, except those in `_forgotten`."""
        self._names: set[str] = set()
        self._forgotten: set[str] = set()

    def add(self, boards: Collection[str] | None) -> None:
        if boards is None:
            self._is_all = True
            self._forgotten.clear()
        else:
            self._names.update(boards)
            self._forgotten.difference_update(boards)

    def forget(self, boards: Collection[str] | None) -> None:
        if boards is None:
            self._is_all = False
            self._names.clear()
            self._forgotten.clear()
        else:
            self._names.difference_update(boards)
            self._forgotten.update(boards)

    def __contains__(self, board: str) -> bool:
        return board in self._names or (self._is_all and board not in self._forgotten)


class Feed:
    """A `notifications.Listener` that passes all events of `served` to monitors and followers."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.monitors: set[Monitor] = set()
        self.followers: Sequence[Follower] = ()
        self.followed = Followed()
        """Each of these boards keeps its notifications, even if it is opened while no follower is connected."""
        self.histories_of: dict[str, Callable[[], History]] = {}
        """For each board that has been opened, the argument of `opened`. The link of the board may not exist yet."""
        self._others: Sequence[Monitor] = ()
        """The monitors that are not followers."""
        self.waiting_of_others = Waiting()
        """What is queued for all monitors of other users than root and the user of the proxy."""
        self.wants_frames = self.after_crash = False
        self.turn = trio.Lock()
        """The turn of clients of other users: all other tasks run at least once before the next client has its turn."""
        self.histories = trio.Semaphore(HISTORIES_MAX)
        self._history_turns = weakref.WeakValueDictionary[int, HistoryTurn]()
        self._log = _LogTap(self)

    def history_turn(self, user: int) -> HistoryTurn:
        return self._history_turns.setdefault(user, HistoryTurn())

    def add(self, monitor: Monitor) -> None:
        self.monitors.add(monitor)
        self._changed()

    def remove(self, monitor: Monitor) -> None:
        self.monitors.discard(monitor)
        monitor.leave()
        self._changed()

    def _changed(self) -> None:
        from inco_trio.control.monitors import Follower

        self.followers = [monitor for monitor in self.monitors if isinstance(monitor, Follower)]
        self._others = [monitor for monitor in self.monitors if not isinstance(monitor, Follower)]
        self.wants_frames = any(monitor.frames for monitor in self.monitors)
        self._log.attach(listening=bool(self.monitors))

    def carried(self, signals: Sequence[Signal], sequence: int, frames: Sequence[bytes], at: Times, since: int) -> None:
        if self.followers:
            board = self._board
            for follower in self.followers:
                follower.appended(board, signals, at)
        if self._others:
            if self.wants_frames and not frames:
                frames = self._frames_sent(signals)
            self._pass(self._others, signals, sequence, frames, at, since=since)

    def pending(self, signals: Sequence[Signal], reason: str, frames: Sequence[bytes], at: Times) -> None:
        if self.monitors:
            self._pass(self.monitors, signals, 0, frames, at, reason=reason)

    def _pass(
        self,
        monitors: Iterable[Monitor],
        signals: Sequence[Signal],
        sequence: int,
        frames: Sequence[bytes],
        at: Times,
        since: int = 0,
        reason: str = "",
    ) -> None:
        """Queue notifications for `monitors`, without frames for the monitors that did not request them."""
        plain = Batch(self._board, tuple(signals), sequence, (), *at, since, reason)
        batch = Batch(plain.board, plain.signals, sequence, frames, *at, since, reason) if frames else plain
        for monitor in monitors:
            monitor.carried(batch if monitor.frames else plain)

    def _frames_sent(self, signals: Sequence[Signal]) -> Sequence[bytes]:
        proxy = self.served.proxies().get(self._board)
        # The frames are not available if the proxy is not open yet, or if it read them before a monitor requested them.
        if proxy is None or any(signal.direction is Direction.INBOUND for signal in signals):
            return ()
        with contextlib.suppress(OSError):  # The network namespace of the link may be gone meanwhile.
            return [proxy._frame(signal.name) for signal in signals]
        return ()

    def ignored(self, reason: str, name: str | None, frame: bytes | None, at: Times) -> None:
        if self.monitors:
            direction = Direction.OUTBOUND if reason == "unsendable" else Direction.INBOUND
            self.offer("ignored", at, frame, reason=reason, direction=direction, signal=name)

    def link_changed(self, running: bool, text: str, seconds: float, at: Times) -> None:
        self.offer("link", at, running=running, message=text, duration=seconds)

    def opened(self, keep: Callable[[], History]) -> None:
        self.histories_of[self._board] = keep
        if self._board in self.followed:
            keep()
        for follower in self.followers:
            if follower.follows(self._board):
                history = keep()
                follower.begin(self._board, history)
                follower.offer_always(self._event("opened", boot=history.boot))

    def ended(self) -> None:
        self.histories_of.pop(self._board, None)
        for follower in self.followers:
            follower.offer_always(self._event("closed"))

    @property
    def _board(self) -> str:
        """The board that the current task serves."""
        return board_name.get() or self.served.name

    def _event(self, kind: str, at: Times | None = None, **fields: object) -> Event:
        from inco_trio.control.protocol import event_at

        return event_at(kind, self._board, at, **fields)

    def offer(self, kind: str, at: Times | None = None, frame: bytes | None = None, **fields: object) -> None:
        """Queue an event with the time `at` (default: now) for all monitors, with `frame` if they requested frames."""
        if self.monitors:
            event = plain = self._event(kind, at, **fields)
            if frame is not None:
                event = attrs.evolve(plain, frame=frame.hex())
            for monitor in self.monitors:
                monitor.offer(event if monitor.frames else plain)


class _LogTap(logging.Handler):
    """A log handler that passes log records to the monitors as events."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(logging.INFO)
        self._feed = feed
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = 0

    def attach(self, *, listening: bool) -> None:
        """Add this handler to the package's logger if `listening`; otherwise remove it."""
        package = logging.getLogger("inco_trio")
        if listening and self not in package.handlers:
            self._token, self._thread = trio.lowlevel.current_trio_token(), threading.get_ident()
            package.addHandler(self)
        elif not listening:
            package.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        kind, count = getattr(record, "event", "message"), getattr(record, "fields", {}).get("count", 0)
        if kind == "link":
            return  # `Feed.link_changed` has already queued this event.
        level, message = record.levelname.lower(), record.getMessage()
        at = getattr(record, "at", None)  # See `problems.report`.
        offer = partial(self._feed.offer, kind, at, level=level, message=message, count=count)
        if threading.get_ident() == self._thread:
            offer()
        elif self._token is not None:
            self._token.run_sync_soon(offer)
