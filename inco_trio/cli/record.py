"""`inco-trio record`: each notification as it happens, with its frame, to a pcapng file."""

from __future__ import annotations

import argparse
import contextlib
import math
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import add_place, number_of_seconds, path_of, positive
from inco_trio.cli.signalling import may_listen, remark_unknown
from inco_trio.cli.streams import remark
from inco_trio.control.client import Client, connect
from inco_trio.errors import IncoError, ProxyNotFoundError
from inco_trio.service import process_signals
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from inco_trio.capture.recording import Recorder
    from inco_trio.control.listen import Listening

__all__ = ["arguments", "run"]

Event = Mapping[str, Any]

AGAIN = 0.2
"""Seconds until a proxy that ended is asked for again."""
SHOWN = 0.5
"""Seconds between two looks at the progress, on a terminal."""
FAREWELL = 1.0
"""Seconds in which a proxy tells at the end what it has not told yet."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `record`."""
    sub.usage = "%(prog)s [OPTION ...] FILE [LINK]"
    sub.epilog = (
        "It ends at SIGINT, SIGTERM, --count or --duration; a proxy that ends is waited for.\n"
        "Without a proxy, on an interface, it listens itself (CAP_NET_RAW), and sees frames only.\n"
        "example: inco-trio record night.pcapng --size 100000000 --keep 10\n"
        "exit codes: 0 it ended as asked, 69 no proxy, 71 no room, 77 no permission; see inco-trio --help"
    )
    sub.add_argument("file", metavar="FILE", help="written as pcapng; a file that is there is replaced")
    add_place(sub)
    sub.add_argument("--board", metavar="NAME", help="only this one of many boards")
    sub.add_argument("--signal", action="append", metavar="NAME", help="only this signal; may be given several times")
    sub.add_argument("--direction", choices=("inbound", "outbound"), help="only this direction")
    sub.add_argument("--count", type=positive, metavar="N", help="end after so many notifications")
    sub.add_argument("--duration", type=number_of_seconds, metavar="SECONDS", help="end after so long")
    sub.add_argument("--size", type=positive, metavar="BYTES", help="go on in FILE_00002 and so on before this size")
    sub.add_argument("--period", type=number_of_seconds, metavar="SECONDS", help="go on in another file after so long")
    sub.add_argument("--keep", type=positive, metavar="N", help="of more files than these, remove the oldest")


def run(args: argparse.Namespace) -> int:
    """Record until it ends; raises IncoError."""
    path = path_of(args.file, "FILE")
    if args.keep is not None and args.size is None and args.period is None:
        raise UsageError("--keep needs --size or --period: else there is one file")
    with process_signals.wakeups(process_signals.STOPS) as stops, contextlib.ExitStack() as stack:
        stop = _Stop(stops, args.duration)
        source = stack.enter_context(_source(args, stop))

        from inco_trio.capture.recording import Recorder

        recorder = Recorder(path, size_max=args.size, seconds_max=args.period, keep=args.keep)
        stack.callback(recorder.close)
        remark(f"recording {source.name} to {recorder.path}")
        try:
            _record(args, source, stop, recorder)
        finally:
            _show("")
            several = f"{len(recorder.written)} files, the last one " if len(recorder.written) > 1 else ""
            remark(f"{recorder.count} notifications in {several}{recorder.path}")
    return 0


class _Stop:
    """Knows when to end: SIGINT or SIGTERM has come, or it is time. Nothing is interrupted in the middle of a write."""

    def __init__(self, sock: socket.socket, duration: float | None) -> None:
        self._sock = sock
        self._over = False
        self._end = math.inf if duration is None else time.monotonic() + duration

    def wait(self, seconds: float, *others: _Proxy | Listening) -> bool:
        """Wait, until one of `others` has something, at most; returns whether it is the end."""
        if not self._over:
            left = min(seconds, self._end - time.monotonic())
            ready, _, _ = select.select([self._sock, *others], [], [], None if left == math.inf else max(0, left))
            self._over = self._sock in ready or time.monotonic() >= self._end
        return self._over


