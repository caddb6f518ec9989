"""A board under test: the proxy is real, and the test acts as both cores."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from inco_trio.cores.watch import trigger
from inco_trio.errors import ClosedError, IncoError, InvalidArgumentError, from_os_error
from inco_trio.signals import Direction, Signal, direction_of
from inco_trio.simulation.guest import Guest, unix_netdev
from inco_trio.simulation.world import two_cores
from inco_trio.stats import Stats
from inco_trio.testing.carriers import Carrier
from inco_trio.testing.engine import Engine, engine
from inco_trio.testing.faults import FrameFaults
from inco_trio.testing.happenings import Happening
from inco_trio.testing.layout import make_layout, path_from
from inco_trio.testing.report import record, side_by_side
from inco_trio.testing.rig import Plan, Rig

__all__ = ["Board", "BoardCore0", "BoardCore1", "BoardFaults", "BoardProxy", "open_board", "open_boards"]

T = TypeVar("T")

TIMEOUT = 60.0
"""Default timeout of `expect` in seconds. Only a hang reaches it, even on a slow machine."""


class _Core:
    number: int

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def history(self) -> list[Happening]:
        """The notifications that this core has sent and received so far, oldest first."""
        self._board._settle()
        return self._board._rig.history.all(self.number)

    def count(self, name: str) -> int:
        """Return how many notifications of a signal this core has sent or received. Raises InvalidArgumentError."""
        __tracebackhide__ = True
        self._board._layout.signal(name)
        return sum(each.name == name for each in self.history)

    def expect(self, name: str, timeout: float = TIMEOUT) -> Happening:
        """Return the next notification of a signal at this core that `expect` has not returned before.

        The notification may have arrived before the call. Raises InvalidArgumentError, and NotificationMissingError (an
        AssertionError) after `timeout` seconds or if the proxy has ended on its own.
        """
        __tracebackhide__ = True
        self._check(name, timeout)
        return self._board._rig.history.wait(self.number, name, timeout)

    def _check(self, name: str, timeout: float) -> None:
        __tracebackhide__ = True
        self._board._layout.signal(name)
        if not isinstance(timeout, int | float) or not 0 <= timeout <= threading.TIMEOUT_MAX:
            raise InvalidArgumentError(f"timeout={timeout!r}: expected a number of seconds, 0 or more")

    async def expect_async(self, name: str, timeout: float = TIMEOUT) -> Happening:  # noqa: ASYNC109 - as `expect`
        """Wait as `expect` does, without blocking the event loop of Trio or asyncio."""
        __tracebackhide__ = True
        self._check(name, timeout)
        return await self._board._rig.history.wait_async(self.number, name, timeout)


class BoardCore0(_Core):
    """Core 0: the side that runs the applications."""

    number = 0

    @property
    def directory(self) -> Path:
        """The IRQ directory of the built-in signals."""
        return self._board._layout.signals[0].directory

    @property
    def config(self) -> Path:
        """The path of this board's udrv.json."""
        return self._board._layout.config

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a program under test: the test process's variables, plus UDRV_JSON_PATH."""
        return {**os.environ, "UDRV_JSON_PATH": str(self.config)}

    def register(self, name: str) -> Path:
        """Return the path of a signal's register. Raises InvalidArgumentError for an unknown name."""
        __tracebackhide__ = True
        return self._board._layout.signal(name).path

    def trigger(self, name: str) -> None:
        """Write the trigger file of an outbound signal. Raises InvalidArgumentError, ProxyNotFoundError."""
        __tracebackhide__ = True
        path = self._board._layout.signal(name, Direction.OUTBOUND).path
        self._board._check_open()
        trigger(path)


class BoardCore1(_Core):
    """Core 1: the test itself, except while a guest replaces it."""

    number = 1

    def send(self, name: str) -> None:
        """Send an inbound signal. Raises InvalidArgumentError for an unknown name, or if core 1 is a guest."""
        __tracebackhide__ = True
        self._board._layout.signal(name, Direction.INBOUND)
        self._check_no_guest()
        self._board._engine.soon(self._board._rig.send_name, name)

    def send_frame(self, frame: bytes) -> None:
        """Send a frame unchanged, even if it is invalid. Raises InvalidArgumentError if core 1 is a guest."""
        __tracebackhide__ = True
        self._check_no_guest()
        if not isinstance(frame, bytes | bytearray | memoryview):
            raise InvalidArgumentError(f"frame: expected bytes, not {type(frame).__name__}")
        self._board._engine.soon(self._board._rig.send, bytes(frame))

    def _check_no_guest(self) -> None:
        __tracebackhide__ = True
        self._board._check_open()
        if self._board._running_guests:
            raise InvalidArgumentError("core 1 is a guest: only its firmware can send")


