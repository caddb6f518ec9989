"""`inco-trio check`: validate a configuration and print its signals, or the boards of a directory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import attrs

from inco_trio.cli import options
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.streams import say, say_bytes, say_text
from inco_trio.errors import ConfigError
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.signals import Signal


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = "example: inco-trio check --config udrv.json"
    options.configuration_argument(sub)
    sub.add_argument("iface", nargs="?", metavar="LINK", help="also check and explain this link")
    sub.add_argument("--iface", dest="former_iface", help=argparse.SUPPRESS)
    sub.add_argument("--boards", metavar="DIR", help=options.BOARDS_HELP)
    sub.add_argument("--gateway", metavar="FILE", help="check this configuration of `inco-trio mqtt`")
    sub.add_argument("--example", action="store_true", help="print a complete udrv.json as an example")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Check the given files and print their contents; return the exit code. Raises ConfigError, UsageError."""
    if args.example:
        say_bytes(resources.files("inco_trio").joinpath("example.json").read_bytes())
        return 0
    args.iface = args.former_iface if args.iface is None else args.iface
    if args.gateway is not None:
        return _check_gateway(args)
    if args.boards is not None:
        return _check_boards(options.boards_directory(args, "--config", "IFACE"), as_json=args.json)
    board = options.configured_board(args)
    rows = _rows(board.signals)
    link: dict[str, str | None] = {}
    explained = []
    if args.iface is not None:
        options.check_link(args.iface)
        address = parse_address(args.iface)
        explained = [f"link: {address.explanation}"]
        link = {"link": args.iface, "mac": None, "peer": None}
        if isinstance(address, UnixAddress):
            link |= {"mac": address.mac.hex(":"), "peer": address.peer}
    if args.json:
        say_text(json.dumps({"version": 1, **link, "signals": rows, "notes": list(board.notes)}, indent=2))
        return 0
    widths = [max(len(row[key]) for row in rows) for key in ("signal", "direction")]
    lines = [f"{row['signal']:{widths[0]}}  {row['direction']:{widths[1]}}  {row['register']}" for row in rows]
    say(*lines, *explained, *(f"note: {note}" for note in board.notes))
    return 0


def _rows(signals: Iterable[Signal]) -> list[dict[str, str]]:
    """Return the signals for JSON, inbound signals first."""
    return [
        {"signal": signal.name, "direction": signal.direction.value, "register": str(signal.path)}
        for signal in sorted(signals, key=lambda signal: signal.direction.value)
    ]


def _check_gateway(args: argparse.Namespace) -> int:
    """Print the boards and permitted signals of a gateway. Raises ConfigError, PermissionDeniedError, UsageError."""
    from inco_trio.mqtt.configuration import read_gateway

    if any(option is not None for option in (args.config, args.iface, args.boards)):
        raise UsageError("--gateway cannot be combined with --config, LINK or --boards")
    config = read_gateway(options.absolute(args.gateway, "--gateway"))
    config.broker.read()
    if args.json:
        say_text(json.dumps({"version": 1, **attrs.asdict(config)}, indent=2))
        return 0
    say(f"boards: {', '.join(config.boards) if config.boards else 'all'}")
    for board, signals in config.send.items():
        what = "all signals" if "*" in signals else ", ".join(signals) or "none"
        say(f"may be sent to {'all boards' if board == '*' else board}: {what}")
    if not config.send:
        say("nothing may be sent")
    if config.response_prefix is not None:
        say(f"responses are published below {config.response_prefix}/")
    return 0


def _check_boards(directory: Path, *, as_json: bool) -> int:
    """Print the valid boards, then raise ConfigError if other boards are invalid."""
    from inco_trio.board_files import read_boards

    boards = read_boards(directory)
    refused = {name: error.problems for name, error in boards.refused.items()}
    if as_json:
        rows = [
            {
                "board": name,
                "link": config.link,
                "netns": None if config.netns is None else str(config.netns),
                "owner": config.owner,
                "group": config.group,
                "signals": _rows(config.signals),
            }
            for name, config in boards.configs.items()
        ]
        say_text(json.dumps({"version": 1, "boards": rows, "refused": refused, "notes": boards.notes}, indent=2))
    else:
        width = max(map(len, boards.configs), default=0)
        for name, config in boards.configs.items():
            place = "" if config.netns is None else f" in {config.netns}"
            say(f"{name:{width}}  {config.link}{place}, {len(config.signals)} signals")
    if refused:
        raise ConfigError("", (line for lines in refused.values() for line in lines))
    return 0
