"""Helpers for tests of the control socket: a board with a proxy process, and a client on a plain socket."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from inco_trio.control import client
from inco_trio.frame import encode
from inco_trio.linux.sockets import SO_PASSRIGHTS
from inco_trio.proxy.proxy import Proxy as ProxyObject
from inco_trio.service import launch
from netns.fixtures import Proxy
from netns.hang import HANG

__all__ = [
    "COMMAND",
    "FRAME",
    "LIMITS",
    "MAC",
    "PATIENT",
    "Board",
    "Client",
    "NoProxies",
    "Running",
    "block",
    "child",
    "descriptors_refused",
    "no_descriptors",
    "no_threads",
    "patient_clients",
]

COMMAND = [sys.executable, "-m", "inco_trio"]
LIMITS = f"""
from inco_trio.cli import record
from inco_trio.control import client
record.FAREWELL = client.SEARCH = {HANG}
for function in client.Client.__init__, client.Client.request, client.Client.status:
    function.__defaults__ = tuple({HANG} if each == client.PATIENCE else each for each in function.__defaults__)
"""
"""Python code that raises the timeouts of commands that query a proxy, so that only a hang exceeds them."""
PATIENT = [sys.executable, "-c", f"{LIMITS}\nimport sys\nfrom inco_trio.cli import main\nsys.exit(main())"]
"""A command that does the same as COMMAND, but waits for a slow proxy."""

MAC = bytes.fromhex("020000000001")
FRAME = encode(b"ihub_hwwd_irq", MAC)


def child(code: str) -> str:
    """Return the program of a process that `Launched` starts, with Python code that runs at its start."""
    before, found, after = launch._CHILD.partition("from inco_trio.service.launch import run_child\n")
    assert found
    return f"{before}{found}{code}\n{after}"


def patient_clients(patch: pytest.MonkeyPatch) -> None:
    """Let the clients in this process wait for a slow proxy, except where the test or the caller states a limit."""
    patch.setattr(client, "SEARCH", HANG)
    for function in (client.Client.__init__, client.Client.request, client.Client.status):
        defaults = tuple(HANG if each == client.PATIENCE else each for each in function.__defaults__ or ())
        patch.setattr(function, "__defaults__", defaults)


def block(register: Path) -> None:
    """Replace a register file with a directory. Retry if the proxy recreates the file in between."""
    while True:
        register.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            return register.mkdir()


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Prevent this process from opening descriptors while the block runs."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def no_threads(left: int = 0) -> Iterator[None]:
    """Let this process start only `left` more threads while the block runs, and none in Trio."""
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    async def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_or_refuse)
        patch.setattr(trio.to_thread, "run_sync", refuse)  # Trio may still have idle threads.
        yield


@contextlib.contextmanager
def descriptors_refused(sock: socket.socket) -> Iterator[None]:
    """Expect that the block cannot pass a descriptor, if the kernel can refuse it (Linux 6.16 or newer)."""
    try:
        sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
    except OSError:
        yield
    else:
        with pytest.raises(PermissionError):
            yield


class Client:
    """A connection to the control socket that reads lines of JSON."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(self.sock.close)
        self.sock.settimeout(HANG)
        self.sock.connect(os.fspath(path))
        self._file = self.sock.makefile("rb")
        stack.callback(self._file.close)
        self.greeting = self.read()

    def read(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line.endswith(b"\n"), line
        read: dict[str, Any] = json.loads(line)
        return read

    def ask(self, request: Mapping[str, object] | bytes) -> dict[str, Any]:
        self.sock.sendall(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")
        return self.read()

    def until(self, **wanted: object) -> dict[str, Any]:
        """Return the next event that contains these fields and values; discard the events before it."""
        while True:
            event = self.read()
            if wanted.items() <= event.items():
                return event

    def end(self) -> None:
        """Close the connection."""
        self._file.close()
        self.sock.close()

    def at_end(self) -> bool:
        """Discard all data until the proxy closes the connection; return True."""
        with contextlib.suppress(ConnectionResetError):
            while self._file.read(1 << 16):
                pass
        return True


class Board:
    """A board on a `unix:` link with its proxy process; the test acts as core 1."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.irq, self.path = home, home / "irq", home / "run/control.sock"
        self.path.parent.mkdir()
        self.link = f"unix:{home}/core0,peer={home}/core1"
        self._stack = stack

    def start(self, *options: str, environment: Mapping[str, str] | None = None, control: str | None = "") -> Proxy:
        arguments = [self.link, "--log-format", "json", *options]
        if not {"--config", "--boards"} & set(options):
            arguments += ["--irq-dir", str(self.irq)]
        if control is not None:
            arguments += ["--control", control or str(self.path)]
        proxy = Proxy(None, arguments, environment or {}, self.home / "log")
        self._stack.callback(proxy.close)
        return proxy

    def running(self, *options: str) -> Proxy:
        proxy = self.start(*options)
        proxy.wait_ready()
        return proxy

    def core1(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._stack.callback(peer.close)
        peer.settimeout(HANG)
        peer.bind(f"{self.home}/core1")
        return peer

    def inbound(self, peer: socket.socket, frame: bytes = FRAME) -> None:
        peer.sendto(frame, f"{self.home}/core0")

    def trigger(self) -> None:
        (self.irq / "message_6_trig").write_text("1")

    def client(self, path: Path | None = None) -> Client:
        return Client(path or self.path, self._stack)

    def wait_followed(self) -> None:
        """Wait until the proxy has a follower, such as the gateway. The first follower receives no earlier events."""
        while not (self.status()["history"] or {}).get("followed"):
            time.sleep(0.01)  # Poll, because no event reports a follower.

    def status(self) -> dict[str, Any]:
        # Close the connection: tests call this function in loops, and a proxy accepts a limited number of clients.
        with ExitStack() as stack:
            (board,) = Client(self.path, stack).ask({"request": "status"})["status"]
        assert isinstance(board, dict)
        return board


class Running:
    """A running command whose output the test reads line by line."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*PATIENT, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def listening(self, first: str = "listening to ") -> None:
        """Wait until the command reports that it is listening."""
        assert self.remark().startswith(f"inco-trio: {first}")

    def remark(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()

    def end(self) -> int:
        out, err = self.process.communicate(timeout=HANG)
        assert "Traceback" not in out + err
        return self.process.returncode


class NoProxies:
    """The `Served` of a control socket without open proxies."""

    name = "b"

    def proxies(self) -> Mapping[str, ProxyObject]:
        return {}

    def not_open(self) -> Mapping[str, str]:
        return {}
