"""Pytest fixtures over `inco_trio.simulation.world`; loaded by tests/conftest.py."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inco_trio.linux.inotify import IN_CLOSE_WRITE, IN_MODIFY, IN_Q_OVERFLOW, Inotify, parse_events
from inco_trio.linux.rtnetlink import RTMGRP_LINK
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores, veth
from netns.hang import HANG
from netns.unprivileged import cover_run

__all__ = ["Canary", "Consumer", "Proxy", "StartProxy", "Tcpdump"]

"""The former name, which test_aio.py and test_aio_proxy.py import."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "netns: needs network namespaces: root, or a user namespace around pytest")
    # Two workers, or two runs of the tests, must not find each other's control sockets.
    if os.geteuid() != 0:
        directory = tempfile.TemporaryDirectory(prefix="inco-trio-")
        config.add_cleanup(directory.cleanup)
        os.environ["XDG_RUNTIME_DIR"] = directory.name
    else:
        # A container without CAP_SYS_ADMIN runs only the unit tests, which share no socket names.
        with contextlib.suppress(PermissionError):
            cover_run()


@pytest.fixture
def cores() -> Iterator[Cores]:
    """Two cores, joined by a running link."""
    with two_cores() as made:
        yield made


@pytest.fixture
def core1(cores: Cores) -> Iterator[Peer]:
    """Core 1, played by the test."""
    with Peer(cores) as peer:
        yield peer


class Canary:
    """Tells when the network namespace with the descriptor `fd` has ended: its end of a veth pair takes ours along."""

    def __init__(self, fd: int) -> None:
        self._own = Namespace()
        veth(self._own, "canary", Namespace(fd), "canary")
        self._changes = self._own.run(functools.partial(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW))
        self._changes.bind((0, RTMGRP_LINK))

    def wait_gone(self) -> None:
        """Wait for the end of the namespace."""
        while "canary" in (name for _, name in self._own.run(socket.if_nameindex)):
            if not select.select([self._changes], [], [], HANG)[0]:
                pytest.fail("the namespace is still there")
            self._changes.recv(65536)

    def close(self) -> None:
        """Let go of all."""
        self._changes.close()
        self._own.close()


@pytest.fixture
def canary() -> Iterator[Callable[[int], Canary]]:
    """Watch a network namespace for its end: `canary(fd)`, which does not keep it alive."""
    with ExitStack() as stack:

        def start(fd: int) -> Canary:
            made = Canary(fd)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def nobody() -> list[str]:
    """The start of a command that runs the rest of it as the user nobody, who can reach Python and the project."""
    project = Path(__file__).parents[1]
    return [sys.executable, str(project / "netns/unprivileged.py"), sys.prefix, sys.base_prefix, str(project), "--"]


@pytest.fixture
def irq_dir(tmp_path: Path) -> Path:
    """The directory of the registers; the proxy makes it."""
    return tmp_path / "irq"


