"""`inco-trio run`: the daemon. Signals of the process and exit codes around `open_proxy`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from inco_trio.commands import EXIT_CODES
from inco_trio.commands.configuration import config_path, configuration_argument
from inco_trio.config import Board, Config, read_board
from inco_trio.errors import ConfigError, IncoError, ResourceRefused, UsageError
from inco_trio.keep.fdstore import FdStore, fd_store_from_environment
from inco_trio.proxy import Proxy, open_proxy
from inco_trio.registers.diagnose import diagnose
from inco_trio.service.log import log_statistics, set_up_logging
from inco_trio.service.notify import check_notification_fd, notify_ready, notify_stopping
from inco_trio.signals import builtin_signals

__all__ = ["LINK", "arguments", "run"]

logger = logging.getLogger(__name__)

LINK = "rpmsg4000"
EXIT_INTERNAL = 70
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    sub.epilog = (
        "example: inco-trio run rpmsg4000 --irq-dir /dev/shm/irq -v\n"
        f"SIGHUP reloads the configuration, SIGUSR1 logs the counters.\n{EXIT_CODES}"
    )
    sub.add_argument("iface", nargs="?", default=LINK, metavar="IFACE", help=f"interface of the link (default: {LINK})")
    configuration_argument(sub)
    sub.add_argument("--irq-dir", type=Path, metavar="DIR", help="the built-in signals in DIR, without a file")
    sub.add_argument("--wait-link", action="store_true", help="wait for an interface that does not exist yet")
    sub.add_argument("--notification-fd", type=int, metavar="N", help="write a newline to descriptor N once ready (s6)")
    sub.add_argument("--fd-holder", metavar="SOCKET", help="keep descriptors in the s6-fdholder-daemon at SOCKET")
    sub.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    sub.add_argument("-v", "--verbose", action="store_true", help="log each notification")


def _load(args: argparse.Namespace) -> Config:
    """The configuration that the arguments name; its defaults are logged. Raises ConfigError or UsageError."""
    board: Board
    if args.irq_dir is not None:
        if args.config is not None:
            raise UsageError("--irq-dir and --config exclude each other")
        board = Board(builtin_signals(args.irq_dir.absolute()), ())
    else:
        board = read_board(config_path(args))
    for note in board.notes:
        logger.info("%s", note)
    return Config(args.iface, board.signals, wait_link=args.wait_link)


def run(args: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop; returns its exit code. Raises IncoError."""
    # Until their meaning is known they must not end the process.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    set_up_logging(args.log_format, verbose=args.verbose)
    if args.notification_fd is not None:
        check_notification_fd(args.notification_fd)
    config = _load(args)

    try:
        trio.run(_serve, args, config, fd_store_from_environment(args.fd_holder, config.interface))
    except IncoError:
        raise
    except Exception as error:  # logged whole; the exit code tells the supervisor
        if refused := _exhausted(error):
            raise ResourceRefused(f"{config.interface}: {refused.strerror}: raise the limit, or free some") from error
        logger.exception("internal error: this is a fault of inco-trio, please report it")
        return EXIT_INTERNAL
    return 0


def _exhausted(error: Exception) -> OSError | None:
    """The cause, if `error` is, or only wraps, a limit of the system, which Trio meets too."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, OSError) and error.errno in EXHAUSTED else None


async def _serve(args: argparse.Namespace, config: Config, fd_store: FdStore) -> None:

    failure: IncoError | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            running: list[Proxy] = []
            nursery.start_soon(_follow_signals, signals, args, running, nursery.cancel_scope)
            try:
                async with open_proxy(config, fd_store=fd_store) as proxy:
                    running.append(proxy)
                    notify_ready(args.notification_fd)
                    logger.info("%s: ready", config.interface, extra={"event": "ready"})
                    # A thread of its own, as one of Trio's would wake up once more to end.
                    threading.Thread(target=_diagnose, args=(config,), daemon=True).start()
                    with contextlib.ExitStack() as stopping:
                        stopping.callback(notify_stopping)
                        await trio.sleep_forever()
            except IncoError as error:
                failure = error
                nursery.cancel_scope.cancel()
            finally:
                for proxy in running:
                    log_statistics(proxy.stats.as_dict())
    if failure is not None:
        raise failure


def _diagnose(config: Config) -> None:
    """Say what may keep notifications from coming; after readiness, as it reads all of /proc."""
    # What cannot be looked at, as no descriptor is left to look with or as it is gone, is no reason to complain.
    with contextlib.suppress(OSError):
        for line in diagnose(config.signals):
            logger.warning("%s", line)


async def _follow_signals(
    signals: AsyncIterator[int], args: argparse.Namespace, running: list[Proxy], scope: trio.CancelScope
) -> None:

    async for number in signals:
        if number in (signal.SIGTERM, signal.SIGINT):
            scope.cancel()
        for proxy in running:
            if number == signal.SIGUSR1:
                log_statistics(proxy.stats.as_dict())
            elif number == signal.SIGHUP:
                try:
                    await proxy.reload(_load(args))
                except ConfigError as error:
                    for problem in error.problems:
                        logger.error("reload refused, the old configuration goes on: %s", problem)  # noqa: TRY400 - no fault of ours
                else:
                    logger.info("reloaded: %d signals", len(proxy.config.signals), extra={"event": "reloaded"})
