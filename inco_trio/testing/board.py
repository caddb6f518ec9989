"""A board under test: a real proxy, and both cores in the hands of the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio

from inco_trio.cores.port import Port, open_port
from inco_trio.errors import IncoError, InvalidArgumentError, LinkNotFoundError
from inco_trio.frame import decode
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.guest import Guest, unix_netdev
from inco_trio.simulation.world import Cores, two_cores
from inco_trio.status import Stats
from inco_trio.testing.carriers import Carrier, InProcess, Process
from inco_trio.testing.engine import Engine, engine
from inco_trio.testing.faults import FrameFaults
from inco_trio.testing.history import Happening, History
from inco_trio.testing.layout import Layout, make_layout
from inco_trio.testing.lossy_wire import Lane
from inco_trio.testing.report import record, side_by_side

__all__ = ["Board", "BoardCore0", "BoardCore1", "BoardFaults", "BoardProxy", "open_board", "open_boards"]

T = TypeVar("T")

TIMEOUT = 60.0
"""Seconds for which a wait waits by default: it stops a hang and is long enough for a slow machine."""


@attrs.define(eq=False)
class _Plan:
    """What a board is to be."""

    layout: Layout
    link: str
    in_process: bool
    cores: Cores | None


class _Rig:
    """The board inside of the engine's thread: the wire, the watch on the registers, and the proxy."""

    def __init__(self, of: Engine, plan: _Plan, name: str) -> None:
        self.history = History()
        self._engine = of
        self._plan = plan
        self._port: Port | None = None
        self._guest: Port | None = None
        self._line = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.lanes = {
            Direction.INBOUND: Lane(Direction.INBOUND, self.history, self._to_core0),
            Direction.OUTBOUND: Lane(Direction.OUTBOUND, self.history, self._to_core1),
        }
        core0 = None if plan.cores is None else plan.cores.core0.fd
        link = plan.layout.address("core0", "wire") if plan.cores is None else plan.cores.link
        self.carrier: Carrier
        if plan.in_process:
            netns = None if core0 is None else Path(f"/proc/self/fd/{core0}")
            self.carrier = InProcess(of, plan.layout, link, name, netns)
        else:
            self.carrier = Process(of, plan.layout, link, self.history, core0)

    async def open(self) -> None:
        """Set it up; returns once the proxy is ready. Raises IncoError."""
        self._engine.watcher.follow(self._plan.layout.signals, self._seen)
        await self._engine.nursery.start(self._run)
        try:
            await self.carrier.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End all of it."""
        with trio.CancelScope(shield=True):
            try:
                await self.carrier.stop()
            finally:
                self.carrier.close()
                self._scope.cancel()
                await self._ended.wait()
                self._engine.watcher.forget(self._seen)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    for lane in self.lanes.values():
                        self._nursery.start_soon(lane.carry)
                    await self._nursery.start(self._hold_line)
                    task_status.started()
        except* IncoError as group:
            self.history.fail(f"core 1 has failed: {group.exceptions[0]}")
        finally:
            self._ended.set()

    # ----------------------------------------------------------------------------------------------------- the wire

    async def _hold_line(self, *, task_status: trio.TaskStatus[None]) -> None:
        plan = self._plan
        if plan.cores is None:
            address, netns = plan.layout.address("wire", "core0"), None
        else:
            address, netns = plan.cores.link, Path(f"/proc/self/fd/{plan.cores.core1.fd}")
        self._line = trio.CancelScope()
        with self._line:
            async with open_port(address, self._from_core0, netns=netns, around=self._engine.around) as self._port:
                task_status.started()
                await trio.sleep_forever()
        self._port = None

    async def line_down(self) -> None:
        """Take the link down."""
        if self._plan.cores is not None:
            await trio.to_thread.run_sync(self._plan.cores.link_down)
        elif self._port is not None:
            self._line.cancel()
            while self._port is not None:
                await trio.lowlevel.checkpoint()

    async def line_up(self) -> None:
        """Bring it up again."""
        if self._plan.cores is not None:
            await trio.to_thread.run_sync(self._plan.cores.link_up)
        elif self._port is None:
            await self._nursery.start(self._hold_line)

    def _from_core0(self, frame: bytes) -> None:
        # What an application did before the frame is seen before it.
        self._engine.watcher.drain()
        self.lanes[Direction.OUTBOUND].put(frame)

    async def _to_core0(self, frame: bytes) -> None:
        if self._port is None:
            raise LinkNotFoundError("the link is down")
        await self._port.send(frame)

    async def _to_core1(self, frame: bytes) -> None:
        if self._guest is not None:
            await self._guest.send(frame)
        self._note(1, "gets", frame, Direction.OUTBOUND)

    def _note(self, core: int, what: str, frame: bytes, direction: Direction) -> None:
        name = decode(frame)
        if name is None:
            self.history.add(core, f"{what} a malformed frame", "", direction, frame)
        else:
            self.history.add(core, what, name.decode("ascii"), direction, frame)

    def send(self, frame: bytes) -> None:
        """Core 1 sends a frame."""
        self._note(1, "sends", frame, Direction.INBOUND)
        self.lanes[Direction.INBOUND].put(frame)

    def send_name(self, name: str) -> None:
        """Core 1 sends a notification."""
        if self._port is None:
            self.history.add(None, "lost: the link is down", name, Direction.INBOUND)
        else:
            self.send(self._port.frame(name))

    async def attach_guest(self) -> None:
        """Let a guest be core 1."""

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            address = self._plan.layout.address("wire1", "guest")
            async with open_port(address, self.send, around=self._engine.around) as self._guest:
                task_status.started()
                await trio.sleep_forever()

        if self._guest is None:
            await self._nursery.start(hold)

    def _seen(self, signal: Signal | None) -> None:
        if signal is None:
            self.history.add(0, "more than inotify could queue: not all was seen")
        elif signal.direction is Direction.INBOUND:
            self.history.add(0, "gets", signal.name, signal.direction)
        else:
            self.history.add(0, "triggers", signal.name, signal.direction)

    async def settle(self) -> None:
        """Have all in the history that the kernel has queued for us until now."""
        await self.carrier.look()
        self._engine.watcher.drain()
        if self._port is not None:
            while self._port.receive():
                await trio.lowlevel.checkpoint()
        await self.lanes[Direction.OUTBOUND].settled()


class _Core:
    number: int

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def history(self) -> list[Happening]:
        """What this core did and got until now, the oldest first."""
        self._board._settle()
        return self._board._rig.history.all(self.number)

    def count(self, name: str) -> int:
        """Return how many notifications of a signal this core got or made. Raises InvalidArgumentError."""
        __tracebackhide__ = True
        self._board._layout.signal(name)
        return sum(each.name == name for each in self.history)

    def wait_for(self, name: str, timeout: float = TIMEOUT) -> Happening:
        """The next notification of a signal here that no `wait_for` returned before; it may have come already.

        Raises NotificationMissingError, an AssertionError, after `timeout` seconds, or when the proxy has ended by
        itself; InvalidArgumentError for a wrong name or timeout.
        """
        __tracebackhide__ = True
        self._check(name, timeout)
        return self._board._rig.history.wait(self.number, name, timeout)

    def _check(self, name: str, timeout: float) -> None:
        __tracebackhide__ = True
        self._board._layout.signal(name)
        if not isinstance(timeout, int | float) or not 0 <= timeout <= threading.TIMEOUT_MAX:
            raise InvalidArgumentError(f"timeout={timeout!r}: is not a number of seconds, 0 or more")

    async def async_wait_for(self, name: str, timeout: float = TIMEOUT) -> Happening:  # noqa: ASYNC109 - as `wait_for`
        """`wait_for`, in an event loop of Trio's or asyncio's."""
        __tracebackhide__ = True
        self._check(name, timeout)
        return await self._board._rig.history.wait_async(self.number, name, timeout)


class BoardCore0(_Core):
    """The applications' side."""

    number = 0

    @property
    def directory(self) -> Path:
        """The directory of the built-in signals' registers."""
        return self._board._layout.signals[0].directory

    @property
    def config(self) -> Path:
        """The udrv.json, with the directories of this board."""
        return self._board._layout.config

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a program under test: that of the test, with UDRV_JSON_PATH."""
        return {**os.environ, "UDRV_JSON_PATH": str(self.config)}

    def register(self, name: str) -> Path:
        """The path of a signal's register. Raises InvalidArgumentError for a wrong name."""
        __tracebackhide__ = True
        return self._board._layout.signal(name).path

    def trigger(self, name: str) -> None:
        """Write the trigger of an outbound signal, as an application does. Raises InvalidArgumentError, OSError."""
        __tracebackhide__ = True
        path = self._board._layout.signal(name, Direction.OUTBOUND).path
        with path.open("w") as trigger:
            trigger.write("1")


