"""`inco-trio monitor`: each notification as it happens, and what goes wrong."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from inco_trio.cli.options import add_place, positive
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.cli.signalling import may_listen, remark_unknown
from inco_trio.cli.streams import flush, remark, say
from inco_trio.cli.terminal import painted
from inco_trio.control.client import connect
from inco_trio.errors import ProxyNotFoundError
from inco_trio.service.lines import printable

__all__ = ["arguments", "run"]

Event = Mapping[str, Any]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `monitor`."""
    sub.epilog = (
        "example: inco-trio monitor --signal ihub_hwwd_irq --count 1\n"
        "Without a proxy, on an interface, it listens itself (CAP_NET_RAW), and sees frames only.\n" + EXIT_CODES
    )
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="only this one of many boards")
    sub.add_argument("--signal", action="append", metavar="NAME", help="only this signal; may be given several times")
    sub.add_argument("--direction", choices=("inbound", "outbound"), help="only this direction")
    sub.add_argument("--count", type=positive, metavar="N", help="end after so many notifications")
    sub.add_argument("--json", action="store_true", help="the lines of JSON as they come, see docs/control.md")


def run(args: argparse.Namespace) -> int:
    """Print events until there are no more; raises IncoError."""
    try:
        client = connect(args.link, args.control)
    except ProxyNotFoundError:
        if not may_listen(args.link):
            raise
        from inco_trio.control.listen import Listening

        with Listening(args.link, args.signal, args.direction) as listening:
            return _print(listening.events(), args)
    request = {"request": "monitor", "board": args.board, "signals": args.signal, "direction": args.direction}
    with client:
        remark_unknown(client, args)
        client.request({key: value for key, value in request.items() if value is not None})
        remark(f"listening to {client.greeting['name']}")
        return _print(client.events(), args)


def _print(events: Iterable[Event], args: argparse.Namespace) -> int:
    """Print each event; ends after as many notifications as were asked for."""
    left, shown = args.count, _Lines()
    for event in events:
        say(*([json.dumps(event)] if args.json else painted([printable(shown.line(event))])))
        flush()
        if left is not None and event["event"] == "notification":
            left -= 1
            if not left:
                break
    return 0


class _Lines:
    """Events as text; each notification with the time since the last of its kind."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, str], int] = {}
        self._boards: set[str] = set()

    def line(self, event: Event) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        parts = [f"{stamp}.{int(event['time'] % 1 * 1e6):06d}"]
        board = event.get("board", "")
        self._boards.add(board)
        if len(self._boards) > 1:
            parts.append(f"{board}:")
        return " ".join([*parts, *self._told(event, board)])

    def _told(self, event: Event, board: str) -> Iterator[str]:
        match event["event"]:
            case "notification":
                key = (board, event["direction"], event["signal"])
                now = event["monotonic_ns"]
                last, self._last[key] = self._last.get(key), now
                yield f"{'in ' if event['direction'] == 'inbound' else 'out'} {event['signal']}"
                if last is not None:
                    yield f"+{(now - last) / 1e9:.6f} s"
            case "ignored":
                yield f"ignored: {event['reason']}{' signal ' + event['signal'] if event['signal'] else ' frame'}"
            case "link":
                yield f"the link {'came up' if event['running'] else 'went down'}"
            case "lost":
                yield f"{event['count']} events were lost here: they came faster than they could be shown"
            case _:
                yield f"{event.get('level', 'info')}: {event.get('message', event['event'])}"
