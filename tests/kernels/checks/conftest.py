"""Fixtures for the checks in a virtual machine. The boards' link is VLAN 4000 on `eth_rpmsg`."""

from __future__ import annotations

import contextlib
import functools
import select
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.cores.watch import Watch
from inco_trio.errors import IncoError
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores
from netns.fixtures import StartProxy
from netns.hang import HANG
from tests.support_proxy import INBOUND, OUTBOUND, trigger, write_udrv


def ip(namespace: Namespace, *commands: str) -> None:
    """Run `ip` commands in a network namespace."""
    for command in commands:
        run(namespace, f"ip {command}")


def run(namespace: Namespace, command: str) -> str:
    """Run a command in a network namespace and return its output. If it fails, the check fails with its stderr."""
    start = functools.partial(subprocess.run, shlex.split(command), capture_output=True, text=True, check=False)
    done: subprocess.CompletedProcess[str] = namespace.run(start)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture
def parents() -> Iterator[Cores]:
    """Create two cores that are connected by `eth_rpmsg`, the parent interface of the VLAN."""
    with two_cores("eth_rpmsg") as made:
        yield made


@pytest.fixture
def cores(parents: Cores) -> Cores:
    """Add the interface `rpmsg4000` (VLAN 4000) to both cores. It replaces the plain link of the other tests."""
    made = Cores(parents.core0, parents.core1, "rpmsg4000")
    for core in (made.core0, made.core1):
        add_vlan(core)
    made.link_up()
    return made


def add_vlan(core: Namespace, *options: str) -> None:
    """Create `rpmsg4000` and bring it up."""
    ip(
        core,
        f"link add link eth_rpmsg name rpmsg4000 type vlan id 4000 {' '.join(options)}",
        "link set rpmsg4000 up",
    )


class Applications(contextlib.AbstractContextManager["Applications"]):
    """Applications on core 0 that record the notifications of several signals in order."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.seen: list[str] = []
        self._watch = Watch()
        signals = [Signal(name, Direction.INBOUND, directory, INBOUND[name]) for name in names]
        self._watch.follow(signals, self._report)

    def _report(self, what: Signal | IncoError) -> None:
        assert isinstance(what, Signal), f"the applications have lost events: {what}"
        self.seen.append(what.name)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Read events until `done()` is true."""
        while not done():
            assert select.select([self._watch.fileno()], [], [], HANG)[0], f"no event; seen: {self.seen}"
            self._watch.drain()

    def __exit__(self, *raised: object) -> None:
        self._watch.close()


class Board:
    """A running proxy with its core 1 and with the applications on core 0."""

    def __init__(self, core1: Peer, directory: Path, applications: Applications) -> None:
        self.core1 = core1
        self.directory = directory
        self.applications = applications

    def exchange(self, count: int = 90) -> None:
        """Send `count` notifications of alternating signals in each direction, and check that all arrive in order."""
        self.inbound(count)
        self.outbound(count)

    def inbound(self, count: int = 90) -> None:
        names = list(INBOUND) * (count // len(INBOUND))
        self.applications.seen.clear()
        for name in names:
            self.core1.send(name.encode())
        self.applications.wait_for(lambda: len(self.applications.seen) >= len(names))
        assert self.applications.seen == names

    def outbound(self, count: int = 90) -> None:
        names = list(OUTBOUND) * (count // len(OUTBOUND))
        for name in names:
            trigger(self.directory / OUTBOUND[name])
        assert [self.next_frame() for _ in names] == names

    def next_frame(self) -> str:
        """Return the signal name in the next frame that core 1 receives."""
        return self.core1.receive(HANG)[14:].rstrip(b"\0").decode()

    def recovers(self, cores: Cores) -> None:
        """Bring the link up. Check that the pending notification is sent, and that notifications pass again."""
        cores.link_up()
        assert self.next_frame() == "redun_notify_irq"
        self.exchange()

    def only(self, name: str) -> None:
        """Send the signal `name` from core 1, and check that no other signal has arrived."""
        self.core1.send(name.encode())
        self.applications.wait_for(lambda: name in self.applications.seen)
        assert self.applications.seen == [name]
        self.applications.seen.clear()


@pytest.fixture
def udrv(tmp_path: Path, irq_dir: Path) -> Path:
    """Return the path of a configuration with six signals."""
    return write_udrv(tmp_path / "udrv.json", irq_dir)


@pytest.fixture
def make_board(proxy: StartProxy, udrv: Path, irq_dir: Path, core1: Peer) -> Iterator[Callable[..., Board]]:
    """Return a function `make_board(*options)` that starts a proxy with its core 1 and its applications."""
    with ExitStack() as stack:

        def make(*options: str) -> Board:
            proxy("--config", udrv, *options)
            applications = stack.enter_context(Applications(irq_dir, list(INBOUND)))
            return Board(core1, irq_dir, applications)

        yield make


@pytest.fixture
def board(make_board: Callable[..., Board]) -> Board:
    return make_board()
