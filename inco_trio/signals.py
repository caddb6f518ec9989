"""Signals, the named inter-core interrupts, and the signal table."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from inco_trio.errors import ConfigError, InvalidArgumentError
from inco_trio.frame import NAME_MAX, is_wire_name
from inco_trio.linux.files import FILE_NAME_MAX, is_path

__all__ = [
    "BUILTIN",
    "BuiltinSignal",
    "Direction",
    "Signal",
    "SignalTable",
    "builtin_signals",
    "clashes",
    "direction_of",
    "name_fault",
    "register_fault",
]


class Direction(enum.Enum):
    """The direction of a signal from core 0's point of view."""

    INBOUND = "inbound"
    """Core 1 to core 0: the proxy writes the state file for each frame."""
    OUTBOUND = "outbound"
    """Core 0 to core 1: the proxy sends a frame when the trigger file is closed after writing."""

    __hash__ = object.__hash__  # Enum.__hash__ is a Python function and therefore slow.


def direction_of(direction: Direction | str) -> Direction:
    """Convert `inbound` or `outbound` to a Direction. Raises InvalidArgumentError for any other value."""
    try:
        return Direction(direction)
    except ValueError:
        raise InvalidArgumentError(f"direction={direction!r}: expected 'inbound' or 'outbound'") from None


def _to_path(path: Path | str) -> Path:
    return path if isinstance(path, Path) else Path(path)


def name_fault(name: str) -> str | None:
    """Return why `name` is not a valid wire name, or None if it is valid."""
    if name.isascii() and is_wire_name(name.encode("ascii")):
        return None
    return f"a wire name is 1 to {NAME_MAX} printable ASCII characters without spaces"


def register_fault(register: str) -> str | None:
    """Return why `register` is not a valid file name, or None if it is valid."""
    if register in {"", ".", ".."} or "/" in register or not is_path(register):
        return f"{register!r} is not a file name"
    length = len(os.fsencode(register))
    return f"a file name of {length} bytes is too long: at most {FILE_NAME_MAX}" if length > FILE_NAME_MAX else None


@attrs.frozen
class Signal:
    """A named inter-core interrupt.

    `name` is the wire name, 1 to 64 printable ASCII characters without spaces; `register` is a file name in
    `directory`. `direction` may be text. Raises ConfigError if one of these values is invalid.
    """

    name: str
    direction: Direction = attrs.field(converter=direction_of)
    directory: Path = attrs.field(converter=_to_path)
    register: str

    def __attrs_post_init__(self) -> None:
        if fault := name_fault(self.name) or register_fault(self.register):
            raise ConfigError(f"signal {self.name!r}", fault)

    @property
    def path(self) -> Path:
        """The path of the register."""
        return self.directory / self.register


class BuiltinSignal:
    """A signal that every board has. A udrv.json may select another register for it."""

    def __init__(self, name: str, direction: Direction, reg: str, register: str) -> None:
        self.name = name
        self.direction = direction
        self.reg = reg
        """The key in `misc.ihub_config_dev.regs`."""
        self.register = register
        """The default file name of the register."""


BUILTIN = (
    BuiltinSignal("ihub_reset_irq", Direction.INBOUND, "ihub_reset_irq", "message_4_state"),
    BuiltinSignal("ihub_hwwd_irq", Direction.INBOUND, "ihub_hwwd_irq", "message_5_state"),
    BuiltinSignal("redun_notify_irq", Direction.OUTBOUND, "redun_notify_trig", "message_6_trig"),
)


def builtin_signals(directory: Path | str) -> tuple[Signal, ...]:
    """Return the three built-in signals with their default registers in `directory`."""
    return tuple(Signal(b.name, b.direction, directory, b.register) for b in BUILTIN)


def clashes(signals: Iterable[Signal]) -> Iterator[tuple[Signal, str]]:
    """Yield each signal that conflicts with an earlier one, and why.

    Two signals must not have the same wire name. Only inbound signals may share a register. Directories are compared as
    text: symlinks are not followed.
    """
    names: set[str] = set()
    owners: dict[tuple[str, str], Signal] = {}
    for signal in signals:
        if signal.name in names:
            yield signal, "is in the table twice"
        names.add(signal.name)
        # normpath keeps two leading slashes, which may have a special meaning in POSIX. On Linux, they have none.
        directory = os.path.normpath(signal.directory).replace("//", "/")
        owner = owners.setdefault((directory, signal.register), signal)
        if owner is not signal and Direction.OUTBOUND in (owner.direction, signal.direction):
            kind = "trigger" if owner.direction is Direction.OUTBOUND else "state register"
            yield signal, f"{str(signal.path)!r} is already the {kind} of {owner.name}"


class SignalTable:
    """The signals of one proxy. `inbound` and `outbound` map a wire name (bytes) to its signal."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        self.signals = tuple(signals)
        self.inbound = {s.name.encode("ascii"): s for s in self.signals if s.direction is Direction.INBOUND}
        self.outbound = {s.name.encode("ascii"): s for s in self.signals if s.direction is Direction.OUTBOUND}

    def __iter__(self) -> Iterator[Signal]:
        return iter(self.signals)

    def __len__(self) -> int:
        return len(self.signals)
