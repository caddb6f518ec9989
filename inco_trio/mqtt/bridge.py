"""One end of a wire between two cores on different hosts: the peer of a `unix:` link, whose frames go over a broker.

What the core at this end sends is published to `<prefix>/<end>/frames`, and what the other end publishes is written to
the core. Each message has frames in their order, and a number for the first one:

- A frame is taken off the link's socket once the broker has acknowledged it, and one message is under way at a time:
  who is killed, or loses the broker, publishes the same frames with the same numbers again, and the other end drops
  what it has written before.
- A message is acknowledged to the broker once its frames are written to the core.
- No more than WINDOW frames are on their way to the core at the other end, which tells on demand how far it has come: a
  core that takes nothing overflows no queue of the broker, and makes the core at this end wait in the end, as it would
  on one host.

The numbers stand in memory that outlives the process with the socket; without a holder, a process begins anew, and what
was under way comes twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Sequence

import attrs
import trio

from inco_trio.errors import IncoError, ResourceError
from inco_trio.frame import FRAME_MAX
from inco_trio.links.address import UnixAddress
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names
from inco_trio.links.opening import Surroundings
from inco_trio.links.unix import UnixLink
from inco_trio.mqtt.configuration import Broker, Credentials
from inco_trio.mqtt.connection import (
    RECEIVE_MAX,
    BrokerBackoff,
    BrokerLostError,
    BrokerRefused,
    Connection,
    Message,
    Received,
    SessionTaken,
    open_connection,
)
from inco_trio.persist.fdstore import FdStore
from inco_trio.persist.inflight import Inflight
from inco_trio.persist.tables import NumberTable
from inco_trio.proxy.supervise import Backoff, Problems, plain_nursery
from inco_trio.service.log import log_statistics

__all__ = ["Batch", "Counts", "Progress", "Wire"]

logger = logging.getLogger(__name__)

WINDOW = 256
"""Frames that are published and not known to be written: mosquitto queues 1,000 messages of a client, by default."""
SESSION = 86_400
"""Seconds for which the broker keeps what is for an end that is away."""
AGAIN = 2.0
"""Seconds until something is published again that the broker has refused, or that nobody would have got."""
SUSPICION = 60.0
"""Seconds within which another process that is this end is seen twice."""
BOOTS_MAX = 16
"""Lives of the other end whose numbers are known: the broker may send again what one of the latest published."""
_HEADER = struct.Struct("!4s8sQ?")
_MAGIC = b"inw1"
_LENGTH = struct.Struct("!H")


@attrs.frozen
class Batch:
    """Frames of one end, in their order; the first has the number `first`."""

    boot: bytes
    """8 bytes: the life of the end that the numbers are of."""
    first: int
    frames: Sequence[bytes]
    report: bool = False
    """Whether the other end is to tell how far it is."""

    def encode(self) -> bytes:
        """The payload of a message."""
        parts = [_HEADER.pack(_MAGIC, self.boot, self.first, self.report)]
        for frame in self.frames:
            parts += _LENGTH.pack(len(frame)), frame
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: bytes) -> Batch:
        """The batch of a payload. Raises ValueError for what is none."""
        try:
            magic, boot, first, report = _HEADER.unpack_from(payload)
            place, frames = _HEADER.size, []
            while place < len(payload):
                (length,) = _LENGTH.unpack_from(payload, place)
                frame = payload[place + _LENGTH.size : place + _LENGTH.size + length]
                if not 0 < length <= FRAME_MAX or len(frame) != length:
                    raise ValueError("a frame's length is wrong")
                frames.append(frame)
                place += _LENGTH.size + length
        except struct.error as error:
            raise ValueError(str(error)) from error
        if magic != _MAGIC or not 0 < first < 1 << 63:
            raise ValueError("it begins otherwise")
        return cls(boot, first, frames, report)


@attrs.define
class Counts:
    """What an end has done."""

    published: int = 0
    """Frames of this core that the broker has acknowledged."""
    written: int = 0
    """Frames that were written to this core."""
    doubles: int = 0
    """Frames that had been written before."""
    missed: int = 0
    """Frames that the broker had acknowledged to the other end, and that never came."""
    malformed: int = 0
    """Messages that are none of another end's, and datagrams of the core that are no frames."""


