"""Tests of signals and of the rules for their names and files."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from inco_trio.errors import ConfigError
from inco_trio.signals import BUILTIN, Direction, Signal, SignalTable, builtin_signals, clashes

IN, OUT = Direction.INBOUND, Direction.OUTBOUND
IRQ = Path("/irq")


def test_builtin_signals_have_their_default_registers() -> None:
    assert [(s.name, s.direction, s.path) for s in builtin_signals(IRQ)] == [
        ("ihub_reset_irq", IN, IRQ / "message_4_state"),
        ("ihub_hwwd_irq", IN, IRQ / "message_5_state"),
        ("redun_notify_irq", OUT, IRQ / "message_6_trig"),
    ]
    assert [b.reg for b in BUILTIN] == ["ihub_reset_irq", "ihub_hwwd_irq", "redun_notify_trig"]


def test_the_table_finds_a_signal_by_wire_name_and_direction() -> None:
    reset, hwwd, redun = signals = builtin_signals(IRQ)
    table = SignalTable(signals)
    assert table.inbound == {b"ihub_reset_irq": reset, b"ihub_hwwd_irq": hwwd}
    assert table.outbound == {b"redun_notify_irq": redun}
    assert tuple(table) == signals
    assert len(table) == 3


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a\0", "é", "\ud800", "n" * 65])
def test_an_invalid_wire_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a wire name is 1 to 64 printable ASCII characters without spaces") as caught:
        Signal(name, IN, IRQ, "state")
    assert caught.value.problems[0].startswith(f"signal {name!r}: ")


@pytest.mark.parametrize(
    ("register", "fault"),
    [
        *((r, f"{r!r} is not a file name") for r in ("", ".", "..", "/etc", "a/b", "a/", "a\0b", "\ud800")),
        ("r" * 256, "a file name of 256 bytes is too long: at most 255"),
        ("é" * 128, "a file name of 256 bytes is too long: at most 255"),
    ],
)
def test_a_register_must_be_a_file_name(register: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Signal("x", IN, IRQ, register)
    assert caught.value.problems == (f"signal 'x': {fault}",)


@pytest.mark.parametrize("register", ["...", ".hidden", "a b", "message.4.state", "é" * 127, "r" * 255, "\udc80"])
def test_unusual_file_names_are_accepted(register: str) -> None:
    assert Signal("x", IN, IRQ, register).path == IRQ / register


def test_a_signal_is_frozen() -> None:
    signal = Signal("x", IN, IRQ, "state")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        signal.name = "y"  # type: ignore[misc] # the point of the test


A_OUT = Signal("a", OUT, IRQ, "r")
A_IN = Signal("a", IN, IRQ, "r")


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (A_OUT, Signal("b", OUT, IRQ, "r"), "'/irq/r' is already the trigger of a"),
        (A_OUT, Signal("b", IN, IRQ, "r"), "'/irq/r' is already the trigger of a"),
        (A_IN, Signal("b", OUT, IRQ, "r"), "'/irq/r' is already the state register of a"),
        (A_OUT, Signal("b", OUT, Path("/x/../irq/./"), "r"), "'/x/../irq/r' is already the trigger of a"),
        (A_OUT, Signal("b", OUT, Path("//irq"), "r"), "'//irq/r' is already the trigger of a"),
        (A_IN, Signal("a", IN, IRQ, "s"), "is in the table twice"),
    ],
)
def test_clashing_signals_are_found(first: Signal, second: Signal, why: str) -> None:
    assert list(clashes([first, second])) == [(second, why)]


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(Signal("b", IN, IRQ, "r"), id="two inbound signals in one state register"),
        pytest.param(Signal("b", OUT, IRQ, "R"), id="another register"),
        pytest.param(Signal("b", OUT, Path("/irq2"), "r"), id="another directory"),
    ],
)
def test_compatible_signals_are_accepted(second: Signal) -> None:
    assert list(clashes([A_IN, second])) == []


def test_every_clash_is_found() -> None:
    late = [Signal(name, direction, IRQ, "r") for name, direction in [("b", OUT), ("c", IN), ("d", OUT)]]
    assert [signal.name for signal, _ in clashes([A_IN, *late])] == ["b", "d"]
