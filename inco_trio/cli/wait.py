"""`inco-trio wait`: waits for notifications, at the running proxy, as an application, or as core 1; for shell tests."""

from __future__ import annotations

import argparse
import math
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGTERM
from typing import TYPE_CHECKING, Protocol

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import positive
from inco_trio.cli.signalling import (
    add_ways,
    alone,
    board_of,
    check_known,
    check_ways,
    file_refusal,
    is_application,
    link_of,
    register_of,
    seconds,
    signals_of,
)
from inco_trio.cli.streams import flush, remark, say
from inco_trio.control.protocol import Event, MonitorRequest
from inco_trio.errors import ResourceError
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from inco_trio.control.client import Client
    from inco_trio.signals import Signal

__all__ = ["arguments", "run"]

EXIT_NOT_CAME = 1
UNINTERRUPTED = 1.0
"""Seconds of one poll(2): a signal that comes just before it does not end it."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `wait`."""
    sub.usage = "%(prog)s [OPTION ...] SIGNAL [LINK]"
    sub.epilog = (
        "example: inco-trio wait ihub_hwwd_irq --timeout 5 --after 'inco-trio send redun_notify_irq'\n"
        "exit codes: 0 it came, 1 it did not come in time; that of a COMMAND that failed; see inco-trio --help"
    )
    add_ways(sub)
    sub.add_argument("--count", type=positive, default=1, metavar="N", help="so many (default: 1)")
    sub.add_argument("--timeout", type=seconds, metavar="S", help="end with 1 after so many seconds (default: never)")
    sub.add_argument(
        "--after", metavar="COMMAND", help="run this in a shell once listening; if it fails, so does `wait`"
    )
    sub.add_argument("--send", metavar="SIGNAL", help="as core 1: send this once listening, on the same link")
    sub.add_argument("--json", action="store_true", help="a line of JSON for each notification")
    sub.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> int:
    """Wait; returns 0 when it came, 1 when not, or the exit code of the command that failed. Raises IncoError."""
    check_ways(args)
    if args.send is not None and args.core1 is None:
        raise UsageError("--send needs --as core1 LINK: otherwise use --after 'inco-trio send SIGNAL'")
    waiting = _Waiting(args)
    if args.core1 is not None:
        link = link_of(args)
        # Only here, as it takes longer to import than all else.
        import trio

        with alone():
            trio.run(_hear_frames, link, waiting, args.send)
    elif is_application(args):
        signal = register_of(args, "inbound", "received by core 0", "core 1 receives it (--as core1 LINK)")
        with _Register(signal) as register:
            waiting.hear(register)
    else:
        with _proxy(args) as told:
            waiting.hear(told)
    return waiting.exit_code()


class _Source(Protocol):
    def fileno(self) -> int: ...
    def arrived(self) -> list[Event]:
        """Return the events that have arrived. Those that are not notifications have a message for the user."""


class _Waiting:
    """How long to wait, for how many, and the command that is run meanwhile."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.signal: str = args.signal
        self._left: int = args.count
        self._deadline = math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._code = 0

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def listening(self) -> Iterator[int | None]:
        """Run the command, now that nothing is missed; yields a descriptor that tells of its end (pidfd_open(2))."""
        if self._args.timeout is not None:
            self._deadline = time.monotonic() + self._args.timeout
        if self._args.after is None:
            yield None
            return
        try:
            # A process group of its own, all of which is ended if the time is over; no terminal stops it for reading.
            command = ["/bin/sh", "-c", self._args.after]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        except (OSError, ValueError) as error:
            raise ResourceError(f"--after: cannot be run: {error}") from error
        end = os.pidfd_open(self._process.pid)
        try:
            yield end
            if self.complete and not self._code:
                self._wait_for_command()
        finally:
            os.close(end)
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, SIGTERM)
                self._process.wait()

    def _wait_for_command(self) -> None:
        assert self._process is not None  # noqa: S101 - see `listening`
        try:
            self._process.wait(None if math.isinf(self._deadline) else self.left)
        except subprocess.TimeoutExpired:
            remark("the command was ended: it went on when the time was over")
            self._code = EXIT_NOT_CAME
        else:
            self.command_failed()

    def command_failed(self) -> bool:
        """Whether the command, which has ended, failed; that is said."""
        assert self._process is not None  # noqa: S101 - see `listening`
        code = self._process.wait()
        if code:
            self._code = code if code > 0 else 128 - code
            remark(f"the command of --after failed: exit code {self._code}")
        return bool(code)

    @property
    def complete(self) -> bool:
        """Whether as many came as were waited for."""
        return not self._left

    def came(self, event: Event) -> bool:
        """Print a notification; returns whether it was the last one."""
        if event.event != "notification":
            remark(event.message)
            return False
        if self._args.json:
            say(event.json())
        elif not self._args.quiet:
            stamp = time.strftime("%H:%M:%S", time.localtime(event.time))
            direction = "" if event.direction is None else event.direction.value
            say(f"{stamp}.{int(event.time % 1 * 1e6):06d} {direction} {event.signal}")
        flush()
        self._left -= 1
        return self.complete

    def hear(self, source: _Source) -> None:
        """Wait at a source that listens."""
        poll = select.poll()
        poll.register(source.fileno(), select.POLLIN)
        with self.listening() as end:
            if end is not None:
                poll.register(end, select.POLLIN)
            while True:
                if any(map(self.came, source.arrived())):
                    return
                ready = poll.poll(math.ceil(min(self.left, UNINTERRUPTED) * 1000))
                if not ready and not self.left:
                    return
                if end is not None and any(fd == end for fd, _ in ready):
                    poll.unregister(end)
                    # What came before its end counts, if it failed as well.
                    if self.command_failed():
                        return

    def exit_code(self) -> int:
        """That of the command, which is said."""
        if not self._code and not self.complete:
            if not self._args.quiet:
                count = self._args.count
                remark(f"{self._args.signal}: {count - self._left} of {count} came in {self._args.timeout:g} s")
            return EXIT_NOT_CAME
        return self._code


# ------------------------------------------------------------------------------------------------------ at the proxy


@contextmanager
def _proxy(args: argparse.Namespace) -> Iterator[_Source]:
    """The proxy's monitor of the signal. Raises IncoError."""
    from inco_trio.control.client import connect

    with connect(args.link, args.control) as client:
        board = board_of(client, args)
        directions, _ = signals_of(client, board)
        check_known(args.signal, directions, (), "", "")
        client.request(MonitorRequest(board, signals=[args.signal]))
        yield _Told(client)