class _Proxy:
    """A proxy that is asked again when it was started again."""

    def __init__(self, client: Client, args: argparse.Namespace, stop: _Stop) -> None:
        self._client, self._args, self._stop = client, args, stop
        self.name = str(client.greeting["name"])
        self._gone = False
        self._ask()

    def _ask(self) -> None:
        request = {"request": "monitor", "frames": True, "board": self._args.board, "signals": self._args.signal}
        request["direction"] = self._args.direction
        self._client.request({key: value for key, value in request.items() if value is not None})

    def __enter__(self) -> _Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def fileno(self) -> int:
        return self._client.fileno()

    def arrived(self) -> list[dict[str, Any]]:
        """The events that are there, without waiting, but for the next process if this one has ended."""
        try:
            return self._client.arrived()
        except ProxyNotFoundError as error:
            self._client.close()
            remark(f"{error}: waiting for the next")
            ended = _mark("the proxy has ended")
            while not self._stop.wait(AGAIN):
                with contextlib.suppress(ProxyNotFoundError):
                    self._client = Client(self._client.path)
                    self._ask()
                    return [ended, _mark("the proxy was started again")]
            self._gone = True
            return [ended]

    def rest(self) -> Iterator[dict[str, Any]]:
        """What the proxy has told until now."""
        if self._gone:
            return
        with contextlib.suppress(IncoError):
            with contextlib.suppress(IncoError):  # If it has ended meanwhile, what it told before is still there.
                self._client.request({"request": "flush"}, FAREWELL)
            for event in self._client.events(FAREWELL):
                if event["event"] == "flushed":
                    break
                yield event


def _mark(text: str) -> dict[str, Any]:
    return {"event": "message", "message": text, "time": time.time()}


@contextlib.contextmanager
def _source(args: argparse.Namespace, stop: _Stop) -> Iterator[_Proxy | Listening]:
    try:
        client = connect(args.link, args.control)
    except ProxyNotFoundError:
        if not may_listen(args.link):
            raise
        from inco_trio.control.listen import Listening

        with Listening(args.link, args.signal, args.direction) as listening:
            remark(f"no proxy answers: listening on {args.link} itself")
            yield listening
        return
    remark_unknown(client, args)
    with client, _Proxy(client, args, stop) as proxy:
        yield proxy


def _record(args: argparse.Namespace, source: _Proxy | Listening, stop: _Stop, recorder: Recorder) -> None:
    shows, shown = sys.stderr.isatty(), time.monotonic()
    while not stop.wait(SHOWN if shows else math.inf, source):
        for event in source.arrived():
            _write(recorder, event, source.name)
            if recorder.count == args.count:
                return
        if shows and time.monotonic() - shown > SHOWN:
            shown = time.monotonic()
            _show(f"{recorder.count} notifications")
    for event in source.rest():
        _write(recorder, event, source.name)
        if recorder.count == args.count:
            return


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _write(recorder: Recorder, event: Event, name: str) -> None:
    """Append an event to the recording."""
    time_ns = round(event["time"] * 1e9)
    board = event.get("board", name)
    frame = None if event.get("frame") is None else bytes.fromhex(event["frame"])
    whose = "" if board == name else f"{board}: "
    match event["event"]:
        case "notification":
            way = Direction(event["direction"])
            recorder.append(time_ns, way, event["signal"], event["register"] or "", frame, board)
        case "ignored":
            text = f"ignored: {event['reason']}{' signal ' + event['signal'] if event['signal'] else ' frame'}"
            if frame is None:
                recorder.mark(time_ns, f"{whose}{text}")
            else:
                recorder.ignored(time_ns, text, frame, board)
        case "link":
            recorder.mark(time_ns, f"{whose}the link {'came up' if event['running'] else 'went down'}")
        case "lost":
            recorder.mark(time_ns, f"{event['count']} events were lost here: they came too fast")
        case _:
            recorder.mark(time_ns, f"{whose}{event.get('message', event['event'])}")
