"""The gateway publishes the notifications of the proxies on this host to an MQTT broker.

The gateway is a follower of each proxy (docs/control.md) and keeps no notifications itself. A proxy keeps each
notification until the gateway acknowledges it. The gateway does so once the broker has acknowledged the notification.
The gateway may therefore be killed at any time, and writes no file.

One task for each proxy reads the events. One task for each board has its own connection to the broker, with its own
last will, so that boards do not wait for one another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import attrs
import trio

from inco_trio.backoff import Backoff
from inco_trio.control import protocol
from inco_trio.control.client import SILENT, sockets
from inco_trio.control.follower import Conversation, converse
from inco_trio.control.protocol import Notifications, Reply, Response
from inco_trio.errors import IncoError, ProtocolError, ProxyNotFoundError, ResourceError
from inco_trio.mqtt.backlog import Board
from inco_trio.mqtt.configuration import Broker, GatewayConfig
from inco_trio.mqtt.connection import BrokerBackoff, Connection, open_connection
from inco_trio.mqtt.publishing import REFUSED_AGAIN, Publisher
from inco_trio.mqtt.session import (
    BrokerLostError,
    BrokerRefusedError,
    ConnectionBrokenError,
    Limits,
    Message,
    Received,
    SessionTakenError,
)
from inco_trio.mqtt.topics import Topics
from inco_trio.nurseries import plain_nursery, read_aside
from inco_trio.problems import Problems

__all__ = ["Gateway"]

logger = logging.getLogger(__name__)

AT_START = 2.0
"""Timeout in seconds for the answers of running proxies at startup. The gateway connects to slower proxies later."""
LOOK_AGAIN = 0.5
"""Seconds between searches for new control sockets."""
SESSION = 86_400
"""Seconds for which the broker queues send requests while no gateway is connected."""
REQUESTS_MAX = 100
"""Maximum number of requests for a board that the broker may send before the gateway has handled the first one."""
REQUEST_MAX = 16 << 10
"""Maximum size of a request in bytes."""
RESPONSE_ATTEMPTS = 5
"""How many times the gateway publishes a response if the connection ends each time before the acknowledgement.

