"""Plots of recordings, with matplotlib (the extra `plot`)."""

from __future__ import annotations

import datetime
import io
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from inco_trio.service.lines import printable
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from inco_trio.capture.recording import Mark
    from inco_trio.capture.summary import Flow, Pair, Summary

__all__ = ["draw"]

BILLION = 10**9
COLUMNS = 4000
"""Maximum number of distinct positions on a timeline. More would not be visible."""
ROWS = 40
"""Maximum number of signals in the plot."""
LINE_COLORS = "Dark2"
"""Colours for signals, which differ from the colours for directions."""
LINES = 8
"""Maximum number of signals whose rate is plotted: the number of colours."""
BINS = 200
"""Maximum number of time steps in the plot of rates."""
IN_BIN = 4
"""Minimum notifications of the most frequent signal per step. Shorter steps would show single notifications."""
ANSWER_BINS = 100
WIDE = 100
"""Ratio of the slowest to the fastest answer above which the axis is logarithmic."""
MARKS_MAX = 20
"""Maximum number of marks with text. Further marks only show their positions."""
COLORS = {Direction.INBOUND: "tab:blue", Direction.OUTBOUND: "tab:orange", None: "tab:gray"}


# A dollar sign in the name of a file or signal must not start a formula.
@mpl.rc_context({"text.parse_math": False, "text.usetex": False})
def draw(summary: Summary, title: str, path: Path) -> None:
    """Write the plot to `path`, in the format of its suffix. Raises OSError."""
    flows = _most_frequent(list(summary.flows.values()), ROWS)
    heights = [0.6 + 0.35 * len(flows), 2.5, *(2.0 for _ in summary.pairs)]
    figure = Figure(figsize=(12, 1 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    begin, end = summary.span
    span = max(end - begin, 1) / BILLION
    figure.suptitle(title)
    _timeline(axes[0], flows, begin, span)
    of_more = f": the {len(flows)} most frequent of {len(summary.flows)}" if len(flows) < len(summary.flows) else ""
    axes[0].set_title(f"notifications, and the longest gap of each signal{of_more}", fontsize=9, loc="left")
    _rates(axes[1], _most_frequent(flows, LINES), begin, span)
    axes[1].sharex(axes[0])
    _marks(axes[0], axes[1], summary.marks, begin, span)
    when = datetime.datetime.fromtimestamp(begin / BILLION).astimezone()
    axes[1].set_xlabel(f"seconds since {when:%Y-%m-%d %H:%M:%S %Z}")
    for axis, pair in zip(axes[2:], summary.pairs, strict=True):
        _answers(axis, pair)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    file = path.open("wb")
    try:
        with file:
            file.write(drawn.getbuffer())
    except OSError:
        path.unlink(missing_ok=True)  # Do not leave an incomplete plot.
        raise


def _most_frequent(flows: list[Flow], most: int) -> list[Flow]:
    """Return the `most` flows with the most notifications, in their original order."""
    chosen = sorted(range(len(flows)), key=lambda number: len(flows[number].times), reverse=True)[:most]
    return [flows[number] for number in sorted(chosen)]


def _seconds(times: array[int], begin: int) -> NDArray[np.float64]:
    # Subtract integers first: a float cannot represent nanoseconds since 1970 exactly.
    return (np.frombuffer(times, np.int64) - begin) / BILLION


def _places(seconds: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """Return the positions, merging those that would look the same in the plot."""
    if len(seconds) <= COLUMNS:
        return seconds
    return np.unique(np.rint(seconds / span * COLUMNS)) * (span / COLUMNS)


def _timeline(axis: Axes, flows: list[Flow], begin: int, span: float) -> None:
    for row, flow in enumerate(flows):
        places = _places(_seconds(flow.times, begin), span)
        axis.plot(places, np.full(len(places), row), "|", color=COLORS[flow.direction], markersize=12)
        waiting = _places(_seconds(flow.pending, begin), span)
        axis.plot(waiting, np.full(len(waiting), row), "x", color="tab:red", markersize=5)
        if (gap := flow.longest_gap()) is not None:
            start, length = (gap[0] - begin) / BILLION, gap[1] / BILLION
            axis.plot([start, start + length], [row - 0.4] * 2, color="tab:gray", linewidth=1, solid_capstyle="butt")
            axis.annotate(f"{length:.3g} s", (start + length / 2, row - 0.38), fontsize=6, ha="center", va="bottom")
    labels = [
        f"{flow.label}: {len(flow.times)}" + f", {len(flow.pending)} pending (x)" * bool(flow.pending) for flow in flows
    ]
    axis.set_yticks(range(len(flows)), labels)
    axis.set_ylim(len(flows) - 0.4, -0.6)
    axis.set_xlim(-0.01 * span, 1.01 * span)


def _rates(axis: Axes, flows: list[Flow], begin: int, span: float) -> None:
    bins = max(1, min(BINS, max((len(flow.times) for flow in flows), default=0) // IN_BIN))
    width = span / bins
    axis.set_prop_cycle(color=mpl.color_sequences[LINE_COLORS])
    for flow in flows:
        counts, edges = np.histogram(_seconds(flow.times, begin), bins, (0, span))
        # Start with a space: matplotlib ignores labels that start with an underscore.
        axis.stairs(counts / width, edges, label=f" {flow.label}")
    axis.set_ylabel("per second")
    axis.set_title(f"rates, in steps of {width:.3g} s", fontsize=9, loc="left")
    if flows:
        axis.legend(fontsize=7, loc="upper right")


def _marks(timeline: Axes, rates: Axes, marks: Sequence[Mark], begin: int, span: float) -> None:
    seconds = _seconds(array("q", (mark.time_ns for mark in marks)), begin)
    for axis in (timeline, rates):
        transform = axis.get_xaxis_transform()
        axis.vlines(_places(seconds, span), 0, 1, "tab:red", ":", transform=transform, linewidth=1)
    for number, (second, mark) in enumerate(zip(seconds[:MARKS_MAX], marks, strict=False)):
        place = (second, 1 - 0.08 * (number % 8))
        transform = rates.get_xaxis_transform()
        rates.annotate(f" {printable(mark.text)}", place, xycoords=transform, fontsize=7, color="tab:red", va="top")


def _answers(axis: Axes, pair: Pair) -> None:
    title = f"from {pair.signal} to {pair.answer}: {len(pair.taken)} answered, {pair.unanswered} not"
    if spread := pair.spread():
        title += f"; half within {spread['p50']:.3g} s, 99 % within {spread['p99']:.3g} s"
        low, high = spread["min"], spread["max"]
        bins: int | NDArray[np.float64] = ANSWER_BINS
        if 0 < low * WIDE < high:
            bins = np.geomspace(low, high, ANSWER_BINS + 1)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.stairs(*np.histogram(_seconds(pair.taken, 0), bins), fill=True, color="tab:green")
    axis.xaxis.set_major_formatter(EngFormatter("s"))
    axis.set_title(title, fontsize=9, loc="left")
