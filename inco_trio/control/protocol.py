"""The messages of the control socket and their JSON lines, without I/O. docs/control.md documents them.

The server decodes requests and encodes responses and events; clients do the reverse. Decoders raise `MessageError` for
lines that the protocol does not allow. They ignore unknown keys, which a newer version may send. Clients decode with
cattrs. The server uses the rules in `_KEYS` instead, because importing cattrs would delay its other work.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, NoReturn, TypeVar

import attrs

from inco_trio import real_clock
from inco_trio.proxy_status import SignalStatus, Status
from inco_trio.signals import Direction
from inco_trio.validation import NAMES, RULES, InvalidValueError, Rule, Table, structure

__all__ = [
    "AHEAD", "LINE_MAX", "PROTOCOL", "REPLY_MAX", "AcknowledgeAllRequest", "AcknowledgeRequest", "BoardStatus", "Event",
    "FlushRequest", "FollowRequest", "Followed", "ForgetRequest", "Greeting", "HistoryRequest", "HistoryStatus",
    "LineBuffer", "MessageError", "MonitorRequest", "Notifications", "Past", "ReloadRequest", "Reply", "Request",
    "RequestError", "Response", "RivalRequest", "SendRequest", "StatusRequest", "decode_greeting", "decode_reply",
    "decode_request", "encode_alone", "encode_board", "encode_error", "encode_event", "encode_greeting",
    "encode_history", "encode_notifications", "encode_request", "encode_response", "encode_status", "event_at",
    "event_now", "to_json",
]  # fmt: skip

PROTOCOL = 1
"""The protocol version. Each change that breaks clients increments it."""
LINE_MAX = 65_536
"""Maximum length of a line from a client, in bytes."""
ID_VALUES_MAX = 16
"""Maximum number of values in the `id` of a request."""
ID_LENGTH_MAX = 256
"""Maximum length of each text and integer in the `id` of a request, in characters."""
SIGNALS_MAX = 1024
"""Maximum number of names in the filter of a monitor. A line of 65,536 bytes could contain names that need 1.2 MB."""
_ID_INTEGER_MAX: int = 10**ID_LENGTH_MAX
REPLY_MAX = 1 << 25
"""Maximum length of a line from a proxy, in bytes. The status of 5,000 boards needs 20 MB."""
AHEAD = 1024
"""Maximum number of unacknowledged notifications that a follower receives for each board."""
_T = TypeVar("_T")


class MessageError(ValueError):
    """A line that the protocol does not allow. The message of the exception gives the reason."""


class RequestError(Exception):
    """The refusal of a request: an error code from docs/control.md, a message, and the `id` of the request (`tag`)."""

    def __init__(self, error: str, message: str, tag: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.error, self.message, self.tag = error, message, tag or {}


class LineBuffer:
    """A buffer that splits received bytes into lines of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._searched = 0

    def split(self, data: bytes) -> Iterable[bytes]:
        """Add received bytes, and return all complete lines. Iterating raises MessageError if a line is too long."""
        if not self._data and data.endswith(b"\n") and len(data) <= self._limit:
            return data[:-1].split(b"\n")  # Most calls take this path, which is much faster.
        self._data += data
        return self._lines()

    def _lines(self) -> Iterator[bytes]:
        while 0 <= (end := self._data.find(b"\n", self._searched)) <= self._limit:
            line = bytes(self._data[:end])
            del self._data[: end + 1]
            self._searched = 0
            yield line
        if len(self._data) > self._limit:
            raise MessageError(f"a line is longer than {self._limit} bytes")
        self._searched = len(self._data)


@attrs.frozen(slots=False)
class StatusRequest:
    """A request for the status of all boards or of one board."""

    board: str | None = None


@attrs.frozen(slots=False)
class SendRequest:
    """A request to send the frame of an outbound signal `count` times."""

    signal: str
    count: int = 1
    board: str | None = None


@attrs.frozen(slots=False)
class MonitorRequest:
    """A request for all future events that pass the filters."""

    board: str | None = None
    direction: Direction | None = None
    signals: Collection[str] | None = None
    frames: bool = False


@attrs.frozen(slots=False)
class FlushRequest:
    """A request for a `flushed` event, which the proxy sends after all earlier events."""


