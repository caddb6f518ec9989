"""The protocol state of a connection to an MQTT 5 broker: packets, acknowledgements, and the broker's limits.

This module does no I/O. The codec mqtt5 encodes and decodes packets. A `Session` appends packets to `out`, and the
caller sends them. The caller passes received bytes to `feed`. Publishing always uses QoS 1. Topic aliases are used as
far as the broker allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any, Protocol

import attrs
import mqtt5
import trio

from inco_trio.errors import PermissionDeniedError, UnavailableError
from inco_trio.mqtt.texts import check_texts

__all__ = [
    "PUBLISH_OVERHEAD",
    "RECEIVE_MAX",
    "Answered",
    "BrokerLostError",
    "BrokerRefusedError",
    "ConnectionBrokenError",
    "Limits",
    "Message",
    "Receipts",
    "Received",
    "Refusal",
    "RetainRefusedError",
    "Session",
    "SessionTakenError",
    "do_nothing",
]

RECEIVE_MAX = 500
"""Default maximum number of unacknowledged messages from the broker. A bridge can have up to 400 of them."""
PACKET_MAX = 128 << 10
"""Default maximum size of a packet from the broker, in bytes. Messages from a bridge are up to 102,549 bytes long."""
PACKET_EXCESS = 1
"""Number of bytes by which a packet from the broker may exceed the maximum size that the client has announced.

mosquitto 2.0.11 does not count the first byte of a packet. If a client disconnects because of such a packet, mosquitto
sends it again on each new connection.
"""
EXCESS = 1024
"""Maximum memory for the unacknowledged messages from the broker, in packets of maximum size.

RECEIVE_MAX is lower, but mosquitto 2.0.11 exceeds it: it sends all queued messages (by default, up to 1,000) at once.
"""
OVERHEAD = 1024
"""Memory that a message needs in addition to its strings and payload, in bytes."""
INFLIGHT_MAX = 1000
"""Maximum number of unacknowledged messages to the broker, unless the broker's limit is lower."""
PUBLISH_OVERHEAD = 13
"""Maximum size of a PUBLISH packet without its topic and payload, in bytes: lengths, packet identifier and alias."""
_PUBLISH_PACKET_MAX = (1 << 28) - 1
"""Maximum size of a packet in bytes, if the broker announces no limit (MQTT 5, 1.5.5)."""
_FAILURE = 0x80
"""The lowest reason code that indicates a failure (MQTT 5, 2.4)."""
_UNREACHABLE = {136, 137, 149, 151, 156, 157, 159}
"""Reason codes in a CONNACK for problems that may be temporary, such as a busy broker."""
_RETAIN_NOT_SUPPORTED = 0x9A
_PUBACK, _TOO_LARGE = 0x40, 0x95
"""The first byte of a PUBACK, and mosquitto's reason code for a message that exceeds its `message_size_limit`.

MQTT 5 does not allow this code in a PUBACK, so the codec refuses it.
"""
_QOS_2_REFUSED = mqtt5.PubRecReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
_QOS_0, _QOS = mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE


def do_nothing() -> None:
    """Do nothing. This is the default callback."""


class BrokerLostError(UnavailableError):
    """The broker is unreachable, ended the connection, or does not answer."""


class ConnectionBrokenError(BrokerLostError):
    """The connection ended, and the broker gave no reason."""


class SessionTakenError(BrokerLostError):
    """Another process is using the client identifier of this connection."""


class BrokerRefusedError(PermissionDeniedError):
    """The broker refuses the connection or a subscription, or its certificate is not valid."""


class RetainRefusedError(BrokerRefusedError):
    """The broker refuses a connection whose last will is a retained message."""


@attrs.define
class Message:
    """A message to publish."""

    topic: str
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None
    expiry: int | None = None
    """Seconds for which the broker keeps the message."""
    is_response: bool = False
    """Whether a client has chosen the topic. Such topics get no alias, so that clients cannot use up the aliases."""


@attrs.frozen(eq=False)
class Received:
    """A received message. The broker repeats it on each new connection until it is acknowledged."""

    topic: str
    payload: bytes
    retain: bool
    response_topic: str | None
    correlation: bytes | None
    packet: int | None
    """The packet identifier, or None for a message that needs no acknowledgement."""


