"""The argument parsers of all commands, the exit codes, and the output of errors.

The module of a command defines `arguments`, which adds the command's options to a parser, and `run`, which returns the
exit code. The daemon starts quickly because only the given command's module is imported. `nox -s generated` generates
the man pages and the shell completions from these parsers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from inco_trio.cli import streams
from inco_trio.cli.exit_codes import EXIT_INTERNAL, exit_code
from inco_trio.errors import IncoError, ResourceError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {
    "run": "run the proxy until SIGTERM or SIGINT",
    "check": "validate the configuration and print the signal table",
    "reload": "reload the configuration of a running proxy",
    "doctor": "diagnose missing notifications",
    "status": "show the state and the counters of a running proxy",
    "monitor": "show each notification as it happens",
    "history": "show the last notifications and events, including those from before a crash",
    "record": "write each notification with its frame to a file",
    "send": "send a signal through the proxy or as one of the cores",
    "wait": "wait for a notification, for shell tests",
    "demo": "demonstrate two simulated cores that signal each other (root is not required)",
    "replay": "play one side of a recording, and report which notifications came back",
    "plot": "plot a recording: timelines, rates, gaps, response times, faults",
    "dissector": "print or install the dissector for Wireshark and tshark",
    "mqtt": "publish the notifications of this host's proxies to an MQTT broker",
    "mqtt-link": "bridge a `unix:` link to another host over an MQTT broker",
    "exporter": "export the metrics of all boards of this host to Prometheus",
    "service": "write an s6 scan directory, or print a systemd unit",
    "s6": "do the same as `service`, with its former options",
    "help": "explain the commands, one command or the exit codes",
}
"""The help text of each command. The module of a command has the same name, with `_` instead of `-`."""

GROUPS = {
    "run": ("run", "check", "reload", "service"),
    "see": ("status", "monitor", "history", "doctor"),
    "drive": ("send", "wait", "replay", "demo"),
    "record": ("record", "plot", "dissector"),
    "connect": ("mqtt", "mqtt-link", "exporter"),
}
"""The commands grouped by purpose, as in the help. The help does not list `s6`, because `service` replaces it."""

EXIT_CODES = {
    0: "success",
    1: "notifications are missing or too late (`send`, `wait`, `replay`, `demo`), or `doctor` found a problem",
    2: "invalid arguments, such as an unknown signal; also if LINK is missing and several proxies run",
    3: "`doctor` found only warnings",
    4: "the command of `wait --after` failed",
    65: "a recording does not exist, is invalid, or contains no usable notifications",
    69: "a required program, device, interface or proxy is missing, or the proxy could not open the board",
    70: "internal error",
    71: "a resource limit is reached: descriptors, inotify limits, memory, disk",
    77: "no permission",
    78: "the configuration cannot be read or is invalid, or a register or directory cannot be used",
    130: "interrupted by Ctrl-C (SIGINT)",
}
"""The meaning of each exit code. `docs/commands.md` contains the same table."""
TOPICS = ("exit-codes",)
"""The topics that `inco-trio help` explains in addition to the commands."""
SITE = "https://github.com/inco-trio/inco-trio/blob/main/docs/index.md"


def run_command(words: Sequence[str]) -> int:
    """Run `inco-trio` with the arguments `words`; return the exit code. Raises SystemExit like argparse."""
    return _ending(lambda: _run(parse(words)))


def run_drop_in(words: Sequence[str]) -> int:
    """Run `inco_proxy` with the arguments `words`. It logs like the program that it replaces."""

    def run() -> int:
        iface = _parsed(drop_in_parser().parse_args, words).iface
        # Insert `--`, because the name of an interface may start with a dash.
        return _run(command_parser("run").parse_args(["--", iface]), drop_in=True)

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


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `inco-trio`. Raises SystemExit like argparse."""
    words = list(words) or ["help"]
    if words[0] not in COMMANDS:
        if not words[0].startswith("-"):
            parser("help").error(f"unknown command {words[0]!r}{_suggestion(words[0], COMMANDS)}")
        return _parsed(parser("help").parse_args, words)
    sub = command_parser(words[0])
    # Allow options between arguments, as in `send SIGNAL --as core1 LINK`. argparse cannot do this if there is a `--`.
    return _parsed(sub.parse_args if "--" in words else sub.parse_intermixed_args, words[1:])


