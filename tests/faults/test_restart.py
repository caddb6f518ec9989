"""Tests of restart, crash, stop and reload under s6. While no proxy is running, notifications wait in the kernel."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from inco_trio.frame import ETHERTYPE
from inco_trio.simulation.world import Cores, Peer
from tests.faults.applications import Applications, Wire, write_config
from tests.faults.conftest import INBOUND, OUTBOUND
from tests.faults.processes import wait_idle, wait_stopped
from tests.faults.supervised import Service, main_process, wait_path, write_scandir

MANY = [f"in_{number:04}" for number in range(500)], [f"out_{number:04}" for number in range(500)]


@attrs.frozen
class Supervised:
    """A proxy under s6, with its core 1 and its applications."""

    service: Service
    config: Path
    core1: Peer
    applications: Applications
    wire: Wire

    def end(self, how: str) -> None:
        """Stop (`d`) or kill (`dk`) the proxy, and wait until s6 has noticed that it has ended."""
        self.service.control(f"-{how}")
        self.service.wait("D")

    def begin(self) -> None:
        """Start the proxy and wait until it is ready."""
        self.service.control("-u")
        self.service.wait("U")

    def arrived(self, inbound: list[str], outbound: list[str], since: float) -> None:
        """Assert that all signals in both lists arrive."""
        for name in inbound:
            delivered = functools.partial(self._is_delivered, name, since)
            self.applications.wait(delivered, f"{name} has not been delivered")
        for name in outbound:
            self.wire.wait_seen(name)

    def _is_delivered(self, name: str, since: float) -> bool:
        return self.applications.closes[name] > 0 and self.applications.delivered(name, since)

    def send_all(self, inbound: list[str], outbound: list[str]) -> float:
        """Send each signal once, every third trigger by a rename, and return the start time."""
        since = self.applications.mark()
        for name in inbound:
            self.core1.send(name.encode())
        for number, name in enumerate(outbound):
            (self.applications.trigger if number % 3 else self.applications.trigger_by_rename)(name)
        return since


Supervise = Callable[..., Supervised]


@pytest.fixture
def supervise(cores: Cores, core1: Peer, tmp_path: Path) -> Iterator[Supervise]:
    """Return a function that starts a supervised proxy: `supervise(inbound, outbound)`."""
    with ExitStack() as stack:

        def start(inbound: list[str], outbound: list[str]) -> Supervised:
            config, directory = tmp_path / "udrv.json", tmp_path / "irq"
            write_config(config, directory, inbound, outbound)
            write_scandir(tmp_path / "scan", cores.link, config)
            for timeout in (tmp_path / "scan").glob("*/timeout-kill"):
                timeout.write_text("0\n")  # Never kill a slow proxy: its successor would repeat notifications.
            service = stack.enter_context(Service(cores.core0, tmp_path / "scan", cores.link))
            service.wait("U")
            applications = Applications(directory, inbound, outbound)
            stack.callback(applications.close)
            wire = Wire(core1)
            stack.callback(wire.close)
            return Supervised(service, config, core1, applications, wire)

        yield start


@pytest.mark.parametrize("how", ["d", "dk"], ids=["stopped", "killed"])
def test_notifications_that_arrive_while_no_proxy_runs_are_kept(supervise: Supervise, how: str) -> None:
    world = supervise(*MANY)
    for _ in range(2):
        world.applications.reset()
        world.wire.seen.clear()
        # Wait until the proxy is idle. If it is killed before it has recorded finished work or files that it
        # created, its successor repeats this work.
        wait_idle(main_process(world.service.directory))
        world.end(how)
        since = world.send_all(*MANY)
        world.begin()
        world.arrived(*MANY, since)
    wait_idle(main_process(world.service.directory))
    assert set(world.wire.seen.values()) == {1}
    assert set(world.applications.closes.values()) == {1}


def test_a_rename_in_a_directory_that_was_then_moved_counts(supervise: Supervise) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    # At this point, the proxy might not have read the events for the files that it created.
    world.end("dk")
    world.applications.trigger_by_rename("out_a")
    directory = world.applications.directory
    directory.rename(directory.with_name("moved"))
    world.begin()
    world.wire.wait_seen("out_a")
    # The proxy no longer watches the old directory, so a rename in this directory must not count.
    wait_idle(main_process(world.service.directory))
    (directory.with_name("moved") / "new").touch()
    (directory.with_name("moved") / "new").rename(directory.with_name("moved") / "out_a_trig")
    world.applications.trigger("out_b")
    world.wire.wait_seen("out_b")
    assert world.wire.order == ["out_a", "out_b"]


def test_a_killed_proxy_with_a_backlog_loses_nothing(supervise: Supervise) -> None:
    world = supervise(*MANY)
    pid = main_process(world.service.directory)
    wait_stopped(pid)
    since = world.send_all(*MANY)
    os.kill(pid, signal.SIGKILL)
    world.arrived(*MANY, since)


@pytest.mark.parametrize("how", ["r", "t", "h"])
def test_restarts_and_a_reload_under_traffic_lose_nothing(supervise: Supervise, how: str) -> None:
    world = supervise(*MANY)
    since = world.applications.mark()
    for turn, (inbound, outbound) in enumerate(zip(*MANY, strict=True)):
        world.send_all([inbound], [outbound])
        if turn % 100 == 50:
            world.service.wait("U")
            world.service.control(f"-{how}")
    world.arrived(*MANY, since)
    assert "Traceback" not in world.service.log
    if how == "h":
        world.service.wait_log("reloaded")
    else:
        assert "reloaded" not in world.service.log


def test_a_stop_with_a_backlog_of_8000_frames_loses_nothing(supervise: Supervise) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    pid = main_process(world.service.directory)
    wait_stopped(pid)
    # Each delivery causes two events, so the queue of the applications (16,384 events) cannot overflow.
    for _ in range(8_000):
        world.core1.send(b"in_a")
    world.service.control("-d")
    os.kill(pid, signal.SIGCONT)
    world.service.wait("D")
    by_the_first = world.applications.closes["in_a"]
    world.begin()
    world.core1.send(b"in_b")
    world.applications.wait(lambda: world.applications.closes["in_b"] > 0, "in_b has not been delivered")
    assert world.applications.closes["in_a"] == 8_000
    assert by_the_first <= 8_000


def test_a_restart_with_other_signals(supervise: Supervise) -> None:
    world = supervise([*INBOUND, "in_old"], [*OUTBOUND, "out_old"])
    world.end("dk")
    since = world.send_all(["in_a", "in_old"], ["out_a", "out_old"])
    write_config(world.config, world.applications.directory, [*INBOUND, "in_new"], [*OUTBOUND, "out_new"])
    world.begin()
    world.arrived(["in_a"], ["out_a"], since)
    wait_path(world.applications.directory / "out_new_trig")
    since = world.send_all(["in_new", "in_b"], ["out_new", "out_b"])
    world.arrived(["in_new", "in_b"], ["out_new", "out_b"], since)
    # The removed signal must be ignored, and the creation of a new trigger must not count as a notification.
    assert not world.applications.delivered("in_old", 0.0)
    assert world.wire.seen["out_new"] == 1


def test_a_reload_with_other_signals(supervise: Supervise) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    pid = main_process(world.service.directory)
    write_config(world.config, world.applications.directory, [*INBOUND, "in_new"], [*OUTBOUND, "out_new"])
    world.service.control("-h")
    world.service.wait_log("reloaded")
    since = world.send_all(["in_new", "in_a"], ["out_new", "out_a"])
    world.arrived(["in_new", "in_a"], ["out_new", "out_a"], since)
    world.config.write_text("{")
    world.service.control("-h")
    world.service.wait_log("reload refused")
    since = world.send_all(["in_b"], ["out_b"])
    world.arrived(["in_b"], ["out_b"], since)
    assert main_process(world.service.directory) == pid
    assert world.wire.seen["out_new"] == 1


def test_a_stored_socket_that_does_not_match_is_replaced(supervise: Supervise, cores: Cores) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    world.end("d")

    def foreign() -> socket.socket:
        # An earlier version of inco-trio might have stored a socket without the filter.
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))

    holder = str(world.service.scandir / "inco-trio-fdholder/s")
    listing = subprocess.run(["s6-fdholder-list", holder], check=True, capture_output=True, text=True).stdout.split()
    (identifier,) = [word for word in listing if "/link." in word]
    with cores.core0.run(foreign) as other:
        other.bind((cores.link, ETHERTYPE))
        subprocess.run(["s6-fdholder-delete", holder, identifier], check=True)
        subprocess.run(["s6-fdholder-store", holder, identifier], check=True, stdin=other.fileno())
    since = world.send_all(["in_a"], ["out_a"])
    world.begin()
    world.arrived(["in_a"], ["out_a"], since)
    world.service.wait_log("no longer matches")
    since = world.send_all(["in_b"], ["out_b"])
    world.arrived(["in_b"], ["out_b"], since)
    world.end("d")
    since = world.send_all(["in_a"], ["out_a"])
    world.begin()
    world.arrived(["in_a"], ["out_a"], since)
    assert world.service.log.count("no longer matches") == 1


@pytest.mark.parametrize("mistake", ["{", '{"file": {}}'])
def test_a_permanent_failure_is_not_retried(supervise: Supervise, mistake: str) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    good = world.config.read_text()
    world.config.write_text(mistake)
    world.service.control("-r")
    world.service.wait_log("stays down")
    world.service.wait("D")
    wait_path(world.service.directory / "supervise/status", lambda: main_process(world.service.directory) == 0)
    since = world.send_all(["in_a"], ["out_a"])
    world.config.write_text(good)
    world.begin()
    world.arrived(["in_a"], ["out_a"], since)


def test_a_missing_link_is_retried(supervise: Supervise, cores: Cores) -> None:
    world = supervise(list(INBOUND), list(OUTBOUND))
    world.end("d")
    cores.delete_link()
    world.service.control("-u")
    world.service.wait_log("no such interface")
    cores.make_link()
    world.core1.rebind()
    world.service.wait("U")
    since = world.send_all(["in_a"], ["out_a"])
    world.arrived(["in_a"], ["out_a"], since)
