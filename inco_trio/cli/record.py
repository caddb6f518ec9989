"""`inco-trio record`: write notifications and their frames to a pcapng file as they happen."""

from __future__ import annotations

import argparse
import contextlib
import math
import operator
import select
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import attrs

from inco_trio.capture.gaps import Gaps, separated
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.history import accepted, past_events, past_of
from inco_trio.cli.monitor import repeated
from inco_trio.cli.options import STREAM, add_place, add_selection, number_of_seconds, path_of, positive, size
from inco_trio.cli.signalling import board_of, direction_of, may_listen, remark_unknown
from inco_trio.cli.streams import remark
from inco_trio.control.client import SILENT, Client, connect
from inco_trio.control.protocol import Event, FlushRequest, HistoryRequest, MonitorRequest, Past
from inco_trio.errors import BoardNotOpenError, IncoError, InvalidArgumentError, ProxyNotFoundError
from inco_trio.service import process_signals
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from pathlib import Path

    from inco_trio.capture.recording import Recorder
    from inco_trio.control.listen import Listening

OF_SIGNALS = ("notification", "pending", "ignored")
"""The kinds of events that may arrive at any rate."""
AGAIN = 0.2
"""Seconds between two attempts to reconnect after the proxy has exited."""
OPENS_MIN, OPENS_MAX = 0.2, 5.0
"""Seconds between two requests that find out whether a board is open. The pause grows while the board stays closed."""
SHOWN = 0.5
"""Seconds between two progress updates on a terminal."""
FAREWELL = 1.0
"""Seconds to wait for the proxy's remaining events when the recording stops."""
HELD_MAX = 8192
"""Maximum number of events that are held until their boards are open, so that their histories come first."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] FILE [LINK]"
    sub.epilog = (
        "If the proxy exits, the command waits for the next one. Without a proxy, it captures on the interface.\n"
        "example: inco-trio record night.pcapng --size 100M --keep 10\n"
        "exit codes: 0 success, 69 no proxy, 71 no space, 77 no permission"
    )
    sub.add_argument("file", metavar="FILE", help="pcapng file to create or replace; - for standard output")
    add_place(sub)
    add_selection(sub)
    sub.add_argument("--past", action="store_true", help="write the proxy's history, which has no frames")
    sub.add_argument("--since", type=number_of_seconds, metavar="TIME", help="with --past: only the last TIME")
    sub.add_argument("--duration", type=number_of_seconds, metavar="TIME", help="stop after TIME, such as 10m")
    sub.add_argument(
        "--size", type=size, metavar="BYTES", help="start a new file (FILE_00002) at this size, such as 10M"
    )
    sub.add_argument("--period", type=number_of_seconds, metavar="TIME", help="start a new file after TIME, such as 1h")
    sub.add_argument(
        "--keep", type=positive, metavar="N", help="keep only the newest N files, including those of earlier recordings"
    )


def run(args: argparse.Namespace) -> int:
    """Record until a limit is reached or a stop signal arrives; return the exit code. Raises IncoError."""
    path = path_of(args.file, "FILE")
    _check_past(args)
    if args.past:
        return _record_past(args, path)
    if args.keep is not None and args.size is None and args.period is None:
        raise UsageError("--keep requires --size or --period: without them, only one file is written")
    if args.file == STREAM and (args.size or args.period):
        raise UsageError("FILE -: standard output cannot be split (omit --size and --period)")
    with process_signals.wakeups(process_signals.STOPS) as stops, contextlib.ExitStack() as stack:
        stop = _Stop(stops, args.duration)
        source = stack.enter_context(_source(args, stop))

        from inco_trio.capture.recording import Recorder

        recorder = Recorder(path, size_max=args.size, seconds_max=args.period, keep=args.keep)
        stack.callback(recorder.close)
        stop.pipe = recorder.pipe
        remark(f"recording {source.name} to {recorder.path}")
        try:
            for event in _events(source, stop, recorder):
                if args.count is not None and event.event == "notification":
                    # An event from the flight recorder may represent more notifications than are still wanted.
                    event = attrs.evolve(event, count=min(event.count, args.count - recorder.count))
                _write(recorder, event, source.name)
                if recorder.count == args.count:
                    break
        finally:
            _show("")
            several = f"{len(recorder.written)} files, the last one " if len(recorder.written) > 1 else ""
            remark(f"{recorder.count} notifications in {several}{recorder.path}")
    return 0


def _check_past(args: argparse.Namespace) -> None:
    """Raise UsageError if an option has no effect with or without --past."""
    if not args.past and args.since is not None:
        raise UsageError("--since applies only to --past (add --past, or omit --since)")
    for option in ("count", "duration", "size", "period", "keep") if args.past else ():
        if getattr(args, option) is not None:
            raise UsageError(f"--past and --{option} are mutually exclusive: the history is written at once")


def _record_past(args: argparse.Namespace, path: Path) -> int:
    """Write the contents of the proxy's flight recorder to a file; return the exit code. Raises IncoError."""
    with connect(args.link, args.control) as client:
        remark_unknown(client, args)
        wanted = MonitorRequest(board_of(client, args), direction_of(args), args.signal)
        count = _write_past(client, path, wanted, args.since)
        remark(f"{count} notifications of the history of {client.greeting.name} in {path}")
    return 0


