"""Draw the plot on the page about recordings: `python -m docs.plots` writes docs/images/plot.svg."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from docs.diagrams import IMAGES
from inco_trio.capture.recording import Entry, Mark, Recorder
from inco_trio.frame import encode
from inco_trio.signals import Direction

__all__ = ["PLOT", "draw", "visible"]

PLOT = IMAGES / "plot.svg"
BOARD, MAC = "rpmsg4000", bytes.fromhex("020000000001")
BEGIN_NS = round(datetime(2026, 11, 24, 0, 22, tzinfo=UTC).timestamp()) * 10**9
MS = 10**6
SIGNAL, ANSWER, BLOCKED = "redun_notify_irq", "ihub_hwwd_irq", "ihub_reset_irq"
DIRECTIONS = {SIGNAL: Direction.OUTBOUND, ANSWER: Direction.INBOUND, BLOCKED: Direction.INBOUND}
DOWN, UP = 36_000, 42_500
"""The times in ms at which the link goes down and comes up."""
WRITABLE = 20_000
"""The time in ms from which the state file of BLOCKED can be written."""


def events() -> Iterator[Entry | Mark]:
    """Yield the contents of a recording of one minute: signals that core 1 answers, late notifications, and marks."""
    for time in (*range(0, DOWN, 500), *range(UP, 60_000, 500)):
        yield Entry(BEGIN_NS + time * MS, SIGNAL, None)
        answered = (
            time + 2 + 12 * (time / 500 * 0.618 % 1) ** 3
        )  # Most response times are near 2 ms, none exceeds 14 ms.
        yield Entry(BEGIN_NS + round(answered * MS), ANSWER, None)
    for time in (4_000, 9_000, 26_000, 31_000, 50_000, 55_000):
        yield Entry(BEGIN_NS + time * MS, BLOCKED, None)
    for time in (14_000, 16_000, 18_000):
        reason = "cannot write: not a regular file but a directory"
        yield Entry(BEGIN_NS + time * MS, BLOCKED, None, pending=reason)
        yield Entry(BEGIN_NS + WRITABLE * MS, BLOCKED, None, delay=(WRITABLE - time) / 1000)
    yield Mark(BEGIN_NS + DOWN * MS, f"the link went down after {DOWN / 1000} s: no carrier")
    yield Mark(BEGIN_NS + UP * MS, f"the link came up after {(UP - DOWN) / 1000} s")


def record(path: Path) -> None:
    """Write the recording."""
    recorder = Recorder(path)
    for event in sorted(events(), key=lambda event: event.time_ns):
        if isinstance(event, Mark):
            recorder.mark(event.time_ns, event.text)
            continue
        frame = encode(event.signal.encode(), MAC)
        recorder.append(
            event.time_ns,
            DIRECTIONS[event.signal],
            event.signal,
            "",
            frame,
            BOARD,
            pending=event.pending,
            delay=event.delay,
        )
    recorder.close()


def draw() -> str:
    """Return the plot as SVG, with UTC as the local time."""
    with tempfile.TemporaryDirectory() as directory:
        record(Path(directory, "night.pcapng"))
        command = [sys.executable, "-m", "inco_trio", "plot", "night.pcapng", "--pair", SIGNAL, ANSWER, "--out", "-"]
        environment = {**os.environ, "TZ": "UTC"}
        environment.pop("UDRV_JSON_PATH", None)
        return subprocess.run(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout


def visible(svg: str) -> set[str]:
    """Return the texts in a plot. matplotlib draws them as paths, and writes each text into a comment."""
    return set(re.findall(r"<!-- (.*?) -->", svg, re.DOTALL))


if __name__ == "__main__":
    PLOT.write_text(draw())
