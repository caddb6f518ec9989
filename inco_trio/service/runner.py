"""What the services around the proxy share: readiness, a log, a clean end at SIGTERM, and SIGHUP."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Awaitable, Callable

import trio

from inco_trio.cli import process_signals
from inco_trio.cli.parser import EXIT_INTERNAL
from inco_trio.errors import IncoError
from inco_trio.service.lines import STANDARD_ERROR
from inco_trio.service.log import set_up_logging
from inco_trio.service.notify import check_notification_fd, notify_ready, notify_stopping

__all__ = ["Work", "serve"]

logger = logging.getLogger(__name__)

Work = Callable[[Callable[[], None]], Awaitable[None]]
"""What a service does until it is cancelled; it calls its argument once it is ready."""


def serve(
    args: argparse.Namespace,
    prepare: Callable[[], Work],
    *,
    tell: Callable[[], None] = lambda: None,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Do what `prepare` returns until SIGTERM or SIGINT; at SIGHUP, what it returns then. Raises IncoError.

    SIGUSR1 calls `tell`; `finish` is called at the end, inside Trio.
    """
    if args.notification_fd is not None:
        check_notification_fd(args.notification_fd)
    set_up_logging(args.log_format, verbose=args.verbose, fd=STANDARD_ERROR)
    work = prepare()
    try:
        trio.run(_Service(args.notification_fd, prepare, tell, finish).run, work)
    except IncoError:
        raise
    except Exception:  # logged whole; the exit code tells the supervisor
        logger.exception("internal error: this is a fault of inco-trio, please report it")
        return EXIT_INTERNAL
    finally:
        process_signals.ignore()
    return 0


class _Service:
    def __init__(
        self,
        notification_fd: int | None,
        prepare: Callable[[], Work],
        tell: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self._notification_fd = notification_fd
        self._prepare = prepare
        self._tell = tell
        self._finish = finish
        self._following: Work | None = None
        self._scope = trio.CancelScope()
        self._is_ready = False

    async def run(self, work: Work) -> None:
        """Do one piece of work after the other."""
        failure: IncoError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow_signals)
            self._following = work
            while self._following is not None and failure is None:
                work, self._following = self._following, None
                with trio.CancelScope() as self._scope:
                    try:
                        await work(self._ready)
                    except IncoError as error:
                        failure = error
            nursery.cancel_scope.cancel()
        notify_stopping()
        self._finish()
        if failure is not None:
            raise failure

    def _ready(self) -> None:
        if not self._is_ready:
            self._is_ready = True
            notify_ready(self._notification_fd)
            logger.info("ready", extra={"event": "ready"})

    async def _follow_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        arrived, token = trio.Event(), trio.lowlevel.current_trio_token()

        def tell() -> None:
            arrived.set()

        with process_signals.listening(lambda: token.run_sync_soon(tell, idempotent=True)):
            task_status.started()
            while True:
                for number in process_signals.take():
                    self._obey(number)
                await arrived.wait()
                arrived = trio.Event()

    def _obey(self, number: int) -> None:
        if number in process_signals.STOPS:
            self._following = None
            self._scope.cancel()
        elif number == signal.SIGUSR1:
            self._tell()
        elif number == signal.SIGHUP:
            try:
                self._following = self._prepare()
            except IncoError as error:
                for line in str(error).splitlines():
                    logger.error("reload refused, the old configuration goes on: %s", line)  # noqa: TRY400
            else:
                logger.info("reloaded", extra={"event": "reloaded"})
                self._scope.cancel()
