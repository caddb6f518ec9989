"""A blocking client of the control socket. This module imports little because command-line tools must start quickly."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from inco_trio import real_clock
from inco_trio.control import protocol
from inco_trio.control.place import runtime_directories, silent_services
from inco_trio.control.protocol import BoardStatus, Event, Greeting, MessageError, Reply, Request, Response
from inco_trio.errors import (
    BoardNotOpenError,
    IncoError,
    InvalidArgumentError,
    PermissionDeniedError,
    ProtocolError,
    ProxyNotFoundError,
    ResourceError,
)
from inco_trio.links.address import parse_address
from inco_trio.linux.process import overflow_uid
from inco_trio.linux.sockets import peer_of, refuse_descriptors

__all__ = [
    "AGAIN", "CHUNK", "PATIENCE", "SILENT", "Channel", "Client", "answering", "client_of", "connect", "connect_all",
    "dial", "not_open", "sockets", "wait_for_end",
]  # fmt: skip

CHUNK = 1 << 16
UNINTERRUPTED = 1.0
"""Maximum timeout of one select(2) in seconds. A process signal just before the call does not interrupt the call."""
PATIENCE = 10.0
"""Timeout for the greeting and for each response, in seconds."""
SEARCH = 3.0
"""Timeout for the greetings of all proxies, in seconds, if the user did not name a proxy."""
AGAIN = 0.02
"""Seconds until the next attempt to connect to a socket whose backlog is full."""
SILENT = "the proxy does not answer"
_UCRED = struct.Struct("iII")
"""The format of struct ucred (unix(7)): PID, user ID and group ID."""
ERRORS: dict[str, type[IncoError]] = {
    "not-open": BoardNotOpenError,
    "not-permitted": PermissionDeniedError,
    "closed": ProxyNotFoundError,
    "busy": ResourceError,
}
"""The exception for each error code that a proxy may send. Other codes become InvalidArgumentError."""


def dial(sock: socket.socket, path: Path) -> bool:
    """Connect a non-blocking socket. Return False if the backlog of the proxy is full. Raises IncoError.

    If no process listens at `path`, the cause of the error is FileNotFoundError or ConnectionRefusedError. Raises
    PermissionDeniedError if the listening process belongs to an untrusted user.
    """
    try:
        sock.connect(os.fspath(path))
    except BlockingIOError:
        return False
    except PermissionError as error:
        raise PermissionDeniedError(
            path, "only root, the user of the proxy and its group may connect (run as one of them)"
        ) from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ProxyNotFoundError(path, "no proxy is listening on this socket") from error
    except OSError as error:
        raise ProxyNotFoundError(path, f"cannot connect: {error.strerror or error}") from error
    _check_server(sock, path)
    return True


def _check_server(sock: socket.socket, path: Path) -> None:
    """Check that the server runs as root, as this user, or as the owner of the directory. Raises IncoError."""
    _, user = peer_of(sock)
    trusted = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        trusted.add(path.parent.stat().st_uid)
    if user not in trusted - {overflow_uid()}:
        text = f"the server runs as uid {user}: neither root nor this user nor the owner of {path.parent}"
        raise PermissionDeniedError(path, f"{text} (remove the socket, or run this command as that user)")


class Channel:
    """Base class of the blocking client and the Trio client. It decodes received lines. Raises ProtocolError."""

    def __init__(self, path: Path, *, is_subject: bool) -> None:
        self.path = path
        self._is_subject = is_subject
        """Whether the errors that the proxy reports are raised with the path of the socket as their subject."""
        self._received = protocol.LineBuffer(protocol.REPLY_MAX)
        self._lines: deque[bytes] = deque()

    def _feed(self, data: bytes) -> None:
        """Store received bytes. Raises ProxyNotFoundError if the connection has ended."""
        if not data:
            raise self._ended()
        try:  # Do not use `_obeying`: the context manager is slow (see `_next`).
            self._lines += self._received.split(data)
        except MessageError as error:
            raise self._not_understood(error) from error

    def _next_greeting(self) -> Greeting:
        """Return the greeting. Raises IncoError if the proxy refuses the client."""
        with self._obeying():
            greeting = protocol.decode_greeting(self._lines.popleft())
        if isinstance(greeting, Response):
            raise self._refusal(greeting)
        return greeting

    def _next(self) -> Reply:
        try:  # This is the fast path of a follower. The context manager takes longer than decoding a short line.
            return protocol.decode_reply(self._lines.popleft())
        except MessageError as error:
            raise self._not_understood(error) from error

    def _checked(self, response: Response, request: Request) -> Response:
        """Return the response if it belongs to the request. Raises IncoError if the proxy refused the request."""
        if response.error:
            raise self._refusal(response)
        with self._obeying():
            response.check(request)
        return response

    def _refusal(self, response: Response) -> IncoError:
        kind, reason = ERRORS.get(response.error, InvalidArgumentError), response.message or response.error
        return kind(self.path, reason) if self._is_subject else kind(reason)

    @contextmanager
    def _obeying(self) -> Iterator[None]:
        try:
            yield
        except MessageError as error:
            raise self._not_understood(error) from error

    def _not_understood(self, error: MessageError) -> ProtocolError:
        text = "the process listening there is not inco-trio or uses another version"
        return ProtocolError(self.path, f"{text}: {error}")

    def _ended(self) -> ProxyNotFoundError:
        return ProxyNotFoundError(self.path, "the proxy has ended")

    def _silent(self) -> ProxyNotFoundError:
        return ProxyNotFoundError(self.path, SILENT)


class Client(Channel, AbstractContextManager["Client"]):
    """A connection to the proxy at `path`. Raises PermissionDeniedError, ProxyNotFoundError, ResourceError."""

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        super().__init__(path, is_subject=False)
        self._events: deque[Event] = deque()
        self._unanswered = 0
        """The number of requests without a response so far. A response that arrives after its timeout is discarded."""
        self._last_look = 0.0
        """The last deadline after which this client has read once more."""
        deadline = real_clock.monotonic() + patience
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        refuse_descriptors(self._sock)
        try:
            self._dial(deadline)
            self._await_line(deadline)
            self.greeting = self._next_greeting()
        except BaseException:
            self._sock.close()
            raise

    @property
    def pid(self) -> int:
        """The PID of the proxy as this process sees it (SO_PEERCRED, unix(7)), even from another PID namespace."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0]) or self.greeting.pid

    def _dial(self, deadline: float) -> None:
        while not dial(self._sock, self.path):
            if real_clock.monotonic() >= deadline:
                raise self._silent()
            time.sleep(AGAIN)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def request(self, request: Request, patience: float | None = PATIENCE) -> Response:
        """Send a request, and return the response within `patience` seconds. Raises IncoError if the proxy refuses."""
        deadline = math.inf if patience is None else real_clock.monotonic() + patience
        try:
            self._sock.settimeout(patience)
            self._sock.sendall(protocol.encode_request(request))
        except TimeoutError as error:
            raise self._silent() from error
        except OSError as error:
            raise self._ended() from error
        self._unanswered += 1
        while (reply := self._read_event(deadline)) is None or self._unanswered > 0:
            pass
        return self._checked(reply, request)

    def status(self, board: str | None = None, patience: float = PATIENCE) -> tuple[BoardStatus, ...]:
        return self.request(protocol.StatusRequest(board), patience).status

    def events(self, patience: float | None = None) -> Iterator[Event]:
        """Yield the events of a monitor. Raises ProxyNotFoundError once the proxy has exited.

        With `patience`, stop instead, and also if no event arrives for `patience` seconds.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            try:
                self._read_event(math.inf if patience is None else real_clock.monotonic() + patience)
            except ProtocolError:
                raise
            except ProxyNotFoundError:
                if patience is None:
                    raise
                return

    def fileno(self) -> int:
        """Return the descriptor that is readable when `arrived` has new events."""
        return self._sock.fileno()

    @property
    def has_received(self) -> bool:
        """Whether data was received that `arrived` has not returned yet. `fileno` need not be readable."""
        return bool(self._events or self._lines)

    def arrived(self) -> list[Event]:
        """Return the monitor events that have arrived. Raises ProxyNotFoundError once the proxy has exited."""
        if not self.has_received and select.select([self._sock], [], [], 0)[0]:
            self._receive()
        while self._lines:
            self._read_event(math.inf)
        events = list(self._events)
        self._events.clear()
        return events

    def _read_event(self, deadline: float) -> Response | None:
        """Wait for a line and return it if it is a response. Otherwise, store the event for `events` or `arrived`."""
        self._await_line(deadline)
        if isinstance(reply := self._next(), Response):
            self._unanswered -= 1
            return reply
        with self._obeying():
            if not isinstance(reply, Event):
                raise MessageError("the proxy sent a `notifications` event, which was not requested")
        self._events.append(reply)
        return None

    def _await_line(self, deadline: float) -> None:
        """Wait for a complete line until the deadline. Partial data does not extend the deadline.

        After the deadline, read once more: this process may be late although the proxy was not.
        """
        while not self._lines:
            left = max(0.0, deadline - real_clock.monotonic())
            if not left and self._last_look == deadline:
                raise self._silent()
            if not left:
                self._last_look = deadline
            if select.select([self._sock], [], [], min(UNINTERRUPTED, left))[0]:
                self._receive(CHUNK if left else protocol.REPLY_MAX)

    def _receive(self, size: int = CHUNK) -> None:
        try:
            data = self._sock.recv(size)
        except OSError as error:
            raise self._ended() from error
        self._feed(data)


def connect(link: str | None, control: str | None) -> Client:
    """Connect to the proxy of `link`, to the proxy at `control`, or to the only running proxy. Raises IncoError."""
    if control is not None:
        if link is not None:
            raise InvalidArgumentError("--control and LINK are mutually exclusive: each selects a proxy")
        return Client(Path(control))
    clients, errors = answering(sockets())
    found = [client for client in clients if link is None or _is_called(client, link)]
    only = found[0] if len(found) == 1 else None
    closed = None if found or link is None else _closed_board(clients, link)
    named = ", ".join(f"{each.greeting.name} (--control {each.path}, process {each.pid})" for each in found)
    _close(clients, only)
    if only is not None:
        return only
    if found:
        raise InvalidArgumentError(f"{len(found)} proxies answer: name one of {named}")
    if closed is not None:
        raise not_open(closed)
    raise _none_answers(errors, "no running proxy" if link is None else f"no proxy of {link}")


def not_open(status: BoardStatus) -> BoardNotOpenError:
    """Return the error for a board that is not open."""
    return BoardNotOpenError(f"board {status.board!r}", f"not open: {status.problem}")


def _closed_board(clients: Sequence[Client], name: str) -> BoardStatus | None:
    """Return the board `name` if a proxy with several boards serves it but could not open it."""
    for client in clients:
        if client.greeting.name not in client.greeting.boards:  # The name is that of a directory of boards.
            with contextlib.suppress(IncoError):
                for board in client.status(patience=SEARCH):
                    if board.board == name and board.status is None:
                        return board
    return None


def connect_all() -> list[Client]:
    """Connect to all proxies on this host. Raises IncoError if none answers."""
    clients, errors = answering(sockets())
    if not clients:
        raise _none_answers(errors, "no running proxy")
    return clients


def wait_for_end(clients: Sequence[Client], seconds: float) -> None:
    """Sleep for `seconds`. Raises ProxyNotFoundError if a proxy exits in the meantime."""
    deadline = real_clock.monotonic() + seconds
    for client in select.select(clients, [], [], seconds)[0]:
        client._read_event(deadline)


def _none_answers(errors: Sequence[IncoError], wanted: str) -> IncoError:
    """Return the error to raise if no proxy answered. Prefer an error that a running proxy caused."""
    for error in errors:
        if not isinstance(error, ProxyNotFoundError):
            return error
    places = " or ".join(map(str, runtime_directories()))
    start = "start one"
    if names := silent_services():
        log = "journalctl -u 'inco-trio*', or log/main/current of the s6 service"
        start = f"the service of {' or '.join(names)} does not answer (start it, or see its log: {log}; "
        start += "if it was removed, `inco-trio doctor` shows what is left)"
    if silent := [error.subject for error in errors if error.reason == SILENT]:
        start = f"{' and '.join(silent)} exists, but its proxy does not answer (`inco-trio doctor` shows why)"
    return ProxyNotFoundError(f"{wanted} answers in {places}: {start}, or name its socket with --control PATH")


def client_of(pid: int) -> Client | None:
    """Connect to the proxy with the PID `pid`. Return None if its control socket is not found."""
    clients, _ = answering(sockets())
    mine = next((client for client in clients if client.greeting.pid == pid), None)
    _close(clients, mine)
    return mine


def _close(clients: list[Client], kept: Client | None) -> None:
    for client in clients:
        if client is not kept:
            client.close()


def answering(paths: Sequence[Path]) -> tuple[list[Client], list[IncoError]]:
    """Connect to the control sockets at `paths` concurrently. Also return the errors of failed connections."""
    attempts: dict[Path, Client | IncoError] = {}
    if len(paths) > 1:
        # Import ThreadPoolExecutor lazily, because most hosts have only one proxy.
        from concurrent.futures import ThreadPoolExecutor

        def attempt(path: Path) -> None:
            attempts[path] = _attempt(path)

        # RuntimeError means that no more threads can be started.
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(len(paths)) as threads:
            list(threads.map(attempt, paths))
    found = [attempts[path] if path in attempts else _attempt(path) for path in paths]
    clients: dict[str, Client] = {}
    for each in found:
        if isinstance(each, Client) and clients.setdefault(each.greeting.boot, each) is not each:
            each.close()  # This client is already connected to the same proxy through another path.
    return [*clients.values()], [each for each in found if isinstance(each, IncoError)]


def _attempt(path: Path) -> Client | IncoError:
    try:
        return Client(path, SEARCH)
    except IncoError as error:
        return error


def sockets() -> list[Path]:
    """Return all control sockets on this host, even stale ones. Sockets of systemd units are in subdirectories.

    Raises ResourceError if the process or the system has no descriptors or memory left.
    """
    found: list[Path] = []
    for directory in runtime_directories():
        try:
            entries = _entries(directory)
            below = [path for entry in entries if entry.suffix != ".sock" for path in _entries(entry)]
        except OSError as error:
            raise ResourceError(directory, f"cannot search for control sockets: {error.strerror}") from error
        found += sorted(path for path in [*entries, *below] if path.suffix == ".sock")
    return found


def _entries(directory: Path) -> list[Path]:
    """Return the entries of a directory, or an empty list if it is missing or not readable.

    Raises OSError if no descriptors or memory are left. Since Python 3.12, Path.glob ignores such errors.
    """
    try:
        return list(directory.iterdir())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return []


def _is_called(client: Client, link: str) -> bool:
    try:
        called = parse_address(link).name
    except ValueError:
        called = link
    names = (called, link, os.path.abspath(link))  # noqa: PTH100 - do not resolve symlinks
    return client.greeting.name in names or link in client.greeting.boards
