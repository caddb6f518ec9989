"""The pytest plugin: fixtures `board` and `make_board`, the marker `inco_trio`, and what a failed test shows.

pytest loads this module wherever the package is installed, so it imports nothing else of it until a board is made.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from inco_trio.testing.board import Board

__all__ = ["MakeBoard", "board", "make_board"]

MakeBoard = Callable[..., "Board"]
"""Makes a board: the arguments are those of `inco_trio.testing.open_board` but the directory."""

MARKER = "inco_trio(config=None, signals=None, link='unix'): what the board of this test is, see inco_trio.testing"
MISSING = "inco_trio_missing"
RECORDING = "inco-trio.pcapng"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inco-trio")
    group.addoption(
        "--inco-trio-in-process",
        action="store_true",
        help="boards have their proxy in the process of the test, instead of one of its own",
    )
    parser.addini(
        MISSING,
        "what becomes of a test that needs QEMU, or namespaces, and there are none: fail or skip",
        default="fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    if config.getini(MISSING) not in {"fail", "skip"}:
        raise pytest.UsageError(f"{MISSING} = {config.getini(MISSING)}: is neither fail nor skip")


def pytest_unconfigure() -> None:
    # Whatever ended the tests, Ctrl-C as well: no process, socket or directory of ours stays.
    if "inco_trio.testing.engine" in sys.modules:
        from inco_trio.testing.engine import stop_engine

        for left in _open_boards():
            left.close()
        stop_engine()


@pytest.fixture
def make_board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeBoard]:
    """Make boards: `make_board(signals={"door_irq": "inbound"})`; each is closed after the test."""
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
def board(request: pytest.FixtureRequest, make_board: MakeBoard) -> Board:
    """A board whose proxy runs, set up by the marker `inco_trio`; both cores are the test's."""
    options: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers("inco_trio"))):
        if marker.args or not marker.kwargs.keys() <= {"config", "signals", "link"}:
            pytest.fail("the marker inco_trio takes config=, signals= and link=, by name", pytrace=False)
        options |= marker.kwargs
    return make_board(**options)


# ------------------------------------------------------------------------------------------------------------ reports


def _open_boards() -> frozenset[Board]:
    if "inco_trio.testing.board" not in sys.modules:
        return frozenset()
    from inco_trio.testing.board import open_boards

    return open_boards()


def _is_missing(error: BaseException) -> bool:
    """Whether the machine has not what a board needs."""
    if "inco_trio.testing.board" not in sys.modules:
        return False
    from inco_trio.simulation.guest import QemuNotFoundError
    from inco_trio.simulation.world import NamespaceRefused

    return isinstance(error, QemuNotFoundError | NamespaceRefused)


def _refuse(config: pytest.Config, error: BaseException) -> NoReturn:
    """End the test with the one line of an error that is not the test's: by skipping it, if the user has chosen so."""
    if not _is_missing(error):
        pytest.fail(str(error), pytrace=False)
    if config.getini(MISSING) == "skip":
        pytest.skip(str(error))
    pytest.fail(f"{error} (or set {MISSING} = skip in pytest's configuration)", pytrace=False)


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
        pytest.fail(f"the test leaves a board open: {where}: use `with open_board(...)`, or make_board", pytrace=False)


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
        _refuse(item.config, missing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for each in sorted(_open_boards(), key=lambda board: board.directory):
            recording = each.directory / RECORDING
            with contextlib.suppress(Exception):  # What a test shows is no reason to hide why it failed.
                text = each.report
                each.record(recording)
                report.sections.append((f"inco-trio {each.directory.name}", f"{text}\nrecorded in {recording}"))
    return report
