"""`inco-trio check`: validates a configuration and prints its signal table."""

from __future__ import annotations

import argparse
import json

from inco_trio.commands.configuration import config_path, configuration_argument
from inco_trio.commands.streams import say
from inco_trio.config import read_board

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    sub.epilog = "example: inco-trio check --config udrv.json"
    configuration_argument(sub)
    sub.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; raises ConfigError or UsageError."""
    board = read_board(config_path(args))
    rows = [
        {"name": s.name, "direction": s.direction.value, "register": str(s.path)}
        for s in sorted(board.signals, key=lambda s: s.direction.value)
    ]
    if args.json:
        lines = [json.dumps({"signals": rows, "notes": list(board.notes)}, indent=2)]
    else:
        widths = [max(len(row[key]) for row in rows) for key in ("name", "direction")]
        lines = [f"{row['name']:{widths[0]}}  {row['direction']:{widths[1]}}  {row['register']}" for row in rows]
        lines += [f"note: {note}" for note in board.notes]
    say(*lines)
    return 0
