"""Man pages in roff, see man-pages(7) and groff_man(7).

Written here and not by argparse-manpage, which gives what argparse has wrapped for a terminal, with a date, and joins
the lines of the epilogs, where the exit codes and the examples are.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence

from inco_trio.cli.parser import COMMANDS, EXIT_CODES

__all__ = ["command_pages", "drop_in_page"]

ESCAPES = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"})
EXAMPLE = re.compile(r"(?:examples?|try it):\s*", re.IGNORECASE)
CODES = "exit codes:"
OF_A_COMMAND = {1, 3, 65}
"""Exit codes that mean something of their own in some commands, which say so, and do not come from the others."""


def command_pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The page of `inco-trio` and one for each command: text by file name."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    pages = {"inco-trio.1": _page(parser, parser.description or "", ["inco_proxy"])}
    for command, sub in commands.choices.items():
        pages[f"{_name(command)}.1"] = _page(sub, COMMANDS[command], ["inco-trio", *_related(command, sub)])
    return pages


def drop_in_page(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The page of `inco_proxy`: text by file name."""
    summary = "carry inter-core interrupts, as the old program of that name"
    return {"inco_proxy.1": _page(parser, summary, ["inco-trio", "inco-trio-run"])}


def _name(command: str) -> str:
    return f"inco-trio-{command}"


def _related(command: str, sub: argparse.ArgumentParser) -> list[str]:
    """The pages of the commands that the help of this one names."""
    text = " ".join(filter(None, (sub.description, sub.epilog, *(action.help for action in sub._actions))))
    named = set(re.findall(r"inco-trio ([a-z][a-z0-9]*)", text))
    return [_name(other) for other in COMMANDS if other in named and other != command]


def _page(parser: argparse.ArgumentParser, summary: str, see_also: Sequence[str]) -> str:
    title = parser.prog.replace(" ", "-")
    notes = _Notes(parser.epilog or "")
    words = _Words(parser)
    summary = summary[0].lower() + summary[1:].rstrip(".")
    lines = [
        # No date and no version: the page is what the parser says.
        f'.TH "{_escaped(title.upper())}" 1 "" "inco\\-trio" "Manual of inco\\-trio"',
        *(".SH NAME", f"{_escaped(title)} \\- {_escaped(summary)}"),
        *(".SH SYNOPSIS", words.usage(parser)),
        *(".SH DESCRIPTION", *words.paragraph(parser.description or "")),
    ]
    for paragraph in notes.paragraphs:
        lines += [".PP", *words.paragraph(paragraph)]
    codes = _codes(EXIT_CODES)
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        lines.append(".SH COMMANDS")
        for command, what in COMMANDS.items():
            lines += [".TP", f".BR {_escaped(_name(command))} (1)", *words.paragraph(what)]
    else:
        own = {} if EXIT_CODES in (parser.epilog or "") else _codes(notes.codes)
        codes = {code: what for code, what in codes.items() if code not in OF_A_COMMAND} | own
    lines.append(".SH OPTIONS")
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if action.help not in (None, argparse.SUPPRESS) and not isinstance(action, argparse._SubParsersAction):
            lines += [".TP", words.head(action), *words.paragraph(_help(parser, action))]
    lines.append(".SH EXIT STATUS")
    for code, what in sorted(codes.items()):
        lines += [".TP", f".B {code}", *words.paragraph(what)]
    if notes.examples:
        lines += [".SH EXAMPLES", ".EX", *(_line(_escaped(example)) for example in notes.examples), ".EE"]
    lines += [".SH SEE ALSO", *(f".BR {_escaped(page)} (1)," for page in see_also)]
    return "\n".join(lines).removesuffix(",") + "\n"


