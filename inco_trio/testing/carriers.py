"""The proxy of a board under test: a process of its own, or one in the process of the test."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import trio

from inco_trio.config import Config
from inco_trio.errors import IncoError, InvalidArgumentError
from inco_trio.problems import board_name
from inco_trio.proxy.fleet import Proxies, open_proxies
from inco_trio.status import Stats
from inco_trio.testing.engine import Engine
from inco_trio.testing.history import History
from inco_trio.testing.layout import Layout

__all__ = ["Carrier", "InProcess", "Process", "ProxyDiedError"]

_READY = 120.0
_STOP = 60.0
"""Seconds after which it is an error, or the process is killed: they only stop a hang."""
_FDS_MAX = 16


class ProxyDiedError(IncoError):
    """The proxy under test could not be started, or ended by itself; the text has the end of its log."""


class Carrier(Protocol):
    """A proxy that is started and stopped by a test; all is called in the engine's thread."""

    pid: int | None
    """Its process, while it runs in one of its own."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def kill(self) -> None: ...
    async def look(self) -> None: ...
    def log(self) -> str: ...
    def stats(self) -> Stats | None: ...
    def close(self) -> None: ...


class Process:
    """`inco-trio run` as a process. The test keeps its descriptors while it does not run, as systemd would.

    It is readied and given its descriptors by the protocol of sd_notify(3) and sd_listen_fds(3).
    """

    def __init__(self, engine: Engine, layout: Layout, link: str, history: History, netns: int | None) -> None:
        self.pid: int | None = None
        self._engine = engine
        self._layout = layout
        self._link = link
        self._history = history
        self._netns = netns
        self._log = layout.directory / "proxy.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: dict[str, int] = {}
        self._ready = trio.Event()
        self._ended = trio.Event()
        self._expected = False
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(layout.socket("notify")))
        self._scope = trio.CancelScope()
        engine.nursery.start_soon(self._take_notes)

    async def start(self) -> None:
        """Start it, and return once it is ready. Raises ProxyDiedError."""
        if self._process is not None:
            raise InvalidArgumentError(f"the proxy runs already, as process {self.pid}")
        self._ready, self._ended, self._expected = trio.Event(), trio.Event(), False
        settings = {
            "parent": os.getpid(),
            "names": list(self._kept),
            "fds": list(self._kept.values()),
            "netns": self._netns,
        }
        fds = [*self._kept.values(), *(() if self._netns is None else (self._netns,))]
        options = ("--config", self._layout.config, "--control", self._layout.socket("control.sock"), "--wait-link")
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._layout.socket("notify")), "FDSTORE": "64"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes a few milliseconds
                [sys.executable, "-m", "inco_trio.testing.launch", json.dumps(settings), "run", self._link, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                env=environment,
                # A group of its own: Ctrl-C is the test's.
                process_group=0,
            )
        self.pid = self._process.pid
        self._engine.nursery.start_soon(self._wait, self._process)
        with trio.move_on_after(_READY):
            async with trio.open_nursery() as nursery:
                for event in (self._ready, self._ended):
                    nursery.start_soon(self._end_with, event, nursery.cancel_scope)
        if not self._ready.is_set():
            await self.kill()
            raise ProxyDiedError(f"the proxy did not become ready; it said:\n{self.log()}")
        self._history.fail(None)

    @staticmethod
    async def _end_with(event: trio.Event, scope: trio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    async def _wait(self, process: subprocess.Popen[bytes]) -> None:
        end = os.pidfd_open(process.pid)
        ended = self._ended
        try:
            await trio.lowlevel.wait_readable(end)
        finally:
            os.close(end)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._process = self.pid = None
        if not self._expected:
            last = self.log().splitlines()[-1:] or ["nothing"]
            code = process.returncode
            self._history.fail(f"the proxy has ended by itself, with exit code {code}; it said: {last[0]}")
            self._history.add(None, f"the proxy has ended, with exit code {code}")
        ended.set()

    async def stop(self) -> None:
        """End it by SIGTERM: it finishes its work."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """End it by SIGKILL."""
        await self._end(signal.SIGKILL)

    async def look(self) -> None:
        """Know if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            await self._ended.wait()

    async def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._expected = True
        self._process.send_signal(number)
        with trio.move_on_after(_STOP):
            await self._ended.wait()
        if self._process is not None:
            self._process.kill()
            await self._ended.wait()

    async def _take_notes(self) -> None:
        with self._scope:
            while True:
                await trio.lowlevel.wait_readable(self._notify)
                self._take_note()

    def _take_note(self) -> None:
        data, fds, _flags, _sender = socket.recv_fds(self._notify, 4096, _FDS_MAX)
        lines = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        if "FDSTORE" in lines:
            for fd in fds:
                os.set_inheritable(fd, False)
            for fd in (*fds[1:], *self._kept_under(lines["FDNAME"])):
                os.close(fd)
            self._kept[lines["FDNAME"]] = fds[0]
        elif "FDSTOREREMOVE" in lines:
            for fd in self._kept_under(lines["FDNAME"]):
                os.close(fd)
        elif "READY" in lines:
            self._ready.set()

    def _kept_under(self, name: str) -> tuple[int, ...]:
        return (self._kept.pop(name),) if name in self._kept else ()

    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stats(self) -> Stats | None:
        """Its counters, if it answers."""
        from inco_trio.control.client import Client

        with contextlib.suppress(IncoError), Client(self._layout.socket("control.sock")) as client:
            status = client.status()[0].status
            return None if status is None else status.counters
        return None

    def close(self) -> None:
        """Let go of what is kept; it does not run any more."""
        self._scope.cancel()
        trio.lowlevel.notify_closing(self._notify)
        self._notify.close()
        self._layout.socket("notify").unlink(missing_ok=True)
        for fd in self._kept.values():
            os.close(fd)