@attrs.frozen(slots=False)
class FollowRequest:
    """A request for all notifications of these boards. The proxy keeps each one until the client acknowledges it."""

    boards: Collection[str] | None = None
    batches: bool = False
    """Whether to report several notifications in one `notifications` event."""


@attrs.frozen(slots=False)
class AcknowledgeRequest:
    """A request to delete the notifications up to the number `sequence` from the history of a board."""

    board: str
    sequence: int
    boot: str | None = None


@attrs.frozen(slots=False)
class AcknowledgeAllRequest:
    """A request to delete notifications of several boards.

    A position consists of a board, its `boot` and a sequence number.
    """

    positions: Sequence[tuple[str, str, int]]


@attrs.frozen(slots=False)
class ForgetRequest:
    """A request to end the histories of boards that have no follower."""

    boards: Collection[str] | None = None


@attrs.frozen(slots=False)
class HistoryRequest:
    """A request for the events in a board's flight recorder, optionally only for events newer than `after`."""

    board: str | None = None
    after: int | None = None
    """A CLOCK_MONOTONIC time in nanoseconds."""


@attrs.frozen(slots=False)
class ReloadRequest:
    """A request to reload the configuration, as SIGHUP does, and to report what was refused."""


@attrs.frozen(slots=False)
class RivalRequest:
    """A report by another proxy that it shares this link or this IRQ directory, until it closes the connection."""

    link: str | None = None
    netns: str | None = None
    """The network namespace of the link, as DEVICE:INODE."""
    directory: str | None = None
    """The directory, as DEVICE:INODE, because its path may differ between mount namespaces."""


Request = (
    HistoryRequest
    | ReloadRequest
    | RivalRequest
    | StatusRequest
    | SendRequest
    | MonitorRequest
    | FlushRequest
    | FollowRequest
    | AcknowledgeRequest
    | AcknowledgeAllRequest
    | ForgetRequest
)

_REQUESTS: dict[str, tuple[type[Request], str]] = {
    "status": (StatusRequest, "status"),
    "send": (SendRequest, "sent"),
    "monitor": (MonitorRequest, "monitor"),
    "flush": (FlushRequest, "flush"),
    "follow": (FollowRequest, "follow"),
    "acknowledge": (AcknowledgeRequest, "acknowledged"),
    "acknowledge-all": (AcknowledgeAllRequest, "acknowledged"),
    "forget": (ForgetRequest, "forgotten"),
    "history": (HistoryRequest, "history"),
    "reload": (ReloadRequest, "refused"),
    "rival": (RivalRequest, "rival"),
}
"""The class of each request and the key of the value in its response, keyed by request name."""
_REQUEST = Rule((str,), f"one of {', '.join(_REQUESTS)}", _REQUESTS.__contains__, lambda name: _REQUESTS[name][0])
_SET = Rule(NAMES.types, NAMES.expected, NAMES.is_valid, frozenset)
_SIGNALS = Rule(
    NAMES.types,
    f"a list of at most {SIGNALS_MAX} strings",
    lambda names: len(names) <= SIGNALS_MAX and NAMES.is_valid(names),
    frozenset,
)
_POSITIONS = Rule(
    (list,),
    "a list of lists [board, boot, sequence]",
    lambda items: all(isinstance(item, list) and [*map(type, item)] == [str, str, int] for item in items),
)
_KEYS: dict[str, Rule] = {
    **dict.fromkeys(("board", "boot", "directory", "link", "netns", "signal"), RULES[str]),
    **dict.fromkeys(("after", "count", "sequence"), RULES[int]),
    "boards": _SET,
    "signals": _SIGNALS,
    "direction": RULES[Direction],
    "positions": _POSITIONS,
    **dict.fromkeys(("batches", "frames"), RULES[bool]),
}
"""The rule for the value of each key, for all requests."""
_NAMES = {kind: (name, key) for name, (kind, key) in _REQUESTS.items()}


def encode_request(request: Request) -> bytes:
    fields = {key: value for key, value in vars(request).items() if value is not None}
    return _line({"request": _NAMES[type(request)][0]} | fields)


