"""`inco-trio help`: print the help for all commands or for one command, or explain the exit codes."""

from __future__ import annotations

import argparse

from inco_trio.cli.parser import COMMANDS, EXIT_CODES, TOPICS, parser
from inco_trio.cli.streams import say, say_text


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = "example: inco-trio help send"
    sub.add_argument("topic", nargs="?", metavar="TOPIC", choices=(*COMMANDS, *TOPICS), help="a command, or exit-codes")


def run(args: argparse.Namespace) -> int:
    """Print the help; return the exit code."""
    if args.topic in TOPICS:
        say(*(f"{code:3}  {meaning}" for code, meaning in EXIT_CODES.items()))
        return 0
    made = parser(args.topic or "help")
    (commands,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
    shown = made if args.topic is None else commands.choices[args.topic]
    say_text(shown.format_help().rstrip("\n"))
    return 0
