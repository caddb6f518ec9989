"""Test scenarios with a proxy under s6 and a real core 1, for all kinds of links.

Core 1 is a bare-metal guest in QEMU. It answers outbound signals with inbound signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.simulation.guest import Guest
from inco_trio.simulation.world import Namespace
from netns.fixtures import Consumer
from tests.faults.processes import wait_idle, wait_stopped
from tests.faults.supervised import Service, is_proxy, main_process, wait_path, write_scandir
from tests.support_proxy import trigger, write_udrv

__all__ = ["SCENARIOS", "Board", "Scenario"]

SIGNALS = 100
ROUND_TRIPS = int(os.environ.get("INCO_TRIO_ROUND_TRIPS", "300"))
KILLS = 10
FLOOD = 5_000  # Each frame causes two events, so a slow consumer's inotify queue (16,384 events) cannot overflow.


class Here:
    """A replacement for a `Namespace` that runs functions without changing the namespace."""

    def run(self, start: Callable[[], Any]) -> Any:
        return start()


class Board:
    """A board with a proxy under s6 in the namespace `core0`, and QEMU on `netdev` in the namespace `core1`."""

    def __init__(
        self,
        home: Path,
        link: str,
        netdev: Mapping[str, Any],
        *,
        core0: Namespace | None = None,
        core1: Namespace | None = None,
    ) -> None:
        self.home, self.irq = home, home / "irq"
        address = parse_address(link)
        self.link_knows_its_peer = isinstance(address, UnixAddress)
        """Whether the proxy considers the link down while core 1 is not running."""
        self._netdev, self._core1 = netdev, core1
        self._stack = contextlib.ExitStack()
        inbound = {f"in_{number}": f"in_{number}_state" for number in range(SIGNALS)}
        outbound = {f"out_{number}": f"out_{number}_trig" for number in range(SIGNALS)}
        config = write_udrv(home / "udrv.json", self.irq, inbound, outbound)
        write_scandir(home / "scan", link, config)
        self.service = self._stack.enter_context(Service(core0 or Here(), home / "scan", address.label))  # type: ignore[arg-type]
        self.service.wait("U")
        echoes = ",".join(f"out_{number}:in_{number}" for number in range(4, SIGNALS))
        self._rules = f"echo={echoes} reset_on=out_0 flood_on=out_1:{FLOOD}:in_1 report_on=out_2 boot=in_3"
        self.first = self.consumer(3)
        self.guest = self._stack.enter_context(self.boot())

    def boot(self) -> Guest:
        """Return a guest that resets on out_0, floods on out_1, reports counters on out_2 and echoes out_4 and up."""
        return Guest(self._netdev, self._rules, log=self.home / "guest.log", namespace=self._core1)

    def consumer(self, *numbers: int) -> Consumer:
        """Return a consumer that waits for the inbound signals with these numbers."""
        made = Consumer(*(self.irq / f"in_{number}_state" for number in numbers))
        self._stack.callback(made.close)
        return made

    def trigger(self, number: int, times: int = 1) -> None:
        """Write to the trigger file of the outbound signal with this number."""
        for _ in range(times):
            trigger(self.irq / f"out_{number}_trig")

    @property
    def pid(self) -> int:
        """The PID of the proxy, which changes with each restart."""
        return main_process(self.service.directory)

    def kill_proxy(self) -> None:
        """Kill the proxy with SIGKILL, and return once s6 has started its successor."""
        before = self.pid
        os.kill(before, signal.SIGKILL)
        wait_path(self.service.directory / "supervise/status", lambda: self.pid not in (0, before))

    def counters(self) -> dict[str, int]:
        """Return the guest's counters, which include all frames sent to it before this call."""
        self.trigger(2)
        return self.guest.wait_counters()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)


Scenario = Callable[[Board], None]


def every_signal_passes_each_way(board: Board) -> None:
    board.first.wait(1)  # The guest sends in_3 when it boots.
    numbers = range(4, SIGNALS)
    consumer = board.consumer(*numbers)
    for number in numbers:
        board.trigger(number)
    consumer.wait_at_least(len(numbers))
    assert consumer.each == {f"in_{number}_state": 1 for number in numbers}


def round_trips_survive_kills(board: Board) -> None:
    consumer = board.consumer(4)
    for number in range(ROUND_TRIPS):
        if number % (ROUND_TRIPS // KILLS) == ROUND_TRIPS // KILLS // 2:
            board.kill_proxy()
        board.trigger(4)
        # Delivery is at least once: a notification that is in flight when the proxy is killed can arrive twice.
        consumer.wait_at_least(number + 1)
    extra = consumer.count - ROUND_TRIPS
    assert extra <= 2 * KILLS
    assert board.counters()["known"] >= ROUND_TRIPS


def a_reset_loses_nothing_that_comes_after_it(board: Board) -> None:
    board.first.wait(1)
    consumer = board.consumer(4)
    for resets in range(1, 4):
        if resets % 2:
            board.trigger(0)
        else:
            board.guest.system_reset()
        board.guest.wait_ready()
        board.first.wait(1 + resets)
        board.trigger(4, 50)
        consumer.wait(50 * resets)


def a_pause_loses_nothing(board: Board) -> None:
    consumer = board.consumer(4)
    board.guest.stop()
    board.trigger(4, 300)
    board.guest.cont()
    consumer.wait(300)


def a_flood_while_the_proxy_is_stopped_loses_nothing(board: Board) -> None:
    consumer = board.consumer(1)
    pid = board.pid
    assert is_proxy(pid)
    board.trigger(1)
    board.guest.wait_for("floods: ")
    wait_stopped(pid)
    time.sleep(2)  # This scenario tests a pause of this length.
    os.kill(pid, signal.SIGCONT)
    consumer.wait(FLOOD)


def a_guest_that_is_started_again_is_found(board: Board) -> None:
    consumer, received = board.consumer(4), 0
    board.first.wait(1)
    for starts in range(1, 4):
        board.guest.kill()
        board.trigger(4, 50)
        if not board.link_knows_its_peer:
            wait_idle(board.pid)  # A slow proxy would send the frames to the new guest.
        board.guest.start()
        board.guest.wait_ready()
        board.first.wait(1 + starts)
        if board.link_knows_its_peer:
            # The proxy sends all pending frames. QEMU drops the first frame if the guest's card is not ready yet.
            arrived = board.counters()["known"] - 1
            assert arrived in (49, 50)
        else:
            # The link accepted the frames, but the network bridge dropped them because it had no port for core 1.
            assert consumer.count == received
            board.trigger(4, 50)
            arrived = 50
        received += arrived
        consumer.wait(received)


SCENARIOS: list[Scenario] = [
    every_signal_passes_each_way,
    round_trips_survive_kills,
    a_reset_loses_nothing_that_comes_after_it,
    a_guest_that_is_started_again_is_found,
    a_pause_loses_nothing,
    a_flood_while_the_proxy_is_stopped_loses_nothing,
]
