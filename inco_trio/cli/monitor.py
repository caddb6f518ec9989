"""`inco-trio monitor`: print notifications and problems as they happen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator

from inco_trio.cli.options import add_color, add_place, add_selection
from inco_trio.cli.signalling import board_of, clock_time, direction_of, may_listen, remark_unknown
from inco_trio.cli.streams import flush, remark, say_text
from inco_trio.cli.terminal import painted
from inco_trio.control.client import connect
from inco_trio.control.protocol import Event, MonitorRequest
from inco_trio.errors import ProxyNotFoundError
from inco_trio.service.lines import printable
from inco_trio.signals import Direction

__all__ = ["Lines", "arguments", "repeated", "run"]

COLUMNS = "local time, direction, signal, + time since the previous notification of the same signal"
"""The columns of a notification line, as listed in the header."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "example: inco-trio monitor --signal ihub_hwwd_irq --count 1\n"
        "If no proxy is running, the command captures frames on the interface (needs CAP_NET_RAW)."
    )
    add_place(sub)
    add_selection(sub)
    add_color(sub)
    sub.add_argument(
        "--json", action="store_true", help='print the JSON lines of the proxy (see the page "The control socket")'
    )


def run(args: argparse.Namespace) -> int:
    """Print events until `--count` notifications have been printed; return the exit code. Raises IncoError."""
    direction = direction_of(args)
    try:
        client = connect(args.link, args.control)
    except ProxyNotFoundError:
        if not may_listen(args.link):
            raise
        from inco_trio.control.listen import Listening

        with Listening(args.link, args.signal, direction) as listening:
            return _print(listening.events(), args, Lines())
    with client:
        remark_unknown(client, args)
        board = board_of(client, args)
        client.request(MonitorRequest(board, direction, args.signal))
        columns = "" if args.json else f" ({COLUMNS})"
        remark(f"listening to {client.greeting.name}{columns}")
        return _print(client.events(), args, Lines(1 if board else len(client.greeting.boards)))


def _print(events: Iterable[Event], args: argparse.Namespace, shown: Lines) -> int:
    left = args.count
    for event in events:
        say_text(*([event.json()] if args.json else painted([printable(shown.line(event))], args.color)))
        flush()
        if left is not None and event.event == "notification":
            left -= 1
            if not left:
                break
    return 0


class Lines:
    """A formatter for events. It shows the time since the previous notification of the same signal."""

    def __init__(self, boards: int = 1) -> None:
        self._last: dict[tuple[str, Direction, str], int] = {}
        self._boards: set[str] = set()
        self._names_boards = boards > 1

    def line(self, event: Event) -> str:
        parts = [clock_time(event)]
        self._boards.add(event.board)
        if self._names_boards or len(self._boards) > 1:
            parts.append(f"{event.board}:")
        return " ".join([*parts, *self._shown(event)])

    def _shown(self, event: Event) -> Iterator[str]:
        match event:
            case Event(event="notification", direction=Direction() as direction, signal=str() as signal):
                key, now = (event.board, direction, signal), event.monotonic_ns
                last, self._last[key] = self._last.get(key), now
                yield f"{'in ' if direction is Direction.INBOUND else 'out'} {signal}"
                if event.count > 1:
                    yield f"{event.count} times"
                if last is not None:
                    yield f"+{(now - last) / 1e9:.6f} s"
                if event.delay:
                    yield f"(was pending for {event.delay:.6f} s)"
                elif event.delay_max:
                    yield f"(was pending for up to {math.ceil(event.delay_max * 10) / 10:.1f} s)"
            case Event(event="pending", direction=Direction() as direction, signal=str() as signal):
                yield f"{'in ' if direction is Direction.INBOUND else 'out'} {signal} pending: {event.reason}"
                yield from repeated(event)
            case Event(event="ignored"):
                yield f"ignored: {event.reason}{' signal ' + event.signal if event.signal else ' frame'}"
                yield from repeated(event)
            case Event(event="link"):
                yield event.message or f"the link {'came up' if event.running else 'went down'}"
            case Event(event="lost"):
                yield f"{event.count} events lost: they arrived faster than they could be printed"
            case _:
                yield f"{event.level or 'info'}: {event.message or event.event}"
                yield from repeated(event)


def repeated(event: Event) -> Iterator[str]:
    """Yield how many times a recorded event occurred, if it occurred more than once."""
    if event.last_ns:
        yield f"({event.count} times within {(event.last_ns - event.monotonic_ns) / 1e9:.1f} s)"
