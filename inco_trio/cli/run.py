"""`inco-trio run`: its options. What it does is in `daemon`."""

from __future__ import annotations

import argparse

from inco_trio.cli import process_signals
from inco_trio.cli.options import BOARDS_HELP, CONTROL_HELP, LINK_HELP, configuration_argument
from inco_trio.cli.parser import EXIT_CODES
from inco_trio.service.lines import STANDARD_ERROR, STANDARD_OUTPUT

__all__ = ["arguments", "run"]


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    sub.usage = "%(prog)s [OPTION ...] [LINK] [--config FILE | --irq-dir DIR | --boards DIR]"
    sub.epilog = (
        "example: inco-trio run rpmsg4000 --irq-dir /dev/shm/irq -v\n"
        f"SIGHUP reloads the configuration, SIGUSR1 logs the counters.\n{EXIT_CODES}"
    )
    sub.add_argument("iface", nargs="?", metavar="LINK", help=LINK_HELP)
    configuration_argument(sub)
    sub.add_argument("--irq-dir", metavar="DIR", help="the built-in signals in DIR, without a file")
    sub.add_argument("--boards", metavar="DIR", help=BOARDS_HELP)
    sub.add_argument("--wait-link", action="store_true", help="wait for a link that does not exist yet")
    sub.add_argument("--notification-fd", type=int, metavar="N", help="write a newline to descriptor N once ready (s6)")
    sub.add_argument("--fd-holder", metavar="SOCKET", help="keep descriptors in the s6-fdholder-daemon at SOCKET")
    sub.add_argument("--control", metavar="PATH|none", help=CONTROL_HELP)
    sub.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")
    sub.add_argument("-v", "--verbose", action="store_true", help="log each notification")


def run(args: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop; returns its exit code. Raises IncoError."""
    process_signals.hold()
    try:
        # Imported only now: it takes most of the time of a start, in which the process may be told to stop.
        from inco_trio.cli.daemon import run_daemon
        from inco_trio.service.log import set_up_logging

        # The program that came before logged each notification, on standard output.
        where = STANDARD_OUTPUT if args.drop_in else STANDARD_ERROR
        set_up_logging(args.log_format, verbose=args.verbose or args.drop_in, fd=where)
        return run_daemon(args)
    finally:
        process_signals.ignore()
