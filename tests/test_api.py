"""Tests that each public name is exported with its types, hides internals, and has a working example in docs/api.md."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import subprocess
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import inco_trio
import inco_trio.aio
import inco_trio.testing
from docs.fields import OPENED
from netns.hang import HANG
from tests.test_aio import python

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text()
MODULES = (inco_trio, inco_trio.aio, inco_trio.testing)
PUBLIC = [(module, name) for module in MODULES for name in module.__all__]
EXPORTED = {id(getattr(module, name)) for module, name in PUBLIC}
BOARD, *BLOCKS = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = list(zip(BLOCKS[::2], BLOCKS[1::2], strict=True))
MEMBERS = {
    inco_trio.Proxy: {"events", "reload", "send", "stats", "status", "wait_for"},
    inco_trio.aio.Proxy: {"config", "events", "reload", "send", "stats", "status", "wait_for"},
    inco_trio.aio.AsyncioProxy: {"events", "send", "stats", "status"},
    inco_trio.Proxies: {"configs", "get", "items", "keys", "not_open", "reload", "stats", "values"},
    inco_trio.Core0: {"events", "send", "wait_for"},
    inco_trio.Core1: {"events", "send", "send_frame", "wait_for", "wait_running"},
}


def marks(program: str) -> list[pytest.MarkDecorator]:
    """Return the pytest marks for an example: `qemu`, or `tools` for trio-asyncio, which some Python versions lack."""
    if "Guest" in program:
        return [pytest.mark.qemu]
    return [pytest.mark.tools] if "on_notification" in program else []


@pytest.mark.parametrize(
    ("program", "output"), [pytest.param(*example, marks=marks(example[0])) for example in EXAMPLES]
)
def test_the_examples_run(pytestconfig: pytest.Config, tmp_path: Path, program: str, output: str) -> None:
    (tmp_path / "my_board.py").write_text(BOARD)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [*python(pytestconfig.getini("filterwarnings")), "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, output), done.stderr


def used(program: str) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each import that a program uses."""
    tree = ast.parse(program)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((node.module, alias.name) for alias in node.names if alias.name in names)


def test_each_name_has_an_example() -> None:
    shown = {name for program, _ in EXAMPLES for name in used(program)}
    assert [name for module, name in PUBLIC if (module.__name__, name) not in shown] == []


def test_the_types_of_each_name_are_checked() -> None:
    text = (Path(__file__).parent / "typing/api.py").read_text()
    checked = {f"{module}.{name}" for module, name in used(text)}
    checked |= {f"inco_trio.{name}" for name in re.findall(r"\b(?:aio|testing)\.\w+", text)}
    assert {f"{module.__name__}.{name}" for module, name in PUBLIC} - checked == set()


def test_the_page_describes_each_name() -> None:
    found = re.findall(r"^\.\. auto(?:function|class|exception):: ([\w.]+)$", PAGE, re.MULTILINE)
    assert sorted(found) == sorted(f"{module.__name__}.{name}" for module, name in PUBLIC)


@pytest.mark.parametrize("cls", MEMBERS, ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
def test_internals_are_not_public(cls: type) -> None:
    assert {name for name in dir(cls) if not name.startswith("_")} == MEMBERS[cls]


def parts(hint: object) -> Iterator[type]:
    """Yield the classes of inco_trio that occur in a type hint."""
    if isinstance(hint, type) and hint.__module__.partition(".")[0] == "inco_trio":
        yield hint
    for part in typing.get_args(hint):
        yield from parts(part)


def constructed(value: object) -> bool:
    """Return whether `value` is a public class that user programs instantiate themselves."""
    return isinstance(value, type) and not issubclass(value, Exception | enum.Enum) and value not in OPENED


def callables(value: object) -> Iterator[Callable[..., object]]:
    """Yield the functions of a public name: the function itself, or the public methods and getters of a class."""
    if isinstance(value, types.FunctionType):
        yield value
        return
    for name, member in inspect.getmembers(value):
        if isinstance(member, property) and not name.startswith("_"):
            assert member.fget is not None
            yield member.fget
        elif isinstance(member, types.FunctionType) and not name.startswith("_"):
            yield member
    if constructed(value) and "__init__" in vars(value):
        yield vars(value)["__init__"]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda each: getattr(each, "__name__", each))
def test_the_types_of_a_public_name_are_public(module: types.ModuleType, name: str) -> None:
    value, known = getattr(module, name), {each: getattr(inco_trio, each) for each in inco_trio.__all__}
    hints: list[object] = []
    for function in callables(value):
        within = inspect.unwrap(function)
        hints += typing.get_type_hints(within, {**known, **within.__globals__}).values()
    hidden = {part.__qualname__ for hint in hints for part in parts(hint) if id(part) not in EXPORTED}
    assert hidden == set()
