"""Plays one side of a recording, and listens for what the other side had done.

As core 1, inbound notifications are frames on a link, and outbound ones are listened for there. As core 0, outbound
ones are triggers that are written, and inbound ones are closes of state files.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import attrs
import trio

from inco_trio.capture.recording import Mark, Recording
from inco_trio.cores.core1 import Core1
from inco_trio.errors import STRERROR, LinkNotFoundError, from_os_error
from inco_trio.linux.inotify import IN_CLOSE_WRITE, IN_MODIFY, IN_ONLYDIR, IN_Q_OVERFLOW, Inotify, parse_events
from inco_trio.signals import Direction, SignalTable

__all__ = ["Applications", "Played", "Side", "applications", "core1", "play"]

PATIENCE = 10.0
"""Seconds for which a link that went down is waited for."""
TURN = 64
"""Notifications or frames of one task before others have their turn."""
_MISSING = ((errno.ENOENT, errno.ENOTDIR), LinkNotFoundError, "is not there: the proxy makes it, is it running?")


class Side(Protocol):
    """Who plays."""

    direction: Direction
    """Of what it plays; the other direction is listened for."""
    overflowed: bool
    """Whether more came than could be counted."""

    def label(self, signal: str) -> str | None:
        """Under what name a notification of the other direction is counted; None if it cannot be seen to come."""

    async def send(self, signal: str) -> bool:
        """Play one notification. Returns whether it can be played. Raises IncoError."""

    async def listen(self, came: Counter[str]) -> None:
        """Count what comes, until it is cancelled. Raises IncoError."""


@attrs.define
class Played:
    """What was played, and what came back: by signal, or by the signals that share a state file."""

    sent: Counter[str] = attrs.Factory(Counter)
    expected: Counter[str] = attrs.Factory(Counter)
    """What the recording has in the other direction."""
    came: Counter[str] = attrs.Factory(Counter)
    unknown: Counter[str] = attrs.Factory(Counter)
    """What could neither be played nor listened for, as no direction or no register is known of it."""
    overflowed: bool = False
    position: int = 0
    """Bytes of the recording that were read."""

    @property
    def missing(self) -> Mapping[str, int]:
        """What the recording has and what did not come."""
        return self.expected - self.came

    @property
    def surplus(self) -> Mapping[str, int]:
        """What came and what the recording does not have."""
        return self.came - self.expected


async def play(side: Side, recording: Recording, played: Played, *, speed: float | None, wait: float) -> None:
    """Play the recording and fill in `played`; `speed` 2 takes half the time, None none.

    It takes at least as long as the whole recording, both directions of it, and `wait` seconds more. Raises IncoError.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.listen, played.came)
        await trio.lowlevel.checkpoint()
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


# --------------------------------------------------------------------------------------------------------- as core 1


class _Core1:
    """Core 1, on a link that is there."""

    direction = Direction.INBOUND
    overflowed = False

    def __init__(self, core1: Core1) -> None:
        self._core1 = core1
        self._sent = False

    def label(self, signal: str) -> str | None:
        """See `Side.label`."""
        return signal

    async def send(self, signal: str) -> bool:
        """See `Side.send`. A link that goes down once something was sent is waited for."""
        while True:
            try:
                await self._core1.send(signal)
            except LinkNotFoundError as missing:
                if not self._sent:
                    raise LinkNotFoundError(missing, "is the proxy running?") from missing
                with trio.move_on_after(PATIENCE) as patience:
                    await self._core1.wait_running()
                if patience.cancelled_caught:
                    raise
                continue
            self._sent = True
            return True

    async def listen(self, came: Counter[str]) -> None:
        """See `Side.listen`."""
        async for arrival in self._core1:
            came[arrival.name] += 1


@asynccontextmanager
async def core1(address: str) -> AsyncIterator[Side]:
    """Core 1 on the link `address`. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
    async with Core1(address) as opened:
        yield _Core1(opened)


# ------------------------------------------------------------------------------------------------- as the applications


class Applications:
    """The applications of core 0, on the registers of `table`."""

    direction = Direction.OUTBOUND

    def __init__(self, table: SignalTable, inotify: Inotify) -> None:
        self.overflowed = False
        self._triggers = {s.name: s.path for s in table if s.direction is Direction.OUTBOUND}
        self._inotify = inotify
        states: dict[Path, list[str]] = {}
        for signal in table.inbound.values():
            states.setdefault(signal.path, []).append(signal.name)
        self._labels = {name: " or ".join(names) for names in states.values() for name in names}
        watches: dict[Path, int] = {}
        self._at: dict[tuple[int, bytes], str] = {}
        for path, names in states.items():
            wd = watches[path.parent] = watches.get(path.parent) or self._watch(path.parent)
            self._at[wd, os.fsencode(path.name)] = self._labels[names[0]]

    def _watch(self, directory: Path) -> int:
        try:
            # IN_MODIFY stands between two closes, which would merge into one event otherwise (inotify(7)).
            return self._inotify.watch(str(directory), IN_CLOSE_WRITE | IN_MODIFY | IN_ONLYDIR)
        except OSError as error:
            raise from_os_error(error, directory, STRERROR, _MISSING) from error

    def label(self, signal: str) -> str | None:
        """See `Side.label`."""
        return self._labels.get(signal)

    async def send(self, signal: str) -> bool:
        """See `Side.send`: open, write of `1`, close, as applications do."""
        path = self._triggers.get(signal)
        if path is None:
            return False
        try:
            # Neither made here, as it is the proxy's, nor waited for, as a FIFO would be.
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                os.write(fd, b"1")
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os_error(error, path, STRERROR, _MISSING) from error
        return True

    async def listen(self, came: Counter[str]) -> None:
        """See `Side.listen`."""
        buffer = memoryview(bytearray(65536))
        while True:
            await self._inotify.wait_readable()
            for wd, mask, name in parse_events(buffer[: self._inotify.read_into(buffer)]):
                self.overflowed |= bool(mask & IN_Q_OVERFLOW)
                if mask & IN_CLOSE_WRITE and (label := self._at.get((wd, name))):
                    came[label] += 1


@asynccontextmanager
async def applications(table: SignalTable) -> AsyncIterator[Side]:
    """The applications. Raises LinkNotFoundError for directories that are not there, PermissionDeniedError,
    ResourceError.
    """
    try:
        inotify = Inotify()
    except OSError as error:
        raise from_os_error(error, "inotify") from error
    try:
        yield Applications(table, inotify)
    finally:
        inotify.close()
