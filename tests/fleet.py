"""Measure many boards on one machine: a few proxy processes, one gateway for each process, and one mosquitto.

Run it with `nox -s fleet -- --boards 500 --seconds 60`. This program simulates core 1 of every board and sends to the
boards in turn. It searches for the highest total rate at which no notification is lost or waits longer than a second,
and then measures at that rate. Latency is the time from the proxy's timestamp (when it closed the state file) until a
client of the broker receives the notification.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import mqtt5

from inco_trio.frame import encode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, Inotify
from netns.fixtures import Proxy
from tests.mosquitto import Gateway, Mosquitto
from tests.support_control import MAC, Board, Client

FRAME = encode(b"ihub_hwwd_irq", MAC)
HERTZ = os.sysconf("SC_CLK_TCK")
RATES = (
    100,
    200,
    300,
    400,
    600,
    800,
    1000,
    1300,
    1600,
    2000,
    2500,
    3000,
    4000,
    5000,
    6000,
    8000,
    10_000,
    12_000,
    14_000,
)
SLEEP_MIN = 0.001
"""Minimum time in seconds between two groups of frames."""
TRIAL = 8.0
"""Duration in seconds of the trial at each rate."""
BACKLOG = 1.0
"""Maximum time in seconds that a notification is allowed to wait for the broker."""


@attrs.frozen
class Used:
    """CPU time and memory that processes have used."""

    seconds: float
    mib: float

    @classmethod
    def by(cls, *pids: int) -> Used:
        """Return the total CPU time and the current proportional set size (PSS) of processes (proc_pid_stat(5))."""
        seconds = mib = 0.0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / HERTZ
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    mib += int(line.split()[1]) / 1024
        return cls(seconds, mib)


@attrs.frozen
class Result:
    """Measurements at one rate."""

    rate: int
    seconds: float
    sent: int
    received: int
    duplicates: int
    backlog: int
    p50: float
    p99: float
    cpu: dict[str, float]
    """CPU usage in percent of one CPU, by kind of process."""
    mib: dict[str, float]

    @property
    def lost(self) -> int:
        return self.sent - self.received

    @property
    def holds(self) -> bool:
        """Whether the sender, the proxies, the gateways and the broker kept up with the rate."""
        kept = self.sent >= 0.95 * self.rate * self.seconds
        return kept and not self.lost and self.backlog <= self.rate * BACKLOG and self.p99 <= BACKLOG


def read(port: int, pipe: Connection) -> None:
    """Run as a process that subscribes to the broker and reports through `pipe` what arrived since the last report."""
    seen: set[tuple[str, int]] = set()
    duplicates = 0
    latencies: list[float] = []
    broker = socket.create_connection(("127.0.0.1", port))
    filters = [mqtt5.TopicFilter("lab/+/inbound/+", max_qos=mqtt5.QoS.AT_LEAST_ONCE)]
    broker.sendall(mqtt5.ConnectPacket("fleet-reader").write() + mqtt5.SubscribePacket(1, filters).write())
    data = b""
    while True:
        ready = select.select([broker.fileno(), pipe.fileno()], [], [])[0]
        if broker.fileno() in ready:
            data += broker.recv(1 << 18)
            now, place, acknowledgements = time.time(), 0, bytearray()
            while True:
                try:
                    packet, length = mqtt5.read(memoryview(data)[place:])
                except IndexError:
                    break
                place += length
                if isinstance(packet, mqtt5.SubAckPacket):
                    pipe.send("ready")
                elif isinstance(packet, mqtt5.PublishPacket):
                    assert packet.packet_id is not None
                    acknowledgements += mqtt5.PubAckPacket(packet.packet_id).write()
                    body = json.loads(packet.payload)
                    key = (packet.topic, body["sequence"])
                    duplicates += key in seen
                    seen.add(key)
                    latencies.append(now - body["time"])
            data = data[place:]
            broker.sendall(acknowledgements)
        if pipe.fileno() in ready:
            if pipe.recv() == "count":
                pipe.send(len(seen))
            else:
                pipe.send((len(seen), duplicates, sorted(latencies)))
                seen.clear()
                latencies.clear()
                duplicates = 0


class Fleet:
    """Proxies, gateways and a broker, with a simulated core 1 for each board."""

    def __init__(self, home: Path, stack: ExitStack, boards: int, processes: int) -> None:
        self.paths: list[tuple[str, socket.socket]] = []
        self.controls: list[Path] = []
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.callback(self._sender.close)
        self._stack = stack
        broker = Mosquitto(
            home / "broker",
            "allow_anonymous true",
            "max_queued_messages 0",
            "max_inflight_messages 1000",
            "log_type error",
            verbose=False,
        )
        stack.callback(broker.end)
        self.broker = broker.start()
        self.proxies, self.gateways = [], []
        shares = [range(first, boards, processes) for first in range(processes)]
        for number, share in enumerate(shares):
            directory, control = home / f"boards{number}", home / f"{number}.sock"
            directory.mkdir()
            for board in share:
                core0, core1 = f"{home}/b{board}-0", f"{home}/b{board}-1"
                text = json.dumps({"link": f"unix:{core0},peer={core1}", "irq_dir": f"{home}/irq{board}"})
                (directory / f"b{board}.json").write_text(text)
                peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                stack.callback(peer.close)
                peer.bind(core1)
                self.paths.append((core0, peer))
            words = ["--boards", str(directory), "--control", str(control)]
            proxy = Proxy(None, words, {}, home / f"{number}.log")
            stack.callback(proxy.close)
            proxy.wait_ready()
            self.proxies.append(proxy.pid)
            self.controls.append(control)
        for number, control in enumerate(self.controls):
            gateway = Gateway(home / f"gateway{number}.log", "mqtt", self.broker.url, "--control", control)
            stack.callback(gateway.close)
            gateway.wait_ready()
            self.gateways.append(gateway.process.pid)
        self._pipe, other = multiprocessing.Pipe()
        self._reader = multiprocessing.get_context("spawn").Process(
            target=read, args=(self.broker.port, other), daemon=True
        )
        self._reader.start()
        stack.callback(self._reader.terminate)
        assert self._pipe.recv() == "ready"

    def waiting(self) -> int:
        """Return the number of notifications that the broker has not acknowledged."""
        total = 0
        for control in self.controls:
            with ExitStack() as stack:
                for board in Client(control, stack).ask({"request": "status"})["status"]:
                    total += board["history"]["waiting"]
        return total

    def _used(self) -> dict[str, Used]:
        assert self.broker.process is not None
        return {
            "proxy": Used.by(*self.proxies), "gateway": Used.by(*self.gateways),
            "broker": Used.by(self.broker.process.pid),
        }  # fmt: skip

    def run(self, rate: int, seconds: float) -> Result:
        """Send `rate` frames per second to the boards in turn; wait until all have arrived or none arrives for 3 s."""
        self._pipe.send("report")
        self._pipe.recv()
        before, start = self._used(), time.monotonic()
        number, sent = round(rate * seconds), 0
        while sent < number and (elapsed := time.monotonic() - start) < 2 * seconds:
            due = min(number, int(elapsed * rate) + 1)
            while sent < due:
                path, peer = self.paths[sent % len(self.paths)]
                peer.sendto(FRAME, path)
                sent += 1
            # Limit the load to `rate`. Without the minimum, short sleeps would use a third of a CPU at 10,000/s.
            time.sleep(max(SLEEP_MIN, start + sent / rate - time.monotonic()))
        took = time.monotonic() - start
        backlog = self.waiting()
        last = -1
        while (count := self._ask("count")) < sent and count != last:
            last = count
            time.sleep(3)  # If nothing arrives for 3 s, the measurement ends.
        after = self._used()  # Messages published after the last frame also belong to this run.
        received, duplicates, latencies = self._ask("report")
        return Result(
            rate, took, sent, received, duplicates, backlog,
            statistics.median(latencies or [0]), (latencies or [0])[int(len(latencies) * 0.99)],
            {name: 100 * (after[name].seconds - before[name].seconds) / took for name in after},
            {name: used.mib for name, used in after.items()},
        )  # fmt: skip

    def _ask(self, question: str) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()


class Lone:
    """A board on which the latency of single notifications is measured."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        home.mkdir()
        self.board = Board(home, stack)
        self._core1 = self.board.core1()
        self.board.running()
        self._changes = Inotify()
        stack.callback(self._changes.close)
        self._changes.watch(str(self.board.irq / "message_5_state"), IN_CLOSE_WRITE)
        self._room = memoryview(bytearray(4096))
        self._trigger = self.board.irq / "message_6_trig"

    def inbound(self) -> float:
        """Return the time in seconds from sending a frame until the state file is closed."""
        start = time.perf_counter()
        self.board.inbound(self._core1)
        select.select([self._changes.fd], [], [])
        took = time.perf_counter() - start
        self._changes.read_into(self._room)
        return took

    def outbound(self) -> float:
        """Return the time in seconds from closing a trigger file until core 1 receives the frame."""
        with self._trigger.open("w") as trigger:
            trigger.write("1")
            start = time.perf_counter()
        self._core1.recv(2048)
        return time.perf_counter() - start


