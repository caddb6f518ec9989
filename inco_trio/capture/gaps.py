"""Fill the gaps in a recording with events from the proxy's flight recorder.

A monitor misses events while the proxy restarts, or when the monitor reads too slowly. The flight recorder keeps these
events, even those that a killed proxy could not report.
"""

from __future__ import annotations

import operator
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

import attrs

from inco_trio.control.protocol import Event, Past
from inco_trio.persist.recorder import truncated
from inco_trio.proxy_status import RecorderStatus
from inco_trio.signals import Direction

__all__ = ["Gaps", "separated"]

TIMES = 2**15
"""Minimum number of pending notifications of a signal whose times are kept, if there were that many."""


def separated(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the last occurrence of each merged `pending` event as a separate event. Sort by monotonic time.

    The flight recorder merges equal events and keeps only the times of the first and the last occurrence.
    """
    parts = []
    for event in events:
        if event.event == "pending" and event.count > 1:
            parts.append(attrs.evolve(event, count=event.count - 1, last_ns=0))
            event = attrs.evolve(event, monotonic_ns=event.last_ns, count=1)
        parts.append(event)
    before = None
    for part in sorted(parts, key=operator.attrgetter("monotonic_ns")):
        if before is not None and part.event == "pending" and part.last_ns:
            # The wall clock may have been set after the first occurrence.
            seconds = (part.monotonic_ns - before.monotonic_ns) / 1e9
            part = attrs.evolve(part, time=before.time + seconds, last_ns=0)
        yield part
        before = part


@attrs.define
class _Pending:
    """The recorded `pending` events of one signal and reason. Times are CLOCK_MONOTONIC in nanoseconds."""

    times: array[int]
    """The times of the newest events. The number of events before `times[0]` is unknown."""
    totals: array[int] = attrs.Factory(lambda: array("Q", [0]))
    """For each time, the number of events up to and including it."""
    last: Event | None = None

    def add(self, event: Event, count: int) -> None:
        self.times.append(event.monotonic_ns)
        self.totals.append(self.totals[-1] + count)
        self.last = event
        if len(self.times) > 2 * TIMES:
            del self.times[:TIMES], self.totals[:TIMES]

    def since(self, time_ns: int) -> int:
        """Return the number of events since a time."""
        return self.totals[-1] - self.totals[max(0, bisect_left(self.times, time_ns) - 1)]


@attrs.define
class _Seen:
    """The last recorded events of one board. Times are CLOCK_MONOTONIC in nanoseconds."""

    boot: str = ""
    """The ID of the flight recorder that assigned the sequence numbers."""
    sequence: int = 0
    """The sequence number of the last recorded notification."""
    last_ns: int = 0
    """The time of the last recorded notification."""
    at_last: Counter[tuple[Direction | None, str | None]] = attrs.Factory(Counter)
    """The number of recorded notifications with the time `last_ns`. A monitor may receive only part of a batch."""
    noted_ns: int = attrs.Factory(time.monotonic_ns)
    """The time of the last recorded event that is not a notification."""
    filled_ns: int = 0
    """The time up to which the recording is complete. A monitor may report earlier events again."""
    begun_ns: int = attrs.Factory(time.monotonic_ns)
    """When the recording began."""
    _pending: dict[tuple[object, ...], _Pending] = attrs.Factory(dict)

    def pending(self, event: Event) -> _Pending:
        """Return the recorded events with the signal and the reason of `event`."""
        reason = truncated(event.reason.encode("utf-8", "backslashreplace"))
        return self._pending.setdefault((event.direction, event.signal, reason), _Pending(array("Q", [self.begun_ns])))


class Gaps:
    """A filter that finds the events that a recording does not contain yet."""

    def __init__(self) -> None:
        self._boards: dict[str, _Seen] = {}
        self._begun_ns = time.monotonic_ns()

    def begin(self, board: str, recorded: RecorderStatus) -> None:
        """Treat all earlier events of a board's flight recorder as recorded."""
        now = time.monotonic_ns()
        self._boards[board] = _Seen(recorded.boot, recorded.sequence, now, noted_ns=now, begun_ns=now)

    def _seen(self, board: str) -> _Seen:
        return self._boards.setdefault(board, _Seen(noted_ns=self._begun_ns, begun_ns=self._begun_ns))

    def is_new(self, event: Event) -> bool:
        """Return whether a monitor's event is not in the recording yet. If so, the caller must record it."""
        seen = self._seen(event.board)
        if event.monotonic_ns <= seen.filled_ns:
            return False
        if event.event == "notification":
            if event.monotonic_ns != seen.last_ns:
                seen.last_ns = event.monotonic_ns
                seen.at_last.clear()
            seen.at_last[event.direction, event.signal] += 1
            seen.sequence = event.sequence
        else:
            seen.noted_ns = event.monotonic_ns
            if event.event == "pending":
                seen.pending(event).add(event, max(1, event.count))
        return True

    def after(self, board: str) -> int:
        """Return the time after which the flight recorder may have events that the recording lacks."""
        seen = self._seen(board)
        return max(seen.begun_ns, min(seen.last_ns, seen.noted_ns) - 1)

    def missing(self, past: Past) -> Iterator[Event]:
        """Yield the events in `past` that the recording lacks, and a mark for each gap in `past` itself."""
        seen = self._seen(past.board)
        is_same = past.boot == seen.boot
        if not is_same and seen.boot:
            yield _mark(past, "earlier events are unknown: the history was lost when the proxy exited")
        events, uncertain = _unrecorded(seen, past)
        for event in separated(events):
            if event.event == "pending":
                if number := uncertain.pop((event.direction, event.signal, event.reason), 0):
                    text = f"up to {number} earlier notifications of {event.signal} became pending: not recorded"
                    yield attrs.evolve(_mark(past, text, event), direction=event.direction, signal=event.signal)
                yield event
                continue
            if event.event != "notification":
                if max(event.monotonic_ns, event.last_ns) > seen.noted_ns:
                    yield event
                continue
            if (
                is_same
                and (lost := event.sequence - event.count - seen.sequence) > 0
                and event.monotonic_ns > seen.last_ns
            ):
                yield _mark(past, f"{lost} notifications before this were not recorded", event)
            count = event.count
            if event.monotonic_ns == seen.last_ns:
                count -= seen.at_last[event.direction, event.signal]
            if event.monotonic_ns >= seen.last_ns and count > 0:
                yield attrs.evolve(event, count=count)
            seen.sequence = max(seen.sequence, event.sequence) if is_same else event.sequence
        newest = max((max(event.monotonic_ns, event.last_ns) for event in past.events), default=0)
        seen.boot = past.boot
        seen.filled_ns = max(seen.filled_ns, newest)
        seen.last_ns, seen.noted_ns = max(seen.last_ns, newest), max(seen.noted_ns, newest)


def _unrecorded(seen: _Seen, past: Past) -> tuple[list[Event], Counter[tuple[object, ...]]]:
    """Return the events in `past` without the pending notifications that are recorded.

    The flight recorder merges equal events, some of which may be recorded. Also return, for each direction, signal and
    reason, how many others may be missing, because they may also be older than the recording.
    """
    events: list[Event] = []
    uncertain, later = Counter[tuple[object, ...]](), Counter[tuple[object, ...]]()
    added: list[tuple[_Pending, Event, int]] = []
    written_ns = max(seen.last_ns, seen.noted_ns)
    for event in reversed(past.events):
        if event.event != "pending":
            events.append(event)
            continue
        pending, key = seen.pending(event), (event.direction, event.signal, event.reason)
        recorded = pending.since(event.monotonic_ns) - later[key]
        later[key] += recorded
        missing = max(1, event.count) - recorded
        if missing <= 0:
            continue
        last_ns = max(event.monotonic_ns, event.last_ns)
        first = _moved(event, written_ns, pending.last)
        seconds = (last_ns - first.monotonic_ns) / 1e9
        last = attrs.evolve(first, time=first.time + seconds, monotonic_ns=last_ns, count=1)
        added.append((pending, last, missing))
        if event.monotonic_ns > pending.times[0]:
            events.append(attrs.evolve(first, count=missing) if missing > 1 else last)
        elif last_ns > seen.noted_ns:
            events.append(last)
            uncertain[key] = missing - 1
    for pending, last, missing in reversed(added):
        pending.add(last, missing)
    return events[::-1], uncertain


def _moved(event: Event, written_ns: int, known: Event | None) -> Event:
    """Move the first one of merged pending notifications to `written_ns`, but not beyond the last one.

    The missing ones are newer than the entries that are already in the file, so their times must not precede those.
    Convert the time to the wall clock like that of `known` (default: the first one).
    """
    monotonic_ns = min(written_ns, event.last_ns)
    if monotonic_ns <= event.monotonic_ns:
        return event
    base = known or event
    seconds = (monotonic_ns - base.monotonic_ns) / 1e9
    return attrs.evolve(event, time=base.time + seconds, monotonic_ns=monotonic_ns)


def _mark(past: Past, text: str, at: Event | None = None) -> Event:
    """Return a mark with the time of the event `at` (default: the first event in `past`)."""
    if at is None:
        at = past.events[0] if past.events else Event("message", time=time.time(), monotonic_ns=time.monotonic_ns())
    return Event("message", past.board, at.time, at.monotonic_ns, level="warning", message=text)
