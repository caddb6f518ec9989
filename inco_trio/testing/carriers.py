"""The proxy of a board under test, as a separate process or inside the test process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Protocol

import trio

from inco_trio.config import Config
from inco_trio.errors import STRERROR, IncoError, InvalidArgumentError, ResourceError, from_os_error
from inco_trio.problems import board_name
from inco_trio.proxy.fleet import Proxies, open_proxies
from inco_trio.service.launch import STOP, Launched
from inco_trio.stats import Stats
from inco_trio.testing.engine import Engine
from inco_trio.testing.happenings import History
from inco_trio.testing.layout import Layout

__all__ = ["Carrier", "InProcess", "Process", "ProxyDiedError"]

_READY = 120.0
"""Maximum time for a process to become ready, in seconds. Only a hang reaches this limit."""
_FDS_MAX = 16


class ProxyDiedError(IncoError):
    """The proxy under test could not be started. The message contains its log."""


class Carrier(Protocol):
    """A proxy that a test starts and stops. All methods run in the engine's thread."""

    @property
    def pid(self) -> int | None:
        """The PID of the separate process, or None if there is none."""

    async def start(self) -> None:
        """Start the proxy and wait until it is ready. Raises ProxyDiedError."""

    async def stop(self) -> None:
        """Stop the proxy cleanly."""

    async def kill(self) -> None:
        """Kill the proxy (SIGKILL)."""

    async def look(self) -> None:
        """Check whether the proxy has ended on its own."""

    def log(self) -> str:
        """Return the log of the proxy."""

    def stats(self) -> Stats | None:
        """Return the counters (after a stop, the last known ones), or None if the proxy does not answer."""

    def close(self) -> None:
        """Release all resources of a stopped proxy."""


class Process:
    """`inco-trio run` as a separate process. This class acts as its fd store, like systemd (sd_notify(3), FDSTORE)."""

    def __init__(self, engine: Engine, layout: Layout, link: str, history: History, netns: int | None) -> None:
        self._engine = engine
        self._layout = layout
        self._link = link
        self._history = history
        self._netns = netns
        self._log = layout.directory / "proxy.log"
        self._launched: Launched | None = None
        self._stored: dict[str, int] = {}
        self._ended = trio.Event()
        self._expected = False
        self._notify = _bound(layout.socket("notify"), layout.directory)
        self._scope = trio.CancelScope()
        engine.nursery.start_soon(self._store)

    @property
    def pid(self) -> int | None:
        return None if self._launched is None else self._launched.pid

    async def start(self) -> None:
        if self._launched is not None:
            raise InvalidArgumentError(f"the proxy is already running (PID {self.pid})")
        self._take_notes()
        self._ended, self._expected = trio.Event(), False
        options = ("--config", self._layout.config, "--control", self._layout.socket("control.sock"), "--wait-link")
        environment = {"NOTIFY_SOCKET": str(self._layout.socket("notify")), "FDSTORE": "64"}
        launched = Launched(
            *("run", self._link, *options),
            log=self._log,
            netns=self._netns,
            environment=environment,
            listen_fds=self._stored,
        )
        try:
            with trio.move_on_after(_READY):
                await trio.lowlevel.wait_readable(launched.ready_fd)
                launched.see_ready()
        finally:
            if not launched.is_ready:
                launched.stop(signal.SIGKILL)
                launched.close()
        if not launched.is_ready:
            raise ProxyDiedError(f"the proxy did not become ready; it logged:\n{self.log()}")
        self._launched = launched
        self._engine.nursery.start_soon(self._wait, launched)
        self._history.fail(None)

    async def _wait(self, launched: Launched) -> None:
        try:
            await trio.lowlevel.wait_readable(launched.end_fd)
        finally:
            code = launched.stop(signal.SIGKILL)
            launched.close()
            self._launched = None
            self._ended.set()
        if not self._expected:
            last = self.log().splitlines()[-1:] or ["nothing"]
            self._history.fail(f"the proxy has ended by itself, with exit code {code}; it logged: {last[0]}")
            self._history.add(None, f"the proxy has ended, with exit code {code}")

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def look(self) -> None:
        if self._launched is not None and self._launched.process.poll() is not None:
            await self._ended.wait()

    async def _end(self, number: signal.Signals) -> None:
        if self._launched is None:
            return
        self._expected = True
        self._launched.process.send_signal(number)
        with trio.move_on_after(STOP):
            await self._ended.wait()
        if self._launched is not None:
            self._launched.process.kill()
            await self._ended.wait()

    async def _store(self) -> None:
        with self._scope:
            await trio.lowlevel.checkpoint_if_cancelled()  # The board may be closed before this task starts.
            while True:
                await trio.lowlevel.wait_readable(self._notify)
                self._take_notes()

    def _take_notes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _flags, _sender = socket.recv_fds(self._notify, 4096, _FDS_MAX)
                lines = dict(line.partition("=")[::2] for line in data.decode().split("\n"))
                if not {"FDSTORE", "FDSTOREREMOVE"}.isdisjoint(lines):
                    former = self._stored.pop(lines["FDNAME"], None)
                    for fd in (*fds[1:], *(() if former is None else (former,))):
                        os.close(fd)
                if "FDSTORE" in lines:
                    os.set_inheritable(fds[0], False)
                    self._stored[lines["FDNAME"]] = fds[0]

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stats(self) -> Stats | None:
        from inco_trio.control.client import Client

        with contextlib.suppress(IncoError), Client(self._layout.socket("control.sock")) as client:
            status = client.status()[0].status
            return None if status is None else status.counters
        return None

    def close(self) -> None:
        self._scope.cancel()
        trio.lowlevel.notify_closing(self._notify)
        self._notify.close()
        self._layout.socket("notify").unlink(missing_ok=True)
        for fd in self._stored.values():
            os.close(fd)


