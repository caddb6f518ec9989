"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs

from inco_trio.errors import IncoError
from inco_trio.simulation.world import may_make_namespaces, new_user_namespace, two_cores

from .machine import describe, in_words
from .measures import FULL, MEASURES, SMOKE, Bench, Size
from .report import as_text
from .results import Results
from .rivals import BenchError, Lab, Program, another


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure, print the table, write JSON, Markdown and plots.",
        epilog=f"figures: {', '.join(MEASURES)}",
    )
    parser.add_argument("--smoke", action="store_true", help="only check that the benchmark works (one minute)")
    parser.add_argument("--only", metavar="FIGURE,...", help="measure only these figures")
    parser.add_argument("--merge", action="store_true", help="keep the other figures in --out")
    parser.add_argument("--pairs", type=int, help=f"pairs per figure (default {FULL.pairs}, smoke {SMOKE.pairs})")
    parser.add_argument("--beside", type=Path, metavar="PATH", help="also measure the inco-trio of another checkout")
    parser.add_argument("--pin", choices=["none", "split", "together"], default="none", help="CPUs of load and program")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="directory for the results (%(default)s)")
    parser.add_argument("--replot", action="store_true", help="only redraw the plots from the results in --out")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",") if arguments.only else list(MEASURES)
    for name in arguments.only:
        if name not in MEASURES:
            parser.error(f"{name}: no such figure (expected one of: {', '.join(MEASURES)})")
    if (arguments.merge or arguments.replot) and not (arguments.out / "results.json").exists():
        parser.error(f"{arguments.out}: results.json: missing (--merge and --replot need an earlier run)")
    return arguments


def _print(text: object, where: TextIO = sys.stdout) -> None:
    where.write(f"{text}\n")
    where.flush()


def _draw(results: Results, out: Path) -> None:
    from .plots import draw  # Import lazily, to keep matplotlib's memory and threads out of the measurements.

    for path in draw(results.series, out, in_words(results.runs[-1]["machine"])):
        _print(path)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _measure(arguments: argparse.Namespace, size: Size, beside: Sequence[Program], results: Results) -> list[str]:
    """Run one measurement after another, save each result immediately, and return the errors."""
    begin, current = time.monotonic(), "bench"
    faults: list[str] = []

    def say(text: str) -> None:
        _print(f"{time.monotonic() - begin:6.0f} s  {current}: {text}", sys.stderr)

    if not arguments.smoke:
        expected = sum(MEASURES[name].seconds(size) for name in arguments.only)
        say(f"about {_minutes(expected)} for {len(arguments.only)} measurements with {size.pairs} pairs each")
    with two_cores() as cores, Lab.open(cores, arguments.pin, say) as lab:
        for current in arguments.only:
            start = time.monotonic()
            try:
                measured = MEASURES[current].run(Bench(lab, size, beside))
            except (BenchError, OSError, subprocess.SubprocessError) as error:
                faults.append(f"{current}: {error}")
                say(f"failed: {error}")
                continue
            except KeyboardInterrupt:
                faults.append(f"{current}: interrupted")
                break
            took = time.monotonic() - start
            say(f"took {took:.0f} s")
            results.add(current, took, measured.figures, measured.series)
            results.save(arguments.out, list(MEASURES))
            faults += [f"{figure.name}: {fault}" for figure in measured.figures for fault in figure.faults]
    return faults


def main() -> int:
    """Run the benchmark and return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _arguments()
    out: Path = arguments.out
    if arguments.replot:
        _draw(Results.load(out), out)
        return 0
    machine = describe()
    beside = [another(arguments.beside)] if arguments.beside else []
    out.mkdir(parents=True, exist_ok=True)
    results = Results.load(out) if arguments.merge else Results()
    if not may_make_namespaces():
        new_user_namespace()
    size = SMOKE if arguments.smoke else FULL
    if arguments.pairs:
        size = attrs.evolve(size, pairs=arguments.pairs, script_pairs=min(arguments.pairs, size.script_pairs))
    run: dict[str, Any] = {
        "machine": machine,
        "arguments": " ".join(sys.argv[1:]),
        "pin": arguments.pin,
        "size": attrs.asdict(size),
    }
    results.runs.append(run)
    results.save(out, list(MEASURES))  # Fail now, not after half an hour, if the directory is not writable.
    faults = run["faults"] = _measure(arguments, size, beside, results)
    results.save(out, list(MEASURES))
    for shown in (as_text(results.figures(list(MEASURES))), out / "results.json", out / "results.md"):
        _print(shown)
    _draw(results, out)
    for fault in faults:
        _print(fault, sys.stderr)
    return 1 if faults else 0


try:
    sys.exit(main())
except (BenchError, IncoError, OSError) as error:
    sys.exit(f"bench: {error}")
except KeyboardInterrupt:
    sys.exit("bench: interrupted")
