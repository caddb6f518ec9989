"""The command line: one module for each command, the exit codes, and what an error looks like.

A command's module has `arguments`, which adds its options to its parser, and `run`, which returns the exit code. Only
the module of the command that was given is imported: the start of the daemon is an outage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from inco_trio.errors import IncoError

__all__ = ["COMMANDS", "inco_proxy", "main", "parser"]

COMMANDS = {
    "run": "carry signals until SIGTERM or SIGINT",
    "check": "validate the configuration and print the signal table",
    "demo": "show two simulated cores signalling each other; needs no root",
    "s6": "write an s6 scan directory that runs the proxy, or print a systemd unit",
}
"""What `--help` says of each command; its module has the same name."""

EXIT_CODES = """\
exit codes: 0 clean, 2 usage, 69 no such interface, 70 internal error, 71 the system
has no room now (descriptors, inotify limits, disk), 77 no permission, 78 invalid configuration"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `inco-trio`; returns its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = parser(words[0] if words else None).parse_args(words)
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        # Nobody reads the output any more; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except IncoError as error:
        for line in str(error).splitlines():
            print(f"inco-trio: error: {line}", file=sys.stderr)  # noqa: T201 - before and beside the log
        return error.exit_code
    return code


def inco_proxy(arguments: Sequence[str] | None = None) -> int:
    """The command `inco_proxy`, as the start scripts of the program that came before call it."""
    drop_in = argparse.ArgumentParser(
        prog="inco_proxy",
        description="Carry inter-core interrupts between the link IFACE and the registers that $UDRV_JSON_PATH names.",
        epilog="The same as `inco-trio run IFACE`.  Example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000",
    )
    drop_in.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    return main(["run", drop_in.parse_args(arguments).iface])


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of `command` only; with None, those of all commands."""
    made = argparse.ArgumentParser(
        prog="inco-trio",
        description="Carries inter-core interrupts between the cores of an AMP board, and of its simulation.",
        epilog=f"Try it: inco-trio demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command in (None, name):
            module = importlib.import_module(f"inco_trio.commands.{name}")
            module.arguments(sub)
            sub.set_defaults(run=module.run)
    return made
