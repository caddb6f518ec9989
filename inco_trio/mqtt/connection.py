"""A connection to an MQTT 5 broker, with paho-mqtt in Trio's event loop.

paho implements the protocol. This module reads and writes paho's socket when the socket is ready; paho's documentation
calls that an external event loop. A lost connection is not restored, and its messages are not kept: the caller knows
which messages were not acknowledged.
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from inco_trio.backoff import Backoff
from inco_trio.errors import IncoError, PermissionDeniedError, UnavailableError
from inco_trio.mqtt.configuration import Broker, Credentials

__all__ = [
    "RECEIVE_MAX",
    "BrokerBackoff",
    "BrokerLostError",
    "BrokerRefusedError",
    "Connection",
    "Message",
    "Received",
    "SessionTakenError",
    "open_connection",
]

PATIENCE = 10.0
"""Timeout in seconds for each answer of the broker."""
KEEPALIVE = 30
"""Seconds without traffic after which paho pings the broker."""
RECEIVE_MAX = 1000
"""Maximum number of unacknowledged messages from the broker."""
PACKET_MAX = 4 << 20
"""Maximum size of a packet from the broker, in bytes."""
INFLIGHT_MAX = 1000
"""Maximum number of unacknowledged messages to the broker, unless the broker's limit is lower."""
FAREWELL = 1.0
"""Timeout in seconds for sending DISCONNECT."""
_UNHEARD = 0x10
"""Reason code: the topic has no subscribers."""
_TAKEN = 0x8E
"""Reason code: another connection uses the same client identifier."""
_FAILURE = 0x80
"""Reason codes of at least this value are failures (MQTT 5, 2.4)."""
_UNREACHABLE = {136, 137, 149, 151, 156, 157}
"""Reason codes of a CONNACK that may be temporary, such as a busy broker."""


class BrokerBackoff(Backoff):
    """Pauses before reconnecting to the broker."""

    FIRST = 0.1
    CAP = 5.0


class BrokerLostError(UnavailableError):
    """The broker is unreachable, ended the connection, or does not answer."""


class SessionTakenError(BrokerLostError):
    """Another process uses the client identifier of this connection."""


class BrokerRefusedError(PermissionDeniedError):
    """The broker refuses the connection, or its certificate is not valid."""


