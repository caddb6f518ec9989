"""Man pages in roff (see man-pages(7) and groff_man(7)), and the same text in Markdown for the site.

argparse-manpage is not used, because it adds a date, keeps the line breaks that argparse inserts for a terminal, and
joins the lines of the epilogs, which contain the exit codes and the examples.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence

from inco_trio.cli.parser import COMMANDS, EXIT_CODES, GROUPS

__all__ = ["command_pages", "configuration_page", "drop_in_page", "markdown"]

ESCAPES = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"})
EXAMPLE = re.compile(r"(?:examples?|try it):\s*", re.IGNORECASE)
CODES = "exit codes:"
OF_A_COMMAND = {1, 3, 4, 65}
"""Exit codes that only some commands return. The man pages of these commands explain them."""
DATE = "2026-11-29"
"""The date of the man pages. It is fixed, because a generated date would change the files every day."""
ENVIRONMENT = (
    ("UDRV_JSON_PATH", "--config", "path of the configuration, if `--config` and `--irq-dir` are not given"),
    ("XDG_RUNTIME_DIR", "--control", "directory below which a user other than root has control sockets"),
    ("NO_COLOR", "--color", "if set, the output has no colours"),
    ("FORCE_COLOR", "--color", "if set, the output has colours even if it is not a terminal"),
)
"""The environment variables: name, option, meaning. Commands that have the option read the variable."""
FILES = (
    ("udrv.json", "--config", "the board's configuration, see udrv.json(5)"),
    ("/run/inco-trio/", "--control", "control sockets of the proxies of root and of services"),
    ("$XDG_RUNTIME_DIR/inco-trio/", "--control", "control sockets of the proxies of another user"),
    ("/tmp/inco-trio-UID/", "--control", "the same, if XDG_RUNTIME_DIR is not set"),  # noqa: S108 - a text
)
"""The files: path, option, meaning. Commands that have the option use the file."""
OF_UDRV = ("UDRV_JSON_PATH", "udrv.json")
"""The variable and the file that a command uses only if the help text of its option names them."""
SERVICE_SIGNALS = (
    ("SIGHUP", "reload the configuration; if it is invalid, keep the old one"),
    ("SIGUSR1", "log the counters"),
    ("SIGTERM, SIGINT", "finish what was read, and exit; the third signal ends the process at once"),
)
COMMAND_SIGNALS = (("SIGINT", "stop with exit code 130"), ("SIGTERM", "stop"))
SERVICES = {"run", "mqtt", "mqtt-link", "exporter", "inco_proxy"}


def command_pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the man pages of `inco-trio` and of each command, keyed by file name."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    pages = {"inco-trio.1": _page(parser, parser.description or "", ["inco_proxy"])}
    for command, sub in commands.choices.items():
        pages[f"{_name(command)}.1"] = _page(sub, COMMANDS[command], ["inco-trio", *_related(command, sub)])
    return pages


def drop_in_page(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the man page of `inco_proxy`, keyed by file name."""
    summary = "transfer inter-core interrupts, in place of the old program of that name"
    return {"inco_proxy.1": _page(parser, summary, ["inco-trio", "inco-trio-run"])}


def _name(command: str) -> str:
    return f"inco-trio-{command}"


def _related(command: str, sub: argparse.ArgumentParser) -> list[str]:
    """Return the names of the man pages for the commands that the help of `command` mentions."""
    text = " ".join(filter(None, (sub.description, sub.epilog, *(action.help for action in sub._actions))))
    named = set(re.findall(r"inco-trio ([a-z][a-z0-9]*)", text))
    return [_name(other) for other in COMMANDS if other in named and other != command]