class InProcess:
    """A proxy in the engine's loop; all boards of the process share one inotify instance."""

    def __init__(self, engine: Engine, layout: Layout, link: str, name: str, netns: Path | None) -> None:
        self.pid: int | None = None
        self._engine = engine
        self._name = name
        self._config = Config(link, layout.signals, wait_link=True, netns=netns)
        self._lines: list[str] = []
        self._last: Stats | None = None

    async def start(self) -> None:
        """Open it. Raises ProxyDiedError."""
        boards = await _boards_of(self._engine)
        if self._name in boards.configs:
            raise InvalidArgumentError("the proxy runs already")
        _Logs.of(self._name, self._lines)
        await boards.change({self._name: self._config})
        if (why := boards.proxies.not_open.get(self._name)) is not None:
            await self.stop()
            raise ProxyDiedError(f"the proxy cannot be opened: {why}")

    async def stop(self) -> None:
        """Close it: it finishes its work."""
        boards = await _boards_of(self._engine)
        if self._name in boards.configs:
            self._last = self.stats()
            await boards.change({}, without=self._name)
            _Logs.boards.pop(self._name, None)

    async def kill(self) -> None:
        """Raises InvalidArgumentError."""
        raise InvalidArgumentError("a proxy in the test's process cannot be killed: leave out --inco-trio-in-process")

    async def look(self) -> None:
        """It does not end by itself."""

    def log(self) -> str:
        """All that it has said."""
        return "".join(f"{line}\n" for line in self._lines)

    def stats(self) -> Stats | None:
        """Its counters; the last ones, if it is closed."""
        boards = _boards.get(self._engine)
        if boards is None or self._name not in boards.configs:
            return self._last
        return boards.proxies.stats.get(self._name)

    def close(self) -> None:
        """Nothing is left to close."""


class _Boards:
    """The proxies of the engine's loop."""

    def __init__(self, proxies: Proxies) -> None:
        self.proxies = proxies
        self.configs: dict[str, Config] = {}
        self._changing = trio.Lock()

    async def change(self, more: dict[str, Config], without: str | None = None) -> None:
        """Have these too, and one less."""
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
    """Gives each board the lines of the log that are its own."""

    boards: dict[str, list[str]] = {}  # noqa: RUF012 - of the process, as the logger is
    _handler: _Logs | None = None

    @classmethod
    def of(cls, board: str, lines: list[str]) -> None:
        """Append the board's lines to `lines`."""
        cls.boards[board] = lines
        if cls._handler is None:
            cls._handler = cls()
            package = logging.getLogger("inco_trio")
            package.addHandler(cls._handler)
            if package.getEffectiveLevel() > logging.INFO:
                package.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line, if it is a board's."""
        if (lines := self.boards.get(board_name.get())) is not None:
            lines.append(f"{record.levelname.lower()}: {record.getMessage()}")
