"""Tests of parts of the gateway without a broker and without a proxy."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from inco_trio.control.protocol import Event, Greeting, Response, SendRequest, StatusRequest
from inco_trio.errors import ProtocolError, ResourceError
from inco_trio.mqtt.backlog import Board
from inco_trio.mqtt.configuration import GatewayConfig, parse_broker
from inco_trio.mqtt.gateway import FLUSH_PATIENCE, RESPONSE_ATTEMPTS, Gateway
from inco_trio.mqtt.publishing import REFUSED_AGAIN
from inco_trio.mqtt.session import BrokerLostError, Limits, Received
from inco_trio.mqtt.topics import Topics
from tests.support_control import no_descriptors

BROKER = parse_broker("mqtt://h/lab")
REQUEST = Received("lab/b1/send/s1", b"", False, None, None, 1)


class Conversation:
    """A stand-in for the gateway's connection to a proxy."""

    def __init__(self, *replies: Response, path: str = "/control.sock") -> None:
        self.path = Path(path)
        self.replies, self.requests = list(replies), list[Any]()

    async def write(self, request: object) -> None:
        self.requests.append(request)

    async def read(self) -> list[Response]:
        return self.replies


async def _never(*_: object, **__: object) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("ending", ["proxy ends", "proxy closes the board", "both stay"])
def test_two_proxies_are_reported_only_if_both_have_the_board(
    ending: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, first, second = Gateway(BROKER, GatewayConfig()), Conversation(), Conversation(path="/2.sock")
    monkeypatch.setattr(gateway, "_serve", _never)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            board = gateway._have("b1", first, nursery)  # type: ignore[arg-type]
            assert gateway._have("b1", second, nursery) is board  # type: ignore[arg-type]
            if ending == "proxy ends":
                board.leave(first)  # type: ignore[arg-type]
            elif ending == "proxy closes the board":
                gateway._hear(Event("closed", "b1"), first, [board], nursery)  # type: ignore[arg-type]
            await trio.sleep(FLUSH_PATIENCE + 5)  # The clock is simulated.
            assert [board.heir(), board.heir()][-1] is second  # type: ignore[comparison-overlap]
            gateway._hear(Event("closed", "b1"), first, [board], nursery)  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert ("two proxies have a board with this name" in caplog.text) is (ending == "both stay")


def test_a_request_waits_while_the_proxy_has_too_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, conversation = 0, Conversation(Response(sent=1))

    @asynccontextmanager
    async def converse(path: Path) -> AsyncIterator[tuple[Conversation, None]]:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise ResourceError(path, "too many clients")
        yield conversation, None

    monkeypatch.setattr("inco_trio.mqtt.gateway.converse", converse)
    gateway, board = Gateway(BROKER, GatewayConfig(send={"*": ["s1"]})), Board("b1")
    board.source = conversation  # type: ignore[assignment]

    async def main() -> dict[str, object]:
        return await gateway._try_to_send(board, "s1", REQUEST)

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == {"sent": 1}
    assert conversation.requests == [SendRequest("s1", board="b1")]


@pytest.mark.parametrize(
    ("slow", "response"),
    [
        ("connect", {"error": "closed", "message": "/proxy: the proxy does not answer"}),
        ("refuse", {"error": "closed", "message": "/proxy: too many clients"}),
        ("read", {"error": "closed", "message": "the link did not accept the frame within 10 s, but may do so later"}),
        ("close", {"sent": 1}),
    ],
)
def test_a_response_tells_what_the_proxy_has_done_until_the_timeout(
    slow: str, response: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Conversation):
        async def read(self) -> list[Response]:
            if slow == "read":
                await trio.sleep_forever()
            return [Response(sent=1)]

    conversation = Slow(path="/proxy")

    @asynccontextmanager
    async def converse(path: Path) -> AsyncIterator[tuple[Conversation, None]]:
        if slow == "connect":
            await trio.sleep_forever()
        if slow == "refuse":
            raise ResourceError(path, "too many clients")
        yield conversation, None
        if slow == "close":
            await trio.sleep_forever()

    monkeypatch.setattr("inco_trio.mqtt.gateway.converse", converse)
    gateway, board = Gateway(BROKER, GatewayConfig(send={"*": ["s1"]})), Board("b1")
    board.source = conversation  # type: ignore[assignment]
    connection: Any = None

    async def main() -> dict[str, object]:
        told = await gateway._try_to_send(board, "s1", REQUEST)
        await gateway._respond(board, connection, REQUEST, told)
        return told

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == response
    lines = [record.getMessage() for record in caplog.records]
    text = f"{REQUEST.topic}: a request without a response topic failed: {response.get('message')}"
    assert lines == ([text] if "error" in response else [])


REQUESTS = 2 * RESPONSE_ATTEMPTS + 2


@pytest.mark.parametrize(
    ("packet", "session_present", "payloads", "sent"),
    [
        (1, True, [b""] * REQUESTS, REQUESTS - 2),
        (1, True, [b"%d" % number for number in range(REQUESTS)], REQUESTS),
        (1, False, [b""] * REQUESTS, REQUESTS),
        (None, True, [b""] * REQUESTS, REQUESTS),
    ],
    ids=["repeated", "distinct", "session discarded", "QoS 0"],
)
def test_only_requests_that_the_broker_repeats_are_given_up(
    packet: int | None, session_present: bool, payloads: list[bytes], sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends during each response."""
    gateway = Gateway(BROKER, GatewayConfig(send={"b1": ["s1"]}, response_prefix="answers"))
    board, requests, handled = Board("b1"), list(payloads), list[Received]()

    class Connected:
        def __init__(self) -> None:
            self.limits = Limits("id", session_present, 86_400, 30, 20, None, 2, True, 0, True, True)
            self.session_present = session_present
            entry, self.received = trio.open_memory_channel[Received](1)
            entry.send_nowait(Received("lab/b1/send/s1", requests.pop(0), False, "answers/1", None, packet))
            entry.close()

        async def publish(self, _messages: object) -> None:
            raise BrokerLostError("broker", "ended the connection")

        async def acknowledge(self, _received: object) -> None:
            pass

    @asynccontextmanager
    async def connect(*_: object, **__: object) -> AsyncIterator[Connected]:
        if not requests:
            await trio.sleep_forever()
        yield Connected()

    async def send(_board: Board, _signal: str, received: Received) -> dict[str, object]:
        handled.append(received)
        return {"sent": 1}

    async def main() -> None:
        with trio.move_on_after(600):  # The clock is simulated.
            await gateway._serve(board)

    monkeypatch.setattr("inco_trio.mqtt.gateway.open_connection", connect)
    monkeypatch.setattr(gateway, "_exchange", gateway._send_all)
    monkeypatch.setattr(gateway, "_try_to_send", send)
    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert (requests, len(handled)) == ([], sent)


def test_requests_at_qos_0_do_not_count_as_attempts() -> None:
    board = Board("b1")
    gateway = Gateway(BROKER, GatewayConfig(response_prefix="answers"))

    class Lost:
        async def publish(self, _messages: object) -> None:
            raise BrokerLostError("broker", "ended the connection")

    async def main(packet: int | None) -> None:
        received = Received("lab/b1/send/s1", b"", False, "answers/1", None, packet)
        with pytest.raises(BrokerLostError):
            await gateway._respond(board, Lost(), received, {})  # type: ignore[arg-type]

    for packet in (None, None, 1, None, 1):
        trio.run(main, packet)
    assert board.attempts == 2


def test_a_response_at_qos_0_does_not_end_the_attempts_of_another_request() -> None:
    board, gateway = Board("b1"), Gateway(BROKER, GatewayConfig(response_prefix="answers"))

    class Connected:
        async def publish(self, _messages: object) -> tuple[None]:
            return (None,)

    async def main(packet: int | None) -> None:
        received = Received("lab/b1/send/s1", b"", False, "answers/1", None, packet)
        await gateway._respond(board, Connected(), received, {})  # type: ignore[arg-type]

    board.unanswered = repeated = Received("lab/b1/send/s2", b"", False, "answers/2", None, 1)
    for packet, unanswered in ((None, repeated), (2, None)):
        trio.run(main, packet)
        assert board.unanswered == unanswered


def test_the_recovery_is_logged_when_all_boards_reach_the_broker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The descriptors suffice for one board only, until `limit` is lifted."""
    caplog.set_level(logging.INFO)
    gateway, boards, limit = Gateway(BROKER, GatewayConfig()), [Board("b1"), Board("b2")], [1]

    class Connected:
        limits, session_present = Limits("id", True, 86_400, 30, 20, None, 2, True, 0, True, True), True

        async def publish(self, messages: list[object]) -> list[None]:
            return [None] * len(messages)

    @asynccontextmanager
    async def connect(*_: object, **__: object) -> AsyncIterator[Connected]:
        if not limit[0]:
            raise BrokerLostError(BROKER, "cannot be reached: Too many open files")
        limit[0] -= 1
        yield Connected()

    async def exchange(board: Board, topics: Topics, connection: Any) -> None:
        await gateway._publish_status(board, topics, connection)

    monkeypatch.setattr("inco_trio.mqtt.gateway.open_connection", connect)
    monkeypatch.setattr(gateway, "_exchange", exchange)
    lost = f"{BROKER}: cannot be reached: Too many open files; notifications stay pending; retrying"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for board in boards:
                nursery.start_soon(gateway._serve, board)
            for _ in range(10):
                await trio.sleep(60)  # The clock is simulated.
                for board in boards:
                    board.change()
            assert caplog.messages == [lost]
            limit[0] = 1
            await trio.sleep(60)  # The clock is simulated.
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert caplog.messages == [lost, f"{BROKER}: works again"]


def test_a_lack_of_descriptors_does_not_end_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("inco_trio.control.client.runtime_directories", lambda: [tmp_path])
    gateway, board = Gateway(BROKER, GatewayConfig(send={"*": ["s1"]})), Board("b1")
    board.source = Conversation()  # type: ignore[assignment]
    path = tmp_path / "x.sock"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            gateway._proxies[path] = trio.Event()
            with no_descriptors():
                await gateway._look(nursery)
                await gateway._follow(path, nursery)
                response = await gateway._try_to_send(board, "s1", REQUEST)
            await gateway._look(nursery)
        assert response["error"] == "closed"

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert caplog.messages == [
        f"control: {tmp_path}: cannot search for control sockets: Too many open files; retrying",
        f"{path}: cannot connect: Too many open files",
        "control: works again",
    ]


@pytest.mark.parametrize("where", ["greeting", "event"])
def test_a_proxy_of_another_version_is_reported_once(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, attempts, boots = Path("/run/x.sock"), 0, ["one"]
    caplog.set_level(logging.INFO)

    class Undecodable(Conversation):
        async def request(self, _: object) -> Response:
            return Response(follow={})

        async def read(self) -> list[Response]:
            if boots == ["one"]:
                raise ProtocolError(path, "another version")
            await trio.sleep_forever()
            return []

        send_acknowledgements = _never

        def acknowledge_at_end(self) -> None:
            pass

    @asynccontextmanager
    async def converse(path: Path) -> AsyncIterator[tuple[Conversation, Greeting]]:
        nonlocal attempts
        attempts += 1
        if where == "greeting" and boots == ["one"]:
            raise ProtocolError(path, "another version")
        yield Undecodable(), Greeting("b1", 1, boots[0], ())

    monkeypatch.setattr("inco_trio.mqtt.gateway.converse", converse)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Gateway(BROKER, GatewayConfig(), [path]).run, lambda: None)
            await trio.sleep(60)  # The clock is simulated.
            assert 10 < attempts < 60 / REFUSED_AGAIN
            assert caplog.messages == [f"{path}: another version"]
            boots[:] = ["two"]
            await trio.sleep(60)  # The clock is simulated.
            assert caplog.messages[1:] == [f"{path}: works again"]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_each_open_board_is_asked_for_its_status_once_per_interval(opened: int) -> None:
    class Timed(Conversation):
        async def write(self, request: object) -> None:
            self.requests.append((trio.current_time() - began, request))

    gateway, boards, source = (
        Gateway(BROKER, GatewayConfig(status_seconds=10)),
        [Board(f"b{n}") for n in range(3)],
        Timed(),
    )
    for board in boards[:opened]:
        board.is_open = True
    began = 0.0

    async def main() -> None:
        nonlocal began
        began = trio.current_time()
        with trio.move_on_after(21):  # The clock is simulated.
            await gateway._count(source, boards)  # type: ignore[arg-type]

    trio.run(main, clock=MockClock(autojump_threshold=0))
    asked = {0: [], 1: [(10, "b0"), (20, "b0")], 2: [(5, "b0"), (10, "b1"), (15, "b0"), (20, "b1")]}[opened]
    assert source.requests == [(0, StatusRequest()), *((when, StatusRequest(name)) for when, name in asked)]


def test_what_the_broker_restricts_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway(BROKER, GatewayConfig(send={"b1": ["s1"]}))
    gateway._check_limits(Board("b1"), Limits("id", False, 60, 30, 20, None, 2, False, 0, True, True))
    assert "keeps requests only for 60 s while the gateway is offline" in caplog.text
    assert "does not keep retained messages" in caplog.text
    caplog.clear()
    gateway._check_limits(Board("b1"), Limits("id", False, 86_400, 30, 20, None, 2, True, 0, True, True))
    gateway._check_limits(Board("b2"), Limits("id", False, 60, 30, 20, None, 2, True, 0, True, True))
    assert caplog.text == ""


def test_a_session_that_the_broker_discards_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway(BROKER, GatewayConfig(send={"b1": ["s1"]}))
    discarded, continued = (
        Limits("id", is_present, 86_400, 30, 20, None, 2, True, 0, True, True) for is_present in (False, True)
    )
    gateway._check_limits(Board("b1"), discarded)
    gateway._check_limits(Board("b1"), continued, had_session=True)
    gateway._check_limits(Board("b2"), discarded, had_session=True)  # No client may send a signal of this board.
    assert caplog.text == ""
    gateway._check_limits(Board("b1"), discarded, had_session=True)
    assert "the broker discarded the gateway's session: queued requests may be lost" in caplog.text
