"""An MQTT 5 client for Trio. `session.Session` implements the protocol; this module connects, sends and receives.

A lost connection is not restored, and its messages are not kept: the caller knows which messages were not acknowledged.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import mqtt5
import trio

from inco_trio.backoff import Backoff
from inco_trio.errors import IncoError
from inco_trio.mqtt.configuration import Broker, Credentials
from inco_trio.mqtt.session import (
    PACKET_MAX,
    RECEIVE_MAX,
    Answered,
    BrokerLostError,
    BrokerRefusedError,
    ConnectionBrokenError,
    Limits,
    Message,
    Receipts,
    Received,
    Refusal,
    RetainRefusedError,
    Session,
    do_nothing,
)

__all__ = ["BrokerBackoff", "Connection", "check_certificates", "open_connection"]

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Timeout in seconds for each answer from the broker."""
KEEPALIVE = 30
"""Maximum time in seconds between two packets from the client, unless the broker sets a lower limit.

The client pings at least this often even if the broker does not require it, so that it notices a lost connection.
"""
GRACE = 1.0
"""Seconds for which the client still reads after a timeout, because this process may have been stopped meanwhile."""
FAREWELL = 1.0
"""Timeout in seconds for sending DISCONNECT."""
CHUNK = 1 << 16
"""Maximum number of bytes that are sent or received at once."""


class BrokerBackoff(Backoff):
    """Pauses before reconnecting to the broker.

    The pauses grow while the broker ends connections within CAP seconds and gives a reason. They also grow while
    connections break after less time than the preceding pause.
    """

    CAP = 5.0

    def __init__(self) -> None:
        super().__init__(first=0.1)
        self._connected = math.inf
        self._last_pause = 0.0

    def connected(self) -> None:
        """Record that the broker has accepted a connection. The broker may still refuse later requests."""
        self._connected = trio.current_time()

    def lost(self, error: IncoError) -> float:
        """Return the pause after a failed attempt or a lost connection."""
        enough = self._last_pause if isinstance(error, ConnectionBrokenError) else self.CAP
        if trio.current_time() - self._connected >= enough:
            self.reset()
        self._connected = math.inf
        self._last_pause = self.next()
        return self._last_pause


