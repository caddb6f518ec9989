"""The proxy of one board and its tasks.

Each task has its own shielded cancel scope, so that a stop can end the tasks in order. First, the reading tasks read
the rest of the kernel's queues and end. Then the other tasks finish these notifications.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from inco_trio import real_clock
from inco_trio.config import Config
from inco_trio.counters import Counters
from inco_trio.errors import ClosedError, ConfigError, IncoError, UnknownSignalError, from_os_error
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import Link
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.linux.capabilities import held_capabilities, names_of
from inco_trio.linux.inotify import Inotify, Watcher, parse_events
from inco_trio.linux.mounts import Mounts
from inco_trio.notifications import Events, Listener
from inco_trio.nurseries import in_turns, starting_and_stopping
from inco_trio.persist.fdstore import FdStore, NoFdStore, inherited_fd, report_missing
from inco_trio.persist.followed import History
from inco_trio.persist.inflight import UNREAD_EVENTS, UNREAD_FRAMES, Inflight
from inco_trio.persist.recorder import KEPT, Recorder
from inco_trio.problems import board_name, noted_by, noting, report, times
from inco_trio.proxy.handoff import Handoff
from inco_trio.proxy.inbound import Inbound
from inco_trio.proxy.outbound import Outbound
from inco_trio.proxy.supervise import Health, supervise
from inco_trio.registers.refusals import refusal
from inco_trio.registers.registers import Registers
from inco_trio.registers.states import StateFile
from inco_trio.signals import Direction, Signal, SignalTable, direction_of
from inco_trio.trust import Trust
from inco_trio.wall_clock import WallClock

if TYPE_CHECKING:
    from inco_trio.notification import Notification
    from inco_trio.proxy.others import Others
    from inco_trio.proxy_status import SignalStatus, Status
    from inco_trio.stats import Stats

__all__ = ["Ground", "Proxy", "build", "open_proxy", "open_supervised", "running", "serve"]

logger = logging.getLogger(__name__)

SHORTLY = 0.2
"""Maximum time in seconds that a stop waits for pending notifications if another proxy will finish them."""


class _Parts:
    def __init__(
        self,
        counters: Counters,
        fd_store: FdStore,
        events: Events,
        registers: Registers,
        link: Link,
        handoffs: tuple[Handoff[StateFile], Handoff[Signal]],
        inbound: Inbound,
        outbound: Outbound,
    ) -> None:
        self.counters = counters
        self.fd_store = fd_store
        self.events = events
        self.registers = registers
        self.link = link
        self.handoffs = handoffs
        self.inbound = inbound
        self.outbound = outbound


class Proxy:
    """A running proxy. Use `open_proxy` to create one."""

    def __init__(self, config: Config, parts: _Parts) -> None:
        self.config = config
        self._parts = parts
        self._counters = parts.counters
        self._registers = parts.registers
        self._link = parts.link
        self._inbound, self._outbound = parts.inbound, parts.outbound
        self._closed = self._successor = False
        self._board = board_name.get()
        self._others: Others | None = None
        self._present = trio.Event()
        self._reloading = trio.Lock()
        self._tasks: dict[str, Callable[[Health], Awaitable[None]]] = {
            "send": parts.outbound.send,
            "write": parts.inbound.write,
            "watch": self._watch,
            "restore": self._restore,
            "receive": parts.inbound.receive,
            "filter": parts.inbound.filter,
            "triggers": parts.outbound.triggers,
        }
        self._health = {name: Health(f"{self._link.name}: {name}") for name in self._tasks}
        self._clock = WallClock()
        self._since = self._table_since = real_clock.monotonic_ns()
        self._down_at = 0
        """When the link last went down (real_clock.monotonic_ns()), or 0."""
        self._down_reason: str | None = None
        self._down_duration: float | None = None
        """How long the link was down the last time (seconds), or None if it is still down or that is unknown."""
        self._scopes = {name: trio.CancelScope(shield=True) for name in self._tasks}
        self._ended = {name: trio.Event() for name in self._tasks}

    @property
    def stats(self) -> Stats:
        """The current counters."""
        return self._counted().snapshot()

    @property
    def status(self) -> Status:
        """The current state of the proxy."""
        return self._status(tuple(self._signals()))

    def _status(self, signals: tuple[SignalStatus, ...] = ()) -> Status:
        """Return the current state of the proxy, with these `signals`."""
        from inco_trio.proxy_status import Status, TaskStatus

        parts = self._parts
        self._clock.refresh()
        recorder = parts.events.recorder
        running = self._link.running and not self._closed
        return Status(
            link=self.config.link,
            since=self._clock.seconds(self._since),
            table_since=self._clock.seconds(self._table_since),
            uptime=(real_clock.monotonic_ns() - self._since) / 1e9,
            running=running,
            description=self._link.description,
            descriptors=parts.fd_store.supervisor,
            last_down=self._clock.seconds(self._down_at) if self._down_at else None,
            last_down_reason=self._down_reason,
            last_down_duration=self._down_duration,
            recorded=None if recorder is None else recorder.status(),
            counters=self.stats,
            signals=signals,
            tasks=tuple(
                TaskStatus(name, health.restarts, health.problem, health.last_problem)
                for name, health in self._health.items()
            ),
            capabilities=tuple(names_of(held_capabilities())),
            mac=self._link.mac.hex(":") or None,
            receive_buffer=self._link.granted,
            peer=address.peer if isinstance(address := self.config.address, UnixAddress) else None,
            down_reason=None if running or self._closed else self._link.down_reason or None,
            netns=None if self.config.netns is None else str(self.config.netns),
            owner=self.config.owner,
            group=self.config.group,
            rivals=() if self._others is None else self._others.status(self._clock),
        )

    def _signals(self) -> Iterator[SignalStatus]:
        """Yield the state of each signal when it is needed. Skip signals that a reload removes meanwhile."""
        self._clock.refresh()
        unsent = Counter(signal.name for batch in self._parts.handoffs[1].unfinished for signal in batch.items)
        table, current = self._registers.table, frozenset[Signal]()
        begun = table
        for signal in begun:
            if table is not self._registers.table:
                table = self._registers.table
                current = frozenset(table)
            if table is begun or signal in current:
                yield self._signal_status(signal, unsent)

    def _signal_status(self, signal: Signal, waiting: Counter[str]) -> SignalStatus:
        from inco_trio.proxy_status import SignalStatus

        events, states = self._parts.events, self._registers.states
        pending = 0
        if signal.direction is Direction.INBOUND:
            file, pending = states.file_of(signal.name), states.pending_of(signal.name)
            count, last, failures = file.count, file.last, file.failures
        else:
            count, last = events.sent[signal.name], events.sent_last.get(signal.name, 0)
            pending = waiting[signal.name]
            failures = self._outbound.failures[signal.name]
        return SignalStatus(
            signal=signal.name,
            direction=signal.direction,
            register=str(signal.path),
            count=count,
            last=self._clock.seconds(last) if last else None,
            failures=failures,
            pending=pending,
            problem=self._registers.problem(signal),
        )

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal and return after the link has accepted the frame.

        The call waits while the link is down. If the call is cancelled, the proxy may still send the frame later.
        Raises UnknownSignalError, or ClosedError if the proxy is closing.
        """
        signal = self._registers.table.outbound.get(str(name).encode("ascii", "replace"))
        if signal is None:
            raise self._unknown(name, "an outbound signal", self._registers.table.outbound.values())
        await self._outbound.send_signal(signal)

    @contextmanager
    def events(
        self, buffer: float = 1024, *, signals: Collection[str] | None = None, direction: Direction | str | None = None
    ) -> Iterator[trio.MemoryReceiveChannel[Notification]]:
        """Open a stream of new notifications, optionally limited to some `signals` or one `direction`.

        The proxy never waits for the reader. A reader that falls more than `buffer` notifications behind misses some;
        `Stats.events_lost` counts them. The stream ends when the proxy closes.

        Raises UnknownSignalError, or ClosedError if the proxy is closed.
        """
        self._check_open()
        if isinstance(signals, str):  # A str is a collection of characters, not of names.
            raise TypeError(f"signals={signals!r}: expected a collection of names, such as [{signals!r}]")
        names = None if signals is None else frozenset(signals)
        chosen = None if direction is None else direction_of(direction)
        known = [signal for signal in self._registers.table if chosen in (None, signal.direction)]
        for name in (names or frozenset()) - {signal.name for signal in known}:
            raise self._unknown(name, "a signal" if chosen is None else f"an {chosen.value} signal", known)

        def wanted(signal: Signal) -> bool:
            return (names is None or signal.name in names) and chosen in (None, signal.direction)

        with self._parts.events.open(buffer, wanted) as stream:
            yield stream

    async def wait_for(self, name: str) -> Notification:
        """Wait for the next notification of an inbound or outbound signal.

        Earlier notifications do not count. To wait for the answer to an action, open `events` before the action.
        Raises UnknownSignalError, or ClosedError if the proxy is closed or closes during the wait.
        """
        with self.events(math.inf, signals=[name]) as events:
            async for notification in events:
                return notification
        raise ClosedError("the proxy is closed")

    async def reload(self, config: Config) -> None:
        """Replace the signal table. The link and the signals that are in both tables keep working.

        The reload neither loses nor causes notifications. It creates missing IRQ directories. Raises ClosedError. If
        the link differs or a register cannot be opened, the reload changes nothing and raises another IncoError.
        """
        if not config.same_link(self.config):
            raise ConfigError(config.link, "a reload cannot change the link (restart the proxy)")
        async with self._reloading:
            self._check_open()
            table = SignalTable(config.signals)
            # During the reload, the link's filter must accept the frames of the old and the new table.
            former = self._registers.table
            self._link.expect({*former.inbound, *table.inbound}, former.outbound)
            try:
                with noted_by(self._parts.events.note):
                    await self._registers.reload(table, Trust(config.owner, config.group))
            finally:
                table = self._registers.table
                self._link.expect(table.inbound, table.outbound)
            self.config = config
            self._table_since = real_clock.monotonic_ns()
            self._parts.events.note("reloaded", f"reloaded: {len(config.signals)} signals", logging.INFO)

    def _unknown(self, name: str, kind: str, signals: Iterable[Signal]) -> UnknownSignalError:
        known = ", ".join(signal.name for signal in signals) or "none"
        return UnknownSignalError(name or repr(name), f"not {kind} of {self._link.name} (expected one of: {known})")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the proxy is closed")

    def _frame(self, name: str) -> bytes:
        return self._link.frame(name)

    def _is_incomplete(self) -> bool:
        """Return whether a reload could create a missing directory or register."""
        return self._registers.next_restore() < math.inf

    def _expect_successor(self) -> None:
        """Stop sooner, because another proxy with the same `Ground` will finish the pending notifications."""
        self._successor = True

    def _rivals(self) -> Others:
        """Return the record of other proxies that share the link or a directory."""
        if self._others is None:
            # Import the module lazily, because most proxies never need it.
            from inco_trio.proxy.others import Others

            self._others = Others(self._board, self._counters, self._parts.events.note, lambda: self._closed)
        return self._others

    def _rival_claims(self, pid: int, link: str | None, netns: str | None, directory: str | None) -> bool:
        """Report the process `pid` if it shares this link or directory (see `RivalRequest`). Return whether it does."""
        open_directories = self._registers.directories.by_path.values()
        return self._rivals().claimed(pid, link, netns, directory, self.config, open_directories)

    def _counted(self) -> Counters:
        """Return the counters, after adding the frames that the kernel has dropped since the last call."""
        if not self._closed:
            with noted_by(self._parts.events.note):
                self._inbound.count_dropped()
        return self._counters

    def _recorder(self) -> Recorder | None:
        return self._parts.events.recorder

    def _continued(self) -> None:
        """Handle SIGCONT: notifications that waited meanwhile must be recognizable. Signal handlers may call this."""
        recorder = self._parts.events.recorder
        for handoff in self._parts.handoffs:
            handoff.leave_unread((recorder and recorder.last_ns) or self._since)

    def _note_continued(self) -> None:
        """Record SIGCONT, and forget `_continued` if no notification was waiting."""
        if self._closed:
            return
        self._parts.events.note("message", "the process continues (SIGCONT) and was probably stopped", logging.INFO)
        self._inbound.check_unread()
        self._outbound.check_unread()

    def _history(self) -> History:
        return self._parts.events.history

    def _start(self, nursery: trio.Nursery) -> None:
        for name, task in self._tasks.items():
            nursery.start_soon(self._run_task, name, task, name=f"{self._link.name}: {name}")

    async def _run_task(self, name: str, task: Callable[[Health], Awaitable[None]]) -> None:
        noting.set(self._parts.events.note)
        try:
            with self._scopes[name]:
                await supervise(self._health[name], task, self._counters)
        finally:
            self._ended[name].set()

    async def _stop(self) -> None:
        """End the tasks once they have finished all accepted notifications, or at the configured deadline."""
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
        self._counters.unfinished = self._registers.states.pending + sum(
            len(batch.items) for handoff in self._parts.handoffs for batch in handoff.unfinished
        )
        text = "stopped"
        if unfinished := self._counters.unfinished:
            is_lost = isinstance(self._parts.fd_store, NoFdStore) and not self._successor
            text += f" with pending notifications: {unfinished} {'lost' if is_lost else 'kept'}"
            logger.log(logging.WARNING if is_lost else logging.INFO, "%s: %s", self._link.name, text)
        with noted_by(self._parts.events.note):
            self._inbound.count_dropped()
        self._parts.events.note("stopped", text, logging.INFO)
        self._parts.events.close()

    async def _watch(self, health: Health) -> None:
        """Run the task that follows the link, which may vanish, reappear or change its address."""
        link = self._link
        running: bool | None = None
        since, downs = real_clock.monotonic_ns(), link.downs
        while True:
            stored = link.fd
            if link.refresh():
                health.well()
                self._present.set()
            elif self._present.is_set():
                health.failed(f"{link.absence}: waiting for the link")
            before, running = running, link.running
            # The counter of a new interface starts at 0.
            if running is not before or (running and (link.downs > downs or link.renewal)):
                self._note_link(before, running, max(1, link.downs - downs), since)
                since = real_clock.monotonic_ns()
            downs = link.downs
            if link.fd != stored:
                try:
                    if link.fd < 0:
                        self._parts.fd_store.remove("link")
                    else:
                        self._parts.fd_store.store("link", link.fd)
                except IncoError as error:
                    text = f"{link.name}: frames that arrive during a restart will be lost: {error}"
                    report(logger, logging.WARNING, text)
            self._outbound.link_changed()
            await link.changed()

    def _note_link(self, before: bool | None, running: bool, count: int, since: int) -> None:
        """Log, count and report that the link came up or went down. `since` is the time of the last change.

        `before` is the previous state, or None at the start. If `before` and `running` are both true, the link went
        down and came up again `count` times between two checks.
        """
        seconds = (real_clock.monotonic_ns() - since) / 1e9
        if before:
            self._counters.link_downs += count
            self._down_at = real_clock.monotonic_ns()
        if before and running:
            text = f"the link went down and came up again at once ({times(count)})"
        elif before:
            text = f"the link went down after {seconds:.1f} s"
        elif before is None:
            text = f"the link is {'up' if running else 'down'}"
        else:
            text = f"the link came up after {seconds:.1f} s"
        reason = "" if running else self._link.down_reason
        if addition := self._link.renewal if running else reason:
            text += f": {addition}"
        if before:
            self._down_reason, self._down_duration = reason or None, None
        elif running and self._down_at:
            self._down_duration = seconds
        if before is not None:
            # Do not warn when the link comes up for the first time, because core 1 may start after the proxy.
            level = logging.WARNING if self._down_at else logging.INFO
            logger.log(level, "%s: %s", self._link.name, text, extra={"event": "link", "cause": ("link", running)})
        self._parts.events.link_changed(running, text, 0.0 if before is None or before == running else seconds)

    async def _restore(self, health: Health) -> None:
        """Run the task that retries failed operations on the registers."""
        registers = self._registers
        async with trio.open_nursery() as nursery:
            while True:
                pause = max(0.0, registers.next_restore() - real_clock.monotonic())
                with trio.move_on_after(pause) if pause < math.inf else trio.CancelScope():
                    await registers.troubled.wait()
                registers.troubled = trio.Event()
                await in_turns(registers.restore())
                # Send in the background, because a link that is down must not delay the recovery of registers.
                if (found := registers.triggers.found()).signals:
                    nursery.start_soon(self._outbound.send_found, found)
                health.well()


