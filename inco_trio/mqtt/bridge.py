"""One side of a bridge between two cores on different hosts: the peer of a `unix:` link, with a broker in between.

Each side publishes the frames of its local core to `<prefix>/<end>/frames`, and writes the frames of the other side to
its local core. A message contains frames in order, and the number of the first frame:

- A frame is dequeued from the link's socket after the broker has acknowledged it. One message is in flight at a time.
  If the process dies or the connection breaks, the same frames are published again with the same numbers. The other
  side drops frames that it has already written.
- A message is acknowledged to the broker after its frames have been written to the local core.
- At most WINDOW frames are in flight; the other side reports its progress on request. If the other core does not read
  its frames, the broker's queue therefore does not overflow: the local core waits, as on a single host.

An fd store keeps the numbers together with the socket. Without an fd store, a new process starts a new numbering, and
frames that were in flight arrive twice.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
from collections.abc import Callable

import attrs
import trio

from inco_trio.backoff import Backoff
from inco_trio.errors import IncoError, ResourceError
from inco_trio.frame import FRAME_MAX
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names
from inco_trio.links.opening import Surroundings
from inco_trio.links.unix import UnixLink
from inco_trio.mqtt.bridge_codec import Batch, decode_report, decode_status, encode_report, encode_status
from inco_trio.mqtt.bridge_progress import WINDOW, Memory, Progress
from inco_trio.mqtt.configuration import Broker, Credentials
from inco_trio.mqtt.connection import BrokerBackoff, Connection, open_connection
from inco_trio.mqtt.session import (
    PUBLISH_OVERHEAD,
    RECEIVE_MAX,
    BrokerLostError,
    BrokerRefusedError,
    Limits,
    Message,
    Received,
    Refusal,
    SessionTakenError,
)
from inco_trio.mqtt.topics import client_id
from inco_trio.nurseries import plain_nursery
from inco_trio.persist.fdstore import FdStore, inherited_fd, report_missing
from inco_trio.problems import Problems
from inco_trio.service.log import log_statistics

__all__ = ["Bridge", "Counts"]

logger = logging.getLogger(__name__)

SESSION = 86_400
"""Seconds for which the broker queues messages for a side that is offline."""
AGAIN = 2.0
"""Seconds until the next attempt to publish a message that the broker refused or that had no subscriber."""
REPORT_PATIENCE, REPORT_PAUSE = 10.0, 3600.0
"""Shortest and longest time in seconds until the next request for a report, if the other side has not sent one.

The pauses double, so the broker queues fewer than 40 requests in a day for a side that is offline.
"""
SUSPICION = 60.0
"""Maximum time in seconds between two status messages that prove that another process is running on this side."""


@attrs.define
class Counts:
    """The counters of one side."""

    published: int = 0
    """Frames from the local core that the broker has acknowledged."""
    written: int = 0
    duplicates: int = 0
    """Frames dropped because the bridge had written them before."""
    missed: int = 0
    """Frames from the other side that the broker acknowledged but never delivered."""
    malformed: int = 0
    """Messages that no bridge published to this side, and datagrams from the local core that are not frames."""
    too_large: int = 0
    """Frames dropped because they are larger than the broker's Maximum Packet Size."""


