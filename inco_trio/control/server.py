"""The server of the control socket: what clients ask, and what monitors are told. docs/control.md is its contract.

Carrying never waits for a client: what is told is put aside here, and the task of each client encodes and writes it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs
import trio

from inco_trio.control.monitors import Event, Follower, Monitor
from inco_trio.errors import ClosedError, UnknownSignalError
from inco_trio.persist.history import History
from inco_trio.problems import Problems, board_name
from inco_trio.proxy.proxy import Proxy
from inco_trio.proxy.supervise import TRANSIENT
from inco_trio.signals import Direction, Signal

if TYPE_CHECKING:
    from inco_trio.status import Status

__all__ = ["Control", "Served"]

logger = logging.getLogger(__name__)

PROTOCOL = 1
LINE_MAX = 65_536
"""Bytes of the longest line of a client."""
CLIENTS_MAX = 256
SEND_MAX = 1_000_000
ACCEPT_AGAIN = 0.1
"""Seconds until a client is tried to be taken again."""
FAREWELL = 0.1
"""Seconds that clients have at the end to take what was told."""
_UCRED = struct.Struct("iII")
"""struct ucred (unix(7)): process, user, group."""

_T = TypeVar("_T")


class Served(Protocol):
    """What is asked about."""

    name: str

    def proxies(self) -> Mapping[str, Proxy]:
        """The open proxies, by the names of their boards."""

    def not_open(self) -> Mapping[str, str]:
        """Why others are not open."""


class _Refused(Exception):
    """A request that cannot be answered: the error, and what is to be said of it."""


class Control:
    """Answers clients; a `Listener`, which tells monitors of everything."""

    def __init__(self) -> None:
        self._served: Served | None = None
        self._boot = os.urandom(8).hex()
        self._clients: set[_Client] = set()
        self._monitors: set[Monitor] = set()
        self.wants_frames = False
        """See `Listener.wants_frames`."""
        self._accepting, self._ending = trio.CancelScope(), trio.CancelScope()
        self.closed = trio.Event()
        """Set once `serve` has ended."""
        self._log = _LogTap(self._tell)

    # ------------------------------------------------------------------------------------------------ as a listener

    def carried(self, signals: Sequence[Signal], sequence: int, frames: Sequence[bytes]) -> None:
        """See `Listener.carried`."""
        if self._monitors:
            if self.wants_frames and not frames:
                frames = self._frames_sent(signals)
            event = Event(self._board, time.time_ns(), time.monotonic_ns(), tuple(signals), sequence, frames)
            for monitor in self._monitors:
                monitor.carried(event)

    def _frames_sent(self, signals: Sequence[Signal]) -> Sequence[bytes]:
        assert self._served is not None  # noqa: S101 - see `serve`
        proxy = self._served.proxies().get(self._board)
        # None is known of what was read before somebody wanted frames, or before the proxy is open.
        if proxy is None or any(signal.direction is Direction.INBOUND for signal in signals):
            return ()
        return [proxy._frame(signal.name) for signal in signals]

    def ignored(self, reason: str, name: str | None, frame: bytes | None) -> None:
        """See `Listener.ignored`."""
        if self._monitors:
            direction = "outbound" if reason == "unsendable" else "inbound"
            told = {"event": "ignored", "reason": reason, "direction": direction, "signal": name}
            self._tell({**told, "frame": None if frame is None else frame.hex()})

    def link_changed(self, running: bool) -> None:
        """See `Listener.link_changed`."""
        if self._monitors:
            self._tell({"event": "link", "running": running})

    def opened(self, keep: Callable[[str], History]) -> None:
        """See `Listener.opened`."""
        board = self._board
        for follower in self._followers():
            if follower.follows(board):
                follower.begin(board, keep(self._boot))
                follower.offer(self._event({"event": "opened"}))

    def ended(self) -> None:
        """See `Listener.ended`."""
        for follower in self._followers():
            follower.offer(self._event({"event": "closed"}))

    def _followers(self) -> Iterator[Follower]:
        return (monitor for monitor in self._monitors if isinstance(monitor, Follower))

    @property
    def _board(self) -> str:
        """The board that this task works for."""
        return board_name.get() or (self._served.name if self._served is not None else "")

    def _event(self, fields: Mapping[str, object]) -> Event:
        return Event(self._board, time.time_ns(), time.monotonic_ns(), fields=fields)

    def _tell(self, fields: Mapping[str, object]) -> None:
        event = self._event(fields)
        for monitor in self._monitors:
            monitor.offer(event)

    # -------------------------------------------------------------------------------------------------- as a server

    async def serve(self, served: Served, listener: socket.socket) -> None:
        """Answer clients until `close`."""
        self._served = served
        listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        try:
            with self._ending:
                async with trio.open_nursery() as clients:
                    with self._accepting:
                        await self._accept(listening, clients)
        finally:
            self.closed.set()

    async def _accept(self, listener: trio.SocketListener, clients: trio.Nursery) -> None:
        """As trio.serve_listeners does, which logs a traceback each time that no descriptor is left."""
        problems = Problems()
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                problems.failed("control", f"cannot take a client: {error.strerror}; tried again")
                await trio.sleep(ACCEPT_AGAIN)
            else:
                problems.well("control")
                clients.start_soon(self._serve_client, stream)

    def close(self) -> None:
        """End it: those who were told something get it, if they take it at once."""
        self._accepting.cancel()
        self._ending.deadline = trio.current_time() + FAREWELL
        for client in self._clients:
            client.reading.cancel()
            client.end_monitor()

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        client = _Client(stream)
        self._clients.add(client)
        try:
            async with stream, trio.open_nursery() as nursery:
                if len(self._clients) > CLIENTS_MAX and not self._sweep():
                    await client.write({"error": "busy", "message": f"{CLIENTS_MAX} clients are connected already"})
                    return
                with client.reading:
                    await client.write(self._greeting())
                    await self._converse(client, nursery)
                if client.gone:
                    client.end_monitor()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # It went away.
        except* Exception:
            logger.exception("control socket: internal error: this is a fault of inco-trio, please report it")
        finally:
            self._clients.discard(client)
            if client.monitor is not None:
                self._monitors.discard(client.monitor)
                self._monitors_changed()

    def _sweep(self) -> bool:
        """End clients that went away without a word that was read; returns whether there is room now."""
        gone = [client for client in self._clients if client.gone]
        for client in gone:
            client.reading.cancel()
            client.end_monitor()
        return len(self._clients) - len(gone) <= CLIENTS_MAX

    def _greeting(self) -> dict[str, object]:
        assert self._served is not None  # noqa: S101 - see `serve`
        return {
            "protocol": PROTOCOL, "name": self._served.name, "pid": os.getpid(), "boot": self._boot,
            "boards": list(self._served.proxies()),
        }  # fmt: skip

    async def _converse(self, client: _Client, nursery: trio.Nursery) -> None:
        """Answer one line after the other, until the client ends them."""
        received = bytearray()
        while data := await client.stream.receive_some(LINE_MAX):
            received += data
            while (end := received.find(b"\n")) >= 0:
                line = bytes(received[:end])
                del received[: end + 1]
                if line.strip():
                    await self._answer(line, client, nursery)
            if len(received) > LINE_MAX:
                await client.write({"error": "too-long", "message": f"a line is at most {LINE_MAX} bytes"})
                client.end_monitor()
                return

    async def _answer(self, line: bytes, client: _Client, nursery: trio.Nursery) -> None:
        tag: dict[str, object] = {}
        try:
            request = _parsed(line)
            tag = {"id": request["id"]} if "id" in request else {}
            match request.get("request"):
                case "status":
                    await client.write_text(await self._status(request, tag))
                case "send":
                    await client.write(tag | {"sent": await self._send(request, client)})
                case "monitor":
                    client.monitor = monitor = self._monitor(request, client)
                    self._monitors.add(monitor)
                    self._monitors_changed()
                    await client.write(tag | {"monitor": True})
                    nursery.start_soon(self._run_monitor, client, monitor)
                case "follow":
                    client.monitor = follower = self._follower(request, client)
                    self._monitors.add(follower)
                    self._monitors_changed()
                    await client.write(tag | {"follow": self._begin(follower)})
                    nursery.start_soon(self._run_monitor, client, follower)
                case "acknowledge":
                    await client.write(tag | {"acknowledged": self._acknowledge(request, client)})
                case "forget":
                    await client.write(tag | {"forgotten": self._forget(request, client)})
                case "flush":
                    monitor = _monitor_of(client)
                    await client.write(tag | {"flush": True})
                    monitor.flush()
                case other:
                    message = f"{other!r}: there are status, send, monitor, flush, follow, acknowledge and forget"
                    await client.write(tag | {"error": "unknown-request", "message": message})
        except _Refused as refused:
            error, message = refused.args
            await client.write(tag | {"error": error, "message": message})

    # ---------------------------------------------------------------------------------------------------- requests

    async def _status(self, request: Mapping[str, object], tag: Mapping[str, object]) -> str:
        assert self._served is not None  # noqa: S101 - see `serve`
        wanted = self._known_board(request)
        boards = []
        for name, problem in self._served.not_open().items():
            if wanted in (None, name):
                boards.append(json.dumps({"board": name, "open": False, "problem": problem}))
        for name in tuple(self._served.proxies()):
            proxy = self._served.proxies().get(name)
            if wanted in (None, name) and proxy is not None:
                told = {"board": name, "open": True} | _status_fields(proxy.status)
                boards.append(json.dumps(told | {"history": self._history_fields(name, proxy._history())}))
                await trio.lowlevel.checkpoint()  # There may be a thousand.
        return f'{json.dumps(tag)[:-1]}{", " if tag else ""}"status": [{", ".join(boards)}]}}'

    def _history_fields(self, board: str, history: History) -> dict[str, object] | None:
        if not history.keeping:
            return None
        return {
            "boot": history.boot, "sequence": history.sequence, "acknowledged": history.acknowledged,
            "waiting": history.waiting, "merged": history.merged_ever,
            "followed": any(board in follower.cursors for follower in self._followers()),
        }  # fmt: skip

    async def _send(self, request: Mapping[str, object], client: _Client) -> int:
        assert self._served is not None  # noqa: S101 - see `serve`
        self._check_permitted(client, "send")
        board, name = self._known_board(request), _field(request, "signal", str, None)
        count = _field(request, "count", int, 1) or 0
        if name is None:
            raise _Refused("invalid", "signal: the name of an outbound signal is missing")
        if not 1 <= count <= SEND_MAX:
            raise _Refused("invalid", f"count: {count} is not a number from 1 to {SEND_MAX}")
        proxies = self._served.proxies()
        if board is None:
            if len(proxies) != 1:
                raise _Refused("unknown-board", f"board: one of {', '.join(proxies) or 'none'} is to be named")
            (board,) = proxies
        if board not in proxies:
            raise _Refused("unknown-board", f"board {board!r} is not open: {self._served.not_open()[board]}")
        proxy = proxies[board]
        try:
            for _ in range(count):
                await proxy.send(name)
        except UnknownSignalError as error:
            outbound = ", ".join(s.name for s in proxy.config.signals if s.direction is Direction.OUTBOUND)
            raise _Refused("unknown-signal", f"{error} (there are: {outbound or 'none'})") from None
        except ClosedError as error:
            raise _Refused("closed", str(error)) from None
        return count

    def _monitor(self, request: Mapping[str, object], client: _Client) -> Monitor:
        if client.monitor is not None:
            raise _Refused("invalid", "this connection has a monitor already")
        names = _names(request, "signals")
        direction = _field(request, "direction", str, None)
        try:
            way = None if direction is None else Direction(direction)
        except ValueError:
            raise _Refused("invalid", f"direction: {direction!r} is neither inbound nor outbound") from None
        frames = request.get("frames", False)
        if not isinstance(frames, bool):
            raise _Refused("invalid", f"frames: {frames!r} is neither true nor false")
        return Monitor(self._known_board(request), way, names, frames)

    def _follower(self, request: Mapping[str, object], client: _Client) -> Follower:
        self._check_permitted(client, "follow")
        if client.monitor is not None:
            raise _Refused("invalid", "this connection has a monitor already")
        boards = _names(request, "boards")
        for other in self._clients:
            follower = other.monitor
            if not isinstance(follower, Follower) or other.gone:
                continue
            if boards is None or follower.boards is None or boards & set(follower.boards):
                raise _Refused("busy", f"process {other.process} follows already, and there is one history for one")
        return Follower(None, None, None, False, boards=boards)

    def _begin(self, follower: Follower) -> dict[str, object]:
        """Have it follow what is open; returns where it is in each history."""
        assert self._served is not None  # noqa: S101 - see `serve`
        for name, proxy in self._served.proxies().items():
            if follower.follows(name):
                follower.begin(name, proxy._keep_history(self._boot))
        return {
            name: {"boot": c.history.boot, "acknowledged": c.history.acknowledged, "sequence": c.history.sequence}
            for name, c in follower.cursors.items()
        }

    def _acknowledge(self, request: Mapping[str, object], client: _Client) -> int:
        follower = client.monitor
        if not isinstance(follower, Follower):
            raise _Refused("invalid", "this connection does not follow")
        board, sequence = _field(request, "board", str, None), _field(request, "sequence", int, None)
        if board not in follower.cursors:
            raise _Refused("unknown-board", f"board {board!r} is not followed")
        if sequence is None:
            raise _Refused("invalid", "sequence: the number up to which all is done with is missing")
        if (boot := _field(request, "boot", str, None)) not in (None, follower.cursors[board].history.boot):
            raise _Refused("invalid", f"boot: {boot!r} is not that of the history any more")
        return follower.acknowledge(board, sequence)

    def _forget(self, request: Mapping[str, object], client: _Client) -> list[str]:
        """End histories that nobody follows; returns of which boards."""
        assert self._served is not None  # noqa: S101 - see `serve`
        self._check_permitted(client, "forget")
        boards = _names(request, "boards")
        followed = {board for follower in self._followers() for board in follower.cursors}
        forgotten = []
        for name, proxy in self._served.proxies().items():
            history = proxy._history()
            if history.keeping and name not in followed and (boards is None or name in boards):
                history.end()
                forgotten.append(name)
        return forgotten

    @staticmethod
    def _check_permitted(client: _Client, what: str) -> None:
        if client.user not in (0, os.geteuid()):
            raise _Refused("not-permitted", f"only root and the user that the proxy runs as may {what}")

    def _known_board(self, request: Mapping[str, object]) -> str | None:
        """The board that a request names, if it names one."""
        assert self._served is not None  # noqa: S101 - see `serve`
        board = _field(request, "board", str, None)
        known = [*self._served.proxies(), *self._served.not_open()]
        if board is not None and board not in known:
            raise _Refused("unknown-board", f"board {board!r}: there are {', '.join(known) or 'none'}")
        return board

    async def _run_monitor(self, client: _Client, monitor: Monitor) -> None:
        """Write what it is told, until it is ended."""
        try:
            while lines := await monitor.take():
                await client.write_lines(lines)
                await monitor.pause()
        finally:
            self._monitors.discard(monitor)
            self._monitors_changed()

    def _monitors_changed(self) -> None:
        self.wants_frames = any(monitor.frames for monitor in self._monitors)
        self._log.attach(self._monitors)


class _Client:
    """A connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.reading = trio.CancelScope()
        self.monitor: Monitor | None = None
        self._writing = trio.Lock()
        self.process, self.user, _ = _UCRED.unpack(
            stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )

    @property
    def gone(self) -> bool:
        """Whether the other end is closed whole, not only for writing."""
        fd = self.stream.socket.fileno()
        if fd < 0:
            return True  # We are closing it.
        poll = select.poll()
        poll.register(fd, 0)
        return bool(poll.poll(0))

    def end_monitor(self) -> None:
        """Let its monitor end once it has told what waits."""
        if self.monitor is not None:
            self.monitor.end()

    async def write(self, answer: Mapping[str, object]) -> None:
        await self.write_text(json.dumps(answer))

    async def write_text(self, line: str) -> None:
        await self.write_lines(f"{line}\n".encode())

    async def write_lines(self, lines: bytes) -> None:
        """Write whole lines, when others are written."""
        async with self._writing:
            await self.stream.send_all(lines)


