"""The daemon `inco-trio run`: its boards, its control socket, and a diagnosis after startup."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from inco_trio.config import Config
from inco_trio.control import place
from inco_trio.control.feed import Served
from inco_trio.control.server import Control
from inco_trio.errors import IncoError
from inco_trio.notifications import Listener
from inco_trio.nurseries import read_aside
from inco_trio.persist.fdstore import FdStore
from inco_trio.proxy.proxy import Proxy, open_supervised
from inco_trio.registers.diagnose import diagnose
from inco_trio.service import process_signals
from inco_trio.service.log import log_statistics
from inco_trio.service.privileges import raise_descriptor_limit
from inco_trio.service.runner import Runner
from inco_trio.signals import Signal
from inco_trio.trust import UnfitFileError

if TYPE_CHECKING:
    from inco_trio.control.client import Client
    from inco_trio.service.rivals import Rival

__all__ = ["Boards", "Daemon", "OneBoard"]

logger = logging.getLogger(__name__)


class Boards(Served, Protocol):
    """The boards of a daemon: a single board, or a directory of boards."""

    def open(self, fd_store: FdStore, listener: Listener | None) -> AbstractAsyncContextManager[None]:
        """Keep the proxies open while the block runs. Raises IncoError."""

    async def reload(self) -> Sequence[str]:
        """Reload the configuration; return why parts of it were refused. Raises IncoError if all of it was refused."""

    def log_statistics(self) -> None:
        """Log the counters. Do nothing if `open` has not been called yet."""

    def signals(self) -> Collection[Signal]:
        """Return the signals of all boards."""

    def configs(self) -> Collection[Config]:
        """Return the configuration of each board, including boards that are not open."""


class OneBoard:
    """A single board, with the configuration that `load` returns. `load` may raise IncoError."""

    def __init__(self, load: Callable[[], Config]) -> None:
        self._load = load
        self._config = load()
        self._proxy: Proxy | None = None
        self.name, self.label = self._config.address.name, self._config.address.label

    @asynccontextmanager
    async def open(self, fd_store: FdStore, listener: Listener | None) -> AsyncIterator[None]:
        async with open_supervised(self._config, fd_store, listener) as self._proxy:
            yield

    async def reload(self) -> Sequence[str]:
        assert self._proxy is not None  # noqa: S101 - the runner reloads only after `open`
        await self._proxy.reload(await read_aside(self._load))
        logger.info("reloaded: %d signals", len(self._proxy.config.signals), extra={"event": "reloaded"})
        return ()

    def log_statistics(self) -> None:
        if self._proxy is not None:
            log_statistics(self._proxy._counted().as_dict())

    def signals(self) -> Collection[Signal]:
        return self._config.signals

    def configs(self) -> Collection[Config]:
        return [self._config]

    def proxies(self) -> Mapping[str, Proxy]:
        return {} if self._proxy is None else {self.name: self._proxy}

    def not_open(self) -> Mapping[str, str]:
        return {self.name: "the link does not exist yet"} if self._proxy is None else {}


class Daemon:
    """The daemon for `boards`. `control` is the path of the control socket, "none", or None for the default path.

    Once the boards are open, `restrict` drops the privileges that the daemon no longer needs.
    """

    def __init__(
        self,
        boards: Boards,
        label: str,
        control: str | None,
        fd_store: FdStore,
        restrict: Callable[[Collection[Config], Path | None], None] = lambda *_: None,
    ) -> None:
        self.name = boards.name
        self.reload, self.log_statistics = boards.reload, boards.log_statistics
        self._boards = boards
        self._label = label
        self._control = control
        self._fd_store = fd_store
        self._restrict = restrict
        self._control_path: Path | None = None
        self._opened: Sequence[Proxy] = ()
        """The proxies that were open when the daemon became ready, until the diagnosis examines them."""
        self._after_crash = False
        """Whether this process replaced the control socket of a process that had ended without a clean stop."""
        self._announced: Sequence[Client | socket.socket] = ()
        """The connections to other proxies of the same links and directories. They end with this process."""
        self._met: tuple[Collection[int], Collection[Proxy]] = (), ()
        """The PIDs of these proxies, and the proxies of this process that share something with them."""

    async def run(self, runner: Runner) -> None:
        raise_descriptor_limit()
        async with self._answering(runner) as control, self._boards.open(self._fd_store, control):
            # The diagnosis inspects processes of other users, so its thread starts before capabilities are dropped.
            is_ready, met = threading.Event(), trio.Event()
            self._start_diagnosis(is_ready, met, trio.lowlevel.current_trio_token())
            self._restrict(self._boards.configs(), self._control_path)
            if control is not None:
                control.after_crash = False  # Before this process, no process served the boards that a reload adds.
            runner.ready()
            runner.background.start_soon(self._record_ends, met)
            # The diagnosis must not read this mapping itself: the event loop opens and closes boards at the same time.
            self._opened = [*self._boards.proxies().values()]
            is_ready.set()
            token = trio.lowlevel.current_trio_token()
            with process_signals.continuing(lambda: self._continued(token)):
                await runner.follow_reloads()

    def _continued(self, token: trio.lowlevel.TrioToken) -> None:
        """Handle SIGCONT. This is called in the signal handler, before the event loop reads anything else."""
        for proxy in self._boards.proxies().values():
            proxy._continued()
            token.run_sync_soon(proxy._note_continued, idempotent=True)

    @asynccontextmanager
    async def _answering(self, runner: Runner) -> AsyncIterator[Listener | None]:
        """Serve the control socket while the block runs. If the socket cannot be opened, the proxies run without it."""
        with ExitStack() as resources:
            try:
                listener = self._control_socket(resources)
            except OSError as error:
                reason = error.strerror or str(error)
                if isinstance(error, UnfitFileError):
                    reason = f"{reason} ({error.remedy})"
                logger.warning("control socket: cannot open %s: %s", error.filename or self._control, reason)
                listener = None
            if listener is None:
                yield None
                return
            self._control_path = Path(listener.getsockname())
            control = Control(self._boards, listener, runner.reload)
            control.feed.after_crash = self._after_crash
            runner.background.start_soon(control.serve)
            try:
                yield control.feed
            finally:
                control.close()
                with trio.CancelScope(shield=True):
                    await control.closed.wait()

    def _control_socket(self, resources: ExitStack) -> socket.socket | None:
        """Return the listening control socket, or None if it is disabled. Raises OSError."""
        if self._control == "none":
            return None
        if self._control is not None:
            self._after_crash = place.is_stale(Path(self._control))
            return resources.enter_context(place.listening(Path(self._control)))
        path = place.default_path(self._label)
        place.make_directory(path.parent)
        self._after_crash = place.is_stale(path)
        try:
            return resources.enter_context(place.listening(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # A proxy in another network namespace, with an interface of the same name, is using this path. Add our PID.
            for left in path.parent.glob(f"{glob.escape(path.stem)}-*.sock"):
                with contextlib.suppress(OSError):
                    if not place.is_live(left):
                        left.unlink()
            other = path.with_name(f"{path.stem}-{os.getpid()}.sock")
            return resources.enter_context(place.listening(other))

    def _start_diagnosis(self, is_ready: threading.Event, met: trio.Event, token: trio.lowlevel.TrioToken) -> None:
        # Do not use trio.to_thread: it wakes the event loop when its thread ends. Skip the diagnosis if no thread can
        # start.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._diagnose, args=(is_ready, met, token), daemon=True).start()

    def _diagnose(self, is_ready: threading.Event, met: trio.Event, token: trio.lowlevel.TrioToken) -> None:
        """Log conditions that may prevent notifications. Wait for readiness first, because reading /proc takes time.

        This thread keeps all privileges, so it must not wait for other processes. Other threads that it started would
        keep them, too.
        """
        is_ready.wait()
        # A vanished file, a lack of descriptors or a stop of the daemon ends the diagnosis.
        with contextlib.suppress(OSError, IncoError, trio.RunFinishedError):
            for line in diagnose(self._boards.signals()):
                logger.warning("%s", line)
            # Import the module lazily, because the import would delay the start of the daemon.
            from inco_trio.service.rivals import rivals

            proxies, self._opened = self._opened, ()
            configs = [proxy.config for proxy in proxies]
            if found := [*rivals([(config.address, config.netns, config.signals) for config in configs])]:
                self._meet(found, proxies, configs, met, token)

    def _meet(
        self,
        found: Sequence[Rival],
        proxies: Sequence[Proxy],
        configs: Sequence[Config],
        met: trio.Event,
        token: trio.lowlevel.TrioToken,
    ) -> None:
        """Record other proxies in the history, and report this process to them. Set `met`.

        Raises OSError, IncoError, or trio.RunFinishedError if this process stops.
        """
        from inco_trio.linux.processes import described
        from inco_trio.service.announcing import announce

        what = {pid: described(pid) for pid in dict.fromkeys(rival.process.pid for rival in found)}
        for rival in found:
            token.run_sync_soon(_appeared, proxies[rival.board], rival, what[rival.process.pid])
        concerned = [proxies[number] for number in dict.fromkeys(rival.board for rival in found)]
        self._met = dict.fromkeys(rival.process.pid for rival in found), concerned
        token.run_sync_soon(met.set)
        self._announced = announce(found, configs)

    async def _record_ends(self, met: trio.Event) -> None:
        """Once the diagnosis has met other proxies, record when they end."""
        await met.wait()
        (pids, proxies), self._met = self._met, ((), ())
        async with trio.open_nursery() as nursery:
            for pid in pids:
                nursery.start_soon(_record_end, pid, proxies)


def _appeared(proxy: Proxy, rival: Rival, what: str) -> None:
    proxy._rivals().found(rival.process.pid, rival.subject, rival.text, what)


async def _record_end(pid: int, proxies: Collection[Proxy]) -> None:
    from inco_trio.service.announcing import wait_for_end

    try:
        await wait_for_end(pid)
    except OSError:  # No descriptor is free.
        return
    for proxy in proxies:
        proxy._rivals().ended(pid)
