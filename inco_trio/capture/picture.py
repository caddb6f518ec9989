"""The picture of a recording, by matplotlib (the extra `plot`)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from inco_trio.signals import Direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from inco_trio.capture.summary import Flow, Pair, Summary

__all__ = ["draw"]

BILLION = 10**9
COLUMNS = 4000
"""Places of a timeline that differ: more cannot be seen."""
BINS = 200
"""Steps of the rates, at most."""
IN_BIN = 4
"""Notifications of the most frequent signal in a step, at least: fewer would show each of them, and no rate."""
MARKS_MAX = 20
"""Marks whose text is shown; of more, only where they are."""
COLORS = {Direction.INBOUND: "tab:blue", Direction.OUTBOUND: "tab:orange", None: "tab:gray"}


def draw(summary: Summary, title: str, path: Path) -> None:
    """Write the picture to `path`, in the format of its suffix. Raises OSError."""
    flows, pairs = list(summary.flows.values()), [pair for pair in summary.pairs if pair.taken]
    heights = [0.6 + 0.35 * len(flows), 2.5, *(2.0 for _ in pairs)]
    figure = Figure(figsize=(12, 1 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    begin, end = summary.span
    span = max(end - begin, 1) / BILLION
    figure.suptitle(title)
    _timeline(axes[0], flows, begin, span)
    _rates(axes[1], flows, begin, span)
    axes[1].sharex(axes[0])
    for axis in axes[:2]:
        for mark in summary.marks:
            axis.axvline((mark.time_ns - begin) / BILLION, color="tab:red", linestyle=":", linewidth=1)
    for number, mark in enumerate(summary.marks[:MARKS_MAX]):
        place = ((mark.time_ns - begin) / BILLION, 1 - 0.08 * (number % 8))
        axes[1].annotate(
            mark.text, place, xycoords=axes[1].get_xaxis_transform(), fontsize=7, color="tab:red", va="top"
        )
    when = datetime.datetime.fromtimestamp(begin / BILLION).astimezone()
    axes[1].set_xlabel(f"seconds since {when:%Y-%m-%d %H:%M:%S %Z}")
    for axis, pair in zip(axes[2:], pairs, strict=True):
        _answers(axis, pair)
    figure.savefig(path)


def _timeline(axis: Axes, flows: list[Flow], begin: int, span: float) -> None:
    for row, flow in enumerate(flows):
        seconds = [(time - begin) / BILLION for time in flow.times]
        if len(seconds) > COLUMNS:
            seconds = sorted({round(each / span * COLUMNS) * span / COLUMNS for each in seconds})
        color = COLORS[flow.direction]
        axis.plot(seconds, [row] * len(seconds), "|", color=color, markersize=12)
        if (gap := flow.longest_gap()) is not None:
            start, length = (gap[0] - begin) / BILLION, gap[1] / BILLION
            axis.plot([start, start + length], [row - 0.4] * 2, color="tab:gray", linewidth=1, solid_capstyle="butt")
            axis.annotate(f"{length:.3g} s", (start + length / 2, row - 0.38), fontsize=6, ha="center", va="bottom")
    axis.set_yticks(range(len(flows)), [f"{flow.label}: {len(flow.times)}" for flow in flows])
    axis.set_ylim(len(flows) - 0.4, -0.6)
    axis.set_xlim(-0.01 * span, 1.01 * span)
    axis.set_title("notifications, and the longest gap of each signal", fontsize=9, loc="left")


def _rates(axis: Axes, flows: list[Flow], begin: int, span: float) -> None:
    bins = max(1, min(BINS, max((len(flow.times) for flow in flows), default=0) // IN_BIN))
    width = span / bins
    for flow in flows:
        counts = [0] * bins
        for time in flow.times:
            counts[min(bins - 1, int((time - begin) / BILLION / width))] += 1
        edges = [number * width for number in range(bins + 1)]
        axis.stairs([count / width for count in counts], edges, label=flow.label)
    axis.set_ylabel("a second")
    axis.set_title(f"rates, in steps of {width:.3g} s", fontsize=9, loc="left")
    if flows:
        axis.legend(fontsize=7, loc="upper right")


def _answers(axis: Axes, pair: Pair) -> None:
    axis.hist([each / BILLION for each in pair.taken], bins=100, color="tab:green")
    axis.set_xlabel("seconds")
    title = f"from {pair.signal} to {pair.answer}: {len(pair.taken)} answered, {pair.unanswered} not"
    axis.set_title(title, fontsize=9, loc="left")
