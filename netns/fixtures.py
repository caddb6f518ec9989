"""Pytest fixtures based on `inco_trio.simulation.world`. tests/conftest.py loads them."""

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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from inco_trio.cores.watch import Watch
from inco_trio.errors import IncoError
from inco_trio.linux.rtnetlink import RTMGRP_LINK
from inco_trio.service.launch import Launched, Wait, wait_readable
from inco_trio.signals import Direction, Signal
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores, veth
from netns.hang import HANG
from netns.unprivileged import cover_run

__all__ = ["Canary", "Consumer", "Proxy", "StartProxy", "Tcpdump"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "netns: needs network namespaces: root, or a user namespace around pytest")
    # Give each pytest process a private /run/inco-trio, so that parallel runs do not see each other's control sockets.
    if os.geteuid() != 0:
        directory = tempfile.TemporaryDirectory(prefix="inco-trio-")
        config.add_cleanup(directory.cleanup)
        os.environ["XDG_RUNTIME_DIR"] = directory.name
    else:
        # Without CAP_SYS_ADMIN, only the unit tests run, and they do not share socket names.
        with contextlib.suppress(PermissionError):
            cover_run()


@pytest.fixture
def cores() -> Iterator[Cores]:
    """Create two cores, connected by a running link."""
    with two_cores() as made:
        yield made


@pytest.fixture
def core1(cores: Cores) -> Iterator[Peer]:
    """Open core 1's end of the link for the test."""
    with cores.peer() as peer:
        yield peer


class Canary:
    """A veth pair with one end in a network namespace. It disappears when the kernel destroys the namespace."""

    def __init__(self, fd: int) -> None:
        self._own = Namespace()
        veth(self._own, "canary", Namespace(fd), "canary")
        self._changes = self._own.run(functools.partial(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW))
        self._changes.bind((0, RTMGRP_LINK))

    def wait_gone(self) -> None:
        """Wait until the namespace has been destroyed."""
        while "canary" in (name for _, name in self._own.run(socket.if_nameindex)):
            if not select.select([self._changes], [], [], HANG)[0]:
                pytest.fail("the namespace still exists")
            self._changes.recv(65536)

    def close(self) -> None:
        self._changes.close()
        self._own.close()


@pytest.fixture
def canary() -> Iterator[Callable[[int], Canary]]:
    """Return a function `canary(fd)` that returns a `Canary` for a namespace without keeping the namespace alive."""
    with ExitStack() as stack:

        def start(fd: int) -> Canary:
            made = Canary(fd)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def nobody() -> list[str]:
    """Return a command prefix that runs a program as an ordinary user, with access to Python and the project."""
    project = Path(__file__).parents[1]
    return [sys.executable, str(project / "netns/unprivileged.py"), sys.prefix, sys.base_prefix, str(project), "--"]


@pytest.fixture
def irq_dir(tmp_path: Path) -> Path:
    """Return the path of the IRQ directory, which the proxy creates."""
    return tmp_path / "irq"


class Proxy(Launched):
    """`inco-trio run` in a network namespace, or in the current one. A wait that takes too long fails the test."""

    def __init__(
        self,
        namespace: Namespace | None,
        arguments: Sequence[str | Path],
        environment: Mapping[str, str],
        log: Path,
        prefix: Sequence[str] = (),
    ) -> None:
        # Run nsenter before `prefix`, which can drop the capability that nsenter needs.
        enter = () if namespace is None else ("nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace.fd}", "--")
        super().__init__("run", *arguments, log=log, environment=environment, prefix=[*enter, *prefix])

    def _fail(self, what: str) -> NoReturn:
        pytest.fail(f"{what}; the proxy (pid {self.pid}, exit code {self.process.poll()}) logged:\n{self.log}")

    def wait_ready(self, timeout: float = HANG, wait: Wait = wait_readable) -> bool:
        return super().wait_ready(timeout, wait) or self._fail(f"not ready after {timeout:g} s, or has ended")

    def wait_log(self, text: str, timeout: float = HANG, *, after: int = 0) -> str:
        return super().wait_log(text, timeout, after=after) or self._fail(f"{text!r} not logged")

    def counters(self) -> dict[str, int]:
        """Return the counters, which the proxy logs after SIGUSR1."""
        logged = len(self.log)
        self.process.send_signal(signal.SIGUSR1)
        record: dict[str, Any] = json.loads(self.wait_log('"statistics"', after=logged))
        return {name: value for name, value in record.items() if type(value) is int}

    def wait(self) -> int:
        """Wait until the proxy has ended. Return the exit code (negative if a signal killed the proxy)."""
        try:
            return self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self._fail(f"not ended within {HANG:g} s")

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = HANG) -> int:
        return super().stop(number, timeout=timeout)  # The caller chooses the timeout (default: HANG).

    def close(self) -> None:
        """Stop the proxy, even if a failed test has left it suspended."""
        self.process.send_signal(signal.SIGCONT)
        super().close()