class _Told:
    def __init__(self, client: Client) -> None:
        self._client = client
        self.fileno = client.fileno

    def arrived(self) -> list[Event]:
        """See `_Source`. Raises ProxyNotFoundError once the proxy has ended."""
        found = []
        for event in self._client.arrived():
            if event.event == "notification":
                found.append(event)
            elif event.event == "lost":
                text = f"{event.count} events were lost here: they may have been notifications"
                found.append(Event("lost", message=text))
        return found


# ------------------------------------------------------------------------------------------------- as an application


class _Register:
    """The state file of a signal, heard by a watch on its directory, which is followed when it is replaced.

    Raises IncoError.
    """

    def __init__(self, signal: Signal) -> None:
        from inco_trio.linux import inotify

        self._ino = inotify
        self._signal = signal
        path = signal.path
        self._name = os.fsencode(path.name)
        try:
            self._inotify = inotify.Inotify()
        except OSError as error:
            raise ResourceError("inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n") from error
        self._buffer = memoryview(bytearray(1 << 16))
        self._watch = -1
        try:
            self._follow()
            path.lstat()
        except OSError as error:
            self._inotify.close()
            missing = "no proxy seems to run, which would have made it"
            raise file_refusal(error, path, why_missing=missing) from error

    def __enter__(self) -> _Register:
        return self

    def __exit__(self, *_: object) -> None:
        self._inotify.close()

    def fileno(self) -> int:
        return self._inotify.fd

    def _follow(self) -> None:
        """Watch the directory that the path leads to now, and the lowest one above that is there. Raises OSError."""
        ino, directory = self._ino, self._signal.directory
        for above in directory.parents:
            try:
                # First, so that it tells of a directory that comes after the look below.
                self._inotify.watch(str(above), ino.IN_CREATE | ino.IN_MOVED_TO | ino.IN_DELETE_SELF | ino.IN_MOVE_SELF)
                break
            except (FileNotFoundError, PermissionError):
                continue
        before = self._watch
        try:
            # IN_MODIFY stands between two closes, which would merge.
            mask = ino.IN_CLOSE_WRITE | ino.IN_MODIFY | ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
            self._watch = self._inotify.watch(str(directory), mask)
        except FileNotFoundError:
            self._watch = -1
        if before not in (-1, self._watch):
            self._inotify.unwatch(before)

    def arrived(self) -> list[Event]:
        """See `_Source`. Raises IncoError."""
        ino = self._ino
        found: list[Event] = []
        events = ino.parse_events(self._buffer[: self._inotify.read_into(self._buffer)])
        for wd, mask, name in events:
            if mask & ino.IN_Q_OVERFLOW:
                text = "the inotify queue overflowed: notifications may have been missed"
                found.append(Event("overflow", message=text))
            elif mask & ino.IN_CLOSE_WRITE:
                if wd == self._watch and name == self._name:
                    found.append(_notification(self._signal.name, Direction.INBOUND, str(self._signal.path)))
            elif not mask & (ino.IN_MODIFY | ino.IN_IGNORED):
                try:
                    self._follow()
                except OSError as error:
                    raise ResourceError(self._signal.directory, f"cannot be watched: {error.strerror}") from error
        return found


def _notification(signal: str, direction: Direction, register: str | None) -> Event:
    return Event("notification", time=time.time(), direction=direction, signal=signal, register=register)


# --------------------------------------------------------------------------------------------------------- as core 1


async def _hear_frames(link: str, waiting: _Waiting, send: str | None) -> None:
    import trio

    from inco_trio.cores.core1 import Core1

    async with Core1(link) as core1:

        async def follow_command(end: int, nursery: trio.Nursery) -> None:
            await trio.lowlevel.wait_readable(end)
            if waiting.command_failed():
                nursery.cancel_scope.cancel()

        # The task ends before the descriptor is closed that it waits for.
        with waiting.listening() as end, trio.move_on_after(waiting.left):
            async with trio.open_nursery() as nursery:
                if end is not None:
                    nursery.start_soon(follow_command, end, nursery)
                if send is not None:
                    nursery.start_soon(core1.send, send)
                async for arrival in core1:
                    if arrival.name == waiting.signal and waiting.came(
                        _notification(arrival.name, Direction.OUTBOUND, None)
                    ):
                        break
                nursery.cancel_scope.cancel()