class _TlsSocket(ssl.SSLSocket):
    """A TLS socket that closes itself if the handshake fails, which paho does not do."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


@attrs.frozen
class Message:
    topic: str
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None
    expiry: int | None = None
    """Seconds for which the broker keeps the message."""

    def properties(self, packet: int) -> Any:
        """Return the MQTT 5 properties for a packet of this type."""
        made = _properties(packet)
        if self.correlation is not None:
            made.CorrelationData = self.correlation
        if self.expiry is not None:
            made.MessageExpiryInterval = self.expiry
        return made


@attrs.frozen(eq=False)
class Received:
    """A received message. Until `acknowledge` is called, the broker repeats the message on each new connection."""

    topic: str
    payload: bytes
    retain: bool
    response_topic: str | None
    correlation: bytes | None
    acknowledge: Callable[[], None]


@attrs.define(eq=False)
class _Awaited:
    """The acknowledgements that one call waits for."""

    left: int
    """How many acknowledgements are missing."""
    reasons: list[str | None]
    """The reason why the broker refused each message, or None if it accepted the message."""
    heard: bool = False
    """Whether messages without subscribers count as refused."""
    done: trio.Event = attrs.Factory(trio.Event)


class Connection:
    """A connection that `open_connection` has opened."""

    def __init__(self, broker: Broker, client: paho.Client, name: str, patience: float) -> None:
        self.session_present = False
        """Whether the broker has continued an earlier session."""
        self.publishes_will = True
        """Whether the broker publishes the last will when this connection ends normally."""
        self._broker, self._client, self._name, self._patience = broker, client, name, patience
        self._write = trio.Event()
        self._answered = trio.Event()
        self.ended = trio.Event()
        """An event that is set when the connection is lost."""
        self._lost: IncoError | None = None
        self._window = 1
        """The broker's limit of unacknowledged packets."""
        self._room = trio.Event()
        self._number = 0
        """Number of acknowledgements received so far."""
        self._awaited: dict[int, tuple[_Awaited, int]] = {}
        self._entry, self.received = trio.open_memory_channel[Received](RECEIVE_MAX + 1)
        """The received messages. There are never more than RECEIVE_MAX."""
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_acknowledged
        client.on_subscribe = self._on_subscribed
        client.on_message = self._on_message
        client.on_socket_close = lambda _client, _data, sock: trio.lowlevel.notify_closing(sock)
        client.on_socket_register_write = lambda _client, _data, _sock: self._write.set()

    async def publish(self, messages: Sequence[Message], *, heard: bool = False) -> list[str | None]:
        """Publish the messages in order at QoS 1, and wait until the broker has acknowledged all of them.

        Return for each message why the broker refused it, or None. With `heard`, a message without subscribers counts
        as refused, if the broker reports that (MQTT 5, 3.4.2.1). Raises BrokerLostError if the connection ends.
        """
        self._check()
        awaited = _Awaited(len(messages), [None] * len(messages), heard)
        for number, message in enumerate(messages):
            while len(self._awaited) >= self._window:
                if self._room.is_set():  # Do not replace an event that other tasks wait for.
                    self._room = trio.Event()
                await self._wait(self._room)
            properties = message.properties(PacketTypes.PUBLISH)
            try:
                info = self._client.publish(message.topic, message.payload, 1, message.retain, properties)
            except ValueError as error:
                awaited.reasons[number], awaited.left = str(error), awaited.left - 1
                continue
            self._awaited[info.mid] = awaited, number
        if awaited.left:
            await self._wait(awaited.done)
        return awaited.reasons

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe to the topics at QoS 1. Raises BrokerRefusedError, BrokerLostError."""
        self._check()
        awaited = _Awaited(1, [None])
        code, mid = self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise BrokerLostError(self._broker, f"{paho.error_string(code)}")
        self._awaited[mid] = (awaited, 0)
        await self._wait(awaited.done)
        if awaited.reasons[0] is not None:
            reason = f"refuses the subscription to {', '.join(topics)}: {awaited.reasons[0]}"
            raise BrokerRefusedError(self._broker, reason)

    async def _wait(self, event: trio.Event) -> None:
        """Wait for acknowledgements. The connection is lost if the broker is silent for `patience` seconds."""
        while not event.is_set():
            before = self._number
            with trio.move_on_after(self._patience):
                await event.wait()
            self._check()
            if not event.is_set() and self._number == before:
                self._lose(BrokerLostError(self._broker, f"does not answer for {self._patience:g} s"))
                self._check()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _lose(self, error: IncoError) -> None:
        """End the connection, and wake all waiting tasks with the reason."""
        if self._lost is None:
            self._lost = error
        for event in (self._answered, self._write, self._room, self.ended):
            event.set()
        for awaited, _ in self._awaited.values():
            awaited.done.set()

    def _on_connect(
        self, _client: object, _data: object, flags: paho.ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            kind = BrokerLostError if reason.value in _UNREACHABLE else BrokerRefusedError
            self._lose(kind(self._broker, f"refuses the connection: {reason}"))
            return
        self.session_present = flags.session_present
        self._window = min(INFLIGHT_MAX, getattr(properties, "ReceiveMaximum", INFLIGHT_MAX))
        self._answered.set()

    def _on_disconnect(self, _client: object, _data: object, _flags: object, reason: ReasonCode, _: object) -> None:
        if self._reason(reason) == _TAKEN:
            text = f"another process uses the client identifier {self._name!r}: stop one of them"
            self._lose(SessionTakenError(self._broker, text))
        elif reason.value >= _FAILURE and reason.getName() != "Unspecified error":
            self._lose(BrokerLostError(self._broker, f"ended the connection: {reason}"))
        elif self._answered.is_set():
            self._lose(BrokerLostError(self._broker, "the connection broke"))
        else:
            self._hung_up()

    def _reason(self, reason: ReasonCode) -> int:
        """Return the reason code of a DISCONNECT. paho 2.2 decodes the code only if properties follow."""
        packet = self._client._in_packet
        is_disconnect = packet["command"] & 0xF0 == paho.DISCONNECT and packet["packet"]
        return int(packet["packet"][0] if is_disconnect else reason.value)

    def _hung_up(self) -> None:
        hint = "does it need a client certificate, or another one?" if self._broker.tls else "does it need TLS?"
        self._lose(BrokerLostError(self._broker, f"ended the connection without an answer ({hint})"))

    def _on_acknowledged(self, _client: object, _data: object, mid: int, reason: ReasonCode, _: object) -> None:
        awaited = self._awaited.get(mid, (None, 0))[0]
        refused = reason.value >= _FAILURE or (reason.value == _UNHEARD and awaited is not None and awaited.heard)
        self._acknowledged(mid, str(reason) if refused else None)

    def _on_subscribed(self, _client: object, _data: object, mid: int, reasons: list[ReasonCode], _: object) -> None:
        self._acknowledged(mid, next((str(reason) for reason in reasons if reason.value >= _FAILURE), None))

    def _acknowledged(self, mid: int, reason: str | None) -> None:
        awaited, number = self._awaited.pop(mid, (None, 0))
        self._room.set()
        self._number += 1
        if awaited is not None:
            awaited.reasons[number] = reason
            awaited.left -= 1
            if not awaited.left:
                awaited.done.set()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        properties = message.properties
        received = Received(
            message.topic,
            bytes(message.payload),
            message.retain,
            getattr(properties, "ResponseTopic", None),
            getattr(properties, "CorrelationData", None),
            lambda: self._acknowledge(message.mid, message.qos),
        )
        try:
            self._entry.send_nowait(received)
        except trio.WouldBlock:
            text = f"sent more than {RECEIVE_MAX} unacknowledged messages, the limit that it was given"
            self._lose(BrokerLostError(self._broker, text))

    def _acknowledge(self, mid: int, qos: int) -> None:
        if self._lost is None and qos:
            self._client.ack(mid, qos)

    async def run(self) -> None:
        """Read and write the socket until the connection is lost."""
        with contextlib.suppress(trio.ClosedResourceError):
            async with trio.open_nursery() as nursery:
                for task in (self._read, self._write_all, self._keep_alive):
                    nursery.start_soon(self._until_lost, task, nursery.cancel_scope)

    async def _until_lost(self, task: Callable[[], Any], scope: trio.CancelScope) -> None:
        try:
            await task()
        except IncoError:
            raise
        except (OSError, trio.ClosedResourceError) as error:
            self._lose(BrokerLostError(self._broker, f"the connection broke: {error}"))
        scope.cancel()

    async def _read(self) -> None:
        while self._lost is None and (sock := self._client.socket()) is not None:
            # The broker may wait for a TCP acknowledgement before it sends more.
            _set_tcp_option(sock, socket.TCP_QUICKACK)
            await trio.lowlevel.wait_readable(sock)
            # A TLS socket may have decrypted more packets than paho has read; poll(2) does not report them.
            while self._client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS and self._pending():
                pass

    def _pending(self) -> bool:
        sock = self._client.socket()
        return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0

    async def _write_all(self) -> None:
        while self._lost is None:
            self._write = trio.Event()
            await self._flush()
            await self._write.wait()

    async def _flush(self) -> None:
        while self._client.want_write() and self._client.socket() is not None:
            self._client.loop_write()
            # loop_write() may have closed the socket.
            if self._client.want_write() and (sock := self._client.socket()) is not None:
                await trio.lowlevel.wait_writable(sock)

    async def _keep_alive(self) -> None:
        await self._answered.wait()
        while self._lost is None:
            # paho replaces KEEPALIVE with the broker's Server Keep Alive. 0 means that neither side sends pings.
            await trio.sleep(self._client.keepalive / 6 or math.inf)
            self._client.loop_misc()

    async def answered(self) -> None:
        """Wait for the CONNACK of the broker."""
        if self._client.socket() is None:
            self._hung_up()
        with trio.move_on_after(self._patience):
            await self._answered.wait()
        self._check()
        if not self._answered.is_set():
            self._lose(BrokerLostError(self._broker, "accepted the connection but does not answer"))
            self._check()

    async def end(self) -> None:
        """Send DISCONNECT and close the socket."""
        with_will = ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message")
        with trio.move_on_after(FAREWELL, shield=True):
            if self._lost is None and self._answered.is_set():
                self._client.disconnect(with_will if self.publishes_will else None)
                with contextlib.suppress(OSError, trio.ClosedResourceError):
                    await self._flush()
        _close(self._client)


def _properties(packet: int) -> Any:
    made: Properties = Properties(packet)  # type: ignore[no-untyped-call]
    return made


def _set_tcp_option(sock: Any, option: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, option, 1)


def _close(client: paho.Client) -> None:
    sock = client.socket()
    if sock is not None:
        with contextlib.suppress(RuntimeError):  # An abandoned thread runs outside Trio.
            trio.lowlevel.notify_closing(sock)
        client.on_socket_close = None
        sock.close()


@asynccontextmanager
async def open_connection(
    broker: Broker,
    credentials: Credentials,
    client_id: str,
    *,
    will: Message | None = None,
    session: int = 0,
    clean: bool = False,
    patience: float = PATIENCE,
) -> AsyncIterator[Connection]:
    """Connect to `broker` while the block runs. The broker publishes `will` when the connection ends.

    The broker keeps the session for another `session` seconds. `clean` discards an earlier session. If the connection
    is lost, the block is cancelled. Raises BrokerLostError and BrokerRefusedError.
    """
    client = paho.Client(
        CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5, manual_ack=True, reconnect_on_failure=False
    )
    client.connect_timeout = patience
    client.max_inflight_messages_set(INFLIGHT_MAX)  # This limit applies until the broker reports its own.
    client.max_queued_messages_set(0)
    _identify(client, broker, credentials)
    if will is not None:
        client.will_set(will.topic, will.payload, 1, will.retain, will.properties(PacketTypes.WILLMESSAGE))
    await _connect(client, broker, session, clean=clean, patience=patience)
    connection = Connection(broker, client, client_id, patience)
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            try:
                await connection.answered()
                with trio.CancelScope() as scope:
                    nursery.start_soon(_end_with, connection, scope)
                    yield connection
                connection._check()
            except BaseException as error:
                if isinstance(error, trio.Cancelled):
                    raise
                failure = error
            finally:
                nursery.cancel_scope.cancel()
    finally:
        await connection.end()
    if failure is not None:
        raise failure


async def _end_with(connection: Connection, scope: trio.CancelScope) -> None:
    await connection.ended.wait()
    scope.cancel()


def _identify(client: paho.Client, broker: Broker, credentials: Credentials) -> None:
    """Set the credentials of the client. Raises BrokerRefusedError if the certificate files are not valid."""
    identity = credentials.read()
    if identity.user is not None:
        client.username_pw_set(identity.user, identity.password)
    if broker.tls:
        try:
            context = ssl.create_default_context(cafile=credentials.ca_file)
            context.sslsocket_class = _TlsSocket
            if credentials.certificate_file is not None:
                context.load_cert_chain(credentials.certificate_file, credentials.key_file, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise BrokerRefusedError(broker, f"cannot use the certificate files: {error}") from error
        client.tls_set_context(context)


async def _connect(client: paho.Client, broker: Broker, session: int, *, clean: bool, patience: float) -> None:
    properties = _properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = session
    properties.ReceiveMaximum = RECEIVE_MAX
    properties.MaximumPacketSize = PACKET_MAX
    abandoned = False

    def connect() -> None:
        client.connect(broker.host, broker.port, KEEPALIVE, clean_start=clean, properties=properties)
        if (sock := client.socket()) is not None:
            # Without TCP_NODELAY, each packet would wait until the previous one is acknowledged.
            _set_tcp_option(sock, socket.TCP_NODELAY)
        if abandoned:
            _close(client)

    try:
        with trio.fail_after(2 * patience):
            await trio.to_thread.run_sync(connect, abandon_on_cancel=True)
    except ssl.SSLCertVerificationError as error:
        raise BrokerRefusedError(broker, f"its certificate is not valid: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise BrokerLostError(broker, f"the TLS handshake failed: {error.reason or error}") from error
    except socket.gaierror as error:
        raise BrokerLostError(broker, f"no such host: {error.strerror}") from error
    except ConnectionResetError as error:
        hint = "is it without TLS?" if broker.tls else "does it need TLS?"
        raise BrokerLostError(broker, f"reset the connection ({hint})") from error
    except (TimeoutError, trio.TooSlowError) as error:
        raise BrokerLostError(broker, "does not answer") from error
    except (OSError, ValueError) as error:
        raise BrokerLostError(broker, f"cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    finally:
        abandoned = True
