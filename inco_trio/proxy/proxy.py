"""The proxy: one nursery, and the legs in it.

Each leg runs shielded, in a cancel scope of its own, so that a stop ends them in the order in which notifications flow:
the readers stop waiting and read what is left, the others finish it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager

import attrs
import trio

from inco_trio.config import Config
from inco_trio.errors import ClosedError, ConfigError, IncoError, UnknownSignalError
from inco_trio.links.link import Link
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.linux.inotify import Inotify, Watcher
from inco_trio.notifications import Events, Listener, Notification
from inco_trio.persist.fdstore import FdStore, NoFdStore
from inco_trio.persist.history import History
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.handoff import Handoff
from inco_trio.proxy.inbound import Inbound
from inco_trio.proxy.outbound import Outbound
from inco_trio.proxy.supervise import Health, in_turns, starting_and_stopping, supervise
from inco_trio.registers.refusals import refusal
from inco_trio.registers.registers import Registers
from inco_trio.registers.states import StateFile
from inco_trio.signals import Direction, Signal, SignalTable
from inco_trio.status import Counters, SignalStatus, Stats, Status, TaskStatus

__all__ = ["Ground", "Proxy", "build", "open_proxy", "running", "serve"]

logger = logging.getLogger(__name__)

SHORTLY = 0.2
"""Seconds to finish what a successor would finish otherwise."""


@attrs.define
class _Parts:
    """What a proxy is made of."""

    counters: Counters
    fd_store: FdStore
    events: Events
    registers: Registers
    link: Link
    handoffs: tuple[Handoff[StateFile], Handoff[Signal]]
    inbound: Inbound
    outbound: Outbound


class Proxy:
    """A running proxy; `open_proxy` makes one."""

    def __init__(self, config: Config, parts: _Parts) -> None:
        self.config = config
        self._parts = parts
        self._counters = parts.counters
        self._registers = parts.registers
        self._link = parts.link
        self._inbound, self._outbound = parts.inbound, parts.outbound
        self._closed = self._successor = False
        self._present = trio.Event()
        self._reloading = trio.Lock()
        self._legs: dict[str, Callable[[Health], Awaitable[None]]] = {
            "send": parts.outbound.send,
            "write": parts.inbound.write,
            "watch": self._watch,
            "restore": self._restore,
            "receive": parts.inbound.receive,
            "triggers": parts.outbound.triggers,
        }
        self._health = {name: Health(f"{self._link.name}: {name}") for name in self._legs}
        self._since = self._table_since = time.time()
        self._scopes = {name: trio.CancelScope(shield=True) for name in self._legs}
        self._ended = {name: trio.Event() for name in self._legs}

    # ------------------------------------------------------------------------------------------------ for callers

    @property
    def stats(self) -> Stats:
        """The counters of this moment."""
        if not self._closed:
            self._inbound.count_dropped()
        return self._counters.snapshot()

    @property
    def status(self) -> Status:
        """The state of this moment."""
        parts = self._parts
        return Status(
            link=self.config.link,
            since=self._since,
            table_since=self._table_since,
            running=self._link.running and not self._closed,
            description=self._link.description,
            descriptors=parts.fd_store.holder,
            counters=self.stats,
            signals=tuple(self._signal_status(signal) for signal in self._registers.table),
            tasks=tuple(
                TaskStatus(name, health.restarts, health.problem, health.last_problem)
                for name, health in self._health.items()
            ),
        )

    def _signal_status(self, signal: Signal) -> SignalStatus:
        events, states = self._parts.events, self._registers.states
        pending = 0
        if signal.direction is Direction.INBOUND:
            file, pending = states.file_of(signal.name), states.owed_of(signal.name)
            count, last, failures = file.count, file.last, file.failures
        else:
            count, last = events.sent[signal.name], events.sent_last.get(signal.name, 0)
            failures = self._outbound.failures[signal.name]
        return SignalStatus(
            signal=signal.name,
            direction=signal.direction,
            register=str(signal.path),
            count=count,
            last=last / 1e9 if last else None,
            failures=failures,
            pending=pending,
            problem=self._registers.problem(signal),
        )

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal; returns once the link has accepted it.

        Waits while the link is down; when cancelled then, the frame may still be sent later. Raises
        UnknownSignalError, or ClosedError once the proxy is closing.
        """
        signal = self._registers.table.outbound.get(str(name).encode("ascii", "replace"))
        if signal is None:
            raise self._unknown(name, "an outbound signal", self._registers.table.outbound.values())
        await self._outbound.send_signal(signal)

    def frame(self, name: str) -> bytes:
        """The frame that `send` sends for a signal."""
        return self._link.frame(name)

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | None = None
    ) -> Iterator[trio.MemoryReceiveChannel[Notification]]:
        """A stream of what is carried from now on: of these signals, or all, in one direction or both.

        A reader that is more than `buffer` notifications behind misses some, which `Stats.events_lost` counts; the
        proxy never waits for it. The stream ends when the proxy closes. Raises ClosedError if it is closed already,
        and UnknownSignalError.
        """
        self._check_open()
        if isinstance(signals, str):  # A collection too, of characters.
            raise TypeError(f"signals={signals!r}: one name is given as [{signals!r}]")
        names = None if signals is None else frozenset(signals)
        for name in (names or frozenset()) - {signal.name for signal in self._registers.table}:
            raise self._unknown(name, "a signal", self._registers.table)

        def wanted(signal: Signal) -> bool:
            return (names is None or signal.name in names) and direction in (None, signal.direction)

        with self._parts.events.open(buffer, wanted) as stream:
            yield stream

    async def wait_for(self, name: str, *, timeout: float | None = None) -> Notification:  # noqa: ASYNC109 - as `events`
        """The next notification of a signal, in whichever direction it goes, of those that are carried from now on.

        What an action of yours brings about may be carried before you come to wait: open `events` before you act.

        Raises TimeoutError after `timeout` seconds, UnknownSignalError, and ClosedError, also if the proxy closes
        meanwhile.
        """
        with self.events(math.inf, signals=[name]) as events:
            with trio.move_on_after(math.inf if timeout is None else timeout):
                async for notification in events:
                    return notification
                raise ClosedError("the proxy is closed")
        raise TimeoutError(f"{name}: did not come within {timeout:g} s")

    async def reload(self, config: Config) -> None:
        """Take another signal table; the link and all that is in both tables are left untouched.

        Nothing that was accepted is lost, and nothing is notified by it; an IRQ directory that is missing is made.
        Raises ClosedError, and IncoError for another interface or for what cannot be opened: then nothing is changed.
        """
        if not config.same_link(self.config):
            raise ConfigError([f"{config.link}: a reload cannot change the link: restart"])
        async with self._reloading:
            self._check_open()
            await self._registers.reload(SignalTable(config.signals))
            self.config = config
            self._table_since = time.time()

    @property
    def troubled(self) -> bool:
        """Whether a directory or a register is missing, which a reload makes."""
        return self._registers.next_restore() < math.inf

    def hand_on(self) -> None:
        """Before a stop: another proxy on the same ground finishes what a link that is down would keep waiting."""
        self._successor = True

    def keep_history(self) -> History:
        """Store notifications from now on until they are acknowledged."""
        return self._parts.events.keep()

    @property
    def history(self) -> History:
        """What was carried and is not acknowledged, if somebody wants that."""
        return self._parts.events.history

    def finish_alone(self, events: memoryview, length: int) -> bool:
        """See `Outbound.finish_alone`."""
        return self._outbound.finish_alone(events, length)

    def _unknown(self, name: str, kind: str, signals: Iterable[Signal]) -> UnknownSignalError:
        known = ", ".join(signal.name for signal in signals) or "none"
        return UnknownSignalError(f"{name}: not {kind} of {self._link.name}; there are: {known}")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the proxy is closed")

    # --------------------------------------------------------------------------------------------- starting, stopping

    async def present(self) -> None:
        """Wait until the link exists."""
        await self._present.wait()

    def _start(self, nursery: trio.Nursery) -> None:
        """Start the legs."""
        for name, leg in self._legs.items():
            nursery.start_soon(self._run_leg, name, leg, name=f"{self._link.name}: {name}")

    async def _run_leg(self, name: str, leg: Callable[[Health], Awaitable[None]]) -> None:
        try:
            with self._scopes[name]:
                await supervise(self._health[name], leg, self._counters)
        finally:
            self._ended[name].set()

    async def _stop(self) -> None:
        """End the legs: what was accepted is finished first, within the configured deadline."""
        deadline = self.config.stop_deadline
        with trio.move_on_after(min(deadline, SHORTLY) if self._successor else deadline):
            for handoff in self._parts.handoffs:
                handoff.stop_reading()
            for name in ("receive", "triggers"):
                await self._ended[name].wait()
            self._scopes["restore"].cancel()
            for handoff in self._parts.handoffs:
                handoff.close()
            for name in ("write", "send"):
                await self._ended[name].wait()
        self._closed = True
        for handoff in self._parts.handoffs:
            handoff.abort()
            handoff.close()
        for scope in self._scopes.values():
            scope.cancel()
        for ended in self._ended.values():
            await ended.wait()
        self._outbound.closed()
        self._counters.unfinished = self._registers.states.owed + sum(
            len(batch.items) for handoff in self._parts.handoffs for batch in handoff.unfinished
        )
        if unfinished := self._counters.unfinished:
            if isinstance(self._parts.fd_store, NoFdStore) and not self._successor:
                logger.warning(
                    "%s: stopped with %d notifications unfinished: they are lost", self._link.name, unfinished
                )
            else:
                logger.info("%s: stopped with %d notifications unfinished: kept", self._link.name, unfinished)
        self._inbound.count_dropped()
        self._parts.events.close()

    # -------------------------------------------------------------------------------------------------------- legs

    async def _watch(self, health: Health) -> None:
        """The leg that follows the link: it may go, come back as another one, or change its address."""
        link = self._link
        running = False
        while True:
            stored = link.fd
            if link.refresh():
                health.well()
                self._present.set()
            elif self._present.is_set():
                health.failed(f"{link.absence}: waiting for it")
            before, running = running, link.running
            if running is not before:
                self._parts.events.listener.link_changed(running)
            if link.fd != stored:
                self._store_link()
            self._outbound.link_changed()
            await link.changed()

    def _store_link(self) -> None:
        """Keep the socket that replaces the former one."""
        try:
            self._parts.fd_store.store("link", self._link.fd)
        except IncoError as error:
            logger.warning("%s: frames that come while no proxy runs are lost: %s", self._link.name, error)

    async def _restore(self, health: Health) -> None:
        """The leg that tries again what the registers could not do."""
        registers = self._registers
        async with trio.open_nursery() as nursery:
            while True:
                pause = max(0.0, registers.next_restore() - time.monotonic())
                with trio.move_on_after(pause) if pause < math.inf else trio.CancelScope():
                    await registers.troubled.wait()
                registers.troubled = trio.Event()
                await in_turns(registers.restore())
                # Not awaited: a link that is down must not keep registers from being restored.
                if (found := registers.triggers.found()).signals:
                    nursery.start_soon(self._outbound.send_found, found)
                health.well()


