"""Completion for bash, zsh and fish, by shtab.

The parser knows what an option is called, and its metavar says what is completed after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

from inco_trio.signals import builtin_signals

__all__ = ["complete"]

# A function of the shell for each kind of word; those of zsh and fish are their own. The interfaces are looked up at
# each completion: a link may come and go.
LINKS = {"bash": "_inco_trio_links", "zsh": "_net_interfaces", "fish": "(__fish_print_interfaces)"}
USERS = {"bash": "_inco_trio_users", "zsh": "_users", "fish": "(__fish_complete_users)"}
PROGRAMS = {"bash": "_inco_trio_programs", "zsh": "_command_names -e", "fish": "(__fish_complete_command)"}
# `--as core1 LINK` takes two words. Bash asks the same for each; for fish, shtab knows of the first one only.
CORE1 = {
    "bash": "_inco_trio_core1",
    "zsh": f"(core1):LINK:{LINKS['zsh']}",
    "fish": "core1",
}
FISH = f"""\
complete -c inco-trio -n 'string match -q core1 -- (commandline -opc)[-1]' -xka "{LINKS["fish"]}"
"""
BASH = """\
_inco_trio_links() {
  compgen -W "$(ls /sys/class/net)" -- "$1"
}
_inco_trio_core1() {
  compgen -W "core1 $(ls /sys/class/net)" -- "$1"
}
_inco_trio_users() {
  compgen -u -- "$1"
}
_inco_trio_programs() {
  compgen -c -- "$1"
}"""

COMPLETE = {
    "COMMAND": PROGRAMS,
    "DIR": shtab.DIRECTORY,
    "FILE": shtab.FILE,
    "LINK": LINKS,
    "PATH": shtab.FILE,
    "PATH|none": shtab.FILE,
    "SCANDIR": shtab.DIRECTORY,
    "SOCKET": shtab.FILE,
    "USER": USERS,
}
"""By metavar; a word with another one is not completed."""
SIGNALS = sorted(signal.name for signal in builtin_signals(Path("/")))
"""A configuration may have more, which only the proxy knows."""


def complete(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Text by file name. Changes the parser."""
    for action in _actions(parser):
        if action.metavar == ("core1", "LINK"):
            action.metavar = "core1"
            action.complete = CORE1  # type: ignore[attr-defined] # where shtab looks
        elif action.dest == "signal":
            action.choices = SIGNALS
        elif (metavar := action.metavar or action.dest.upper()) in COMPLETE and action.nargs != argparse.PARSER:
            action.complete = COMPLETE[str(metavar)]  # type: ignore[attr-defined]
    return {
        "inco-trio.bash": _text(shtab.complete(parser, "bash", preamble=BASH)),
        "_inco-trio": _text(shtab.complete(parser, "zsh")),
        "inco-trio.fish": _text(shtab.complete(parser, "fish") + FISH),
    }


def _text(script: str) -> str:
    """Without spaces at the ends of lines, which git complains of."""
    return "\n".join(line.rstrip() for line in script.splitlines()) + "\n"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of the parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
