"""Tests that no test depends on a clock: each timeout is HANG or simulated, or a comment gives its reason."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
CLOCKS = {"sleep", "move_on_after", "fail_after", "move_on_at", "fail_at", "settimeout", "timeout"}
"""Functions whose first argument is a duration."""


def waits(call: ast.Call) -> Iterator[ast.expr]:
    """Return the duration arguments of a call."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in CLOCKS:
        yield from call.args[:1]
    yield from (word.value for word in call.keywords if word.arg == "timeout")


def is_harmless(time: ast.expr) -> bool:
    """Return whether a duration is HANG, 0 or None."""
    return (isinstance(time, ast.Constant) and time.value in (0, None)) or ast.unparse(time) == "HANG"


def unexplained(source: str) -> list[int]:
    """Return the line numbers of waits without HANG and without a comment on the same line or the line above."""
    comments = {
        token.start[0] + (not token.line.partition("#")[0].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# fmt", "# type"))
    }
    found = [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and not all(map(is_harmless, waits(node)))
        if not comments & {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    ]
    return sorted(found)


@pytest.mark.parametrize("directory", ["tests", "netns", "examples"])
def test_each_wait_uses_hang_or_has_a_comment(directory: str) -> None:
    left = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / directory).rglob("*.py")
        for line in unexplained(path.read_text())
    }
    assert left == set(), "use HANG, or state the reason in a comment"


def test_hypothesis_accepts_any_time() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("time.sleep(0.1)", [1]),
        ("await trio.sleep(1)  # noqa: ASYNC", [1]),
        ("with trio.move_on_after(2 * HANG): pass", [1]),
        ("run(\n    'x',\n    timeout=60,\n)", [1]),
        ("time.sleep(0.1)  # The pace of the load.", []),
        ("# The pace of the load.\ntime.sleep(0.1)", []),
        ("with trio.fail_after(HANG): run('x', timeout=HANG)", []),
        ("peer.settimeout(0)", []),
    ],
)
def test_waits_without_a_comment_are_found(source: str, lines: list[int]) -> None:
    assert unexplained(source) == lines