def decode_request(line: bytes) -> tuple[Request, Mapping[str, object]]:
    """Decode a request. Also return its `id`, which the response must repeat. Raises RequestError."""
    try:
        message = _object(line)
    except MessageError as error:
        raise RequestError("not-json", str(error)) from None
    tag = {"id": message["id"]} if "id" in message else {}
    if not _is_flat(tag.get("id")):
        text = f"id: must not contain nested lists or objects, more than {ID_VALUES_MAX} values, numbers above 1e308,"
        raise RequestError("invalid", f"{text} or texts or integers of more than {ID_LENGTH_MAX} characters")
    try:
        kind: type[Request] = _REQUEST(message.get("request"))
    except InvalidValueError as error:
        raise RequestError("unknown-request", f"request: {error}", tag) from None
    fields = Table(message)
    # Treat null as a missing key if the field has a default.
    used = [each for each in attrs.fields(kind) if each.default is attrs.NOTHING or message.get(each.name) is not None]
    request = kind(**{each.name: fields.value(each.name, _KEYS[each.name]) for each in used})
    if fields.problems:
        raise RequestError("invalid", fields.problems[0], tag)
    return request, tag


def _is_flat(value: object) -> bool:
    """Return whether a value contains no nested lists or objects, and no number that is too large for a float.

    Encoding a deeply nested value may fail. Python decodes 1e999 as infinity, which JSON cannot represent. Also check
    that the value is small: encoding one of 65,536 bytes would delay notifications by some milliseconds.
    """
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return len(inner) <= (2 if isinstance(value, dict) else 1) * ID_VALUES_MAX and all(map(_is_short, inner))


def _is_short(value: object) -> bool:
    match value:
        case str():
            return len(value) <= ID_LENGTH_MAX
        case int():
            return -_ID_INTEGER_MAX < value < _ID_INTEGER_MAX
        case float():
            return not math.isinf(value)
    return not isinstance(value, (list, dict))


@attrs.frozen(slots=False)
class Greeting:
    """The first line that a proxy sends on a connection."""

    name: str
    pid: int
    boot: str
    """A random identifier of the proxy's process."""
    boards: tuple[str, ...]
    """The names of the open boards."""
    protocol: int = PROTOCOL


@attrs.frozen(slots=False)
class HistoryStatus:
    """The state of the history of a board."""

    boot: str
    sequence: int
    acknowledged: int
    waiting: int
    """Number of notifications that have not been acknowledged."""
    merged: int
    """Number of notifications that have been merged since the history began."""
    followed: bool


@attrs.frozen(slots=False)
class BoardStatus:
    """The status of one board."""

    board: str
    problem: str = ""
    """Why the board is not open."""
    status: Status | None = None
    """The status of the board's proxy; None if the board is not open."""
    history: HistoryStatus | None = None
    """The state of the board's history, or None if the board has never had a follower."""


@attrs.frozen(slots=False)
class Followed:
    """The state of the history of a board when a follower starts."""

    boot: str
    acknowledged: int
    sequence: int


@attrs.frozen(slots=False)
class Past:
    """The content of a board's flight recorder."""

    board: str
    boot: str
    """The identifier of the recorder; see `RecorderStatus`."""
    events: tuple[Event, ...]
    """The events, ordered by monotonic time."""


@attrs.frozen(slots=False)
class Response:
    """The response of a proxy: an error, or the requested value."""

    status: tuple[BoardStatus, ...] = ()
    sent: int = 0
    follow: Mapping[str, Followed] = attrs.Factory(dict)
    acknowledged: int = 0
    forgotten: tuple[str, ...] = ()
    history: Past | None = None
    refused: tuple[str, ...] = ()
    rival: tuple[str, ...] = ()
    """The boards whose link or IRQ directory the client shares."""
    error: str = ""
    message: str = ""
    keys: frozenset[str] = frozenset()

    def check(self, request: Request) -> None:
        """Raise MessageError if this response does not belong to `request`."""
        name, key = _NAMES[type(request)]
        if key not in self.keys:
            raise MessageError(f"the response to {name} lacks {key}")


def encode_greeting(greeting: Greeting) -> bytes:
    return _line(greeting)


def encode_response(request: Request, value: object, tag: Mapping[str, object]) -> bytes:
    """Encode the response to `request`. `tag` contains the `id` of the request, if it has one."""
    return _line({**tag, _NAMES[type(request)][1]: value})


