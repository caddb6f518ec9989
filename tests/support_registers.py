"""Helpers for tests of the registers without a proxy."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from inco_trio.counters import Counters
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, Inotify, parse_events
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.share import Share, SharedInotify
from inco_trio.registers.directory import EMPTIED
from inco_trio.registers.registers import Registers
from inco_trio.registers.triggers import RETIREMENT, Triggered
from inco_trio.signals import Signal, SignalTable

__all__ = ["Clock", "World", "finish_steps"]


def finish_steps(steps: Generator[object, None, None]) -> None:
    """Run all steps of an operation that lets other tasks run between its steps."""
    for _ in steps:
        pass


class Clock:
    """A replacement for the module `real_clock`. The test advances its clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return round(self.now * 1e9)

    def time_ns(self) -> int:
        return round(self.now * 1e9)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the module `real_clock` in the modules of `inco_trio.registers`."""
        for module in ("directories", "directory", "registers", "retries", "states", "triggers"):
            monkeypatch.setattr(f"inco_trio.registers.{module}.real_clock", self, raising=False)


class BoardShare(Share):
    """One board's share of an inotify descriptor. Another board watches directories with the same descriptor."""

    def __init__(self, held: int | None, inflight: Inflight, watched: tuple[Path, ...]) -> None:
        self._others = (Inflight.open(), Inflight.open())
        shared = SharedInotify(held, self._others[0].events[0])
        neighbour = shared.share(self._others[1])
        super().__init__(shared, inflight.queue)
        shared.adopt(self, inflight)
        for path in watched:
            with contextlib.suppress(OSError):
                neighbour.watch(str(path), ino.IN_CREATE | ino.IN_ONLYDIR)

    def read_into(self, buffer: memoryview) -> int:
        self._shared.drain()
        return super().read_into(buffer)

    def close(self) -> None:
        os.close(self.fd)
        for inflight in self._others:
            inflight.close()


class World:
    """The registers of a signal table. `again` returns a successor that inherits the inotify and in-flight descriptors.

    `shared` lists directories that another board watches with the same inotify descriptor; None means no sharing.
    """

    def __init__(
        self,
        clock: Clock,
        table: list[Signal],
        held: int | None = None,
        inflight: Inflight | None = None,
        shared: tuple[Path, ...] | None = None,
    ) -> None:
        self.clock = clock
        self.ending = ExitStack()
        self.inflight = inflight or Inflight.open()
        self.inotify: Inotify | BoardShare = (
            Inotify(held) if shared is None else BoardShare(held, self.inflight, shared)
        )
        self.stats = Counters()
        self.table = SignalTable(table)
        self.registers = Registers(self.inotify, self.inflight, self.stats)
        self._shared = shared
        for part in (self.inotify, self.inflight, self.registers):
            self.ending.callback(part.close)

    def again(self, table: list[Signal] | None = None) -> World:
        """Return a successor that starts as if this process had been killed."""
        table = list(self.table) if table is None else table
        inflight = Inflight.open(os.dup(self.inflight.fd))
        successor = World(self.clock, table, os.dup(self.inotify.fd), inflight, self._shared)
        self.ending.close()
        self.ending.callback(successor.ending.close)
        return successor

    def events(self) -> list[Event]:
        buffer = memoryview(bytearray(1 << 20))
        return parse_events(buffer[: self.inotify.read_into(buffer)])

    def events_of(self, *files: str) -> list[Event]:
        """Read events, and return those with these file names. Other programs can change the parent directories."""
        names = {b"", *map(os.fsencode, files)}
        return [event for event in self.events() if event.name in names]

    def take(self, triggered: Triggered) -> list[str]:
        """Return the names of the triggered signals, and record their watches, as the proxy does after sending."""
        for key, wd in triggered.watches.items():
            self.inflight.watches[key] = wd
        return [signal.name for signal in triggered.signals]

    def open(self) -> list[str]:
        """Open the registers and read the queued events; return the names of the signals that this triggers."""
        finish_steps(self.registers.open(self.table))
        return self.triggered()

    def triggered(self) -> list[str]:
        """Read the events until the queue is empty; return the names of the signals that they trigger."""
        names: list[str] = []
        while True:
            events = self.events()
            names += self.take(self.registers.triggers.follow(events))
            if not events:
                return names

    @property
    def troubled(self) -> bool:
        return self.registers.next_restore() < math.inf

    def restore(self) -> list[str]:
        """Run the retries that are due now and 10 ms later; return the names of the signals that they trigger."""
        names = []
        for _ in range(2):
            for _step in self.registers.restore():
                pass
            names += self.take(self.registers.triggers.found())
            self.clock.now += 0.01
        return names

    def later(self) -> list[str]:
        """Let all grace periods for files expire; return the names of the signals that this triggers."""
        return self.after(RETIREMENT + EMPTIED)

    def after(self, seconds: float) -> list[str]:
        """Advance the clock; return the names of the signals that retries and queued events trigger."""
        names = []
        for _ in range(4):
            self.clock.now += seconds
            names += self.restore() + self.triggered()
        return names

    def reload(self, table: list[Signal]) -> list[str]:
        self.table = SignalTable(table)
        trio.run(self.registers.reload, self.table)
        return self.restore()

    def write(self, *signals: Signal) -> None:
        known = self.registers.states.known
        self.registers.states.write([known[signal.name.encode()] for signal in signals])

    @property
    def pending(self) -> dict[str, int]:
        pending = self.inflight.pending
        return {name.decode(): pending[name] for name in pending}
