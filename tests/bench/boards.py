"""Many boards in one process, on `unix:` links: memory, start time, and how boards affect each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from inco_trio.frame import encode
from inco_trio.linux.inotify import IN_CLOSE_WRITE, Inotify
from netns.hang import HANG

from .figures import Figure, Goal, quantile
from .processes import memory_kib, switches, wake_ups
from .rivals import INCO, PYTHON, BenchError, C, Lab

__all__ = ["Place", "boards_figures"]

FRAME = encode(b"ihub_hwwd_irq", bytes.fromhex("020000000001"))
GAP = 0.0005
"""Pause in seconds between an arrival and the next notification in a closed loop."""
FLOOD_RATE = 50_000
IMPORTS = "import inco_trio.service.daemon, inco_trio.service.many_boards"
PROCESSES = 10
"""Number of one-board processes that are measured to estimate the memory of 1,000 such processes."""


class Place:
    """A directory with `number` boards and the process that runs them. This program acts as core 1 of board 0."""

    def __init__(self, home: Path, number: int, stack: ExitStack) -> None:
        self.home = home
        (home / "boards").mkdir()
        (home / "s").mkdir()
        for index in range(number):
            board = {"link": f"unix:{home}/s/{index}.0,peer={home}/s/{index}.1", "irq_dir": f"{home}/irq/{index}"}
            (home / f"boards/b{index}.json").write_text(json.dumps(board))
        self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.callback(self.peer.close)
        self.peer.settimeout(HANG)
        self.peer.bind(f"{home}/s/0.1")
        self._consumer = Inotify()
        stack.callback(self._consumer.close)
        self._buffer = memoryview(bytearray(4096))

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[int, float]]:
        """Run the process; yield its PID and the time in seconds from exec to readiness."""
        reader, writer = os.pipe()
        command = [
            *PYTHON,
            "-m",
            "inco_trio",
            "run",
            "--boards",
            f"{self.home}/boards",
            "--notification-fd",
            str(writer),
        ]
        log = self.home / "log"
        begin = time.monotonic()
        with (
            log.open("wb") as errors,
            subprocess.Popen(command, pass_fds=[writer], stderr=errors, env=INCO.environment) as process,
        ):
            try:
                os.close(writer)
                readable = select.select([reader], [], [], HANG)[0] and os.read(reader, 1)
                ready = time.monotonic() - begin
                os.close(reader)
                if not readable:
                    raise BenchError(f"not ready: {' '.join(command)}\n{log.read_text()}")
                self._consumer.watch(f"{self.home}/irq/0/message_5_state", IN_CLOSE_WRITE)
                yield process.pid, ready
                process.terminate()
                if process.wait(HANG):
                    raise BenchError(f"exit code {process.returncode}\n{log.read_text()[-4000:]}")
            finally:
                if process.poll() is None:
                    process.kill()

    def inbound(self) -> float:
        """Return the time in microseconds from sending a frame to the close of board 0's state file."""
        begin = time.monotonic_ns()
        self.peer.sendto(FRAME, f"{self.home}/s/0.0")
        if not select.select([self._consumer.fd], [], [], HANG)[0]:
            raise BenchError("a frame was lost")
        end = time.monotonic_ns()
        self._consumer.read_into(self._buffer)
        return (end - begin) / 1000

    def outbound(self) -> float:
        """Return the time in microseconds from the close of board 0's trigger file to the arrival of its frame."""
        trigger = os.open(f"{self.home}/irq/0/message_6_trig", os.O_WRONLY)
        os.write(trigger, b"1")
        begin = time.monotonic_ns()
        os.close(trigger)
        self.peer.recv(200)
        return (time.monotonic_ns() - begin) / 1000

    def closed_loop(self, count: int) -> dict[str, list[float]]:
        """Send `count` notifications in each direction, one at a time, and return their latencies."""
        taken: dict[str, list[float]] = {"inbound": [], "outbound": []}
        with _never_kept_waiting():
            for _ in range(count):
                for way, measure in (("inbound", self.inbound), ("outbound", self.outbound)):
                    time.sleep(GAP)  # Limit the rate of the notifications.
                    taken[way].append(measure())
        return taken

    @contextlib.contextmanager
    def flooded(self, flood: Path, rates: list[float]) -> Iterator[None]:
        """Flood board 1 with up to FLOOD_RATE frames per second, and append the accepted rate to `rates`."""
        paths = (f"{self.home}/s/1.1", f"{self.home}/s/1.0")
        command = [str(flood), *paths, str(FLOOD_RATE), FRAME.hex()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                yield
                process.terminate()
                rates.append(float(process.stdout.readline()))
            finally:
                process.kill()


@contextlib.contextmanager
def _never_kept_waiting() -> Iterator[None]:
    """Give this process real-time priority if permitted (sched(7)), so that it never waits for a CPU."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def boards_figures(lab: Lab, number: int, pairs: int, lone: int, idle: float) -> list[Figure]:
    """Measure one board and `number` boards alternately, and return the figures."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    one, many = "1 board", f"{number:,} boards"
    rates: list[float] = []
    for pair in range(pairs):
        for name, boards in ((one, 1), (many, number)):
            lab.say(f"pair {pair + 1}/{pairs}: {name}")
            with tempfile.TemporaryDirectory(dir=lab.scratch) as home, ExitStack() as stack:
                place = Place(Path(home), boards, stack)
                begin = time.monotonic()
                subprocess.run([*PYTHON, "-c", IMPORTS], check=True, env=INCO.environment)
                imports = time.monotonic() - begin
                with place.running() as (pid, ready):
                    samples["ready"][name].append(ready - imports)
                    place.closed_loop(50)
                    samples["memory"][name].append(memory_kib(pid, "VmRSS") / 1024)
                    time.sleep(0.5)  # Wait for the last wake-ups that the load caused.
                    before = switches(pid)
                    time.sleep(idle)  # Count the wake-ups during this time.
                    samples["idle"][name].append(wake_ups(before, switches(pid)))
                    for way, taken in place.closed_loop(lone).items():
                        samples[way][name].append(quantile(taken, 0.5))
                        samples[f"{way} p99"][f"{name}, calm"].append(quantile(taken, 0.99))
                    if boards > 1:
                        with place.flooded(lab.build / "flood", rates):
                            for way, taken in place.closed_loop(lone).items():
                                samples[f"{way} p99"]["another flooded"].append(quantile(taken, 0.99))
    each = [(a - b) / (number - 1) for a, b in zip(samples["memory"][many], samples["memory"][one], strict=True)]
    figures = [
        Figure(f"{many}, memory", "MiB", {"a board": each}, Goal("<=", 0.3, "MiB a board"), None, _of_processes(lab)),
        Figure(f"{many}, ready after the imports", "s", {many: samples["ready"][many]}, Goal("<=", 3, "s")),
        Figure(f"{many}, idle {idle:g} s, wake-ups", "wake-ups", {many: samples["idle"][many]}, Goal("=", 0)),
    ]
    note = f"frames of the flood a second: {', '.join(f'{rate:,.0f}' for rate in rates)}"
    for way in ("inbound", "outbound"):
        calm, flooded = f"{many}, calm", "another flooded"
        p99 = {key: samples[f"{way} p99"][key] for key in (flooded, calm)}
        figures += [
            Figure(f"{many}, lone {way}, p50", "us", samples[way], Goal("<=", 1.3, "x 1 board"), (many, one)),
            Figure(f"{many}, {way} beside a flood, p99", "us", p99, Goal("<=", 3, "x calm"), (flooded, calm), note),
        ]
    return figures


def _of_processes(lab: Lab) -> str:
    """Estimate the memory of 1,000 one-board processes from the proportional set size (PSS) of `PROCESSES` of them."""
    said = []
    for program in (C, INCO):
        with ExitStack() as stack:
            runs = [stack.enter_context(lab.running(program, 3)) for _ in range(PROCESSES)]
            total = sum(_pss_kib(run.pid) for run in runs) / 1024
        said.append(f"{program.name} {1000 * total / PROCESSES:,.0f} MiB")
    return f"1,000 processes, from {PROCESSES}: {', '.join(said)}"


def _pss_kib(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if found is None:
        raise BenchError("the kernel reports no proportional set size (Pss)")
    return int(found[1])
