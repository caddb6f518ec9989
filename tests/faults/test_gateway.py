"""Test that the broker receives everything while the gateway, a proxy under s6 and the broker itself are killed.

`INCO_TRIO_GATEWAY_SECONDS` sets the duration. To repeat a run, set `INCO_TRIO_SEED` to its seed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.frame import encode
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.applications import write_config
from tests.faults.supervised import Service, environment_form, is_proxy, main_process, wait_path, write_scandir
from tests.mosquitto import Gateway, Mosquitto, Reader
from tests.support_control import MAC, Client

SIGNALS = [f"in_{number}_irq" for number in range(50)]
TRIGGERS = [f"out_{number}_irq" for number in range(10)]
FENCES = "in_fence_irq", "out_fence_irq"
"""The signals that are sent last, one in each direction. When they have arrived, all signals have arrived."""
SECONDS = float(os.environ.get("INCO_TRIO_GATEWAY_SECONDS") or (8 if environment_form() == "short" else 60))


class World:
    """A board under s6 with a broker, a gateway and a reader. The test acts as core 1 of the board."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.stack = home, stack
        self.sent: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._calm, self._done = threading.Event(), threading.Event()
        config = home / "udrv.json"
        write_config(config, home / "irq", [*SIGNALS, FENCES[0]], [*TRIGGERS, FENCES[1]])
        link = f"unix:{home}/core0,peer={home}/core1"
        write_scandir(home / "scan", link, config)
        (name,) = [path.name for path in (home / "scan").iterdir() if path.name != "inco-trio-fdholder"]
        self.service = stack.enter_context(Service(Here(), home / "scan", name.removeprefix("inco-trio-")))  # type: ignore[arg-type]
        self.core1 = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.callback(self.core1.close)
        self.core1.bind(f"{home}/core1")
        self.service.wait("U")
        self.control = self._find_control()
        self.broker = Mosquitto(
            home / "broker", "allow_anonymous true", "persistence true", f"persistence_location {home}/broker/",
            "max_queued_messages 0",
        )  # fmt: skip
        stack.callback(self.broker.end)
        self.broker.start()
        self.reader = Reader(self.broker)
        stack.callback(self.reader.close)
        self.gateway = self._gateway()

    def _find_control(self) -> Path:
        """Return the path of the control socket that the service's process uses."""
        pid = main_process(self.service.directory)
        for path in Path("/run/inco-trio").glob("*.sock"):
            with contextlib.suppress(OSError), ExitStack() as stack:
                if Client(path, stack).greeting["pid"] == pid:
                    return path
        raise AssertionError(self.service.log)

    def _gateway(self) -> Gateway:
        gateway = Gateway(self.home / "gateway.log", "mqtt", self.broker.url, "--control", self.control)
        self.stack.callback(gateway.close)
        gateway.wait_ready()
        return gateway

    def _send(self) -> None:
        """Send signals from core 1, about 1,000 per second."""
        for number in range(sys.maxsize):
            name = SIGNALS[number % len(SIGNALS)]
            while not self._calm.is_set() and not self._send_one(name):
                pass
            if self._calm.wait(0.001):
                return

    def _send_one(self, name: str) -> bool:
        """Send one frame; return whether core 0's socket accepted it."""
        try:
            self.core1.sendto(encode(name.encode(), MAC), f"{self.home}/core0")
        except OSError:
            time.sleep(0.01)  # Limit the rate of the retries: no event reports that core 0's queue has room.
            return False
        self.sent[name] += 1
        return True

    def _trigger(self) -> None:
        """Write about 100 times per second. Alternate between the files: the kernel would merge identical events."""
        for number in range(sys.maxsize):
            name = TRIGGERS[number % len(TRIGGERS)]
            if self._calm.wait(0.01):
                return
            self._trigger_one(name)

    def _trigger_one(self, name: str) -> None:
        (self.home / f"irq/{name}_trig").write_text("1")
        self.sent[name] += 1

    def _take(self) -> None:
        """Read and discard frames as core 1 until `_done` is set."""
        while not self._done.is_set():
            if select.select([self.core1], [], [], 0.1)[0]:  # Check `_done` at least every 0.1 s.
                self.core1.recv(2048)

    @contextlib.contextmanager
    def traffic(self) -> Iterator[None]:
        threads = [threading.Thread(target=task) for task in (self._send, self._trigger)]
        taking = threading.Thread(target=self._take)
        for thread in (*threads, taking):
            thread.start()

        def end() -> None:
            self._done.set()
            taking.join()

        self.stack.callback(end)
        try:
            yield
        finally:
            self._calm.set()
            for thread in threads:
                thread.join()

    def kill_gateway(self) -> None:
        self.gateway.end(signal.SIGKILL)
        self.gateway = self._gateway()

    def stop_gateway(self) -> None:
        assert self.gateway.end() == 0
        self.gateway = self._gateway()

    def freeze_gateway(self) -> None:
        self.gateway.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # Let a backlog build up.
        self.gateway.process.send_signal(signal.SIGCONT)

    def kill_proxy(self) -> None:
        pid = main_process(self.service.directory)
        if pid and is_proxy(pid):
            os.kill(pid, signal.SIGKILL)
            self._wait_ended(pid)

    def restart_proxy(self) -> None:
        pid = main_process(self.service.directory)
        self.service.control("-r")
        self._wait_ended(pid)

    def _wait_ended(self, pid: int) -> None:
        """Wait until s6 has noticed that the process `pid` has ended."""
        wait_path(self.service.directory / "supervise/status", lambda: main_process(self.service.directory) != pid)

    def stop_broker(self) -> None:
        self.broker.end()
        time.sleep(0.3)  # Let a backlog build up.
        self.broker.start()

    def kill_broker(self) -> None:
        """Kill the broker while its queues are empty.

        A killed mosquitto loses the messages that it has acknowledged but not forwarded.
        """
        self.gateway.process.send_signal(signal.SIGSTOP)
        self.reader.settle()
        self.broker.end(signal.SIGKILL)
        self.broker.start()
        self.reader.settle()
        self.gateway.process.send_signal(signal.SIGCONT)

    def last_sequence(self) -> int:
        """Return the sequence number of the last notification, once the proxy has handled all of them."""
        deadline = time.monotonic() + HANG
        while not self._send_one(FENCES[0]):
            assert time.monotonic() < deadline
        self._trigger_one(FENCES[1])
        while True:
            with ExitStack() as stack:
                (board,) = Client(self.control, stack).ask({"request": "status"})["status"]
            if all(each["count"] for each in board["signals"] if each["signal"] in FENCES):
                return int(board["history"]["sequence"])
            assert time.monotonic() < deadline, board
            time.sleep(0.01)  # Limit the rate of the requests.

    def read_all(self) -> tuple[set[int], Counter[str], int, int]:
        """Read from the broker until the last notification arrives.

        Return the sequence numbers, the counts by signal, and the numbers of merged and duplicate notifications.
        """
        numbers: set[int] = set()
        counts: Counter[str] = Counter()
        merged = duplicates = 0
        last = self.last_sequence()
        boots = set()
        # Do not stop after `last` notifications: a merged notification can arrive twice if the gateway was killed.
        while last not in numbers:
            try:
                told = self.reader.messages.get(timeout=HANG)
            except queue.Empty:
                break
            if told.topic.split("/")[2] not in ("inbound", "outbound"):
                continue
            body, name = told.body, told.topic.split("/")[3]
            boots.add(body["boot"])
            if "count" in body:
                merged += body["count"]
                counts[name] += body["count"]
            elif body["sequence"] in numbers:
                duplicates += 1
            else:
                numbers.add(body["sequence"])
                counts[name] += 1
        assert len(boots) == 1
        return numbers, counts, merged, duplicates


