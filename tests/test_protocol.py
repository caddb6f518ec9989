"""Tests of the control socket's messages: decoding reverses encoding, and invalid lines raise an error."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inco_trio.control import protocol
from inco_trio.control.protocol import (
    AcknowledgeAllRequest,
    AcknowledgeRequest,
    BoardStatus,
    Event,
    FlushRequest,
    Followed,
    FollowRequest,
    ForgetRequest,
    Greeting,
    HistoryStatus,
    LineBuffer,
    MessageError,
    MonitorRequest,
    Notifications,
    ReloadRequest,
    Request,
    RequestError,
    Response,
    RivalRequest,
    SendRequest,
    StatusRequest,
    decode_greeting,
    decode_reply,
    decode_request,
    encode_alone,
    encode_notifications,
)
from inco_trio.proxy_status import RivalStatus, SignalStatus, Status, TaskStatus
from inco_trio.signals import Direction
from inco_trio.stats import Stats

STATUS = Status(
    "l", 1.5, 2.5, True, "d", "systemd", Stats(received=3),
    (SignalStatus("s_irq", Direction.INBOUND, "/irq/s", 1, None, 0, 2, None),),
    (TaskStatus("send", 1, None, "down"),), rivals=(RivalStatus(7, 1.5, ("l", "/irq")),),
)  # fmt: skip
BOARDS = (BoardStatus("a", "no room"), BoardStatus("b", "", STATUS, HistoryStatus("5f", 3, 1, 2, 0, True)))
REQUESTS: list[tuple[Request, object, Response]] = [
    (SendRequest("s_irq", 3, "b"), 3, Response(sent=3)),
    (MonitorRequest("b", Direction.OUTBOUND, frozenset({"s_irq"}), frames=True), True, Response()),
    (FlushRequest(), True, Response()),
    (FollowRequest(frozenset({"b"})), {"b": Followed("5f", 1, 3)}, Response(follow={"b": Followed("5f", 1, 3)})),
    (AcknowledgeRequest("b", 3, "5f"), 3, Response(acknowledged=3)),
    (AcknowledgeAllRequest([["b", "5f", 3]]), 1, Response(acknowledged=1)),  # type: ignore[list-item]
    (ForgetRequest(), ["b"], Response(forgotten=("b",))),
    (ReloadRequest(), ["b: bad"], Response(refused=("b: bad",))),
    (RivalRequest("l0", "4:5"), ["b"], Response(rival=("b",))),
    (RivalRequest(directory="4:5"), [], Response()),
]
EVENTS = [
    Event("notification", "b", 1.5, 7, Direction.INBOUND, "s_irq", "/irq/s", 4, frame="00ff"),
    Event("notification", "b", 1.5, 7, Direction.OUTBOUND, "s_irq", sequence=4, boot="5f"),
    Event("merged", "b", direction=Direction.INBOUND, signal="s_irq", sequence=4, boot="5f", count=9),
    Event("ignored", "b", 1.5, 7, Direction.INBOUND, reason="malformed"),
    Event("link", "b", 1.5, 7, running=False),
    Event("dropped", "b", 1.5, 7, count=3, level="warning", message="m"),
    Event("lost", time=1.5, monotonic_ns=7, count=3),
]


@pytest.mark.parametrize(("request_", "value", "response"), REQUESTS)
def test_a_request_and_its_response_round_trip(request_: Request, value: object, response: Response) -> None:
    line = protocol.encode_request(request_)
    assert decode_request(line.rstrip(b"\n")) == (request_, {})
    decoded = decode_reply(protocol.encode_response(request_, value, {"id": [1]}))
    assert isinstance(decoded, Response)
    decoded.check(request_)
    assert attrs.evolve(decoded, keys=frozenset()) == response
    with pytest.raises(MessageError, match="the response to status lacks status"):
        decoded.check(StatusRequest())


def test_a_status_round_trips() -> None:
    line = "".join(protocol.encode_status(map(protocol.encode_board, BOARDS), {"id": 1})).encode()
    decoded = decode_reply(line)
    assert isinstance(decoded, Response)
    assert decoded.status == BOARDS
    assert json.loads(line)["status"] == [protocol.to_json(board) for board in BOARDS]


def test_a_greeting_and_an_error_round_trip() -> None:
    greeting = Greeting("x", 1, "5f", ("a", "b"))
    assert decode_greeting(protocol.encode_greeting(greeting)) == greeting
    refused = decode_greeting(protocol.encode_error(RequestError("busy", "later", {"id": 1})))
    assert isinstance(refused, Response)
    assert (refused.error, refused.message) == ("busy", "later")


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_round_trips(event: Event) -> None:
    line = protocol.encode_event(event, frames=True)
    decoded = decode_reply(line.encode())
    assert decoded == event
    assert isinstance(decoded, Event)
    assert json.loads(decoded.json()) == {"version": protocol.PROTOCOL} | json.loads(line)


def test_unknown_keys_and_events_are_accepted() -> None:
    assert decode_reply(b'{"event": "new", "more": [1], "time": 1}') == Event("new", time=1)


def test_notifications_round_trip() -> None:
    signals = ((Direction.INBOUND, "a"), (Direction.OUTBOUND, "b"))
    batch = Notifications("b1", "5f0c", 7, signals, [(0, 1.5, 3), (1, 2.5, 4), (0, 3.5, 5)])
    decoded = decode_reply(encode_notifications(*attrs.astuple(batch, recurse=False)).encode())
    assert isinstance(decoded, Notifications)
    assert attrs.evolve(decoded, signals=tuple(decoded.signals)) == batch


@given(
    st.tuples(st.text(max_size=5), st.text("0123456789abcdef")),
    st.integers(0, 1 << 62),
    st.tuples(st.sampled_from(Direction), st.from_regex("[a-z_]{1,5}", fullmatch=True) | st.text(max_size=5)),
    st.tuples(st.just(0), st.floats(0, allow_infinity=False), st.integers(0, 1 << 62)),
)
@example(("b1", "5f0c"), 7, (Direction.INBOUND, "a"), (0, 1795509553.258, 87212959895506))
def test_a_single_notification_round_trips(
    board: tuple[str, str], sequence: int, signal: tuple[Direction, str], item: tuple[int, float, int]
) -> None:
    line = encode_notifications(*board, sequence, (signal,), [item])
    assert decode_reply(line.rstrip("\n").encode()) == Notifications(*board, sequence, (signal,), [item])


@given(st.integers(1, 1 << 62), st.integers(0, 1 << 62), st.sampled_from(Direction))
def test_both_encoders_of_a_single_notification_agree(sequence: int, time: int, direction: Direction) -> None:
    board, signal = ("b\u00e91", "5f0c"), (direction, "a_irq")
    line = encode_notifications(*board, sequence, (signal,), [(0, time / 1e9, 42)])
    assert encode_alone(*board, sequence, signal, (time, 42)) == line


DEEP = b"[" * 100_000
BATCH = b'{"event": "notifications", "board": "b", "boot": "5f", "sequence": 1, "signals": %s, "items": %s}'


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"nonsense", "the line is not JSON: "),
        (b"\xff", "the line is not JSON: "),
        (b'{"event": "link", "time": NaN}', "the line is not JSON: NaN is not allowed"),
        (DEEP, "the line is not JSON: "),
        (b'{"event": ' + DEEP, "the line is not JSON: "),
        (b"[]", "the line is not a JSON object"),
        (b'{"event": 1}', "event: a number \\(expected a string\\)"),
        (b'{"event": [[1]]}', "event: a list \\(expected a string\\)"),
        (b'{"event": "notification"}', "the event notification lacks direction"),
        (b'{"event": "link", "running": 1}', "running: a number \\(expected true or false\\)"),
        (b'{"event": "x", "time": 1e300}', "time: 1e\\+300 \\(expected seconds since 1970\\)"),
        (b'{"event": "x", "time": -1}', "time: -1 \\(expected seconds since 1970\\)"),
        (b'{"event": "x", "direction": "up"}', "direction: 'up' \\(expected inbound or outbound\\)"),
        (b'{"event": "x", "frame": "zz"}', "frame: 'zz' \\(expected hexadecimal digits\\)"),
        (b'{"event": "x", "sequence": %d}' % (1 << 64), "sequence: 18446744073709551616 \\(expected a whole number of"),
        (b'{"status": [3]}', r"status\[0\]: a number \(expected a table\)"),
        (b'{"status": {}}', "status: a table \\(expected a list\\)"),
        (b'{"status": [{"open": true, "board": "b"}]}', r"status\[0\]\.status\.link: missing"),
        (b'{"status": [{"open": false}]}', r"status\[0\]\.board: missing"),
        (b'{"follow": {"b": 1}}', r"follow\.b: a number \(expected a table\)"),
        (b'{"sent": true}', "sent: a boolean \\(expected a whole number"),
        (b'{"event": "notifications"}', "the event `notifications` is not valid: null"),
        (BATCH % (b"[]", b"[[0, 1.5, 2]]"), "an item with a value out of range"),
        (BATCH % (b'[["inbound", "x"]]', b"[[-1, 1.5, 2]]"), "an item with a value out of range"),
        (BATCH % (b'[["inbound", "x"]]', b"[[0, 1e999, 2]]"), "an item with a value out of range"),
        (BATCH % (b'[["inbound", "x"]]', b"[[0, 1, 2]]"), "an item with a value of the wrong type"),
        (BATCH % (b'[["inbound", "x"]]', b"[[0, 1.5, true]]"), "an item with a value of the wrong type"),
        (BATCH % (b'[["inbound", "x"]]', b"[[0, 1.5]]"), "the event `notifications` is not valid"),
        (BATCH % (b'[["up", "x"]]', b"[]"), "expected inbound or outbound"),
        (BATCH % (b"[1]", b"[]"), "the event `notifications` is not valid"),
        (BATCH % (b"[]", b"1"), "the event `notifications` is not valid"),
        (b'{"forgotten": [1]}', r"forgotten\[0\]: a number \(expected a string\)"),
    ],
)
def test_invalid_messages_from_a_proxy_are_refused(line: bytes, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        decode_reply(line)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{}", "the process listening there is not inco-trio"),
        (b'{"protocol": 2}', "the proxy uses protocol 2, this program 1: install matching versions"),
        (b'{"protocol": 1, "name": "x"}', "pid: missing"),
    ],
)
def test_greetings_of_other_programs_are_refused(line: bytes, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        decode_greeting(line)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"request": [1]}', "request: a list (expected one of status, send, "),
        (b'{"request": "send"}', "signal: missing (expected a string)"),
        (b'{"request": "send", "signal": null}', "signal: null (expected a string)"),
        (b'{"request": "send", "signal": 1}', "signal: a number (expected a string)"),
        (b'{"request": "send", "signal": "x", "count": 1e1}', "count: a number (expected a whole number"),
        (b'{"request": "acknowledge-all", "positions": [["b1", 1]]}', "positions: a list (expected a list of lists"),
        (b'{"request": "follow", "batches": 1}', "batches: a number (expected true or false)"),
        (b'{"request": "monitor", "direction": "up"}', "direction: 'up' (expected inbound or outbound)"),
        (b'{"request": "monitor", "signals": [1]}', "signals: a list (expected a list of at most 1024 strings)"),
        (b'{"request": "monitor", "frames": "%s"}' % (b"x" * 99), f"frames: '{'x' * 59}... (expected true or false)"),
    ],
)
def test_a_request_that_is_refused(line: bytes, text: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(text)}"):
        decode_request(line)


def test_null_in_a_request_stands_for_the_default() -> None:
    assert decode_request(b'{"request": "send", "signal": "x", "count": null, "new": 1}') == (SendRequest("x"), {})


def test_the_server_does_not_import_cattrs() -> None:
    script = """
