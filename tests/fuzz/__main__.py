"""Run the fuzz targets, two at a time, and print a table: `python -m tests.fuzz [TARGET...] --minutes 30`.

The targets share the time equally. The directory given with `--corpus` keeps the inputs that reach new code, and the
next run starts with these inputs. If a target fails, the program also keeps the input and prints a command that
reproduces the failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from tests.fuzz.targets import TARGETS

TOGETHER = 2
"""Number of targets that run at the same time."""
INPUT_MAX = 4096
"""Maximum size of a generated input in bytes. Seeds can be larger."""
FOUND = re.compile(r"\bTest unit written to (.*)$", re.MULTILINE)


@attrs.frozen
class Outcome:
    target: str
    inputs: int
    seconds: float
    corpus: int
    """Number of inputs in the corpus, each of which reaches different code."""
    found: str | None
    """The file with the input that made the target fail, or None."""
    output: str


def fuzz(target: str, corpus: Path, seconds: float, runs: int | None) -> Outcome:
    """Fuzz one target for `seconds` seconds, or with `runs` inputs if `runs` is not None."""
    place = corpus / target
    place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[target].seeds):
        (place / f"seed-{number}").write_bytes(seed)
    limit = f"-runs={runs}" if runs is not None else f"-max_total_time={max(1, round(seconds))}"
    options = [limit, f"-max_len={INPUT_MAX}", f"-artifact_prefix={place}-", "-print_final_stats=1", "-timeout=60"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.one", target, *options, str(place)],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stdout)
    written = FOUND.search(done.stdout)
    return Outcome(
        target,
        int(executed[1]) if executed else 0,
        time.monotonic() - started,
        len(list(place.iterdir())),
        (written[1] if written else "no file") if done.returncode else None,
        done.stdout,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    rows = ["| target | inputs | per second | corpus | found |", "|---|---|---|---|---|"]
    for each in outcomes:
        rate = each.inputs / each.seconds
        rows.append(f"| {each.target} | {each.inputs:,} | {rate:,.0f} | {each.corpus} | {each.found or 'nothing'} |")
    rows.append(f"| total | {sum(each.inputs for each in outcomes):,} | | | |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz all code that reads data from other programs.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=10, help="total time (default: 10)")
    parser.add_argument("--runs", type=int, help="run each target with this number of inputs instead")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="directory for the kept inputs")
    args = parser.parse_args()
    chosen = args.targets or list(TARGETS)
    if unknown := set(chosen) - TARGETS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: unknown target (expected one of {', '.join(TARGETS)})")
    seconds = args.minutes * 60 * TOGETHER / len(chosen)
    with ThreadPoolExecutor(TOGETHER) as pool:
        outcomes = list(pool.map(lambda target: fuzz(target, args.corpus, seconds, args.runs), chosen))
    for each in outcomes:
        if each.found is not None:
            sys.stdout.write(f"{each.output[-4000:]}\nrepeat: python -m tests.fuzz.one {each.target} {each.found}\n")
    sys.stdout.write(table(outcomes) + "\n")
    return any(each.found is not None for each in outcomes)


if __name__ == "__main__":
    sys.exit(main())