def record_past(path: Path, link: str | None, control: str | None) -> None:
    """Write the contents of the flight recorder of `link`'s proxy to a file. Raises IncoError."""
    with connect(link, control) as client:
        _write_past(client, path, MonitorRequest(link if link in client.greeting.boards else None), None)


def _write_past(client: Client, path: Path, wanted: MonitorRequest, seconds: float | None) -> int:
    """Write the recorded events that `wanted` accepts to a file. Return the number of notifications."""
    from inco_trio.capture.recording import Recorder

    recorder = Recorder(path)
    with contextlib.closing(recorder):
        for event in accepted(separated(past_events(past_of(client, wanted.board, seconds))), wanted):
            _write(recorder, event, client.greeting.name)
    return recorder.count


class _Stop:
    """The conditions that end the recording: a signal, a deadline or a closed pipe. They never interrupt a write."""

    def __init__(self, sock: socket.socket, duration: float | None) -> None:
        self.pipe: int | None = None
        """The pipe that receives the recording, if any. Recording stops once the pipe's reader has exited."""
        self._sock = sock
        self._over = False
        self._end = math.inf if duration is None else time.monotonic() + duration

    def wait(self, seconds: float, *others: _Proxy | Listening) -> bool:
        """Wait up to `seconds` until one of `others` is readable; return whether to stop recording."""
        if not self._over:
            left = min(seconds, self._end - time.monotonic())
            ends = [self._sock] if self.pipe is None else [self._sock, self.pipe]
            ready, _, _ = select.select([*ends, *others], [], [], None if left == math.inf else max(0, left))
            self._over = any(end in ready for end in ends) or time.monotonic() >= self._end
        return self._over