class Connection:
    """A connection that `open_connection` has opened."""

    def __init__(self, broker: Broker, stream: trio.abc.Stream, session: Session, patience: float) -> None:
        self.publishes_will = True
        """Whether the broker publishes the last will when this connection ends normally."""
        self.ended = trio.Event()
        """An event that is set when the connection is lost."""
        self.room_changed: Callable[[], None] = do_nothing
        """A function that is called when the broker may accept more messages."""
        self._broker, self._stream, self._session, self._patience = broker, stream, session, patience
        self._lost: IncoError | None = None
        self._answered = trio.Event()
        self._room = trio.Event()
        self._waiting_for_room = 0
        self._nursery: trio.Nursery | None = None
        self._flushing = False
        self._is_cut = False
        """Whether a packet may have been sent only partially."""
        self._progress = self._last_ping = trio.current_time()
        """When the time limit for the broker's answer started, and when the client sent the last ping."""
        self._overtaken: tuple[int | None, float] = None, 0.0
        """`Session.overtaken`, and since when it has had this value."""
        self._entry, self.received = trio.open_memory_channel[Received](math.inf)
        """The received messages. `Session` limits their number."""

    @property
    def limits(self) -> Limits:
        """The limits that the broker announced."""
        assert self._session.limits is not None  # noqa: S101 - `open_connection` has waited for it
        return self._session.limits

    @property
    def session_present(self) -> bool:
        """Whether the broker has continued an earlier session."""
        return self.limits.session_present

    async def publish(self, messages: Sequence[Message], *, heard: bool = False) -> list[Refusal | None]:
        """Publish the messages in order at QoS 1, and wait until the broker has acknowledged all of them.

        For each message, return the reason why it was not published, or None. With `heard`, a message without
        subscribers counts as refused, if the broker reports this (MQTT 5, 3.4.2.1). Raises BrokerLostError if the
        connection ends.
        """
        self._check()
        session, receipts = self._session, Receipts(len(messages), [None] * len(messages), heard)
        self._expect()
        for number, message in enumerate(messages):
            while session.room <= 0:
                self._send_now()
                await self._wait_for_room()
            session.publish(message, receipts, number)
        self._send_now()
        if receipts.left:
            await receipts.done.wait()
            self._check()
        else:  # No message was sent: `messages` was empty, or every message was refused locally.
            self.room_changed()
            await trio.lowlevel.checkpoint()
        return receipts.refusals

    @property
    def window(self) -> int:
        """Maximum number of unacknowledged messages to the broker."""
        return self._session.window

    @property
    def room(self) -> int:
        """How many messages `send` may send now. It is 0 while a call to `publish` waits for room."""
        return 0 if self._waiting_for_room else self._session.room

    def send(self, receipts: Answered, messages: Sequence[tuple[int, Message]]) -> None:
        """Publish messages, at most `room`, without waiting. `receipts` receives the answers with these numbers.

        If the connection has ended, the messages are discarded and never answered.
        """
        if messages and self._lost is None:
            was_waiting = self._session.is_waiting or self._flushing
            for number, message in messages:
                self._session.publish(message, receipts, number)
            self._send_now()
            if not was_waiting:
                self._progress = trio.current_time()  # See `_expect`.

    async def _wait_for_room(self) -> None:
        if self._room.is_set():  # Do not replace an event that other tasks wait for.
            self._room = trio.Event()
        self._waiting_for_room += 1
        try:
            await self._room.wait()
        finally:
            self._waiting_for_room -= 1
        self._check()

    async def subscribe(self, topics: Sequence[str], at_qos_0: Collection[str] = ()) -> None:
        """Subscribe to the topics, those in `at_qos_0` at QoS 0 and the others at QoS 1.

        Raises BrokerRefusedError, BrokerLostError.
        """
        self._check()
        receipts = Receipts(len(topics), [None] * len(topics))
        self._expect()
        self._session.subscribe(topics, receipts, at_qos_0)
        self._send_now()
        await receipts.done.wait()
        self._check()
        refused = [f"{topic}: {why}" for topic, why in zip(topics, receipts.refusals, strict=True) if why is not None]
        if refused:
            raise BrokerRefusedError(self._broker, f"refuses the subscription to {', '.join(refused)}")

    async def acknowledge(self, received: Received) -> None:
        """Acknowledge a message, so that the broker does not repeat it. Do nothing if the connection has ended."""
        if self._lost is None:
            self._session.acknowledge(received)
            await self._flush()  # Wait, so that requests do not arrive faster than the broker reads the answers.

    def _expect(self) -> None:
        """Start the time limit for the broker's answer, unless it is already running."""
        if not self._session.is_waiting and not self._flushing:
            self._progress = trio.current_time()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _lose(self, error: IncoError) -> None:
        """End the connection, and wake all waiting tasks with the reason."""
        if self._lost is None:
            self._lost = error
        for event in (self._answered, self._room, self.ended):
            event.set()
        self._session.abandon()
        self.room_changed()  # Acknowledgements may have arrived together with the broker's DISCONNECT.

    def _send_now(self) -> None:
        """Send packets without waiting. A task sends the packets that the socket does not accept immediately."""
        session = self._session
        if self._flushing or not session.out:
            return
        if isinstance(self._stream, trio.SocketStream):
            try:
                sent = os.write(self._stream.socket.fileno(), session.out)
            except BlockingIOError:
                sent = 0
            except OSError:
                session.out.clear()  # See `_flush`.
                return
            if sent:
                del session.out[:sent]
                self._is_cut = bool(session.out)
        if session.out and self._nursery is not None:
            self._nursery.start_soon(self._flush)

    async def _flush(self) -> None:
        """Send the packets of all tasks, unless another task is already sending them."""
        session = self._session
        if self._flushing:
            return
        self._expect()
        self._flushing = True
        try:
            while session.out and self._lost is None:
                data = bytes(session.out[:CHUNK])
                del session.out[:CHUNK]
                self._is_cut = True
                await self._stream.send_all(data)
                self._is_cut = False
                if session.out:
                    # A large message takes time to send, so each part sent counts as progress. The last part does not:
                    # the kernel may accept it even if the connection is already lost, and frequent messages would then
                    # hide the loss.
                    self._progress = trio.current_time()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # Do not call `_lose` here: `_receive` may still read why the broker closed the connection. If another
            # process has taken over the session, this process must not reconnect and take it back.
            session.out.clear()
        finally:
            self._flushing = False

    async def run(self) -> None:
        """Receive packets and send pings until the connection is lost."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._watch)
            try:
                await self._flush()
                await self._receive()
            except IncoError as error:
                self._lose(error)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._lose(self._broke(error))
            finally:
                self._nursery = None
            nursery.cancel_scope.cancel()

    async def _receive(self) -> None:
        session, entry, is_warned, has_refused = self._session, self._entry, False, False
        while self._lost is None:
            # The broker may wait for a TCP acknowledgement before it sends more.
            _transport(self._stream).setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            data = await self._read()
            if not data:
                self._lose(self._hung_up())
                return
            session.taken = entry.statistics().current_buffer_used
            number = session.feed(data)
            self._send_now()  # The session may have answered messages at QoS 2.
            # Each part of a long packet counts: on a new connection, a slow broker would only send it again.
            self._progress = trio.current_time()
            if number:
                if session.overtaken != self._overtaken[0]:
                    self._overtaken = session.overtaken, self._progress
                self._room.set()
                self.room_changed()
            if session.limits is not None:
                self._answered.set()
            while session.received:
                entry.send_nowait(session.received.popleft())
            if session.dropped and not is_warned:
                is_warned = True
                logger.warning(
                    "%s: dropped QoS 0 messages, because %d messages are queued", self._broker, session.receive_max
                )

            if session.refused and not has_refused:
                has_refused = True
                text = "ignored a message at QoS 2: does another program use the client identifier?"
                logger.warning("%s: %s", self._broker, text)

    async def _read(self) -> bytes | bytearray:
        stream = self._stream
        if not isinstance(stream, trio.SocketStream):
            return await stream.receive_some(CHUNK)
        while True:  # `receive_some` would read before it waits, and usually find no data.
            await trio.lowlevel.wait_readable(stream.socket)
            try:
                return os.read(stream.socket.fileno(), CHUNK)
            except BlockingIOError:
                pass
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def _watch(self) -> None:
        """Send pings. Treat the connection as lost if the broker does not answer for `patience` seconds.

        The same applies to a packet whose answer is missing `patience` seconds after the answer to a later one.
        """
        session, last_look = self._session, -math.inf
        while self._lost is None:
            now, deadline = trio.current_time(), math.inf
            if session.is_waiting or self._flushing or session.is_pinging or self._is_cut:
                (overtaken, since), start = self._overtaken, self._progress
                deadline = (start if overtaken is None else min(start, since)) + self._patience
                if now >= deadline > last_look:
                    # This process may be late although the broker was not. Let `_read` read what has arrived.
                    last_look = deadline
                    await trio.sleep(GRACE)
                    continue
                if now >= deadline:
                    waits = "accepted the connection but does not answer"
                    what = waits if session.limits is None else f"does not answer for {self._patience:g} s"
                    if now < start + self._patience:
                        what = f"has not answered a packet for {self._patience:g} s, but has answered later ones"
                    self._lose(BrokerLostError(self._broker, what))
                    return
            # Ping after half of the keep-alive time, so that even a delayed ping arrives in time. Ping even if other
            # packets were sent: the answer shows whether the broker has left an earlier packet unanswered.
            keep_alive = KEEPALIVE if session.limits is None else session.limits.keep_alive
            interval = min(keep_alive or KEEPALIVE, KEEPALIVE) / 2
            if session.limits is not None and not self._flushing:
                ping = self._last_ping + interval
                if now >= ping:
                    if not session.is_pinging:
                        self._expect()
                    self._last_ping = now
                    session.ping()
                    self._send_now()  # `_flush` could wait for the broker, and this task must check `patience`.
                    continue
                deadline = min(deadline, ping)
            # The answer to a ping does not wake this task, so look again before the next ping is due.
            with trio.move_on_at(min(deadline, now + min(self._patience, interval))):
                await (self._answered if session.limits is None else self.ended).wait()

    def _broke(self, error: Exception) -> IncoError:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLError):
            return BrokerLostError(self._broker, f"the TLS connection failed: {cause.reason or cause} ({self._hint()})")
        if self._session.limits is None:
            return self._hung_up()
        return ConnectionBrokenError(self._broker, f"the connection broke{'' if cause is None else f': {cause}'}")

    def _hung_up(self) -> BrokerLostError:
        if self._session.limits is not None:
            return ConnectionBrokenError(self._broker, "the connection broke")
        return BrokerLostError(self._broker, f"ended the connection without an answer ({self._hint()})")

    def _hint(self) -> str:
        return "does it need a client certificate, or a different one?" if self._broker.tls else "does it need TLS?"

    async def answered(self) -> None:
        """Wait for the broker's CONNACK."""
        await self._answered.wait()
        self._check()

    async def end(self) -> None:
        """Send DISCONNECT and close the connection."""
        session = self._session
        if self.publishes_will and session.goodbye == mqtt5.DisconnectReasonCode.NORMAL_DISCONNECTION:
            session.goodbye = mqtt5.DisconnectReasonCode.DISCONNECT_WITH_WILL_MESSAGE
        with trio.move_on_after(FAREWELL, shield=True):
            if session.limits is not None and not self._is_cut and not self._flushing:
                session.disconnect()
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._stream.send_all(bytes(session.out))
            await self._stream.aclose()