import sys
from inco_trio.control import protocol
request, tag = protocol.decode_request(b'{"request": "monitor", "direction": "inbound", "signals": ["x"]}')
protocol.encode_response(request, True, tag)
try:
    protocol.decode_request(b'{"request": "monitor", "signals": 1}')
except protocol.RequestError as error:
    protocol.encode_error(error)
protocol.encode_event(protocol.event_now("lost", count=1))
print(protocol.encode_greeting(protocol.Greeting("x", 1, "5f", ("b",))), "cattrs" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" False\n")


@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["event", "status", "board", "open", "signals", "follow", "time", "frame", "id", "request"]
                    )
                    | st.text(max_size=3),
                    inner,
                    max_size=5,
                )
            ),
            max_leaves=20,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_line_is_a_message_or_one_error(line: bytes) -> None:
    for decode in (decode_reply, decode_greeting):
        with contextlib.suppress(MessageError):
            decode(line)
    try:
        _, tag = decode_request(line)
    except RequestError as error:
        protocol.encode_error(error)
    else:
        json.dumps(tag)


@given(st.lists(st.binary(max_size=8).map(lambda line: line.replace(b"\n", b"")), max_size=6), st.data())
def test_lines_that_arrive_in_pieces_are_joined(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    received = LineBuffer(8)
    found: list[bytes] = []
    while stream:
        number = data.draw(st.integers(1, len(stream)))
        found += received.split(stream[:number])
        stream = stream[number:]
    assert found == lines


@pytest.mark.parametrize("data", [b"123456789", b"123456789\n", b"1\n123456789"])
def test_a_line_above_the_limit_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError, match="a line is longer than 8 bytes"):
        list(LineBuffer(8).split(data))


