"""`inco-trio send`: send notifications through the running proxy, as an application or as core 1."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

from inco_trio.cli import signalling
from inco_trio.cli.options import number_of_seconds, positive, rate
from inco_trio.cli.streams import remark, say
from inco_trio.errors import ProxyNotFoundError

AT_ONCE = 1000
"""Maximum number of notifications per request. An interrupted `send` can thus report roughly how many were sent."""
SLEEP_MAX = 3600.0
EXIT_NOT_SENT = 1
WHAT = "sent by core 0"
_WHERE = {"board": "through {}", "register": "by {}", "link": "as core 1 on {}"}
"""The text to print for each JSON key that describes how notifications are sent."""
HINT = "core 1 sends it (LINK --as core1)"


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] SIGNAL [LINK]"
    sub.epilog = "example: inco-trio send redun_notify_irq --count 100 --rate 50"
    signalling.add_ways(sub)
    sub.add_argument("--count", type=positive, default=1, metavar="N", help="notifications to send (default: 1)")
    sub.add_argument(
        "--rate", type=rate, metavar="R", help="notifications per second (default: as fast as they are accepted)"
    )
    sub.add_argument("--timeout", type=number_of_seconds, metavar="TIME", help="fail (exit 1) after TIME, such as 10s")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument("-q", "--quiet", action="store_true", help="print only errors")


def run(args: argparse.Namespace) -> int:
    """Send the notifications; return the exit code. Raises IncoError."""
    signalling.check_ways(args)
    schedule = _Schedule(args.count, args.rate, args.timeout)
    in_time = True
    try:
        if args.core1 is not None:
            _send_as_core1(args, schedule)
        elif signalling.is_application(args):
            _send_as_application(args, schedule)
        else:
            _send_through_proxy(args, schedule)
    except TimeoutError:
        in_time = False
    finally:
        if schedule.sent < args.count and (schedule.sent or not in_time):
            remark(f"{args.signal}: {schedule.sent} of {args.count} were sent")
    if args.json:
        result = {"signal": args.signal, "count": args.count, "sent": schedule.sent, "seconds": schedule.seconds}
        say(json.dumps({"version": 1, **result, **dict.fromkeys(_WHERE), **schedule.where}))
    elif in_time and not args.quiet:
        (where,) = (_WHERE[key].format(value) for key, value in schedule.where.items())
        say(f"{args.signal}: {schedule.sent} sent, {where}, in {schedule.seconds:.3f} s")
    return 0 if in_time else EXIT_NOT_SENT


class _Schedule:
    """The times at which notifications are due: at fixed intervals, no matter how long each send takes.

    `check` raises TimeoutError `timeout` seconds after the start.
    """

    def __init__(self, count: int, rate: float | None, timeout: float | None = None) -> None:
        self.sent = 0
        self.where: dict[str, str] = {}
        """The board, register or link through which the notifications are sent, with its key in `_WHERE`."""
        self._count = count
        self._rate = rate
        self._timeout = math.inf if timeout is None else timeout
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def patience(self) -> float:
        """The time left until the timeout, in seconds."""
        return max(0.0, self._timeout - self.seconds)

    def check(self) -> None:
        if not self.patience:
            raise TimeoutError

    @property
    def left(self) -> bool:
        return self.sent < self._count

    def due(self) -> int:
        """Return how many notifications to send now."""
        left = self._count - self.sent
        if self._rate is not None:
            left = int(min(left, self.seconds * self._rate + 1 - self.sent))
        return min(left, AT_ONCE)

    def pause(self) -> float:
        """Return the time until the next notification is due, in seconds."""
        if self._rate is None:
            return 0
        return min(max(0, self.sent / self._rate - self.seconds), SLEEP_MAX, self.patience)

    def follow(self, send: Callable[[int], None]) -> None:
        """Call `send` with the number of notifications whenever some are due. Return once all have been sent."""
        while self.left:
            self.check()
            if due := self.due():
                send(due)
                self.sent += due
            else:
                time.sleep(self.pause())


def _send_through_proxy(args: argparse.Namespace, schedule: _Schedule) -> None:
    from inco_trio.control.client import connect
    from inco_trio.control.protocol import SendRequest

    with connect(args.link, args.control) as client:
        board = signalling.board_of(client, args)
        directions, running = signalling.signals_of(client, board)
        outbound = [name for name, direction in directions.items() if direction == "outbound"]
        signalling.check_known(args.signal, outbound, directions, WHAT, HINT)
        one = board is not None or len(client.greeting.boards) == 1
        if one and not running:
            remark("the link is down, or core 1 is not running: the proxy will send the notifications later")

        def send(count: int) -> None:
            patience = None if args.timeout is None else schedule.patience
            try:
                client.request(SendRequest(args.signal, count, board), patience)
            except ProxyNotFoundError:
                schedule.check()  # Raise TimeoutError instead if the timeout has passed.
                raise

        schedule.where = {"board": board or client.greeting.name}
        schedule.follow(send)


def _send_as_application(args: argparse.Namespace, schedule: _Schedule) -> None:
    from inco_trio.cores.watch import trigger

    path = signalling.register_of(args, "outbound", WHAT, HINT).path

    def send(count: int) -> None:
        for _ in range(count):
            trigger(path)

    schedule.where = {"register": str(path)}
    schedule.follow(send)


def _send_as_core1(args: argparse.Namespace, schedule: _Schedule) -> None:
    link = signalling.link_of(args)
    schedule.where = {"link": link}
    import trio  # Import trio lazily: the import takes longer than everything else.

    with signalling.alone():
        trio.run(_send_frames, link, args.signal, schedule)


async def _send_frames(link: str, name: str, schedule: _Schedule) -> None:
    import trio

    from inco_trio.cores.core1 import Core1

    async with Core1(link) as core1:
        with trio.move_on_after(schedule.patience):
            while schedule.left:
                if schedule.due():
                    await core1.send(name)
                    schedule.sent += 1
                else:
                    await trio.sleep(schedule.pause())
    if schedule.left:
        raise TimeoutError
