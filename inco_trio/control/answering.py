"""Connections to the control socket: read requests, and write responses and events. See docs/control.md."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
from collections.abc import Iterable, Iterator, Mapping

import trio

from inco_trio.control import protocol
from inco_trio.control.feed import Feed, Reload
from inco_trio.control.monitors import Follower, Monitor
from inco_trio.control.past import past_events
from inco_trio.control.protocol import RequestError
from inco_trio.control.server import Peer
from inco_trio.errors import ClosedError, UnknownSignalError
from inco_trio.persist.followed import History
from inco_trio.proxy.proxy import Proxy
from inco_trio.signals import Direction

__all__ = ["Connection"]

SHARE = 0.001
"""Pause in seconds after each write to a monitor, multiplied by the number of other monitors. The writes to all
monitors are therefore limited to about 1,000 per second and do not delay notifications. A monitor whose filters refuse
all events pauses in the same way.
"""
SEND_MAX = 1_000_000
"""Maximum number of notifications that one request sends."""
READ_SIZE = 4096
"""Maximum number of bytes that are read at once. Even a client that sends only line breaks delays no notification."""
PART = 16_384
"""Approximate number of bytes of a long response that are encoded and written at once."""
HISTORY_SECONDS = 60.0
"""Timeout for writing the history to a client of another user. The clients of inco-trio wait at most 10 seconds."""
HISTORY_SECONDS_SHARED = 4.0
"""The timeout from the time on at which another `history` request of the same user waits.

