"""The measurements of the benchmark: each function takes a `Bench` and returns rows of the table."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from inco_trio.simulation.world import Cores

from .attacks import ATTACKS, FROM_CORE1
from .boards import boards_figures
from .figures import Figure, Goal, quantile
from .gateway import gateway_figures
from .processes import memory_kib, switches, system_calls, wake_ups
from .rivals import (
    C_MODIFY,
    FLOOR,
    INCO,
    MONITORED,
    PYTHON,
    SCRIPT,
    UNASKED,
    UNRECORDED,
    BenchError,
    C,
    Flow,
    Lab,
    Load,
    Program,
    Running,
    UncountedError,
)
from .search import Outcome, Tried, highest_kept

__all__ = ["FULL", "MEASURES", "SMOKE", "Bench", "Measure", "Measured", "Size"]

TABLE = 30
"""Default number of signals (20 inbound, 10 outbound). They take turns, so consecutive events differ."""

BUILTIN_TABLE = 3
"""Number of built-in signals, one of them outbound."""

GAP_US = 500
"""Microseconds between an arrival and the next notification in a closed loop. All processes sleep during this pause."""

BURSTS = 3
"""Number of bursts per run when the benchmark compares two configurations of inco-trio."""

_BEHIND = 0.03
"""Maximum delay of the last frame, as a fraction of a probe's length. A slower program's queue would fill in 10 s."""


@attrs.frozen
class Size:
    """The size of the benchmark: how many runs and notifications it has, and how many seconds the runs take."""

    pairs: int
    script_pairs: int
    """Number of pairs in which the shell script also runs.

    The script is slow to measure and misses every goal by a wide margin.
    """
    lone: int
    """Number of single notifications per latency run."""
    burst: int
    probe: float
    sustain: float
    idle: float
    million: int
    """Number of notifications in the memory measurement."""
    steady: float
    """Duration in seconds of a run with 1,000 notifications per second in each direction."""
    point: float
    """Duration in seconds of the run for one point of the load curve."""
    tables: tuple[int, ...] = (3, 30, 300, 3000)
    links: tuple[int, ...] = (1, 8, 64)
    boards: int = 1000
    rounds: int = 10
    """Number of turns for each program in each pair of closed-loop runs."""
    loads: tuple[int, ...] = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 150_000, 200_000, 300_000)


FULL = Size(10, 3, 3000, 20_000, 1.0, 10.0, 10.0, 1_000_000, 3.0, 2.0)
SMOKE = Size(1, 1, 50, 500, 0.1, 0.2, 0.2, 8000, 0.2, 0.1, (3, 30), (1, 2), 8, 2, (500, 5000))


@attrs.frozen
class Measured:
    """The rows that one measurement adds to the table, and the data for its plot."""

    figures: Sequence[Figure]
    series: Any = None


@attrs.frozen
class Bench:
    """Everything that a measurement needs: processes and files, the sample sizes, and other checkouts to compare."""

    lab: Lab
    size: Size
    beside: Sequence[Program] = ()
    """Other checkouts of inco-trio, measured after each run of inco-trio."""

    def say(self, text: str) -> None:
        """Print progress."""
        self.lab.say(text)

    def turns(self, *programs: Program, script_pairs: int | None = None) -> Iterator[Program]:
        """Yield each program once per pair (A, B, A, B, ...), with the other checkouts directly after inco-trio.

        The script runs only in the first `script_pairs` pairs.
        """
        scripts = self.size.script_pairs if script_pairs is None else script_pairs
        for pair in range(self.size.pairs):
            for program in self.with_beside(*programs):
                if program is not SCRIPT or pair < scripts:
                    self.say(f"pair {pair + 1}/{self.size.pairs}: {program.name}")
                    yield program

    def with_beside(self, *programs: Program) -> list[Program]:
        """Return `programs`, with the other checkouts directly after inco-trio."""
        return [one for program in programs for one in ((program, *self.beside) if program is INCO else (program,))]

    def compare(
        self,
        name: str,
        unit: str,
        samples: Mapping[str, Sequence[float]],
        goal: Goal | None,
        note: str = "",
        faults: Sequence[str] = (),
    ) -> list[Figure]:
        """Return a row for the floor, which has a goal, and a row without a goal for each rival."""
        against_floor = Figure(name, unit, samples, goal, (INCO.name, FLOOR.name), note, tuple(faults))
        return [against_floor, *self.report(name, unit, samples, C, *self.beside)]

    def report(
        self, name: str, unit: str, samples: Mapping[str, Sequence[float]], *rivals: Program
    ) -> Iterator[Figure]:
        """Yield, for each rival, a row without a goal that compares inco-trio with the rival."""
        for rival in rivals:
            both = {program.name: samples[program.name] for program in (INCO, rival)}
            yield Figure(f"{name}, against {rival.name}", unit, both, None, (INCO.name, rival.name))


Samples = defaultdict[str, list[float]]


def _samples() -> Samples:
    return defaultdict(list)


def _script_note(size: Size, pairs: int | None = None) -> str:
    return f"script: {size.script_pairs if pairs is None else pairs} of {size.pairs} pairs"


class _Losses:
    """The losses that are not allowed, collected from the counts of the consumer and the program."""

    def __init__(self) -> None:
        self.lost = _samples()
        self.dropped = _samples()
        self.faults: list[str] = []

    def add(self, program: Program, flow: Flow, run: Running) -> None:
        """Record one run. Any loss by the C programs or inco-trio, and any wrong count, is a fault."""
        self.lost[program.name].append(flow.lost)
        if run.dropped is not None:
            self.dropped[program.name].append(run.dropped)
        if program is not SCRIPT and (flow.lost or flow.extra or run.dropped):
            self.faults.append(f"{program.name}: {flow.lost} lost, {flow.extra} extra, {run.dropped} dropped")


Direction = Literal["inbound", "outbound"]


def _latency(bench: Bench, direction: Direction) -> Measured:
    lone, losses = bench.size.lone, _Losses()
    pairs: dict[str, list[Flow]] = defaultdict(list)
    for program in bench.turns(INCO, FLOOR, C, SCRIPT):
        with bench.lab.running(program, TABLE) as run:
            run.warm_up()
            if direction == "inbound":
                flow = run.load(inbound=lone, in_rate=1000, latencies=True).inbound
            else:
                flow = run.load(outbound=lone, out_rate=1000, latencies=True).outbound
        losses.add(program, flow, run)
        pairs[program.name].append(flow)
    return _quantiles(bench, f"{direction} latency", pairs, losses)


def _closed_loop(bench: Bench, direction: Direction) -> Measured:
    pairs, losses = _closed_loops(bench, direction, bench.with_beside(INCO, FLOOR, C), SCRIPT)
    return _quantiles(bench, f"{direction} latency, closed loop", pairs, losses)


def _closed_loops(
    bench: Bench, direction: Direction, compared: Sequence[Program], *scripts: Program
) -> tuple[Mapping[str, Sequence[Flow]], _Losses]:
    """Return the flows of each program, one flow for each pair of runs. The scripts run only in the first pairs."""
    count, losses = bench.size.lone // bench.size.rounds, _Losses()
    pairs: dict[str, list[Flow]] = defaultdict(list)
    for pair in range(bench.size.pairs):
        bench.say(f"pair {pair + 1}/{bench.size.pairs}")
        programs = [*compared, *(scripts if pair < bench.size.script_pairs else ())]
        rounds: dict[Program, list[Flow]] = defaultdict(list)
        # All programs run at the same time, each on its own link, so that disturbances affect all of them equally.
        with contextlib.ExitStack() as stack:
            links = stack.enter_context(bench.lab.links(len(programs)))
            runs = {
                program: stack.enter_context(bench.lab.running(program, TABLE, cores))
                for program, cores in zip(programs, links, strict=True)
            }
            for run in runs.values():
                run.warm_up()
            for number in range(bench.size.rounds):
                for program in programs if number % 2 else reversed(programs):
                    if direction == "inbound":
                        flow = runs[program].load(inbound=count, gap_us=GAP_US, latencies=True).inbound
                    else:
                        flow = runs[program].load(outbound=count, gap_us=GAP_US, latencies=True).outbound
                    rounds[program].append(flow)
        for program in programs:
            flow = functools.reduce(operator.add, rounds[program])
            losses.add(program, flow, runs[program])
            pairs[program.name].append(flow)
    return pairs, losses


def _quantiles(bench: Bench, name: str, pairs: Mapping[str, Sequence[Flow]], losses: _Losses) -> Measured:
    """Return the rows for p50 and p99, and the distribution of all runs together."""
    for program, flows in pairs.items():
        if not all(flow.latencies for flow in flows):
            raise BenchError(f"{program}: nothing arrived")
    goal, note = Goal("<=", 1.1, "x floor"), _script_note(bench.size)
    figures: list[Figure] = []
    for percent in (50, 99):
        samples = {
            program: [quantile(flow.latencies, percent / 100) / 1000 for flow in flows]
            for program, flows in pairs.items()
        }
        faults = losses.faults if percent == 50 else ()
        figures += bench.compare(f"{name}, p{percent}", "us", samples, goal, note, faults)
    pooled = {program: [time for flow in flows for time in flow.latencies] for program, flows in pairs.items()}
    return Measured(
        figures, {program: [quantile(times, q / 1000) for q in range(1, 1001)] for program, times in pooled.items()}
    )


def inbound_closed_loop(bench: Bench) -> Measured:
    """Measure the time from sending a frame until the state file is closed. Send the next frame 500 us later."""
    return _closed_loop(bench, "inbound")


def outbound_closed_loop(bench: Bench) -> Measured:
    """Measure the time from closing a trigger file until its frame reaches core 1. Write the next file 500 us later."""
    return _closed_loop(bench, "outbound")


def inbound_latency(bench: Bench) -> Measured:
    """Measure the time from sending a frame until the state file is closed, with frames 1 ms apart."""
    return _latency(bench, "inbound")


def outbound_latency(bench: Bench) -> Measured:
    """Measure the time from closing a trigger file until its frame reaches core 1, with triggers 1 ms apart."""
    return _latency(bench, "outbound")


def control(bench: Bench) -> Measured:
    """Compare a proxy with a monitor to a proxy without a control socket: latency at 1,000/s, and start time."""
    times, losses = _samples(), _Losses()
    latencies: dict[str, Samples] = {"inbound": _samples(), "outbound": _samples()}
    for pair in range(bench.size.pairs):
        bench.say(f"pair {pair + 1}/{bench.size.pairs}")
        for program in (MONITORED, UNASKED) if pair % 2 else (UNASKED, MONITORED):
            with contextlib.ExitStack() as stack:
                run = stack.enter_context(bench.lab.running(program, TABLE))
                times[program.name].append(1000 * run.ready_s)
                if program is MONITORED:
                    stack.enter_context(_monitor(run.table.with_name("control.sock")))
                run.warm_up()
                flows = {
                    "inbound": run.load(inbound=bench.size.lone, in_rate=1000, latencies=True).inbound,
                    "outbound": run.load(outbound=bench.size.lone, out_rate=1000, latencies=True).outbound,
                }
            for way, flow in flows.items():
                losses.add(program, flow, run)
                latencies[way][program.name].append(quantile(flow.latencies, 0.5) / 1000)
    both, goal = (MONITORED.name, UNASKED.name), Goal("<=", 1.1, f"x {UNASKED.name}")
    return Measured(
        [
            Figure(
                "inbound latency with a monitor, p50", "us", latencies["inbound"], goal, both, "", tuple(losses.faults)
            ),
            Figure("outbound latency with a monitor, p50", "us", latencies["outbound"], goal, both),
            Figure("start to ready with a control socket", "ms", times, goal, both),
        ]
    )


def recorder(bench: Bench) -> Measured:
    """Compare proxies with and without a flight recorder: latency in a closed loop, and burst rate."""
    both = INCO.name, UNRECORDED.name
    figures: list[Figure] = []
    ways: tuple[Direction, ...] = ("inbound", "outbound")
    for way in ways:
        pairs, losses = _closed_loops(bench, way, (INCO, UNRECORDED))
        samples = {name: [quantile(flow.latencies, 0.5) / 1000 for flow in flows] for name, flows in pairs.items()}
        name, goal = f"{way} latency with the flight recorder, p50", Goal("<=", 1.02, f"x {UNRECORDED.name}")
        figures.append(Figure(name, "us", samples, goal, both, "", tuple(losses.faults)))
    rates, losses = _samples(), _Losses()
    for pair in range(bench.size.pairs):
        for program in (INCO, UNRECORDED) if pair % 2 else (UNRECORDED, INCO):
            with bench.lab.running(program, TABLE) as run:
                run.warm_up()
                for _ in range(BURSTS):
                    flow = run.load(inbound=bench.size.burst).inbound
                    losses.add(program, flow, run)
                    rates[program.name].append(flow.rate)
    goal = Goal(">=", 0.95, f"x {UNRECORDED.name}")
    name = "inbound burst with the flight recorder, rate"
    figures.append(Figure(name, "frames/s", rates, goal, both, "", tuple(losses.faults)))
    return Measured(figures)


@contextlib.contextmanager
def _monitor(path: Path) -> Iterator[None]:
    """Run `inco-trio monitor` on the proxy with the control socket `path`."""
    command = [*PYTHON, "-m", "inco_trio", "monitor", "--control", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=MONITORED.environment
    ) as process:
        try:
            assert process.stderr is not None
            if b"listening" not in process.stderr.readline():
                raise BenchError("the monitor does not listen")
            yield
        finally:
            process.terminate()


def attacks(bench: Bench) -> Measured:
    """Compare the latency at 1,000/s under each attack with the latency of the same proxy before the attack."""
    latencies: dict[str, dict[str, Samples]] = {
        name: {way: _samples() for way in ("inbound", "outbound")} for name in ATTACKS
    }
    faults: dict[str, list[str]] = defaultdict(list)
    for pair in range(bench.size.pairs):
        for name in ATTACKS:
            bench.say(f"pair {pair + 1}/{bench.size.pairs}: {name}")
            with bench.lab.running(MONITORED, TABLE) as run:
                run.warm_up()
                for state in ("no attack", "attack"):
                    with _attack(bench, run, name) if state == "attack" else contextlib.nullcontext():
                        load = run.load(inbound=bench.size.lone, in_rate=1000, latencies=True)
                        back = run.load(outbound=bench.size.lone, out_rate=1000, latencies=True)
                    for way, flow in (("inbound", load.inbound), ("outbound", back.outbound)):
                        latencies[name][way][state].append(quantile(flow.latencies, 0.99) / 1000)
                        if flow.lost:
                            faults[name].append(f"{state}: {flow.lost} {way} lost")
            if run.dropped:
                faults[name].append(f"{run.dropped} dropped")
    both = ("attack", "no attack")
    return Measured(
        [
            Figure(
                f"{way} latency, p99, {name}",
                "us",
                samples,
                None,
                both,
                "",
                tuple(faults[name]) if way == "inbound" else (),
            )
            for name, ways in latencies.items()
            for way, samples in ways.items()
        ]
    )


@contextlib.contextmanager
def _attack(bench: Bench, run: Running, name: str) -> Iterator[None]:
    """Attack the proxy while the block runs. `name` is a key of `attacks.ATTACKS`."""
    control = run.table.with_name("control.sock")
    command = [*PYTHON, "-m", "tests.bench.attacks", name, run.cores.link, str(run.directory), str(control)]
    namespace = run.cores.core1 if name in FROM_CORE1 else run.cores.core0
    start = functools.partial(subprocess.Popen[bytes], command, stdout=subprocess.PIPE, env=MONITORED.environment)
    with namespace.run(start) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BenchError(f"{name}: the attack has failed")
            yield
        finally:
            process.kill()


def burst(bench: Bench) -> Measured:
    """Measure the losses and the rate for 20,000 frames that a C program sends as fast as it can."""
    rates, losses = _samples(), _Losses()
    for program in bench.turns(INCO, FLOOR, C, SCRIPT):
        with bench.lab.running(program, TABLE) as run:
            run.warm_up()
            flow = run.load(inbound=bench.size.burst).inbound
        losses.add(program, flow, run)
        rates[program.name].append(flow.rate)
    note = _script_note(bench.size)
    dropped = "the program's own count: " + ", ".join(f"{name} {max(d):g}" for name, d in losses.dropped.items())
    return Measured(
        [
            Figure("inbound burst, lost", "frames", losses.lost, Goal("=", 0), None, dropped, tuple(losses.faults)),
            *bench.compare("inbound burst, rate", "frames/s", rates, Goal(">=", 0.9, "x floor"), note),
        ]
    )


def _try(bench: Bench, run: Running, seconds: float, behind: float, rate: float) -> Tried:
    """Send frames at `rate` for `seconds` seconds.

    The program sustains the rate if no frame is lost and the last frame is at most `behind` seconds late.
    """
    try:
        flow = run.load(inbound=round(rate * seconds), in_rate=rate).inbound
    except UncountedError:
        bench.say(f"the load generator cannot count {rate:,.0f}/s: trying a lower rate")
        return Tried(Outcome.UNCOUNTED, rate, rate)
    kept = not flow.lost and flow.total_s - flow.send_s <= behind
    return Tried(Outcome.KEPT if kept else Outcome.LOST, (flow.sent - 1) / flow.send_s, flow.rate)


def sustained(bench: Bench) -> Measured:
    """Measure the highest inbound rate at which no frame is lost."""
    rates = _samples()
    at_least: Counter[str] = Counter()
    size = bench.size
    for program in bench.turns(INCO, FLOOR, C, SCRIPT, script_pairs=1):
        # The search also tries rates that are too high, so losses are not faults.
        with bench.lab.running(program, TABLE) as run:
            run.warm_up()
            earlier = rates[program.name]
            found = highest_kept(
                # In a short run, the socket's queue hides an overload, but the last frame arrives late.
                functools.partial(_try, bench, run, size.probe, _BEHIND * size.probe),
                functools.partial(_try, bench, run, size.sustain, math.inf),
                statistics.median(earlier) if earlier else run.load(inbound=size.burst).inbound.rate,
            )
        if found is None:
            raise BenchError(f"{program.name}: loses frames at every rate that was tried")
        earlier.append(found.rate)
        at_least[program.name] += found.at_least
        bench.say(f"{program.name}: {'at least ' * found.at_least}{found.rate:,.0f}/s")
    limited = [
        f"{name}: at least, in {count} of {len(rates[name])} runs (the load generator's limit)"
        for name, count in at_least.items()
        if count
    ]
    note = "; ".join([_script_note(size, 1), *limited])
    return Measured(bench.compare(f"sustained inbound, 0 lost over {size.sustain:g} s", "frames/s", rates, None, note))


def one_trigger(bench: Bench) -> Measured:
    """Count the frames for 50,000 triggers/s on one file. The kernel merges identical unread inotify events."""
    frames, faults = _samples(), []
    for program in bench.turns(INCO, C, C_MODIFY, SCRIPT):
        with bench.lab.running(program, BUILTIN_TABLE) as run:
            run.warm_up()
            flow = run.load(outbound=bench.size.burst, out_rate=50_000).outbound
        frames[program.name].append(flow.seen)
        if program is INCO and flow.seen != flow.sent:
            faults.append(f"{flow.sent} triggers, {flow.seen} frames")
    goal = Goal("=", bench.size.burst, "frames")
    note = "C watches with IN_CLOSE_WRITE only; " + _script_note(bench.size)
    return Measured([Figure("outbound, one trigger file", "frames", frames, goal, None, note, tuple(faults))])


def many_signals(bench: Bench) -> Measured:
    """Measure CPU time per notification for several table sizes, with an inbound burst and 10,000/s outbound."""
    tables, losses = bench.size.tables, _Losses()
    inbound: dict[int, Samples] = {count: _samples() for count in tables}
    outbound: dict[int, Samples] = {count: _samples() for count in tables}
    for program in bench.turns(INCO, C_MODIFY, SCRIPT, script_pairs=1):
        for count in tables:
            with bench.lab.running(program, count) as run:
                run.warm_up(max(500, count))  # Write each register once, to allocate its memory.
                received = run.load(inbound=bench.size.burst)
                sent = run.load(outbound=bench.size.burst // 2, out_rate=10_000)
            for flow in (received.inbound, sent.outbound):
                losses.add(program, flow, run)
            inbound[count][program.name].append(1e6 * received.cpu_s / max(1, received.inbound.seen))
            outbound[count][program.name].append(1e6 * sent.cpu_s / max(1, sent.outbound.seen))
    figures = []
    for direction, costs in (("inbound", inbound), ("outbound", outbound)):
        for program in bench.with_beside(INCO, C_MODIFY):
            samples = {f"{count:,} signals": costs[count][program.name] for count in tables}
            figures.append(
                Figure(
                    f"many signals, {direction}" + ("" if program is INCO else f", {program.name}"),
                    "us CPU",
                    samples,
                    Goal("<", 1.1, "x 3 signals") if program is INCO else None,
                    (f"{tables[-1]:,} signals", f"{tables[0]:,} signals"),
                    faults=tuple(losses.faults) if (direction, program) == ("inbound", INCO) else (),
                )
            )
        figures += bench.report(
            f"many signals, {direction}, {tables[-1]:,}", "us CPU", costs[tables[-1]], *bench.beside
        )
    series = {
        direction: {
            program.name: {count: statistics.median(costs[count][program.name]) for count in tables}
            for program in (INCO, C_MODIFY, SCRIPT)
        }
        for direction, costs in (("inbound", inbound), ("outbound", outbound))
    }
    return Measured(figures, series)


def many_links(bench: Bench) -> Measured:
    """Measure many links in one process, with one `serve` each: memory after traffic, and latency of a single frame."""
    numbers, programs = bench.size.links, bench.with_beside(INCO)
    memory: dict[int, Samples] = {number: _samples() for number in numbers}
    latency: dict[int, Samples] = {number: _samples() for number in numbers}
    faults = []
    with bench.lab.links(max(numbers)) as links:
        for pair, number, program in itertools.product(range(bench.size.pairs), numbers, programs):
            bench.say(f"pair {pair + 1}/{bench.size.pairs}: {number} links, {program.name}")
            with _serving(bench, program, links[:number]) as runs:
                flows = [run.load(inbound=100, outbound=100, out_rate=10_000) for run in runs]
                runs[0].warm_up()
                memory[number][program.name].append(memory_kib(runs[0].pid, "VmRSS") / 1024)
                flow = runs[0].load(inbound=bench.size.lone, in_rate=1000, latencies=True).inbound
                latency[number][program.name].append(quantile(flow.latencies, 0.5) / 1000)
            lost = flow.lost + sum(load.inbound.lost + load.outbound.lost for load in flows)
            if lost:
                faults.append(f"{program.name}, {number} links: {lost} lost")
    least, most = min(numbers), max(numbers)
    figures = []
    for program in programs:
        judged = program is INCO
        suffix = "" if judged else f", {program.name}"
        memory_goal = Goal("<", 0.5, "MiB a link") if judged else None
        latency_goal = Goal("<", 1.3, f"x {least} links") if judged else None
        taken = {number: memory[number][program.name] for number in numbers}
        each = [(a - b) / (most - least) for a, b in zip(taken[most], taken[least], strict=True)]
        rss = ", ".join(f"{number}: {statistics.median(taken[number]):.1f}" for number in numbers)
        lone = {f"{number} links": latency[number][program.name] for number in numbers}
        ratio = (f"{most} links", f"{least} links")
        figures += [
            Figure(f"many links, memory{suffix}", "MiB", {"a link": each}, memory_goal, None, f"RSS {rss}"),
            Figure(f"many links, lone frame, p50{suffix}", "us", lone, latency_goal, ratio, faults=tuple(faults)),
        ]
        faults = []
    return Measured(figures)


@contextlib.contextmanager
def _serving(bench: Bench, program: Program, links: Sequence[Cores]) -> Iterator[list[Running]]:
    with bench.lab.place(BUILTIN_TABLE) as (directory, table):
        script = str(Path(__file__).with_name("links.py"))
        names = [cores.link for cores in links]
        with bench.lab.started(
            lambda fd: [*PYTHON, script, str(directory), str(fd), *names],
            program.environment,
            table.with_suffix(".log"),
        ) as (pid, ready):
            yield [Running(bench.lab, cores, pid, directory / cores.link, table, ready) for cores in links]


def boards(bench: Bench) -> Measured:
    """Measure one process that serves many boards from a directory (see boards.py)."""
    size = bench.size
    return Measured(boards_figures(bench.lab, size.boards, min(size.pairs, 5), size.lone // 4, min(size.idle, 3.0)))


def gateway(bench: Bench) -> Measured:
    """Measure the gateway to an MQTT broker (see gateway.py)."""
    size = bench.size
    return Measured(
        gateway_figures(bench.lab.scratch, size.pairs, min(size.burst, 8000), max(20, size.lone // 60), bench.say)
    )


def idle(bench: Bench) -> Measured:
    """Measure wake-ups and system calls without traffic."""
    wakes, calls = _samples(), _samples()
    for program in bench.with_beside(INCO, C, SCRIPT):
        bench.say(program.name)
        with bench.lab.running(program, TABLE) as run:
            run.warm_up()
            before = switches(run.pid)
            time.sleep(bench.size.idle)  # Count the wake-ups during this time.
            wakes[program.name].append(wake_ups(before, switches(run.pid)))
            counted = system_calls(run.pid, bench.size.idle, run.table.with_suffix(".strace"))
            if counted is not None:
                calls[program.name].append(counted)
    figures = [Figure(f"idle {bench.size.idle:g} s, wake-ups", "wake-ups", wakes, Goal("=", 0))]
    if calls:
        figures.append(Figure(f"idle {bench.size.idle:g} s, system calls", "calls", calls, Goal("=", 0)))
    else:
        bench.say("strace is missing or not permitted: not counting system calls")
    return Measured(figures)


IMPORT = "import trio"


def start(bench: Bench) -> Measured:
    """Measure the time from exec to readiness, and compare it with the run time of `python -c "import trio"`."""
    times = _samples()
    for pair in range(bench.size.pairs + 1):
        bench.say(f"pair {pair}/{bench.size.pairs}")
        ready = {}
        for program in bench.with_beside(INCO):
            with bench.lab.running(program, BUILTIN_TABLE) as run:
                ready[program.name] = run.ready_s
        begin = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", f"{IMPORT}; print(flush=True)"], stdout=subprocess.PIPE) as python:
            assert python.stdout is not None
            python.stdout.read(1)
            imported = time.monotonic() - begin
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORT], check=True)
        ended = time.monotonic() - begin
        with bench.lab.running(C, BUILTIN_TABLE) as run:
            bare = run.ready_s
        if pair:  # Ignore the first pair, which fills the page cache.
            for name, seconds in (ready | {IMPORT: ended, "its import only": imported, C.name: bare}).items():
                times[name].append(1000 * seconds)
    goal = Goal("<=", 1.1, f"x {IMPORT}")
    return Measured(
        [
            Figure("start to ready", "ms", times, goal, (INCO.name, IMPORT)),
            Figure("start to ready, against the end of the import", "ms", times, None, (INCO.name, "its import only")),
            *bench.report("start to ready", "ms", times, *bench.beside),
        ]
    )


def memory(bench: Bench) -> Measured:
    """Measure peak memory after a million notifications in bursts of 20,000, half of them in each direction."""
    peak, growth, losses = _samples(), _samples(), _Losses()
    command = [sys.executable, "-c", f"{IMPORT}; print(open('/proc/self/status').read())"]
    rounds = bench.size.million // (2 * bench.size.burst)
    for pair in range(bench.size.pairs):
        bench.say(f"pair {pair + 1}/{bench.size.pairs}")
        status = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak[IMPORT].append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        for program in bench.with_beside(INCO):
            with bench.lab.running(program, TABLE) as run:
                early, lost = 0, 0
                for number in range(rounds):
                    received = run.load(inbound=bench.size.burst).inbound
                    sent = run.load(outbound=bench.size.burst, out_rate=50_000).outbound
                    lost += received.lost + sent.lost
                    if number + 1 == max(1, rounds // 10):
                        early = memory_kib(run.pid, "VmRSS")
                growth[program.name].append((memory_kib(run.pid, "VmRSS") - early) / 1024)
                peak[program.name].append(memory_kib(run.pid, "VmHWM") / 1024)
            if lost:
                losses.faults.append(f"{program.name}: {lost} lost")
    many = f"{2 * rounds * bench.size.burst:,} notifications"
    return Measured(
        [
            Figure(
                f"peak memory after {many}",
                "MiB",
                peak,
                Goal("<=", 1.3, "x import trio"),
                (INCO.name, IMPORT),
                faults=tuple(losses.faults),
            ),
            *bench.report(f"peak memory after {many}", "MiB", peak, *bench.beside),
            Figure("growth from a tenth of them to all", "MiB", growth, Goal("<", 0.5, "MiB")),
        ]
    )


def cpu(bench: Bench) -> Measured:
    """Measure CPU time per notification at 1,000/s in each direction."""
    costs, losses = _samples(), _Losses()
    count = round(1000 * bench.size.steady)
    for program in bench.turns(INCO, FLOOR, C, SCRIPT):
        with bench.lab.running(program, TABLE) as run:
            run.warm_up()
            load: Load = run.load(inbound=count, in_rate=1000, outbound=count, out_rate=1000)
        for flow in (load.inbound, load.outbound):
            losses.add(program, flow, run)
        costs[program.name].append(1e6 * load.cpu_s / (load.inbound.seen + load.outbound.seen))
    note = _script_note(bench.size)
    name = "CPU a notification, 1,000/s each way"
    return Measured(bench.compare(name, "us", costs, None, note, losses.faults))


def load_curve(bench: Bench) -> Measured:
    """Measure the handled rate for each offered rate, for the plot."""
    curve: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for program in (INCO, C, SCRIPT):
        for rate in bench.size.loads:
            bench.say(f"{program.name}: {rate:,}/s")
            with bench.lab.running(program, TABLE) as run:
                run.warm_up()
                try:
                    flow = run.load(inbound=round(rate * bench.size.point), in_rate=rate).inbound
                except UncountedError:
                    bench.say(f"skipping {rate:,}/s: the load generator could not count all arrivals")
                    continue
            curve[program.name].append((flow.sent / flow.send_s, flow.rate, flow.lost))
    return Measured([], curve)


@attrs.frozen
class Measure:
    """A measurement and its duration on a VM with two CPUs: `fixed` seconds plus `pair` seconds per pair."""

    run: Callable[[Bench], Measured]
    fixed: float
    pair: float

    def seconds(self, size: Size) -> float:
        """Return the expected duration for `size`."""
        return self.fixed + self.pair * size.pairs


MEASURES: dict[str, Measure] = {
    "inbound-closed-loop": Measure(inbound_closed_loop, 12, 10),
    "outbound-closed-loop": Measure(outbound_closed_loop, 12, 10),
    "inbound-latency": Measure(inbound_latency, 18, 12),
    "outbound-latency": Measure(outbound_latency, 18, 12),
    "control": Measure(control, 2, 14),
    "recorder": Measure(recorder, 12, 14),
    "attacks": Measure(attacks, 0, 120),
    "burst": Measure(burst, 9, 3),
    "sustained": Measure(sustained, 60, 45),
    "one-trigger": Measure(one_trigger, 12, 4),
    "many-signals": Measure(many_signals, 25, 18),
    "many-links": Measure(many_links, 0, 22),
    "boards": Measure(boards, 110, 0),
    "gateway": Measure(gateway, 0, 15),
    "idle": Measure(idle, 65, 0),
    "start": Measure(start, 1, 1.2),
    "memory": Measure(memory, 0, 18),
    "cpu": Measure(cpu, 15, 12),
    "load-curve": Measure(load_curve, 100, 0),
}