@attrs.frozen
class Limits:
    """The limits that the broker announced in its CONNACK (MQTT 5, 3.2.2.3)."""

    client_id: str
    """The client identifier that the broker assigned, or else the one that was requested."""
    session_present: bool
    """Whether the broker has continued an earlier session."""
    session_expiry: int
    """Seconds for which the broker keeps the session after the connection has ended."""
    keep_alive: int
    """Seconds within which the client must send a packet; 0 if there is no limit."""
    receive_maximum: int
    """How many unacknowledged messages the broker accepts."""
    maximum_packet_size: int | None
    """Maximum size of a packet in bytes, or None if there is no limit."""
    maximum_qos: int
    retain_available: bool
    topic_alias_maximum: int
    wildcard_subscriptions: bool
    shared_subscriptions: bool


@attrs.frozen
class Refusal:
    """The reason why a message was not published."""

    reason: str
    is_too_large: bool = False
    """Whether the message is larger than the broker allows. It was not sent, or the broker has dropped it."""
    is_unheard: bool = False
    """Whether the topic has no subscribers."""

    def __str__(self) -> str:
        return self.reason


class Answered(Protocol):
    """A receiver of the broker's answers to messages."""

    @property
    def heard(self) -> bool:
        """Whether messages without subscribers count as refused."""

    def settle(self, number: int, refusal: Refusal | None) -> None:
        """Record the result of a message."""

    def abandon(self) -> None:
        """Handle the end of the connection."""


@attrs.define(eq=False)
class Receipts:
    """The acknowledgements that one call waits for."""

    left: int
    """How many acknowledgements have not yet arrived."""
    refusals: list[Refusal | None]
    """For each message, why it was not published, or None if the broker accepted it."""
    heard: bool = False
    """Whether messages without subscribers count as refused."""
    done: trio.Event = attrs.Factory(trio.Event)

    def settle(self, number: int, refusal: Refusal | None) -> None:
        """Record the result of a message."""
        if refusal is not None:
            self.refusals[number] = refusal
        self.left -= 1
        if not self.left:
            self.done.set()

    def abandon(self) -> None:
        """Wake the call, because the connection has ended."""
        self.done.set()