def encode_error(error: RequestError) -> bytes:
    return _line({**error.tag, "error": error.error, "message": error.message})


def encode_board(board: BoardStatus, signals: Iterable[SignalStatus] | None = None) -> Iterator[str]:
    """Yield the status of one board in parts, for `encode_status`. Take each signal only when its part is needed.

    `signals` replaces the signals of the status.
    """
    fields: dict[str, object] = {"board": board.board, "open": board.status is not None}
    if board.status is None:
        yield _json(fields | {"problem": board.problem})
        return
    fields |= {**vars(board.status), "history": board.history}
    names = [*fields]
    at = names.index("signals")
    yield _json({name: fields[name] for name in names[:at]})[:-1] + ', "signals": ['
    # vars() is faster than attrs.asdict().
    yield from _separated(_json(vars(signal)) for signal in (board.status.signals if signals is None else signals))
    yield "], " + _json({name: fields[name] for name in names[at + 1 :]})[1:]


def encode_status(boards: Iterable[Iterable[str]], tag: Mapping[str, object]) -> Iterator[str]:
    """Yield the response to a StatusRequest in parts. Take each part of a board only when it is needed."""
    yield f'{json.dumps(tag)[:-1]}{", " if tag else ""}"status": ['
    for number, parts in enumerate(boards):
        yield ", " if number else ""
        yield from parts
    yield "]}\n"


def encode_history(board: str, boot: str, events: Iterable[str], tag: Mapping[str, object]) -> Iterator[str]:
    """Yield the response to a HistoryRequest in parts. Take each encoded event only when its part is needed."""
    yield json.dumps({**tag, "history": {"board": board, "boot": boot}})[:-2] + ', "events": ['
    yield from _separated(event.rstrip() for event in events)
    yield "]}}\n"


def _separated(items: Iterable[str]) -> Iterator[str]:
    """Yield items of a JSON list, each after the first one with a separator."""
    separator = ""
    for item in items:
        yield separator + item
        separator = ", "


def to_json(board: BoardStatus) -> dict[str, object]:
    message: dict[str, object] = json.loads("".join(encode_board(board)))
    return message


def decode_greeting(line: bytes) -> Greeting | Response:
    """Decode a greeting, or the error that a proxy sent instead. Raises MessageError."""
    message = _object(line)
    if "error" in message:
        return _response(message)
    protocol = message.get("protocol")
    if not isinstance(protocol, int):
        raise MessageError("the process listening there is not inco-trio")
    if protocol != PROTOCOL:
        raise MessageError(f"the proxy uses protocol {protocol}, this program {PROTOCOL}: install matching versions")
    return _structured(message, Greeting)


def decode_reply(line: bytes) -> Reply:
    """Decode an event or a response. Raises MessageError."""
    if line.startswith(b'{"event": "notifications", ') and (alone := _alone()(line.decode("latin-1"))):
        board, boot, sequence, direction, name, time, number = alone.groups()
        signals = _decode_signals(((direction, name),))
        return Notifications(board, boot, int(sequence), signals, [(0, float(time), int(number))])
    message = _object(line)
    if "event" not in message:
        return _response(message)
    if message["event"] == "notifications":
        return _notifications(message)
    event = _structured(message | {"text": line.decode()}, Event)
    if lacking := [key for key in _REQUIRED.get(event.event, ()) if message.get(key) is None]:
        raise MessageError(f"the event {event.event} lacks {', '.join(lacking)}")
    return event


def _response(message: dict[str, object]) -> Response:
    if message.keys() == {"acknowledged"} and type(number := message["acknowledged"]) is int:
        return Response(
            acknowledged=number, keys=frozenset(message)
        )  # Avoid cattrs, which is slow: this response is frequent.
    if isinstance(boards := message.get("status"), list):
        for each in boards:
            if isinstance(each, dict):
                # In JSON, the board's object contains the fields of its status. BoardStatus has them in `status`.
                each["status"] = None if each.get("open") is False else dict(each)
    return attrs.evolve(_structured(message, Response), keys=frozenset(message))


_DURATION = Rule((int, float), "a number of seconds", lambda value: 0 <= value < math.inf, float)
_HEXADECIMAL = Rule((str,), "hexadecimal digits", lambda text: re.fullmatch("([0-9a-fA-F]{2})*", text) is not None)


