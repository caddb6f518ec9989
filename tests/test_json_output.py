"""Tests that every command's JSON output contains a version, and only keys that docs/commands.md explains."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.cli.parser import COMMANDS, parser
from netns.hang import HANG
from tests.support_control import PATIENT, Board
from tests.support_doctor import DOCTOR
from tests.support_proxy import write_udrv

DOCS = Path(__file__).parents[1] / "docs"
KEY = re.compile("`([a-z_0-9]+)`")
SECTION = (DOCS / "commands.md").read_text().partition("\n## JSON output\n")[2].partition("\n## ")[0]
TABLE, *SUBSECTIONS = SECTION.split("\n### Keys of `")
ROWS = re.findall(r"^\| (`.*?) \| (.*) \|$", TABLE, re.MULTILINE)
EXPLAINED = {name: set(KEY.findall(text)) for names, text in ROWS for name in re.findall("`(.*?)`", names)}
"""The JSON keys of each command on the page, in the table of all commands or in the command's own section."""
for name, _, text in (section.partition("`") for section in SUBSECTIONS):
    EXPLAINED[name] |= set(KEY.findall(text))
OF_CONTROL = set(KEY.findall((DOCS / "control.md").read_text()))
OF_DATA = "sent expected came missing surplus unknown left_out notes refused send broker counters"
BY_NAME = set(OF_DATA.split())
"""Keys that hold an object with variable keys, for example one key per signal name."""


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


def keys(value: object) -> Iterator[str]:
    """Return all keys of a JSON value."""
    if isinstance(value, list):
        for each in value:
            yield from keys(each)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner) if key not in BY_NAME or isinstance(inner, list) else ()


def printed(*words: str | Path) -> str:
    program = DOCTOR[:-1] if words[0] == "doctor" else tuple(PATIENT)
    command = [*program, *map(str, words), "--json"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=HANG).stdout


def test_the_page_lists_each_command_with_json() -> None:
    subs = parser()._subparsers
    assert subs is not None
    (choices,) = (action.choices for action in subs._group_actions if action.choices is not None)
    with_json = {name for name in COMMANDS if "--json" in dict(choices)[name]._option_string_actions}
    assert {name.partition(" ")[0] for name in EXPLAINED} == with_json


def test_each_key_is_explained(board: Board) -> None:
    udrv = write_udrv(board.home / "u.json", board.irq, {"a_irq": "a_state"}, {})
    boards = board.home / "boards"
    boards.mkdir()
    (boards / "b.json").write_text(json.dumps({"link": board.link, "irq_dir": str(board.irq)}))
    (boards / "c.json").write_text("{}")
    (board.home / "gateway.json").write_text("{}")
    peer = board.core1()
    board.running()
    board.inbound(peer)
    board.trigger()
    at, core1 = ("--control", board.path), ("--as", "core1", f"unix:{board.home}/c,peer={board.home}/core0")
    output = {
        "check": printed("check", "--config", udrv, board.link),
        "check --boards": printed("check", "--boards", boards),
        "check --gateway": printed("check", "--gateway", board.home / "gateway.json"),
        "doctor": printed("doctor", board.link, "--irq-dir", board.irq),
        "status": printed("status", *at),
        "send": printed("send", "redun_notify_irq", *at),
        "wait": printed("wait", "redun_notify_irq", *at, "--after", f"echo 1 > {board.irq}/message_6_trig"),
        "history": printed("history", *at),
        "monitor": "",
    }
    recording = board.home / "r.pcapng"
    subprocess.run([*PATIENT, "record", recording, *at, "--past"], check=True, stderr=subprocess.DEVNULL)
    output["plot"] = printed("plot", recording, "--pair", "redun_notify_irq", "ihub_hwwd_irq")
    output["replay"] = printed("replay", recording, *core1[2:], "--wait", "0")
    assert output.keys() == EXPLAINED.keys()
    for command, text in output.items():
        # `monitor` prints the same events as `history`.
        values = [json.loads(line) for line in text.splitlines()] if command in ("history", "wait") else []
        values += [json.loads(text)] if text and not values else []
        assert [value["version"] for value in values] == [1] * len(values)
        assert values or command == "monitor"
        known = EXPLAINED[command] | {"version"}
        known |= OF_CONTROL if command in ("status", "history", "wait") else set()
        assert {key for value in values for key in keys(value)} <= known, command
