"""The measured programs, each started on core 0 as users would start it, and the load generator."""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from inco_trio.links.packet import RECEIVE_BUFFER
from inco_trio.simulation.world import Cores
from netns.hang import HANG

from .tables import signals, write_table, write_udrv

__all__ = [
    "C_MODIFY",
    "FLOOR",
    "INCO",
    "PYTHON",
    "SCRIPT",
    "BenchError",
    "C",
    "Flow",
    "Lab",
    "Load",
    "Program",
    "Running",
    "UncountedError",
    "another",
]

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]


_NAP_US = 500
"""Pause in microseconds between two reads by the load generator. At 600,000/s, the inotify queue fills in 27 ms."""

_QUIET_MS = 1000
"""A run ends after this many milliseconds without an arrival. Notifications that are still missing count as lost."""

_REPEATS = 3
"""Maximum number of attempts at a run if the load generator cannot count all arrivals."""


class BenchError(Exception):
    """The benchmark itself failed, so its figures cannot be trusted."""


class UncountedError(BenchError):
    """The load generator repeatedly failed to count all arrivals, so the run says nothing about the program."""


@attrs.frozen
class Program:
    """A measured program; `name` is its name in the table and the plots."""

    name: str
    reports_drops: bool = True
    checkout: Path | None = None
    """For inco-trio: the project directory that contains its package."""
    control: str | None = None
    """For inco-trio: the file name of its control socket, or "none" (None: the default socket)."""

    history: int | None = None
    """For inco-trio: the value of `--history` (None: the default)."""

    def command(self, lab: Lab, directory: Path, table: Path, interface: str, fd: int) -> list[str]:
        """Return the command line to run with `environment`."""
        if self.checkout is not None:
            options = ["--config", str(table.with_suffix(".json")), "--notification-fd", str(fd)]
            if self.control is not None:
                options += ["--control", "none" if self.control == "none" else str(table.with_name(self.control))]
            if self.history is not None:
                options += ["--history", str(self.history)]
            return [*PYTHON, "-m", "inco_trio", "run", interface, *options]
        arguments = [str(table), str(directory), interface, str(fd)]
        if self in (FLOOR, SCRIPT):
            return [*PYTHON, str(HERE / f"{self.name}.py"), *arguments]
        more = ["modify"] if self is C_MODIFY else []
        return [str(lab.build / "reference"), *arguments, str(RECEIVE_BUFFER), *more]

    @property
    def environment(self) -> Mapping[str, str]:
        """Return an environment in which Python finds the package."""
        return {**os.environ, "PYTHONPATH": str(self.checkout or PROJECT)}


PYTHON = (sys.executable, "-P")
"""-P keeps the working directory off sys.path, where it could hide another checkout."""

INCO = Program("inco-trio", checkout=PROJECT)
MONITORED = Program("a monitor", checkout=PROJECT, control="control.sock")
UNASKED = Program("no control socket", checkout=PROJECT, control="none")
UNRECORDED = Program("no history", checkout=PROJECT, history=0)
FLOOR = Program("floor")
C = Program("C")
C_MODIFY = Program("C, IN_MODIFY too")
SCRIPT = Program("script", reports_drops=False)


