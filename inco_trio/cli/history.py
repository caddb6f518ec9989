"""`inco-trio history`: print the last notifications and events that a proxy recorded."""

from __future__ import annotations

import argparse
import heapq
import operator
import time
from collections.abc import Iterable, Iterator

from inco_trio.cli.monitor import Lines
from inco_trio.cli.options import add_color, add_place, number_of_seconds
from inco_trio.cli.signalling import board_of, check_open, direction_of, remark_unknown
from inco_trio.cli.streams import remark, say, say_text
from inco_trio.cli.terminal import painted
from inco_trio.control.client import Client, connect
from inco_trio.control.protocol import Event, HistoryRequest, MonitorRequest, Past
from inco_trio.persist.recorder import events_kept
from inco_trio.proxy_status import RecorderStatus
from inco_trio.service.lines import printable
from inco_trio.wall_clock import local_time


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "The proxy keeps the last 4,096 notifications and 512 events of each board (`run --history N`). They survive\n"
        "a crash of the proxy if an fd store keeps its descriptors. A batch has one line for each signal.\n"
        "example: inco-trio history --since 10m --signal ihub_hwwd_irq"
    )
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="only this board")
    sub.add_argument("--since", type=number_of_seconds, metavar="TIME", help="only the last TIME, such as 10m or 2h")
    sub.add_argument("--signal", action="append", metavar="NAME", help="only this signal (repeatable)")
    sub.add_argument(
        "--direction", metavar="WAY", choices=("inbound", "outbound"), help="only this direction: inbound or outbound"
    )
    add_color(sub)
    sub.add_argument(
        "--json", action="store_true", help='print one JSON object per line (see the page "The control socket")'
    )


def run(args: argparse.Namespace) -> int:
    """Print the history; return the exit code. Raises IncoError."""
    with connect(args.link, args.control) as client:
        remark_unknown(client, args)
        wanted = MonitorRequest(board_of(client, args), direction_of(args), args.signal)
        pasts = past_of(client, wanted.board, args.since)
        recorded = {
            each.board: None if each.status is None else each.status.recorded for each in client.status(wanted.board)
        }
    for past in pasts:
        for text in _overwritten(past, recorded.get(past.board)):
            remark(text)
    events = [*accepted(past_events(pasts), wanted)]
    if args.json:
        say(*(event.json() for event in events))
        return 0
    begins = [each.since for each in recorded.values() if each is not None and each.since is not None]
    since = f", which begins {local_time(min(begins))}" if begins else ""
    names = ", ".join(past.board for past in pasts) or client.greeting.name
    remark(f"{len(events)} lines of the history of {names}{since}")
    say_text(*painted([printable(line) for line in _lines(events, boards=len(pasts))], args.color))
    return 0


def past_of(client: Client, board: str | None, seconds: float | None) -> list[Past]:
    """Return the recorded history of one board or of all boards. `seconds` limits its age (None: no limit).

    Raises IncoError, for example if none of the boards is open.
    """
    after = None if seconds is None else max(0, time.monotonic_ns() - round(seconds * 1e9))
    boards = client.greeting.boards if board is None else (board,)
    if not boards:
        check_open(client.status())
    answers = [client.request(HistoryRequest(each, after)).history for each in boards]
    return [past for past in answers if past is not None]


def _overwritten(past: Past, recorded: RecorderStatus | None) -> Iterator[str]:
    """Yield a note about notifications, another about events, or both, if older records may have been overwritten."""
    if recorded is None:
        return
    notifications = [event for event in past.events if event.event == "notification"]
    others = [event for event in past.events if event.event != "notification"]
    for what, kept, room in (
        ("notifications", notifications, recorded.kept),
        ("events", others, events_kept(recorded.kept)),
    ):
        if len(kept) >= room:
            since = local_time(kept[0].time)
            yield f"{past.board}: {what} before {since} are not kept (`inco-trio run --history N` keeps more)"


def past_events(pasts: Iterable[Past]) -> Iterator[Event]:
    """Yield the events of several boards in chronological order."""
    return heapq.merge(*(past.events for past in pasts), key=operator.attrgetter("monotonic_ns"))


def accepted(events: Iterable[Event], wanted: MonitorRequest) -> Iterator[Event]:
    """Yield the events that a monitor with the request `wanted` would receive."""
    for event in events:
        if (event.direction is None or wanted.direction in (None, event.direction)) and (
            event.signal is None or wanted.signals is None or event.signal in wanted.signals
        ):
            yield event


def _lines(events: Iterable[Event], boards: int) -> Iterator[str]:
    lines, day = Lines(boards=boards), ""
    for event in events:
        this_day = time.strftime("%Y-%m-%d", time.localtime(event.time))
        if this_day != day:
            day = this_day
            yield f"{day}:"
        yield lines.line(event)