class Progress:
    """The numbers of both directions, in memory that outlives the process."""

    _SENT, _WRITTEN, _LIMIT = b"sent:", b"written:", b"limit"

    def __init__(self, numbers: NumberTable) -> None:
        self._numbers = numbers
        self._boots = [key for key in numbers if key.startswith(self._WRITTEN)]
        self._sent = next((key for key in numbers if key.startswith(self._SENT)), self._SENT)

    def number(self, queue: int) -> bool:
        """Number the frames of the socket with that inode: another socket is another life. Returns whether it is one.

        Else a frame could have the number of one that was published, and lost with its socket before it was taken.
        """
        if self._sent.rpartition(b":")[2] == b"%d" % queue:
            return False
        self._numbers[self._sent] = self._numbers[self._LIMIT] = 0
        self._sent = self._SENT + b"%s:%d" % (os.urandom(8).hex().encode(), queue)
        self._numbers[self._sent] = 1
        return True

    @property
    def has_room(self) -> bool:
        """Whether frames may be published. In a new life, only once the other end has told where it is."""
        return self.following <= self._numbers[self._LIMIT]

    def reported(self, number: int) -> None:
        """The other end has written all up to that number."""
        if number < self.following:
            self._numbers[self._LIMIT] = max(self._numbers[self._LIMIT], number + WINDOW)

    @property
    def boot(self) -> bytes:
        """The life that the numbers are of."""
        return bytes.fromhex(self._sent.split(b":")[1].decode())

    @property
    def following(self) -> int:
        """The number of the oldest frame that is still queued."""
        return self._numbers[self._sent]

    def taken(self) -> None:
        """That frame is about to be taken off its queue: who is killed in between publishes it as the next one."""
        self._numbers[self._sent] += 1

    def written(self, boot: bytes) -> int:
        """The number of the last frame of that life which was written here; 0 if none is known."""
        return self._numbers[self._key(boot)]

    def wrote(self, boot: bytes, number: int) -> None:
        """The frame of that number was written."""
        key = self._key(boot)
        self._numbers[key] = number
        if key not in self._boots:
            self._boots.append(key)
            if len(self._boots) > BOOTS_MAX:
                self._numbers[self._boots.pop(0)] = 0

    def _key(self, boot: bytes) -> bytes:
        return self._WRITTEN + boot.hex().encode()


