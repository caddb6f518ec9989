"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import attrs

from inco_trio.errors import IncoError
from inco_trio.world import may_make_namespaces, new_user_namespace, two_cores

from .figures import Figure
from .machine import describe
from .measures import FULL, MEASURES, SMOKE, Bench
from .report import as_json, as_markdown, as_text
from .rivals import BenchError, Lab


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure, print the table, write JSON, Markdown and plots.",
        epilog=f"figures: {', '.join(MEASURES)}",
    )
    parser.add_argument("--smoke", action="store_true", help="two minutes: shows that the benchmark works, no more")
    parser.add_argument("--only", metavar="FIGURE,...", help="only these figures")
    parser.add_argument("--pairs", type=int, help=f"pairs a figure (default {FULL.pairs}, smoke {SMOKE.pairs})")
    parser.add_argument("--pin", choices=["none", "split", "together"], default="none", help="CPUs of load and program")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where the results go (%(default)s)")
    parser.add_argument("--replot", action="store_true", help="only draw the plots again, from the results in --out")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",") if arguments.only else list(MEASURES)
    for name in arguments.only:
        if name not in MEASURES:
            parser.error(f"{name}: no such figure (there are: {', '.join(MEASURES)})")
    return arguments


def _print(text: object, where: TextIO = sys.stdout) -> None:
    where.write(f"{text}\n")
    where.flush()


def _draw(series: dict[str, Any], out: Path, machine: dict[str, Any]) -> None:
    from .plots import draw  # matplotlib's memory and threads stay out of the measurements

    where = f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}"
    for path in draw(series, out, where):
        _print(path)


def main() -> int:
    """Run the command; returns its exit code."""
    arguments = _arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    if arguments.replot:
        document = json.loads(results.read_text())
        _draw(document["series"], out, document["run"]["machine"])
        return 0
    results.touch()  # half an hour later would be late to learn that it cannot be written
    machine, begin = describe(), time.monotonic()
    if not may_make_namespaces():
        new_user_namespace()
    size = SMOKE if arguments.smoke else FULL
    if arguments.pairs:
        size = attrs.evolve(size, pairs=arguments.pairs, script_pairs=min(arguments.pairs, size.script_pairs))
    figures: list[Figure] = []
    series: dict[str, Any] = {}
    faults: list[str] = []
    with two_cores() as cores, Lab.open(cores, arguments.pin) as lab:
        for name in arguments.only:

            def say(text: str, name: str = name) -> None:
                _print(f"{time.monotonic() - begin:6.0f} s  {name}: {text}", sys.stderr)

            try:
                measured = MEASURES[name](Bench(lab, size, say))
            except BenchError as error:
                faults.append(f"{name}: {error}")
                say(f"broken: {error}")
                continue
            figures += measured.figures
            if measured.series is not None:
                series[name] = measured.series
    run = {
        "machine": machine,
        "arguments": " ".join(sys.argv[1:]),
        "pin": arguments.pin,
        "size": attrs.asdict(size),
        "seconds": round(time.monotonic() - begin),
        "broken": faults[:],
    }
    results.write_text(as_json(figures, series, run))
    (out / "results.md").write_text(as_markdown(figures, machine))
    for shown in (as_text(figures), results, out / "results.md"):
        _print(shown)
    _draw(series, out, machine)
    faults += [f"{figure.name}: {fault}" for figure in figures for fault in figure.faults]
    for fault in faults:
        _print(fault, sys.stderr)
    return 1 if faults else 0


try:
    sys.exit(main())
except (BenchError, IncoError) as error:
    sys.exit(f"bench: {error}")