Some brokers end the connection if a client may not publish to a topic. Without this limit, one request with such a
response topic would block all later requests.
"""
SHORT = 3.0
"""A connection that ends within this time (in seconds) is short: another gateway may have taken over the session."""
SHORT_ONES = 3
"""Number of consecutive short connections after which the log mentions another gateway."""
SEND_PATIENCE = 10.0
"""Timeout in seconds for the link to accept the frame of a send request."""
FLUSH_PATIENCE = 10.0
"""Timeout in seconds for a proxy to report that it has closed a board that another proxy has opened."""
TWO_PROXIES = 1.0
"""Seconds for which two proxies must have the same board open before the gateway logs it. One of them may be ending."""


class Gateway:
    """Publishes the configured boards of the proxies at `controls` (default: all proxies on this host)."""

    def __init__(self, broker: Broker, config: GatewayConfig, controls: Sequence[Path] | None = None) -> None:
        self._broker = broker
        self._config = config
        self._controls = controls
        self._boards: dict[str, Board] = {}
        self._proxies: dict[Path, trio.Event] = {}
        """For each socket path, an event that is set after the first attempt to follow the proxy."""
        self._connections: dict[Conversation, trio.CancelScope] = {}
        """For each connection to a proxy, a scope whose cancellation makes the gateway connect again."""
        self._flushes: defaultdict[Conversation, deque[trio.Event]] = defaultdict(deque)
        """For each connection to a proxy, events that the next `flushed` events of the proxy set, in this order."""
        self._misunderstood: dict[Path, str] = {}
        """For each socket path, the last process (`Greeting.boot`) that sent a line that the gateway cannot decode."""
        self._problems = Problems()
        self._unreachable = set[Board]()
        """The boards that have lost the broker and have not published a message since."""

    async def run(self, ready: Callable[[], None]) -> None:
        """Publish until cancelled. Call `ready` once the gateway follows all running proxies."""
        async with trio.open_nursery() as nursery:
            await self._look(nursery)
            with trio.move_on_after(AT_START):
                for followed in tuple(self._proxies.values()):
                    await followed.wait()
            for name in sorted({*(self._config.boards or ())} - {*self._boards}):
                logger.warning("%s: no proxy has a board with this name yet", name)
            ready()
            while True:
                await trio.sleep(LOOK_AGAIN)
                await self._look(nursery)
                self._replace_sources()

    async def _look(self, nursery: trio.Nursery) -> None:
        """Start following the proxies whose control sockets have just appeared."""
        try:
            paths = self._controls if self._controls is not None else await read_aside(sockets)
        except ResourceError as error:
            self._problems.failed("control", f"{error}; retrying")
            return
        self._problems.well("control")
        for path in paths:
            if path not in self._proxies:
                self._proxies[path] = trio.Event()
                nursery.start_soon(self._follow, path, nursery)

    async def _follow(self, path: Path, nursery: trio.Nursery) -> None:
        """Follow the proxy at `path` until it exits."""
        followed = self._proxies[path]
        again: frozenset[str] | None = frozenset()
        try:
            while again is not None:
                again = await self._follow_once(path, nursery, followed, again)
        except IncoError as error:
            if isinstance(error, ProxyNotFoundError) and not isinstance(error, ProtocolError):
                logger.debug("%s", error)
                return
            self._problems.failed(path, error.reason)
            followed.set()
            await trio.sleep(REFUSED_AGAIN)
        finally:
            followed.set()
            del self._proxies[path]

    async def _follow_once(
        self, path: Path, nursery: trio.Nursery, followed: trio.Event, again: Collection[str]
    ) -> frozenset[str] | None:
        """Follow the proxy at `path`. Return None if the proxy has ended.

        Otherwise, the gateway must connect again; see `_replace_sources`. The result contains the boards that the proxy
        had open, and is the argument `again` of the next call.
        """
        was_open = frozenset[str]()
        with trio.CancelScope() as scope:
            async with converse(path) as (source, greeting):
                mine: list[Board] = []
                self._connections[source] = scope
                try:
                    response = await source.request(protocol.FollowRequest(self._config.boards, batches=True))
                    if self._misunderstood.get(path) != greeting.boot:
                        self._problems.well(path)
                    mine += [
                        self._have(name, source, nursery, boot=history.boot, is_again=name in again)
                        for name, history in response.follow.items()
                    ]
                    followed.set()
                    async with plain_nursery() as asking:
                        asking.start_soon(self._count, source, mine)
                        asking.start_soon(source.send_acknowledgements)
                        while True:
                            for reply in await source.read():
                                self._hear(reply, source, mine, nursery)
                except ProtocolError:
                    self._misunderstood[path] = greeting.boot
                    raise
                finally:
                    del self._connections[source]
                    self._flushes.pop(source, None)
                    source.acknowledge_at_end()
                    was_open = frozenset(board.name for board in mine if source in board.owners)
                    for board in mine:
                        board.leave(source)
                        self._compare(board)
        return was_open if scope.cancelled_caught else None

    def _replace_sources(self) -> None:
        """Replace the source of each board that another proxy has open, if the source may be replaced.

        The gateway has discarded events of that proxy. It connects to the proxy again, so that the proxy repeats them.
        """
        heirs = [heir for board in self._boards.values() if (heir := board.heir()) is not None]
        # A new connection does not repeat the last notifications of a board that the proxy has closed.
        busy = {board.source for board in self._boards.values() if not (board.is_open or board.is_idle)}
        for heir in heirs:
            if heir not in busy:
                self._connections[heir].cancel()

    def _have(
        self,
        name: str,
        source: Conversation,
        nursery: trio.Nursery,
        *,
        boot: str | None = None,
        is_again: bool = False,
        was_open: bool = False,
    ) -> Board:
        """Return the board `name` of a proxy, and publish it from this proxy. Start the task of a new board.

        If another proxy is the source, or if its events are queued, this must wait until `_replace_sources` has
        connected to the proxy again. With `was_open`, this connection has reported the board before, and the gateway
        may have discarded events of it. With `is_again`, `_replace_sources` has caused the connection. `boot` is the
        history of the board, if known.
        """
        board = self._boards.get(name)
        if board is None:
            board = self._boards[name] = Board(name)
            nursery.start_soon(self._serve, board, name=name)
        board.owners.pop(source, None)
        board.owners[source] = None
        if len(board.owners) > 1:
            nursery.start_soon(self._compare_later, board)
        if not is_again:
            board.wanted = source.path
        is_free = board.source is None and board.repeats(boot)
        is_heir = is_again and board.replacement == source.path and (board.source in board.owners or not board.waiting)
        if board.source is source:
            # The proxy has reopened the board. Keep the queue, which still contains the last events of the old history.
            board.reopen()
        elif (is_free and not was_open) or is_heir:
            # With `was_open`, an acknowledgement of later events would include the discarded ones.
            board.follow(source)
        elif board.source is not None and board.source in board.owners and board.wanted == source.path:
            board.replacement = None
            nursery.start_soon(self._flush, board, board.source, source, nursery)
        return board

    async def _flush(self, board: Board, source: Conversation, heir: Conversation, nursery: trio.Nursery) -> None:
        """Let `heir` replace `source`, unless `source` had already closed the board when `heir` opened it.

        The gateway can read the events of two proxies in any order. A proxy sends `flushed` after an earlier `closed`.
        The last notifications of the board may follow, so that `Board.heir` waits for them.
        """
        if board.source is not source:
            return
        flushed = trio.Event()
        self._flushes[source].append(flushed)
        nursery.start_soon(self._request_flush, source)
        with trio.move_on_after(FLUSH_PATIENCE):
            await flushed.wait()
        if board.source is source and source in board.owners and board.wanted == heir.path:
            board.replacement = heir.path

    async def _request_flush(self, source: Conversation) -> None:
        with contextlib.suppress(IncoError):  # `_follow_once` handles the end of the connection.
            await source.write(protocol.FlushRequest())

    async def _compare_later(self, board: Board) -> None:
        await trio.sleep(TWO_PROXIES)
        self._compare(board)

    def _compare(self, board: Board) -> None:
        """Report whether more than one proxy has a board with this name open."""
        if len(board.owners) > 1:
            text = "two proxies have a board with this name: publishing only the board that was opened last"
            self._problems.failed((board, "owners"), text, board.name)
        else:
            self._problems.well((board, "owners"), board.name)

    def _hear(self, reply: Reply, source: Conversation, mine: list[Board], nursery: trio.Nursery) -> None:
        if isinstance(reply, Notifications):
            board = self._boards.get(reply.board)
            if board is not None and board.source is source:
                board.add_all(reply)
            return
        if isinstance(reply, Response):
            for status in reply.status:
                board = self._boards.get(status.board)
                if board is not None and board.source is source:
                    board.status, board.running = status, status.status is not None and status.status.running
                    board.change()
            return
        if reply.event == "opened":
            was_open = self._boards.get(reply.board) in mine
            opened = self._have(reply.board, source, nursery, boot=reply.boot or None, was_open=was_open)
            if not was_open:
                mine.append(opened)
            return
        if reply.event == "flushed" and self._flushes[source]:
            self._flushes[source].popleft().set()
            return
        board = self._boards.get(reply.board)
        if board is not None and reply.event == "closed":
            board.owners.pop(source, None)
            self._compare(board)
        if board is None or board.source is not source:
            return
        if reply.event in ("notification", "merged"):
            board.add(reply)
        elif reply.event == "closed":
            board.close()
        elif reply.event == "link":
            board.running = reply.running
            board.change()

    async def _count(self, source: Conversation, mine: Sequence[Board]) -> None:
        """Ask a proxy for the status of each board at the configured interval."""
        await source.write(protocol.StatusRequest())
        while True:
            names = [board.name for board in mine if board.is_open]
            if not names:
                await trio.sleep(self._config.status_seconds)
            # Query one board at a time: querying many boards at once would delay notifications.
            for name in names:
                await trio.sleep(self._config.status_seconds / len(names))
                await source.write(protocol.StatusRequest(name))

    async def _serve(self, board: Board) -> None:
        """Publish a board until cancelled. Reconnect whenever the connection to the broker is lost."""
        topics, backoff = Topics(self._broker.prefix, board.name), BrokerBackoff()
        will = Message(topics.status, _json({"state": "offline"}), retain=True)
        begun, short, had_session = -math.inf, 0, False
        while True:
            try:
                async with open_connection(
                    self._broker,
                    self._config.broker,
                    topics.client_id,
                    will=will,
                    session=SESSION,
                    receive_max=REQUESTS_MAX,
                    packet_max=REQUEST_MAX,
                ) as connection:
                    begun = trio.current_time()
                    backoff.connected()
                    self._check_limits(board, connection.limits, had_session=had_session)
                    had_session = True
                    if not connection.session_present:
                        board.unanswered = None  # The broker does not repeat the request.
                    await self._exchange(board, topics, connection)
            except (BrokerLostError, BrokerRefusedError) as error:
                what = error.reason
                is_taken = isinstance(error, (SessionTakenError, ConnectionBrokenError))
                short = short + 1 if is_taken and trio.current_time() - begun < SHORT else 0
                begun = -math.inf
                if short >= SHORT_ONES:
                    what += " (repeatedly: does another gateway publish this board below this prefix?)"
                # All boards share this key, so that a problem with the broker is logged once, and its end, too.
                self._unreachable.add(board)
                self._problems.failed("broker", f"{what}; notifications stay pending; retrying", self._broker)
                self._problems.forget(("broker", "session"))
                pause = backoff.lost(error)
            await trio.sleep(pause)

    def _check_limits(self, board: Board, limits: Limits, *, had_session: bool = False) -> None:
        """Report which features the broker does not support, and whether it has discarded an earlier session."""
        faults = {
            "retain": "does not keep retained messages: subscribers receive the status only when it changes"
            if not limits.retain_available else None,
            "expiry": f"keeps requests only for {limits.session_expiry} s while the gateway is offline"
            if self._sendable(board) and limits.session_expiry < SESSION else None,
            "session": "discarded the gateway's session: queued requests may be lost"
            if self._sendable(board) and had_session and not limits.session_present else None,
        }  # fmt: skip
        for key, fault in faults.items():
            if fault is None:
                self._problems.forget(("broker", key))
            else:
                self._problems.failed(("broker", key), f"the broker {fault}", self._broker)

    async def _exchange(self, board: Board, topics: Topics, connection: Connection) -> None:
        async with plain_nursery() as nursery:
            nursery.start_soon(Publisher(board, topics, connection, self._problems).run)
            nursery.start_soon(self._send_all, board, topics, connection)
            # Subscribe before publishing `online`: the broker drops requests that arrive before the subscription.
            is_subscribed = await self._subscribe(board, topics, connection)
            nursery.start_soon(self._publish_status, board, topics, connection)
            backoff = BrokerBackoff()
            while not is_subscribed:
                await trio.sleep(backoff.next())
                is_subscribed = await self._subscribe(board, topics, connection)

    async def _publish_status(self, board: Board, topics: Topics, connection: Connection) -> None:
        """Publish the status and the counters of a board whenever they change."""
        published: dict[str, bytes] = {}
        while True:
            changed = board.changed
            now = {topics.status: _json(_status(board, connection.limits))}
            if board.status is not None:
                status = protocol.to_json(board.status)
                keys = ("counters", "signals", "history", "since")
                now[topics.counters] = _json({key: status.get(key) for key in keys})
            new = [Message(topic, body, retain=True) for topic, body in now.items() if published.get(topic) != body]
            again = math.inf
            refusals = await connection.publish(new)
            # Some brokers accept connections, but end them because of a subscription or the first message.
            self._unreachable.discard(board)
            if not self._unreachable:
                self._problems.well("broker", self._broker)
            for message, refusal in zip(new, refusals, strict=True):
                if refusal is None:
                    self._problems.well(message.topic)
                elif refusal.is_too_large:
                    if self._problems.said(message.topic) is None:  # Log this only once, even if the size changes.
                        self._problems.failed(message.topic, f"not published: {refusal}")
                else:
                    self._problems.failed(message.topic, f"the broker refused the message: {refusal}; retrying")
                    again = REFUSED_AGAIN
                    continue
                published[message.topic] = message.payload
            with trio.move_on_after(again):
                await changed.wait()

    def _sendable(self, board: Board) -> frozenset[str]:
        """Return the signals of a board that MQTT clients may send."""
        send = self._config.send
        return frozenset(send.get(board.name, ())) | frozenset(send.get("*", ()))

    async def _subscribe(self, board: Board, topics: Topics, connection: Connection) -> bool:
        """Subscribe to requests from MQTT clients. Return False if the broker refuses the subscription."""
        signals, filters = self._sendable(board), [topics.sends]
        if signals and not connection.limits.wildcard_subscriptions:
            filters = [topics.send(signal) for signal in sorted(signals - {"*"})]
            if "*" in signals:
                text = "the broker does not allow wildcards: name each signal in the configuration instead of *"
                self._problems.failed((board, "wildcards"), text, board.name)
        if not (signals and filters):
            return True
        try:
            await connection.subscribe(filters)
        except BrokerRefusedError as error:
            self._problems.failed((board, "send"), f"{error.reason}; signals cannot be sent; retrying", board.name)
            return False
        self._problems.well((board, "send"), board.name)
        return True

    async def _send_all(self, board: Board, topics: Topics, connection: Connection) -> None:
        """Handle MQTT clients' requests to send signals, in the order in which they arrive."""
        async for received in connection.received:
            if (signal := topics.signal_of(received.topic)) is not None:
                if _is_given_up(board, received):
                    what = f"the connection ended during {board.attempts} responses to a request: gave up the response"
                    self._problems.failed((board, "response"), what, board.name)
                    board.unanswered = None
                else:
                    response = await self._try_to_send(board, signal, received)
                    # Acknowledge the request last: if the connection breaks before, the broker repeats the request.
                    await self._respond(board, connection, received, response)
            elif self._problems.said(key := (board, "topic")) is None:
                text = f"ignored a message with the topic {received.topic!r}"
                hint = "does another program use the client identifier?"
                self._problems.failed(key, f"{text}: {hint}", board.name)
            await connection.acknowledge(received)

    async def _try_to_send(self, board: Board, signal: str, received: Received) -> dict[str, object]:
        allowed = self._sendable(board)
        if received.retain:
            return _error("invalid", "the message is retained: each gateway start would send the signal again")
        if "*" not in allowed and signal not in allowed:
            return _error("not-permitted", "the configuration of the gateway does not allow this signal")
        # A proxy that has the board open can send, even if the gateway does not publish its notifications yet.
        source = board.source if board.is_open or not board.owners else next(reversed(board.owners))
        if source is None:
            return _error("closed", "no proxy has this board open")
        path, backoff = source.path, Backoff()
        # The scope may be cancelled at any `await`, also while `converse` closes the connection.
        result = _error("closed", f"{path}: {SILENT}")
        with trio.move_on_after(SEND_PATIENCE):
            while True:
                try:
                    async with converse(path) as (conversation, _):
                        await conversation.write(protocol.SendRequest(signal, board=board.name))
                        text = f"the link did not accept the frame within {SEND_PATIENCE:g} s, but may do so later"
                        result = _error("closed", text)
                        replies = await conversation.read()
                        errors = [reply for reply in replies if isinstance(reply, Response) and reply.error]
                        result = _error(errors[0].error, errors[0].message) if errors else {"sent": 1}
                except ResourceError as error:  # The proxy has too many clients and has not read the request.
                    result = _error("closed", str(error))
                    await trio.sleep(backoff.next())
                except IncoError as error:
                    return _error("closed", str(error))
                else:
                    break
        return result

    async def _respond(
        self, board: Board, connection: Connection, received: Received, response: Mapping[str, object]
    ) -> None:
        topic, prefix = received.response_topic, self._config.response_prefix
        if topic is None:
            if "error" in response:
                what, cause = "a request without a response topic failed", ("request", board.name)
                logger.warning("%s: %s: %s", received.topic, what, response["message"], extra={"cause": cause})
            return
        key = (board, "response")
        if prefix is None or not topic.startswith(f"{prefix}/"):
            # Do not respond: a client could use the gateway's permissions to publish to any topic.
            where = "response_prefix is not configured" if prefix is None else f"response topic outside of {prefix!r}"
            self._problems.failed(key, f"{where}: sent no response", board.name)
            return
        message = Message(topic, _json(response), correlation=received.correlation, is_response=True)
        if received.packet is not None:
            board.attempts = board.attempts + 1 if _is_unanswered(board, received) else 1
            board.unanswered = received
        (refusal,) = await connection.publish([message])
        if received.packet is not None:
            board.unanswered = None
        if refusal is None:
            self._problems.forget(key)
        else:
            self._problems.failed(key, f"the broker refused a response: {refusal}", board.name)


def _is_unanswered(board: Board, received: Received) -> bool:
    """Return whether the connection has ended while the gateway published the response to this request."""
    last = board.unanswered
    if last is None or received.packet is None:  # Brokers do not repeat messages at QoS 0.
        return False
    return (last.topic, last.payload, last.response_topic, last.correlation) == (
        received.topic, received.payload, received.response_topic, received.correlation,
    )  # fmt: skip


def _is_given_up(board: Board, received: Received) -> bool:
    return _is_unanswered(board, received) and board.attempts >= RESPONSE_ATTEMPTS


def _status(board: Board, limits: Limits) -> dict[str, object]:
    state = "online" if board.is_open else "no proxy"
    history = None if board.status is None else board.status.history
    status = None if board.status is None else board.status.status
    return {
        "state": state, "running": board.running, "published": board.published, "merged": board.merged,
        "waiting": None if history is None else history.waiting, "link": None if status is None else status.link,
        "broker": attrs.asdict(limits),
    }  # fmt: skip


def _json(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields).encode()


def _error(error: str, message: str) -> dict[str, object]:
    return {"error": error, "message": message}
