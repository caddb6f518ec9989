"""Send, receive and count the notifications of the demonstration.

A notification has arrived when core 1 has read the frame, or when inotify(7) has reported that the state file was
closed. With a QEMU guest as core 1, the demonstration counts round trips. A round trip ends when the state file of the
answer is closed. Each signal has at most one notification in flight, so it is clear to which notification an arrival
belongs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence

import attrs

from inco_trio.cores.peer import Peer
from inco_trio.cores.watch import Watch, trigger
from inco_trio.errors import IncoError
from inco_trio.frame import decode
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.stage import Stage
from inco_trio.simulation.waiter import Waiter

__all__ = ["Applications", "Traffic", "duration", "quantile", "table", "traffic_of", "verdict"]

_LOST_AFTER = 3.0
"""Seconds after which a notification counts as lost. Delivery takes less than 1 ms, but the machine may be busy."""
_ARROW = {Direction.INBOUND: "core 1 -> core 0", Direction.OUTBOUND: "core 0 -> core 1"}
_ROUND_TRIP = "core 0 -> 1 -> 0"


@attrs.define(eq=False)
class Traffic:
    """The notifications or round trips of one signal. A round trip ends when the signal `answer` arrives."""

    signal: Signal
    wanted: int
    answer: Signal | None = None
    sent: int = 0
    latencies: list[int] = attrs.Factory(list)
    """The latency of each arrived notification, in nanoseconds."""
    departed: int | None = None
    """The time (time.monotonic_ns()) at which the notification in flight was sent, or None."""
    unexpected: int = 0
    lost: bool = False

    @property
    def seen(self) -> Signal:
        """The signal whose arrival ends a latency measurement: `answer` if there is one, otherwise `signal`."""
        return self.answer or self.signal

    @property
    def way(self) -> str:
        return _ARROW[self.signal.direction] if self.answer is None else _ROUND_TRIP

    @property
    def idle(self) -> bool:
        return self.departed is None and self.sent < self.wanted and not self.lost

    @property
    def over(self) -> bool:
        return self.departed is None and not self.idle

    def depart(self) -> None:
        self.sent += 1
        self.departed = time.monotonic_ns()

    def arrive(self) -> None:
        if self.departed is None:
            self.unexpected += 1
        else:
            self.latencies.append(time.monotonic_ns() - self.departed)
            self.departed = None

    @property
    def late(self) -> bool:
        return self.departed is not None and time.monotonic_ns() - self.departed > _LOST_AFTER * 1e9

    def expire(self) -> None:
        """Stop sending a signal after its first loss: a late arrival would be mistaken for the next notification."""
        if self.departed is not None:
            self.departed = None
            self.lost = True


class Applications:
    """The programs on both cores that send and receive the notifications. A QEMU guest is not included."""

    def __init__(self, waiter: Waiter, peer: Peer | None, watch: Watch, traffic: Sequence[Traffic]) -> None:
        self._peer = peer
        inbound = [one for one in traffic if one.seen.direction is Direction.INBOUND]
        self._states = {one.seen: one for one in inbound}
        self._frames = {one.signal.name.encode(): one for one in traffic if one not in inbound}
        watch.follow(self._states, self._see_state)
        waiter.on(watch.fileno(), watch.drain)
        if peer is not None:
            waiter.on(peer.fileno(), lambda: self._see_frame(peer))

    def send(self, one: Traffic) -> None:
        """Send a notification. Raises OSError, IncoError."""
        one.depart()
        if one.signal.direction is Direction.INBOUND and self._peer is not None:
            # If the proxy is not running, the notification counts as lost.
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError, TimeoutError):
                self._peer.send(one.signal.name.encode())
        else:
            trigger(one.signal.path)

    def _see_state(self, what: Signal | IncoError) -> None:
        if isinstance(what, IncoError):
            raise what
        self._states[what].arrive()

    def _see_frame(self, peer: Peer) -> None:
        one = self._frames.get(decode(peer.receive()) or b"")
        if one is not None:
            one.arrive()


def traffic_of(stage: Stage, signals: Sequence[Signal], count: int) -> list[Traffic]:
    """Return the traffic to measure: one entry for each signal or, with a guest, for each signal that it answers."""
    if stage.guest is None:
        return [Traffic(one, count) for one in signals]
    by_name = {one.name: one for one in signals}
    return [Traffic(by_name[name], count, by_name[answer]) for name, answer in stage.answers.items()]


def duration(nanoseconds: float) -> str:
    """Format a duration in a suitable unit."""
    if nanoseconds < 999.5e3:
        return f"{nanoseconds / 1e3:.0f} us"
    if nanoseconds < 999.5e6:
        return f"{nanoseconds / 1e6:.1f} ms"
    return f"{nanoseconds / 1e9:.1f} s"


def quantile(ordered: Sequence[int], part: float) -> int:
    """Return the quantile `part` (0 to 1) of sorted values, by the nearest-rank method."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def table(traffic: Sequence[Traffic]) -> str:
    """Return a row of counts and latencies for each signal."""
    titles = ("sent", "arrived", "min", "median", "p99", "max")
    lines = [f"  {'signal':<18}  {'way':<16}" + "".join(f"{title:>9}" for title in titles)]
    for one in traffic:
        ordered = sorted(one.latencies)
        spread = [duration(quantile(ordered, part)) for part in (0, 0.5, 0.99, 1)] if ordered else ["-"] * 4
        cells = [str(one.sent), str(len(ordered)), *spread]
        head = f"  {one.signal.name:<18}  {one.way:<16}"
        lines.append(head + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def verdict(traffic: Sequence[Traffic]) -> tuple[str, int]:
    """Return the last line that the demonstration prints, and its exit code."""
    sent = sum(one.sent for one in traffic)
    latencies = sorted(latency for one in traffic for latency in one.latencies)
    unexpected = sum(one.unexpected for one in traffic)
    what = "notifications" if traffic[0].answer is None else "round trips"
    if len(latencies) < sent:
        names = ", ".join(one.signal.name for one in traffic if one.lost)
        return f"LOST {sent - len(latencies)} of {sent} {what} ({names}): the proxy does not work on this machine", 1
    if unexpected:
        return f"{unexpected} notifications arrived that were not sent: the proxy does not work on this machine", 1
    median = duration(quantile(latencies, 0.5))
    return f"all {sent} {what} arrived, median {median}: the proxy works on this machine", 0
