"""Inject random faults for a given time: `python tests/soak.py --minutes 30`, as root.

The test prints its seed at the start and a table at the end, writes the table as JSON, and fails if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Python does not add the project to sys.path when this file is run as a script.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inco_trio.simulation.world import two_cores
from tests.faults.clients import Clients
from tests.faults.storm import FAULTS, MEMORY_FILES, Report, Storm

INTERVAL = 0.7
"""Seconds between two faults: more than 1,000 faults in half an hour, including the pauses between rounds."""


def main() -> int:
    """Run the soak test; return 1 if anything was lost or a client printed a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="duration in minutes (default: 30)")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbits(32), metavar="S", help="repeat a run with its seed"
    )
    parser.add_argument("--signals", type=int, default=1000, metavar="N", help="signals per direction (default: 1000)")
    parser.add_argument("--clients", action="store_true", help="also start and end monitor, record and status")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/soak.json"),
        metavar="FILE",
        help="file for the table (default: %(default)s)",
    )
    args = parser.parse_args()
    say(f"soak: {args.minutes:g} minutes, seed {args.seed}")
    begin = time.monotonic()
    # Both signals must end all children. A shell without a terminal might start this program with SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_FILES) as work,
        two_cores() as cores,
        Storm(cores, Path(work), count=args.signals, seed=args.seed) as storm,
        Clients(Path(f"/run/inco-trio/{cores.link}.sock"), Path(work), args.seed)
        if args.clients
        else contextlib.nullcontext() as clients,
    ):
        while time.monotonic() < begin + args.minutes * 60:
            lost = storm.report.lost
            storm.round(sorted(FAULTS), interval=INTERVAL)
            if storm.report.lost > lost:
                say(f"LOST in round {storm.report.rounds}:\n{storm.story}\n{storm.service.log[-8000:]}")
    summary = storm.report.summary(time.monotonic() - begin)
    if clients is not None:
        summary |= {f"clients: {kind}": count for kind, count in sorted((clients.started + clients.ended).items())}
        summary["clients: tracebacks"] = len(clients.tracebacks)
        say("\n".join(clients.tracebacks))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(summary, indent=2) + "\n")
    say(table(storm.report, summary))
    return 1 if storm.report.lost or (clients is not None and clients.tracebacks) else 0


def say(text: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(report: Report, summary: dict[str, object]) -> str:
    """Return the summary as a text table."""
    rows = [(name, str(value)) for name, value in summary.items() if not isinstance(value, dict)]
    rows += [(f"fault: {name}", str(count)) for name, count in sorted(report.faults.items())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value:>12}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