@attrs.define
class Ground:
    """What a proxy stands on, and a successor after it."""

    inflight: Inflight
    inotify: Watcher
    fds: Mapping[str, int]
    """The descriptors of both that are to be kept, by name."""
    around: Surroundings
    leave_nothing: bool
    """Whether no successor is expected."""
    listener: Listener | None = None


@asynccontextmanager
async def open_proxy(
    config: Config, *, fd_store: FdStore | None = None, listener: Listener | None = None
) -> AsyncIterator[Proxy]:
    """Open a proxy that carries signals while the block runs, and is stopped cleanly when it ends or is cancelled.

    `fd_store` keeps descriptors for a successor, see `keep.fdstore`; `listener` is told of everything. Once entered,
    link and watches are live. Raises IncoError: LinkNotFoundError, PermissionDeniedError, ResourceError, ConfigError.
    What the block raises is raised as it is. A leg that fails for a reason that is not tried again ends the block; its
    exception, and the block's if there is one too, are raised in an ExceptionGroup.
    """
    with ExitStack() as resources:
        store = fd_store or NoFdStore()
        proxy = build(config, store, _ground(store, resources, listener), resources)
        async with running(proxy):
            await proxy.present()
            yield proxy


@asynccontextmanager
async def running(proxy: Proxy) -> AsyncIterator[None]:
    """Run the legs of a proxy while the block runs; raises as `open_proxy` does."""
    async with starting_and_stopping(proxy._start, proxy._stop):
        yield


