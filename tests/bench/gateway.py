"""Compare the gateway to an MQTT broker with a minimal program and mosquitto_pub: rate, CPU time and latency."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mqtt5

from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.mosquitto import Gateway, Mosquitto
from tests.support_control import Board

from .figures import Figure, Goal
from .rivals import BenchError

__all__ = ["gateway_figures"]

GATEWAY, FLOOR, PUB = "gateway", "trio and mqtt5", "mosquitto_pub"
PAUSE = 0.15
"""Seconds between single notifications. With shorter pauses, the proxy reports the notifications in batches."""


class Subscriber:
    """A blocking client that receives all messages below `lab/`."""

    def __init__(self, port: int, stack: ExitStack) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        stack.callback(self._socket.close)
        self._socket.settimeout(HANG)
        self._data = b""
        self._socket.sendall(mqtt5.ConnectPacket("subscriber").write())
        self._packet()
        filters = [mqtt5.TopicFilter("lab/+/inbound/#", max_qos=mqtt5.QoS.AT_MOST_ONCE)]
        self._socket.sendall(mqtt5.SubscribePacket(1, filters).write())
        self._packet()

    def _packet(self) -> mqtt5.Packet:
        while True:
            try:
                packet, length = mqtt5.read(memoryview(self._data))
            except IndexError:
                self._data += self._socket.recv(65_536)
            else:
                self._data = self._data[length:]
                return packet

    def receive(self, count: int) -> tuple[float, list[float]]:
        """Receive `count` messages; return the time in seconds from the first to the last, and each latency in us."""
        latencies: list[float] = []
        numbers: set[int] = set()
        begin = 0.0
        while len(numbers) < count:
            packet = self._packet()
            now = time.time()
            begin = begin or now
            if not isinstance(packet, mqtt5.PublishPacket):
                raise BenchError(f"the broker sent {packet}")
            body = json.loads(packet.payload)
            numbers.add(body["sequence"])
            latencies.append(1e6 * (now - body["time"]))
        if len(latencies) != count:
            raise BenchError(f"{len(latencies) - count} duplicates")
        return now - begin, latencies


def _cpu(*pids: int) -> float:
    """Return the CPU time that processes have used so far, in seconds (/proc/PID/task/TID/schedstat)."""
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class _Rig:
    """A broker with a subscriber, and a board with its proxy and a gateway."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.broker = Mosquitto(
            home / "broker", "allow_anonymous true", "max_queued_messages 0", "log_type error", verbose=False
        )
        stack.callback(self.broker.end)
        self.broker.start()
        self.subscriber = Subscriber(self.broker.port, stack)
        self._board = Board(home, stack)
        self._core1 = self._board.core1()
        self._proxy = self._board.running().pid
        gateway = Gateway(home / "gateway.log", "mqtt", self.broker.url, "--control", self._board.path)
        stack.callback(gateway.close)
        gateway.wait_ready()
        self._gateway = gateway.process
        self.lone(3)

    def backlog(self, count: int) -> tuple[float, float]:
        """Let the gateway publish `count` pending notifications. Return the rate and the CPU time per notification."""
        wait_stopped(self._gateway.pid)
        before = self._board.status()["counters"]["delivered"]
        for _ in range(count):
            self._board.inbound(self._core1)
        while self._board.status()["counters"]["delivered"] < before + count:
            pass
        used = _cpu(self._proxy, self._gateway.pid)
        self._gateway.send_signal(signal.SIGCONT)
        seconds, _ = self.subscriber.receive(count)
        return (count - 1) / seconds, 1e6 * (_cpu(self._proxy, self._gateway.pid) - used) / count

    def lone(self, count: int) -> list[float]:
        """Return the latencies of single notifications in us, from the close of the state file."""
        latencies = []
        for _ in range(count):
            time.sleep(PAUSE)  # Let all processes become idle before each notification.
            self._board.inbound(self._core1)
            latencies += self.subscriber.receive(1)[1]
        return latencies

    def floor(self, count: int, pause: float = 0) -> tuple[float, float, list[float]]:
        """Run the minimal program; return messages per second, CPU time per message in us and latencies in us."""
        words = [sys.executable, str(Path(__file__).with_name("mqtt_floor.py"))]
        words += [str(self.broker.port), str(count), str(pause)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            seconds, latencies = self.subscriber.receive(count)
            return (count - 1) / seconds, 1e6 * float(process.stdout.read()) / count, latencies

    def mosquitto_pub(self, count: int) -> float:
        """Return the rate at which mosquitto_pub publishes messages."""
        words = ["mosquitto_pub", "-V", "5", "-q", "1", "-l", "-t", "lab/pub/inbound/x", "-p", str(self.broker.port)]
        lines = "".join(
            json.dumps({"sequence": number, "boot": "0" * 16, "time": time.time(), "monotonic_ns": time.monotonic_ns()})
            + "\n"
            for number in range(count)
        )
        with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            process.stdin.write(lines)
            process.stdin.close()
            return (count - 1) / self.subscriber.receive(count)[0]


def gateway_figures(scratch: Path, pairs: int, count: int, lone: int, say: Callable[[str], None]) -> list[Figure]:
    """Measure the gateway, the minimal program and mosquitto_pub in turn."""
    rates, cpu, p50 = (defaultdict[str, list[float]](list) for _ in range(3))
    for pair in range(pairs):
        say(f"pair {pair + 1}/{pairs}")
        home = scratch / f"gateway{pair}"
        home.mkdir()
        with ExitStack() as stack:
            rig = _Rig(home, stack)
            rate, used = rig.backlog(count)
            rates[GATEWAY].append(rate)
            cpu[GATEWAY].append(used)
            rate, used, _ = rig.floor(count)
            rates[FLOOR].append(rate)
            cpu[FLOOR].append(used)
            if shutil.which("mosquitto_pub"):
                rates[PUB].append(rig.mosquitto_pub(count))
            p50[GATEWAY].append(sorted(rig.lone(lone))[lone // 2])
            p50[FLOOR].append(sorted(rig.floor(lone, PAUSE)[2])[lone // 2])
    both = (GATEWAY, FLOOR)
    note = "the CPU time includes the proxy's part after the delivery"
    return [
        Figure("gateway: notifications per second, one board", "1/s", rates, Goal(">=", 0.5, "x the floor"), both),
        Figure("gateway: CPU time per notification", "us", cpu, Goal("<=", 2.5, "x the floor"), both, note),
        Figure("gateway: single notification, p50", "us", p50, Goal("<=", 1.5, "x the floor"), both),
    ]
