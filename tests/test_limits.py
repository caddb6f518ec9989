"""Tests that SECURITY.md contains the limits of the package, with their values."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import inco_trio

PACKAGE = Path(inco_trio.__file__).parent
ROOT = Path(__file__).parents[1]
LISTED = {
    "capture.pcapng.BLOCK_MAX": "block of a recording",
    "capture.pcapng.MEMORY_MAX": "memory for what `plot` and `replay` keep of a recording",
    "config.HISTORY_MAX": "notifications in the flight recorder",
    "config.UDRV_SIZE_MAX": "udrv.json",
    "control.answering.HISTORY_SECONDS": "`history` requests of other users",
    "control.answering.HISTORY_SECONDS_SHARED": "`history` requests of other users",
    "control.answering.SEND_MAX": "one `send` request",
    "control.feed.HISTORIES_MAX": "`history` requests of other users",
    "control.monitors.AHEAD": "notifications that a follower has not acknowledged",
    "control.monitors.QUEUES_MAX": "events that all monitors of other users have not read",
    "control.monitors.WAITING_BYTES_MAX": "events that a monitor has not read",
    "control.monitors.WAITING_MAX": "events that a monitor has not read",
    "control.protocol.ID_LENGTH_MAX": "`id` of a request",
    "control.protocol.ID_VALUES_MAX": "`id` of a request",
    "control.protocol.LINE_MAX": "line of a client",
    "control.protocol.SIGNALS_MAX": "`signals` of a `monitor` request",
    "control.protocol.REPLY_MAX": "line from a proxy, as clients accept it",
    "control.answering.PART": "answer that a client does not read",
    "control.server.CLIENTS_MAX": "connections to the control socket",
    "control.server.RESERVED": "connections to the control socket",
    "control.server.USER_MAX": "connections to the control socket",
    "frame.FRAME_MAX": "frame",
    "frame.NAME_MAX": "frame",
    "links.name_filter.SAMPLE": "unknown and malformed frames on an interface",
    "links.packet.RECEIVE_BUFFER": "frames in the receive queue",
    "links.unix.SENDERS_MAX": "sender paths of a `unix:` link, including the peer's path",
    "linux.files.PATH_MAX": "paths in configuration files",
    "linux.files.TARGETS_MAX": "symlinks on a path of another user",
    "linux.files._SYMLINKS_MAX": "symlinks on a path of another user",
    "linux.processes.ENVIRONMENT_MAX": "command line and environment of another process",
    "linux.processes.SILENT_MAX": "processes whose files in /proc do not answer",
    "linux.processes._COMMAND_MAX": "command line and environment of another process",
    "metrics.http_server.CONNECTIONS_MAX": "connections to the exporter",
    "metrics.http_server.REQUEST_MAX": "connections to the exporter",
    "metrics.http_server.REQUEST_PATIENCE": "connections to the exporter",
    "mqtt.bridge_progress.BOOTS_MAX": "numberings of frames that a bridge remembers",
    "mqtt.gateway.REQUESTS_MAX": "requests of MQTT clients",
    "mqtt.gateway.REQUEST_MAX": "requests of MQTT clients",
    "mqtt.session.PACKET_MAX": "messages of a broker to a bridge",
    "mqtt.session.RECEIVE_MAX": "messages of a broker to a bridge",
    "persist.followed.KEPT": "notifications that a follower has not acknowledged",
    "persist.recorder.KEPT": "notifications in the flight recorder",
    "persist.recorder.KEPT_MAX": "notifications in the flight recorder",
    "persist.recorder.NAMES_MAX": "names of signals in the flight recorder",
    "proxy.flood.FLOOD": "unknown and malformed frames on an interface",
    "proxy.inbound.DRAINED_MAX": "frames in the queue of a link that is replaced",
    "registers.directory.SEARCHED_MAX": "files of an IRQ directory that are searched for those of a killed proxy",
    "service.lines.TEXT_MAX": "text of a log line",
    "service.throttle.CAUSES_MAX": "log lines of one board, except those of notifications with `-v`",
    "service.throttle.LINES_MAX": "log lines of one board, except those of notifications with `-v`",
    "validation.NAMES_MAX": "paths in configuration files",
    "validation.REPORTED_MAX": "other configuration files",
    "validation.SEPARATORS_MAX": "udrv.json",
    "validation.SIZE_MAX": "other configuration files",
}
"""The row of the table for each limit that others can reach."""
OTHERS = {
    "capture.pcapng.OPTION_MAX": "the file format cuts longer texts",
    "capture.picture.MARKS_MAX": "a picture shows this number of marks",
    "capture.picture.TICKS_MAX": "a picture shows this number of ticks",
    "capture.recording._STEP_MAX": "a larger jump of the clock in a recording is invalid",
    "capture.recording.COUNT_MAX": "a larger count in a recording is invalid",
    "capture.summary.TIME_MAX": "a later time in a recording is invalid",
    "cli.options.DIGITS_MAX": "a value of an option",
    "cli.options.HISTORY_MAX": "a value of an option",
    "cli.record.HELD_MAX": "further events are written without waiting for the history",
    "cli.send.SLEEP_MAX": "an interval between two looks at the clock",
    "control.follower.POSITIONS_MAX": "our own request",
    "doctor.space.ENTRIES_MAX": "the doctor names the largest files that it has found until then",
    "links.address.INTERFACE_MAX": "the kernel's limit",
    "links.address.LABEL_MAX": "our own log lines",
    "links.name_filter._LOADS_MAX": "a part of our own filter",
    "links.unix.PEEKED_MAX": "the bridge reads further frames later",
    "linux.bpf.INSTRUCTIONS_MAX": "the kernel's limit",
    "linux.files.FILE_NAME_MAX": "the kernel's limit",
    "linux.inotify.PADDED_MAX": "the kernel's limit",
    "linux.sockets.SOCKET_PATH_MAX": "the kernel's limit",
    "linux.users.ID_MAX": "the kernel's limit",
    "mqtt.bridge_codec.NUMBER_MAX": "a larger number in a message is invalid",
    "mqtt.configuration.SECRET_MAX": "a value of the configuration: MQTT allows no longer password",
    "mqtt.configuration.STATUS_SECONDS_MAX": "a value of the configuration",
    "mqtt.session.INFLIGHT_MAX": "our own messages",
    "mqtt.session._PUBLISH_PACKET_MAX": "the limit of MQTT",
    "persist.fdstore._FD_MAX": "a larger number is invalid",
    "persist.followed.NUMBER_MAX": "a larger number in stored memory is invalid",
    "persist.inflight.PENDING_MAX": "a larger number in stored memory is invalid",
    "persist.inflight.SEQUENCE_MAX": "a larger number in stored memory is invalid",
    "persist.inflight.WATCH_MAX": "a larger number in stored memory is invalid",
    "persist.queue.POSITION_MAX": "a larger number in stored memory is invalid",
    "persist.recorder.COUNT_MAX": "one record; further notifications are in the next record",
    "persist.recorder.NUMBER_MAX": "a larger number in stored memory is invalid",
    "proxy.fleet.PAUSE_MAX": "a pause between attempts",
    "trust.SYMLINKS_MAX": "the kernel's limit",
    "testing.carriers._FDS_MAX": "the test bench",
    "validation.NUMBER_MAX": "a larger number in a file is invalid",
    "validation.SHOWN_MAX": "a message cuts longer values",
    "validation.TIME_MAX": "a later time in a file is invalid",
}
"""Why other constants are not in the table."""


def limits() -> Iterator[str]:
    """Yield the module and the name of each constant that is called a maximum."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else ()
            yield from (
                f"{module}.{each.id}" for each in targets if isinstance(each, ast.Name) and each.id.endswith("_MAX")
            )


def rows() -> dict[str, str]:
    """Return the text of each row of the table, keyed by its first cell."""
    section = (ROOT / "SECURITY.md").read_text().partition("## Limits\n")[2]
    cells = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells}


def shown(value: float) -> list[str]:
    """Return the texts that the table may use for a number."""
    number = int(value)
    return [f"{number:,}", f"{number >> 20} MiB", f"{number >> 10} KiB"][: 1 + 2 * (not number % 1024)]


def test_each_maximum_is_in_the_table_or_has_a_reason() -> None:
    assert {*limits()} - {*LISTED} == {*OTHERS}


@pytest.mark.parametrize("limit", LISTED)
def test_the_table_has_the_value_of_each_limit(limit: str) -> None:
    module, _, name = limit.rpartition(".")
    value = getattr(importlib.import_module(f"inco_trio.{module}"), name)
    words = rows()[LISTED[limit]].replace(";", " ").replace(",  ", " ").split()
    texts = " ".join(word.strip("(),:") for word in words)
    assert any(f" {text} " in f" {texts} " for text in shown(value)), (value, rows()[LISTED[limit]])
