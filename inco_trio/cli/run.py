"""`inco-trio run`: run the daemon, which `service.daemon` implements."""

from __future__ import annotations

import argparse
import functools
import logging
from typing import TYPE_CHECKING

from inco_trio.cli import options
from inco_trio.cli.exit_codes import UsageError
from inco_trio.linux.users import find_owner
from inco_trio.service import process_signals
from inco_trio.service.lines import STANDARD_ERROR, STANDARD_OUTPUT
from inco_trio.signals import builtin_signals

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from inco_trio.config import Config
    from inco_trio.service.daemon import Boards, Daemon

logger = logging.getLogger(__name__)

SANDBOX = ("off", "on", "log", "none")
SANDBOX_HELP = "off (default), on, log or none (all capabilities)"


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "%(prog)s [OPTION ...] [LINK] [--config FILE | --irq-dir DIR | --boards DIR]"
    sub.description = f"{sub.description} SIGHUP reloads the configuration, SIGUSR1 logs the counters."
    sub.epilog = "example: inco-trio run rpmsg4000 --irq-dir /run/irq -v"
    sub.add_argument("iface", nargs="?", metavar="LINK", help=options.LINK_HELP)
    options.configuration_argument(sub)
    sub.add_argument("--irq-dir", metavar="DIR", help="use the built-in signals, with their registers in DIR")
    sub.add_argument("--boards", metavar="DIR", help=options.BOARDS_HELP)
    options.irq_owner_argument(sub)
    sub.add_argument("--wait-link", action="store_true", help="wait for a link that does not exist yet")
    sub.add_argument("--fd-holder", metavar="SOCKET", help="keep descriptors in the s6-fdholder-daemon at SOCKET")
    sub.add_argument("--control", metavar="PATH|none", help=options.CONTROL_HELP)
    sub.add_argument(
        "--history", type=options.history_size, metavar="N",
        help="number of notifications to keep per board (default: 4096; 0 keeps none)",
    )  # fmt: skip
    sub.add_argument("--sandbox", metavar="MODE", choices=SANDBOX, default=SANDBOX[0], help=SANDBOX_HELP)
    sub.add_argument("--lock-memory", action="store_true", help="lock all memory in RAM (needs ulimit -l unlimited)")
    options.add_service_options(sub, verbose="log each notification")


def run(args: argparse.Namespace) -> int:
    """Run the daemon until a stop signal arrives; return the exit code. Raises IncoError."""
    with process_signals.held():
        # A stop signal may arrive during this import, which takes up most of the startup time.
        from inco_trio.service.runner import run_service

        # `inco_proxy` replaces a program that logged each notification on standard output.
        verbose, log_fd = args.verbose or args.drop_in, STANDARD_OUTPUT if args.drop_in else STANDARD_ERROR
        make = functools.partial(_daemon, args)
        return run_service(make, args.notification_fd, args.log_format, verbose, log_fd, args.log_timestamps)


def _daemon(args: argparse.Namespace) -> Daemon:
    """Return the daemon that the arguments describe. Raises IncoError."""
    from inco_trio.persist.fdstore import fd_store_from_environment
    from inco_trio.service import privileges
    from inco_trio.service.daemon import Daemon, OneBoard

    if args.lock_memory:
        privileges.keep_in_memory()
    if args.fd_holder is not None:
        options.path_of(args.fd_holder, "--fd-holder")
    if args.control not in (None, "none"):
        args.control = str(options.absolute(args.control, "--control"))
    boards: Boards
    if args.boards is not None:
        from inco_trio.service.many_boards import ManyBoards

        directory = options.boards_directory(args, "IFACE", "--config", "--irq-dir", "--irq-owner", "--wait-link")
        boards, label = ManyBoards(directory, args.history), options.boards_label(directory)
    else:
        args.iface = options.LINK if args.iface is None else args.iface
        options.check_link(args.iface)
        if args.irq_dir is not None:
            args.irq_dir = options.absolute(args.irq_dir, "--irq-dir")
        boards = OneBoard(functools.partial(_load, args))
        label = boards.label
    fd_store = fd_store_from_environment(args.fd_holder, label)
    if args.wait_link and args.sandbox != "none":
        # Drop capabilities before the wait, which may be long. Keep those that are needed to open the link.
        opening = privileges.needed_capabilities(boards.configs(), grows=True, locked=args.lock_memory)
        privileges.drop_capabilities(opening)
    if args.sandbox == "none":
        return Daemon(boards, label, args.control, fd_store)

    def restrict(configs: Collection[Config], control_path: Path | None) -> None:
        grows = args.boards is not None
        needed = privileges.needed_capabilities(configs, grows=grows, locked=args.lock_memory)
        privileges.drop_capabilities(needed)
        if args.sandbox in ("on", "log"):
            from inco_trio.service.sandbox import enter_sandbox

            has_fd_holder, log = args.fd_holder is not None, args.sandbox == "log"
            enter_sandbox(configs, control=control_path, grows=grows, has_fd_holder=has_fd_holder, log=log)

    return Daemon(boards, label, args.control, fd_store, restrict)


def _load(args: argparse.Namespace) -> Config:
    """Read the configuration of one board, and log the defaults that it uses. Raises IncoError."""
    from inco_trio.config import Board, Config, read_board
    from inco_trio.errors import ConfigError

    if args.irq_dir is not None:
        if args.config is not None:
            raise UsageError("--irq-dir and --config are mutually exclusive")
        board = Board(builtin_signals(args.irq_dir), ())
    else:
        board = read_board(options.config_path(args))
    for note in board.notes:
        logger.info("%s", note)
    try:
        owner, group = (None, None) if args.irq_owner is None else find_owner(args.irq_owner)
    except ValueError as error:  # The user was removed after the daemon had started.
        raise ConfigError("--irq-owner", str(error)) from None
    return Config(args.iface, board.signals, wait_link=args.wait_link, history=args.history, owner=owner, group=group)
