"""The plots: latency distribution, handled rate against offered rate, CPU time against the number of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .rivals import C_MODIFY, INCO, SCRIPT, C

__all__ = ["draw"]

# Use Okabe and Ito's palette for colour-blind readers. The lines also have different dash patterns.
_STYLES: dict[str, dict[str, Any]] = {
    INCO.name: {"color": "#0072B2", "linewidth": 2.4, "zorder": 3},
    C.name: {"color": "#333333", "linewidth": 1.8, "linestyle": (0, (5, 2)), "zorder": 2},
    C_MODIFY.name: {"color": "#333333", "linewidth": 1.8, "linestyle": (0, (5, 2)), "zorder": 2},
    SCRIPT.name: {"color": "#D55E00", "linewidth": 1.8, "linestyle": (0, (1, 1.2)), "zorder": 1},
}
_LABELS = {INCO.name: "inco-trio", C.name: "C", C_MODIFY.name: "C", SCRIPT.name: "scapy + watchdog"}
_QUIET = "#666666"


def _si(value: float, _position: object = None) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _micro(value: float, _position: object = None) -> str:
    return f"{value / 1000:g} ms" if value >= 1000 else f"{value:g} µs"


def _frame(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _latency(axes: Axes, direction: str, programs: Mapping[str, Sequence[int]], what: str) -> None:
    """Plot the share of notifications that took at most a given time; p50 and p99 are marked."""
    _frame(axes, f"{direction.capitalize()}: {what}", "latency (log scale)", "notifications that took at most as long")
    axes.set_xscale("log")
    for order, (program, quantiles) in enumerate(sorted(programs.items(), key=lambda item: item[1][len(item[1]) // 2])):
        times = [time / 1000 for time in quantiles]
        shares = [(rank + 1) / len(times) for rank in range(len(times))]
        style = _STYLES[program]
        axes.plot(times, shares, **style)
        p50, p99 = times[len(times) // 2 - 1], times[len(times) * 99 // 100 - 1]
        axes.plot([p50, p99], [0.5, 0.99], "o", color=style["color"], markersize=5, zorder=4)
        # The label of the fastest program is on the left, and the other labels are on the right. The second label is
        # lower, to leave room for the third.
        axes.annotate(
            f"{_LABELS[program]}\np50 {p50:,.0f} µs\np99 {p99:,.0f} µs",
            (p50, 0.5),
            xytext=(8 if order else -8, -62 if order == 1 else 0),
            textcoords="offset points",
            ha="left" if order else "right",
            va="center",
            fontsize=9,
            color=style["color"],
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            zorder=5,
        )
    axes.xaxis.set_major_formatter(FuncFormatter(_micro))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_ylim(0, 1.02)
    fastest = min(quantiles[0] for quantiles in programs.values()) / 1000
    slowest = max(quantiles[len(quantiles) * 995 // 1000] for quantiles in programs.values()) / 1000
    axes.set_xlim(fastest / 3, 1.5 * slowest)


def _shown(programs: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return `programs` without the floor and other checkouts: their lines would hide inco-trio's line."""
    return {program: quantiles for program, quantiles in programs.items() if program in _STYLES}


def _latencies(series: Mapping[str, Any]) -> Figure:
    kinds = (("inbound", "frame to state file"), ("outbound", "trigger file to frame"))
    present = [(kind, what) for kind, what in kinds if f"{kind}-closed-loop" in series]
    figure = Figure(figsize=(5.6 * len(present), 4.2), layout="constrained")
    for index, (kind, what) in enumerate(present):
        _latency(figure.add_subplot(1, len(present), index + 1), kind, _shown(series[f"{kind}-closed-loop"]), what)
    return figure


def _load(series: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _frame(axes, "Inbound frames handled, of those offered", "offered, frames/s", "handled, frames/s")
    curves: Mapping[str, Sequence[tuple[float, float, int]]] = series["load-curve"]
    offered = [point[0] for points in curves.values() for point in points]
    axes.plot([min(offered), max(offered)], [min(offered), max(offered)], color="#bbbbbb", linewidth=1, zorder=0)
    low = min(offered)
    axes.annotate(
        "all of them", (low, low), xytext=(4, 14), textcoords="offset points", color=_QUIET, fontsize=9, rotation=34
    )
    ends = []
    for program, points in curves.items():
        style = _STYLES[program]
        axes.plot([point[0] for point in points], [point[1] for point in points], **style)
        for x, y, lost in points:
            face = "white" if lost else style["color"]
            axes.plot(x, y, "o", markersize=6, color=style["color"], markerfacecolor=face, zorder=4)
        ends.append((program, *points[-1][:2]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _end_labels(axes, ends)
    axes.annotate("hollow: frames were lost", (0.02, 0.95), xycoords="axes fraction", color=_QUIET, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_si))
    return figure


def _end_labels(axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Label each line at its right end, and separate labels that would overlap."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    height = 13.0
    taken = -1e9
    for program, x, y in sorted(ends, key=lambda end: end[2]):
        at = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        place = max(at, taken + height)
        taken = place
        axes.annotate(
            _LABELS[program],
            (x, y),
            xytext=(10, place - at),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_STYLES[program]["color"],
            annotation_clip=False,
        )


def _signals(series: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    kinds = (("inbound", "burst of frames"), ("outbound", "triggers at 10,000/s"))
    for index, (direction, what) in enumerate(kinds):
        axes = figure.add_subplot(1, 2, index + 1)
        title = f"{direction.capitalize()}, {what}"
        _frame(axes, title, "signals in the table", "CPU time a notification, µs (log scale)")
        ends = []
        for program, costs in series["many-signals"][direction].items():
            counts, values = [int(count) for count in costs], list(costs.values())
            axes.plot(counts, values, marker="o", markersize=5, **_STYLES[program])
            ends.append((program, counts[-1], values[-1]))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_si))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _end_labels(axes, ends)
    return figure


_PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Figure]]] = {
    "latency": (("inbound-closed-loop", "outbound-closed-loop"), _latencies),
    "load": (("load-curve",), _load),
    "signals": (("many-signals",), _signals),
}


def draw(series: Mapping[str, Any], where: Path, machine: str) -> list[Path]:
    """Draw the plots that have data, as SVG and PNG files, and return their paths."""
    drawn = []
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "inco-trio", "svg.fonttype": "none"}):
        for name, (needed, plot) in _PLOTS.items():
            if not any(key in series for key in needed):
                continue
            figure = plot(series)
            figure.supxlabel(machine, fontsize=8, color=_QUIET, x=0.01, ha="left")
            for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
                drawn.append(where / f"{name}.{suffix}")
                figure.savefig(drawn[-1], **options)
    return drawn
