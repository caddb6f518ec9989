"""`inco-trio status`: print the status of a running proxy."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import add_color, add_place, number_of_seconds
from inco_trio.cli.signalling import board_of
from inco_trio.cli.streams import flush, say, say_text
from inco_trio.cli.terminal import is_terminal, painted, screen
from inco_trio.control.client import Client, connect, connect_all, wait_for_end
from inco_trio.control.protocol import PROTOCOL, BoardStatus, to_json
from inco_trio.errors import InvalidArgumentError
from inco_trio.problems import times
from inco_trio.proxy_status import Status
from inco_trio.service.lines import printable
from inco_trio.signals import Direction
from inco_trio.wall_clock import local_time

HEAD = ("", "signal", "count", "per second", "last", "pending", "failures", "register")
STORED = {None: "not stored", "s6-fdholder": "stored in s6-fdholder", "systemd": "stored by systemd"}
"""The description of each kind of fd store."""
LAST = HEAD.index("last")
LAST_WIDTH = len("59 min ago")
"""Minimum width of the column `last`. It keeps the other columns in place while ages get longer."""
RATE_MIN = 0.001
"""The lowest rate that is shown as a number, in notifications per second."""
NUMBERS = range(2, 7)
"""The indexes of the right-aligned columns."""
Proxies = Mapping[str, Sequence[BoardStatus]]
"""The status of each proxy's boards, keyed by the name of the proxy."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = "example: inco-trio status --watch"
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="only this board")
    sub.add_argument(
        "--watch", nargs="?", const=1.0, type=number_of_seconds, metavar="TIME",
        help="repeat every TIME (default: 1s), with rates since the previous output",
    )  # fmt: skip
    add_color(sub)
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help='print one line of JSON (see the page "The control socket")')
    how.add_argument(
        "--openmetrics", action="store_true", help="print metrics for the textfile collector of node_exporter"
    )


def run(args: argparse.Namespace) -> int:
    """Print the status; return the exit code. Raises IncoError."""
    if args.watch is not None and args.openmetrics:
        raise UsageError("--watch and --openmetrics are mutually exclusive")
    with contextlib.ExitStack() as stack:
        clients = [connect(args.link, args.control)] if args.link or args.control else connect_all()
        for client in clients:
            stack.enter_context(client)
        if args.watch is None:
            lines = [*_shown(_ask(clients, args), args, None)]
            say_text(*(lines if args.json or args.openmetrics else painted(lines, args.color)))
            return 0
        before: tuple[float, Proxies] | None = None
        while True:
            proxies, now = _ask(clients, args), time.monotonic()
            lines = [*_shown(proxies, args, before and (now - before[0], before[1]))]
            if is_terminal() and not args.json:
                say_text(screen(lines, args.color))
            else:
                say(*lines)
            flush()
            before = now, proxies
            wait_for_end(clients, args.watch)


def _ask(clients: Sequence[Client], args: argparse.Namespace) -> Proxies:
    """Return the status of each proxy that serves the given board. Raises IncoError if none does."""
    found, errors = {}, []
    for client in clients:
        try:
            name = client.greeting.name
            # Proxies in different network namespaces have the same name if their interfaces have the same name.
            found[str(client.path) if name in found else name] = client.status(board_of(client, args))
        except InvalidArgumentError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _shown(proxies: Proxies, args: argparse.Namespace, before: tuple[float, Proxies] | None) -> Iterator[str]:
    if args.json:
        yield json.dumps(
            {"version": PROTOCOL, "boards": [to_json(board) for boards in proxies.values() for board in boards]}
        )
    elif args.openmetrics:
        from inco_trio.metrics.openmetrics import textfile

        yield textfile(proxies).rstrip("\n")
    else:
        for name, boards in proxies.items():
            past = {} if before is None else {board.board: board.status for board in before[1].get(name, ())}
            for board in boards:
                yield from map(printable, _board_lines(board, before and before[0], past.get(board.board)))


def _board_lines(board: BoardStatus, seconds: float | None, past: Status | None) -> Iterator[str]:
    """Yield the lines of a board. Rates are averages since `past`, or since the board was opened."""
    status = board.status
    if status is None:
        yield f"{board.board}: not open: {board.problem}"
        return
    now = time.time()
    since = local_time(status.since)
    link = "up" if status.running else f"down ({status.down_reason})" if status.down_reason else "down"
    state = f"{link}, open since {since} ({_duration(_uptime(status, now))})"
    stored = STORED.get(status.descriptors, f"stored by {status.descriptors}")
    yield f"{board.board}: {state}, descriptors {stored}"
    yield f"  {status.link}: {status.description}, capabilities: {' '.join(status.capabilities) or 'none'}"
    yield from _table(status, seconds, past, now)
    for each in status.signals:
        if each.problem:
            yield f"  {each.signal}: {each.register}: {each.problem}"
    for task in status.tasks:
        if task.problem or task.restarts:
            restarted = f"restarted {times(task.restarts)}; " if task.restarts else ""
            yield f"  {task.task}: {restarted}{task.problem or f'last: {task.last_problem}'}"
    if status.last_down is not None:
        ago = _duration(max(0.0, now - status.last_down))
        lasted = status.last_down_duration
        length = "" if lasted is None else f" for {_duration(lasted)}"
        reason = f": {status.last_down_reason}" if status.last_down_reason else ""
        yield f"  the link went down {times(status.counters.link_downs)}, last {ago} ago{length}{reason}"
    for rival in status.rivals:
        shared, ago = ", ".join(rival.shared), _duration(max(0.0, now - rival.since))
        yield f"  another proxy, process {rival.pid}, has shared {shared} for {ago}: run: inco-trio doctor"
    if counters := ", ".join(f"{count} {name}" for name, count in status.counters.as_dict().items() if count):
        yield f"  counters: {counters}"
    if (recorded := status.recorded) is not None and recorded.since is not None:
        since = local_time(recorded.since)
        yield f"  history since {since} ({_duration(max(0.0, now - recorded.since))}), {recorded.events} events"


def _table(status: Status, seconds: float | None, past: Status | None, now: float) -> Iterator[str]:
    counts = {} if past is None else {each.signal: each.count for each in past.signals}
    period = seconds if counts and seconds else max(_uptime(status, now), 1e-3)
    rows = [HEAD]
    for each in sorted(status.signals, key=lambda each: each.direction.value):
        rate = max(0, each.count - counts.get(each.signal, 0)) / period
        last = "never" if each.last is None else f"{_duration(max(0.0, now - each.last))} ago"
        way = "in" if each.direction is Direction.INBOUND else "out"
        numbers = (str(each.count), _rate(rate), last, str(each.pending), str(each.failures))
        rows.append((way, each.signal, *numbers, each.register))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[LAST] = max(widths[LAST], LAST_WIDTH)
    for row in rows:
        cells = [
            cell.rjust(width) if column in NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _rate(per_second: float) -> str:
    """Return a rate with three significant digits, but without an exponent."""
    if 0 < per_second < RATE_MIN:
        return f"<{RATE_MIN}"
    return f"{per_second:.3g}" if per_second < 999.5 else f"{per_second:.0f}"


def _uptime(status: Status, now: float) -> float:
    """Return how many seconds the proxy has been open. Older proxies report only the time when they were opened."""
    return status.uptime or now - status.since


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
