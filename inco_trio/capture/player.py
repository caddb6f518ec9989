"""Play one side of a recording, and count the notifications from the other side.

As core 1, the player sends inbound notifications as frames on a link, and receives outbound notifications from the
link. As core 0, it writes trigger files for outbound notifications and watches state files for inbound ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from inco_trio.capture.recording import Mark, Recording
from inco_trio.cores.core0 import Core0
from inco_trio.cores.core1 import Core1
from inco_trio.errors import LinkNotFoundError
from inco_trio.signals import Direction, SignalTable

__all__ = ["Played", "Side", "applications", "core1", "play"]

PATIENCE = 10.0
"""Maximum time in seconds to wait for a link that went down to come up again."""
TURN = 64
"""Number of notifications that one task handles before other tasks run."""


@attrs.define
class Side:
    """The core that a replay simulates, the signals that it can send, and the labels of the signals that can arrive."""

    core: Core0 | Core1
    direction: Direction
    """The direction of the notifications to play. Notifications in the other direction are counted."""
    playable: Collection[str] | None = None
    """The names of the signals that this side can send, or None for all signals."""
    labels: Mapping[str, str] | None = None
    """The label of each signal that can arrive. If None, every signal can arrive, and its name is its label."""
    _sent: bool = attrs.field(default=False, init=False)

    @property
    def overflowed(self) -> bool:
        """Whether the kernel dropped notifications before they were counted."""
        return isinstance(self.core, Core0) and self.core.overflows > 0

    def label(self, signal: str) -> str | None:
        """Return the label under which an arriving signal is counted, or None if this side cannot receive it."""
        return signal if self.labels is None else self.labels.get(signal)

    async def send(self, signal: str) -> bool:
        """Play one notification; return False if this side cannot send the signal. Raises IncoError.

        If the link is down, raise LinkNotFoundError before the first notification, but wait for the link afterwards.
        """
        if self.playable is not None and signal not in self.playable:
            return False
        while True:
            try:
                await self.core.send(signal)
            except LinkNotFoundError as missing:
                if not self._sent or isinstance(self.core, Core0):
                    raise LinkNotFoundError(f"{missing}: is the proxy running?") from missing
                with trio.move_on_after(PATIENCE) as patience:
                    await self.core.wait_running()
                if patience.cancelled_caught:
                    raise
            else:
                self._sent = True
                return True

    async def listen(self, came: Counter[str], *, task_status: trio.TaskStatus[None]) -> None:
        """Count the arriving notifications until cancelled. Raises IncoError."""
        # Signals that share a state file also share a label: listen for only one of them.
        signals = None if self.labels is None else list({label: name for name, label in self.labels.items()}.values())
        with self.core.events(math.inf, signals=signals) as arrivals:
            task_status.started()
            async for arrival in arrivals:
                came[self.label(arrival.name) or arrival.name] += 1


@asynccontextmanager
async def core1(address: str) -> AsyncIterator[Side]:
    """Simulate core 1 on the link at `address`. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
    async with Core1(address) as core:
        yield Side(core, Direction.INBOUND)


@asynccontextmanager
async def applications(table: SignalTable) -> AsyncIterator[Side]:
    """Simulate core 0. Raises ProxyNotFoundError if registers are missing, PermissionDeniedError, ResourceError."""
    states: dict[Path, list[str]] = {}
    for signal in table.inbound.values():
        states.setdefault(signal.path, []).append(signal.name)
    labels = {name: " or ".join(names) for names in states.values() for name in names}
    async with Core0(table) as core:
        yield Side(core, Direction.OUTBOUND, {signal.name for signal in table.outbound.values()}, labels)


@attrs.define
class Played:
    """The number of notifications that were played and the number that came back, by signal or label."""

    sent: Counter[str] = attrs.Factory(Counter)
    expected: Counter[str] = attrs.Factory(Counter)
    """Recorded notifications in the other direction, which are expected to come back."""
    came: Counter[str] = attrs.Factory(Counter)
    unknown: Counter[str] = attrs.Factory(Counter)
    """Notifications that were skipped because the direction or the register of the signal is unknown."""
    overflowed: bool = False
    position: int = 0
    """Number of bytes read from the recording so far."""

    @property
    def missing(self) -> Mapping[str, int]:
        """Recorded notifications that did not arrive."""
        return self.expected - self.came

    @property
    def surplus(self) -> Mapping[str, int]:
        """Notifications that arrived but are not in the recording."""
        return self.came - self.expected


async def play(side: Side, recording: Recording, played: Played, *, speed: float | None, wait: float) -> None:
    """Play one direction of the recording, and count the notifications in `played`. Raises IncoError.

    A `speed` of 2 halves the time; None plays as fast as possible. The function returns `wait` seconds after the last
    notification.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(side.listen, played.came)
        begun = trio.current_time()
        first_ns = None
        accepted = Counter[tuple[str, str]]()
        for number, entry in enumerate(recording, 1):
            played.position = recording.reader.position
            if first_ns is None:
                first_ns = entry.time_ns
            due = begun if speed is None else begun + (entry.time_ns - first_ns) / 1e9 / speed
            if due > trio.current_time():
                await trio.sleep_until(due)
            elif number % TURN == 0:
                await trio.lowlevel.checkpoint()
            if isinstance(entry, Mark):
                continue
            # A notification that was pending is recorded twice: when it was accepted, and when it was delivered. Only
            # the latter is in the recording if the recording began in between.
            if entry.direction is side.direction:
                if entry.pending:
                    accepted[entry.board, entry.signal] += 1
                elif (entry.delay or entry.delay_max) and accepted[entry.board, entry.signal]:
                    accepted[entry.board, entry.signal] -= 1
                    continue
            elif entry.pending:
                continue
            if entry.direction is side.direction:
                counted = played.sent if await side.send(entry.signal) else played.unknown
                counted[entry.signal] += 1
            elif entry.direction is not None and (label := side.label(entry.signal)) is not None:
                played.expected[label] += 1
            else:
                played.unknown[entry.signal] += 1
        played.position = recording.reader.position
        await trio.sleep(wait)
        played.overflowed = side.overflowed
        nursery.cancel_scope.cancel()
