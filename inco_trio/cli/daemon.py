"""The daemon: signals of the process and exit codes around `open_proxy`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import attrs
import trio

from inco_trio.cli import process_signals
from inco_trio.cli.options import LINK, absolute, check_link, config_path, path_of
from inco_trio.cli.parser import EXIT_INTERNAL
from inco_trio.config import Board, Config, read_board
from inco_trio.control import place
from inco_trio.control.server import Control
from inco_trio.errors import IncoError, ResourceError, UsageError
from inco_trio.notifications import Listener
from inco_trio.persist.fdstore import FdStore, fd_store_from_environment
from inco_trio.proxy.proxy import Proxy, open_proxy
from inco_trio.registers.diagnose import diagnose
from inco_trio.service.log import log_statistics
from inco_trio.service.notify import check_notification_fd, notify_ready, notify_stopping
from inco_trio.signals import Signal, builtin_signals

__all__ = ["aside", "run_daemon"]

logger = logging.getLogger(__name__)

_A = TypeVar("_A")
_R = TypeVar("_R")

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def run_daemon(args: argparse.Namespace) -> int:
    """Carry signals until the process is told to stop; returns the exit code. Raises IncoError."""
    if args.notification_fd is not None:
        check_notification_fd(args.notification_fd)
    if args.fd_holder is not None:
        path_of(args.fd_holder, "--fd-holder")
    if args.control not in (None, "none"):
        args.control = absolute(args.control, "--control")
    service: _Service
    if args.boards is not None:
        from inco_trio.cli.boards import ManyBoards

        service = ManyBoards(args)
    else:
        service = _OneBoard(args)

    try:
        trio.run(_serve, args, service, fd_store_from_environment(args.fd_holder, service.label))
    except IncoError:
        raise
    except Exception as error:  # logged whole; the exit code tells the supervisor
        if refused := _exhausted(error):
            raise ResourceError(f"{service.name}: {refused.strerror}: raise the limit, or free some") from error
        logger.exception("internal error: this is a fault of inco-trio, please report it")
        return EXIT_INTERNAL
    return 0


class _Service(Protocol):
    """What the daemon runs: the proxy of one board, or those of many."""

    name: str
    """What the log calls it."""
    label: str
    """What its kept descriptors are named after."""

    def open(self, fd_store: FdStore, listener: Listener | None) -> AbstractAsyncContextManager[None]:
        """Open it while the block runs. Raises IncoError."""

    async def reload(self) -> None:
        """Read the configuration again. Raises IncoError for one that is refused."""

    def log_statistics(self) -> None:
        """Log the counters; nothing if it was not open yet."""

    def signals(self) -> Collection[Signal]:
        """All that it carries."""

    def proxies(self) -> Mapping[str, Proxy]:
        """See `Served.proxies`."""

    def not_open(self) -> Mapping[str, str]:
        """See `Served.not_open`."""


class _OneBoard:
    def __init__(self, args: argparse.Namespace) -> None:
        args.iface = LINK if args.iface is None else args.iface
        check_link(args.iface)
        if args.irq_dir is not None:
            args.irq_dir = absolute(args.irq_dir, "--irq-dir")
        self._args = args
        self._config = _load(args)
        self._proxy: Proxy | None = None
        self.name, self.label = self._config.address.name, self._config.address.label

    @asynccontextmanager
    async def open(self, fd_store: FdStore, listener: Listener | None) -> AsyncIterator[None]:
        async with open_proxy(self._config, fd_store=fd_store, listener=listener) as self._proxy:
            yield

    async def reload(self) -> None:
        assert self._proxy is not None  # noqa: S101 - see `_Service.open`
        await self._proxy.reload(await aside(_load, self._args))
        logger.info("reloaded: %d signals", len(self._proxy.config.signals), extra={"event": "reloaded"})

    def log_statistics(self) -> None:
        if self._proxy is not None:
            log_statistics(self._proxy.stats.as_dict())

    def signals(self) -> Collection[Signal]:
        return self._config.signals

    def proxies(self) -> Mapping[str, Proxy]:
        return {} if self._proxy is None else {self.name: self._proxy}

    def not_open(self) -> Mapping[str, str]:
        return {self.name: "the link is not there yet"} if self._proxy is None else {}


def _load(args: argparse.Namespace) -> Config:
    """The configuration that the arguments name; its defaults are logged. Raises IncoError."""
    board: Board
    if args.irq_dir is not None:
        if args.config is not None:
            raise UsageError("--irq-dir and --config exclude each other")
        board = Board(builtin_signals(args.irq_dir), ())
    else:
        board = read_board(config_path(args))
    for note in board.notes:
        logger.info("%s", note)
    return Config(args.iface, board.signals, wait_link=args.wait_link)


async def aside(read: Callable[[_A], _R], argument: _A) -> _R:
    """`read(argument)`, which reads files, while notifications are carried."""
    try:
        return await trio.to_thread.run_sync(read, argument, abandon_on_cancel=True)
    except RuntimeError:  # no thread can be had now: a large file delays notifications by what it takes to read it
        return read(argument)


def _exhausted(error: Exception) -> OSError | None:
    """The cause, if `error` is, or only wraps, a limit of the system, which Trio meets too."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, OSError) and error.errno in EXHAUSTED else None


