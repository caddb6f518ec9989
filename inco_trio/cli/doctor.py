"""`inco-trio doctor`: diagnose missing notifications, and print the commands that fix the causes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from inco_trio.cli import options
from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.streams import say, say_text
from inco_trio.cli.terminal import wants_color
from inco_trio.doctor.machine import proc
from inco_trio.doctor.result import Level, Result, ok, refused, summarize
from inco_trio.doctor.space import searching_once
from inco_trio.errors import IncoError
from inco_trio.links.address import parse_address
from inco_trio.linux.processes import look
from inco_trio.service.lines import printable
from inco_trio.signals import Signal, builtin_signals

EXITS = {Level.OK: 0, Level.FAIL: 1, Level.WARN: 3}
"""The exit code of the command, by the level of the worst result."""

NAMES = {Level.FAIL: "problems", Level.WARN: "warnings", Level.OK: "ok"}
"""The JSON key for the number of results at each level."""
VERSION = 1
"""The version of the JSON output. It is incremented when the meaning of a key changes."""
_COLOURS = {Level.OK: 32, Level.WARN: 33, Level.FAIL: 31}
"""The terminal colour codes for green, yellow and red; see console_codes(4)."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Without arguments, the command examines all running proxies and their boards. It prints problems first,\n"
        "with the commands that fix them, and changes nothing.\n"
        "exit codes: 0 no problems, 1 problems, 3 only warnings\n\n"
        "example: inco-trio doctor rpmsg4000 --config /etc/udrv.json"
    )
    sub.add_argument("iface", nargs="?", metavar="LINK", help="interface, or unix:LOCAL,peer=REMOTE (default: all)")
    options.configuration_argument(sub)
    sub.add_argument("--irq-dir", metavar="DIR", help="check the built-in signals with registers in DIR")
    sub.add_argument("--boards", metavar="DIR", help=options.BOARDS_HELP)
    sub.add_argument("--json", action="store_true", help="print the results as JSON")
    sub.add_argument("-q", "--quiet", action="store_true", help="print only problems and warnings")
    options.add_color(sub)


def run(args: argparse.Namespace) -> int:
    """Print the results; return the exit code of the worst result. Raises UsageError."""
    if args.boards is None:
        results = _one(args)
    else:
        results = _boards(options.boards_directory(args, "IFACE", "--config", "--irq-dir"))
    with searching_once():
        found = summarize(results, _as_root(args))
    counts = Counter(result.level for result in found)
    if args.json:
        summary = {name: counts[level] for level, name in NAMES.items()}
        entries = [result.as_dict() for result in found]
        say_text(json.dumps({"version": VERSION, **summary, "results": entries}, indent=2))
    else:
        coloured = wants_color(args.color)
        for result in found:
            if args.quiet and result.level is Level.OK:
                continue
            word = f"{result.level.name.lower():4}"
            head = f"\033[{_COLOURS[result.level]}m{word}\033[m" if coloured else word
            say_text(f"{head} {printable(str(result))}")
        if not args.quiet:
            say(_summary(counts))
    return EXITS[max(counts, default=Level.OK)]


def _summary(counts: Counter[Level]) -> str:
    """Return a line such as `2 problems, 1 warning, 15 checks ok`."""
    problems, warnings = counts[Level.FAIL], counts[Level.WARN]
    parts = [f"{problems or 'no'} problem{'' if problems == 1 else 's'}"]
    parts += [f"{warnings} warning{'' if warnings == 1 else 's'}"] if warnings else []
    return ", ".join([*parts, f"{counts[Level.OK]} check{'' if counts[Level.OK] == 1 else 's'} ok"])


def _as_root(args: argparse.Namespace) -> str:
    """Return the command that repeats this check as root. Its path is absolute, because sudo(8) has its own PATH."""
    program = shutil.which("inco-trio")
    words = [program] if program else [sys.executable, "-m", "inco_trio"]
    given = {"--config": args.config, "--irq-dir": args.irq_dir, "--boards": args.boards}
    chosen = [word for option, value in given.items() if value is not None for word in (option, value)]
    return shlex.join(["sudo", *words, "doctor", *([] if args.iface is None else [args.iface]), *chosen])