def _page(parser: argparse.ArgumentParser, summary: str, see_also: Sequence[str]) -> str:
    title = parser.prog.replace(" ", "-")
    commands = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    epilog, _, site = (parser.epilog or "").partition("\nDocumentation: ")
    # The epilog of the main parser begins with a list of the commands. Omit it: the section COMMANDS contains it.
    notes = _Notes(epilog.partition("\n\n")[2] if commands else epilog)
    words = _Words(parser)
    summary = summary[0].lower() + summary[1:].rstrip(".")
    lines = [
        f'.TH "{_escaped(title.upper())}" 1 {DATE} "inco\\-trio" "Manual of inco\\-trio"',
        *(".SH NAME", *textwrap.wrap(f"{_escaped(title)} \\- {_escaped(summary)}", 79, break_on_hyphens=False)),
        *(".SH SYNOPSIS", words.usage(parser)),
        *(".SH DESCRIPTION", *words.paragraph(parser.description or "")),
    ]
    for paragraph in notes.paragraphs:
        lines += [".PP", *words.paragraph(paragraph)]
    codes = EXIT_CODES
    if commands:
        lines.append(".SH COMMANDS")
        grouped = {command for names in GROUPS.values() for command in names}
        rest = [command for command in COMMANDS if command not in grouped]
        for purpose, names in (*GROUPS.items(), ("other", rest)):
            lines.append(f".SS {purpose}")
            for command in names:
                lines += [".TP", f".BR {_escaped(_name(command))} (1)", *words.paragraph(COMMANDS[command])]
    else:
        codes = {code: what for code, what in codes.items() if code not in OF_A_COMMAND} | _codes(notes.codes)
    lines.append(".SH OPTIONS")
    for action in _shown(parser):
        lines += [".TP", words.head(action), *words.paragraph(_help(parser, action))]
    lines.append(".SH EXIT STATUS")
    for code, what in sorted(codes.items()):
        lines += [".TP", f".B {code}", *words.paragraph(what)]
    has = {option: action.help or "" for action in parser._actions for option in action.option_strings}
    if parser.prog == "inco_proxy":
        has = dict.fromkeys(("--config", "--control"), " ".join(OF_UDRV))
    for heading, rows in (("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        if items := [(name, what) for name, option, what in rows if commands or _is_used(name, option, has)]:
            lines += _definitions(heading, items, words)
    signals = SERVICE_SIGNALS if parser.prog.removeprefix("inco-trio ") in SERVICES else COMMAND_SIGNALS
    lines += _definitions("SIGNALS", signals, words)
    if notes.examples:
        lines += [".SH EXAMPLES", ".EX", *(_line(_escaped(example)) for example in notes.examples), ".EE"]
    lines += [".SH SEE ALSO", *(f".BR {_escaped(page)} (1)," for page in see_also)]
    lines[-1] = lines[-1].removesuffix(",")
    if site:
        lines += [".PP", f".UR {site}", "Documentation", ".UE"]
    return "\n".join(lines) + "\n"


def _is_used(name: str, option: str, has: Mapping[str, str]) -> bool:
    """Return whether a command uses a variable or file. `has` contains the help text of each of its options.

    `--config` is not the same in all commands: not all read UDRV_JSON_PATH, and that of `mqtt` is another file.
    """
    return option in has and (name not in OF_UDRV or name in has[option])


def _definitions(heading: str, items: Sequence[tuple[str, str]], words: _Words) -> list[str]:
    lines = [f".SH {heading}"]
    for name, what in items:
        lines += [".TP", f".B {_escaped(name)}", *words.paragraph(what)]
    return lines


def configuration_page(keys: Sequence[tuple[str, str]], files: Sequence[str], example: str) -> dict[str, str]:
    """Return the man page of udrv.json, keyed by file name.

    `keys` contains the name and the description of each key, and `files` an entry for each built-in signal.
    """
    words = _Words(argparse.ArgumentParser())
    about = (
        "The proxy of inco-trio reads the signals of a board from this JSON file. It ignores all keys that are not "
        "listed here, because the file describes many more devices. `inco-trio check` reports all mistakes at once."
    )
    required = (
        "Only `file.ihub-irq-dev.path` is required. Without further keys, the built-in signals use files in this "
        f"directory: {', '.join(files)}."
    )
    lines = [
        f'.TH "UDRV.JSON" 5 {DATE} "inco\\-trio" "Manual of inco\\-trio"',
        *(".SH NAME", "udrv.json \\- configuration of a board of inco\\-trio"),
        *(".SH DESCRIPTION", *words.paragraph(about), ".PP", *words.paragraph(required)),
        *_definitions("KEYS", keys, words),
        *(".SH EXAMPLES", ".EX", *(_line(_escaped(line)) for line in example.splitlines()), ".EE"),
        *(".SH SEE ALSO", ".BR inco\\-trio\\-check (1),", ".BR inco\\-trio\\-run (1)"),
    ]
    return {"udrv.json.5": "\n".join(lines) + "\n"}


def markdown(parser: argparse.ArgumentParser) -> list[str]:
    """Return the help of a command as lines of Markdown. The arguments form a table, which fits any screen."""
    notes = _Notes(parser.epilog or "")
    rows = []
    for action in _shown(parser):
        options = action.option_strings or [""]
        values = _values(action) if action.option_strings else _values(action).strip("[]")
        head = ", ".join(f"{option} {values}".strip() for option in options)
        rows.append(f"| `{_cell(head)}` | {_cell(_help(parser, action))} |")
    lines = ["```text", " ".join(parser.format_usage().split()), "```", "", parser.description or "", ""]
    lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    for paragraph in [*notes.paragraphs, *([" ".join(notes.codes.split())] if notes.codes else [])]:
        lines += [paragraph[0].upper() + paragraph[1:].rstrip(".") + ".", ""]
    return [*lines, "```sh", *notes.examples, "```"] if notes.examples else lines


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments that a page explains, positional ones first."""
    actions = sorted(parser._actions, key=lambda action: bool(action.option_strings))
    hidden = (None, argparse.SUPPRESS)
    return [each for each in actions if each.help not in hidden and not isinstance(each, argparse._SubParsersAction)]


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


class _Notes:
    """The parts of an epilog: paragraphs, `exit codes: 0 ...`, and `example: ...` or `examples:` with indented lines.

    An empty line ends a part. A line that ends in `--help` also ends the exit codes.
    """

    def __init__(self, epilog: str) -> None:
        self.paragraphs: list[str] = []
        self.codes = ""
        self.examples: list[str] = []
        part = None
        for line in epilog.splitlines():
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
    """A converter from text to roff. It sets the options of a parser in bold and its metavars in italics."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        named = {name for action in parser._actions for name in re.findall(r"[A-Z][A-Z0-9]*", _values(action))}
        metavars = "|".join(sorted({"COMMAND", "OPTION", *named}))
        self._special = re.compile(rf"`([^`]+)`|((?<![\w-])--?[a-z][a-z-]*)|\b((?:{metavars})\b)")

    def roff(self, text: str) -> str:
        """Return the text as one line of roff, with font escapes."""
        made, end = "", 0
        for found in self._special.finditer(text):
            made += _escaped(text[end : found.start()])
            bold = found[1] or found[2]
            made += rf"\fB{_escaped(bold)}\fR" if bold else rf"\fI{_escaped(found[3])}\fR"
            end = found.end()
        return made + _escaped(text[end:])

    def paragraph(self, text: str) -> list[str]:
        """Return the text as roff lines of at most 79 characters."""
        wrapped = textwrap.wrap(self.roff(" ".join(text.split())), 79, break_long_words=False, break_on_hyphens=False)
        return [_line(line) for line in wrapped]

    def head(self, action: argparse.Action) -> str:
        """Return the heading of an option or a positional argument."""
        values = _values(action)
        if not action.option_strings:
            return self.roff(values.strip("[]"))
        return self.roff(", ".join(f"{option} {values}".rstrip() for option in action.option_strings))

    def usage(self, parser: argparse.ArgumentParser) -> str:
        """Return the parser's own usage line, or create one that does not depend on the argparse version."""
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
    """Return the placeholder for the value of an argument: `N`, `[SECONDS]`, `core1 LINK`, `{text,json}`."""
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
    """Parse a list of exit codes, such as `exit codes: 0 clean, 2 usage`."""
    text = " ".join(text.split()).removeprefix(CODES).partition(";")[0]
    return {int(code): what for code, what in re.findall(r"(?:^|,) (\d+) (.+?)(?=, \d+ |$)", text)}


def _escaped(text: str) -> str:
    """Escape the characters that roff would replace or interpret."""
    return text.translate(ESCAPES)


def _line(text: str) -> str:
    r"""Escape a line that begins with a dot, which roff would interpret as a request."""
    return rf"\&{text}" if text.startswith(".") else text