@pytest.mark.timeout(SECONDS + 7200)  # This timeout takes effect only if the test hangs.
def test_nothing_is_lost_when_gateway_proxy_and_broker_are_killed(tmp_path: Path) -> None:
    seed = int(os.environ.get("INCO_TRIO_SEED") or int.from_bytes(os.urandom(4), "big"))
    dice = random.Random(seed)  # noqa: S311 - repeatable
    with ExitStack() as stack:
        world = World(tmp_path, stack)
        kinds = [
            world.kill_gateway, world.kill_proxy, world.kill_broker, world.stop_broker, world.freeze_gateway,
            world.restart_proxy, world.stop_gateway,
        ]  # fmt: skip
        with world.traffic():
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or not world.faults:
                fault = dice.choice(kinds)
                fault()
                world.faults[fault.__name__] += 1
                time.sleep(0.5)  # Limit the rate of the faults.
        world.service.wait("U")
        numbers, counts, merged, duplicates = world.read_all()
        lost = {name: sent - counts[name] for name, sent in world.sent.items() if counts[name] < sent}
        story = (
            f"seed {seed}, {SECONDS:g} s: {world.sent.total()} sent, {len(numbers)} published, "
            f"{duplicates} duplicates, {merged} merged, {sum(lost.values())} lost; {dict(world.faults)}"
        )
        sys.stdout.write(f"{story}\n")
        assert not lost, f"{story}\n{lost}\n{world.gateway.log[-3000:]}"
        assert "Traceback" not in world.gateway.log