class BoardProxy:
    """The proxy under test."""

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def _carrier(self) -> Carrier:
        return self._board._rig.carrier

    @property
    def pid(self) -> int | None:
        """The proxy's PID, or None if the proxy is not running or runs inside the test process."""
        return self._carrier.pid

    @property
    def log(self) -> str:
        """The log of the proxy."""
        return self._carrier.log()

    @property
    def stats(self) -> Stats | None:
        """The proxy's counters, or None if the proxy is not running."""
        return self._carrier.stats()

    def start(self) -> None:
        """Start the proxy again. It inherits the stored descriptors, as under s6 or systemd. Raises ProxyDiedError."""
        self._board._call("the proxy is started", self._carrier.start)

    def stop(self) -> None:
        """Stop the proxy cleanly."""
        self._board._call("the proxy is stopped", self._carrier.stop)

    def kill(self) -> None:
        """Kill the proxy (SIGKILL). Raises InvalidArgumentError if it runs inside the test process."""
        self._board._call("the proxy is killed", self._carrier.kill)

    def restart(self) -> None:
        """Stop the proxy cleanly and start it again."""
        self.stop()
        self.start()


class BoardFaults:
    """Faults that a test can inject."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def frames(
        self,
        *,
        drop: float = 0.0,
        double: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        delay: float = 0.0,
        seed: int = 0,
        direction: Direction | str | None = None,
    ) -> None:
        """Set the faults of the link: rates from 0 to 1, and a `delay` in seconds. Without arguments, stop all faults.

        `direction` is a Direction, `inbound` or `outbound` (default: both). A reordered frame arrives 50 ms late. With
        the same `seed`, the same frames are affected. Raises InvalidArgumentError.
        """
        direction = None if direction is None else direction_of(direction)
        for each, lane in self._board._rig.lanes.items():
            if direction in (None, each):
                lane.faults = FrameFaults(drop, double, reorder, corrupt, delay, seed)

    def link_down(self) -> None:
        """Take the link down. The proxy keeps outbound notifications. Notifications that core 1 sends are lost."""
        self._board._call("the link is taken down", self._board._rig.line_down)

    def link_up(self) -> None:
        """Bring the link up again."""
        self._board._call("the link is brought up", self._board._rig.line_up)

    def replace_directory(self) -> None:
        """Replace core 0's directory with a new, empty directory, as another program might do."""
        path = self._board.core0.directory
        self._board._rig.history.add(None, f"{path.name} is replaced by a new directory")
        new = path.with_name(f"{path.name}.new")
        new.mkdir()
        shutil.rmtree(path)
        new.rename(path)