class Ground:
    """The resources that a proxy uses and that the board's next proxy inherits."""

    def __init__(
        self,
        inflight: Inflight,
        inotify: Watcher,
        mounts: Mounts,
        fds: Mapping[str, int],
        around: Surroundings,
        leave_nothing: bool,
        listener: Listener | None = None,
        recorded: int = KEPT,
    ) -> None:
        self.inflight = inflight
        self.inotify = inotify
        self.mounts = mounts
        self.fds = fds
        """The descriptors to put into the fd store, keyed by name."""
        self.around = around
        self.leave_nothing = leave_nothing
        """Whether to delete the link's socket file when the proxy closes, because no later proxy needs it."""
        self.listener = listener
        self.recorded = recorded
        """How many notifications a new flight recorder keeps by default."""


@asynccontextmanager
async def open_proxy(config: Config) -> AsyncIterator[Proxy]:
    """Run a proxy while the block runs. When the block ends or is cancelled, the proxy stops cleanly.

    When the block starts, the link and the watches are active. Raises LinkNotFoundError, PermissionDeniedError,
    ResourceError or ConfigError. Exceptions from the block propagate unchanged. If a task of the proxy fails and cannot
    be restarted, the block is cancelled. An ExceptionGroup then contains the task's exception and any exception from
    the block.
    """
    async with open_supervised(config, NoFdStore()) as proxy:
        yield proxy