class Bridge:
    """One side of a bridge, for the core at `address.peer`. `ends` names this side and the other side."""

    def __init__(self, broker: Broker, ends: tuple[str, str], address: UnixAddress, fd_store: FdStore) -> None:
        self.counts = Counts()
        self._broker = broker
        self._end, self._other = ends
        self._address, self._fd_store = address, fd_store
        self._resources = contextlib.ExitStack()
        self._problems = Problems()
        self._changed = trio.Event()
        """An event that is set and replaced whenever the link or the other side may have changed."""
        self._reported = trio.Event()
        self._instance = os.urandom(8).hex()
        """A random ID that distinguishes this process from another process on the same side."""
        self._connections = 0
        """The number of attempts to connect to the broker."""
        self._suspected = (-math.inf, "", 0)
        """The last status of another process on this side: the time of its arrival, the instance and the connection."""
        self._announced = False
        """Whether this process has received its own `online` status. Messages that arrive before it are older."""
        self._other_is_online: bool | None = None
        self._other_connection = ("", 0)
        """The other side's process and connection, as its last `online` status identified them."""
        self._other_connected = trio.Event()
        self._is_open = False
        self._link: UnixLink
        self._progress: Progress

    def _open(self) -> None:
        """Bind the socket of the link. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
        inherited, around = self._fd_store.inherited, Surroundings()
        report_missing(inherited, ("memory", "link"))
        self._resources.callback(around.close)
        try:
            memory = Memory.open(inherited_fd(inherited, "memory"))
        except OSError as error:
            raise ResourceError(f"cannot create a memfd: {error.strerror}") from error
        self._resources.callback(memory.close)
        self._progress = Progress(memory.numbers)
        self._link = _open_link(
            self._address, inherited_fd(inherited, "link"), memory.note, around.names(self._address.name)
        )
        self._resources.callback(lambda: self._link.close(remove=self._fd_store.supervisor is None))
        if not self._link.refresh():
            raise self._link.missing()
        self._is_open = True
        for name, fd in (("memory", memory.fd), ("link", self._link.fd)):
            if inherited.get(name) != fd:
                self._fd_store.store(name, fd)

    def close(self) -> None:
        """Close the link. If an fd store keeps the socket, the frames queued in the socket are kept."""
        self._resources.close()

    def log_statistics(self) -> None:
        """Log the counters; do nothing before the link is open."""
        if self._is_open:
            counts = attrs.asdict(self.counts) | {"foreign": self._link.foreign}
            counts["malformed"] += self._link.malformed
            log_statistics(counts)

    async def run(self, credentials: Credentials, ready: Callable[[], None]) -> None:
        """Transfer frames until cancelled. Raises SessionTakenError and the same errors as `_open`."""
        if not self._is_open:
            self._open()
        async with plain_nursery() as nursery:
            nursery.start_soon(self._follow_link)
            ready()
            await self._stay_connected(credentials)

    async def _follow_link(self) -> None:
        """Keep the link's socket bound until cancelled."""
        while True:
            await self._link.changed()
            stored = self._link.fd
            if self._link.refresh():
                self._problems.well("path", self._link.name)
            else:
                self._problems.failed("path", f"{self._link.absence}; waiting", self._link.name)
            if self._link.fd != stored:
                try:
                    self._fd_store.store("link", self._link.fd)
                except IncoError as error:
                    logger.warning("%s: frames that arrive during a restart will be lost: %s", self._link.name, error)
            self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _stay_connected(self, credentials: Credentials) -> None:
        """Connect to the broker, and reconnect whenever the connection is lost."""
        backoff = BrokerBackoff()
        name = client_id(f"{self._broker.prefix}/{self._end}")
        while True:
            self._connections += 1
            will = self._status("offline")
            try:
                async with open_connection(self._broker, credentials, name, will=will, session=SESSION) as connection:
                    backoff.connected()
                    logger.info("%s: connected as %s", self._broker, self._end)
                    if not connection.session_present:
                        self._start_session()
                    self._check_limits(connection.limits)
                    await self._exchange(connection)
            except SessionTakenError:
                text = f"another process also runs as {self._end}: stop one of them"
                raise SessionTakenError(self._broker, text) from None
            except (BrokerLostError, BrokerRefusedError) as error:
                self._problems.failed("broker", f"{error.reason}; frames are queued; retrying", self._broker)
                pause = backoff.lost(error)
            await trio.sleep(pause)

    def _start_session(self) -> None:
        """Handle a connection that does not continue an earlier session of this side."""
        if self._announced or self._progress.is_inherited:
            what = "discarded the session of this side: queued messages may be lost"
            logger.warning("%s: %s", self._broker, what)
        # The broker may also have discarded the session of the other side. It would then drop frames until the other
        # side has connected, and would still acknowledge them if another client has subscribed to the topic.
        self._progress.await_report()

    def _check_limits(self, limits: Limits) -> None:
        """Report which of the broker's limits are too low for the bridge."""
        size, longest = limits.maximum_packet_size, Batch(bytes(8), 1, [bytes(FRAME_MAX)]).encode()
        needed = PUBLISH_OVERHEAD + len(self._topic(self._end, "frames").encode()) + len(longest)
        faults = {
            "size": f"allows packets of {size} bytes, but the longest frames need {needed}"
            if size is not None and size < needed else None,
            "expiry": f"keeps frames only for {limits.session_expiry} s while a side is offline"
            if limits.session_expiry < SESSION else None,
            "retain": "does not keep retained messages: a side cannot see whether the other side is online"
            if not limits.retain_available else None,
        }  # fmt: skip
        for key, fault in faults.items():
            if fault is None:
                self._problems.forget(("broker", key))
            else:
                self._problems.failed(("broker", key), f"the broker {fault}", self._broker)

    def _status(self, state: str) -> Message:
        return Message(
            self._topic(self._end, "status"), encode_status(state, self._instance, self._connections), retain=True
        )

    def _topic(self, end: str, what: str) -> str:
        return f"{self._broker.prefix}/{end}/{what}"

    async def _exchange(self, connection: Connection) -> None:
        # The other side has at most 400 messages in flight. If a broker sends more, reports must wait for the writes.
        entry, batches = trio.open_memory_channel[Received](2 * RECEIVE_MAX)
        async with plain_nursery() as nursery:
            nursery.start_soon(self._sort, connection, entry)
            nursery.start_soon(self._write_all, connection, batches)
            topics = [self._topic(self._other, what) for what in ("frames", "written")]
            # At QoS 1, the broker would queue each status for a side that is offline, and drop frames once the queue is
            # full. The last status is retained.
            statuses = [self._topic(end, "status") for end in (self._other, self._end)]
            await connection.subscribe([*topics, *statuses], statuses)
            await self._publish(connection, self._status("online"))
            # Some brokers accept connections, but end them because of the subscription or the first message.
            self._problems.well("broker", self._broker)
            nursery.start_soon(self._verify, connection)
            await self._publish_all(connection)

    async def _sort(self, connection: Connection, entry: trio.MemorySendChannel[Received]) -> None:
        """Handle received messages. Pass frames on to `entry`, so that reports do not wait for slow writes."""
        async for received in connection.received:
            is_frames = received.topic == self._topic(self._other, "frames")
            is_report = received.topic == self._topic(self._other, "written")
            if received.retain and (is_frames or is_report):
                # Another program has published the message. Each new subscription would receive it again.
                self._refuse(received, "a retained message, which no bridge publishes", ": delete it from the broker")
                await connection.acknowledge(received)
                continue
            if is_frames:
                await entry.send(received)
                continue
            try:
                if is_report:
                    boot, number = decode_report(received.payload)
                    if boot == self._progress.boot:
                        self._progress.reported(number)
                    self._reported.set()
                else:
                    state, instance, number = decode_status(received.payload)
                    if received.topic == self._topic(self._other, "status"):
                        self._take_status(state == "online")
                        if state == "online" and self._other_connection != (instance, number):
                            self._other_connection = instance, number
                            self._other_connected.set()
                    elif received.topic != self._topic(self._end, "status"):
                        self._refuse(received)  # Another program has left a subscription in this side's session.
                    elif not received.retain:
                        self._announced |= instance == self._instance
                    elif self._is_taken(instance, state, number):
                        await connection.publish([self._status("left")])
                        connection.publishes_will = False
                        raise SessionTakenError(self._broker, "the retained status names another process")
            except ValueError:
                self._refuse(received)
            await connection.acknowledge(received)

    def _refuse(self, received: Received, what: str = "a message that is not from a bridge", hint: str = "") -> None:
        self.counts.malformed += 1
        self._problems.failed("malformed", f"dropped {what} (counted as malformed){hint}", received.topic)

    def _take_status(self, is_online: bool) -> None:
        if is_online is not self._other_is_online:
            self._other_is_online = is_online
            state = "online" if is_online else "offline"
            logger.info("%s: %s is %s", self._broker, self._other, state, extra={"cause": state})
        if is_online:
            self._reported.set()  # Request a report again: the broker may have dropped the last request.
        self._change()

    def _is_taken(self, instance: str, state: str, number: int) -> bool:
        """Return whether another process has taken over this side. Not every broker reports this itself."""
        if not self._announced or instance == self._instance or state == "left":
            return False
        # A status does not prove that its process is still running: the broker may have restored an older state, even
        # repeatedly. A higher connection number proves it, because only a running process connects again.
        before, known, earlier = self._suspected
        self._suspected = (trio.current_time(), instance, number)
        is_running = instance == known and number > earlier and trio.current_time() - before < SUSPICION
        # Only the process with the lower ID gives up. Otherwise both might give up at the same time.
        return is_running and self._instance < instance

    async def _publish_all(self, connection: Connection) -> None:
        """Publish the frames of the local core."""
        link, progress = self._link, self._progress
        while True:
            progress.number(link.queue)
            await self._await_room(connection)
            frames = link.peek()[: progress.room]
            if not frames:
                await link.wait_readable()
                continue
            if progress.number(link.queue):
                continue  # A new socket has replaced the previous socket, which was empty.
            while frames and not await self._publish_batch(
                connection, Batch(progress.boot, progress.following, frames)
            ):
                if len(frames) == 1:
                    # Drop the frame, but do not use up a number, so that the other side does not report a gap.
                    link.dequeue()
                    self.counts.too_large += 1
                frames = frames[: len(frames) // 2]
            for _ in frames:
                progress.taken()
                link.dequeue()
            self.counts.published += len(frames)

    async def _verify(self, connection: Connection) -> None:
        """Request a report whenever the other side has connected and has not confirmed the last frames.

        The broker may have lost these frames, for example with the session of the other side. Without the request, the
        other side would count them only when the local core sends the next frame. There is only one request for each
        connection, so reconnections of this side do not fill the broker's queue.
        """
        while True:
            await self._other_connected.wait()
            verified = self._other_connection
            if self._progress.is_unconfirmed:
                batch = Batch(self._progress.boot, self._progress.following, [], report=True)
                await self._publish_batch(connection, batch)
            if self._other_connection == verified:
                self._other_connected = trio.Event()

    async def _await_room(self, connection: Connection) -> None:
        """Wait until frames may be published. Repeat the request for a report, because the broker may have dropped it.

        For example, mosquitto drops messages that its ACL does not allow the other side to read, and acknowledges them.
        """
        progress, pause, has_restarted = self._progress, REPORT_PATIENCE, False
        while not progress.has_room or (progress.is_refuted and not has_restarted):
            if progress.is_refuted and not has_restarted:
                # The other side would drop the next frames as duplicates. The report itself may be forged, and more
                # may follow. Therefore, restart only once before the next frames are published.
                has_restarted = True
                progress.restart()
                text = f"{self._other} has confirmed frames that do not exist: another program publishes to the topics"
                text += f" of this bridge; restarting the numbering; up to {WINDOW} frames are lost"
                logger.error("%s: %s", self._broker, text)
            self._reported = trio.Event()
            await self._publish_batch(connection, Batch(progress.boot, progress.following, [], report=True))
            with trio.move_on_after(pause) as scope:
                await self._reported.wait()
            if scope.cancelled_caught:
                pause = min(2 * pause, REPORT_PAUSE)
                if self._other_is_online:
                    text = f"{self._other} is online, but has not confirmed the last frames for {REPORT_PATIENCE:g} s"
                    hint = "does its core read, and does the broker's ACL let each side read the topics of the other?"
                    self._problems.failed("report", f"{text}; frames are queued; retrying ({hint})", self._broker)
        self._problems.well("report", self._broker)

    async def _publish_batch(self, connection: Connection, batch: Batch) -> bool:
        """Publish a batch; retry while the broker refuses it. Return False if it is too large for the broker."""
        message = Message(self._topic(self._end, "frames"), batch.encode())
        refusal = await self._publish(connection, message, heard=True)
        if refusal is not None and len(batch.frames) == 1:
            text = f"dropped a frame of {len(batch.frames[0])} bytes (counted as too_large): {refusal}"
            self._problems.failed("too large", text, self._link.name)
        return refusal is None

    async def _publish(self, connection: Connection, message: Message, *, heard: bool = False) -> Refusal | None:
        """Publish a message; retry while the broker refuses it or, with `heard`, while its topic has no subscriber.

        Return the refusal of a message that is too large for the broker.
        """
        logged = False
        while True:
            changed = self._changed
            (refusal,) = await connection.publish([message], heard=heard)
            if refusal is None or refusal.is_too_large:
                if refusal is None or heard:  # The caller reports a frame that is too large.
                    self._problems.well(message.topic)
                else:
                    self._problems.failed(message.topic, f"not published: {refusal}")
                return refusal
            if refusal.is_unheard:
                if not logged:
                    why = "was never online, or the broker has discarded its session"
                    logger.info("%s: %s %s; frames are queued", self._broker, self._other, why)
                logged = True
            else:
                self._problems.failed(message.topic, f"the broker refused the message: {refusal}; retrying")
            with trio.move_on_after(AGAIN):
                await changed.wait()

    async def _write_all(self, connection: Connection, batches: trio.MemoryReceiveChannel[Received]) -> None:
        """Write the frames of the other side to the local core."""
        async for received in batches:
            try:
                batch = Batch.decode(received.payload)
            except ValueError:
                self._refuse(received)
                await connection.acknowledge(received)
                continue
            if batch.boot == self._progress.boot:
                self._refuse(received, "a message that this side has published", ": another program publishes it again")
            else:
                await self._write_batch(batch)
                if batch.report:
                    report = encode_report(batch.boot, self._progress.written(batch.boot))
                    await self._publish(connection, Message(self._topic(self._end, "written"), report))
            await connection.acknowledge(received)

    async def _write_batch(self, batch: Batch) -> None:
        last = self._progress.written(batch.boot)
        missed = batch.first - last - 1
        if last and missed > 0:
            self.counts.missed += missed
            what = "1 frame" if missed == 1 else f"{missed} frames"
            logger.error("%s: lost %s of %s that the broker had acknowledged", self._broker, what, self._other)
        if missed > 0:
            self._progress.wrote(batch.boot, batch.first - 1)
        for number, frame in enumerate(batch.frames, batch.first):
            if number <= last:
                self.counts.duplicates += 1
                continue
            await self._write(frame)
            self._progress.wrote(batch.boot, number)

    async def _write(self, frame: bytes) -> None:
        """Write a frame to the local core. Wait until the core is running and its socket has room."""
        link, backoff = self._link, Backoff()
        while True:
            changed = self._changed
            try:
                link.send_frame(frame)
            except BlockingIOError:
                await link.wait_for_room()
            except LinkDownError as error:
                self._problems.failed("core", f"{error.strerror}; frames are queued for the core", link.name)
                await changed.wait()
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    self.counts.malformed += 1
                    what = f"dropped a frame of {len(frame)} bytes, which is too long for the core's socket"
                    self._problems.failed("core", what, link.name)
                    return
                self._problems.failed("core", f"cannot write: {error.strerror}; retrying", link.name)
                await trio.sleep(backoff.next())
            else:
                self._problems.well("core", link.name)
                self.counts.written += 1
                return


def _open_link(address: UnixAddress, held: int | None, note: memoryview, names: Names) -> UnixLink:
    """Return the link. It uses the inherited socket `held` if that socket is bound to the right address."""
    if held is not None:
        link = UnixLink.take(address, held, note, names)
        if link.fits:
            return link
        logger.warning("%s: the inherited socket has a different address: its queued frames are lost", link.name)
        link.close()
    return UnixLink.open(address, note, names)
