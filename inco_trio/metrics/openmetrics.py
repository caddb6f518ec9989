"""What a running proxy tells of itself, in the OpenMetrics text format (version 1.0.0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

__all__ = ["Family", "families", "openmetrics", "shown"]

COUNTERS = {
    "received": ("received_frames", "Frames taken from the link."),
    "delivered": ("delivered_notifications", "State files written, one for each known inbound frame."),
    "triggered": ("triggered_notifications", "Outbound notifications accepted from triggers and clients."),
    "sent": ("sent_frames", "Frames that the link accepted."),
    "unknown": ("unknown_frames", "Well-formed frames whose name is not an inbound signal of the table."),
    "malformed": ("malformed_frames", "Frames that carry no wire name."),
    "foreign": ("foreign_datagrams", "Datagrams of a unix: link that somebody else than the peer sent."),
    "dropped": ("dropped_frames", "Frames that the kernel dropped because the receive queue was full."),
    "overflowed": ("inotify_overflows", "Overflows of the inotify queue."),
    "write_failures": ("write_failures", "Attempts to write a state file that failed."),
    "send_failures": ("send_failures", "Attempts to send a frame that failed."),
    "unsendable": ("unsendable_notifications", "Outbound notifications that were given up."),
    "unfinished": ("unfinished_notifications", "Notifications that were accepted and not finished at the close."),
    "recovered": ("recovered_notifications", "Notifications that a predecessor had read and not finished."),
    "events_lost": ("lost_events", "Events that a slow reader of an event stream did not get."),
    "restarts": ("leg_restarts", "Restarts of a failed leg."),
}
"""By the name in the status: that of the metric, and its help."""
SIGNALS = {
    "count": ("notifications", "counter", "Notifications that were carried."),
    "failures": ("notification_failures", "counter", "Attempts to carry a notification that failed."),
    "owed": ("owed_notifications", "gauge", "Notifications that could not be written yet."),
    "last": ("last_notification_timestamp_seconds", "gauge", "When the signal was carried last."),
}

HISTORY = {
    "waiting": ("unacknowledged_notifications", "gauge", "Notifications that a follower has not acknowledged."),
    "merged": ("merged_notifications", "counter", "Notifications that were merged, as nobody acknowledged them."),
    "followed": ("followed", "gauge", "Whether somebody follows the board, as the gateway to a broker."),
}
"""Of a board that was ever followed."""

Status = Mapping[str, Any]


@attrs.frozen
class Family:
    """A metric: without the prefix `inco_trio_`, and for a counter without `_total`."""

    name: str
    kind: str
    """gauge or counter."""
    text: str
    samples: list[tuple[dict[str, str], float]]
    """Labels and value of each."""


def openmetrics(boards: Iterable[Status]) -> str:
    """The metrics of boards as `status` tells them, see docs/control.md."""
    return "".join(f"{line}\n" for family in families(list(boards)) for line in _lines(family)) + "# EOF\n"


def families(boards: list[Status]) -> Iterator[Family]:
    """The metrics of boards as `status` tells them."""
    running = [board for board in boards if board["open"]]
    yield Family("open", "gauge", "Whether the board is open.", [({"board": b["board"]}, b["open"]) for b in boards])
    states = [(_labels(b), b["running"]) for b in running]
    yield Family("link_up", "gauge", "Whether the link is up and has a carrier, or a peer.", states)
    since = [(_labels(b), b["since"]) for b in running]
    yield Family("start_time_seconds", "gauge", "When the proxy was opened.", since)
    yield Family("problems", "gauge", "Legs and signals that something is wrong with now.", [
        (_labels(b), sum(each["problem"] is not None for each in (*b["legs"], *b["signals"]))) for b in running
    ])  # fmt: skip
    for key, (name, text) in COUNTERS.items():
        yield Family(name, "counter", text, [(_labels(b), b["counters"][key]) for b in running])
    for key, (name, kind, text) in HISTORY.items():
        yield Family(name, kind, text, [(_labels(b), b["history"][key]) for b in running if b.get("history")])
    for key, (name, kind, text) in SIGNALS.items():
        samples = [
            (_labels(b) | {"direction": s["direction"], "signal": s["signal"]}, s[key])
            for b in running
            for s in b["signals"]
            if s[key] is not None
        ]
        yield Family(name, kind, text, samples)


def _labels(board: Status) -> dict[str, str]:
    return {"board": board["board"], "link": board["link"]}


def _lines(family: Family) -> Iterator[str]:
    name = family.name
    unit = f"\n# UNIT inco_trio_{name} seconds" if name.endswith("_seconds") else ""
    yield f"# TYPE inco_trio_{name} {family.kind}{unit}"
    yield f"# HELP inco_trio_{name} {family.text}"
    for labels, value in family.samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"inco_trio_{name}{'_total' if family.kind == 'counter' else ''}{{{shown}}} {float(value):.17g}"


def _escaped(label: str) -> str:
    text = shown(label)
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def shown(label: str) -> str:
    """`label` as text that can be written: a name need not be UTF-8."""
    return label.encode(errors="backslashreplace").decode()
