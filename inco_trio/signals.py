"""Signals: the named inter-core interrupts that the proxy carries, and the table of them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

__all__ = ["BUILTIN", "BuiltinSignal", "Direction", "Signal", "SignalTable", "builtin_signals"]


class Direction(enum.Enum):
    """Which core a signal goes to."""

    INBOUND = "inbound"
    """Core 1 to core 0: a frame makes the proxy write the state register."""
    OUTBOUND = "outbound"
    """Core 0 to core 1: a close of the trigger register makes the proxy send a frame."""


@attrs.frozen
class Signal:
    """One named inter-core interrupt.

    `name` is the wire name, 1 to 64 printable ASCII characters without spaces; `register` is a file name in `directory`.
    """

    name: str
    direction: Direction
    directory: Path
    register: str

    @property
    def path(self) -> Path:
        """The register's file."""
        return self.directory / self.register


@attrs.frozen
class BuiltinSignal:
    """A signal that every board has: its wire name, and where udrv.json may move its register."""

    name: str
    direction: Direction
    reg: str
    """Key below `misc.ihub_config_dev.regs`."""
    register: str
    """The default file name."""


BUILTIN = (
    BuiltinSignal("ihub_reset_irq", Direction.INBOUND, "ihub_reset_irq", "message_4_state"),
    BuiltinSignal("ihub_hwwd_irq", Direction.INBOUND, "ihub_hwwd_irq", "message_5_state"),
    BuiltinSignal("redun_notify_irq", Direction.OUTBOUND, "redun_notify_trig", "message_6_trig"),
)


def builtin_signals(directory: Path) -> tuple[Signal, ...]:
    """The three built-in signals with their default registers in `directory`."""
    return tuple(Signal(b.name, b.direction, directory, b.register) for b in BUILTIN)


class SignalTable:
    """The signals of one proxy, looked up by the bytes on the wire and by register.

    `inbound` and `outbound` map a wire name (bytes) to its signal.
    """

    def __init__(self, signals: Iterable[Signal]) -> None:
        self.signals = tuple(signals)
        self.inbound = {s.name.encode("ascii"): s for s in self.signals if s.direction is Direction.INBOUND}
        self.outbound = {s.name.encode("ascii"): s for s in self.signals if s.direction is Direction.OUTBOUND}

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.signals)

    def __len__(self) -> int:
        return len(self.signals)
