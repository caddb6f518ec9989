"""Tests that docs/design.md matches the package: its modules, its layers, and the files to read for each question."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import inco_trio

ROOT = Path(__file__).parents[1]
PACKAGE = Path(inco_trio.__file__).parent
PAGE = (ROOT / "docs/design.md").read_text()
LAYERS = (
    ("linux", "real_clock"),
    ("backoff", "counters", "errors", "frame", "problems", "stats", "trio_clock", "wall_clock"),
    ("notify", "nurseries", "signals", "trust"),
    ("notification", "proxy_status", "validation"),
    ("links", "persist"),
    ("config", "registers"),
    ("board_files", "notifications"),
    ("proxy",),
    ("aio", "control", "cores"),
    ("service",),
    ("capture", "doctor", "metrics", "mqtt", "simulation"),
    ("testing",),
    ("cli",),
    ("__main__",),
)
"""The layers of inco_trio's packages and modules, lowest first. A layer imports only from itself and lower layers."""
LAYER_OF = {name: number for number, names in enumerate(LAYERS, 1) for name in names}
QUESTIONS = 10
FILES_OF_A_RELOAD = 5
FILES = 3
"""Maximum number of files that docs/design.md names for a question that is not about a reload."""


def dotted(path: Path) -> str:
    """Return a module's dotted name below inco_trio, such as `proxy.fleet`. `proxy/__init__.py` is named `proxy`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the inco_trio modules that `tree` imports when executed, except those imported only for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imported(other)
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("inco_trio.") in MODULES else str(node.module) for name in inside]
        yield from (name.removeprefix("inco_trio").lstrip(".") for name in names if name.split(".")[0] == "inco_trio")
        yield from imported(node)


IMPORTS = {name: {*imported(ast.parse(path.read_text()))} for name, path in MODULES.items() if name}


def test_every_module_belongs_to_a_layer() -> None:
    assert {name.partition(".")[0] for name in MODULES if name} == {*LAYER_OF}


def test_imports_go_down() -> None:
    upward = []
    for name, others in IMPORTS.items():
        home = name.partition(".")[0]
        for other in others:
            there = other.partition(".")[0]
            if there != home and LAYER_OF.get(there, len(LAYERS)) >= LAYER_OF[home]:
                upward.append(f"{name} imports {other or 'inco_trio'}")
    assert upward == []


def test_no_modules_import_each_other() -> None:
    # If modules import each other, prepare() raises a CycleError that names them.
    graphlib.TopologicalSorter({name: others - {name} for name, others in IMPORTS.items()}).prepare()


def test_no_two_modules_have_the_same_name() -> None:
    count = Counter(path.stem for path in MODULES.values() if path.stem != "__init__")
    assert [name for name, number in count.items() if number > 1] == []


def section(title: str) -> str:
    """Return the text of a section of docs/design.md."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of a section's table, row by row, without the header row."""
    lines = re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE)
    return [re.split(r" \| ", line) for line in lines[1:]]


def paths(text: str) -> list[str]:
    """Return the paths in `text`: words in backticks that end with a file suffix or a slash."""
    return re.findall(r"`((?:[\w.-]+/)*[\w.-]+(?:\.(?:py|lua|md|c)|/))`", text)


def test_the_page_has_the_layers() -> None:
    found: dict[int, list[str]] = {}
    for layer, name, *_ in rows("Packages and modules"):
        found.setdefault(int(layer), []).append(name.strip("`").removesuffix("/").removesuffix(".py"))
    assert {number: sorted(names) for number, names in found.items()} == dict(enumerate(map(sorted, LAYERS), 1))


def test_the_page_has_each_module() -> None:
    named = {Path(path) for _, name, *_ in rows("Packages and modules") for path in paths(name) if path.endswith(".py")}
    for package in section("The modules of each package").split("\n### ")[1:]:
        directory = package.partition("\n")[0].strip("`")
        for cell in re.findall(r"^\| (`.*?) \| ", package, re.MULTILINE):
            named |= {Path(directory, path) for path in paths(cell)}
    modules = {path.relative_to(PACKAGE) for path in MODULES.values() if path.name != "__init__.py"}
    assert modules <= named
    assert [path for path in named if not (PACKAGE / path).exists()] == []


def test_the_files_that_the_page_names_exist() -> None:
    outside = PAGE.replace(section("The modules of each package"), "")
    named = paths(outside)
    assert len(named) > QUESTIONS
    assert [path for path in named if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


def test_where_to_read_is_short() -> None:
    table = rows("Where to read")
    questions = {question.partition(",")[0] for question, _ in table}
    assert len(questions) == QUESTIONS
    for question, where in table:
        files = paths(where)
        assert 0 < len(files) <= (FILES_OF_A_RELOAD if "reload" in question else FILES), question
        assert len(files) == len(set(files)), question


def test_each_unmeasured_test_exists() -> None:
    tests = Path(__file__).parent
    lines = (tests / "unmeasured.txt").read_text().splitlines()
    assert lines == sorted(set(lines))
    texts = {line.partition("::")[0]: (tests.parent / line.partition("::")[0]).read_text() for line in lines}
    assert [line for line in lines if f"def {line.partition('::')[2]}(" not in texts[line.partition("::")[0]]] == []
