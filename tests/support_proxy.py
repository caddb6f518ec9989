"""Helpers for tests of a running proxy: a board's configuration, triggers, frames and descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from inco_trio.frame import BROADCAST, ETHERTYPE
from inco_trio.simulation.world import Namespace

__all__ = ["INBOUND", "OUTBOUND", "Cupboard", "frame", "mac_of", "sockets_of", "trigger", "write_udrv"]

INBOUND = {
    "ihub_reset_irq": "message_4_state",
    "ihub_hwwd_irq": "message_5_state",
    "ihub_type_b_irq": "message_2_state",
}
"""Map from the wire name of each inbound signal to its register."""
OUTBOUND = {
    "redun_notify_irq": "message_6_trig",
    "ihub_crash_log_irq": "message_0_trig",
    "ihub_uart_irq": "message_1_trig",
}
"""Map from the wire name of each outbound signal to its register."""


ADD_USER = """
{ cat /etc/passwd; echo inco-trio:x:2147:2147::/:/usr/sbin/nologin; } > passwd.test
mount --bind passwd.test /etc/passwd
"""
"""Shell lines that add the user inco-trio inside a mount namespace."""


class Cupboard:
    """An fd store in this process. `heir()` returns the store from which the next proxy inherits the descriptors."""

    supervisor: str | None = "a test"

    def __init__(self, inherited: dict[str, int] | None = None) -> None:
        self.inherited = inherited or {}
        self.kept = {name: os.dup(fd) for name, fd in self.inherited.items()}
        self.stored: list[str] = []

    def store(self, name: str, fd: int) -> None:
        self.stored.append(name)
        if name in self.kept:
            os.close(self.kept[name])
        self.kept[name] = os.dup(fd)

    def remove(self, name: str) -> None:
        os.close(self.kept.pop(name))

    def heir(self) -> Cupboard:
        return Cupboard(self.kept)

    def close(self) -> None:
        for fd in self.kept.values():
            os.close(fd)


def write_udrv(
    path: Path,
    directory: Path,
    inbound: Mapping[str, str] = INBOUND,
    outbound: Mapping[str, str] = OUTBOUND,
) -> Path:
    """Write a udrv.json with these signals to `path`, replacing an existing file; return `path`."""
    signals = {
        name: {"direction": direction, "reg": f"ihub-irq-dev.{register}"}
        for direction, table in (("inbound", inbound), ("outbound", outbound))
        for name, register in table.items()
    }
    board = {"file": {"ihub-irq-dev": {"path": str(directory)}}, "misc": {"inco_proxy": {"signals": signals}}}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(board))
    return new.rename(path)


def trigger(path: Path) -> None:
    """Write to a trigger file and close it, as an application does."""
    with path.open("w") as register:
        register.write("1")


def frame(source: bytes, payload: bytes, ethertype: int = ETHERTYPE) -> bytes:
    """Return a broadcast frame from the MAC address `source`."""
    return BROADCAST + source + ethertype.to_bytes(2, "big") + payload


def mac_of(namespace: Namespace, interface: str) -> bytes:
    """Return the six bytes of the interface's MAC address."""

    def inside() -> bytes:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind((interface, 0))
            address: bytes = sock.getsockname()[4]
            return address

    return namespace.run(inside)


def sockets_of(pid: int) -> set[str]:
    """Return the open sockets of a process as `socket:[INODE]`."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # The process might have closed the descriptor since the directory was listed.
        with contextlib.suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return {link for link in found if link.startswith("socket:")}


def thread_count() -> int:
    """Return the number of threads, without idle threads that Trio ends after 10 s."""
    return sum(not thread.name.startswith("Trio thread ") for thread in threading.enumerate())