class BoardCore1(_Core):
    """The other core, played by the test, until it starts a guest."""

    number = 1

    def send(self, name: str) -> None:
        """Send an inbound signal. Raises InvalidArgumentError for a wrong name, and where core 1 is a guest."""
        __tracebackhide__ = True
        self._board._layout.signal(name, Direction.INBOUND)
        self._played()
        self._board._engine.soon(self._board._rig.send_name, name)

    def send_frame(self, frame: bytes) -> None:
        """Send a frame as it is, also one that no core would send.

        Raises InvalidArgumentError for what is not in bytes, and where core 1 is a guest.
        """
        __tracebackhide__ = True
        self._played()
        if not isinstance(frame, bytes | bytearray | memoryview):
            raise InvalidArgumentError(f"a frame is bytes, not {type(frame).__name__}")
        self._board._engine.soon(self._board._rig.send, bytes(frame))

    def _played(self) -> None:
        __tracebackhide__ = True
        if self._board._guests:
            raise InvalidArgumentError("core 1 is a guest: what it sends is up to its firmware")


class BoardProxy:
    """The proxy under test."""

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def pid(self) -> int | None:
        """Its process; None while it does not run, or if it runs in the test's process."""
        return self._board._rig.carrier.pid

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._board._rig.carrier.log()

    @property
    def stats(self) -> Stats | None:
        """Its counters; None if it does not run."""
        return self._board._rig.carrier.stats()

    def start(self) -> None:
        """Start it again; the test has kept its descriptors, as s6 or systemd would. Raises ProxyDiedError."""
        self._board._call("the proxy is started", self._board._rig.carrier.start)

    def stop(self) -> None:
        """End it cleanly."""
        self._board._call("the proxy is stopped", self._board._rig.carrier.stop)

    def kill(self) -> None:
        """End it by SIGKILL. Raises InvalidArgumentError for one in the test's process."""
        self._board._call("the proxy is killed", self._board._rig.carrier.kill)

    def restart(self) -> None:
        """End it cleanly, and start it again."""
        self.stop()
        self.start()