def _transport(stream: Any) -> Any:
    """Return the TCP socket that a TCP or TLS stream uses."""
    return (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket


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
    receive_max: int = RECEIVE_MAX,
    packet_max: int = PACKET_MAX,
) -> AsyncIterator[Connection]:
    """Connect to `broker` while the block runs. The broker publishes `will` when the connection ends.

    The broker then keeps the session for another `session` seconds. `clean` discards an earlier session. `receive_max`
    and `packet_max` limit the messages from the broker. If the connection is lost, the block is cancelled. The last
    will is not retained if the broker does not allow retained messages. Raises BrokerLostError and BrokerRefusedError.
    """
    try:
        identity = credentials.read()
    except IncoError as error:
        raise BrokerRefusedError(broker, f"cannot use the credentials: {error}") from error
    connect = functools.partial(
        mqtt5.ConnectPacket, client_id, username=identity.user,
        password=None if identity.password is None else identity.password.encode(), clean_start=clean,
        keep_alive=KEEPALIVE, session_expiry_interval=session, receive_max=receive_max, max_packet_size=packet_max,
    )  # fmt: skip
    try:
        async with _connected(broker, credentials, connect(will=_will(will)), patience) as connection:
            yield connection
            return
    except RetainRefusedError:
        if will is None or not will.retain:
            raise
    will = attrs.evolve(will, retain=False)
    async with _connected(broker, credentials, connect(will=_will(will)), patience) as connection:
        yield connection


