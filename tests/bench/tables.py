"""The signal tables of the benchmark: as text for the C programs, as udrv.json for inco-trio."""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from inco_trio.signals import BUILTIN, Direction

__all__ = ["Entry", "signals", "write_table", "write_udrv"]


@attrs.frozen
class Entry:
    """One signal: its wire name, its direction, and the file name of its register."""

    name: str
    direction: Direction
    register: str


def signals(count: int) -> list[Entry]:
    """Return `count` signals, beginning with the three built-in ones. Two thirds of the signals are inbound."""
    entries = [Entry(b.name, b.direction, b.register) for b in BUILTIN]
    for index in range(len(entries), count):
        direction, kind = (Direction.OUTBOUND, "trig") if index % 3 == 2 else (Direction.INBOUND, "state")
        entries.append(Entry(f"bench_{index}_irq", direction, f"message_{index}_bench_{kind}"))
    return entries


def write_table(path: Path, entries: list[Entry]) -> None:
    """Write a table for the C programs, with a line "name direction register" for each signal."""
    path.write_text("".join(f"{entry.name} {entry.direction.value} {entry.register}\n" for entry in entries))


def write_udrv(path: Path, directory: Path, entries: list[Entry]) -> None:
    """Write a configuration whose registers are in `directory`."""
    table = {
        entry.name: {"direction": entry.direction.value, "reg": f"ihub-irq-dev.{entry.register}"} for entry in entries
    }
    document = {"file": {"ihub-irq-dev": {"path": str(directory)}}, "misc": {"inco_proxy": {"signals": table}}}
    path.write_text(json.dumps(document))