class Wire:
    """An end of the wire: that of the core at `address.peer`. `ends` has its name, and that of the other one."""

    def __init__(self, broker: Broker, ends: tuple[str, str], address: UnixAddress, fd_store: FdStore) -> None:
        self.counts = Counts()
        self._broker = broker
        self._end, self._other = ends
        self._address = address
        self._fd_store = fd_store
        self._resources = contextlib.ExitStack()
        self._problems = Problems()
        self._changed = trio.Event()
        """Set when the link, or the other end, may be another one."""
        self._reported = trio.Event()
        self._instance = os.urandom(8).hex()
        """Tells this process from another one that is the same end."""
        self._suspected = -math.inf
        """When another process seemed to be this end, the last time."""
        self._told = False
        """Whether the broker was told that this process is there."""
        self._other_is_there: bool | None = None
        self._is_open = False
        self._link: UnixLink
        self._progress: Progress

    def _open(self) -> None:
        """Bind the link's socket. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
        inherited, around = self._fd_store.inherited, Surroundings()
        self._resources.callback(around.close)
        try:
            inflight = Inflight.open(inherited.get("memory"))
        except OSError as error:
            raise ResourceError(f"cannot make memory that outlives the process: {error.strerror}") from error
        self._resources.callback(inflight.close)
        self._progress = Progress(inflight.owed)
        self._link = _open_link(self._address, inherited.get("link"), inflight.note, around.names(self._address.name))
        self._resources.callback(lambda: self._link.close(remove=self._fd_store.holder is None))
        if not self._link.refresh():
            raise self._link.missing()
        self._is_open = True
        self._resources.callback(self.tell)
        for name, fd in (("memory", inflight.fd), ("link", self._link.fd)):
            if inherited.get(name) != fd:
                self._fd_store.store(name, fd)

    def finish(self) -> None:
        """Close it; what waits in the link's socket stays there if somebody holds that."""
        self._resources.close()

    def tell(self) -> None:
        """Log the counters; nothing if it was not open yet."""
        if not self._is_open:
            return
        counts = attrs.asdict(self.counts) | {"foreign": self._link.foreign}
        counts["malformed"] += self._link.malformed
        log_statistics(counts)

    async def run(self, credentials: Credentials, ready: Callable[[], None]) -> None:
        """Carry frames until cancelled. Raises SessionTaken if another process is the same end, and as `_open`."""
        if not self._is_open:
            self._open()
        async with plain_nursery() as nursery:
            nursery.start_soon(self._follow_link)
            ready()
            await self._stay_connected(credentials)

    async def _follow_link(self) -> None:
        """Keep the link's socket bound."""
        while True:
            await self._link.changed()
            stored = self._link.fd
            if self._link.refresh():
                self._problems.well("path", self._link.name)
            else:
                self._problems.failed("path", f"{self._link.absence}: waiting for it", self._link.name)
            if self._link.fd != stored:
                try:
                    self._fd_store.store("link", self._link.fd)
                except IncoError as error:
                    logger.warning("%s: frames that come while no process runs are lost: %s", self._link.name, error)
            self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _stay_connected(self, credentials: Credentials) -> None:
        """Use one connection to the broker after the other."""
        backoff = BrokerBackoff()
        will = self._status("offline")
        while True:
            try:
                async with open_connection(
                    self._broker,
                    credentials,
                    f"inco-trio:{self._broker.prefix}/{self._end}",
                    will=will,
                    session=SESSION,
                ) as connection:
                    self._problems.well("broker", self._broker)
                    logger.info("%s: connected, as %s", self._broker, self._end)
                    if self._told and not connection.session_present:
                        logger.warning(
                            "%s: has forgotten what it kept for %s, if it kept something", self._broker, self._end
                        )
                    backoff.reset()
                    await self._exchange(connection)
            except SessionTaken:
                raise
            except (BrokerLostError, BrokerRefused) as error:
                self._problems.failed("broker", f"{error.reason}; frames wait meanwhile, tried again", self._broker)
            await trio.sleep(backoff.next())

    def _status(self, state: str) -> Message:
        """What is told of this end: `online`, `offline`, or `left` for one whose place another process has taken."""
        body = _json({"state": state, "instance": self._instance})
        return Message(self._topic(self._end, "status"), body, retain=True)

    def _topic(self, end: str, what: str) -> str:
        return f"{self._broker.prefix}/{end}/{what}"

    async def _exchange(self, connection: Connection) -> None:
        """Carry frames over a connection."""
        # Never full: the broker was told that we take so many.
        entry, batches = trio.open_memory_channel[Received](RECEIVE_MAX)
        async with plain_nursery() as nursery:
            nursery.start_soon(self._sort, connection, entry)
            nursery.start_soon(self._write_all, connection, batches)
            topics = [self._topic(self._other, what) for what in ("frames", "written", "status")]
            await connection.subscribe([*topics, self._topic(self._end, "status")])
            await self._publish(connection, self._status("online"))
            self._told = True
            await self._publish_all(connection)

    async def _sort(self, connection: Connection, entry: trio.MemorySendChannel[Received]) -> None:
        """Read what the broker sends; what the other end reports does not wait behind frames."""
        async for received in connection.received:
            if received.topic == self._topic(self._other, "frames"):
                await entry.send(received)
                continue
            try:
                body = json.loads(received.payload)
                if received.topic == self._topic(self._other, "written"):
                    self._take_report(bytes.fromhex(body["boot"]), int(body["number"]))
                elif received.topic == self._topic(self._other, "status"):
                    self._take_status(body["state"] == "online")
                elif received.retain and self._is_taken(body["instance"], body["state"]):
                    await connection.publish([self._status("left")])
                    connection.publishes_will = False
                    raise SessionTaken(self._broker, f"another process is {self._end} too: end one of them")
            except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
                self._refuse(received)
            received.acknowledge()

    def _refuse(self, received: Received) -> None:
        self.counts.malformed += 1
        what = "what is published there is not of another end of this wire: dropped, and counted (malformed)"
        self._problems.failed("malformed", what, received.topic)

    def _take_status(self, is_there: bool) -> None:
        if is_there is not self._other_is_there:
            self._other_is_there = is_there
            logger.info("%s: the other end, %s, is %s", self._broker, self._other, "there" if is_there else "away")
            self._reported.set()  # Not every broker says that nobody was there for a question: it is asked again.
        self._change()

    def _is_taken(self, instance: str, state: str) -> bool:
        """Whether another process was this end since we told of us: not each broker tells who took a session."""
        if not self._told or instance == self._instance or state == "left":
            return False
        # Once it may be a broker that was restored from an older state.
        before, self._suspected = self._suspected, trio.current_time()
        return self._suspected - before < SUSPICION

    def _take_report(self, boot: bytes, number: int) -> None:
        if number >= 0 and boot == self._progress.boot:
            self._progress.reported(number)
        self._reported.set()

    # ------------------------------------------------------------------------------------------- from this end's core

    async def _publish_all(self, connection: Connection) -> None:
        link, progress = self._link, self._progress
        while True:
            progress.number(link.queue)
            while not progress.has_room:
                self._reported = trio.Event()
                await self._publish_batch(connection, Batch(progress.boot, progress.following, [], report=True))
                await self._reported.wait()
            frames = link.peek()
            if not frames:
                await link.wait_readable()
                continue
            if progress.number(link.queue):
                continue  # A former socket had nothing more.
            await self._publish_batch(connection, Batch(progress.boot, progress.following, frames))
            for _ in frames:
                progress.taken()
                link.dequeue()
            self.counts.published += len(frames)

    async def _publish_batch(self, connection: Connection, batch: Batch) -> None:
        await self._publish(connection, Message(self._topic(self._end, "frames"), batch.encode()), heard=True)

    async def _publish(self, connection: Connection, message: Message, *, heard: bool = False) -> None:
        """Publish a message, for as long as the broker refuses it, or `heard` and nobody is there for it."""
        said = False
        while True:
            changed = self._changed
            (refused,) = await connection.publish([message], heard=heard)
            if refused is None:
                self._problems.well(message.topic)
                return
            if "subscribers" in refused:
                if not said:
                    logger.info("%s: %s has not come to this wire yet: frames wait for it", self._broker, self._other)
                said = True
            else:
                what = f"the broker refuses what is published there: {refused}; frames wait, and it is tried again"
                self._problems.failed(message.topic, what)
            with trio.move_on_after(AGAIN):
                await changed.wait()

    # --------------------------------------------------------------------------------------------- to this end's core

    async def _write_all(self, connection: Connection, batches: trio.MemoryReceiveChannel[Received]) -> None:
        async for received in batches:
            try:
                batch = Batch.decode(received.payload)
            except ValueError:
                self._refuse(received)
            else:
                await self._write_batch(batch)
                if batch.report:
                    report = _json({"boot": batch.boot.hex(), "number": self._progress.written(batch.boot)})
                    await self._publish(connection, Message(self._topic(self._end, "written"), report))
            received.acknowledge()

    async def _write_batch(self, batch: Batch) -> None:
        last = self._progress.written(batch.boot)
        if last and batch.first > last + 1:
            missed = batch.first - last - 1
            self.counts.missed += missed
            logger.error("%s: %d frames of %s that it had acknowledged never came", self._broker, missed, self._other)
        if batch.first > last + 1:
            self._progress.wrote(batch.boot, batch.first - 1)
        for number, frame in enumerate(batch.frames, batch.first):
            if number <= last:
                self.counts.doubles += 1
                continue
            await self._write(frame)
            self._progress.wrote(batch.boot, number)

    async def _write(self, frame: bytes) -> None:
        """Write a frame to the core, once it is there and has room."""
        link, backoff = self._link, Backoff()
        while True:
            changed = self._changed
            try:
                link.send_frame(frame)
            except BlockingIOError:
                await link.wait_for_room()
            except LinkDownError as error:
                self._problems.failed("core", f"{error.strerror}: frames wait for it", link.name)
                await changed.wait()
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    self.counts.malformed += 1
                    self._problems.failed(
                        "core", f"a frame of {len(frame)} bytes is too long for its socket: dropped", link.name
                    )
                    return
                self._problems.failed("core", f"cannot write: {error.strerror}; tried again", link.name)
                await trio.sleep(backoff.next())
            else:
                self._problems.well("core", link.name)
                self.counts.written += 1
                return


def _open_link(address: UnixAddress, held: int | None, note: memoryview, names: Names) -> UnixLink:
    """The link, with the socket that is held if that fits."""
    if held is not None:
        link = UnixLink.take(address, held, note, names)
        if link.fits:
            return link
        logger.warning("%s: the socket that was held is another one's: what waits there is lost", link.name)
        link.close()
    return UnixLink.open(address, note, names)


def _json(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode()
