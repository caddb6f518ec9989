"""`inco-trio status`: what a running proxy tells of itself."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import add_place, number_of_seconds
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.cli.streams import flush, say
from inco_trio.cli.terminal import is_terminal, painted, screen
from inco_trio.control.client import Client, connect
from inco_trio.service.lines import printable

__all__ = ["arguments", "run"]

Board = Mapping[str, Any]
HEAD = ("", "signal", "count", "a second", "last", "owed", "failed", "register")


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    sub.epilog = f"example: inco-trio status --watch\n{EXIT_CODES}"
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="only this one of many boards")
    sub.add_argument(
        "--watch", nargs="?", const=1.0, type=number_of_seconds, metavar="SECONDS",
        help="again every second, or so often, with the rate since the time before",
    )  # fmt: skip
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="a line of JSON, see docs/control.md")
    how.add_argument(
        "--openmetrics", action="store_true", help="OpenMetrics text, as for node_exporter's textfile collector"
    )


def run(args: argparse.Namespace) -> int:
    """Print the status; raises IncoError."""
    if args.watch is not None and args.openmetrics:
        raise UsageError("--watch and --openmetrics exclude each other")
    with connect(args.link, args.control) as client:
        if args.watch is None:
            boards = _ask(client, args)
            lines = [*_shown(boards, args, None)]
            say(*(lines if args.json or args.openmetrics else painted(lines)))
            return 0
        before: tuple[float, list[Board]] | None = None
        while True:
            boards, now = _ask(client, args), time.monotonic()
            lines = [*_shown(boards, args, before and (now - before[0], before[1]))]
            if is_terminal() and not args.json:
                say(screen(lines))
            else:
                say(*lines)
            flush()
            before = now, boards
            client.wait(args.watch)


def _ask(client: Client, args: argparse.Namespace) -> list[Board]:
    request = {"request": "status"} | ({"board": args.board} if args.board is not None else {})
    boards: list[Board] = client.request(request)["status"]
    return boards


def _shown(boards: list[Board], args: argparse.Namespace, before: tuple[float, list[Board]] | None) -> Iterator[str]:
    if args.json:
        yield json.dumps(boards)
    elif args.openmetrics:
        from inco_trio.metrics.openmetrics import openmetrics

        yield openmetrics(boards).rstrip("\n")
    else:
        past = {} if before is None else {board["board"]: board for board in before[1]}
        for board in boards:
            yield from map(printable, _board_lines(board, before and before[0], past.get(board["board"])))


def _board_lines(board: Board, seconds: float | None, past: Board | None) -> Iterator[str]:
    """A board; rates are those since `past`, or since it was opened."""
    if not board["open"]:
        yield f"{board['board']}: not open: {board['problem']}"
        return
    now = time.time()
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(board["since"]))
    state = "up" if board["running"] else "down"
    holder = board["holder"] or "nobody"
    yield f"{board['board']}: {state}, open since {since} ({_duration(now - board['since'])}), kept by {holder}"
    yield f"  {board['link']}: {board['description']}"
    counts = {} if past is None or not past["open"] else {s["signal"]: s["count"] for s in past["signals"]}
    period = seconds if counts and seconds else max(now - board["since"], 1e-3)
    rows = [HEAD]
    for each in sorted(board["signals"], key=lambda each: each["direction"]):
        rate = max(0, each["count"] - counts.get(each["signal"], 0)) / period
        last = "never" if each["last"] is None else f"{_duration(max(0.0, now - each['last']))} ago"
        way = "in" if each["direction"] == "inbound" else "out"
        numbers = (str(each["count"]), f"{rate:.3g}", last, str(each["owed"]), str(each["failures"]))
        rows.append((way, each["signal"], *numbers, each["register"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        cells = [
            cell.rjust(width) if number in (2, 3, 4, 5, 6) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()
    for each in board["signals"]:
        if each["problem"]:
            yield f"  {each['signal']}: {each['register']}: {each['problem']}"
    for leg in board["legs"]:
        if leg["problem"] or leg["restarts"]:
            problem = leg["problem"] or f"last: {leg['last_problem']}"
            yield f"  {leg['leg']}: restarted {leg['restarts']} times; {problem}"
    if counters := ", ".join(f"{count} {name}" for name, count in board["counters"].items() if count):
        yield f"  counters: {counters}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
