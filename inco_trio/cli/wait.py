"""`inco-trio wait`: wait for notifications of the running proxy, as an application or as core 1, for shell tests."""

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

from inco_trio.cli import signalling
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.options import positive, seconds
from inco_trio.cli.streams import flush, remark, say
from inco_trio.control.protocol import Event, MonitorRequest
from inco_trio.errors import IncoError, ResourceError
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from inco_trio.control.client import Client
    from inco_trio.signals import Signal

EXIT_NOT_ARRIVED = 1
EXIT_COMMAND = 4
UNINTERRUPTED = 1.0
"""Maximum timeout of one poll(2) in seconds. A process signal just before the call does not interrupt the call."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] SIGNAL [LINK]"
    sub.epilog = (
        "example: inco-trio wait ihub_hwwd_irq --timeout 5 --after 'inco-trio send redun_notify_irq'\n"
        "exit codes: 0 the notification arrived, 1 it did not arrive in time, 4 COMMAND failed"
    )
    signalling.add_ways(sub)
    sub.add_argument("--count", type=positive, default=1, metavar="N", help="notifications to wait for (default: 1)")
    sub.add_argument("--timeout", type=seconds, metavar="TIME", help="fail (exit 1) after TIME, such as 10s")
    sub.add_argument(
        "--after", metavar="COMMAND", help="run COMMAND in a shell once listening; if it fails, `wait` fails too"
    )
    sub.add_argument("--send", metavar="SIGNAL", help="with --as core1: send this signal once listening")
    sub.add_argument("--json", action="store_true", help="print a line of JSON for each notification")
    sub.add_argument("-q", "--quiet", action="store_true", help="print only errors")


def run(args: argparse.Namespace) -> int:
    """Return 0 if all notifications arrived, 1 after the timeout, or 4 if the command failed. Raises IncoError."""
    signalling.check_ways(args)
    if args.send is not None and args.core1 is None:
        raise UsageError("--send requires LINK and --as core1; without them, use --after 'inco-trio send SIGNAL'")
    waiting = _Waiting(args)
    if args.core1 is not None:
        link = signalling.link_of(args)
        import trio  # Import trio lazily: the import takes longer than everything else.

        with signalling.alone():
            trio.run(_hear_frames, link, waiting, args.send)
    elif signalling.is_application(args):
        signal = signalling.register_of(args, "inbound", "received by core 0", "core 1 receives it (LINK --as core1)")
        with _Register(signal) as register:
            waiting.hear(register)
    else:
        from inco_trio.control.client import connect

        with connect(args.link, args.control) as client:
            waiting.hear(_Proxy(client, args))
    return waiting.exit_code()


class _Source(Protocol):
    def fileno(self) -> int: ...
    def arrived(self) -> list[Event]:
        """Return the events that have arrived. Each event that is not a notification has a message to print."""


class _Waiting:
    """The state of a wait: its timeout, the number of missing notifications, and the command of `--after`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.signal: str = args.signal
        self._left: int = args.count
        self._deadline = math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._code = 0

    @property
    def left(self) -> float:
        """Seconds left until the timeout."""
        return max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def listening(self) -> Iterator[int | None]:
        """Run the `--after` command during the block. Yield its pidfd, which becomes readable when the command ends."""
        if self._args.timeout is not None:
            self._deadline = time.monotonic() + self._args.timeout
        if self._args.after is None:
            yield None
            return
        try:
            # With a process group, a timeout can end all processes of the command. Use /dev/null as the command's
            # standard input, because the kernel stops a background process that reads from the terminal.
            command = ["/bin/sh", "-c", self._args.after]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        except (OSError, ValueError) as error:
            raise ResourceError(f"--after: cannot run the command: {error}") from error
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
            remark("the command was stopped: it was still running at the timeout")
            self._code = EXIT_NOT_ARRIVED
        else:
            self.command_failed()

    def command_failed(self) -> bool:
        """Return whether the `--after` command, which must have ended, has failed. If so, print its exit code."""
        assert self._process is not None  # noqa: S101 - see `listening`
        code = self._process.wait()
        if code:
            self._code = EXIT_COMMAND
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            remark(f"the command of --after failed: {how}")
        return bool(code)

    @property
    def complete(self) -> bool:
        return not self._left

    def came(self, event: Event) -> bool:
        """Print an event; return whether it was the last missing notification."""
        if event.event != "notification":
            remark(event.message)
            return False
        if self._args.json:
            say(event.json())
        elif not self._args.quiet:
            direction = "" if event.direction is None else event.direction.value
            say(f"{signalling.clock_time(event)} {direction} {event.signal}")
        flush()
        self._left -= 1
        return self.complete

    def hear(self, source: _Source) -> None:
        """Wait for notifications from `source`, which must already be listening."""
        poll = select.poll()
        poll.register(source.fileno(), select.POLLIN)
        with self.listening() as end:
            if end is not None:
                poll.register(end, select.POLLIN)
            while True:
                if any(map(self.came, source.arrived())):
                    return
                left = self.left  # Read the clock before poll(2): what arrives while this process is late counts.
                ready = poll.poll(math.ceil(min(left, UNINTERRUPTED) * 1000))
                if not ready and not left:
                    return
                if end is not None and any(fd == end for fd, _ in ready):
                    poll.unregister(end)
                    # Notifications that arrived before the command failed still count.
                    if self.command_failed():
                        return

    def exit_code(self) -> int:
        """Return the exit code. If notifications are missing, print how many arrived."""
        if self._code or self.complete:
            return self._code
        if not self._args.quiet:
            count = self._args.count
            remark(f"{self._args.signal}: {count - self._left} of {count} arrived within {self._args.timeout:g} s")
        return EXIT_NOT_ARRIVED