@asynccontextmanager
async def open_supervised(config: Config, fd_store: FdStore, listener: Listener | None = None) -> AsyncIterator[Proxy]:
    """Run a proxy as `open_proxy` does, with an fd store. `listener` receives all events."""
    with ExitStack() as resources:
        ground = _ground(fd_store, resources, listener)
        proxy = await build(config, fd_store, ground, resources)
        async with _following(ground.mounts), running(proxy):
            await proxy._present.wait()
            yield proxy


@asynccontextmanager
async def running(proxy: Proxy) -> AsyncIterator[None]:
    """Run the tasks of a proxy while the block runs. Raises the errors of `open_proxy`."""
    async with starting_and_stopping(proxy._start, proxy._stop):
        yield


@asynccontextmanager
async def _following(mounts: Mounts) -> AsyncIterator[None]:
    """Report mount changes while the block runs."""
    async with starting_and_stopping(lambda nursery: nursery.start_soon(mounts.run), mounts.stop):
        yield


def _ground(fd_store: FdStore, resources: ExitStack, listener: Listener | None) -> Ground:
    """Open or inherit the resources of a proxy. Raises ResourceError."""
    inherited = fd_store.inherited
    report_missing(inherited, ("inflight", "inotify", "link"))
    try:
        inflight = Inflight.open(inherited_fd(inherited, "inflight"))
        resources.callback(inflight.close)
        held = inherited_fd(inherited, "inotify")
        if held is None:
            inflight.forget_watches()
        inotify = Inotify(held)
        resources.callback(inotify.close)
        mounts = Mounts()
        resources.callback(mounts.close)
    except OSError as error:
        raise refusal(error, "shared memory") from error
    fds = {"inflight": inflight.fd, "inotify": inotify.fd}
    around = Surroundings()
    resources.callback(around.close)
    return Ground(inflight, inotify, mounts, fds, around, isinstance(fd_store, NoFdStore), listener)


