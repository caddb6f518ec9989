"""The content of a flight recorder as events of the control socket."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator

from inco_trio.control.protocol import Event
from inco_trio.persist.recorder import LEVELS, Note, Recorded, Recorder

__all__ = ["past_events"]


def past_events(board: str, recorder: Recorder, after: int = 0) -> Iterator[Event]:
    """Yield the recorded events of a board that are newer than the monotonic time `after`, oldest first.

    An event that occurred several times is included if its last occurrence is newer than `after`.
    """
    recorder.check_clock()
    # The proxy may overwrite records while the caller lets other tasks run.
    past = recorder.snapshot()
    both: tuple[Iterator[Recorded | Note], ...] = (past.notifications(after), past.notes(after))
    for each in heapq.merge(*both, key=operator.attrgetter("monotonic_ns")):
        yield _notification(board, each) if isinstance(each, Recorded) else _event(board, each)


def _notification(board: str, each: Recorded) -> Event:
    return Event(
        "notification", board, each.time_ns / 1e9, each.monotonic_ns, each.direction, each.signal,
        sequence=each.sequence, count=each.count, delay=max(0.0, each.delay), delay_max=max(0.0, -each.delay),
    )  # fmt: skip


def _event(board: str, note: Note) -> Event:
    is_reason = note.kind in ("pending", "ignored")
    return Event(
        note.kind, board, note.time_ns / 1e9, note.monotonic_ns, note.direction, note.signal,
        reason=note.text if is_reason else "", message="" if is_reason else note.text,
        running=note.kind == "link" and bool(note.state), duration=note.seconds if note.count == 1 else 0.0,
        count=note.count,
        last_ns=note.last_ns if note.count > 1 else 0,
        level="" if is_reason or note.kind == "link" else LEVELS[min(note.state, len(LEVELS) - 1)],
    )  # fmt: skip