def local(home: Path, stack: ExitStack, rounds: int) -> str:
    """Compare the local latency with and without a gateway, in alternating rounds; return a table of medians."""
    alone, followed = Lone(home / "alone", stack), Lone(home / "followed", stack)
    broker = Mosquitto(home / "broker", "allow_anonymous true", verbose=False)
    stack.callback(broker.end)
    gateway = Gateway(home / "gateway.log", "mqtt", broker.start().url, "--control", followed.board.path)
    stack.callback(gateway.close)
    gateway.wait_ready()
    lines = ["| local path, p50 | without | with a gateway | ratio of each pair |", "|---|---|---|---|"]
    for way in ("inbound", "outbound"):
        medians: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for which, lone in enumerate((alone, followed)):
                measure = getattr(lone, way)
                times = []
                for _ in range(100):
                    times.append(measure())
                    time.sleep(0.002)  # Let the proxy and the gateway finish one notification before the next.
                medians[which].append(statistics.median(times))
        ratios = sorted(b / a for a, b in zip(*medians, strict=True))
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
        without, following = (f"{1e6 * statistics.median(some):.0f} us" for some in medians)
        lines.append(f"| {way} | {without} | {following} | {shown} |")
    assert (followed.board.status()["history"] or {}).get("followed"), gateway.log
    return "\n".join(lines)