class Session:
    """The state of one connection. `subject` names the broker in errors."""

    def __init__(self, subject: object, connect: mqtt5.ConnectPacket) -> None:
        self.out = bytearray(connect.write())
        """Packets that the caller must send."""
        self.limits: Limits | None = None
        """The broker's limits, once it has accepted the connection."""
        self.received: deque[Received] = deque()
        """Received messages that the caller has not yet taken."""
        self.dropped = 0
        """Number of QoS 0 messages that were dropped because `receive_max` messages were queued."""
        self.refused = 0
        """Number of messages at QoS 2 that were refused."""
        self.taken = 0
        """Number of messages that the caller has taken from `received` but not handled yet."""
        self.goodbye = mqtt5.DisconnectReasonCode.NORMAL_DISCONNECTION
        """The reason code for DISCONNECT."""
        self._subject, self._connect = subject, connect
        self.receive_max = connect.receive_max
        """Maximum number of unacknowledged messages from the broker, and of queued messages at QoS 0."""
        self._packet_max = PACKET_MAX if connect.max_packet_size is None else connect.max_packet_size
        self._data = bytearray()
        self.window = 0
        """Maximum number of unacknowledged messages to the broker."""
        self._awaited: dict[int, tuple[Answered, int, str, int]] = {}
        """For each packet identifier, the receipts, the index of the message in `refusals`, the topic, and the order.

        `_sent` defines the order.
        """
        self._subscribing: dict[int, tuple[Receipts, Sequence[mqtt5.TopicFilter], int]] = {}
        self._last_id = 0
        self._sent = self._reached = 0
        """The number of packets that need an answer, and of the latest one that the broker has answered."""
        self._pings = deque[int]()
        """The numbers of the pings that the broker has not answered."""
        self._aliases: dict[str, int] = {}
        self._known_aliases: set[str] = set()
        """The topics whose alias the broker has acknowledged."""
        self._unacknowledged: dict[int, int] = {}
        """The memory that each unacknowledged message from the broker uses, in bytes, keyed by packet identifier."""
        self._memory = 0
        """The memory that all unacknowledged messages use, in bytes."""

    @property
    def room(self) -> int:
        """How many more messages can be sent before the broker acknowledges an earlier one."""
        return self.window - len(self._awaited)

    @property
    def is_waiting(self) -> bool:
        """Whether an answer from the broker is outstanding."""
        return bool(self._awaited or self._subscribing) or self.limits is None

    @property
    def is_pinging(self) -> bool:
        """Whether the broker has not answered a ping."""
        return bool(self._pings)

    @property
    def overtaken(self) -> int | None:
        """The number of the oldest unanswered packet if the broker has answered a later one, otherwise None."""
        orders = [order for _, _, _, order in islice(self._awaited.values(), 1)]
        orders += [order for _, _, order in islice(self._subscribing.values(), 1)]
        oldest = min(orders, default=self._reached)
        return oldest if oldest < self._reached else None

    def abandon(self) -> None:
        """Wake all callers that wait for acknowledgements, because the connection has ended."""
        for receipts, *_ in self._awaited.values():
            receipts.abandon()
        for subscription, *_ in self._subscribing.values():
            subscription.abandon()

    def publish(self, message: Message, receipts: Answered, number: int) -> None:
        """Append a message to `out`. If it cannot be sent, settle it in `receipts`. `room` must be positive."""
        assert self.limits is not None  # noqa: S101 - messages are published once the broker has answered
        topic, alias = message.topic, None
        if self.limits.topic_alias_maximum and not message.is_response:
            alias = self._aliases.get(topic) or self._new_alias(topic)
        packet_id = self._next_id()
        limit = self.limits.maximum_packet_size or _PUBLISH_PACKET_MAX
        if len(message.payload) >= limit:
            receipts.settle(number, _too_large(len(message.payload), limit))
            return
        try:
            packet = mqtt5.PublishPacket(
                "" if alias is not None and topic in self._known_aliases else topic, message.payload, qos=_QOS,
                retain=message.retain and self.limits.retain_available, packet_id=packet_id, topic_alias=alias,
                correlation_data=message.correlation, message_expiry_interval=message.expiry,
            ).write()  # fmt: skip
        except ValueError as error:
            receipts.settle(number, Refusal(f"MQTT does not allow this topic: {error}"))
            return
        if len(packet) > limit:
            receipts.settle(number, _too_large(len(packet), limit))
            return
        self._sent += 1
        self._awaited[packet_id] = receipts, number, topic, self._sent
        self.out += packet

    def _new_alias(self, topic: str) -> int | None:
        """Return a new alias for a topic, or None if the broker allows no more aliases."""
        assert self.limits is not None  # noqa: S101 - see `publish`
        if len(self._aliases) >= self.limits.topic_alias_maximum:
            return None
        alias = self._aliases[topic] = len(self._aliases) + 1
        return alias

    def _next_id(self) -> int:
        """Return an unused packet identifier. At least one is free, because fewer than INFLIGHT_MAX are in use."""
        while True:
            self._last_id = self._last_id % 0xFFFF + 1
            if self._last_id not in self._awaited and self._last_id not in self._subscribing:
                return self._last_id

    def subscribe(self, topics: Sequence[str], receipts: Receipts, at_qos_0: Collection[str] = ()) -> None:
        """Append a subscription to `topics` at QoS 1 to `out`, or at QoS 0 for those in `at_qos_0`.

        `receipts` gets one result for each topic.
        """
        packet_id = self._next_id()
        filters = [
            mqtt5.TopicFilter(topic, max_qos=_QOS_0 if topic in at_qos_0 else _QOS, retain_as_published=False)
            for topic in topics
        ]
        packet = mqtt5.SubscribePacket(packet_id, filters).write()
        limit = None if self.limits is None else self.limits.maximum_packet_size
        if limit is not None and len(packet) > limit:
            receipts.refusals[:] = [_too_large(len(packet), limit)] * len(topics)
            receipts.done.set()
            return
        self._sent += 1
        self._subscribing[packet_id] = receipts, filters, self._sent
        self.out += packet

    def acknowledge(self, received: Received) -> None:
        """Append the acknowledgement of a received message to `out`. Further calls do nothing."""
        if received.packet in self._unacknowledged:
            self._memory -= self._unacknowledged.pop(received.packet)
            self.out += mqtt5.PubAckPacket(received.packet).write()

    def ping(self) -> None:
        self._sent += 1
        self._pings.append(self._sent)
        self.out += mqtt5.PingReqPacket().write()

    def disconnect(self) -> None:
        self.out += mqtt5.DisconnectPacket(reason_code=self.goodbye).write()

    def feed(self, data: bytes | bytearray) -> int:
        """Handle received bytes; return the number of complete packets. Raises BrokerLostError, BrokerRefusedError."""
        self._data += data
        place = number = 0
        while (end := self._end_of_packet(place)) is not None:
            packet = bytes(self._data[place:end])
            if packet[0] == _PUBACK and packet[1] < 0x80 and packet[4:5] == bytes([_TOO_LARGE]):
                self._settle(int.from_bytes(packet[2:4]), Refusal("Packet too large", is_too_large=True))
            else:
                self._handle(self._decode(packet))
            place, number = end, number + 1
        if place:
            del self._data[:place]
        return number

    def _end_of_packet(self, place: int) -> int | None:
        """Return the end of the packet that starts at `place`, or None if it is incomplete. Raises BrokerLostError."""
        length = shift = 0
        for index in range(place + 1, min(place + 5, len(self._data))):
            byte = self._data[index]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                end = index + 1 + length
                if end - place > self._packet_max + PACKET_EXCESS:
                    self.goodbye = mqtt5.DisconnectReasonCode.PACKET_TOO_LARGE
                    text = f"sent a packet of {end - place} bytes, but was allowed only {self._packet_max}"
                    raise BrokerLostError(self._subject, text)
                return end if end <= len(self._data) else None
        if shift == 28:
            raise self._malformed("the packet length is invalid")
        return None

    def _decode(self, packet: bytes) -> mqtt5.Packet:
        try:
            check_texts(packet)
        except ValueError:
            raise self._malformed("a string is not valid UTF-8") from None
        try:
            return mqtt5.read(memoryview(packet))[0]
        except (ValueError, IndexError) as error:
            raise self._malformed(str(error)) from error
        except BaseException as error:
            # A bug in the codec. pyo3 derives its PanicException from BaseException.
            if type(error).__name__ != "PanicException":
                raise
            raise self._malformed(f"the codec failed: {error}") from error

    def _malformed(self, reason: str) -> BrokerLostError:
        self.goodbye = mqtt5.DisconnectReasonCode.MALFORMED_PACKET
        return BrokerLostError(self._subject, f"sent invalid MQTT 5 data: {reason}")

    def _handle(self, packet: mqtt5.Packet) -> None:
        match packet:
            case mqtt5.PubAckPacket():
                self._on_puback(packet)
            case mqtt5.PublishPacket():
                self._on_publish(packet)
            case mqtt5.PubRelPacket():  # Another program has not finished the exchange of a message at QoS 2.
                self._answer(mqtt5.PubCompPacket(packet.packet_id))
            case mqtt5.SubAckPacket() if packet.packet_id in self._subscribing:
                self._on_suback(packet)
            case mqtt5.ConnAckPacket() if self.limits is None:
                self._on_connack(packet)
            case mqtt5.DisconnectPacket():
                self._on_disconnect(packet)
            case mqtt5.PingRespPacket():
                if self._pings:
                    self._reached = max(self._reached, self._pings.popleft())
            case _:
                self.goodbye = mqtt5.DisconnectReasonCode.PROTOCOL_ERROR
                kind = type(packet).__name__.removesuffix("Packet").upper()
                raise BrokerLostError(self._subject, f"sent an unexpected packet ({kind})")

    def _on_puback(self, packet: mqtt5.PubAckPacket) -> None:
        code = packet.reason_code.value
        self._settle(packet.packet_id, Refusal(_text(packet), is_unheard=code < _FAILURE) if code else None)

    def _settle(self, packet_id: int, refusal: Refusal | None) -> None:
        """Settle the message that the broker has answered."""
        receipts, number, topic, order = self._awaited.pop(packet_id, (None, 0, "", 0))
        if receipts is None:
            return
        self._reached = max(self._reached, order)
        if refusal is None or refusal.is_unheard:
            if topic in self._aliases:
                self._known_aliases.add(topic)
            if not receipts.heard:
                refusal = None
        receipts.settle(number, refusal)

    def _on_suback(self, packet: mqtt5.SubAckPacket) -> None:
        receipts, filters, order = self._subscribing.pop(packet.packet_id)
        self._reached = max(self._reached, order)
        if len(packet.reason_codes) != len(filters):
            # Without its reason code, a subscription may not exist, and nothing would arrive.
            self.goodbye = mqtt5.DisconnectReasonCode.PROTOCOL_ERROR
            text = f"answered {len(filters)} subscriptions with {len(packet.reason_codes)} reason codes"
            raise BrokerLostError(self._subject, text)
        for number, (wanted, reason) in enumerate(zip(filters, packet.reason_codes, strict=True)):
            if reason.value >= _FAILURE:
                receipts.refusals[number] = Refusal(_text(packet, reason))
            elif reason.value < wanted.max_qos.value:
                receipts.refusals[number] = Refusal("the broker grants only QoS 0, at which messages may be lost")
        receipts.done.set()

    def _on_publish(self, packet: mqtt5.PublishPacket) -> None:
        packet_id = packet.packet_id
        if packet_id is None:
            if len(self.received) + self.taken >= self.receive_max:
                self.dropped += 1
                return
        elif packet.qos == mqtt5.QoS.EXACTLY_ONCE:
            # Another program has left a subscription in the session. The failure ends the exchange (MQTT 5, 4.3.3). If
            # the client disconnected instead, the broker would repeat the message on each new connection.
            self.refused += 1
            self._answer(mqtt5.PubRecPacket(packet_id, reason_code=_QOS_2_REFUSED))
            return
        elif packet_id in self._unacknowledged:
            # MQTT 5 allows a broker to repeat messages only on a new connection. Other repetitions could fill the
            # memory.
            self.goodbye = mqtt5.DisconnectReasonCode.PROTOCOL_ERROR
            raise BrokerLostError(self._subject, f"sent another message with the packet identifier {packet_id}")
        else:
            texts = packet.topic, packet.response_topic or "", packet.correlation_data or b"", packet.payload or b""
            size = OVERHEAD + sum(map(len, texts))
            if self._memory + size > EXCESS * self._packet_max:
                self.goodbye = mqtt5.DisconnectReasonCode.RECEIVE_MAX_EXCEEDED
                text = f"sent {len(self._unacknowledged) + 1} unacknowledged messages (limit: {self.receive_max})"
                raise BrokerLostError(self._subject, text)
            self._unacknowledged[packet_id] = size
            self._memory += size
        self.received.append(
            Received(
                packet.topic, packet.payload, packet.retain, packet.response_topic, packet.correlation_data, packet_id
            )
        )

    def _answer(self, packet: mqtt5.PubRecPacket | mqtt5.PubCompPacket) -> None:
        if len(self.out) > EXCESS * self._packet_max:
            self.goodbye = mqtt5.DisconnectReasonCode.RECEIVE_MAX_EXCEEDED
            raise BrokerLostError(self._subject, "does not read the answers to its messages")
        self.out += packet.write()

    def _on_connack(self, packet: mqtt5.ConnAckPacket) -> None:
        code, connect = packet.reason_code.value, self._connect
        if code >= _FAILURE:
            kind: type[BrokerLostError | BrokerRefusedError] = BrokerRefusedError
            if code in _UNREACHABLE:
                kind = BrokerLostError
            elif code == _RETAIN_NOT_SUPPORTED:
                kind = RetainRefusedError
            raise kind(self._subject, f"refuses the connection: {_text(packet)}{_elsewhere(packet)}")
        expiry, keep_alive = packet.session_expiry_interval, packet.server_keep_alive
        self.limits = Limits(
            packet.assigned_client_id or connect.client_id, packet.session_present,
            connect.session_expiry_interval if expiry is None else expiry,
            connect.keep_alive if keep_alive is None else keep_alive,
            packet.receive_max, packet.max_packet_size, packet.max_qos.value, packet.retain_available,
            packet.topic_alias_max, packet.wildcard_subscription_available, packet.shared_subscription_available,
        )  # fmt: skip
        self.window = min(INFLIGHT_MAX, packet.receive_max)
        if packet.max_qos == mqtt5.QoS.AT_MOST_ONCE:
            text = "allows only QoS 0, at which messages may be lost (allow QoS 1 in the broker's configuration)"
            raise BrokerRefusedError(self._subject, text)

    def _on_disconnect(self, packet: mqtt5.DisconnectPacket) -> None:
        if packet.reason_code == mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER:
            text = f"another process uses the client identifier {self._connect.client_id!r}: stop one of them"
            raise SessionTakenError(self._subject, text)
        raise BrokerLostError(self._subject, f"ended the connection: {_text(packet)}{_elsewhere(packet)}")


def _too_large(size: int, limit: int) -> Refusal:
    return Refusal(f"its packet has {size} bytes, but the broker allows only {limit}", is_too_large=True)


def _text(packet: Any, reason: Any = None) -> str:
    """Return the reason code of a packet in words, with the broker's explanation if there is one."""
    code = packet.reason_code if reason is None else reason
    words: str = code.name.replace("_", " ").capitalize()
    return f"{words} ({packet.reason_str!r})" if packet.reason_str else words


def _elsewhere(packet: mqtt5.ConnAckPacket | mqtt5.DisconnectPacket) -> str:
    return f" (use {packet.server_reference!r})" if packet.server_reference else ""