class _LogTap(logging.Handler):
    """Tells monitors what the log says, while there are any."""

    def __init__(self, tell: Callable[[Mapping[str, object]], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = 0

    def attach(self, monitors: Collection[Monitor]) -> None:
        """Listen if there are monitors."""
        package = logging.getLogger("inco_trio")
        if monitors and self not in package.handlers:
            self._token, self._thread = trio.lowlevel.current_trio_token(), threading.get_ident()
            package.addHandler(self)
        elif not monitors:
            package.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        told = {
            "event": getattr(record, "event", "message"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if threading.get_ident() == self._thread:
            self._tell(told)
        elif self._token is not None:
            self._token.run_sync_soon(self._tell, told)


def _monitor_of(client: _Client) -> Monitor:
    if client.monitor is None:
        raise _Refused("invalid", "this connection has no monitor")
    return client.monitor


def _no_constant(text: str) -> object:
    """Python reads NaN and Infinity, which no JSON is. Raises ValueError."""
    raise ValueError(f"{text} is no JSON")


def _parsed(line: bytes) -> dict[str, object]:
    try:
        request = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Refused("not-json", f"a line is a JSON object: {error}") from None
    if not isinstance(request, dict):
        raise _Refused("not-json", "a line is a JSON object")
    return request


def _field(request: Mapping[str, object], key: str, kind: type[_T], default: _T | None) -> _T | None:
    """The value of a key, or `default`."""
    value = request.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Refused("invalid", f"{key}: {value!r} is no {kind.__name__}")
    return value


def _names(request: Mapping[str, object], key: str) -> frozenset[str] | None:
    """The strings of a list, if there is one."""
    names = _field(request, key, list, None)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise _Refused("invalid", f"{key}: a list of names")
    return None if names is None else frozenset(names)


def _status_fields(status: Status) -> dict[str, object]:
    return {
        "link": status.link, "since": status.since, "table_since": status.table_since,
        "running": status.running, "description": status.description,
        "holder": status.holder, "counters": status.stats.as_dict(),
        "signals": [
            {
                "signal": each.signal.name, "direction": each.signal.direction.value,
                "register": str(each.signal.path), "count": each.count, "last": each.last,
                "failures": each.failures, "owed": each.owed, "problem": each.problem,
            }
            for each in status.signals
        ],
        "legs": [attrs.asdict(leg) for leg in status.legs],
    }  # fmt: skip
