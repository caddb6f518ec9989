"""Tests of the MQTT session, which does no I/O, with packets that a broker could send."""

from __future__ import annotations

from typing import Any

import mqtt5
import pytest
import trio
from trio.testing import MockClock

from inco_trio.mqtt.backlog import Board
from inco_trio.mqtt.configuration import GatewayConfig, parse_broker
from inco_trio.mqtt.connection import BrokerBackoff
from inco_trio.mqtt.gateway import Gateway
from inco_trio.mqtt.session import (
    EXCESS,
    OVERHEAD,
    PACKET_MAX,
    PUBLISH_OVERHEAD,
    RECEIVE_MAX,
    BrokerLostError,
    BrokerRefusedError,
    ConnectionBrokenError,
    Limits,
    Message,
    Receipts,
    Refusal,
    RetainRefusedError,
    Session,
    SessionTakenError,
)
from inco_trio.mqtt.topics import Topics

AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE


def fresh() -> Session:
    """Return a session that has sent CONNECT and is waiting for CONNACK."""
    connect = mqtt5.ConnectPacket(
        "me", keep_alive=30, session_expiry_interval=60, receive_max=RECEIVE_MAX, max_packet_size=PACKET_MAX
    )
    session = Session("broker", connect)
    assert isinstance(sent(session)[0], mqtt5.ConnectPacket)
    return session


def opened(**connack: Any) -> Session:
    session = fresh()
    session.feed(mqtt5.ConnAckPacket(**connack).write())
    return session


def sent(session: Session) -> list[mqtt5.Packet]:
    """Return the packets that the session wants to send."""
    packets, data = [], bytes(session.out)
    session.out.clear()
    while data:
        packet, length = mqtt5.read(memoryview(data))
        packets.append(packet)
        data = data[length:]
    return packets


def publish(session: Session, *messages: Message, heard: bool = False) -> tuple[Receipts, list[mqtt5.PublishPacket]]:
    receipts = Receipts(len(messages), [None] * len(messages), heard)
    for number, message in enumerate(messages):
        session.publish(message, receipts, number)
    packets = sent(session)
    assert all(isinstance(packet, mqtt5.PublishPacket) for packet in packets)
    return receipts, packets  # type: ignore[return-value]


def acknowledge(
    session: Session, packet: mqtt5.PublishPacket, reason: str = "SUCCESS", text: str | None = None
) -> None:
    assert packet.packet_id is not None
    code = getattr(mqtt5.PubAckReasonCode, reason)
    session.feed(mqtt5.PubAckPacket(packet.packet_id, reason_code=code, reason_str=text or None).write())


def subscribe(session: Session, *topics: str, at_qos_0: str = "") -> tuple[Receipts, list[mqtt5.Packet]]:
    receipts = Receipts(len(topics), [None] * len(topics))
    session.subscribe(topics, receipts, [at_qos_0])
    return receipts, sent(session)


def incoming(packet_id: int | None, **fields: Any) -> bytes:
    qos = mqtt5.QoS.AT_MOST_ONCE if packet_id is None else AT_LEAST_ONCE
    return mqtt5.PublishPacket("lab/x", b"1", **{"qos": qos, "packet_id": packet_id, **fields}).write()


def test_limits_are_those_of_the_broker_or_the_defaults() -> None:
    limits = opened().limits
    assert limits is not None
    assert (limits.client_id, limits.keep_alive, limits.session_expiry) == ("me", 30, 60)
    assert (limits.receive_maximum, limits.maximum_packet_size, limits.maximum_qos) == (65535, None, 2)
    limits = opened(
        session_present=True, assigned_client_id="other", server_keep_alive=0, session_expiry_interval=0, receive_max=3,
        max_packet_size=100, max_qos=AT_LEAST_ONCE, retain_available=False, topic_alias_max=2,
        wildcard_subscription_available=False, shared_subscription_available=False,
    ).limits  # fmt: skip
    assert limits is not None
    assert (limits.client_id, limits.keep_alive, limits.session_expiry) == ("other", 0, 0)
    assert (limits.receive_maximum, limits.maximum_packet_size, limits.maximum_qos) == (3, 100, 1)
    assert (limits.session_present, limits.retain_available, limits.topic_alias_maximum) == (True, False, 2)
    assert (limits.wildcard_subscriptions, limits.shared_subscriptions) == (False, False)


