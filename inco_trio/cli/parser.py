"""The arguments of the commands, their exit codes, and what an error looks like.

A command's module has `arguments`, which adds its options to its parser, and `run`, which returns the exit code. Only
the module of the command that was given is imported: the start of the daemon is an outage. The man pages and the
completions are made of the same: docs/manual/page.py says what an epilog looks like, docs/manual/completion.py which
metavar is completed, and `nox -s generated` writes them again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inco_trio.cli import streams
from inco_trio.cli.exit_codes import EXIT_INTERNAL, exit_code
from inco_trio.errors import IncoError, ResourceError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["COMMANDS", "EXIT_CODES", "EXIT_INTERNAL", "drop_in_parser", "parser", "run_command", "run_drop_in"]

COMMANDS = {
    "run": "carry signals until SIGTERM or SIGINT",
    "check": "validate the configuration and print the signal table",
    "doctor": "find what keeps notifications from coming",
    "status": "tell how a running proxy is, and what it has carried",
    "monitor": "show each notification as it happens",
    "record": "write each notification with its frame to a file",
    "send": "send a signal, by the proxy or as one of the cores",
    "wait": "wait for a notification, for shell tests",
    "demo": "show two simulated cores signalling each other; needs no root",
    "replay": "play one side of a recording, and say what came back",
    "plot": "draw a recording: timelines, rates, gaps, answers, faults",
    "dissector": "print or install what names signals in Wireshark and tshark",
    "mqtt": "publish what the proxies of this host carry to an MQTT broker",
    "mqtt-link": "carry a `unix:` link to another host, over an MQTT broker",
    "exporter": "export the metrics of all boards of this host to Prometheus",
    "s6": "write an s6 scan directory for the proxy, or a systemd unit",
}
"""What `--help` says of each command; its module has the same name, with `_` for `-`."""

EXIT_CODES = """\
exit codes: 0 clean, 1 something was lost or did not come back, or `doctor` found a fault, 2 usage,
3 `doctor` warns, 65 not a recording, 69 a program or device is not there (as the link), 70 internal error,
71 no room now (descriptors, inotify limits, memory, disk), 77 no permission, 78 invalid configuration"""


def run_command(words: Sequence[str]) -> int:
    """Run `inco-trio` with the arguments `words`; returns the exit code. Raises SystemExit as argparse does."""

    def run() -> int:
        return _run(_parsed(parser(words[0] if words else None), words))

    return _ending(run)


def run_drop_in(words: Sequence[str]) -> int:
    """Run `inco_proxy` with the arguments `words`, and with the log that its users know; else as `run_command`."""

    def run() -> int:
        iface = _parsed(drop_in_parser(), words).iface
        # `--`: an interface's name may begin with a dash.
        return _run(parser("run").parse_args(["run", "--", iface]), drop_in=True)

    return _ending(run)


def _ending(run: Callable[[], int]) -> int:
    """What `run` returns, or the exit code of the error that it raises, which is shown."""
    streams.open_missing()
    try:
        return run()
    except BrokenPipeError:
        return 0  # Who read the output has seen enough of it.
    except (IncoError, MemoryError) as raised:
        error = raised if isinstance(raised, IncoError) else ResourceError("out of memory")
        streams.complain(error)
        return exit_code(error)
    except Exception:  # noqa: BLE001 - shown whole; the exit code tells what it is
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return EXIT_INTERNAL
    finally:
        streams.settle()


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(words)
    except SystemExit:
        streams.flush()  # what --help has printed
        raise


def _run(args: argparse.Namespace, *, drop_in: bool = False) -> int:
    args.drop_in = drop_in
    code: int = args.run(args)
    streams.flush()
    return code


class _Parser(argparse.ArgumentParser):
    """One that does not keep it to itself if its help cannot be written."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message and file is not None and file is sys.stdout:
            with streams.writing():
                file.write(message)
        else:
            super()._print_message(message, file)


class _Version(argparse.Action):
    """Prints the version, which takes a while to find out."""

    def __call__(self, asking: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        streams.say(f"inco-trio {version('inco-trio')}")
        asking.exit()


def drop_in_parser() -> _Parser:
    """The parser of `inco_proxy`."""
    made = _Parser(
        prog="inco_proxy",
        description="Carry inter-core interrupts between the link IFACE and the registers that $UDRV_JSON_PATH names.",
        epilog=(
            "The same as `inco-trio run IFACE`, but for its log, on standard output.\n"
            "example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    return made


def parser(command: str | None = None) -> _Parser:
    """The parser, with the options of `command` only; with those of all commands if it is not the name of one."""
    made = _Parser(
        prog="inco-trio",
        description="Carries inter-core interrupts between the cores of an AMP board, and of its simulation.",
        epilog=f"Try it: inco-trio demo\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command == name or command not in COMMANDS:
            module = importlib.import_module(f"inco_trio.cli.{name.replace('-', '_')}")
            module.arguments(sub)
            sub.set_defaults(run=module.run)
    return made