class Board:
    """A running proxy for a test that acts as both cores. `open_board` opens a board.

    In an event loop, use `expect_async` instead of `expect`. Start and stop proxies, and wait for the output of guests,
    in a thread: `trio.to_thread.run_sync(board.proxy.restart)`. Do not start a guest in such a thread, because QEMU
    ends with it. Other calls take a few milliseconds at most. After the board has been closed, all calls raise
    ClosedError.
    """

    def __init__(self, of: Engine, plan: Plan, rig: Rig, resources: contextlib.ExitStack) -> None:
        self._engine = of
        self._process = os.getpid()
        self._layout = plan.layout
        self._plan = plan
        self._open_rig: Rig | None = rig
        self._guests: list[Guest] = []
        self._running_guests = 0
        self._resources = resources
        self._reported: str | None = None
        self.core0 = BoardCore0(self)
        self.core1 = BoardCore1(self)
        self.proxy = BoardProxy(self)
        self.faults = BoardFaults(self)

    @property
    def _rig(self) -> Rig:
        __tracebackhide__ = True
        if self._open_rig is None:
            raise ClosedError("the board is closed")
        if self._process != os.getpid():
            raise ClosedError("the board belongs to the parent process (open another board in this process)")
        return self._open_rig

    def _check_open(self) -> None:
        __tracebackhide__ = True
        _ = self._rig

    @property
    def directory(self) -> Path:
        """The directory with all files of this board."""
        return self._layout.directory

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The signals, with their directions and registers."""
        return self._layout.signals

    @property
    def link(self) -> str:
        """The address of the proxy's link."""
        return self._plan.link

    @property
    def history(self) -> list[Happening]:
        """The notifications at both cores and the events between the cores, in the order in which the test saw them."""
        self._settle()
        return self._rig.history.all()

    @contextlib.contextmanager
    def guest(
        self,
        firmware: Path | str | None = None,
        command_line: str = "",
        *,
        program: str | None = None,
        machine: Sequence[str] | None = None,
        ready: str | None = None,
    ) -> Iterator[Guest]:
        """Run firmware in QEMU as core 1 while the block runs; see `inco_trio.testing.Guest`.

        `firmware` defaults to the firmware of `inco-trio demo --qemu`. `program` is the QEMU program to run. `machine`
        replaces the arguments for the RISC-V machine `virt`. QEMU always gets a virtio-net-device. `ready` is the
        message that the firmware prints on its serial output when it is ready. Raises GuestError, InvalidArgumentError.
        """
        rig = self._rig
        if self._plan.cores is not None:
            raise InvalidArgumentError("link='interface': a guest needs a socket link (omit this argument)")
        netdev = unix_netdev(self._layout.socket("guest"), self._layout.socket("wire1"))
        log = self.directory / f"guest-{len(self._guests)}.log"
        options: dict[str, Any] = {"firmware": firmware, "program": program, "machine": machine, "ready": ready}
        given = {key: value for key, value in options.items() if value is not None}
        guest = Guest(netdev, command_line, log=log, **given)
        self._guests.append(guest)
        self._running_guests += 1
        try:
            self._engine.run(rig.attach_guest)
            with guest:
                yield guest
        finally:
            self._running_guests -= 1
            if not self._running_guests and self._open_rig is not None:
                self._engine.run(rig.detach_guest)

    @property
    def report(self) -> str:
        """A timeline of both cores, the counters and the log of the proxy, and the output of guests."""
        parts = [side_by_side(self.history)]
        if (stats := self.proxy.stats) is not None:
            counted = " ".join(f"{name}={count}" for name, count in stats.as_dict().items() if count)
            parts.append(f"counters: {counted or 'all 0'}")
        parts.append(f"log of the proxy:\n{self.proxy.log.rstrip()}")
        parts += [f"serial output of the guest:\n{guest.log.rstrip()}" for guest in self._guests]
        return "\n".join(parts)

    def record(self, path: Path | str) -> None:
        """Record the frames on the link, as `inco-trio record` does.

        Raises InvalidArgumentError, PermissionDeniedError, ResourceError.
        """
        __tracebackhide__ = True
        record(
            path_from("path", path), self.history, {signal.name: str(signal.path) for signal in self.signals}, self.link
        )

    def failure(self) -> str | None:
        """Return why the board has failed since the last call, or None if it has not failed.

        For example, the board fails if the proxy ends.
        """
        self._settle()
        before, self._reported = self._reported, self._rig.history.failure
        return None if self._reported == before else self._reported

    def close(self) -> None:
        """Stop the proxy and remove its sockets, but no other files. Do nothing if the board is already closed."""
        _open.discard(self)
        if self._process != os.getpid():
            return  # A forked process has neither the engine's thread nor a proxy.
        if self._open_rig is not None:
            self._open_rig.history.fail("the board is closed")  # Wake the waiting threads.
        self._open_rig = None
        self._resources.close()

    def _settle(self) -> None:
        self._engine.run(self._rig.settle)

    def _call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        self._rig.history.add(None, what)
        return self._engine.run(function)


_numbers = iter(range(1 << 62))
_open: set[Board] = set()
_opening = threading.Lock()


def open_boards() -> frozenset[Board]:
    return frozenset(_open)


@contextlib.contextmanager
def _converting_errors(directory: Path) -> Iterator[None]:
    """Convert an OSError, for example of a directory that cannot be created, to an IncoError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, IncoError):
            raise
        raise from_os_error(error, error.filename or directory) from error


@contextlib.contextmanager
def open_board(
    directory: Path | str,
    *,
    config: Path | str | Mapping[str, Any] | None = None,
    signals: Mapping[str, str] | None = None,
    link: str = "unix",
    in_process: bool = False,
) -> Iterator[Board]:
    """Open a board with its files in `directory`, and close it at the end of the block.

    `config` is the path or the content of a udrv.json; its devices get directories below `directory`. `signals` maps
    additional wire names to `inbound` or `outbound`. `link` is `unix`, which does not need privileges, or `interface`:
    two network namespaces and a veth pair. The proxy is a separate process unless `in_process` is true.

    Raises ConfigError, InvalidArgumentError, NamespaceRefusedError, PermissionDeniedError, ProxyDiedError and
    ResourceError.
    """
    if link not in {"unix", "interface"}:
        raise InvalidArgumentError(f"link={link!r}: expected 'unix' or 'interface'")
    if not isinstance(in_process, bool):
        raise InvalidArgumentError(f"in_process={in_process!r}: expected True or False")
    with contextlib.ExitStack() as resources:
        cores = resources.enter_context(two_cores()) if link == "interface" else None
        place = path_from("directory", directory)
        with _opening:
            name = f"board{next(_numbers)}"

        async def rig() -> Rig:
            made = Rig(of, plan, name)
            await made.open()
            return made

        with _converting_errors(place):
            layout = make_layout(place, config, signals)
            resources.callback(layout.remove)
            of = engine()
            address = layout.address("core0", "wire") if cores is None else cores.link
            plan = Plan(layout, address, in_process, cores)
            made = of.run(rig)
        resources.callback(of.run, made.close)
        board = Board(of, plan, made, resources.pop_all())
    _open.add(board)
    try:
        yield board
    finally:
        board.close()