def _will(message: Message | None) -> mqtt5.Will | None:
    if message is None:
        return None
    qos = mqtt5.QoS.AT_LEAST_ONCE
    return mqtt5.Will(message.topic, payload=message.payload, qos=qos, retain=message.retain)


@asynccontextmanager
async def _connected(
    broker: Broker, credentials: Credentials, connect: mqtt5.ConnectPacket, patience: float
) -> AsyncIterator[Connection]:
    stream = await _open_stream(broker, credentials, patience)
    connection = Connection(broker, stream, Session(broker, connect), patience)
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            try:
                await connection.answered()
                with trio.CancelScope() as scope:
                    nursery.start_soon(_cancel_once, connection.ended, scope)
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


async def _cancel_once(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _open_stream(broker: Broker, credentials: Credentials, patience: float) -> trio.abc.Stream:
    """Connect to the broker, with TLS if its URL requires it. Raises BrokerLostError, BrokerRefusedError."""
    context = _context(broker, credentials) if broker.tls else None
    tcp: trio.SocketStream | None = None
    try:
        with trio.fail_after(2 * patience):
            try:
                tcp = await trio.open_tcp_stream(broker.host, broker.port)
            except RuntimeError as error:  # Trio cannot start a thread to look up the host.
                raise BrokerLostError(broker, f"cannot look up the host: {error}") from error
            if context is None:
                return tcp
            stream = trio.SSLStream(tcp, context, server_hostname=broker.host, https_compatible=True)
            await stream.do_handshake()
            return stream
    except BaseException as error:
        if tcp is not None:
            await trio.aclose_forcefully(tcp)
        if isinstance(error, (OSError, trio.BrokenResourceError, trio.TooSlowError, ssl.SSLError, ValueError)):
            raise _connect_error(broker, error) from error
        raise


def _connect_error(broker: Broker, error: Exception) -> IncoError:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
    if isinstance(cause, OSError) and isinstance(cause.__cause__, BaseExceptionGroup):
        # Trio has tried several addresses. The first error belongs to the preferred address.
        cause = cause.__cause__.exceptions[0]
    match cause:
        case ssl.SSLCertVerificationError():
            return BrokerRefusedError(broker, f"its certificate is not valid: {cause.verify_message}")
        case ssl.SSLError():
            return BrokerLostError(broker, f"the TLS handshake failed: {cause.reason or cause}")
        case socket.gaierror():
            return BrokerLostError(broker, f"no such host: {cause.strerror}")
        case trio.TooSlowError() | TimeoutError():
            return BrokerLostError(broker, "does not answer")
        case ConnectionResetError() | None if broker.tls:
            return BrokerLostError(broker, "reset the connection (does it support TLS?)")
    return BrokerLostError(broker, f"cannot be reached: {getattr(cause, 'strerror', None) or cause}")


def check_certificates(broker: Broker, credentials: Credentials) -> None:
    """Raise BrokerRefusedError if a connection to the broker cannot use the certificate files."""
    if broker.tls:
        _context(broker, credentials)


def _context(broker: Broker, credentials: Credentials) -> ssl.SSLContext:
    """Return the TLS context for the certificate files. Raises BrokerRefusedError if one of them is not valid."""
    files = (credentials.ca_file, credentials.certificate_file, credentials.key_file)
    try:
        return _load_context(files, tuple(None if file is None else _version(file) for file in files))
    except (OSError, ValueError) as error:
        raise BrokerRefusedError(broker, f"cannot use the certificate files: {error}") from error


def _version(file: str) -> tuple[int, int]:
    """Return file attributes that change when the file is replaced or modified."""
    status = Path(file).stat()
    return status.st_mtime_ns, status.st_ino


@functools.lru_cache(maxsize=1)  # All boards of a gateway use the same files, and reading the CA file is slow.
def _load_context(files: tuple[str | None, str | None, str | None], _versions: object) -> ssl.SSLContext:
    ca_file, certificate_file, key_file = files
    context = ssl.create_default_context(cafile=ca_file)
    if certificate_file is not None:
        context.load_cert_chain(certificate_file, key_file, password=lambda: b"")
    return context