async def build(config: Config, fd_store: FdStore, ground: Ground, resources: ExitStack) -> Proxy:
    """Open or inherit all resources and return the proxy. `resources` will close them. Raises IncoError.

    Other tasks run meanwhile, because a table may have thousands of registers.
    """
    counters, recorder = Counters(), None
    if config.history != 0:
        recorder = Recorder(ground.inflight.recorder, config.history, ground.recorded)
    events = Events(counters, History(ground.inflight.history), ground.listener, recorder)
    with noted_by(events.note):
        proxy = await _build(config, fd_store, ground, resources, counters, events)
    if recorder is not None:
        recorder.note_start(fd_store.supervisor, after_crash=events.listener.after_crash)
    return proxy


async def _build(
    config: Config, fd_store: FdStore, ground: Ground, resources: ExitStack, counters: Counters, events: Events
) -> Proxy:
    """Open the resources and create the proxy in an order that loses no notification.

    The registers are opened before the link, so that triggers are watched early. Recovered notifications are finished
    before newer ones are read. Descriptors are stored last, because storing one replaces the inherited descriptor.
    """
    inherited = fd_store.inherited
    inflight = ground.inflight
    registers = Registers(ground.inotify, inflight, counters, Trust(config.owner, config.group))
    resources.callback(registers.close)
    ground.mounts.followers.add(registers.mounts_changed)
    resources.callback(ground.mounts.followers.remove, registers.mounts_changed)
    await in_turns(registers.open(SignalTable(config.signals)))

    link, stale = open_link(config.address, config.netns, inherited_fd(inherited, "link"), inflight.note, ground.around)
    resources.callback(lambda: link.close(remove=ground.leave_nothing))
    link.expect(registers.table.inbound, registers.table.outbound)
    try:
        exists = link.refresh()
    except OSError as error:
        raise from_os_error(error, link.name) from error
    if not exists:
        if not config.wait_link:
            raise link.missing()
        logger.warning("%s: %s: waiting for the link", link.name, link.absence)

    _find_unread(inflight, events.recorder)
    handoffs = (
        Handoff(inflight.watches, events.written, inflight.times[UNREAD_FRAMES:][:1]),
        Handoff(inflight.watches, events.accepted, inflight.times[UNREAD_EVENTS:][:1]),
    )
    inbound = Inbound(handoffs[0], link, registers.states, inflight, counters, events)
    outbound = Outbound(handoffs[1], link, registers.triggers, ground.inotify, inflight, counters, events)
    registers.states.delivered_late = events.written_late
    with ExitStack() as failed:
        failed.callback(events.close)
        events.listener.opened(events.keep)
        inbound.recover()
        outbound.recover()
        if stale is not None:
            logger.info("%s: the inherited socket no longer matches the link and is replaced", link.name)
            inbound.drain(stale)
            stale.close(remove=False)
        for name, fd in (*ground.fds.items(), ("link", link.fd)):
            if inherited.get(name) != fd:
                fd_store.store(name, fd)
        failed.pop_all()
    logger.info("%s: %d signals, %s", link.name, len(registers.table), link.description)
    return Proxy(config, _Parts(counters, fd_store, events, registers, link, handoffs, inbound, outbound))


def _find_unread(inflight: Inflight, recorder: Recorder | None) -> None:
    """Store since when the previous process may not have read the kernel's queues, unless it stored this itself."""
    if recorder is not None and (last := recorder.inherited_ns):
        # The previous process was killed. While the link did not accept its frames, it read no triggers. Ignore the
        # time of a batch that it had sent; such a batch has no events any more.
        banks = [bank for bank in inflight.events if bank.pending_since and parse_events(bank.view)]
        blocked = [abs(bank.pending_since) for bank in banks]
        inflight.times[UNREAD_FRAMES] = inflight.times[UNREAD_FRAMES] or last
        inflight.times[UNREAD_EVENTS] = inflight.times[UNREAD_EVENTS] or min([last, *blocked])


async def serve(config: Config, *, task_status: trio.TaskStatus[Proxy] = trio.TASK_STATUS_IGNORED) -> None:
    """Run a proxy until cancelled. Call `task_status.started` with the Proxy. Raises the errors of `open_proxy`."""
    async with open_proxy(config) as proxy:
        task_status.started(proxy)
        await trio.sleep_forever()