@attrs.frozen(slots=False)
class Event:
    """An event of the control socket. Each kind of event uses only some of the fields."""

    event: str
    board: str = ""
    time: float = 0.0
    """The time in seconds since 1970."""
    monotonic_ns: int = 0
    direction: Direction | None = None
    signal: str | None = None
    register: str | None = None
    sequence: int = 0
    boot: str = ""
    """The identifier of the history to which `sequence` belongs."""
    last_ns: int = 0
    """When a repeated event in the flight recorder last occurred (CLOCK_MONOTONIC in nanoseconds); otherwise 0."""
    frame: Annotated[str, _HEXADECIMAL] | None = None
    reason: str = ""
    delay: Annotated[float, _DURATION] = 0.0
    """How long a notification had been pending before its delivery (seconds), or 0."""
    delay_max: Annotated[float, _DURATION] = 0.0
    """If `delay` is unknown: the longest time for which the notification can have been pending (seconds), or 0."""
    running: bool = False
    duration: Annotated[float, _DURATION] = 0.0
    """For a `link` event: how long the link was in the previous state (seconds), or 0 if that is unknown."""
    count: int = 0
    level: str = ""
    message: str = ""
    text: str = attrs.field(default="", eq=False)
    """The line from which the event was decoded, or an empty string."""

    @property
    def frame_bytes(self) -> int:
        return len(self.frame or "") // 2

    def json(self) -> str:
        """Return the event as a line for a command's output, with `version`. Keep all keys of a received line."""
        line = self.text.strip() or encode_event(self, frames=True).rstrip("\n")
        return f'{{"version": {PROTOCOL}, {line[1:]}'


@attrs.define  # A frozen class takes twice as long to create.
class Notifications:
    """Consecutive notifications of one board in one line, which is faster to encode and decode than single events."""

    board: str
    boot: str
    """The identifier of the history that contains the notifications."""
    sequence: int
    """The sequence number of the first notification."""
    signals: tuple[tuple[Direction, str], ...]
    items: Sequence[tuple[int, float, int]]
    """For each notification: index in `signals`, time in seconds since 1970, and CLOCK_MONOTONIC time in ns."""


Reply = Event | Response | Notifications


def encode_notifications(
    board: str,
    boot: str,
    sequence: int,
    signals: tuple[tuple[Direction, str], ...],
    items: Sequence[tuple[int, float, int]],
) -> str:
    """Encode an event with the fields of Notifications."""
    # Formatting the text takes a quarter of the time that json.dumps() takes.
    text = ", ".join([f"[{index}, {time!r}, {number}]" for index, time, number in items])
    head = _encode_history(board, boot)
    return f'{head}, "sequence": {sequence}, "signals": {_encode_signals(signals)}, "items": [{text}]}}\n'


def encode_alone(board: str, boot: str, sequence: int, signal: tuple[Direction, str], at: tuple[int, int]) -> str:
    """Encode an event with one notification, faster than `encode_notifications`. `at` is its time (see `Times`)."""
    head, middle = _around_alone(board, boot, signal)
    return f"{head}{sequence}{middle}{at[0] / 1e9!r}, {at[1]}]]}}\n"


@functools.lru_cache(maxsize=1024)
def _around_alone(board: str, boot: str, signal: tuple[Direction, str]) -> tuple[str, str]:
    """Return the part of the event before the sequence number, and the part between that number and the time."""
    head = _encode_history(board, boot)
    return f'{head}, "sequence": ', f', "signals": {_encode_signals((signal,))}, "items": [[0, '


@functools.lru_cache(maxsize=1024)
def _encode_history(board: str, boot: str) -> str:
    """Return the beginning of a `notifications` event."""
    return json.dumps({"event": "notifications", "board": board, "boot": boot})[:-1]


@functools.lru_cache(maxsize=1024)
def _encode_signals(signals: tuple[tuple[Direction, str], ...]) -> str:
    return json.dumps([(direction.value, name) for direction, name in signals])