class _Proxy:
    """A connection to a proxy. It is restored when the proxy restarts."""

    def __init__(self, client: Client, args: argparse.Namespace, stop: _Stop) -> None:
        self._client, self._stop = client, stop
        self.name = client.greeting.name
        self._gone = False
        board = board_of(client, args)
        self._open: set[str] = set()
        """The boards that were open when the recording was last complete."""
        self._wanted = MonitorRequest(board, direction_of(args), args.signal, frames=True)
        self._gaps = Gaps()
        self._lost: list[Event] = []
        """The `lost` events that histories may still replace."""
        self._unfilled: set[str] = set()
        """The boards that were open before, and whose histories the recording lacks because they are not open yet."""
        self._pause, self._asked = OPENS_MIN, 0.0
        """The pause before the next request about the boards in `_unfilled`, and the time of the last request."""
        self._held: list[Event] = []
        """The events that have arrived since the restart and must follow the histories of the boards in `_unfilled`."""
        self._is_incomplete = False
        """Whether a board has no history that could replace the events in `_lost`."""
        for each in client.status(board):
            if each.status is not None:
                self._open.add(each.board)
                if each.status.recorded is not None:
                    self._gaps.begin(each.board, each.status.recorded)
        self._ask()

    def _ask(self) -> None:
        self._client.request(self._wanted)

    def close(self) -> None:
        self._client.close()

    def fileno(self) -> int:
        return self._client.fileno()

    @property
    def has_received(self) -> bool:
        """Whether `arrived` returns events even if the socket is not readable."""
        return self._client.has_received

    @property
    def patience(self) -> float:
        """The seconds until `arrived` must be called even if no event arrives."""
        # With a filter for a board, no event may report that the fleet has opened the board.
        return max(0.0, self._asked + self._pause - time.monotonic()) if self._unfilled else math.inf

    def arrived(self) -> list[Event]:
        """Return the events that have arrived. If the proxy has exited, first wait until a new proxy is running."""
        try:
            arrived = self._client.arrived()
        except ProxyNotFoundError as error:
            self._client.close()
            _show("")  # Clear the progress line, so that the message starts a new line.
            remark(f"{error}: waiting for the next proxy")
            ended = _mark("the proxy has ended")
            while not self._stop.wait(AGAIN):
                with contextlib.suppress(ProxyNotFoundError):
                    self._client = Client(self._client.path)
                    self._ask()
                    events = self._fill(everything=True)
                    marks = [ended, _mark("the proxy was started again")]
                    if self._is_filling:
                        self._held[:0] = marks
                        return events
                    return sorted([*events, *marks], key=operator.attrgetter("monotonic_ns"))
            self._gone = True
            return [*self._given_up(), ended]
        new = self._new(arrived)
        # A board that opens causes a `link` event. Events of the process have its name, or no name.
        causes = {*self._unfilled, self.name, ""}
        if any(event.event not in OF_SIGNALS and event.board in causes for event in arrived):
            self._pause = 0.0
        if self.patience == 0:
            new = sorted([*new, *self._filled(everything=False)], key=operator.attrgetter("monotonic_ns"))
        return new

    def _new(self, events: Iterable[Event]) -> list[Event]:
        """Return the events that the recording does not contain yet. Replace a `lost` event with the lost events."""
        new: list[Event] = []
        for event in events:
            if event.event == "lost":
                self._lost.append(event)
                new += self._filled(everything=True)
            elif event.board in self._unfilled or self._is_filling:
                self._held.append(event)
                if len(self._held) > HELD_MAX:
                    new += self._given_up()
            elif self._gaps.is_new(event):
                new.append(event)
        return new

    @property
    def _is_filling(self) -> bool:
        """Whether no board has been filled yet. Even marks are then held, to keep the recording in order."""
        return bool(self._unfilled) and self._unfilled >= self._open

    def _filled(self, *, everything: bool) -> list[Event]:
        """Return the result of `_fill`, or an empty list if the proxy has ended. The next proxy may fill the gaps."""
        try:
            return self._fill(everything=everything)
        except ProxyNotFoundError as error:
            if error.reason != SILENT:
                return []
            _show("")
            number = sum(event.count for event in self._lost)
            remark(f"{error}: the recording lacks {number} events (`inco-trio history` may show them)")
            return self._given_up()

    def _fill(self, *, everything: bool) -> list[Event]:
        """Return the events that only the flight recorders contain, of all boards or of those in `_unfilled`.

        Boards that are not open yet stay in `_unfilled`. Once all others have answered, return the `lost` events if
        some histories are missing. Raises ProxyNotFoundError.
        """
        is_open: dict[str, bool] = {}
        asked = self._wanted.board
        if len(self._unfilled) == 1 and not everything:
            (asked,) = self._unfilled
        self._pause = OPENS_MIN if everything else min(max(OPENS_MIN, 2 * self._pause), OPENS_MAX)
        self._asked = time.monotonic()
        with contextlib.suppress(InvalidArgumentError):  # A reload has removed the only recorded board.
            is_open = {each.board: each.status is not None for each in self._client.status(asked)}
        opened = {board for board in is_open if is_open[board]}
        unfilled = self._unfilled | self._open | opened if everything else self._unfilled
        pasts: dict[str, Past | None] = {}
        for board in sorted(unfilled & opened):
            try:
                pasts[board] = self._client.request(HistoryRequest(board, self._gaps.after(board))).history
            except BoardNotOpenError:
                is_open[board] = False  # It has just been closed.
            except InvalidArgumentError:
                pasts[board] = None  # Its flight recorder is off, or the proxy is older than this program.
        if everything:
            self._open = unfilled & is_open.keys()
        self._is_incomplete |= any(pasts.get(board) is None for board in unfilled if is_open.get(board, True))
        self._unfilled = {board for board in unfilled if not is_open.get(board, True)}
        missing = [event for past in pasts.values() if past is not None for event in self._gaps.missing(past)]
        events = sorted(accepted(missing, self._wanted), key=operator.attrgetter("monotonic_ns"))
        if not self._unfilled:
            if self._is_incomplete:
                events += self._lost
            self._lost, self._is_incomplete = [], False
        held, self._held = self._held, []
        return sorted([*events, *self._new(held)], key=operator.attrgetter("monotonic_ns"))

    def _given_up(self) -> list[Event]:
        """Return the held events, with a mark for each board whose history the recording lacks."""
        marks = [_mark(f"{board}: not open: earlier events may be missing here") for board in sorted(self._unfilled)]
        events = [*self._lost, *marks]
        held, self._held, self._lost = self._held, [], []
        self._unfilled.clear()
        self._is_incomplete = False
        return sorted([*events, *self._new(held)], key=operator.attrgetter("monotonic_ns"))

    def rest(self) -> Iterator[Event]:
        """Yield the events that the proxy has not sent yet."""
        if self._gone:
            return
        with contextlib.suppress(IncoError):
            with contextlib.suppress(IncoError):  # The proxy may have exited; its last events are in the socket.
                self._client.request(FlushRequest(), FAREWELL)
            for event in self._client.events(FAREWELL):
                if event.event == "flushed":
                    break
                yield from self._new([event])
            if self._unfilled:
                yield from self._filled(everything=False)
        yield from self._given_up()


