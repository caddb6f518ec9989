"""The runner for all services: the daemon, the gateway, the bridge and the exporter.

It handles the process signals, reports readiness to s6 or systemd, sets up the log, and returns the exit code. SIGTERM
and SIGINT stop the service, SIGHUP reloads its configuration, and SIGUSR1 logs its counters.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

import trio

from inco_trio.errors import IncoError, ResourceError, unwrapped
from inco_trio.notify import check_notification_fd, notify_ready, notify_reloaded, notify_reloading, notify_stopping
from inco_trio.service import process_signals
from inco_trio.service.lines import STANDARD_ERROR
from inco_trio.service.log import needs_timestamps, set_up_logging
from inco_trio.service.privileges import drop_capabilities

__all__ = ["Restarting", "Runner", "Service", "Work", "run_service"]

logger = logging.getLogger(__name__)

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Service(Protocol):
    """A service that `run_service` can run."""

    name: str
    """The name of the service in the log."""

    async def run(self, runner: Runner) -> None:
        """Run until cancelled. Call `runner.ready` once ready, and run `runner.follow_reloads`. Raises IncoError."""

    async def reload(self) -> Sequence[str]:
        """Reload the configuration; return why parts of it were refused. Raises IncoError if all of it was refused."""

    def log_statistics(self) -> None:
        """Log the counters, if there are any. The runner also calls this method when the service ends."""


def run_service(
    make: Callable[[], Service],
    notification_fd: int | None,
    log_format: str,
    verbose: bool,
    fd: int = STANDARD_ERROR,
    timestamps: str = "auto",
) -> int:
    """Run the service from `make` until a stop signal arrives; return the exit code. Raises IncoError.

    Call this while `process_signals` records the signals.
    """
    if notification_fd is not None:
        check_notification_fd(notification_fd)
    stamped = needs_timestamps(timestamps, fd, is_s6_service=notification_fd is not None)
    write_held = set_up_logging(log_format, verbose=verbose, fd=fd, stamped=stamped)
    service = make()
    # The modules and classes stay until the process ends, so the garbage collector never needs to examine them.
    gc.freeze()
    gc.enable()
    try:
        trio.run(Runner(service, notification_fd, write_held).run)
    except IncoError:
        raise
    except Exception as error:  # Log the traceback, and exit with a code for the supervisor.
        if refused := _exhausted(error):
            raise ResourceError(
                service.name, f"{refused.strerror}: raise the limit, or end other processes that use this resource"
            ) from error
        logger.exception("internal error: this is a bug in inco-trio; please report it")
        return os.EX_SOFTWARE
    return 0


def _exhausted(error: Exception) -> OSError | None:
    """Return the OSError that caused `error` if a system limit was reached. Trio may have raised it."""
    cause = unwrapped(error, only=True)
    return cause if isinstance(cause, OSError) and cause.errno in EXHAUSTED else None


class _Answer:
    """The result of a reload, for a caller of `Runner.reload`."""

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.refused: Sequence[str] = ()


class Runner:
    """The runner of one service, and the argument of `Service.run`."""

    background: trio.Nursery
    """The nursery for tasks that run until the service has ended. A stop signal does not cancel them."""

    def __init__(
        self, service: Service, notification_fd: int | None, write_held: Callable[[], Awaitable[None]]
    ) -> None:
        self._service = service
        self._notification_fd = notification_fd
        self._write_held = write_held
        """Writes held log lines until cancelled."""
        self._is_ready = trio.Event()
        self._stop = trio.CancelScope()
        # One pending reload is enough, because it reads the newest configuration.
        self._hang_up, self._hang_ups = trio.open_memory_channel[None](1)
        self._waiting: list[_Answer] = []

    async def run(self) -> None:
        """Run the service until a stop signal arrives or the service fails."""
        failure: IncoError | None = None
        async with trio.open_nursery() as self.background:
            self.background.start_soon(self._write_held)
            await self.background.start(self._follow_signals)
            try:
                with self._stop:
                    await trio.lowlevel.checkpoint_if_cancelled()  # Do not start after a stop signal.
                    await self._service.run(self)
            except IncoError as error:
                failure = error
            finally:
                self._service.log_statistics()
            self.background.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not self._is_ready.is_set():
            logger.info("%s: stopped before it was ready", self._service.name)

    def ready(self) -> None:
        """Report readiness to the supervisor and the log. Further calls do nothing."""
        if not self._is_ready.is_set():
            self._is_ready.set()
            notify_ready(self._notification_fd)
            logger.info("%s: ready", self._service.name, extra={"event": "ready"})

    async def _follow_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Handle process signals. Call `task_status.started` after earlier signals have been handled."""
        entry, arrivals = trio.open_memory_channel[None](1)
        token = trio.lowlevel.current_trio_token()
        with process_signals.listening(lambda: token.run_sync_soon(_send_once, entry, idempotent=True)):
            self._obey()
            task_status.started()
            async for _ in arrivals:
                self._obey()

    def _obey(self) -> None:
        # Handle all signals without waiting: a stop signal must not wait for a reload.
        for number in process_signals.take():
            if number in process_signals.STOPS:
                if self._is_ready.is_set() and not self._stop.cancel_called:
                    notify_stopping()
                self._stop.cancel()
            elif number == signal.SIGHUP:
                if not self._is_ready.is_set():
                    logger.info("not ready yet: the configuration will be reloaded once the service is ready")
                _send_once(self._hang_up)
            elif not self._is_ready.is_set():
                logger.info("not ready yet: no counters to log")
            else:
                self._service.log_statistics()

    async def follow_reloads(self) -> None:
        """Once the service is ready, reload the configuration on SIGHUP and for `reload` requests, one at a time."""
        await self._is_ready.wait()
        async for _ in self._hang_ups:
            waiting, self._waiting = self._waiting, []
            notify_reloading()
            refused: tuple[str, ...] = ()
            try:
                parts = await self._service.reload()
            except IncoError as error:
                parts = refused = error.problems
                for problem in refused:
                    logger.error("reload refused, keeping the old configuration: %s", problem)  # noqa: TRY400 - an error of the user
            notify_reloaded(refused[0] if refused else None)
            for answer in waiting:
                answer.refused = parts
                answer.ready.set()

    async def reload(self) -> Sequence[str]:
        """Reload the configuration as SIGHUP does, and return what was refused. Do not wait for readiness."""
        if not self._is_ready.is_set():
            return ["not ready yet: reload again once the service is ready"]
        self._waiting.append(answer := _Answer())
        _send_once(self._hang_up)
        await answer.ready.wait()
        return answer.refused


