"""The status of proxies in the text formats OpenMetrics (version 1.0.0) and Prometheus (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import attrs

from inco_trio.control.protocol import BoardStatus
from inco_trio.proxy_status import Status
from inco_trio.service.lines import printable

__all__ = ["Reported", "openmetrics_of_proxies", "textfile"]

COUNTERS = {
    "received": ("received_frames", "Frames read from the link."),
    "delivered": ("delivered_notifications", "State files written, one for each known inbound frame."),
    "triggered": ("triggered_notifications", "Outbound notifications accepted from trigger files and clients."),
    "sent": ("sent_frames", "Frames that the link accepted."),
    "unknown": ("unknown_frames", "Well-formed frames whose name is not an inbound signal of the table."),
    "malformed": ("malformed_frames", "Frames without a valid wire name."),
    "foreign": ("foreign_datagrams", "Datagrams that a process other than the peer sent to a unix: link."),
    "dropped": ("dropped_frames", "Frames that the kernel dropped because the receive queue was full."),
    "overflowed": ("inotify_overflows", "Overflows of the inotify queue."),
    "write_failures": ("write_failures", "Failed attempts to write a state file."),
    "send_failures": ("send_failures", "Failed attempts to send a frame."),
    "unsendable": ("unsendable_notifications", "Outbound notifications discarded as too long for the link."),
    "unfinished": ("unfinished_notifications", "Notifications that were still pending when the proxy closed."),
    "recovered": ("recovered_notifications", "Notifications read by a previous process and delivered by this one."),
    "events_lost": ("lost_events", "Events that a slow reader of an event stream missed."),
    "restarts": ("task_restarts", "Restarts of a failed task."),
    "link_downs": ("link_downs", "Number of times that the link went down."),
    "rivals": ("rivals", "Other proxies that served the same link or watched the same triggers."),
}
"""The name and help text of each counter's metric."""
SIGNALS = {
    "count": ("notifications", "counter", "Notifications that were delivered or sent."),
    "failures": ("notification_failures", "counter", "Failed attempts to deliver or send a notification."),
    "pending": ("pending_notifications", "gauge", "Notifications that could not be written yet."),
    "last": ("last_notification_timestamp_seconds", "gauge", "Time of the last notification of the signal."),
}
HISTORY = {
    "waiting": ("unacknowledged_notifications", "gauge", "Notifications that a follower has not acknowledged."),
    "merged": ("merged_notifications", "counter", "Notifications that were merged before they were acknowledged."),
    "followed": ("followed", "gauge", "Whether the board has a follower, such as the gateway to a broker."),
}
"""Metrics that exist only for boards that have had a follower."""

Samples = list[tuple[Mapping[str, str], float]]
"""The labels and the value of each sample."""
Family = tuple[str, str, str, Samples]
"""The name, type, help text and samples of a metric."""


@attrs.frozen
class Reported:
    """The status that one proxy reported."""

    proxy: str
    """The value of the label `proxy`."""
    boards: tuple[BoardStatus, ...] | None
    """The status of each board, or None if the proxy does not answer."""


def textfile(proxies: Mapping[str, Iterable[BoardStatus]]) -> str:
    """Return the metrics of each proxy's boards in Prometheus's text format (version 0.0.4).

    The textfile collector of node_exporter understands only this format. The format has no units and no end marker, and
    its TYPE lines contain the same names as the samples.
    """
    reported = [Reported(name, (*boards,)) for name, boards in proxies.items()]
    return "".join(f"{line}\n" for family in _of_proxies(reported) for line in _lines(*family, openmetrics=False))


def openmetrics_of_proxies(reported: Iterable[Reported]) -> str:
    """Return the metrics of several proxies and of their boards, with the label `proxy`."""
    return _text(_of_proxies([*reported]))


def _text(families: Iterable[Family]) -> str:
    return "".join(f"{line}\n" for family in families for line in _lines(*family)) + "# EOF\n"


def _of_proxies(reported: list[Reported]) -> Iterator[Family]:
    yield "proxies", "gauge", "Proxies that were found.", [({}, len(reported))]
    up: Samples = [({"proxy": each.proxy}, each.boards is not None) for each in reported]
    yield "proxy_up", "gauge", "Whether the proxy answers.", up
    yield from _of_boards(
        [({"proxy": each.proxy, "board": board.board}, board) for each in reported for board in each.boards or ()]
    )


def _of_boards(boards: list[tuple[dict[str, str], BoardStatus]]) -> Iterator[Family]:
    running = [(labels | {"link": b.status.link}, b.status, b) for labels, b in boards if b.status is not None]
    yield "open", "gauge", "Whether the board is open.", [(labels, b.status is not None) for labels, b in boards]
    text = "Whether the link is up and has a carrier, or a peer."
    yield "link_up", "gauge", text, [(labels, status.running) for labels, status, _ in running]
    yield "start_time_seconds", "gauge", "When the proxy was opened.", [(labels, s.since) for labels, s, _ in running]
    text = "Tasks and signals that currently have a problem."
    yield "problems", "gauge", text, [(labels, _problems(status)) for labels, status, _ in running]
    for key, (name, text) in COUNTERS.items():
        yield name, "counter", text, [(labels, getattr(status.counters, key)) for labels, status, _ in running]
    for key, (name, kind, text) in HISTORY.items():
        yield name, kind, text, [(labels, getattr(b.history, key)) for labels, _, b in running if b.history is not None]
    for key, (name, kind, text) in SIGNALS.items():
        samples: Samples = [
            (labels | {"direction": signal.direction.value, "signal": signal.signal}, value)
            for labels, status, _ in running
            for signal in status.signals
            if (value := getattr(signal, key)) is not None
        ]
        yield name, kind, text, samples


def _problems(status: Status) -> int:
    problems = [*(task.problem for task in status.tasks), *(signal.problem for signal in status.signals)]
    return len(problems) - problems.count(None)


def _lines(name: str, kind: str, text: str, samples: Samples, *, openmetrics: bool = True) -> Iterator[str]:
    suffix = "_total" if kind == "counter" else ""
    family = name if openmetrics else f"{name}{suffix}"
    yield f"# TYPE inco_trio_{family} {kind}"
    if openmetrics and name.endswith("_seconds"):
        yield f"# UNIT inco_trio_{name} seconds"
    yield f"# HELP inco_trio_{family} {text}"
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"inco_trio_{name}{suffix}{f'{{{shown}}}' if shown else ''} {float(value):.17g}"


def _escaped(label: str) -> str:
    """Escape a label value. A path need not be valid UTF-8, and `status --openmetrics` may print it on a terminal."""
    text = "\n".join(map(printable, label.split("\n")))
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