def _mark(text: str) -> Event:
    return Event("message", time=time.time(), monotonic_ns=time.monotonic_ns(), message=text)


@contextlib.contextmanager
def _source(args: argparse.Namespace, stop: _Stop) -> Iterator[_Proxy | Listening]:
    try:
        client = connect(args.link, args.control)
    except ProxyNotFoundError:
        if not may_listen(args.link):
            raise
        from inco_trio.control.listen import Listening

        with Listening(args.link, args.signal, direction_of(args)) as listening:
            remark(f"no proxy answers: capturing frames on {args.link}")
            yield listening
        return
    remark_unknown(client, args)
    with client, contextlib.closing(_Proxy(client, args, stop)) as proxy:
        yield proxy


def _events(source: _Proxy | Listening, stop: _Stop, recorder: Recorder) -> Iterator[Event]:
    """Yield the events of `source` until the recording stops, and show the progress."""
    shows, shown = sys.stderr.isatty(), time.monotonic()
    while not stop.wait(0 if source.has_received else min(source.patience, SHOWN if shows else math.inf), source):
        yield from source.arrived()
        if shows and time.monotonic() - shown > SHOWN:
            shown = time.monotonic()
            _show(f"{recorder.count} notifications")
    yield from source.rest()


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _write(recorder: Recorder, event: Event, name: str) -> None:
    time_ns, board = round(event.time * 1e9), event.board or name
    frame = None if event.frame is None else bytes.fromhex(event.frame)
    if event.monotonic_ns:
        recorder.follow_clock(time_ns, event.monotonic_ns)
    where = "" if board == name else f"{board}: "
    match event:
        case Event(event="notification" | "pending", direction=Direction() as direction, signal=str() as signal):
            register = event.register or ""
            recorder.append(
                time_ns, direction, signal, register, frame, board, pending=event.reason, delay=event.delay,
                delay_max=event.delay_max, count=max(1, event.count),
            )  # fmt: skip
        case Event(event="ignored"):
            text = f"ignored: {event.reason}{' signal ' + event.signal if event.signal else ' frame'}"
            if frame is None:
                recorder.mark(time_ns, " ".join([f"{where}{text}", *repeated(event)]))
            else:
                recorder.ignored(time_ns, text, frame, board)
        case Event(event="link"):
            recorder.mark(
                time_ns, f"{where}{event.message or ('the link came up' if event.running else 'the link went down')}"
            )
        case Event(event="lost"):
            recorder.mark(time_ns, f"{event.count} events were lost here: they arrived too fast")
        case _:
            recorder.mark(time_ns, " ".join([f"{where}{event.message or event.event}", *repeated(event)]))
