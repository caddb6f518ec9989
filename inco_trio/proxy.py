"""The proxy: one nursery, and the legs in it.

Each leg runs shielded, in a cancel scope of its own, so that a stop ends them in the order in which notifications flow:
the readers stop waiting and read what is left, the others finish it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

import attrs
import trio

from inco_trio.config import Config
from inco_trio.errors import ConfigError, ResourceRefused, UnknownSignal
from inco_trio.handoff import Handoff
from inco_trio.inbound import Inbound
from inco_trio.keep.fdstore import FdStore, NoFdStore
from inco_trio.keep.inflight import Inflight
from inco_trio.links.packet import Link, LinkWatcher, missing
from inco_trio.outbound import Outbound
from inco_trio.registers.inotify import Inotify
from inco_trio.registers.triggers import Registers, start_error
from inco_trio.signals import Signal, SignalTable
from inco_trio.stats import Stats
from inco_trio.supervise import Backoff, Health, supervise

__all__ = ["Notification", "Proxy", "open_proxy", "serve"]

logger = logging.getLogger(__name__)


@attrs.frozen
class Notification:
    """One notification that was carried."""

    signal: Signal
    monotonic_ns: int
    """When it was written or sent, as of time.monotonic_ns()."""


class Proxy:
    """A running proxy; `open_proxy` makes one."""

    def __init__(self, config: Config, fd_store: FdStore) -> None:
        self.config = config
        self._fd_store = fd_store
        self._stats = Stats()
        self._streams: set[trio.MemorySendChannel[Notification]] = set()
        self._trouble = trio.Event()
        self._closed = False
        self._scopes: dict[str, trio.CancelScope] = {}
        self._ended: dict[str, trio.Event] = {}
        self._inbound_handoff, self._outbound_handoff = Handoff(self._publish), Handoff(self._publish)

    # ------------------------------------------------------------------------------------------------ for callers

    @property
    def stats(self) -> Stats:
        """The counters, up to date."""
        if not self._closed:
            self._inbound.count_dropped()
        return self._stats

    async def send(self, name: str) -> None:
        """Send the frame of an outbound signal; returns once the link has accepted it.

        Waits while the link is down; when cancelled then, the frame may still be sent later. Raises UnknownSignal, or
        ClosedError once the proxy is closing.
        """
        signal = self._registers.table.outbound.get(name.encode("ascii", "replace"))
        if signal is None:
            raise UnknownSignal(f"{name}: not an outbound signal of {self.config.interface}")
        await self._outbound.send_signal(signal)

    @contextmanager
    def events(self, buffer: int = 1024) -> Iterator[trio.MemoryReceiveChannel[Notification]]:
        """A stream of what is carried from now on, in both directions.

        A reader that is more than `buffer` notifications behind misses some, which `Stats.events_lost` counts; the
        proxy never waits for it. The stream ends when the proxy closes.
        """
        entry, stream = trio.open_memory_channel[Notification](buffer)
        self._streams.add(entry)
        try:
            with entry, stream:
                yield stream
        finally:
            self._streams.discard(entry)

    async def reload(self, config: Config) -> None:
        """Take another signal table; the link and all that is in both tables are left untouched.

        Nothing that was accepted is lost, and nothing is notified by it. Raises ConfigError for another interface.
        """
        if config.interface != self.config.interface:
            raise ConfigError([f"{config.interface}: a reload cannot change the interface: restart"])
        self.config = config
        await self._outbound.trigger(self._registers.replace_table(SignalTable(config.signals)))
        self._look_for_trouble()

    # --------------------------------------------------------------------------------------------- opening, closing

    async def _open(self, resources: ExitStack) -> None:
        """Acquire everything, what an earlier process left included. `resources` gets the closing of it."""
        inherited = self._fd_store.inherited
        interface = self.config.interface
        try:
            inflight = Inflight.open(inherited.get("inflight"))
        except OSError as error:
            raise start_error(error, "shared memory") from error
        resources.callback(inflight.close)
        try:
            inotify = Inotify(inherited.get("inotify"))
        except OSError as error:
            raise start_error(error, "inotify") from error
        resources.callback(inotify.close)
        self._registers = Registers(SignalTable(self.config.signals), inotify, inflight, self._stats)
        resources.callback(self._registers.close)
        self._registers.open()

        stale = None
        if "link" in inherited:
            self._link = Link.take(interface, inherited["link"])
            if not self._link.fits:
                stale = self._link
        if "link" not in inherited or stale is not None:
            self._link = Link.open(interface)
        resources.callback(self._link.close)
        try:
            self._watcher = LinkWatcher()
        except OSError as error:
            raise ResourceRefused(f"{interface}: cannot watch interfaces (rtnetlink): {error.strerror}") from error
        resources.callback(self._watcher.close)
        await self._wait_for_link()

        self._inbound = Inbound(
            self._inbound_handoff, self._link, self._registers, inflight, self._stats, self._look_for_trouble
        )
        self._outbound = Outbound(
            self._outbound_handoff, self._link, self._registers, inotify, inflight, self._stats, self._look_for_trouble
        )
        self._inbound.recover()
        self._outbound.recover()
        if stale is not None:
            logger.info("%s: the inherited socket does not fit any more and is replaced", interface)
            self._inbound.drain(stale)
            stale.close()
        for name, fd in (("inflight", inflight.fd), ("inotify", inotify.fd), ("link", self._link.fd)):
            if inherited.get(name) != fd:
                self._fd_store.store(name, fd)
        self._owed = inflight.owed
        self._look_for_trouble()
        logger.info(
            "%s: %d signals, address %s, receive buffer of %d kB granted",
            interface,
            len(self._registers.table),
            self._link.mac.hex(":"),
            self._link.granted // 1024,
        )

    async def _wait_for_link(self) -> None:
        health = Health(self.config.interface)
        while not self._link.refresh():
            if not self.config.wait_link:
                raise missing(self.config.interface)
            health.failed("no such interface yet: waiting for it")
            await self._watcher.wait()
        health.well()

    def _start(self, nursery: trio.Nursery) -> None:
        for leg in (
            self._outbound.send,
            self._inbound.write,
            self._watch,
            self._mend,
            self._inbound.receive,
            self._outbound.triggers,
        ):
            name = leg.__name__.lstrip("_")
            self._ended[name] = trio.Event()
            self._scopes[name] = trio.CancelScope(shield=True)
            nursery.start_soon(self._run_leg, name, leg, name=f"{self.config.interface}: {name}")

    async def _run_leg(self, name: str, leg: Callable[[Health], Awaitable[None]]) -> None:
        try:
            with self._scopes[name]:
                await supervise(f"{self.config.interface}: {name}", leg, self._stats)
        finally:
            self._ended[name].set()

    async def _stop(self) -> None:
        """End the legs: what was accepted is finished first, within the configured deadline."""
        ways = (self._inbound_handoff, self._outbound_handoff)
        with trio.move_on_after(self.config.stop_deadline):
            for way in ways:
                way.stop_reading()
            for name in ("receive", "triggers"):
                await self._ended[name].wait()
            self._scopes["mend"].cancel()
            for way in ways:
                way.close()
            for name in ("write", "send"):
                await self._ended[name].wait()
        for way in ways:
            way.abort()
            way.close()
        for scope in self._scopes.values():
            scope.cancel()
        for ended in self._ended.values():
            await ended.wait()
        self._outbound.closed()
        self._stats.unfinished = sum(self._owed[name] for name in self._owed) + sum(
            len(batch.signals) for way in ways for batch in way.open
        )
        self._inbound.count_dropped()
        self._closed = True
        for stream in self._streams:
            stream.close()

    # -------------------------------------------------------------------------------------------------------- legs

    async def _watch(self, health: Health) -> None:
        """The leg that follows the interface: it may go, come back as another one, or change its address."""
        present = True
        while True:
            if self._link.refresh() != present:
                present = not present
                if not present:
                    health.failed("the interface is gone: waiting for it")
            if present:
                health.well()
            self._outbound.link_changed()
            await self._watcher.wait()

    async def _mend(self, health: Health) -> None:
        """The leg that retries what the registers could not do."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._trouble.wait()
                backoff = Backoff()
                while self._registers.troubled:
                    await trio.sleep(backoff.next())
                    # Not awaited: a link that is down must not keep registers from being mended.
                    nursery.start_soon(self._outbound.trigger, self._registers.mend())
                health.well()
                self._trouble = trio.Event()

    def _look_for_trouble(self) -> None:
        if self._registers.troubled:
            self._trouble.set()

    def _publish(self, signals: Sequence[Signal]) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            for signal in signals:
                logger.debug("%s: %s", signal.direction.value, signal.name)
        if not self._streams:
            return
        now = time.monotonic_ns()
        for stream in self._streams:
            for number, signal in enumerate(signals):
                try:
                    stream.send_nowait(Notification(signal, now))
                except trio.WouldBlock:
                    self._stats.events_lost += len(signals) - number
                    break


@asynccontextmanager
async def open_proxy(config: Config, *, fd_store: FdStore | None = None) -> AsyncIterator[Proxy]:
    """Open a proxy that carries signals while the block runs, and is stopped cleanly when it ends or is cancelled.

    `fd_store` keeps descriptors for a successor, see `keep.fdstore`. Once entered, link and watches are live. Raises
    IncoError:
    LinkMissing, PermissionRefused, ResourceRefused, ConfigError.
    """
    with ExitStack() as resources:
        proxy = Proxy(config, fd_store or NoFdStore())
        await proxy._open(resources)
        failure = None
        async with trio.open_nursery() as nursery:
            proxy._start(nursery)
            try:
                yield proxy
            except Exception as error:  # noqa: BLE001 - raised again below, where no nursery puts it into a group
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await proxy._stop()
        if failure is not None:
            raise failure


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