def another(checkout: Path) -> Program:
    """Return `checkout` as a program, labelled with its commit if known. Raise `BenchError` if it is unusable."""
    checkout = checkout.resolve()
    found = subprocess.run(
        [*PYTHON, "-c", "import inco_trio; print(inco_trio.__file__)"],
        env=(program := Program(checkout.name, checkout=checkout)).environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if not found or not Path(found).is_relative_to(checkout):
        raise BenchError(f"{checkout}: not a checkout of inco-trio whose package can be imported")
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return attrs.evolve(program, name=f"inco-trio {commit or checkout.name}")


@attrs.frozen
class Flow:
    """The notifications in one direction.

    `lost` and `extra` are counted per signal. `send_s` is the time in seconds from the first send to the last send, and
    `total_s` is the time to the last arrival. If requested, `latencies` contains the latency of each notification that
    arrived, in nanoseconds.
    """

    sent: int
    seen: int
    lost: int
    extra: int
    send_s: float
    total_s: float
    latencies: Sequence[int] = ()

    @property
    def rate(self) -> float:
        """Return the number of notifications that arrived per second."""
        return self.seen / self.total_s if self.total_s else 0.0

    def __add__(self, other: Flow) -> Flow:
        """Combine two runs of one program."""
        return Flow(
            self.sent + other.sent,
            self.seen + other.seen,
            self.lost + other.lost,
            self.extra + other.extra,
            self.send_s + other.send_s,
            self.total_s + other.total_s,
            [*self.latencies, *other.latencies],
        )


@attrs.frozen
class Load:
    """One run of the load generator; `cpu_s` is the CPU time of the program under test during the run."""

    inbound: Flow
    outbound: Flow
    cpu_s: float


@attrs.define
class Running:
    """A program that runs on a link, with its directory and signal table. `dropped` is set once the program ends."""

    lab: Lab
    cores: Cores
    pid: int
    directory: Path
    table: Path
    ready_s: float
    """Time in seconds from exec to readiness."""
    dropped: int | None = None

    def load(
        self,
        *,
        inbound: int = 0,
        in_rate: float = 0,
        outbound: int = 0,
        out_rate: float = 0,
        gap_us: int = 0,
        latencies: bool = False,
    ) -> Load:
        """Send `inbound` and `outbound` notifications at the given rates per second (0: as fast as possible).

        With `gap_us`, the loop is closed: each notification is sent `gap_us` after the previous one has arrived. If the
        load generator cannot count all arrivals, print a message and repeat the run.

        Raise `BenchError` if the load generator fails, and `UncountedError` if there are uncounted arrivals in every
        run.
        """
        samples = self.lab.scratch / "samples"
        amounts = (inbound, round(in_rate), outbound, round(out_rate))
        options = (self.cores.link, self.pid, *amounts, gap_us, 0 if latencies else _NAP_US, _QUIET_MS)
        for _ in range(_REPEATS):
            said = self.lab.run_load(self.cores, [self.table, self.directory, *options, samples if latencies else "-"])
            invalid = [said[way].pop("invalid") for way in ("inbound", "outbound")]
            if not any(invalid):
                break
            self.lab.say("the load generator could not count all arrivals: repeating this run")
        else:
            raise UncountedError(f"the load generator could not count all arrivals in {_REPEATS} runs")
        times = array.array("q", samples.read_bytes() if latencies else b"")
        return Load(
            inbound=Flow(**said["inbound"], latencies=_arrived(times[:inbound])),
            outbound=Flow(**said["outbound"], latencies=_arrived(times[inbound:])),
            cpu_s=said["cpu_s"],
        )

    def warm_up(self, count: int = 500) -> None:
        """Send `count` notifications in each direction, to fill caches and let the interpreter specialise its code."""
        self.load(inbound=count, in_rate=5000)
        self.load(outbound=count, out_rate=5000)


@attrs.frozen
class Lab:
    """The two cores, the compiled C programs, and a scratch directory, on a tmpfs if possible."""

    cores: Cores
    build: Path
    scratch: Path
    pin: str
    """CPU pinning: "none", "split" (load on the first CPU, program on the second) or "together" (both on the first)."""
    say: Callable[[str], None]
    """A function that prints progress."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, cores: Cores, pin: str, say: Callable[[str], None]) -> Iterator[Lab]:
        """Build the C programs with the machine's C compiler, and yield the lab."""
        shared = Path("/dev/shm")  # noqa: S108 (a tmpfs as /run on a board; the directory below it is private)
        with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as scratch:
            build = Path(scratch, "build")
            build.mkdir()
            for name in ("reference", "load", "flood"):
                command = ["cc", "-O2", "-pthread", "-o", str(build / name), str(HERE / f"{name}.c")]
                built = subprocess.run(command, capture_output=True, text=True, check=False)
                if built.returncode:
                    raise BenchError(f"{name}.c does not compile:\n{built.stderr}")
            yield cls(cores, build, Path(scratch), pin, say)

    def _pinned(self, role: str, command: Sequence[str]) -> list[str]:
        if self.pin == "none":
            return list(command)
        cpus = sorted(os.sched_getaffinity(0))
        return ["taskset", "-c", str(cpus[role == "program" and self.pin == "split"]), *command]

    def spawn(
        self, command: Sequence[str], environment: Mapping[str, str], fd: int, log: Path
    ) -> tuple[subprocess.Popen[bytes], float]:
        """Start a program in core 0's namespace; return the process and its start time (monotonic, in seconds)."""

        def inside() -> tuple[subprocess.Popen[bytes], float]:
            with log.open("wb") as errors:
                start = time.monotonic()
                argv = self._pinned("program", command)
                return subprocess.Popen(argv, pass_fds=[fd], stderr=errors, env=environment), start

        return self.cores.core0.run(inside)

    @contextlib.contextmanager
    def running(self, program: Program, count: int, cores: Cores | None = None) -> Iterator[Running]:
        """Run `program` with a table of `count` signals on the link of `cores` (default: the lab's); yield when ready.

        Raise `BenchError` if the program does not become ready or does not exit with 0.
        """
        cores = cores or self.cores
        with self.place(count) as (directory, table):
            log = table.with_suffix(".log")
            with self.started(
                lambda fd: program.command(self, directory, table, cores.link, fd), program.environment, log
            ) as (pid, ready):
                run = Running(self, cores, pid, directory, table, ready)
                yield run
            if program.reports_drops:
                found = re.findall(r"dropped\D{1,3}(\d+)", log.read_text())
                if not found:
                    raise BenchError(f"{program.name} ended without reporting how many frames were dropped")
                run.dropped = int(found[-1])

    @contextlib.contextmanager
    def links(self, number: int) -> Iterator[list[Cores]]:
        """Add `number` links between the two cores while the block runs."""
        links = [attrs.evolve(self.cores, link=f"rpmsg{index}") for index in range(number)]
        with contextlib.ExitStack() as made:
            for cores in links:
                cores.make_link()
                made.callback(cores.delete_link)
            yield links

    @contextlib.contextmanager
    def place(self, count: int) -> Iterator[tuple[Path, Path]]:
        """Yield an empty directory and the path of a table with `count` signals.

        A .json file next to the table contains the same signals for inco-trio.
        """
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            directory, table = Path(place, "irq"), Path(place, "table.txt")
            directory.mkdir()
            entries = signals(count)
            write_table(table, entries)
            write_udrv(table.with_suffix(".json"), directory, entries)
            yield directory, table

    @contextlib.contextmanager
    def started(
        self, command: Callable[[int], list[str]], environment: Mapping[str, str], log: Path
    ) -> Iterator[tuple[int, float]]:
        """Run `command(notification_fd)`; yield its PID and the time in seconds from exec to readiness."""
        reader, writer = os.pipe()
        argv = command(writer)
        process, start = self.spawn(argv, environment, writer, log)
        try:
            os.close(writer)
            readable = select.select([reader], [], [], HANG)[0] and os.read(reader, 1)
            ready = time.monotonic() - start
            os.close(reader)
            if not readable:
                raise BenchError(f"not ready: {' '.join(argv)}\n{log.read_text()}")
            yield process.pid, ready
            process.terminate()
            if process.wait(HANG) != 0:
                raise BenchError(f"exit code {process.returncode} of {' '.join(argv)}\n{log.read_text()}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run_load(self, cores: Cores, arguments: Sequence[object]) -> dict[str, Any]:
        """Run the load generator in core 1's network namespace, and return its JSON output."""
        command = self._pinned("load", [str(self.build / "load"), *map(str, arguments)])
        done = cores.core1.run(
            lambda: subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
        )
        if done.returncode:
            raise BenchError(f"the load generator failed: {done.stderr}")
        said: dict[str, Any] = json.loads(done.stdout)
        return said


def _arrived(times: Sequence[int]) -> list[int]:
    return [time for time in times if time >= 0]