@pytest.mark.parametrize(
    ("connack", "kind", "text"),
    [
        ({"reason_code": mqtt5.ConnAckReasonCode.NOT_AUTHORIZED}, BrokerRefusedError, "Not authorized"),
        ({"reason_code": mqtt5.ConnAckReasonCode.SERVER_BUSY, "reason_str": "try\nlater"}, BrokerLostError,
         r"Server busy \('try\\nlater'\)"),
        ({"reason_code": mqtt5.ConnAckReasonCode.USE_ANOTHER_SERVER, "server_reference": "b2"}, BrokerLostError,
         r"\(use 'b2'\)"),
        ({"reason_code": mqtt5.ConnAckReasonCode.RETAIN_NOT_SUPPORTED}, RetainRefusedError, "Retain not supported"),
        ({"max_qos": mqtt5.QoS.AT_MOST_ONCE}, BrokerRefusedError, "allows only QoS 0"),
    ],
)  # fmt: skip
def test_a_refused_connection_is_an_error(connack: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as refused:
        opened(**connack)
    assert len(str(refused.value).splitlines()) == 1


def test_no_more_messages_than_the_receive_maximum_are_in_flight() -> None:
    session = opened(receive_max=2)
    receipts, packets = publish(session, Message("a", b"1"), Message("a", b"2"))
    assert session.room == 0
    assert session.is_waiting
    acknowledge(session, packets[1])
    assert session.room == 1
    assert receipts.left == 1
    acknowledge(session, packets[0])
    assert receipts.done.is_set()
    assert not session.is_waiting


def test_packet_identifiers_are_not_reused_while_they_are_in_use() -> None:
    session = opened()
    _, (first,) = publish(session, Message("a", b""))
    session._last_id = 0xFFFF
    _, (second,) = publish(session, Message("a", b""))
    assert (first.packet_id, second.packet_id) == (1, 2)


def test_messages_that_are_too_large_are_not_sent() -> None:
    session = opened(max_packet_size=100)
    small, large, huge = (Message("lab/status", bytes(size)) for size in (80, 90, 100_000))
    receipts, packets = publish(session, small, large, huge)
    assert [len(packet.payload) for packet in packets] == [80]
    assert receipts.refusals[1] == Refusal(
        "its packet has 107 bytes, but the broker allows only 100", is_too_large=True
    )
    assert receipts.refusals[2] == Refusal(
        "its packet has 100000 bytes, but the broker allows only 100", is_too_large=True
    )
    refused, packets = subscribe(session, "a" * 100)  # type: ignore[assignment]
    assert (packets, refused.refusals[0] is not None and refused.refusals[0].is_too_large) == ([], True)


def test_a_message_that_exceeds_mosquittos_message_size_limit_is_too_large() -> None:
    """mosquitto then sends a reason code that MQTT 5 does not allow in a PUBACK."""
    session = opened()
    receipts, (packet, _) = publish(session, Message("a", b"1"), Message("a", b"2"))
    assert packet.packet_id is not None
    session.feed(b"\x40\x03" + packet.packet_id.to_bytes(2) + b"\x95")
    assert receipts.refusals == [Refusal("Packet too large", is_too_large=True), None]
    assert receipts.left == 1


def test_topics_that_mqtt_does_not_allow_are_refused() -> None:
    receipts, packets = publish(opened(), Message("a/#", b""), Message("", b""), Message("a" * 70_000, b""))
    assert packets == []
    assert all(refusal is not None and "MQTT does not allow" in refusal.reason for refusal in receipts.refusals)


@pytest.mark.parametrize("reason", ["NOT_AUTHORIZED", "QUOTA_EXCEEDED", "IMPLEMENTATION_SPECIFIC_ERROR"])
def test_a_refused_message_has_the_reason_of_the_broker(reason: str) -> None:
    session = opened()
    receipts, packets = publish(session, Message("a", b""), Message("b", b""))
    acknowledge(session, packets[0], reason, "because")
    acknowledge(session, packets[1])
    words = reason.replace("_", " ").capitalize()
    assert [*map(str, receipts.refusals)] == [f"{words} ('because')", "None"]


def test_a_message_without_subscribers_counts_as_refused_only_on_request() -> None:
    for heard in (False, True):
        session = opened()
        receipts, (packet,) = publish(session, Message("a", b""), heard=heard)
        acknowledge(session, packet, "NO_MATCHING_SUBSCRIBERS")
        expected = Refusal("No matching subscribers", is_unheard=True) if heard else None
        assert receipts.refusals == [expected]


def test_retained_messages_are_not_sent_to_a_broker_without_them() -> None:
    assert publish(opened(), Message("a", b"", retain=True))[1][0].retain
    assert not publish(opened(retain_available=False), Message("a", b"", retain=True))[1][0].retain


def test_a_topic_alias_replaces_the_topic_once_the_broker_has_acknowledged_it() -> None:
    session = opened(topic_alias_max=2)
    _, packets = publish(session, *(Message(topic, b"") for topic in "aabc"))
    assert [(packet.topic, packet.topic_alias) for packet in packets] == [("a", 1), ("a", 1), ("b", 2), ("c", None)]
    acknowledge(session, packets[0])
    acknowledge(session, packets[2], "NOT_AUTHORIZED")  # The broker might not have stored the alias.
    _, packets = publish(session, *(Message(topic, b"") for topic in "abc"))
    assert [(packet.topic, packet.topic_alias) for packet in packets] == [("", 1), ("b", 2), ("c", None)]


def test_subscriptions_are_checked_one_by_one() -> None:
    session = opened()
    receipts, (packet,) = subscribe(session, "a", "b", "c", "d", at_qos_0="d")
    assert isinstance(packet, mqtt5.SubscribePacket)
    assert [each.max_qos.value for each in packet.topic_filters] == [1, 1, 1, 0]
    codes = mqtt5.SubAckReasonCode
    answers = [codes.GRANTED_QOS_AT_LEAST_ONCE, codes.NOT_AUTHORIZED, *[codes.GRANTED_QOS_AT_MOST_ONCE] * 2]
    session.feed(mqtt5.SubAckPacket(packet.packet_id, answers).write())
    assert receipts.done.is_set()
    assert [*map(str, receipts.refusals)] == [
        "None", "Not authorized", "the broker grants only QoS 0, at which messages may be lost", "None"
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_subscription_needs_its_reason_code(count: int) -> None:
    session = opened()
    _, (packet,) = subscribe(session, "a", "b")
    assert isinstance(packet, mqtt5.SubscribePacket)
    answer = mqtt5.SubAckPacket(packet.packet_id, [mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE] * count)
    with pytest.raises(BrokerLostError, match=f"answered 2 subscriptions with {count} reason codes"):
        session.feed(answer.write())
    assert session.goodbye == mqtt5.DisconnectReasonCode.PROTOCOL_ERROR


def test_messages_are_acknowledged_once() -> None:
    session = opened()
    session.feed(incoming(7, response_topic="r", correlation_data=b"c") + incoming(None))
    first, second = session.received
    assert (first.topic, first.payload, first.response_topic, first.correlation) == ("lab/x", b"1", "r", b"c")
    session.acknowledge(second)
    assert sent(session) == []
    session.acknowledge(first)
    session.acknowledge(first)
    assert sent(session) == [mqtt5.PubAckPacket(7)]


def test_a_broker_may_exceed_the_receive_maximum_up_to_a_limit_of_memory() -> None:
    """Mosquitto 2.0.11 sends all queued messages at once."""
    session = opened()
    session.feed(b"".join(incoming(number) for number in range(1, 2 * RECEIVE_MAX + 1)))
    assert len(session.received) == 2 * RECEIVE_MAX
    for received in session.received:
        session.acknowledge(received)
    session._packet_max = 4096
    payload = bytes(session._packet_max - OVERHEAD)
    large = [mqtt5.PublishPacket("x", payload, qos=AT_LEAST_ONCE, packet_id=1 + n).write() for n in range(EXCESS)]
    session.feed(b"".join(large[:-1]))
    with pytest.raises(BrokerLostError, match=rf"sent {EXCESS} unacknowledged messages \(limit: {RECEIVE_MAX}\)"):
        session.feed(large[-1])
    session.disconnect()
    assert sent(session)[-1] == mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode.RECEIVE_MAX_EXCEEDED)


def test_excess_messages_at_qos_0_are_dropped() -> None:
    session = opened()
    session.feed(incoming(None) * (RECEIVE_MAX + 5))
    assert (len(session.received), session.dropped) == (RECEIVE_MAX, 5)


def test_messages_that_the_caller_has_not_handled_count_towards_the_limit() -> None:
    session = opened()
    session.taken = RECEIVE_MAX - 1
    session.feed(incoming(None) * 3)
    assert (len(session.received), session.dropped) == (1, 2)


def test_a_message_that_is_repeated_on_the_same_connection_ends_the_connection() -> None:
    """A broker could otherwise fill the memory with messages that have the same packet identifier."""
    session = opened()
    session.feed(incoming(7))
    session.acknowledge(session.received[0])
    session.feed(incoming(7))
    with pytest.raises(BrokerLostError, match="another message with the packet identifier 7"):
        session.feed(incoming(7))
    assert session.goodbye == mqtt5.DisconnectReasonCode.PROTOCOL_ERROR


def test_topics_that_clients_choose_get_no_alias() -> None:
    session = opened(topic_alias_max=2)
    responses = [Message(f"answers/{number}", b"1", is_response=True) for number in range(3)]
    _, packets = publish(session, *responses, Message("lab/b1/status", b"1"))
    assert [packet.topic_alias for packet in packets] == [None, None, None, 1]


def test_a_packet_may_be_one_byte_larger_than_announced() -> None:
    session = opened()

    def packet(size: int) -> bytes:
        payload = bytes(size - PUBLISH_OVERHEAD)
        empty = len(mqtt5.PublishPacket("lab/x", payload).write()) - len(payload)
        data = mqtt5.PublishPacket("lab/x", bytes(size - empty)).write()
        assert len(data) == size
        return data

    session.feed(packet(PACKET_MAX + 1))
    assert len(session.received) == 1
    with pytest.raises(BrokerLostError, match=f"sent a packet of {PACKET_MAX + 2} bytes"):
        session.feed(packet(PACKET_MAX + 2))


def test_packets_may_arrive_in_pieces() -> None:
    session = fresh()
    data = mqtt5.ConnAckPacket().write() + incoming(1) + incoming(2, response_topic="r" * 300) + incoming(3)
    numbers = [session.feed(data[place : place + 1]) for place in range(len(data))]
    assert (sum(numbers), len(session.received)) == (4, 3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, "sent invalid MQTT 5 data"),
        (b"\x32\xff\xff\xff\xff\x01", "the packet length is invalid"),
        (b"\x32\xff\xff\xff\x7f", f"was allowed only {PACKET_MAX}"),
        (b"\x40\x03\x00\x07\x50", "sent invalid MQTT 5 data: Invalid PubAckReasonCode"),
        (b"\x40\x01\x00", "sent invalid MQTT 5 data"),
        (b"\xe0\x06\xff\x04\x7f\x00\x01\xff", "sent invalid MQTT 5 data"),
        (mqtt5.ConnAckPacket().write(), r"unexpected packet \(CONNACK\)"),
        (mqtt5.PingReqPacket().write(), r"unexpected packet \(PINGREQ\)"),
        (mqtt5.SubAckPacket(9, []).write(), r"unexpected packet \(SUBACK\)"),
    ],
)
def test_what_the_protocol_does_not_allow_ends_the_connection(data: bytes, text: str) -> None:
    session = opened()
    with pytest.raises(BrokerLostError, match=text) as lost:
        session.feed(data)
    assert len(str(lost.value).splitlines()) == 1
    assert session.goodbye != mqtt5.DisconnectReasonCode.NORMAL_DISCONNECTION


