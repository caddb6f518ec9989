"""Play one side of a recording, and count the notifications of the other side.

As core 1, it sends inbound notifications as frames on a link and receives outbound ones there. As core 0, it writes
trigger files for outbound notifications and watches state files for inbound ones.
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
"""Seconds to wait for a link that went down."""
TURN = 64
"""Notifications that one task handles before other tasks run."""


@attrs.define
class Side:
    """The side to play: a core, the signals that it sends, and labels for the signals that arrive."""

    core: Core0 | Core1
    direction: Direction
    """The direction to play. The side listens for the other direction."""
    playable: Collection[str] | None = None
    """The signals that the side can send, or None for all."""
    labels: Mapping[str, str] | None = None
    """The label of each signal that can arrive, or None if that is its name."""
    _sent: bool = attrs.field(default=False, init=False)

    @property
    def overflowed(self) -> bool:
        """Whether the kernel dropped notifications before they were counted."""
        return isinstance(self.core, Core0) and self.core.overflows > 0

    def label(self, signal: str) -> str | None:
        """Return the label that counts an arriving signal, or None if the side cannot see the signal."""
        return signal if self.labels is None else self.labels.get(signal)

    async def send(self, signal: str) -> bool:
        """Play one notification; return False if this side cannot send the signal. Raises IncoError.

        Before the first notification, a link that is down is an error. Afterwards, wait for the link.
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
        # Signals that share a state file also share a label: listen for one of them.
        signals = None if self.labels is None else list({label: name for name, label in self.labels.items()}.values())
        with self.core.events(math.inf, signals=signals) as arrivals:
            task_status.started()
            async for arrival in arrivals:
                came[self.label(arrival.name) or arrival.name] += 1


@asynccontextmanager
async def core1(address: str) -> AsyncIterator[Side]:
    """Play core 1 on the link `address`. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
    async with Core1(address) as core:
        yield Side(core, Direction.INBOUND)


@asynccontextmanager
async def applications(table: SignalTable) -> AsyncIterator[Side]:
    """Play the applications. Raises ProxyNotFoundError for missing registers, PermissionDeniedError, ResourceError."""
    states: dict[Path, list[str]] = {}
    for signal in table.inbound.values():
        states.setdefault(signal.path, []).append(signal.name)
    labels = {name: " or ".join(names) for names in states.values() for name in names}
    async with Core0(table) as core:
        yield Side(core, Direction.OUTBOUND, {signal.name for signal in table.outbound.values()}, labels)


@attrs.define
class Played:
    """The notifications that were played and that came back, counted by signal or label."""

    sent: Counter[str] = attrs.Factory(Counter)
    expected: Counter[str] = attrs.Factory(Counter)
    """The notifications of the other direction in the recording."""
    came: Counter[str] = attrs.Factory(Counter)
    unknown: Counter[str] = attrs.Factory(Counter)
    """Notifications that were skipped because the direction or the register of the signal is unknown."""
    overflowed: bool = False
    position: int = 0
    """Bytes of the recording that were read."""

    @property
    def missing(self) -> Mapping[str, int]:
        """Notifications of the recording that did not arrive."""
        return self.expected - self.came

    @property
    def surplus(self) -> Mapping[str, int]:
        """Notifications that arrived and are not in the recording."""
        return self.came - self.expected


async def play(side: Side, recording: Recording, played: Played, *, speed: float | None, wait: float) -> None:
    """Play the recording and fill in `played`. `speed` 2 takes half the time, None plays as fast as possible.

    The recording contains both directions. Return `wait` seconds after its end. Raises IncoError.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(side.listen, played.came)
        begun = trio.current_time()
        first_ns = None
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