class _Proxy:
    """A source that receives the notifications of one signal from a running proxy. Raises IncoError."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        board = signalling.board_of(client, args)
        directions, _ = signalling.signals_of(client, board)
        signalling.check_known(args.signal, directions, (), "", "")
        client.request(MonitorRequest(board, signals=[args.signal]))
        self._client = client
        self.fileno = client.fileno

    def arrived(self) -> list[Event]:
        """Return the events that have arrived. Raises ProxyNotFoundError once the proxy has exited."""
        found = []
        for event in self._client.arrived():
            if event.event == "notification":
                found.append(event)
            elif event.event == "lost":
                text = f"{event.count} events were lost, possibly notifications of this signal"
                found.append(Event("lost", message=text))
        return found


class _Register:
    """A source that watches the state file of one signal for notifications. Raises IncoError."""

    def __init__(self, signal: Signal) -> None:
        from inco_trio.cores import watch

        self._arrived: list[Event] = []
        self._overflowed = watch.OverflowedError
        self._watch = watch.Watch()
        self.fileno = self._watch.fileno
        try:
            self._watch.follow([signal], self._report, missing_ok=True)
            signal.path.lstat()
        except OSError as error:
            self._watch.close()
            raise watch.register_error(error, signal.path) from error

    def __enter__(self) -> _Register:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()

    def _report(self, what: Signal | IncoError) -> None:
        if isinstance(what, self._overflowed):
            self._arrived.append(Event("overflow", message=str(what)))
        elif isinstance(what, IncoError):
            raise what
        else:
            self._arrived.append(_notification(what.name, Direction.INBOUND, str(what.path)))

    def arrived(self) -> list[Event]:
        """Return the events that have arrived. Raises IncoError."""
        self._arrived.clear()
        self._watch.drain()
        return self._arrived


def _notification(signal: str, direction: Direction, register: str | None) -> Event:
    return Event("notification", time=time.time(), direction=direction, signal=signal, register=register)


async def _hear_frames(link: str, waiting: _Waiting, send: str | None) -> None:
    import trio

    from inco_trio.cores.core1 import Core1

    async def follow_command(end: int, nursery: trio.Nursery) -> None:
        await trio.lowlevel.wait_readable(end)
        if waiting.command_failed():
            nursery.cancel_scope.cancel()

    async with Core1(link) as core1:
        with (
            core1.events(math.inf, signals=[waiting.signal]) as arrivals,
            waiting.listening() as end,
            trio.move_on_after(waiting.left),
        ):
            # The nursery must end before `listening` closes the descriptor that `follow_command` waits for.
            async with trio.open_nursery() as nursery:
                if end is not None:
                    nursery.start_soon(follow_command, end, nursery)
                if send is not None:
                    nursery.start_soon(core1.send, send)
                async for arrival in arrivals:
                    if waiting.came(_notification(arrival.name, Direction.OUTBOUND, None)):
                        break
                nursery.cancel_scope.cancel()