def say(line: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def table(boards: int, result: Result) -> str:
    """Return the figures as a Markdown table."""
    cpu, mib = result.cpu, result.mib
    rows = [
        ("boards", f"{boards}"),
        ("notifications per second, all boards", f"{result.sent / result.seconds:.0f}"),
        (
            "published, received, lost, duplicates",
            f"{result.sent}, {result.received}, {result.lost}, {result.duplicates}",
        ),
        ("latency, median and p99", f"{1000 * result.p50:.1f} ms, {1000 * result.p99:.1f} ms"),
    ]
    for name in cpu:
        each = f"{1000 * mib[name] / boards:.0f} kB, {cpu[name] / boards:.3f} % of a CPU"
        rows.append((f"{name}, for each board", f"{each} ({mib[name]:.0f} MiB, {cpu[name]:.0f} % in all)"))
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def main() -> int:
    """Print the table; return 1 if a notification was lost at the rate that the search found."""
    parser = argparse.ArgumentParser(description="A fleet of boards on one machine.")
    parser.add_argument("--boards", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=int, help="use only this total rate for all boards")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of rounds for the local path (default 60)")
    parser.add_argument("--local", action="store_true", help="measure only the local path, with and without a gateway")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16_384)), hard))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home, ExitStack() as stack:
        say(local(Path(home), stack, args.rounds))
        if args.local:
            return 0
        fleet = Fleet(Path(home), stack, args.boards, args.processes)
        say(f"{args.boards} boards in {args.processes} processes")
        best = args.rate
        for rate in () if args.rate else RATES:
            tried = fleet.run(rate, TRIAL)
            say(f"{rate}/s: {'holds' if tried.holds else 'does not hold'}: {tried}")
            if not tried.holds:
                break
            best = rate
        result = fleet.run(best, args.seconds)
        while not result.holds and not args.rate and best > RATES[0]:
            say(f"{best}/s does not hold for {args.seconds:g} s: {result}")
            best = max(rate for rate in RATES if rate < best)
            result = fleet.run(best, args.seconds)
        say(table(args.boards, result))
    return 1 if result.lost else 0


if __name__ == "__main__":
    sys.exit(main())
