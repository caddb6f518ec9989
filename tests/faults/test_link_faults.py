"""Tests in which the link goes down and up, is deleted and recreated, refuses frames, or is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inco_trio.control.client import client_of
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.faults.applications import Applications, write_config
from tests.faults.conftest import Board
from tests.faults.links import command, mac, make_again, wait_bound
from tests.faults.processes import wait_idle, work

TIMES = 20
IDLE_STRETCH = 1.0
"""Period in seconds over which the CPU time is measured."""


def test_a_link_that_flaps_loses_nothing(board: Board) -> None:
    expected = []
    for _ in range(TIMES):
        said = len(board.proxy.log)
        board.cores.link_down()
        for name in ("out_b", "out_a", "out_a", "out_b"):
            board.applications.trigger(name)
            expected.append(name)
        board.proxy.wait_log("cannot send", after=said)
        board.cores.link_up()
        begin = time.monotonic()
        board.wire.wait(lambda: len(board.wire.order) >= len(expected), "pending notifications have not been sent")
        sys.stdout.write(f"sent {1e3 * (time.monotonic() - begin):.1f} ms after the link was up\n")
        board.works()
        expected.append("out_b")
    assert board.wire.order == expected
    assert board.proxy.log.count("cannot send") == TIMES
    counters = board.proxy.counters()
    assert (counters["triggered"], counters["sent"], counters["restarts"]) == (5 * TIMES, 5 * TIMES, 0)


def down(board: Board) -> None:
    board.cores.link_down()


def no_carrier(board: Board) -> None:
    board.cores.core1.run(lambda: subprocess.run(["ip", "link", "set", board.cores.link, "down"], check=True))
    # The kernel can take a second to report the lost carrier.
    deadline = time.monotonic() + HANG
    while "state DOWN" not in command(board.cores, "ip", "-o", "link", "show", board.cores.link):
        assert time.monotonic() < deadline
    # The kernel accepts and drops frames until the proxy has noticed the lost carrier, so also wait for the proxy.
    client = client_of(board.proxy.pid)
    assert client is not None
    with client:
        while (status := client.status()[0].status) is not None and status.running:
            assert time.monotonic() < deadline


def deleted(board: Board) -> None:
    board.cores.delete_link()


@pytest.mark.parametrize("fault", [down, no_carrier, deleted])
def test_no_busy_loop_while_nothing_can_be_sent(board: Board, fault: Callable[[Board], None]) -> None:
    fault(board)
    board.applications.trigger("out_a")
    # Wait until the proxy has tried to send at least once, or has noticed that the link is down.
    board.proxy.wait_log("cannot send")
    wait_idle(board.proxy.pid)
    deadline = time.monotonic() + HANG
    while True:
        begin, before = time.monotonic(), work(board.proxy.pid)
        time.sleep(IDLE_STRETCH)  # Measure over a longer time, because `wait_idle` misses a process that polls rarely.
        done = work(board.proxy.pid) - before
        seconds = time.monotonic() - begin  # not less than the measured time, even if the test is suspended
        sys.stdout.write(f"{done} in {seconds} s\n")
        # A few retries are allowed. A proxy that polls needs at least 10 wake-ups per second. The limit of the CPU time
        # is generous, because the cost of a wake-up depends on the machine. A busy loop would use a whole CPU.
        if done.switches <= 5 * seconds and done.cpu_ns < seconds * 1e9 / 50:
            return
        # On a busy machine, a retry can need more wake-ups, but no retry is due in most seconds.
        assert time.monotonic() < deadline


def test_no_carrier_keeps_notifications_in_order(board: Board) -> None:
    no_carrier(board)
    sent = ["out_a", "out_b", "out_b", "out_a"]
    for name in sent:
        board.applications.trigger(name)
    board.proxy.wait_log("cannot send")
    board.cores.core1.run(lambda: subprocess.run(["ip", "link", "set", board.cores.link, "up"], check=True))
    board.wire.wait(lambda: len(board.wire.order) >= len(sent), "pending notifications have not been sent")
    assert board.wire.order == sent
    board.works()


def test_a_recreated_link_sends_with_its_new_address(board: Board) -> None:
    for turn in range(3):
        old, logged = mac(board.cores), len(board.proxy.log)
        board.cores.delete_link()
        board.applications.trigger("out_a")
        # Otherwise, a slow proxy would see only the new interface.
        board.proxy.wait_log("the interface is gone", after=logged)
        begin = time.monotonic()
        make_again(board.cores, board.core1)
        board.wire.wait_seen("out_a", turn + 1)
        board.proxy.wait_log("s: a new interface (index ", after=logged)
        wait_bound(board.cores)
        sys.stdout.write(f"sends and receives {1e3 * (time.monotonic() - begin):.1f} ms after the link was recreated\n")
        assert mac(board.cores) != old
        assert board.wire.sources == {mac(board.cores)}
        board.works()
        board.wire.sources.clear()
    assert board.proxy.stop() == 0


def test_a_new_mac_address_is_used_at_once(board: Board) -> None:
    command(board.cores, "ip", "link", "set", board.cores.link, "address", "02:00:00:00:00:42")
    board.proxy.counters()  # The proxy reads the address change before it answers.
    board.works()
    assert board.wire.sources == {bytes.fromhex("020000000042")}


def test_wait_link_waits_for_the_link(cores: Cores, core1: Peer, start_board: Callable[..., Board]) -> None:
    cores.delete_link()

    def wait(running: Proxy) -> None:
        running.wait_log("waiting for the link")
        wait_idle(running.pid)
        assert '"ready"' not in running.log
        make_again(cores, core1)

    start_board("--wait-link", before_ready=wait).works()


def test_a_missing_link_is_an_error(cores: Cores, proxy: StartProxy, board_config: Path) -> None:
    cores.delete_link()
    running = proxy("--config", board_config, ready=False)
    assert running.wait() == 69
    assert "no such interface" in running.log
    assert "Traceback" not in running.log


def test_a_full_device_queue_loses_nothing(board: Board) -> None:
    # The queue length is 0: each send fails with ENOBUFS, and no event reports when the queue has room.
    command(board.cores, "tc", "qdisc", "add", "dev", board.cores.link, "root", "pfifo", "limit", "0")
    sent = ["out_a", "out_b", "out_a"]
    for name in sent:
        board.applications.trigger(name)
    board.proxy.wait_log("No buffer space available")
    # Do not use `tc qdisc del`: while the kernel installs another queue, it accepts frames and drops them.
    command(board.cores, "tc", "qdisc", "change", "dev", board.cores.link, "root", "pfifo", "limit", "100")
    board.wire.wait(lambda: len(board.wire.order) >= len(sent), "pending notifications have not been sent")
    assert board.wire.order == sent
    board.proxy.wait_log("works again")
    assert board.proxy.log.count("No buffer space available") == 1


def test_thousands_are_kept_while_the_link_is_down(board: Board) -> None:
    board.cores.link_down()
    sent = []
    for number in range(6000):
        name = ("out_a", "out_b")[number % 3 == 0]
        board.applications.trigger(name)
        sent.append(name)
    board.cores.link_up()
    board.wire.wait(lambda: len(board.wire.order) >= len(sent), "pending notifications have not been sent")
    assert board.wire.order == sent
    board.works()


def test_beyond_the_bound_each_trigger_is_kept_once(board: Board) -> None:
    board.cores.link_down()
    for _ in range(12000):
        board.applications.trigger("out_a")
    board.applications.trigger("out_b")
    board.cores.link_up()
    board.wire.wait_seen("out_b")
    board.proxy.wait_log("overflowed")
    assert board.proxy.counters()["overflowed"] == 1
    assert board.wire.seen["out_a"] > 6000
    board.works()


def test_a_frame_longer_than_the_mtu_is_dropped_and_counted(cores: Cores, tmp_path: Path) -> None:
    # Only the loopback interface accepts an MTU below the length of a long wire name.
    command(cores, "ip", "link", "set", "lo", "mtu", "20")
    long = "a" * 21
    write_config(tmp_path / "udrv.json", tmp_path / "irq", [], [long, "short"])
    running = Proxy(
        cores.core0, ["lo", "--config", str(tmp_path / "udrv.json"), "--log-format", "json"], {}, tmp_path / "log"
    )
    try:
        running.wait_ready()
        applications = Applications(tmp_path / "irq", [], [long, "short"])
        applications.trigger(long)
        running.wait_log("raise the MTU")
        applications.trigger("short")
        while not (counters := running.counters())["sent"]:
            pass
        applications.close()
        assert (counters["unsendable"], counters["sent"], counters["restarts"]) == (1, 1, 0)
    finally:
        running.close()