@attrs.define(eq=False)
class _Run:
    """What the tasks of the daemon share."""

    service: _Service
    is_open: bool = False
    stop: trio.CancelScope = attrs.Factory(trio.CancelScope)


async def _serve(args: argparse.Namespace, service: _Service, fd_store: FdStore) -> None:
    run = _Run(service)
    failure: IncoError | None = None
    # One reload that is due stands for all that were asked for.
    hang_up, hang_ups = trio.open_memory_channel[None](1)
    async with trio.open_nursery() as nursery:
        await nursery.start(_follow_signals, run, _once(hang_up))
        try:
            with run.stop:
                await trio.lowlevel.checkpoint_if_cancelled()  # told to stop already: nothing is opened
                async with _answering(args, service, nursery) as control, service.open(fd_store, control):
                    run.is_open = True
                    notify_ready(args.notification_fd)
                    logger.info("%s: ready", service.name, extra={"event": "ready"})
                    _start_diagnosis(service)
                    try:
                        await _follow_hang_ups(hang_ups, service)
                    finally:
                        notify_stopping()
        except IncoError as error:
            failure = error
        finally:
            service.log_statistics()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not run.is_open:
        logger.info("%s: told to stop before it was open", service.name)


@asynccontextmanager
async def _answering(
    args: argparse.Namespace, service: _Service, nursery: trio.Nursery
) -> AsyncIterator[Listener | None]:
    """Answer at the control socket while the block runs, if there can be one: it is nothing that carrying needs."""
    with ExitStack() as resources:
        try:
            listener = _control_socket(args, service, resources)
        except OSError as error:
            logger.warning("no control socket: %s: %s", error.filename or args.control, error.strerror)
            listener = None
        if listener is None:
            yield None
            return
        control = Control(service, listener)
        nursery.start_soon(control.serve)
        try:
            yield control.feed
        finally:
            control.close()
            with trio.CancelScope(shield=True):
                await control.closed.wait()


def _control_socket(args: argparse.Namespace, service: _Service, resources: ExitStack) -> socket.socket | None:
    """The socket, if there is to be one. Raises OSError."""
    if args.control == "none":
        return None
    path = place.default_path(service.label) if args.control is None else Path(args.control)
    if path is None:
        logger.info("no control socket: $XDG_RUNTIME_DIR is not set: --control PATH names one")
        return None
    if args.control is not None:
        return resources.enter_context(place.listening(path))
    path.parent.mkdir(mode=0o755, exist_ok=True)
    try:
        return resources.enter_context(place.listening(path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # As two interfaces of one name in two network namespaces. Such processes may have been killed.
        for left in path.parent.glob(f"{glob.escape(path.stem)}-*.sock"):
            with contextlib.suppress(OSError):
                if not place.is_live(left):
                    left.unlink()
        other = path.with_name(f"{path.stem}-{os.getpid()}.sock")
        return resources.enter_context(place.listening(other))


def _once(channel: trio.MemorySendChannel[None]) -> Callable[[], None]:
    """A function that sends, unless as many wait as the channel takes: then one more tells nothing new."""

    def send() -> None:
        with contextlib.suppress(trio.WouldBlock):
            channel.send_nowait(None)

    return send


async def _follow_signals(
    run: _Run, reload: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Do what the signals of the process ask for; `task_status.started` is called once those held before are done."""
    entry, arrivals = trio.open_memory_channel[None](1)
    tell, token = _once(entry), trio.lowlevel.current_trio_token()
    with process_signals.listening(lambda: token.run_sync_soon(tell, idempotent=True)):
        _obey(run, reload)
        task_status.started()
        async for _ in arrivals:
            _obey(run, reload)


def _obey(run: _Run, reload: Callable[[], None]) -> None:
    # Nothing waits here: a stop must not come behind a reload.
    for number in process_signals.take():
        if number in process_signals.STOPS:
            run.stop.cancel()
        elif number == signal.SIGHUP:
            if not run.is_open:
                logger.info("the configuration is read again once the link is there")
            reload()
        elif not run.is_open:
            logger.info("there are no counters before the link is there")
        else:
            run.service.log_statistics()


async def _follow_hang_ups(hang_ups: trio.MemoryReceiveChannel[None], service: _Service) -> None:
    """Reload the configuration whenever it is asked for, one time after the other. Cancelled, it waits for nothing."""
    async for _ in hang_ups:
        try:
            await service.reload()
        except IncoError as error:
            for problem in str(error).splitlines():
                logger.error("reload refused, the old configuration goes on: %s", problem)  # noqa: TRY400 - no fault of ours


def _start_diagnosis(service: _Service) -> None:
    # A thread of its own, as one of Trio's would wake up once more to end.
    with contextlib.suppress(RuntimeError):  # No thread can be had: carrying needs none.
        threading.Thread(target=_diagnose, args=(service,), daemon=True).start()


def _diagnose(service: _Service) -> None:
    """Say what may keep notifications from coming; after readiness, as it reads all of /proc."""
    # What cannot be looked at, as no descriptor is left to look with or as it is gone, is no reason to complain.
    with contextlib.suppress(OSError):
        for line in diagnose(service.signals()):
            logger.warning("%s", line)
