"""Tests of the page docs/lost.md: its command finds each line of the log that can explain a loss."""

from __future__ import annotations

import ast
import logging
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import inco_trio
from inco_trio.service.log import _Json, _Text
from tests.support_pages import page_text, parts

LEVELS = {"info", "warning", "error", "exception"}
OTHERS = {"mqtt", "metrics", "capture", "cli/signalling.py"}
"""The parts of the package that do not run in a proxy."""
IRRELEVANT = {
    "%s: %d signals, %s": "precedes `ready`",
    "sandbox: writing is limited to %s (restart after adding a directory elsewhere)": "only at a start",
    "%s": "notes about a configuration, at a start or a reload",
}
"""The lines at level INFO that do not explain a loss, each with the reason."""
BUILT = (
    "process 50 ended 3.1 s after it was noticed: it had shared rpmsg4000",
    "rpmsg4000: stopped with pending notifications: 3 kept",
    "rpmsg4000: the link went down after 3.1 s: the interface is gone or was renamed",
    "rpmsg4000: the link came up after 3.1 s: a new interface (index 2, now 3; address a, now b)",
    "process 50 does not answer: it may record that this process shares its link once it continues",
    "inco-trio-rpmsg4000: killed by signal 9 (SIGKILL)",
    "inco-trio-rpmsg4000: ended with exit code 69",
    "inco-trio-rpmsg4000 stays down: the configuration is invalid (exit code 78). Fix it, then run: s6-svc -u .",
    "inco-trio-rpmsg4000.service: Main process exited, code=killed, status=9/KILL",
)
"""Lines at level INFO whose text no call contains, and lines that the supervisors log."""


def calls() -> Iterator[tuple[str, str]]:
    """Yield the level and the text of each call that logs a line, if it contains the text."""
    package = Path(inco_trio.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).as_posix().startswith(tuple(OTHERS)):
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in LEVELS and ast.unparse(call.func) == f"logger.{name}":
                yield name, text_of(call.args[0])
            elif name == "report" and ast.unparse(call.args[0]) == "logger":
                yield ast.unparse(call.args[1]).removeprefix("logging.").lower(), text_of(call.args[2])


def text_of(node: ast.expr) -> str:
    """Return a literal text, with an X for each value in it, or "" for another expression."""
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    if not isinstance(node, (ast.JoinedStr, ast.Constant)):
        return ""
    return "".join(str(each.value) if isinstance(each, ast.Constant) else "X" for each in values)


def test_the_command_finds_each_line_that_can_explain_a_loss(tmp_path: Path) -> None:
    found = {*calls()}
    assert {level for level, _ in found} == LEVELS
    literal = {text for level, text in found if level == "info" and text}
    assert IRRELEVANT.keys() <= literal
    entries = [(logging.INFO, text) for text in (*(literal - IRRELEVANT.keys()), *BUILT)]
    # Lines at a higher level contain their level, so the text does not matter.
    entries += [(level, "x") for level in (logging.WARNING, logging.ERROR)]
    records = [logging.LogRecord("inco_trio", level, "", 0, text, None, None) for level, text in entries]
    (command,) = (block.text for block in parts("lost") if block.text.startswith("grep "))
    for formatter in (_Text(stamped=False), _Text(stamped=True), _Json()):
        lines = [formatter.format(record) for record in records]
        (tmp_path / "log-of-last-night").write_text("\n".join([*lines, "inco-trio: debug: in: ihub_hwwd_irq", ""]))
        done = subprocess.run(shlex.split(command), cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.splitlines() == lines


def test_the_page_explains_each_counter_of_a_fault() -> None:
    from inco_trio.doctor.proxies import COUNTERS

    assert COUNTERS.keys() <= {*re.findall(r"`(\w+)`", page_text("lost"))}
