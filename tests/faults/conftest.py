"""Fixtures for a board and for Python without privileges, and the markers of all tests in this directory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Proxy, StartProxy
from tests.faults.applications import Applications, Wire, write_config
from tests.support_control import patient_clients


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: the fault suite; INCO_TRIO_FAULTS=short|full chooses how much of it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            # This timeout takes effect only if a test hangs: a test of the full suite takes minutes.
            item.add_marker(pytest.mark.timeout(7200))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patient_clients(monkeypatch)


@attrs.frozen
class Board:
    """A running proxy with the signals `in_a`, `in_b`, `out_a` and `out_b`, its applications and its core 1."""

    proxy: Proxy
    cores: Cores
    core1: Peer
    applications: Applications
    wire: Wire

    @property
    def directory(self) -> Path:
        """Return the IRQ directory."""
        return self.applications.directory

    def works(self) -> None:
        """Assert that notifications pass in both directions."""
        self.applications.reset()
        sent = self.applications.mark()
        seen = self.wire.seen["out_b"]
        self.core1.send(b"in_b")
        self.applications.trigger("out_b")
        self.applications.wait(lambda: self.applications.delivered("in_b", sent), "in_b has not been delivered")
        self.wire.wait(lambda: self.wire.seen["out_b"] > seen, "out_b has not been sent")


INBOUND = ("in_a", "in_b")
OUTBOUND = ("out_a", "out_b")


@pytest.fixture
def board_config(tmp_path: Path) -> Path:
    """Write a udrv.json with the board's signals. The IRQ directory is `board/irq`, next to this file."""
    path = tmp_path / "udrv.json"
    write_config(path, tmp_path / "board/irq", INBOUND, OUTBOUND)
    return path


@pytest.fixture
def start_board(cores: Cores, core1: Peer, proxy: StartProxy, board_config: Path) -> Iterator[Callable[..., Board]]:
    """Return a function that starts a board: `start_board(*arguments, before_ready=None)`."""
    with ExitStack() as stack:

        def start(*arguments: str, before_ready: Callable[[Proxy], None] | None = None) -> Board:
            running = proxy("--config", board_config, *arguments, ready=before_ready is None)
            if before_ready is not None:
                before_ready(running)
                running.wait_ready()
            applications = Applications(board_config.parent / "board/irq", INBOUND, OUTBOUND)
            stack.callback(applications.close)
            wire = Wire(core1)
            stack.callback(wire.close)
            return Board(running, cores, core1, applications, wire)

        yield start


@pytest.fixture
def board(start_board: Callable[..., Board]) -> Board:
    """Return a running board."""
    return start_board()


@pytest.fixture
def python_runs_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs the proxy under another program: `python_runs_under("prlimit", "--nofile=9")`."""

    def choose(*words: str) -> None:
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} {shlex.quote(sys.executable)} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return choose


@pytest.fixture
def only_net_raw(python_runs_under: Callable[..., None]) -> None:
    """Give the proxy only CAP_NET_RAW, so that file permissions apply to it even if it runs as root."""
    python_runs_under("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw")