Work = Callable[[Callable[[], None]], Awaitable[None]]
"""A function that runs until cancelled and calls its argument once it is ready."""


class Restarting:
    """A service that restarts its work at each reload. `prepare` reads the configuration and may raise IncoError.

    The constructor drops all capabilities of the process except `kept`, and forbids new privileges.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], Work],
        log_statistics: Callable[[], None] = lambda: None,
        close: Callable[[], None] = lambda: None,
        kept: Collection[int] = (),
    ) -> None:
        drop_capabilities(kept)
        self.name = name
        self.log_statistics = log_statistics
        self._prepare = prepare
        self._close = close
        self._next: Work | None = prepare()
        self._scope = trio.CancelScope()

    async def run(self, runner: Runner) -> None:
        runner.background.start_soon(runner.follow_reloads)
        try:
            while self._next is not None:
                work, self._next = self._next, None
                with trio.CancelScope() as self._scope:
                    await work(runner.ready)
        finally:
            self._close()

    async def reload(self) -> Sequence[str]:
        self._next = self._prepare()
        logger.info("reloaded", extra={"event": "reloaded"})
        self._scope.cancel()
        return ()


def _send_once(channel: trio.MemorySendChannel[None]) -> None:
    """Send a message unless the channel is full."""
    with contextlib.suppress(trio.WouldBlock):
        channel.send_nowait(None)