@functools.cache  # Compile on first use: this takes 1 ms, and most programs receive no such line.
def _alone() -> Callable[[str], re.Match[str] | None]:
    """Return a function that matches the line of a single notification. Parsing JSON takes twice as long.

    The function does not match lines with escapes or unusual numbers, which need the JSON parser.
    """
    text, number = r'"([ !#-\[\]-~]*)"', "([1-9][0-9]{0,17})"
    pattern = (
        rf'{{"event": "notifications", "board": {text}, "boot": {text}, "sequence": {number}, '
        rf'"signals": \[\["(inbound|outbound)", {text}\]\], '
        rf'"items": \[\[0, ([1-9][0-9]{{0,11}}\.[0-9]+), {number}\]\]}}'
    )
    return re.compile(pattern).fullmatch


def _notifications(message: dict[str, Any]) -> Notifications:
    """Decode a `notifications` event without cattrs, which would take most of a client's CPU time."""
    try:
        board, boot = RULES[str](message.get("board")), RULES[str](message.get("boot"))
        signals = _decode_signals(tuple(map(tuple, message["signals"])))
        items = [(index, time, number) for index, time, number in message["items"]]
        for index, time, number in items:
            if not (type(index) is type(number) is int and type(time) is float):
                _refuse("an item with a value of the wrong type")
            if not (0 <= index < len(signals) and 0 <= time < math.inf):
                _refuse("an item with a value out of range")
        return Notifications(board, boot, RULES[int](message.get("sequence")), signals, items)
    except (InvalidValueError, LookupError, TypeError, ValueError) as error:
        raise MessageError(f"the event `notifications` is not valid: {error}") from None


@functools.lru_cache(maxsize=1024)
def _decode_signals(signals: tuple[tuple[object, ...], ...]) -> tuple[tuple[Direction, str], ...]:
    return tuple((RULES[Direction](direction), RULES[str](name)) for direction, name in signals)


def event_now(event: str, board: str = "", **fields: Any) -> Event:
    return event_at(event, board, None, **fields)


def event_at(event: str, board: str, at: tuple[int, int] | None, **fields: Any) -> Event:
    """Return an event with a wall-clock time and a monotonic time in nanoseconds (default: now)."""
    time_ns, monotonic_ns = at or (real_clock.time_ns(), real_clock.monotonic_ns())
    return Event(event, board, time_ns / 1e9, monotonic_ns, **fields)


_REQUIRED = {
    "notification": ("direction", "signal", "sequence", "time"),
    "pending": ("direction", "signal", "reason", "time"),
    "merged": ("direction", "signal", "sequence", "board", "boot", "count"),
    "ignored": ("reason", "time"),
    "link": ("running", "time"),
    "lost": ("count",),
}
"""The keys that an event must have, for each kind of event."""


def encode_event(event: Event, *, frames: bool = False) -> str:
    """Encode an event as a line. With `frames`, include the frame, or null if the frame is unknown."""
    fields = {key: value for key, value in vars(event).items() if value}
    fields.pop("text", None)
    if event.direction is not None:
        fields["direction"] = event.direction.value
    if event.event == "link":
        fields["running"] = event.running
    elif event.event == "ignored":
        fields["signal"] = event.signal
    fields.pop("frame", None)
    if frames and event.event in ("notification", "pending", "ignored"):
        fields["frame"] = event.frame
    return json.dumps(fields) + "\n"


def _json(message: object) -> str:
    return _ENCODER.encode(message)


def _line(message: object) -> bytes:
    return _json(message).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Convert one object for json.dumps, which calls this function again for objects inside the result."""
    if attrs.has(type(value)):
        return attrs.asdict(value, recurse=False)
    return value.value if isinstance(value, Enum) else list(value)


_ENCODER = json.JSONEncoder(default=_plain)  # json.dumps() would create a new encoder for each message.


def _refuse(name: str) -> NoReturn:
    """Raise ValueError. Python's decoder accepts NaN and Infinity unless this function refuses them."""
    raise ValueError(f"{name} is not allowed")


_DECODER = json.JSONDecoder(parse_constant=_refuse)  # json.loads() would create a new decoder for each line.


def _object(line: bytes) -> dict[str, object]:
    """Parse a line that must be a JSON object. Raises MessageError."""
    try:
        message = _DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the line is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise MessageError("the line is not a JSON object")
    return message


def _structured(message: dict[str, object], kind: type[_T]) -> _T:
    problems: list[str] = []
    result = structure(message, kind, problems)
    if result is None:
        raise MessageError(problems[0])
    return result