def _ground(fd_store: FdStore, resources: ExitStack, listener: Listener | None) -> Ground:
    """The ground of one proxy, inherited or new. Raises ResourceError."""
    inherited = fd_store.inherited
    try:
        inflight = Inflight.open(inherited.get("inflight"))
        resources.callback(inflight.close)
        inotify = Inotify(inherited.get("inotify"))
        resources.callback(inotify.close)
    except OSError as error:
        raise refusal(error, "shared memory") from error
    fds = {"inflight": inflight.fd, "inotify": inotify.fd}
    around = Surroundings()
    resources.callback(around.close)
    return Ground(inflight, inotify, fds, around, isinstance(fd_store, NoFdStore), listener)


def build(config: Config, fd_store: FdStore, ground: Ground, resources: ExitStack) -> Proxy:
    """Acquire everything, what an earlier process left included, and make a proxy of it. `resources` closes it.

    The order: the memory comes first, as it says which watches of the inherited inotify descriptor are whose; then the
    registers, so that triggers are watched from here on; then the link. What a predecessor left in flight is delivered
    before anything newer is read, and only then the descriptors are stored: storing one ends what was kept before.
    """
    inherited = fd_store.inherited
    counters, inflight = Counters(), ground.inflight
    registers = Registers(ground.inotify, inflight, counters)
    resources.callback(registers.close)
    registers.open(SignalTable(config.signals))

    link, stale = open_link(config.address, config.netns, inherited.get("link"), inflight.note, ground.around)
    resources.callback(lambda: link.close(remove=ground.leave_nothing))
    if not link.refresh():
        if not config.wait_link:
            raise link.missing()
        logger.warning("%s: %s: waiting for it", link.name, link.absence)

    events = Events(counters, History(inflight.history), ground.listener)
    handoffs = (Handoff(inflight.watches, events.written), Handoff(inflight.watches, events.accepted))
    inbound = Inbound(handoffs[0], link, registers.states, inflight, counters, events.listener)
    outbound = Outbound(
        handoffs[1], link, registers.triggers, ground.inotify, inflight, counters, events.listener.ignored
    )
    events.listener.opened(events.keep)
    inbound.recover()
    outbound.recover()
    if stale is not None:
        logger.info("%s: the inherited socket does not fit any more and is replaced", link.name)
        inbound.drain(stale)
        stale.close(remove=False)
    for name, fd in (*ground.fds.items(), ("link", link.fd)):
        if inherited.get(name) != fd:
            fd_store.store(name, fd)
    logger.info("%s: %d signals, %s", link.name, len(registers.table), link.description)
    return Proxy(config, _Parts(counters, fd_store, events, registers, link, handoffs, inbound, outbound))


async def serve(
    config: Config,
    *,
    fd_store: FdStore | None = None,
    task_status: trio.TaskStatus[Proxy] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry signals until cancelled; `task_status.started` gets the Proxy once link and watches are live.

    Raises IncoError, see `open_proxy`.
    """
    async with open_proxy(config, fd_store=fd_store) as proxy:
        task_status.started(proxy)
        await trio.sleep_forever()
