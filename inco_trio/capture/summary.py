"""Statistics of a recording: counts, rates and gaps per signal, response times, and marks."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import attrs

from inco_trio.capture.recording import Entry, Mark
from inco_trio.signals import Direction

__all__ = ["TIME_MAX", "Flow", "Pair", "Summary"]

BILLION = 10**9
TIME_MAX = 2**63 - 1
"""The latest valid time, in nanoseconds since 1970. It falls in the year 2262."""
AT_ONCE = 2**16
"""Maximum number of values to sort at once: a sorted list takes five times as much memory as an array."""


@attrs.define
class Flow:
    """The notifications of one signal of a board in one direction, 8 bytes each."""

    signal: str
    direction: Direction | None
    board: str = ""
    """The name of the board, or an empty string if it is unknown."""
    times: array[int] = attrs.Factory(lambda: array("q"))
    """The times of the deliveries in nanoseconds since 1970, in the order of the recording."""
    pending: array[int] = attrs.Factory(lambda: array("q"))
    """The times at which notifications became pending. `times` contains the times when they were delivered."""
    delays: array[int] = attrs.Factory(lambda: array("q"))
    """How long each delayed notification was pending before its delivery, in nanoseconds."""
    late: array[int] = attrs.Factory(lambda: array("q"))
    """The times at which the notifications in `delays` were delivered."""
    possibly_late: int = 0
    """The number of notifications of which only `Entry.delay_max` is known."""
    _left: int = 0
    """The number of notifications in `pending` that have not been delivered."""

    def take(self, entry: Entry) -> None:
        """Add an entry of this signal, direction and board."""
        if entry.pending:
            self.pending.append(entry.time_ns)
            self._left += 1
            return
        self.times.append(entry.time_ns)
        if entry.delay or entry.delay_max:
            if entry.delay:
                self.delays.append(round(entry.delay * BILLION))
                self.late.append(entry.time_ns)
            else:
                self.possibly_late += 1
            self._left = max(0, self._left - 1)
        else:
            # A signal's notifications are delivered in order. The recording may lack the delivery of earlier ones.
            self._left = 0

    def intervals(self) -> Iterator[int]:
        """Return the time from each notification to the next, in nanoseconds."""
        return (later - earlier for earlier, later in zip(self.times, islice(self.times, 1, None), strict=False))

    def unfinished(self) -> array[int]:
        """Return those times in `pending` whose notifications were still pending at the end of the recording."""
        return self.pending[len(self.pending) - self._left :]

    def waits(self, last: int, apart: int = 0) -> list[tuple[int, int]]:
        """Return the start and end of each period in which notifications were pending. The recording ends at `last`.

        Periods that are at most `apart` nanoseconds apart are returned as one.
        """
        waits = [(late - delay, late) for late, delay in zip(self.late, self.delays, strict=True)]
        waits += [(min(unfinished), last)] if (unfinished := self.unfinished()) else []
        periods: list[tuple[int, int]] = []
        for start, end in sorted(waits):
            if periods and start <= periods[-1][1] + apart:
                periods[-1] = periods[-1][0], max(end, periods[-1][1])
            else:
                periods.append((start, end))
        return periods

    def longest_gap(self, last: int) -> tuple[int, int] | None:
        """Return the start and length of the longest gap in nanoseconds, or None if there is no gap.

        The time from the last notification to `last`, when the recording ends, is also a gap.
        """
        gaps = zip(chain(self.intervals(), (last - time for time in self.times[-1:])), self.times, strict=True)
        gap, begin = max(gaps, default=(0, 0), key=lambda each: each[0])
        return (begin, gap) if gap > 0 else None


@attrs.define
class Pair:
    """The response times of a signal. A notification that is repeated before its answer counts as unanswered."""

    signal: str
    answer: str
    taken: array[int] = attrs.Factory(lambda: array("q"))
    """The response times in nanoseconds."""
    unanswered: int = 0
    _asked: dict[str, int] = attrs.Factory(dict)
    """The time of the last notification that has not been answered, for each board."""

    def take(self, entry: Entry) -> None:
        """Add an entry. An answer belongs to the last notification of the same board."""
        if entry.signal == self.signal:
            self.unanswered += entry.board in self._asked
            self._asked[entry.board] = entry.time_ns
        elif entry.signal == self.answer and entry.board in self._asked:
            self.taken.append(entry.time_ns - self._asked.pop(entry.board))

    def end(self) -> None:
        """Count the last notification of each board as unanswered if the recording ends before its answer."""
        self.unanswered += len(self._asked)
        self._asked.clear()

    def spread(self) -> dict[str, float] | None:
        """Return `min`, `p50`, `p90`, `p99` and `max` of the response times in seconds, or None if there are none."""
        return _spread(self.taken)


@attrs.define
class Summary:
    pairs: Sequence[Pair] = ()
    flows: dict[tuple[str, Direction | None, str], Flow] = attrs.Factory(dict)
    """The flows by signal, direction and board."""
    marks: list[Mark] = attrs.Factory(list)
    ignored: int = 0
    """Number of frames that the proxy ignored. No flow contains them."""
    left_out: Mapping[str, int] = attrs.Factory(dict)
    """The number of packets in the recording that were skipped, keyed by reason."""

    def take(self, each: Entry | Mark) -> None:
        """Add an entry or mark with a time from 0 to TIME_MAX."""
        if isinstance(each, Mark):
            self.marks.append(each)
            return
        if each.ignored:
            self.ignored += 1
            return
        key = each.signal, each.direction, each.board
        if key not in self.flows:
            self.flows[key] = Flow(*key)
        self.flows[key].take(each)
        for pair in () if each.pending else self.pairs:
            pair.take(each)

    @property
    def span(self) -> tuple[int, int]:
        """Start and end of the recording, in nanoseconds since 1970."""
        series = [series for flow in self.flows.values() for series in (flow.times, flow.pending) if series]
        times = [time for series in series for time in (min(series), max(series))]
        times += [mark.time_ns for mark in self.marks]
        return min(times), max(times)

    def numbers(self) -> dict[str, object]:
        """Return the statistics for JSON: durations in seconds, times in seconds since 1970."""
        begin, end = self.span
        return {
            "from": begin / BILLION,
            "to": end / BILLION,
            "signals": [self._flow_numbers(flow, begin, end) for flow in self.flows.values()],
            "pairs": [_pair_numbers(pair) for pair in self.pairs],
            "ignored": self.ignored,
            "left_out": dict(self.left_out),
            "marks": [{"time": mark.time_ns / BILLION, "text": mark.text} for mark in self.marks],
        }

    def _flow_numbers(self, flow: Flow, begin: int, end: int) -> dict[str, object]:
        gap, span_ns = flow.longest_gap(end), end - begin
        return {
            "board": flow.board or None,
            "signal": flow.signal,
            "direction": None if flow.direction is None else flow.direction.value,
            "count": len(flow.times),
            "pending": len(flow.unfinished()),
            "late": len(flow.delays),
            "delay": _spread(flow.delays),
            "possibly_late": flow.possibly_late,
            "rate": len(flow.times) / (span_ns / BILLION) if span_ns else None,
            "interval": _spread(flow.intervals()),
            "longest_gap": None if gap is None else {"from": gap[0] / BILLION, "seconds": gap[1] / BILLION},
        }


def _pair_numbers(pair: Pair) -> dict[str, object]:
    return {
        "signal": pair.signal,
        "answer": pair.answer,
        "answered": len(pair.taken),
        "unanswered": pair.unanswered,
        "taken": pair.spread(),
    }


def _spread(values: Iterable[int]) -> dict[str, float] | None:
    """Return the distribution of `values` in seconds. The values are durations in nanoseconds."""
    rest, parts = iter(values), []
    while some := sorted(islice(rest, AT_ONCE)):
        parts.append(array("q", some))
    if not parts:
        return None
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: _quantile(parts, share) / BILLION for name, share in shares.items()}


def _quantile(parts: Sequence[array[int]], share: float) -> int:
    """Return the quantile `share` (0.5 is the median) of the values in all parts. Each part must be sorted."""
    rank = max(1, math.ceil(share * sum(map(len, parts))))
    low, high = min(part[0] for part in parts), max(part[-1] for part in parts)
    while low < high:
        middle = (low + high) // 2
        if sum(bisect_right(part, middle) for part in parts) < rank:
            low = middle + 1
        else:
            high = middle
    return low