def _one(args: argparse.Namespace) -> Iterator[Result]:
    """Return the check results for one link. Raise UsageError before the first check if the arguments are invalid."""
    if args.irq_dir is not None and args.config is not None:
        raise UsageError("--irq-dir and --config are mutually exclusive")
    if args.iface is not None:
        options.check_link(args.iface)
    directory = None if args.irq_dir is None else options.absolute(args.irq_dir, "--irq-dir")
    config = None
    if directory is None and (args.config is not None or os.environ.get("UDRV_JSON_PATH")):
        config = options.config_path(args)
    return _examined(args.iface, directory, config)


def _examined(link: str | None, directory: Path | None, config: Path | None) -> Iterator[Result]:
    from inco_trio.doctor.answers import ask
    from inco_trio.doctor.examination import examine
    from inco_trio.doctor.services import find_services, leftovers, services_of, unanswered
    from inco_trio.doctor.silence import silent
    from inco_trio.doctor.survey import survey, survey_link

    processes = look()
    yield from proc(processes)
    answers = ask(processes)
    if link is None and directory is None:
        yield from survey(processes, answers)
    services = []
    if link is not None:
        every = find_services(processes)
        services = services_of(link, every)
        words = (link, "--config", "FILE" if config is None else str(config))
        yield from unanswered(every)
        yield from leftovers(every, processes, parse_address(link).label, words)
    for service in services:
        yield from service.results
    if link is not None and directory is None and config is None:
        found = [*survey_link(link, processes, answers, services)]
        yield from found
        if found:
            return
    signals: tuple[Signal, ...] = ()
    content: tuple[Path, tuple[Signal, ...]] | None = None
    start = f"inco-trio run {shlex.quote(link or '')}"
    if directory is not None:
        signals = builtin_signals(directory)
        start += f" --irq-dir {shlex.quote(str(directory))}"
    elif config is not None:
        from inco_trio.config import read_board

        start += f" --config {shlex.quote(str(config))}"
        if silence := silent("configuration", config, lambda: read_board(config)):
            yield silence
        else:
            try:
                signals = read_board(config).signals
            except IncoError as error:
                yield from refused(config, error)
            else:
                content = config, signals
                yield ok("configuration", config, f"valid, {len(signals)} signals")
    yield from examine(link, signals, processes, answers, configuration=content, start=start, services=services)


def _boards(directory: Path) -> Iterator[Result]:
    from inco_trio.board_files import read_boards
    from inco_trio.doctor.answers import ask
    from inco_trio.doctor.examination import examine, expected_trust
    from inco_trio.doctor.proxies import board_files
    from inco_trio.doctor.services import find_services, leftovers, services_of_boards, unanswered
    from inco_trio.doctor.silence import silent

    processes = look()
    yield from proc(processes)
    answers = ask(processes)
    if silence := silent("configuration", directory, lambda: read_boards(directory)):
        yield silence
        return
    try:
        boards = read_boards(directory)
    except IncoError as error:
        yield from refused(directory, error)
        return
    for mistake in boards.refused.values():
        yield from refused(directory, mistake)
    for process in processes.all:
        if (answer := answers.by_pid.get(process.pid)) is not None and answer.name == str(directory):
            yield from board_files(directory, boards, [board.board for board in answer.boards], process)
    start = f"inco-trio run --boards {shlex.quote(str(directory))}"
    every = find_services(processes)
    services = services_of_boards(directory, every)
    yield from unanswered(every)
    yield from leftovers(every, processes, options.boards_label(directory), ("--boards", str(directory)))
    for service in services:
        yield from service.results
    for name, board in boards.configs.items():
        file = directory / f"{name}.json"
        yield ok("configuration", file, f"valid, {len(board.signals)} signals")
        trust = expected_trust(board.owner, board.group)
        yield from examine(
            board.link, board.signals, processes, answers,
            netns=board.netns, configuration=(file, board), trust=trust, start=start, services=services,
        )  # fmt: skip
