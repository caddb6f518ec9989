"""What a running proxy tells of itself, in the OpenMetrics text format (version 1.0.0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["openmetrics"]

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

Status = Mapping[str, Any]


def openmetrics(boards: Iterable[Status]) -> str:
    """The metrics of boards as `status` tells them, see docs/control.md."""
    return "".join(f"{line}\n" for line in _lines(list(boards)))


def _lines(boards: list[Status]) -> Iterator[str]:
    running = [board for board in boards if board["open"]]
    yield from _family(
        "open", "gauge", "Whether the board is open.", [({"board": b["board"]}, b["open"]) for b in boards]
    )
    states = [({"board": b["board"], "link": b["link"]}, b["running"]) for b in running]
    yield from _family("link_up", "gauge", "Whether the link is up and has a carrier, or a peer.", states)
    since = [({"board": b["board"]}, b["since"]) for b in running]
    yield from _family("start_time_seconds", "gauge", "When the proxy was opened.", since)
    for key, (name, text) in COUNTERS.items():
        yield from _family(name, "counter", text, [({"board": b["board"]}, b["counters"][key]) for b in running])
    for key, (name, kind, text) in SIGNALS.items():
        samples = [
            ({"board": b["board"], "direction": s["direction"], "signal": s["signal"]}, s[key])
            for b in running
            for s in b["signals"]
            if s[key] is not None
        ]
        yield from _family(name, kind, text, samples)
    yield "# EOF"


def _family(name: str, kind: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Iterator[str]:
    unit = f"\n# UNIT inco_trio_{name} seconds" if name.endswith("_seconds") else ""
    yield f"# TYPE inco_trio_{name} {kind}{unit}"
    yield f"# HELP inco_trio_{name} {text}"
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"inco_trio_{name}{'_total' if kind == 'counter' else ''}{{{shown}}} {float(value):.17g}"


def _escaped(label: str) -> str:
    text = label.encode(errors="backslashreplace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