class Proxy:
    """The real process `inco-trio run`, ready, in a namespace; `log` is its standard error."""

    def __init__(self, namespace: Namespace, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._changes = Inotify()
        log.touch()
        self._changes.watch(str(log), IN_MODIFY)
        read_ready, write_ready = os.pipe()
        command = [sys.executable, "-m", "inco_trio", "run", *arguments, "--notification-fd", str(write_ready)]
        with log.open("ab") as output:
            start = functools.partial(
                subprocess.Popen[bytes],
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[write_ready],
                env={**os.environ, **environment},
            )
            self.process = namespace.run(start)
        self.pid = self.process.pid
        self._end = os.pidfd_open(self.pid)
        os.close(write_ready)
        self._ready = read_ready

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    def _fail(self, what: str) -> None:
        pytest.fail(f"{what}; the proxy (pid {self.pid}, exit code {self.process.poll()}) said:\n{self.log}")

    def wait_ready(self) -> None:
        """Wait for readiness (the newline of s6)."""
        if not select.select([self._ready], [], [], HANG)[0]:
            self._fail(f"not ready within {HANG:g} s")
        if os.read(self._ready, 1) != b"\n":
            self.wait()
            self._fail("ended without being ready")

    def wait_log(self, text: str, *, after: int = 0) -> str:
        """The first line that contains `text`, once it is there; `after` skips so many characters of the log."""
        deadline = time.monotonic() + HANG
        while True:
            ended = self.process.poll() is not None
            for line in self.log[after:].splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.rstrip("\n")
            if ended:
                self._fail(f"ended without saying {text!r}")
            ready = select.select([self._changes.fd, self._end], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                self._fail(f"has not said {text!r} within {HANG:g} s")
            self._changes.read_into(memoryview(bytearray(65536)))

    def counters(self) -> dict[str, int]:
        """Its counters now, by SIGUSR1."""
        said = len(self.log)
        self.process.send_signal(signal.SIGUSR1)
        record: dict[str, Any] = json.loads(self.wait_log('"statistics"', after=said))
        return {name: value for name, value in record.items() if type(value) is int}

    def wait(self) -> int:
        """The exit code, once it has ended; negative for a signal."""
        try:
            return self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self._fail(f"has not ended within {HANG:g} s")
            raise

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def close(self) -> None:
        """End it: by itself, so that its coverage is kept, or whatever it does."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # A test that failed may have left it stopped.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(HANG)
        self.process.kill()
        self.process.wait()
        os.close(self._ready)
        os.close(self._end)
        self._changes.close()


StartProxy = Callable[..., Proxy]


@pytest.fixture
def proxy(cores: Cores, tmp_path: Path) -> Iterator[StartProxy]:
    """Start the proxy: `proxy(*arguments, env={...}, core=cores.core0, ready=True)`; JSON log, on the link of `cores`.

    With `ready=False`, it may not be ready yet. What it said is attached to a failing test.
    """
    with ExitStack() as stack:

        def start(
            *arguments: str | Path,
            env: Mapping[str, str] | None = None,
            core: Namespace | None = None,
            ready: bool = True,
        ) -> Proxy:
            log = tmp_path / f"proxy-{len(started)}.log"
            command = [cores.link, "--log-format", "json", *map(str, arguments)]
            made = Proxy(core or cores.core0, command, env or {}, log)
            started.append(made)
            stack.callback(made.close)
            if ready:
                made.wait_ready()
            return made

        started: list[Proxy] = []
        yield start
    for made in started:
        # Pytest shows it, if the test fails.
        sys.stderr.write(f"proxy {made.pid} ended with {made.process.returncode}; it said:\n{made.log}")


class Consumer:
    """Counts the closes-after-write of one file, as an application that waits for an interrupt sees them.

    A thread reads all the time, since the kernel keeps 16,384 events; with MODIFY in the mask, between two closes
    there is always a write, so that no two closes merge (inotify(7)).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inotify = Inotify()
        self._inotify.watch(str(path), IN_CLOSE_WRITE | IN_MODIFY)
        self._stop_read, self._stop_write = os.pipe()
        self._changed = threading.Condition()
        self._count = 0
        self._overflowed = False
        self._thread = threading.Thread(target=self._read, name=f"consumer of {path.name}")
        self._thread.start()

    def _read(self) -> None:
        buffer = memoryview(bytearray(65536))
        while self._stop_read not in select.select([self._inotify.fd, self._stop_read], [], [])[0]:
            events = parse_events(buffer[: self._inotify.read_into(buffer)])
            with self._changed:
                self._count += sum(event.mask & IN_CLOSE_WRITE != 0 for event in events)
                self._overflowed |= any(event.mask & IN_Q_OVERFLOW for event in events)
                self._changed.notify_all()

    @property
    def count(self) -> int:
        """Closes so far; an overflow, after which nobody knows, fails the test."""
        with self._changed:
            assert not self._overflowed, f"the test's own watch on {self.path} overflowed"
            return self._count

    def wait(self, count: int, timeout: float = HANG) -> None:
        """Wait until there have been `count` closes; more fail the test, as far as they have been seen."""
        with self._changed:
            self._changed.wait_for(lambda: self._count >= count or self._overflowed, timeout)
        assert self.count == count, f"{self.path}: {self.count} closes instead of {count}"

    def wait_at_least(self, count: int, timeout: float = HANG) -> None:
        """Wait until there have been `count` closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._count >= count or self._overflowed, timeout)
        assert self.count >= count, f"{self.path}: {self.count} closes instead of {count}"

    def close(self) -> None:
        """End the thread."""
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)
        self._inotify.close()


@pytest.fixture
def watch() -> Iterator[Callable[[Path], Consumer]]:
    """Watch a state file that exists: `watch(path)` is a `Consumer`."""
    with ExitStack() as stack:

        def start(path: Path) -> Consumer:
            consumer = Consumer(path)
            stack.callback(consumer.close)
            return consumer

        yield start


class Tcpdump:
    """A running tcpdump that listens already; see pcap-savefile(5) for what it writes."""

    def __init__(self, namespace: Namespace, link: str) -> None:
        program = shutil.which("tcpdump")
        assert program, "this test needs tcpdump"
        command = [program, "-i", link, "-n", "-U", "--immediate-mode", "-w", "-"]
        start = functools.partial(
            subprocess.Popen[bytes], command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self.process = namespace.run(start)

    def wait_listening(self) -> None:
        """Wait until every packet will be seen."""
        assert self.process.stderr is not None
        said = b""
        while b"listening on" not in said:
            if not select.select([self.process.stderr], [], [], HANG)[0]:
                pytest.fail(f"tcpdump does not listen; it said: {said!r}")
            part = os.read(self.process.stderr.fileno(), 4096)
            assert part, f"tcpdump ended; it said: {said!r}"
            said += part
        self._read(24)

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        data = b""
        while len(data) < size:
            if not select.select([self.process.stdout], [], [], HANG)[0]:
                pytest.fail(f"tcpdump has seen no further packet within {HANG:g} s")
            part = os.read(self.process.stdout.fileno(), size - len(data))
            assert part, "tcpdump ended"
            data += part
        return data

    def packet(self) -> bytes:
        """The bytes of the next packet."""
        _seconds, _fraction, captured, length = struct.unpack("=IIII", self._read(16))
        assert captured == length
        return self._read(captured)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def tcpdump(cores: Cores) -> Iterator[Tcpdump]:
    """tcpdump on the link in core 1."""
    running = Tcpdump(cores.core1, cores.link)
    try:
        running.wait_listening()
        yield running
    finally:
        running.close()
