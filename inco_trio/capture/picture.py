"""Plots of recordings, with matplotlib (the extra `plot`)."""

from __future__ import annotations

import datetime
import io
import textwrap
import warnings
from array import array
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, NullFormatter

from inco_trio.service.lines import printable
from inco_trio.signals import Direction

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from inco_trio.capture.recording import Mark
    from inco_trio.capture.summary import Flow, Pair, Summary

__all__ = ["draw"]

BILLION = 10**9
COLUMNS = 4000
"""Maximum number of distinct positions on a timeline. The plot could not show more."""
ROWS = 40
"""Maximum number of signals in the plot."""
LANES = 12
"""Maximum number of signals whose rate is plotted."""
BINS = 200
"""Maximum number of time steps in the plot of rates."""
IN_BIN = 4
"""Minimum average number of notifications per step for the busiest signal. Fewer than this would not show a rate."""
ANSWER_BINS = 100
WIDE = 100
"""If the slowest response time exceeds the fastest one by this factor, their axis is logarithmic."""
MARKS_MAX = 20
"""Maximum number of marks in the list. For any further marks, the plot shows only their positions."""
MARK_LINES = 4
"""Maximum number of lines of a mark in the list. A longer text is cut."""
FLAG = 0.05
"""Minimum distance between two numbered flags, as a fraction of the plot's width. Closer marks share a flag."""
TICKS_MAX = 9
"""Maximum number of labels on the time axis. More labels would overlap."""
NAME_WIDTH = 72
"""Maximum length of a signal's name in characters. Longer names are shortened in the middle."""
LINE_WIDTH = 130
"""Maximum length of a line of text in characters."""
LINE_HEIGHT = 0.18
"""Height of a line in the list of marks, in inches."""
COLORS = {Direction.INBOUND: "tab:blue", Direction.OUTBOUND: "tab:orange", None: "tab:gray"}
ALARM = "tab:red"
SMALL = 8
"""Font size of everything except titles."""
STEPS = (
    *(factor * 10**power for power in range(9) for factor in (1, 2, 5)),
    *(BILLION * each for each in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)),
    *(3600 * BILLION * each for each in (1, 2, 3, 6, 12, 24, 48, 168, 720, 2160, 8760, 87_600, 876_000)),
)
"""The possible intervals between two labels on the time axis, in nanoseconds."""
_seconds_text = EngFormatter("s", places=None)