def test_messages_at_qos_2_are_refused_one_by_one() -> None:
    """Another program may have left a subscription at QoS 2 in the session, and messages that it has not finished."""
    session = opened()
    session.feed(incoming(7, qos=mqtt5.QoS.EXACTLY_ONCE) + mqtt5.PubRelPacket(8).write() + incoming(9))
    assert (session.refused, [received.packet for received in session.received]) == (1, [9])
    code = mqtt5.PubRecReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
    assert sent(session) == [mqtt5.PubRecPacket(7, reason_code=code), mqtt5.PubCompPacket(8)]
    session._packet_max = 64
    data = b"".join(incoming(number, qos=mqtt5.QoS.EXACTLY_ONCE) for number in range(1, 0xFFFF))
    with pytest.raises(BrokerLostError, match="does not read the answers to its messages"):
        session.feed(data)


def broken(packet: Any) -> bytes:
    """Return the bytes of a packet, with the text `bad` replaced by bytes that are not UTF-8."""
    data: bytes = packet.write()
    assert data.count(b"bad") == 1
    return data.replace(b"bad", b"b\xff\xfe")


@pytest.mark.parametrize(
    "data",
    [
        broken(mqtt5.PublishPacket("bad", b"1")),
        broken(mqtt5.PublishPacket("\u00f6/bad", b"1", qos=AT_LEAST_ONCE, packet_id=200)),
        incoming(7).replace(b"lab/x", b"l\xed\xa0\x80x"),
        broken(
            mqtt5.PublishPacket(
                "x",
                b"\xff",
                correlation_data=b"\xff\xfe",
                message_expiry_interval=255,
                subscription_ids=[129, 1 << 20],
                response_topic="\u00f6",
                user_properties=[("\u00f6", "1"), ("2", "bad")],
            )
        ),
        broken(mqtt5.PublishPacket("x", b"1", user_properties=[("bad", "")], topic_alias=255)),
        broken(mqtt5.PubAckPacket(200, reason_code=mqtt5.PubAckReasonCode.NOT_AUTHORIZED, reason_str="bad")),
        broken(mqtt5.SubAckPacket(200, [], reason_str="bad")),
        broken(mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode.SERVER_MOVED, server_reference="bad")),
        broken(mqtt5.ConnAckPacket(receive_max=255, reason_str="bad")),
    ],
)
def test_a_text_that_is_not_utf_8_ends_the_connection(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokerLostError, match="a string is not valid UTF-8"):
        opened().feed(data)
    assert capfd.readouterr().err == ""