def test_an_id_must_not_be_nested() -> None:
    with pytest.raises(RequestError, match="must not contain nested"):
        decode_request(b'{"request": "status", "id": [[1]]}')


@pytest.mark.parametrize(
    ("id_", "is_short"),
    [
        (["x" * 256] * 16, True),
        ({f"{key:0256}": 10**255 for key in range(16)}, True),
        ([1e-300, True, None], True),
        (10**256, False),
        (-(10**256), False),
        ("x" * 257, False),
        ({"x" * 257: 1}, False),
        ([0] * 17, False),
        (dict.fromkeys(map(str, range(17))), False),
    ],
)
def test_an_id_must_be_short(id_: object, is_short: bool) -> None:
    """Encoding an `id` of 65,536 bytes takes milliseconds, in which the proxy would handle no notification."""
    line = json.dumps({"request": "status", "id": id_}).encode()
    if is_short:
        assert decode_request(line) == (StatusRequest(), {"id": id_})
    else:
        with pytest.raises(RequestError, match="more than 16 values"):
            decode_request(line)


def test_the_documentation_names_the_protocol_version_and_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs/control.md").read_text()
    assert f'{{"protocol": {protocol.PROTOCOL},' in page
    for kind in (Status, SignalStatus, TaskStatus, HistoryStatus, Event):
        for field in attrs.fields(kind):
            assert f"`{field.name}`" in page or field.name in ("event", "text", "status"), field.name
