"""The pytest plugin. pytest loads it in every run, so the rest of the package is imported only for the first board."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from inco_trio.testing.board import Board

__all__ = ["MakeBoard", "inco_board", "make_inco_board"]

MakeBoard = Callable[..., "Board"]
"""A function that opens a board. It has the arguments of `inco_trio.testing.open_board` except the directory."""
MARKER = "inco_trio(config=None, signals=None, link='unix'): configure the board of this test, see inco_trio.testing"
MISSING = "inco_trio_missing"
RECORDING = "inco-trio.pcapng"
HINT = "what the counters mean: https://github.com/inco-trio/inco-trio/blob/main/docs/testing.md#a-failed-test"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inco-trio")
    group.addoption(
        "--inco-trio-in-process",
        action="store_true",
        help="run the proxies inside the test process instead of as separate processes",
    )
    parser.addini(
        MISSING,
        "whether a test that needs QEMU or namespaces fails or is skipped if they are missing: fail or skip",
        default="fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    if config.getini(MISSING) not in {"fail", "skip"}:
        raise pytest.UsageError(f"{MISSING} = {config.getini(MISSING)}: expected fail or skip")


def pytest_unconfigure() -> None:
    # Leave no process, socket or directory behind, even after Ctrl-C.
    if "inco_trio.testing.engine" in sys.modules:
        from inco_trio.testing.engine import stop_engine

        for left in _open_boards():
            left.close()
        stop_engine()


@pytest.fixture
def make_inco_board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeBoard]:
    """Return a function that opens boards: `make_inco_board(signals={"door_irq": "inbound"})`."""
    from inco_trio.errors import IncoError
    from inco_trio.testing.board import open_board

    with contextlib.ExitStack() as stack:
        made = 0

        def make(**options: Any) -> Board:
            nonlocal made
            in_process = request.config.getoption("--inco-trio-in-process")
            opened = open_board(tmp_path / f"board{made or ''}", **{"in_process": in_process, **options})
            made += 1
            try:
                return stack.enter_context(opened)
            except IncoError as error:
                refused = error
            _refuse(request.config, refused)

        yield make


@pytest.fixture
def inco_board(request: pytest.FixtureRequest, make_inco_board: MakeBoard) -> Board:
    """Open a board with the options of the marker `inco_trio`. The test acts as both cores."""
    options: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers("inco_trio"))):
        if marker.args or not marker.kwargs.keys() <= {"config", "signals", "link"}:
            pytest.fail("marker inco_trio: expected only the arguments config=, signals= and link=", pytrace=False)
        options |= marker.kwargs
    return make_inco_board(**options)


def _open_boards() -> frozenset[Board]:
    if "inco_trio.testing.board" not in sys.modules:
        return frozenset()
    from inco_trio.testing.board import open_boards

    return open_boards()


def _is_missing(error: BaseException) -> bool:
    """Return whether the error means that this machine cannot run QEMU or create namespaces."""
    if "inco_trio.testing.board" not in sys.modules:
        return False
    from inco_trio.simulation.guest import QemuNotFoundError
    from inco_trio.simulation.world import NamespaceRefusedError

    return isinstance(error, QemuNotFoundError | NamespaceRefusedError)


def _refuse(config: pytest.Config, error: BaseException) -> NoReturn:
    """Fail the test with only the error message, or skip it if `inco_trio_missing` is set to skip."""
    if not _is_missing(error):
        pytest.fail(str(error), pytrace=False)
    if config.getini(MISSING) == "skip":
        pytest.skip(str(error))
    pytest.fail(f"{error} (or skip such tests: pytest -o {MISSING}=skip)", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with _refusing(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    before = _open_boards()
    with _refusing(item):
        yield
    item.stash[_LEFT] = _open_boards() - before
    for each in _open_boards():
        if (failure := each.failure()) is not None:
            pytest.fail(failure, pytrace=False)


_LEFT = pytest.StashKey[frozenset["Board"]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    yield
    leaked = item.stash.get(_LEFT, frozenset[Any]()) & _open_boards()
    for each in leaked:
        each.close()
    if leaked:
        where = ", ".join(str(each.directory) for each in leaked)
        pytest.fail(f"{where}: board left open (use `with open_board(...)` or make_inco_board)", pytrace=False)


@contextlib.contextmanager
def _refusing(item: pytest.Item) -> Iterator[None]:
    missing: Exception | None = None
    try:
        yield
    except Exception as error:
        if not _is_missing(error):
            raise
        missing = error
    if missing is not None:
        try:
            _refuse(item.config, missing)
        except (pytest.fail.Exception, pytest.skip.Exception) as refusal:
            raise refusal from None  # pluggy is handling `missing`, so pytest would print both errors.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for each in sorted(_open_boards(), key=lambda board: board.directory):
            recording = each.directory / RECORDING
            with contextlib.suppress(Exception):  # An error in the report must not hide why the test failed.
                text = each.report
                each.record(recording)
                report.sections.append((f"inco-trio {each.directory.name}", f"{text}\nrecorded in {recording}\n{HINT}"))
    return report
