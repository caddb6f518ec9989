"""The progress display of the demonstration."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Protocol

from inco_trio.simulation.traffic import Traffic, duration

__all__ = ["Output", "Screen"]


class Output(Protocol):
    """The text stream to which a demonstration writes its progress."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Screen:
    """A display that updates one line per signal on a terminal. Without a terminal, it prints one line per second."""

    def __init__(self, out: Output, traffic: Sequence[Traffic]) -> None:
        self._out = out
        self.traffic = traffic
        self._terminal = out.isatty()
        self._drawn = False
        self.next = time.monotonic() + (0.0 if self._terminal else 1.0)
        """The time (time.monotonic()) at which to call `show` next."""

    def show(self, *, last: bool = False) -> None:
        """Show the counts if an update is due, or if this is the `last` call."""
        now = time.monotonic()
        if now < self.next and not last:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{len(self.traffic)}A" if self._drawn else ""
            self._write(up + "".join(f"\x1b[K{self._line(one)[:width]}\n" for one in self.traffic))
            self._drawn = True
            self.next = now + 0.05
        else:
            sent, arrived = (
                sum(counts) for counts in zip(*((t.sent, len(t.latencies)) for t in self.traffic), strict=True)
            )
            self._write(f"  {sent} sent, {arrived} arrived\n")
            self.next = now + 1.0

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    @staticmethod
    def _line(one: Traffic) -> str:
        arrived = len(one.latencies)
        bar = "#" * (20 * arrived // one.wanted)
        latency = duration(one.latencies[-1]) if one.latencies else ""
        state = "LOST" if one.lost else latency
        return f"  {one.way}  {one.signal.name:<18}  {arrived:>5} [{bar:<20}] {state:>7}"
