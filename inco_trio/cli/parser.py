"""The argument parsers of all commands, the exit codes, and the output of errors.

The module of a command defines `arguments`, which adds the command's options to a parser, and `run`, which returns the
exit code. The daemon starts quickly because only the given command's module is imported. `nox -s generated` generates
the man pages and the shell completions from these parsers.
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

COMMANDS = {
    "run": "run the proxy until SIGTERM or SIGINT",
    "check": "validate the configuration and print the signal table",
    "doctor": "diagnose missing notifications",
    "status": "show the state and the counters of a running proxy",
    "monitor": "show each notification as it happens",
    "history": "show the last notifications and events, also from before a crash",
    "record": "write each notification with its frame to a file",
    "send": "send a signal through the proxy or as one of the cores",
    "wait": "wait for a notification, for shell tests",
    "demo": "demonstrate two simulated cores that signal each other; needs no root",
    "replay": "play one side of a recording, and report what came back",
    "plot": "plot a recording: timelines, rates, gaps, answer times, faults",
    "dissector": "print or install the dissector for Wireshark and tshark",
    "mqtt": "publish the notifications of this host's proxies to an MQTT broker",
    "mqtt-link": "bridge a `unix:` link to another host over an MQTT broker",
    "exporter": "export the metrics of all boards of this host to Prometheus",
    "s6": "write an s6 scan directory, or print a systemd unit",
}
"""The help text of each command. The module of a command has the same name, with `_` instead of `-`."""

EXIT_CODES = """\
exit codes: 0 success, 1 notifications are missing or `doctor` found a fault, 2 usage, 3 `doctor` warns,
65 not a recording, 69 missing program or device (such as the link), 70 internal error,
71 out of resources (descriptors, inotify limits, memory, disk), 77 no permission, 78 invalid configuration"""


def run_command(words: Sequence[str]) -> int:
    """Run `inco-trio` with the arguments `words`; return the exit code. Raises SystemExit like argparse."""
    return _ending(lambda: _run(_parsed(parser(words[0] if words else None), words)))


def run_drop_in(words: Sequence[str]) -> int:
    """Run `inco_proxy` with the arguments `words`. It logs like the program that it replaces."""

    def run() -> int:
        iface = _parsed(drop_in_parser(), words).iface
        # Insert `--`, because the name of an interface may start with a dash.
        return _run(parser("run").parse_args(["run", "--", iface]), drop_in=True)

    return _ending(run)


def _ending(run: Callable[[], int]) -> int:
    """Return the result of `run`, or print its error and return the exit code of the error."""
    streams.open_missing()
    try:
        return run()
    except BrokenPipeError:
        return 0  # The reader has closed the pipe, as `head` does.
    except (IncoError, MemoryError) as raised:
        error = raised if isinstance(raised, IncoError) else ResourceError("out of memory")
        streams.complain(error)
        return exit_code(error)
    except Exception:  # noqa: BLE001 - printed with its traceback
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return EXIT_INTERNAL
    finally:
        streams.settle()


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(words)
    except SystemExit:
        streams.flush()  # Write the buffered output of --help.
        raise


def _run(args: argparse.Namespace, *, drop_in: bool = False) -> int:
    args.drop_in = drop_in
    code: int = args.run(args)
    streams.flush()
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that raises ResourceError if its help text cannot be written."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message and file is not None and file is sys.stdout:
            with streams.writing():
                file.write(message)
        else:
            super()._print_message(message, file)


class _Version(argparse.Action):
    """The option that prints the version. It imports importlib.metadata itself, because that import is slow."""

    def __call__(self, asking: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        streams.say(f"inco-trio {version('inco-trio')}")
        asking.exit()


def drop_in_parser() -> _Parser:
    """Return the parser of `inco_proxy`."""
    made = _Parser(
        prog="inco_proxy",
        description="Transfer inter-core interrupts between the link IFACE and the registers in $UDRV_JSON_PATH.",
        epilog=(
            "Like `inco-trio run IFACE`, but logs to standard output.\n"
            "example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    return made


def parser(command: str | None = None) -> _Parser:
    """Return the parser with the options of `command`, or with those of all commands if `command` is unknown."""
    made = _Parser(
        prog="inco-trio",
        description="Transfer inter-core interrupts between the cores of an AMP board or its simulation.",
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
