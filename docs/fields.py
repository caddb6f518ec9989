"""Generate tables of attrs fields and benchmark results for the pages, and hide constructors from Sphinx."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise

import attrs

import inco_trio
import inco_trio.aio
import inco_trio.testing

__all__ = ["OPENED", "described", "figures", "hide_constructors", "table"]

OPENED: tuple[type, ...] = (
    *(inco_trio.Proxy, inco_trio.Proxies, inco_trio.aio.Proxy),
    *(inco_trio.testing.Board, inco_trio.testing.BoardCore0, inco_trio.testing.BoardCore1),
    *(inco_trio.testing.BoardProxy, inco_trio.testing.BoardFaults, inco_trio.testing.Guest),
)
"""Classes that user programs do not instantiate. Functions such as `open_proxy` create the objects."""


EARLIER = "inco-trio [0-9a-f]{7}"
"""A regular expression for the name of an earlier commit in the benchmark results."""


def hide_constructors() -> None:
    """Hide the constructor parameters of the classes in `OPENED` from Sphinx."""
    for cls in OPENED:
        cls.__signature__ = inspect.Signature()  # type: ignore[attr-defined]


def described(cls: type) -> dict[str, str]:
    """Return the docstring of each constructor field as one line. Raises KeyError if a field has none."""
    (found,) = (node for node in ast.walk(ast.parse(inspect.getsource(cls))) if isinstance(node, ast.ClassDef))
    said: dict[str, str] = {}
    for field, below in pairwise(found.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            said[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return {field.name: said[field.name] for field in attrs.fields(cls) if field.init}


def table(cls: type, prefix: str = "") -> list[str]:
    """Return the lines of a Markdown table: each key with `prefix`, its default or "required", and its description."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    said = described(cls)
    for field in attrs.fields(cls):
        if field.init:
            needed = "required" if field.default is attrs.NOTHING else "optional"
            if isinstance(field.default, str | int | float):
                needed = f"default `{field.default!r}`"
            rows.append(f"| `{prefix}{field.name}` | {needed} | {said[field.name]} |")
    return rows


def figures(results: str) -> list[str]:
    """Return the Markdown table of the benchmark's results without the spread, the notes and the earlier commit."""
    rows = []
    for line in results.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not re.search(EARLIER, cells[0]):
            figure, goal, result, _, met, medians, _ = cells
            medians = re.sub(rf", {EARLIER} [\d.,]*\d", "", medians)
            rows.append(f"| {figure} | {goal} | {result} | {met} | {medians} |")
    return rows