class BoardFaults:
    """What goes wrong on purpose."""

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
        direction: Direction | None = None,
    ) -> None:
        """From now on, do this to frames on the wire, in one direction or both: rates from 0 to 1, `delay` in seconds.

        Without arguments, none of it. A reordered frame comes 50 ms late. The same `seed` does the same to the same
        frames. Raises InvalidArgumentError.
        """
        for each, lane in self._board._rig.lanes.items():
            if direction in (None, each):
                lane.faults = FrameFaults(drop, double, reorder, corrupt, delay, seed)

    def link_down(self) -> None:
        """Take the link down: the proxy keeps its notifications, and what core 1 sends is lost."""
        self._board._call("the link is taken down", self._board._rig.line_down)

    def link_up(self) -> None:
        """Bring it up again."""
        self._board._call("the link is brought up", self._board._rig.line_up)

    def kill_proxy(self) -> None:
        """`Proxy.kill`."""
        self._board.proxy.kill()

    def start_proxy(self) -> None:
        """`Proxy.start`."""
        self._board.proxy.start()

    def replace_directory(self) -> None:
        """Put a new, empty directory in the place of core 0's, as a program that makes it anew does."""
        path = self._board.core0.directory
        self._board._rig.history.add(None, f"{path.name} is replaced by a new directory")
        new = path.with_name(f"{path.name}.new")
        new.mkdir()
        shutil.rmtree(path)
        new.rename(path)


