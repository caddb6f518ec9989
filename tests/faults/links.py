"""Functions that change the link between the cores and inspect its state."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from inco_trio.frame import ETHERTYPE
from inco_trio.simulation.world import Cores, Peer, veth
from netns.hang import HANG

__all__ = ["command", "mac", "make_again", "wait_bound"]


def command(cores: Cores, *words: str) -> str:
    """Run `ip` or `tc` in core 0, and return its output."""
    done = cores.core0.run(lambda: subprocess.run(words, check=True, capture_output=True, text=True))
    return done.stdout


def make_again(cores: Cores, peer: Peer, before: Callable[[], None] = lambda: None) -> None:
    """Recreate the deleted link. Core 0 can send only once core 1 is listening and `before` has run."""
    veth(cores.core0, cores.link, cores.core1, cores.link)
    cores.core1.run(lambda: subprocess.run(["ip", "link", "set", cores.link, "up"], check=True))
    peer.rebind()
    before()
    cores.link_up()


def wait_bound(cores: Cores, sockets: int = 1) -> None:
    """Wait until `sockets` packet sockets are bound to the link."""

    def bound() -> int:
        index = socket.if_nametoindex(cores.link)
        rows = [row.split() for row in Path("/proc/thread-self/net/packet").read_text().splitlines()[1:]]
        return sum(int(row[4]) == index and row[3] == f"{ETHERTYPE:04x}" for row in rows)

    deadline = time.monotonic() + HANG
    while cores.core0.run(bound) < sockets:
        assert time.monotonic() < deadline, "the proxy has not bound its socket to the new link"
        time.sleep(0.002)  # Poll, because the kernel does not report a bind.


def mac(cores: Cores) -> bytes:
    """Return the MAC address of core 0's interface."""
    words = command(cores, "ip", "-o", "link", "show", cores.link).split()
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))