def _bound(path: Path, board: Path) -> socket.socket:
    """Return a datagram socket at `path`. Replace the socket of a test program that was killed. Raises IncoError."""
    with contextlib.ExitStack() as stack:
        try:
            bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            if path.is_socket() and bound.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()  # No process has this socket open.
            bound.bind(str(path))
        except OSError as error:
            in_use = ((errno.EADDRINUSE,), ResourceError, "in use by another board (use one directory for each board)")
            raise from_os_error(error, board, STRERROR, in_use) from error
        stack.pop_all()
    return bound


class InProcess:
    """A proxy inside the test process, in the engine's event loop. All such proxies share one inotify instance."""

    pid = None

    def __init__(self, engine: Engine, layout: Layout, link: str, name: str, netns: Path | None) -> None:
        self._engine = engine
        self._name = name
        self._config = Config(link, layout.signals, wait_link=True, netns=netns)
        self._lines: list[str] = []
        self._last: Stats | None = None

    async def start(self) -> None:
        boards = await _boards_of(self._engine)
        if self._name in boards.configs:
            raise InvalidArgumentError("the proxy is already running")
        _Logs.of(self._name, self._lines)
        await boards.change({self._name: self._config})
        if (why := boards.proxies.not_open.get(self._name)) is not None:
            await self.stop()
            raise ProxyDiedError(f"the proxy cannot be opened: {why}")

    async def stop(self) -> None:
        boards = await _boards_of(self._engine)
        if self._name in boards.configs:
            self._last = self.stats()
            await boards.change({}, without=self._name)
            _Logs.boards.pop(self._name, None)

    async def kill(self) -> None:
        raise InvalidArgumentError(
            "cannot kill a proxy that runs inside the test process (omit --inco-trio-in-process)"
        )

    async def look(self) -> None: ...

    def log(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def stats(self) -> Stats | None:
        boards = _boards.get(self._engine)
        if boards is None or self._name not in boards.configs:
            return self._last
        return boards.proxies.stats.get(self._name)

    def close(self) -> None: ...


class _Boards:
    """All proxies that run in the engine's event loop."""

    def __init__(self, proxies: Proxies) -> None:
        self.proxies = proxies
        self.configs: dict[str, Config] = {}
        self._changing = trio.Lock()

    async def change(self, more: dict[str, Config], without: str | None = None) -> None:
        """Add the proxies `more` and remove the proxy `without`. Raises IncoError."""
        async with self._changing:
            self.configs |= more
            if without is not None:
                del self.configs[without]
            for refused in (await self.proxies.reload(self.configs)).values():
                raise refused


_boards: dict[Engine, _Boards] = {}
_opening = trio.Lock()


async def _boards_of(engine: Engine) -> _Boards:
    async with _opening:
        if engine not in _boards:

            async def serve(*, task_status: trio.TaskStatus[_Boards]) -> None:
                async with open_proxies({}) as proxies:
                    task_status.started(_Boards(proxies))
                    try:
                        await trio.sleep_forever()
                    finally:
                        del _boards[engine]

            _boards[engine] = await engine.nursery.start(serve)
        return _boards[engine]


class _Logs(logging.Handler):
    """A log handler that appends each line to the log of its board."""

    boards: dict[str, list[str]] = {}  # noqa: RUF012 - shared in the process, like the logger
    _handler: _Logs | None = None

    @classmethod
    def of(cls, board: str, lines: list[str]) -> None:
        """Append all later log lines of a board to `lines`."""
        cls.boards[board] = lines
        package = logging.getLogger("inco_trio")
        if cls._handler is None:
            cls._handler = cls()
            package.addHandler(cls._handler)
        if package.getEffectiveLevel() > logging.INFO:
            package.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if (lines := self.boards.get(board_name.get())) is not None:
            lines.append(f"{record.levelname.lower()}: {record.getMessage()}")
