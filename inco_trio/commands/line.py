"""The arguments of the commands, their exit codes, and what an error looks like.

A command's module has `arguments`, which adds its options to its parser, and `run`, which returns the exit code. Only
the module of the command that was given is imported: the start of the daemon is an outage.
"""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections.abc import Sequence

from inco_trio.commands import streams
from inco_trio.errors import IncoError, ResourceRefused

__all__ = ["COMMANDS", "EXIT_CODES", "EXIT_INTERNAL", "parser", "run_command", "run_drop_in"]

COMMANDS = {
    "run": "carry signals until SIGTERM or SIGINT",
    "check": "validate the configuration and print the signal table",
    "demo": "show two simulated cores signalling each other; needs no root",
    "s6": "write an s6 scan directory that runs the proxy, or print a systemd unit",
}
"""What `--help` says of each command; its module has the same name."""

EXIT_CODES = """\
exit codes: 0 clean, 2 usage, 69 a program or device that is needed is not there (as the
interface), 70 internal error, 71 the system has no room now (descriptors, inotify limits, memory,
disk), 77 no permission, 78 invalid configuration, 1 nobody reads the output any more"""
EXIT_INTERNAL = 70


def run_command(words: Sequence[str], *, drop_in: bool = False) -> int:
    """Run `inco-trio` with the arguments `words`; returns the exit code. Raises SystemExit as argparse does.

    With `drop_in`, the log is what the users of `inco_proxy` know.
    """
    streams.open_missing()
    try:
        return _run(words, drop_in=drop_in)
    except BrokenPipeError:
        return 1  # Nobody reads the output any more.
    except IncoError as error:
        streams.complain(error)
        return error.exit_code
    except MemoryError:
        streams.complain(ResourceRefused("out of memory"))
        return ResourceRefused.exit_code
    except Exception:  # noqa: BLE001 - shown whole; the exit code tells what it is
        traceback.print_exc()
        return EXIT_INTERNAL
    finally:
        streams.settle()


def _run(words: Sequence[str], *, drop_in: bool) -> int:
    try:
        args = parser(words[0] if words else None).parse_args(words)
    except SystemExit:
        streams.flush()  # what --help has printed
        raise
    args.drop_in = drop_in
    code: int = args.run(args)
    streams.flush()
    return code


def run_drop_in(words: Sequence[str]) -> int:
    """Run `inco_proxy` with the arguments `words`; returns the exit code. Raises SystemExit as argparse does."""
    streams.open_missing()
    drop_in = argparse.ArgumentParser(
        prog="inco_proxy",
        description="Carry inter-core interrupts between the link IFACE and the registers that $UDRV_JSON_PATH names.",
        epilog="The same as `inco-trio run IFACE`.  Example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000",
    )
    drop_in.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    # `--`: an interface's name may begin with a dash.
    return run_command(["run", "--", drop_in.parse_args(words).iface], drop_in=True)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of `command` only; with those of all commands if it is not the name of one."""
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
        if command == name or command not in COMMANDS:
            module = importlib.import_module(f"inco_trio.commands.{name}")
            module.arguments(sub)
            sub.set_defaults(run=module.run)
    return made
