"""Tests that each command answers odd arguments with one clear line and a documented exit code, never a traceback."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import posix
import re
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from inco_trio.cli import main
from inco_trio.cli.parser import COMMANDS, EXIT_CODES, parser
from inco_trio.service import descriptions, process_signals
from netns.hang import HANG
from tests.support_proxy import write_udrv

ODD = ("", "-1", "0", "nan", "1e400", "9" * 30, "a\nb", "\udcff", "nowhere/a", "empty", "nothing", "bytes", "/dev/null")
"""Values for each option and argument. `empty` is a directory, `nothing` an empty file, and `bytes` a binary file."""
ODD_FOR_SERVICES = ("", "-", "-1", "1x", "9" * 30, "a\nb", "a\0b", "\udcff", "empty", "bytes")
"""Fewer values, because each value requires a separate process."""
LINK = "unix:/nowhere/a,peer=/nowhere/b"
SERVICES: dict[str, tuple[str, ...]] = {
    "run": (LINK, "--irq-dir", "irq", "--control", "none"),
    "mqtt": ("mqtt://127.0.0.1:1",),
    "mqtt-link": ("mqtt://127.0.0.1:1", LINK, "--end", "core0"),
    "exporter": ("--listen", "192.0.2.1:1"),
    "demo": ("--count", "1"),
}
"""Commands that keep running once started, each with arguments that are valid until the command starts its work."""
BASES: dict[str, tuple[str, ...]] = {
    "check": ("--config", "u.json"),
    "replay": ("nothing", "--irq-dir", "irq", "--wait", "0"),
    "plot": ("nothing", "--json"),
    "record": ("r.pcapng",),
    "send": ("redun_notify_irq",),
    "wait": ("ihub_hwwd_irq", "--timeout", "0"),
    "service": ("systemd", LINK, "--config", "u.json"),
    "s6": ("--systemd", "--iface", LINK, "--config", "u.json"),
    "doctor": (LINK,),
}
"""Arguments that make a command exit immediately."""
find_program = functools.cache(descriptions.find_program)
"""It starts a Python process, and its result is the same for each command line."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a directory that contains the files listed in ODD. The runtime directory is empty (no proxy)."""
    for name in ("empty", "irq", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "nothing").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 20)
    write_udrv(tmp_path / "u.json", tmp_path / "irq")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UDRV_JSON_PATH", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path / "run"])
    monkeypatch.setattr(descriptions, "find_program", find_program)
    handlers = {number: signal.getsignal(number) for number in process_signals.HELD}
    package = logging.getLogger("inco_trio")
    before = package.handlers, package.propagate, package.level
    yield tmp_path
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_in_child(words: list[str], out: Path) -> int:
    """Run a command in a child process that ends where a service would begin its work. Return the exit code.

    The child changes its capabilities, its limits and its log, which must not change this process.
    """
    child = os.fork()
    if not child:
        code = 99
        try:
            for fd, name in ((0, os.devnull), (1, out), (2, out.with_suffix(".err"))):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open until the child ends
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115 - as above
            mock.patch("trio.run", return_value=None).start()
            mock.patch("inco_trio.simulation.demonstration.run_demo", return_value=0).start()
            code = main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 98
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Unlike os._exit, this function does not write coverage data, which would take longer than the test.
            posix._exit(code)
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], HANG)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def options_of(command: str) -> Iterator[argparse.Action]:
    (commands,) = (each for each in parser(command)._actions if isinstance(each, argparse._SubParsersAction))
    yield from (each for each in commands.choices[command]._actions if "--help" not in each.option_strings)


def lines_of(command: str, odd: Sequence[str]) -> Iterator[list[str]]:
    """Return command lines that combine each option and argument of a command with each odd value."""
    base = BASES.get(command, SERVICES.get(command, ()))
    for action in options_of(command):
        name = next(iter(action.option_strings), None)
        if action.nargs == 0:
            yield [command, *base, str(name)]
            continue
        for value in odd:
            number = action.nargs if isinstance(action.nargs, int) else 1
            if name is not None:
                # Give the value in the same word, because it can begin with a dash.
                yield [command, *base, *([f"{name}={value}"] if number == 1 else [name, *[value] * number])]
            else:
                yield [command, *(base[1:] if base and not base[0].startswith("-") else base), "--", value]


def faults_of(code: object, out: str, err: str) -> list[str]:
    """Return what is wrong with the result of a command."""
    faults = [] if code in EXIT_CODES else [f"undocumented exit code {code}"]
    if "Traceback" in out + err:
        faults.append("a traceback")
    errors = [line for line in err.splitlines() if re.match("inco-trio( [a-z0-9-]+)?: error: ", line)]
    # A usage error shows the usage and one line. `doctor` and commands that only wait or find nothing print no error.
    if code not in (0, 1, 3) and len(errors) != 1:
        faults.append(f"{len(errors)} error lines")
    if not err.startswith("usage: ") and any(not line.startswith("inco-trio: ") for line in err.splitlines()):
        faults.append("a line without the name of the program")
    return faults


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in SERVICES])
def test_odd_values_are_one_error_line(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for words in lines_of(command, ODD):
        code: object
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        wrong += [f"{words}: {fault}: {err}" for fault in faults_of(code, out, err)]
    assert wrong == []


@pytest.mark.parametrize("command", SERVICES)
def test_odd_values_for_services_are_one_error_line(command: str, home: Path) -> None:
    for module in ("service.daemon", "mqtt.gateway", "mqtt.bridge", "metrics.http_server"):
        importlib.import_module(f"inco_trio.{module}")  # Import the module once, instead of in each child process.
    wrong = []
    for words in lines_of(command, ODD_FOR_SERVICES):
        code = run_in_child(words, home / "out")
        out, err = (home / "out").read_text(), (home / "out.err").read_text()
        wrong += [f"{words}: {fault}: {err}" for fault in faults_of(code, out, err)]
    assert wrong == []