def _parsed(parse: Callable[[Sequence[str]], argparse.Namespace], words: Sequence[str]) -> argparse.Namespace:
    try:
        return parse(words)
    except SystemExit:
        streams.flush()  # Write the output of --help, which raises SystemExit.
        raise


def _suggestion(word: str, known: Iterable[str]) -> str:
    """Return `: did you mean ...?` with the words in `known` that are similar to `word`, or an empty string."""
    import difflib

    found = difflib.get_close_matches(word, list(known))
    return f": did you mean {' or '.join(found)}?" if found else ""


def _run(args: argparse.Namespace, *, drop_in: bool = False) -> int:
    args.drop_in = drop_in
    code: int = args.run(args)
    streams.flush()
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that suggests similar options, and that raises ResourceError if its help text cannot be written."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault(
            "formatter_class", functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=25)
        )
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        _, _, words = message.partition("unrecognized arguments: ")
        option = next((word for word in words.split() if word.startswith("--")), None)
        super().error(message + (_suggestion(option.partition("=")[0], self._option_string_actions) if option else ""))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message and file is not None and file is sys.stdout:
            with streams.writing():
                file.write(message)
        else:
            super()._print_message(message, file)


class _Commands(_Parser):
    """The parser of all commands. The epilog of its help groups the commands by purpose."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        formatter.start_section("options")
        formatter.add_arguments(action for action in self._actions if action.option_strings)
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _Version(argparse.Action):
    """The option that prints the version. Only this option imports importlib.metadata, because that import is slow."""

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
            "The command works like `inco-trio run IFACE`, but logs to standard output.\n"
            "example: UDRV_JSON_PATH=/etc/udrv.json inco_proxy rpmsg4000"
        ),
    )
    made.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    made.add_argument("iface", metavar="IFACE", help="network interface of the inter-core link")
    return made


def parser(command: str | None = None) -> _Parser:
    """Return the parser with the options of `command`, or with those of all commands if `command` is unknown."""
    made = _Commands(
        prog="inco-trio",
        usage="%(prog)s [OPTION ...] COMMAND ...",
        description="Transfer inter-core interrupts between the cores of an AMP board or its simulation.",
        epilog=f"{_grouped()}\n\nTry it: inco-trio demo\nDocumentation: {SITE}",
    )
    made.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version and exit")
    commands = made.add_subparsers(prog="inco-trio", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=_description(name))
        if command == name or command not in COMMANDS:
            _add_options(sub, name)
    return made


def command_parser(name: str) -> _Parser:
    """Return the parser of one command. `parser(name)` would also create the parsers of all other commands."""
    made = _Parser(prog=f"inco-trio {name}", description=_description(name))
    _add_options(made, name)
    return made


def _description(name: str) -> str:
    summary = COMMANDS[name]
    return summary[0].upper() + summary[1:] + "."


def _add_options(sub: argparse.ArgumentParser, name: str) -> None:
    module = importlib.import_module(f"inco_trio.cli.{name.replace('-', '_')}")
    module.arguments(sub)
    sub.set_defaults(run=module.run)


def _grouped() -> str:
    lines = []
    for purpose, names in GROUPS.items():
        lines += [f"{purpose}:", *(f"  {name:10} {COMMANDS[name]}" for name in names)]
    lines += ["", "`inco-trio help COMMAND` explains a command. `inco-trio help exit-codes` lists the exit codes."]
    return "\n".join(lines)