# The name of a file or signal may contain a dollar sign, which would start a formula.
@mpl.rc_context({"text.parse_math": False, "text.usetex": False})
def draw(summary: Summary, title: str, suffix: str) -> bytes:
    """Return the contents of an image file with the plot, in the format of `suffix`."""
    flows = _most_frequent(list(summary.flows.values()), ROWS)
    begin, end = summary.span
    lanes = _most_frequent([flow for flow in flows if flow.times and end > begin], LANES)
    span = max(end - begin, 1) / BILLION
    flags = _flags(summary.marks, begin, span)
    listed = [_listed(summary, flags)] if flags else []
    heights = [0.5 + 0.35 * len(flows), 0.5 + 0.4 * max(1, len(lanes))]
    heights += [0.1 + LINE_HEIGHT * len(lines) for lines in listed]
    heights += [2.0 for _ in summary.pairs]
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08)
    figure = Figure(figsize=(12, 1.2 + 0.4 * len(heights) + sum(heights)), layout=layout)
    rows = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    timeline, rates = rows[0], rows[1]
    figure.suptitle("\n".join(textwrap.wrap(title, LINE_WIDTH // 2)) or " ")
    of_more = f": the {len(flows)} most frequent of {len(summary.flows)}" if len(flows) < len(summary.flows) else ""
    timeline.set_title(f"notifications, and the longest gap of each signal{of_more}", pad=18 if flags else 6, **_TITLE)
    names_boards = len({flow.board for flow in summary.flows.values()}) > 1
    _timeline(timeline, flows, begin, end, names_boards=names_boards)
    _rates(rates, lanes, begin, span, names_boards=names_boards)
    for axis in (timeline, rates):
        _clock(axis, begin, end)
        places = _places(_seconds(array("q", (mark.time_ns for mark in summary.marks)), begin), span)
        axis.vlines(places, 0, 1, ALARM, ":", transform=axis.get_xaxis_transform(), linewidth=1)
    _draw_flags(timeline, flags)
    figure.legend(handles=list(_keys(flows, end, bool(flags))), loc="outside lower center", ncols=6, fontsize=SMALL)
    for axis, lines in zip(rows[2:], listed, strict=False):
        _list_marks(axis, lines)
    for axis, pair in zip(rows[2 + len(listed) :], summary.pairs, strict=True):
        _answers(axis, pair)
    drawn = io.BytesIO()
    # Names may contain characters that the font lacks. Each would cause a warning.
    with warnings.catch_warnings(action="ignore"):
        figure.savefig(drawn, format=suffix.removeprefix("."))
    return drawn.getvalue()


_TITLE: Any = {"fontsize": 9, "loc": "left"}
_PENDING: Any = {"facecolor": "none", "edgecolor": ALARM, "hatch": "////", "linewidth": 0.5}


def _most_frequent(flows: list[Flow], most: int) -> list[Flow]:
    """Return the flows with the most notifications (at most `most` flows) in their original order."""
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


def _duration(seconds: float) -> str:
    """Return a duration in readable units, such as `77 ms` or `1 h 2 min`."""
    if seconds < 60:
        return _seconds_text.format_data(float(f"{seconds:.3g}"))
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (0 if hours else rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _shortened(text: str) -> str:
    text = printable(text)
    half = NAME_WIDTH // 2 - 1
    return text if len(text) <= NAME_WIDTH else f"{text[:half]}…{text[-half:]}"


def _name(flow: Flow, *, names_boards: bool) -> str:
    name = f"{flow.board}: {flow.signal}" if names_boards and flow.board else flow.signal
    return _shortened(name) + ("" if flow.direction is None else f" ({flow.direction.value})")


def _timeline(axis: Axes, flows: list[Flow], begin: int, end: int, *, names_boards: bool) -> None:
    span, labels = max(end - begin, 1) / BILLION, []
    for row, flow in enumerate(flows):
        periods = flow.waits(end, (end - begin) // COLUMNS)
        waits = [((start - begin) / BILLION, (stop - start) / BILLION) for start, stop in periods]
        axis.broken_barh(waits, (row - 0.25, 0.5), **_PENDING)
        places = _places(_seconds(flow.times, begin), span)
        axis.plot(places, np.full(len(places), row), "|", color=COLORS[flow.direction], markersize=12)
        waiting = _places(_seconds(flow.pending, begin), span)
        axis.plot(waiting, np.full(len(waiting), row), "x", color=ALARM, markersize=5)
        if (gap := flow.longest_gap(end)) is not None:
            start, length = (gap[0] - begin) / BILLION, gap[1] / BILLION
            axis.plot([start, start + length], [row - 0.4] * 2, color="tab:gray", linewidth=1, solid_capstyle="butt")
            middle = min(max(start + length / 2, 0.02 * span), 0.98 * span)  # Keep the text inside the plot.
            axis.annotate(_duration(length), (middle, row - 0.38), fontsize=6, ha="center", va="bottom")
        label = f"{_name(flow, names_boards=names_boards)}: {len(flow.times)}"
        label += f", {len(flow.delays)} of them late" if flow.delays else ""
        label += f", {flow.possibly_late} possibly late" if flow.possibly_late else ""
        labels.append(label + (f", {pending} pending" if (pending := len(flow.unfinished())) else ""))
    axis.set_yticks(range(len(flows)), labels, fontsize=SMALL)
    axis.set_ylim(len(flows) - 0.4, -0.8)


def _rates(axis: Axes, flows: list[Flow], begin: int, span: float, *, names_boards: bool) -> None:
    """Plot the rate of each signal in a separate lane. The top of a lane is the signal's highest rate."""
    bins = max(1, min(BINS, max((len(flow.times) for flow in flows), default=0) // IN_BIN))
    width = span / bins
    labels = []
    for row, flow in enumerate(flows):
        counts, edges = np.histogram(_seconds(flow.times, begin), bins, (0, span))
        bottom = row + 0.4
        heights = bottom - 0.75 * counts / counts.max()
        axis.stairs(heights, edges, baseline=bottom, fill=True, color=COLORS[flow.direction])
        axis.axhline(bottom, color="tab:gray", linewidth=0.5)
        name = _name(flow, names_boards=names_boards)
        labels.append(f"{name}: at most {_rate(counts.max() / width)}")
    axis.set_yticks(range(len(flows)), labels, fontsize=SMALL)
    axis.set_ylim(max(1, len(flows)) - 0.5, -0.5)
    axis.set_title(f"rates, in steps of {_duration(width)}" if flows else "rates: too few notifications", **_TITLE)


def _rate(per_second: float) -> str:
    number, unit = next(
        ((per_second * length, unit) for length, unit in ((1, "s"), (60, "min")) if per_second * length >= 0.1),
        (per_second * 3600, "h"),
    )
    return f"{number:.3g}/{unit}" if number < 1000 else f"{number:,.0f}/{unit}"


def _clock(axis: Axes, begin: int, end: int) -> None:
    """Label the time axis with local times, and with the date where it changes."""
    margin = max(end - begin, 1) / BILLION / 100
    axis.set_xlim(-margin, (end - begin) / BILLION + margin)
    step = next((each for each in STEPS if (end - begin) // each < TICKS_MAX), STEPS[-1])
    zone = _local(begin)
    shift = round((zone.utcoffset() or datetime.timedelta()).total_seconds()) * BILLION
    ticks = [tick - shift for tick in range(-(-(begin + shift) // step) * step, end + shift + 1, step)] or [begin]
    labels, day = [], None
    for tick in ticks:
        when = _local(tick)
        digits = len(f"{step / BILLION % 1:.9f}".rstrip("0")) - 2 if step % BILLION else 0
        digits = 9 if tick == begin and len(ticks) == 1 else digits
        fraction = f".{tick % BILLION:09}"[: digits + 1] if digits else ""
        labels.append(f"{when:%H:%M:%S}{fraction}" + ("" if when.date() == day else f"\n{when:%Y-%m-%d}"))
        day = when.date()
    axis.set_xticks([(tick - begin) / BILLION for tick in ticks], labels, fontsize=SMALL)
    offset = "" if zone.tzname() == "UTC" else f", UTC{zone.isoformat()[-6:]}"
    axis.set_xlabel(f"local time ({zone.tzname()}{offset})", fontsize=SMALL)


def _local(time_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ns // BILLION, datetime.UTC).astimezone()


def _flags(marks: Sequence[Mark], begin: int, span: float) -> list[tuple[float, list[Mark]]]:
    """Return the position of each flag with its marks. Marks that are close together share a flag."""
    flags: list[tuple[float, list[Mark]]] = []
    for mark in sorted(marks, key=lambda each: each.time_ns)[:MARKS_MAX]:
        place = (mark.time_ns - begin) / BILLION
        if flags and place - flags[-1][0] < FLAG * span:
            flags[-1][1].append(mark)
        else:
            flags.append((place, [mark]))
    return flags


def _draw_flags(axis: Axes, flags: list[tuple[float, list[Mark]]]) -> None:
    number = 1
    for place, marks in flags:
        last = number + len(marks) - 1
        text = str(number) if last == number else f"{number}-{last}"
        axis.annotate(
            text, (place, 1), (0, 8), xycoords=axis.get_xaxis_transform(), textcoords="offset points",
            fontsize=7, color="white", ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": ALARM, "linewidth": 0},
        )  # fmt: skip
        number = last + 1


def _listed(summary: Summary, flags: list[tuple[float, list[Mark]]]) -> list[tuple[str, str]]:
    """Return the lines of the list of marks: the number and time (empty in continuation lines), and the text."""
    listed = []
    for number, mark in enumerate((mark for _, marks in flags for mark in marks), 1):
        when = f"{number}   {_local(mark.time_ns):%H:%M:%S}.{mark.time_ns % BILLION // 10**6:03}"
        text = printable(mark.text[: LINE_WIDTH * (MARK_LINES + 1)])
        lines = textwrap.wrap(text, LINE_WIDTH, max_lines=MARK_LINES, placeholder="…") or [""]
        listed += [(when if line == 0 else "", text) for line, text in enumerate(lines)]
    if (more := len(summary.marks) - MARKS_MAX) > 0:
        listed.append(("", f"{more} further marks have no number"))
    return listed


def _list_marks(axis: Axes, lines: list[tuple[str, str]]) -> None:
    axis.set_axis_off()
    axis.set_ylim(len(lines), 0)
    axis.set_xlim(0, 1)
    for row, (when, text) in enumerate(lines):
        axis.text(0, row + 0.5, when, fontsize=SMALL, color=ALARM, va="center", ha="right")
        axis.text(0.01, row + 0.5, text, fontsize=SMALL, va="center")


def _keys(flows: list[Flow], end: int, marks: bool) -> Iterator[Artist]:
    for direction, color in COLORS.items():
        if any(flow.direction is direction for flow in flows):
            yield Patch(color=color, label="unknown direction" if direction is None else direction.value)
    if any(flow.pending for flow in flows):
        yield Line2D([], [], color=ALARM, marker="x", linestyle="", markersize=5, label="became pending")
    if any(flow.delays or flow.pending for flow in flows):
        yield Patch(label="pending", **_PENDING)
    if any(flow.longest_gap(end) for flow in flows):
        yield Line2D([], [], color="tab:gray", linewidth=1, label="longest gap")
    if marks:
        yield Line2D([], [], color=ALARM, linestyle=":", linewidth=1, label="mark (listed below the rates)")


def _answers(axis: Axes, pair: Pair) -> None:
    names = f"{_shortened(pair.signal)} to {_shortened(pair.answer)}"
    title = f"from {names}: {len(pair.taken)} answered, {pair.unanswered} not"
    if spread := pair.spread():
        title += f"; half within {_duration(spread['p50'])}, 99 % within {_duration(spread['p99'])}"
        low, high = spread["min"], spread["max"]
        bins: int | NDArray[np.float64] = ANSWER_BINS
        if 0 < low * WIDE < high:
            bins = np.geomspace(low, high, ANSWER_BINS + 1)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.stairs(*np.histogram(_seconds(pair.taken, 0), bins), fill=True, color="tab:green")
    axis.xaxis.set_major_formatter(EngFormatter("s"))
    axis.tick_params(labelsize=SMALL)
    axis.set_ylabel("answers", fontsize=SMALL)
    axis.set_title(title, **_TITLE)
