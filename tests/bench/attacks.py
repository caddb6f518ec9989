"""Attacks on a proxy while its latency is measured.

usage: python -m tests.bench.attacks ATTACK LINK DIRECTORY CONTROL

The program prints a line when the attack has begun, and continues the attack until it is terminated.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from inco_trio.control.protocol import LINE_MAX
from inco_trio.frame import BROADCAST, ETHERTYPE, encode
from inco_trio.linux.libc import libc

__all__ = ["ATTACKS", "FROM_CORE1"]

RATE = 50_000
"""Rate of a flood in frames per second."""
BLOCK = 100
"""Number of frames that a flood sends at once."""
LISTENERS = 32
FILES = 200
USERS = 60_000


def flood(payload: bytes, link: str) -> Iterator[None]:
    """Send RATE frames per second."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((link, ETHERTYPE))
        head = encode(b"x", sock.getsockname()[4])[:-1]
        assert head.startswith(BROADCAST)
        due = time.monotonic()
        while True:
            for _ in range(BLOCK):
                sock.send(head + payload)
            due += BLOCK / RATE
            time.sleep(max(0.0, due - time.monotonic()))  # Limit the rate of the attack.
            yield


def connected(control: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(control)
    return sock


def clients(control: str) -> Iterator[None]:
    """Connect, read the greeting and disconnect, repeatedly and without a pause."""
    while True:
        with connected(control) as sock:
            sock.recv(4096)
        yield


def listeners(control: str) -> Iterator[None]:
    """Open many monitors that never read."""
    with contextlib.ExitStack() as stack:
        for _ in range(LISTENERS):
            stack.enter_context(connected(control)).sendall(b'{"request": "monitor", "frames": true}\n')
        while True:
            yield
            time.sleep(1)  # The clients of this attack never read.


def lines(control: str) -> Iterator[None]:
    """Send lines that never end."""
    while True:
        with connected(control) as sock, contextlib.suppress(OSError):
            while True:
                sock.sendall(b"x" * 16_384)
                yield


def log_lines(control: str) -> Iterator[None]:
    """Send lines that are too long, each as a different user, because the proxy logs this limit once per user."""
    for user in itertools.cycle(range(1, USERS)):
        os.seteuid(user)
        libc.setfsuid(0)  # Access the socket file as root, although another user connects (credentials(7)).
        with connected(control) as sock, contextlib.suppress(OSError):
            os.seteuid(0)
            sock.sendall(bytes(LINE_MAX + 1))
            while sock.recv(4096):
                pass
        yield


def scrapes(control: str) -> Iterator[None]:
    """Request the status repeatedly and without a pause, as many exporters would."""
    with connected(control) as sock, sock.makefile("rb") as replies:
        replies.readline()
        while True:
            sock.sendall(b'{"request": "status"}\n')
            replies.readline()
            yield


def files(directory: str) -> Iterator[None]:
    """Create and remove files in the IRQ directory without a pause."""
    while True:
        paths = [Path(directory, f"other_{number}") for number in range(FILES)]
        for path in paths:
            path.touch()
        for path in paths:
            path.unlink()
        yield


ATTACKS: dict[str, Callable[[str, str, str], Iterator[None]]] = {
    "unknown frames": lambda link, _directory, _control: flood(b"stranger", link),
    "malformed frames": lambda link, _directory, _control: flood(b"\xff\0", link),
    "clients": lambda _link, _directory, control: clients(control),
    "monitors that do not read": lambda _link, _directory, control: listeners(control),
    "endless lines": lambda _link, _directory, control: lines(control),
    "log lines": lambda _link, _directory, control: log_lines(control),
    "scrapes": lambda _link, _directory, control: scrapes(control),
    "files in the directory": lambda _link, directory, _control: files(directory),
}
FROM_CORE1 = frozenset({"unknown frames", "malformed frames"})
"""Attacks that come from core 1, over the link."""


def main() -> None:
    os.nice(5)  # Prefer the proxy: the benchmark measures the attack's effect, not the competition for the CPU.
    steps = ATTACKS[sys.argv[1]](*sys.argv[2:])
    next(steps)
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    for _ in steps:
        pass


if __name__ == "__main__":
    main()
