"""The part of a board under test that runs in the engine's thread."""

from __future__ import annotations

import attrs
import trio

from inco_trio.cores.core1 import Port, open_port
from inco_trio.errors import IncoError, LinkNotFoundError, ResourceError, unwrapped
from inco_trio.frame import decode
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.world import Cores
from inco_trio.testing.carriers import Carrier, InProcess, Process
from inco_trio.testing.engine import Engine
from inco_trio.testing.happenings import History
from inco_trio.testing.layout import Layout
from inco_trio.testing.lossy_wire import Lane

__all__ = ["Plan", "Rig"]


@attrs.define(eq=False)
class Plan:
    """The configuration of a board."""

    layout: Layout
    link: str
    in_process: bool
    cores: Cores | None


class Rig:
    """A board in the engine's thread: the link, the watch on the registers, and the proxy."""

    def __init__(self, of: Engine, plan: Plan, name: str) -> None:
        self.history = History()
        self._engine = of
        self._plan = plan
        self._port: Port | None = None
        self._guest: Port | None = None
        self._guest_scope = trio.CancelScope()
        self._guest_ended = trio.Event()
        self._line = trio.CancelScope()
        self._line_ended = trio.Event()
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        """An event that is set when `_run` ends, or None if `_run` has not started."""
        self.lanes = {
            Direction.INBOUND: Lane(Direction.INBOUND, self.history, self._to_core0),
            Direction.OUTBOUND: Lane(Direction.OUTBOUND, self.history, self._to_core1),
        }
        core0 = None if plan.cores is None else plan.cores.core0
        link = plan.layout.address("core0", "wire") if plan.cores is None else plan.cores.link
        self.carrier: Carrier
        if plan.in_process:
            self.carrier = InProcess(of, plan.layout, link, name, None if core0 is None else core0.path)
        else:
            self.carrier = Process(of, plan.layout, link, self.history, None if core0 is None else core0.fd)

    async def open(self) -> None:
        """Start all parts and wait until the proxy is ready. Raises IncoError."""
        try:
            for signal in self._plan.layout.signals:
                signal.directory.mkdir(parents=True, exist_ok=True)
            self._engine.watch.follow(self._plan.layout.signals, self._seen)
            await self._engine.nursery.start(self._run)
            await self.carrier.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stop the proxy and end all tasks."""
        with trio.CancelScope(shield=True):
            try:
                await self.carrier.stop()
            finally:
                self.carrier.close()
                self._scope.cancel()
                if self._ended is not None:
                    await self._ended.wait()
                self._engine.watch.forget(self._seen)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        failure: BaseException | None = None
        is_started = False
        self._ended = trio.Event()
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    for lane in self.lanes.values():
                        self._nursery.start_soon(lane.carry)
                    await self._nursery.start(self._hold_line)
                    task_status.started()
                    is_started = True
        except* IncoError as group:
            failure = unwrapped(group)
            self.history.fail(f"core 1 has failed: {failure}")
        finally:
            self._ended.set()
        if failure is not None and not is_started:
            raise ResourceError(self._plan.layout.directory, f"core 1 cannot be opened: {failure}") from failure

    async def _hold_line(self, *, task_status: trio.TaskStatus[None]) -> None:
        plan = self._plan
        if plan.cores is None:
            address, netns = plan.layout.address("wire", "core0"), None
        else:
            address, netns = plan.cores.link, plan.cores.core1.path
        self._line = trio.CancelScope()
        self._line_ended = trio.Event()
        try:
            with self._line:
                async with open_port(address, self._from_core0, netns=netns, around=self._engine.around) as self._port:
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._port = None
            self._line_ended.set()

    async def line_down(self) -> None:
        if self._plan.cores is not None:
            await trio.to_thread.run_sync(self._plan.cores.link_down)
        elif self._port is not None:
            self._line.cancel()
            await self._line_ended.wait()

    async def line_up(self) -> None:
        if self._plan.cores is not None:
            await trio.to_thread.run_sync(self._plan.cores.link_up)
        elif self._port is None:
            await self._nursery.start(self._hold_line)

    def _from_core0(self, frame: bytes) -> None:
        # Read the applications' events first, so that the history lists a trigger before the frame it caused.
        self._engine.watch.drain()
        self.lanes[Direction.OUTBOUND].put(frame)

    async def _to_core0(self, frame: bytes) -> None:
        if self._port is None:
            raise LinkNotFoundError("the link is down")
        await self._port.send(frame)

    async def _to_core1(self, frame: bytes) -> None:
        # Add the frame to the history before the guest can answer it.
        self._note(1, "gets", frame, Direction.OUTBOUND)
        if self._guest is not None:
            await self._guest.send(frame)

    def _note(self, core: int, what: str, frame: bytes, direction: Direction) -> None:
        name = decode(frame)
        if name is None:
            self.history.add(core, f"{what} a malformed frame", "", direction, frame)
        else:
            self.history.add(core, what, name.decode("ascii"), direction, frame)

    def send(self, frame: bytes) -> None:
        """Send a frame as core 1."""
        self._note(1, "sends", frame, Direction.INBOUND)
        self.lanes[Direction.INBOUND].put(frame)

    def send_name(self, name: str) -> None:
        """Send a notification as core 1."""
        if self._port is None:
            self.history.add(None, "lost: the link is down", name, Direction.INBOUND)
        else:
            self.send(self._port.frame(name))

    async def attach_guest(self) -> None:
        """Forward core 1's frames to a guest, and send the guest's frames."""

        async def hold(*, task_status: trio.TaskStatus[None]) -> None:
            address = self._plan.layout.address("wire1", "guest")
            self._guest_scope, self._guest_ended = trio.CancelScope(), trio.Event()
            try:
                with self._guest_scope:
                    async with open_port(address, self.send, around=self._engine.around) as self._guest:
                        task_status.started()
                        await trio.sleep_forever()
            finally:
                self._guest = None
                self._guest_ended.set()

        if self._guest is None:
            await self._nursery.start(hold)

    async def detach_guest(self) -> None:
        """Send the frames that the guest has left, and stop forwarding frames to it."""
        if self._guest is not None:
            while self._guest.receive():
                await trio.lowlevel.checkpoint()
            self._guest_scope.cancel()
            await self._guest_ended.wait()

    def _seen(self, what: Signal | IncoError) -> None:
        if isinstance(what, Signal):
            verb = "gets" if what.direction is Direction.INBOUND else "triggers"
            self.history.add(0, verb, what.name, what.direction)
        else:
            self.history.add(0, str(what))

    async def settle(self) -> None:
        """Read all events and frames that are queued now, and add them to the history."""
        await self.carrier.look()
        self._engine.watch.drain()
        if self._port is not None:
            while self._port.receive():
                await trio.lowlevel.checkpoint()
        await self.lanes[Direction.OUTBOUND].settled()
