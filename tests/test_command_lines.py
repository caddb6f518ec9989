"""Tests that each command answers odd arguments with one clear line and a documented exit code, never a traceback."""

from __future__ import annotations

import argparse
import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from inco_trio.cli import main
from inco_trio.cli.parser import COMMANDS, EXIT_CODES, parser
from inco_trio.service import process_signals
from tests.support_proxy import write_udrv

ODD = ("", "-1", "0", "nan", "1e400", "9" * 30, "a\nb", "\udcff", "nowhere/a", "empty", "nothing", "bytes", "/dev/null")
"""Values for each option and argument. `empty` is a directory, `nothing` an empty file, `bytes` a binary one."""
SERVICES = {"run", "mqtt", "mqtt-link", "exporter", "demo"}
"""Commands that run for a long time if their arguments are valid."""
LINK = "unix:/nowhere/a,peer=/nowhere/b"
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
"""Arguments that make a command end at once, keyed by command."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a directory with the files that ODD names. The runtime directory is empty, because no proxy runs."""
    for name in ("empty", "irq", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "nothing").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 20)
    write_udrv(tmp_path / "u.json", tmp_path / "irq")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UDRV_JSON_PATH", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path / "run"])
    handlers = {number: signal.getsignal(number) for number in process_signals.HELD}
    package = logging.getLogger("inco_trio")
    before = package.handlers, package.propagate, package.level
    yield tmp_path
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def options_of(command: str) -> Iterator[argparse.Action]:
    (commands,) = (each for each in parser(command)._actions if isinstance(each, argparse._SubParsersAction))
    yield from (each for each in commands.choices[command]._actions if "--help" not in each.option_strings)


def lines_of(command: str) -> Iterator[list[str]]:
    """Yield command lines that combine each option and argument of a command with each odd value."""
    base = BASES.get(command, ())
    for action in options_of(command):
        name = next(iter(action.option_strings), None)
        if action.nargs == 0:
            yield [command, *base, str(name)]
            continue
        for value in ODD:
            number = action.nargs if isinstance(action.nargs, int) else 1
            if name is not None:
                # Give the value in the same word, because it may begin with a dash.
                yield [command, *base, *([f"{name}={value}"] if number == 1 else [name, *[value] * number])]
            else:
                yield [command, *(base[1:] if base and not base[0].startswith("-") else base), "--", value]


def faults_of(code: object, out: str, err: str) -> list[str]:
    """Return what is wrong with the result of a command."""
    faults = [] if code in EXIT_CODES else [f"undocumented exit code {code}"]
    if "Traceback" in out + err:
        faults.append("a traceback")
    errors = [line for line in err.splitlines() if re.match("inco-trio( [a-z0-9-]+)?: error: ", line)]
    # A usage error prints the usage and one line. `doctor` and commands that only wait or find nothing print no error.
    if code not in (0, 1, 3) and len(errors) != 1:
        faults.append(f"{len(errors)} error lines")
    if not err.startswith("usage: ") and any(not line.startswith("inco-trio: ") for line in err.splitlines()):
        faults.append("a line without the name of the program")
    return faults


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in SERVICES])
def test_odd_values_are_one_error_line(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for words in lines_of(command):
        code: object
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        wrong += [f"{words}: {fault}: {err}" for fault in faults_of(code, out, err)]
    assert wrong == []