StartProxy = Callable[..., Proxy]


@pytest.fixture
def proxy(cores: Cores, tmp_path: Path) -> Iterator[StartProxy]:
    """Return a function that starts the proxy: `proxy(*arguments, env={...}, core=cores.core0, ready=True)`.

    The proxy uses the link of `cores` and a JSON log. With `ready=False`, the function does not wait until the proxy is
    ready. If the test fails, pytest shows the log of each proxy.
    """
    with ExitStack() as stack:

        def start(
            *arguments: str | Path,
            env: Mapping[str, str] | None = None,
            core: Namespace | None = None,
            prefix: Sequence[str] = (),
            ready: bool = True,
        ) -> Proxy:
            log = tmp_path / f"proxy-{len(started)}.log"
            command = [cores.link, "--log-format", "json", *map(str, arguments)]
            made = Proxy(core or cores.core0, command, env or {}, log, prefix)
            started.append(made)
            stack.callback(made.close)
            if ready:
                made.wait_ready()
            return made

        started: list[Proxy] = []
        yield start
    for made in started:
        sys.stderr.write(f"proxy {made.pid} ended with {made.process.returncode}; it logged:\n{made.log}")


class Consumer:
    """A counter of the notifications that an application sees in one or more state files.

    A thread reads continuously, because the kernel queues at most 16,384 events. All files share one inotify instance,
    because a user can have only 128.
    """

    def __init__(self, *paths: Path) -> None:
        self.path = paths[0]
        self.each = Counter[str]()
        """The number of notifications in each file, keyed by file name."""
        self._watch = Watch()
        signals = [Signal("state", Direction.INBOUND, path.parent, path.name) for path in paths]
        self._watch.follow(signals, self._report)
        self._stop_read, self._stop_write = os.pipe()
        self._changed = threading.Condition()
        self._count = 0
        self._failure: IncoError | None = None
        self._thread = threading.Thread(target=self._read, name=f"consumer of {self.path.name}")
        self._thread.start()

    def _read(self) -> None:
        while self._stop_read not in select.select([self._watch.fileno(), self._stop_read], [], [])[0]:
            with self._changed:
                self._watch.drain()
                self._changed.notify_all()

    def _report(self, what: Signal | IncoError) -> None:
        if isinstance(what, IncoError):
            self._failure = what
        else:
            self._count += 1
            self.each[what.register] += 1

    @property
    def count(self) -> int:
        """The number of notifications so far. Reading it fails the test if the kernel's event queue has overflowed."""
        with self._changed:
            assert self._failure is None, f"{self.path}: {self._failure}"
            return self._count

    def wait(self, count: int, timeout: float = HANG) -> None:
        """Wait for `count` notifications. Fail the test if more than `count` have arrived by then."""
        self.wait_at_least(count, timeout)
        assert self.count == count, f"{self.path}: {self.count} notifications instead of {count}"

    def wait_at_least(self, count: int, timeout: float = HANG) -> None:
        """Wait for `count` notifications or more."""
        with self._changed:
            self._changed.wait_for(lambda: self._count >= count or self._failure is not None, timeout)
        assert self.count >= count, f"{self.path}: {self.count} notifications instead of {count}"

    def close(self) -> None:
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)
        self._watch.close()


@pytest.fixture
def watch() -> Iterator[Callable[[Path], Consumer]]:
    """Return a function that watches an existing state file: `watch(path)` returns a `Consumer`."""
    with ExitStack() as stack:

        def start(path: Path) -> Consumer:
            consumer = Consumer(path)
            stack.callback(consumer.close)
            return consumer

        yield start


class Tcpdump:
    """A running tcpdump; see pcap-savefile(5) for its output format."""

    def __init__(self, namespace: Namespace, link: str) -> None:
        program = shutil.which("tcpdump")
        assert program, "this test needs tcpdump"
        command = [program, "-i", link, "-n", "-U", "--immediate-mode", "-w", "-"]
        start = functools.partial(
            subprocess.Popen[bytes], command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self.process = namespace.run(start)

    def wait_listening(self) -> None:
        """Wait until tcpdump receives packets, and skip the file header."""
        assert self.process.stderr is not None
        output = b""
        while b"listening on" not in output:
            if not select.select([self.process.stderr], [], [], HANG)[0]:
                pytest.fail(f"tcpdump does not listen; it printed: {output!r}")
            part = os.read(self.process.stderr.fileno(), 4096)
            assert part, f"tcpdump ended; it printed: {output!r}"
            output += part
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
        """Return the next packet."""
        _seconds, _fraction, captured, length = struct.unpack("=IIII", self._read(16))
        assert captured == length
        return self._read(captured)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def tcpdump(cores: Cores) -> Iterator[Tcpdump]:
    """Run tcpdump on core 1's end of the link."""
    running = Tcpdump(cores.core1, cores.link)
    try:
        running.wait_listening()
        yield running
    finally:
        running.close()