def test_a_failure_of_the_codec_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def fail(_: memoryview) -> None:
        raise PanicException("index out of bounds")

    session = opened()
    monkeypatch.setattr(mqtt5, "read", fail)
    with pytest.raises(BrokerLostError, match="sent invalid MQTT 5 data: the codec failed: index out of bounds"):
        session.feed(b"\xd0\x00")


def test_other_exceptions_of_the_codec_are_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: memoryview) -> None:
        raise KeyboardInterrupt

    session = opened()
    monkeypatch.setattr(mqtt5, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        session.feed(b"\xd0\x00")


def test_a_packet_is_overtaken_once_the_broker_has_answered_a_later_one() -> None:
    session = opened()
    _, (first, second, third) = publish(session, *(Message(name, b"") for name in "abc"))
    assert session.overtaken is None
    acknowledge(session, second)
    overtaken = session.overtaken
    assert overtaken is not None
    acknowledge(session, first)
    assert session.overtaken is None
    session.ping()
    subscribe(session, "d")
    session.feed(mqtt5.PingRespPacket().write())
    assert session.overtaken is not None
    assert session.overtaken != overtaken
    acknowledge(session, third)
    assert session.overtaken is None  # The subscription is later than the ping.
    session.feed(mqtt5.PingRespPacket().write())
    assert session.overtaken is None  # The broker has answered a single ping twice.
    for name in "ef":
        session.ping()
        sent(session)
        publish(session, Message(name, b""))
    session.feed(mqtt5.PingRespPacket().write())
    overtaken = session.overtaken
    session.feed(mqtt5.SubAckPacket(4, [mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE]).write())
    assert overtaken is not None
    assert session.overtaken is None  # The first ping is older than the message `e`.


def test_unknown_acknowledgements_are_ignored() -> None:
    session = opened()
    session.feed(mqtt5.PubAckPacket(9).write() + mqtt5.PingRespPacket().write())
    assert not session.is_waiting


@pytest.mark.parametrize(
    ("disconnect", "kind", "text"),
    [
        ({"reason_code": mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER}, SessionTakenError, "client identifier 'me'"),
        ({"reason_code": mqtt5.DisconnectReasonCode.PACKET_TOO_LARGE}, BrokerLostError, "Packet too large"),
        ({}, BrokerLostError, "ended the connection: Normal disconnection"),
        ({"reason_code": mqtt5.DisconnectReasonCode.SERVER_MOVED, "server_reference": "b2"}, BrokerLostError, "'b2'"),
    ],
)
def test_the_broker_may_end_the_connection(disconnect: dict[str, Any], kind: type[Exception], text: str) -> None:
    session = opened()
    with pytest.raises(kind, match=text):
        session.feed(mqtt5.DisconnectPacket(**disconnect).write())


def test_the_end_of_the_connection_wakes_all_callers() -> None:
    session = opened()
    published, subscribed = publish(session, Message("a", b""))[0], subscribe(session, "a")[0]
    session.abandon()
    assert published.done.is_set()
    assert subscribed.done.is_set()


class RefusingConnection:
    """A fake connection that refuses the first `refusals` subscriptions and records all calls."""

    def __init__(self, refusals: int, limits: Limits) -> None:
        self.limits, self._refusals = limits, refusals
        self.calls: list[list[str]] = []
        self.received = trio.open_memory_channel[Any](0)[1]
        self.window = self.room = 20

    def send(self, _receipts: object, messages: list[object]) -> None:
        assert not messages

    async def subscribe(self, filters: list[str]) -> None:
        self.calls.append(filters)
        if len(self.calls) <= self._refusals:
            raise BrokerRefusedError("broker", "refuses the subscription")

    async def publish(self, messages: list[Message]) -> list[None]:
        self.calls += [[message.topic] for message in messages]
        return [None] * len(messages)


@pytest.mark.parametrize(
    ("wildcards", "filters"),
    [(True, ["lab/b1/send/+"]), (False, ["lab/b1/send/a%2Fb", "lab/b1/send/c"])],
)
def test_the_gateway_retries_a_refused_subscription(
    wildcards: bool, filters: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The gateway publishes its status after the first attempt."""
    limits = opened(wildcard_subscription_available=wildcards).limits
    assert limits is not None
    connection: Any = RefusingConnection(3, limits)
    gateway = Gateway(parse_broker("mqtt://h/lab"), GatewayConfig(send={"b1": ["c", "a/b", "*"]}))

    async def main() -> None:
        with trio.move_on_after(60):  # The clock is simulated.
            await gateway._exchange(Board("b1"), Topics("lab", "b1"), connection)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert connection.calls == [filters, ["lab/b1/status"], filters, filters]
    assert caplog.text.count("signals cannot be sent; retrying") == 1
    assert ("name each signal in the configuration instead of *" in caplog.text) is not wildcards


def test_pauses_grow_until_a_connection_lasts() -> None:
    refused, broken = BrokerLostError("broker", "Packet too large"), ConnectionBrokenError("broker", "broke")

    async def pauses(error: BrokerLostError, lasting: float) -> list[float]:
        backoff, taken = BrokerBackoff(), []
        for _ in range(8):
            backoff.connected()
            await trio.sleep(lasting)  # Simulate the duration of the connection.
            taken.append(backoff.lost(error))
        return taken

    def run(error: BrokerLostError, lasting: float) -> list[float]:
        return trio.run(pauses, error, lasting, clock=MockClock(autojump_threshold=0))

    assert run(refused, 1.0)[-1] > 3
    assert run(broken, 0.0)[-1] > 3
    assert max(run(refused, 6.0)) < 0.2
    assert max(run(broken, 1.0)[1:]) < 2