The waiting client has its turn before its own timeout, even if the client before it does not read.
"""

CLOSED = "the board was closed or removed during this request"
"""The problem of a board that was open when the proxy began the response, unless a newer reason is known."""


class Connection:
    """The connection to one client. All connections of a server share one `feed`."""

    def __init__(self, stream: trio.SocketStream, peer: Peer, feed: Feed, boot: str, reload: Reload) -> None:
        self.peer = peer
        self._reload = reload
        self._stream = stream
        self._feed, self._served, self._boot = feed, feed.served, boot
        self._reading = trio.CancelScope()
        self._monitor: Monitor | None = None
        self._writing = trio.Lock()
        self._unsent = bytearray()
        """The bytes that the next write sends first. After a cancelled write, they are the rest of a line."""
        self._unwritten: Iterator[bytes] | None = None
        """The parts of lines that follow `_unsent`, or None if the last write was completed."""
        self._rival_of: list[Proxy] = []
        """The proxies to which the client, another proxy, has reported that it shares their link or directory."""
        self.fault = ""
        """The limit that the client exceeded, if that ended the connection; otherwise empty."""

    @property
    def gone(self) -> bool:
        """Whether the client has closed its socket completely, not only for writing."""
        fd = self._stream.socket.fileno()
        if fd < 0:
            return True  # This process has already closed the connection.
        poll = select.poll()
        poll.register(fd, 0)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Stop reading requests, and close the connection once all queued events have been written."""
        self._reading.cancel()
        self._end_monitor()

    def _end_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.end()

    async def refuse(self, message: str) -> None:
        """Send the error `busy` instead of a greeting."""
        await self._write([protocol.encode_error(RequestError("busy", message))])

    async def run(self) -> None:
        """Answer the client until the connection ends."""
        greeting = protocol.Greeting(self._served.name, os.getpid(), self._boot, tuple(self._served.proxies()))
        try:
            async with trio.open_nursery() as nursery:
                with self._reading:
                    try:
                        await self._write([protocol.encode_greeting(greeting)])
                    except OSError:
                        await self._read_reports()
                    else:
                        await self._converse(nursery)
                if self.gone:
                    self._end_monitor()
        finally:
            if self._monitor is not None:
                self._feed.remove(self._monitor)
            for proxy in self._rival_of:
                proxy._rivals().ended(self.peer.process)

    async def _read_reports(self) -> None:
        """Read the reports of another proxy that has ended. It may have sent them while this process was stopped."""
        if not self.peer.is_owner:
            return  # Only root and the user of the proxy may send reports.
        received = protocol.LineBuffer(protocol.LINE_MAX)
        with contextlib.suppress(protocol.MessageError):
            while data := await self._stream.receive_some(READ_SIZE):
                for line in received.split(data):
                    await trio.lowlevel.checkpoint()
                    with contextlib.suppress(RequestError):
                        request, _ = protocol.decode_request(line)
                        if isinstance(request, protocol.RivalRequest):
                            self._rival(request)

    async def _converse(self, nursery: trio.Nursery) -> None:
        received = protocol.LineBuffer(protocol.LINE_MAX)
        while data := await self._stream.receive_some(READ_SIZE):
            await self._wait_for_turn()
            try:
                for line in received.split(data):
                    if line.strip():
                        await self._answer(line, nursery)
            except protocol.MessageError as error:
                self.fault = str(error)
                await self._write([protocol.encode_error(RequestError("too-long", str(error)))])
                self._end_monitor()
                return

    async def _answer(self, line: bytes, nursery: trio.Nursery) -> None:
        tag: Mapping[str, object] = {}
        await self._wait_for_turn()
        try:
            request, tag = protocol.decode_request(line)
            value: object = True
            match request:
                case protocol.StatusRequest():
                    await self._write(_parts(protocol.encode_status(self._status(request), tag)))
                    return
                case protocol.HistoryRequest():
                    await self._write_history(_parts(self._past(request, tag)), nursery)
                    return
                case protocol.SendRequest():
                    value = await self._send(request)
                case protocol.MonitorRequest():
                    self._begin_monitor(request)
                case protocol.FlushRequest():
                    self._check_monitor(wanted=True)
                case protocol.FollowRequest():
                    value = self._follow(request)
                case protocol.AcknowledgeRequest():
                    value = self._acknowledge(request)
                case protocol.AcknowledgeAllRequest():
                    value = self._acknowledge_all(request)
                case protocol.ForgetRequest():
                    value = self._forget(request)
                case protocol.ReloadRequest():
                    self._check_permitted("reload the configuration")
                    value = await self._reload()
                case protocol.RivalRequest():
                    value = self._rival(request)
            await self._write([protocol.encode_response(request, value, tag)])
            # Send events only after the response, because the client expects the response first.
            if isinstance(request, (protocol.MonitorRequest, protocol.FollowRequest)) and self._monitor is not None:
                nursery.start_soon(self._run_monitor, self._monitor)
            elif isinstance(request, protocol.FlushRequest) and self._monitor is not None:
                self._monitor.flush()
        except RequestError as error:
            await self._write([protocol.encode_error(RequestError(error.error, error.message, error.tag or tag))])

    def _status(self, request: protocol.StatusRequest) -> Iterator[Iterator[str]]:
        """Return an iterator that encodes the status of each board when it is needed. Raises RequestError."""
        self._check_board(request.board)
        return self._encoded(request.board)

    def _encoded(self, board: str | None) -> Iterator[Iterator[str]]:
        """Yield an iterator over the parts of the encoded status of `board` (None: of each board)."""
        not_open = dict(self._served.not_open())
        names = [name for name in self._served.proxies() if board in (None, name)]
        for name, problem in not_open.items():
            if board in (None, name):
                yield protocol.encode_board(protocol.BoardStatus(name, problem))
        closed = []
        for name in names:
            proxy = self._served.proxies().get(name)
            if proxy is None:
                closed.append(name)
                continue
            history = self._history(name, proxy._history())
            yield protocol.encode_board(protocol.BoardStatus(name, "", proxy._status(), history), proxy._signals())
        # Ask for the reasons only once: each request lists all boards.
        problems = self._served.not_open() if closed else {}
        for name in closed:
            yield protocol.encode_board(protocol.BoardStatus(name, problems.get(name) or CLOSED))

    def _history(self, board: str, history: History) -> protocol.HistoryStatus | None:
        if not history.keeping:
            return None
        followed = any(board in follower.cursors for follower in self._feed.followers)
        return protocol.HistoryStatus(
            history.boot, history.sequence, history.acknowledged, history.waiting, history.merged_ever, followed
        )

    def _past(self, request: protocol.HistoryRequest, tag: Mapping[str, object]) -> Iterator[str]:
        """Return an iterator that encodes the response to a HistoryRequest. Raises RequestError."""
        board, proxy = self._proxy(request.board)
        recorder = proxy._recorder()
        if recorder is None:
            raise RequestError("invalid", f"board {board!r}: the proxy records no history (--history 0 disables it)")
        events = past_events(board, recorder, request.after or 0)
        return protocol.encode_history(board, recorder.boot, map(protocol.encode_event, events), tag)

    async def _write_history(self, parts: Iterator[bytes], nursery: trio.Nursery) -> None:
        """Write the parts of a history. `parts` copies the flight recorder while the client reads."""
        if self.peer.is_owner:
            await self._write(parts)
            return
        turn = self._feed.history_turn(self.peer.user)
        if turn.lock.locked():
            turn.scope.deadline = min(turn.scope.deadline, trio.current_time() + HISTORY_SECONDS_SHARED)
        # Wait for the user's other requests first, so that they do not delay the requests of other users.
        async with turn.lock, self._feed.histories:
            is_shared = turn.lock.statistics().tasks_waiting > 0
            begun = trio.current_time()
            with trio.move_on_after(HISTORY_SECONDS_SHARED if is_shared else HISTORY_SECONDS) as turn.scope:
                await self._write(parts)
            is_late, seconds = turn.scope.cancelled_caught, turn.scope.deadline - begun
        if is_late:
            self.fault = f"the history was not read within {seconds:.0f} s"
            nursery.cancel_scope.cancel()

    def _proxy(self, board: str | None) -> tuple[str, Proxy]:
        """Return the name and the proxy of `board` (default: the only open board). Raises RequestError."""
        self._check_board(board)
        proxies = self._served.proxies()
        if board is None:
            names = [*proxies] or [*self._served.not_open()][:1]
            if len(names) != 1:
                raise RequestError("unknown-board", f"board: missing (open boards: {', '.join(proxies) or 'none'})")
            (board,) = names
        if board not in proxies:
            raise RequestError("not-open", f"board {board!r}: not open: {self._served.not_open()[board]}")
        return board, proxies[board]

    async def _send(self, request: protocol.SendRequest) -> int:
        self._check_permitted("send")
        _, proxy = self._proxy(request.board)
        if not 1 <= request.count <= SEND_MAX:
            raise RequestError("invalid", f"count: {request.count} is not a number from 1 to {SEND_MAX}")
        try:
            for _ in range(request.count):
                await proxy.send(request.signal)
        except UnknownSignalError as error:
            outbound = ", ".join(s.name for s in proxy.config.signals if s.direction is Direction.OUTBOUND)
            raise RequestError("unknown-signal", f"{error} (available: {outbound or 'none'})") from None
        except ClosedError as error:
            raise RequestError("closed", str(error)) from None
        return request.count

    def _begin_monitor(self, request: protocol.MonitorRequest) -> None:
        self._check_monitor(wanted=False)
        self._check_board(request.board)
        self._monitor = Monitor(request.board, request.direction, request.signals, request.frames, self._share)
        if not self.peer.is_owner:
            self._monitor.total = self._feed.waiting_of_others
        self._feed.add(self._monitor)

    def _follow(self, request: protocol.FollowRequest) -> dict[str, protocol.Followed]:
        """Let the client follow boards. Return the current position in the history of each open board."""
        self._check_permitted("follow")
        self._check_monitor(wanted=False)
        for other in self._feed.followers:
            is_same = request.boards is None or other.boards is None or set(request.boards) & set(other.boards)
            if is_same and not other.gone():
                raise RequestError(
                    "busy", f"process {other.process} already follows this board (a board can have only one follower)"
                )
        follower = Follower(
            boards=request.boards, batches=request.batches, process=self.peer.process, gone=lambda: self.gone,
            transmit=self._transmit,
        )  # fmt: skip
        self._monitor = follower
        self._feed.add(follower)
        self._feed.followed.add(request.boards)
        # A board may have been opened before `proxies` contains it: its link does not exist, or other boards follow.
        for name, keep in self._feed.histories_of.items():
            if follower.follows(name):
                follower.begin(name, keep())
        return {
            name: protocol.Followed(c.history.boot, c.history.acknowledged, c.history.sequence)
            for name, c in follower.cursors.items()
        }

    def _follower(self) -> Follower:
        if not isinstance(self._monitor, Follower):
            raise RequestError("invalid", "this connection does not follow a board (send a `follow` request first)")
        return self._monitor

    def _acknowledge_all(self, request: protocol.AcknowledgeAllRequest) -> int:
        """Acknowledge notifications of several boards. Return how many positions were valid.

        Ignore histories that have ended.
        """
        follower, number = self._follower(), 0
        for board, boot, sequence in request.positions:
            cursor = follower.cursors.get(board)
            if cursor is not None and cursor.history.boot == boot:
                follower.acknowledge(board, sequence)
                number += 1
        return number

    def _acknowledge(self, request: protocol.AcknowledgeRequest) -> int:
        follower = self._follower()
        if request.board not in follower.cursors:
            raise RequestError("unknown-board", f"this connection does not follow board {request.board!r}")
        if request.boot not in (None, follower.cursors[request.board].history.boot):
            raise RequestError("invalid", f"boot: {request.boot!r} is not the ID of the current history")
        return follower.acknowledge(request.board, request.sequence)

    def _forget(self, request: protocol.ForgetRequest) -> list[str]:
        """End the histories of boards that have no follower. Return the names of these boards."""
        self._check_permitted("forget")
        self._feed.followed.forget(request.boards)
        for follower in self._feed.followers:
            self._feed.followed.add(follower.boards)
        followed = {board for follower in self._feed.followers for board in follower.cursors}
        forgotten = []
        for name, proxy in self._served.proxies().items():
            history = proxy._history()
            if history.keeping and name not in followed and (request.boards is None or name in request.boards):
                history.end()
                forgotten.append(name)
        return forgotten

    def _rival(self, request: protocol.RivalRequest) -> list[str]:
        """Report the client to the proxies whose link or directory it shares. Return the names of their boards."""
        self._check_permitted("report a proxy")
        found = []
        for name, proxy in self._served.proxies().items():
            if proxy._rival_claims(self.peer.process, request.link, request.netns, request.directory):
                found.append(name)
                self._rival_of.append(proxy)
        return found

    def _check_permitted(self, what: str) -> None:
        if not self.peer.is_owner:
            raise RequestError("not-permitted", f"only root and the user of the proxy may {what}")

    def _check_monitor(self, *, wanted: bool) -> None:
        if (self._monitor is not None) is not wanted:
            raise RequestError("invalid", f"this connection {'has no' if wanted else 'already has a'} monitor")

    def _check_board(self, board: str | None) -> None:
        known = [*self._served.proxies(), *self._served.not_open()]
        if board is not None and board not in known:
            raise RequestError("unknown-board", f"board {board!r}: unknown (available: {', '.join(known) or 'none'})")

    async def _run_monitor(self, monitor: Monitor) -> None:
        try:
            while lines := await monitor.take():
                await self._write([lines])
                if share := self._share():
                    await trio.sleep(share)
        finally:
            self._feed.remove(monitor)

    def _share(self) -> float:
        return (len(self._feed.monitors) - 1) * SHARE

    def _transmit(self, lines: bytes) -> int:
        """Send lines without waiting. Return how many bytes were sent."""
        if self._writing.locked() or self._unwritten is not None:
            return 0
        try:
            return os.write(self._stream.socket.fileno(), lines)
        except OSError:
            return 0  # The socket is full, or it failed; the reading task then ends the connection.

    async def _wait_for_turn(self) -> None:
        """Wait until a client of another user may use the CPU. Many clients would otherwise delay notifications."""
        if not self.peer.is_owner:
            async with self._feed.turn:
                await trio.lowlevel.checkpoint()

    async def _write(self, parts: Iterable[bytes]) -> None:
        """Write the parts of one or more lines. Take each part only after the socket has accepted the part before it.

        If this call is cancelled, the next one writes the remaining parts first.
        """
        try:
            self._writing.acquire_nowait()  # `acquire` would let other tasks run first.
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            before = () if self._unwritten is None else self._unwritten
            # Complete the event that `_transmit` has sent only partially.
            rest = "" if self._monitor is None else self._monitor.take_rest()
            self._unwritten = itertools.chain([b""], before, [rest.encode()], parts)
            for part in self._unwritten:
                self._unsent += part
                while self._unsent:
                    del self._unsent[: await self._stream.socket.send(self._unsent)]
                if len(part) >= PART:
                    await self._wait_for_turn()
            self._unwritten = None
        finally:
            self._writing.release()


def _parts(texts: Iterable[str]) -> Iterator[bytes]:
    """Join texts into parts of about PART bytes. Take each text only when its part is needed."""
    part, size = list[str](), 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= PART:
            yield "".join(part).encode()
            part, size = [], 0
    yield "".join(part).encode()