class Board:
    """A proxy that runs, with a test as both of its cores; `open_board` makes one.

    A test may be plain or run in an event loop. What waits has two faces; anything else takes some milliseconds at
    most, but for starting and stopping, which take those of the proxy: `trio.to_thread.run_sync(board.proxy.restart)`.
    """

    def __init__(self, of: Engine, plan: _Plan, rig: _Rig, resources: contextlib.ExitStack) -> None:
        self._engine = of
        self._layout = plan.layout
        self._plan = plan
        self._rig = rig
        self._guests: list[Guest] = []
        self._resources = resources
        self._told: str | None = None
        self.core0 = BoardCore0(self)
        self.core1 = BoardCore1(self)
        self.proxy = BoardProxy(self)
        self.faults = BoardFaults(self)

    @property
    def directory(self) -> Path:
        """Where all files of this board are."""
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
        """What happened at both cores and between them, in the order in which it was seen."""
        self._settle()
        return self._rig.history.all()

    @contextlib.contextmanager
    def guest(
        self,
        firmware: Path | None = None,
        command_line: str = "",
        *,
        program: str | None = None,
        machine: Sequence[str] | None = None,
        ready: str | None = None,
    ) -> Iterator[Guest]:
        """Put a firmware in QEMU in the place of core 1, while the block runs; see `inco_trio.testing.Guest`.

        Without `firmware`, it is the one of `inco-trio demo --qemu`. `machine` are QEMU's arguments instead of those of
        the RISC-V machine `virt`, and `program` is QEMU; a virtio-net-device is added. `ready` is what the firmware
        says on its serial output when it is. Raises GuestError.
        """
        if self._plan.cores is not None:
            raise InvalidArgumentError("a guest needs the link of sockets: leave out link='interface'")
        self._engine.run(self._rig.attach_guest)
        netdev = unix_netdev(self._layout.socket("guest"), self._layout.socket("wire1"))
        log = self.directory / f"guest-{len(self._guests)}.log"
        options: dict[str, Any] = {"firmware": firmware, "program": program, "machine": machine, "ready": ready}
        given = {key: value for key, value in options.items() if value is not None}
        guest = Guest(netdev, command_line, log=log, **given)
        self._guests.append(guest)
        with guest:
            yield guest

    @property
    def report(self) -> str:
        """Both cores side by side in time, the proxy's counters and log, and what a guest said."""
        self._settle()
        stats = self.proxy.stats
        parts = [side_by_side(self._rig.history.all())]
        if stats is not None:
            counted = " ".join(f"{name}={count}" for name, count in stats.as_dict().items() if count)
            parts.append(f"counters: {counted or 'all 0'}")
        parts.append(f"log of the proxy:\n{self.proxy.log.rstrip()}")
        parts += [f"serial output of the guest:\n{guest.log.rstrip()}" for guest in self._guests]
        return "\n".join(parts)

    def record(self, path: Path) -> None:
        """Write what was on the wire, as `inco-trio record` would. Raises PermissionDeniedError, ResourceError."""
        self._settle()
        registers = {signal.name: str(signal.path) for signal in self.signals}
        record(path, self._rig.history.all(), registers, self.link)

    def failure(self) -> str | None:
        """Why the board is of no use any more, as that the proxy has ended by itself; told once."""
        self._settle()
        told, self._told = self._told, self._rig.history.failure
        return None if self._told == told else self._told

    def close(self) -> None:
        """Stop the proxy, and remove its sockets; the files stay. Does nothing if it is closed."""
        _open.discard(self)
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
    """The boards of this process that are open."""
    return frozenset(_open)


@contextlib.contextmanager
def open_board(
    directory: Path,
    *,
    config: Path | str | Mapping[str, Any] | None = None,
    signals: Mapping[str, str] | None = None,
    link: str = "unix",
    in_process: bool = False,
) -> Iterator[Board]:
    """A board whose files are in `directory`, ready, while the block runs.

    `config` is a udrv.json, or what it would say; its devices get directories of this board. `signals` maps further
    wire names to `inbound` or `outbound`. `link` is `unix`, which needs no privilege, or `interface`: two network
    namespaces and a veth pair. The proxy is a process, or runs `in_process`.

    Raises ConfigError, InvalidArgumentError, NamespaceRefused, ProxyDiedError, ResourceError.
    """
    if link not in {"unix", "interface"}:
        raise InvalidArgumentError(f"link={link!r}: is neither 'unix' nor 'interface'")
    with contextlib.ExitStack() as resources:
        cores = resources.enter_context(two_cores()) if link == "interface" else None
        layout = make_layout(directory, config, signals)
        resources.callback(layout.remove)
        of = engine()
        address = layout.address("core0", "wire") if cores is None else cores.link
        plan = _Plan(layout, address, in_process, cores)
        with _opening:
            name = f"board{next(_numbers)}"

        async def rig() -> _Rig:
            made = _Rig(of, plan, name)
            await made.open()
            return made

        made = of.run(rig)
        resources.callback(of.run, made.close)
        board = Board(of, plan, made, resources.pop_all())
    _open.add(board)
    try:
        yield board
    finally:
        board.close()