class _Notes:
    """What an epilog says: paragraphs; `exit codes: 0 ..., 1 ...`; `example: ...`, or `examples:` and indented lines.

    A part ends at an empty line; the exit codes also at a line that points to the help of `inco-trio`.
    """

    def __init__(self, epilog: str) -> None:
        self.paragraphs: list[str] = []
        self.codes = ""
        self.examples: list[str] = []
        part = None
        for line in epilog.replace(EXIT_CODES, f"{EXIT_CODES}\n").splitlines():
            if example := EXAMPLE.match(line):
                part = "examples"
                rest = line[example.end() :]
                self.examples += [rest] if rest else []
            elif line.startswith(CODES) or (part == "codes" and line.strip()):
                part = None if line.endswith("--help") else "codes"
                self.codes += f"{line}\n"
            elif not line.strip():
                part = None
            elif part == "examples" and line[0].isspace():
                self.examples.append(line.strip())
            elif part == "paragraph":
                self.paragraphs[-1] += f" {line.strip()}"
            else:
                part = "paragraph"
                self.paragraphs.append(line.strip())


class _Words:
    """Text as roff, in which the options of a parser are bold and its metavars are italic."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        named = {name for action in parser._actions for name in re.findall(r"[A-Z][A-Z0-9]*", _values(action))}
        metavars = "|".join(sorted({"COMMAND", "OPTION", *named}))
        self._special = re.compile(rf"`([^`]+)`|((?<![\w-])--?[a-z][a-z-]*)|\b((?:{metavars})\b)")

    def roff(self, text: str) -> str:
        """Text in one line, with its fonts."""
        made, end = "", 0
        for found in self._special.finditer(text):
            made += _escaped(text[end : found.start()])
            bold = found[1] or found[2]
            made += rf"\fB{_escaped(bold)}\fR" if bold else rf"\fI{_escaped(found[3])}\fR"
            end = found.end()
        return made + _escaped(text[end:])

    def paragraph(self, text: str) -> list[str]:
        """Its lines, short as a reader of roff expects them."""
        wrapped = textwrap.wrap(self.roff(" ".join(text.split())), 79, break_long_words=False, break_on_hyphens=False)
        return [_line(line) for line in wrapped]

    def head(self, action: argparse.Action) -> str:
        """What stands above the help of an option or a positional."""
        values = _values(action)
        if not action.option_strings:
            return self.roff(values.strip("[]"))
        return self.roff(", ".join(f"{option} {values}".rstrip() for option in action.option_strings))

    def usage(self, parser: argparse.ArgumentParser) -> str:
        """The own usage of the parser, or one that does not depend on the version of argparse."""
        usage = parser.usage
        if usage is None:
            positionals = [action for action in parser._actions if not action.option_strings]
            usage = " ".join(["%(prog)s [OPTION ...]", *map(_in_usage, positionals)])
        rest = usage.removeprefix("%(prog)s")
        return rf"\fB{_escaped(parser.prog)}\fR{self.roff(rest)}"


def _in_usage(action: argparse.Action) -> str:
    values = _values(action)
    return f"{values} ..." if action.nargs == argparse.PARSER else values


def _values(action: argparse.Action) -> str:
    """What is given to an option, or as a positional: `N`, `[SECONDS]`, `core1 LINK`, `{text,json}`."""
    if action.nargs == 0:
        return ""
    if action.metavar is None and action.choices is not None:
        name = f"{{{','.join(map(str, action.choices))}}}"
    elif isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    else:
        name = action.metavar or action.dest.upper()
    if isinstance(action.nargs, int):
        return " ".join([name] * action.nargs)
    forms = {
        argparse.OPTIONAL: f"[{name}]",
        argparse.ZERO_OR_MORE: f"[{name} ...]",
        argparse.ONE_OR_MORE: f"{name} ...",
    }
    return forms.get(str(action.nargs), name)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action)


def _codes(text: str) -> dict[int, str]:
    """The exit codes of `exit codes: 0 clean, 2 usage`."""
    text = " ".join(text.split()).removeprefix(CODES).partition(";")[0]
    return {int(code): what for code, what in re.findall(r"(?:^|,) (\d+) (.+?)(?=, \d+ |$)", text)}


def _escaped(text: str) -> str:
    """Characters that roff would show as others, or obey."""
    return text.translate(ESCAPES)


def _line(text: str) -> str:
    r"""A line of text: one that begins with a dot would be a request."""
    return rf"\&{text}" if text.startswith(".") else text
