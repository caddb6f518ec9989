"""Where the demonstration takes place: two cores and the link between them, made in one of three ways."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import attrs

from inco_trio.errors import InvalidArgumentError
from inco_trio.frame import encode
from inco_trio.links.address import address_fault
from inco_trio.simulation.guest import Guest, Wait, unix_netdev
from inco_trio.simulation.world import Peer, two_cores

__all__ = ["Core1", "Stage", "namespaces", "qemu", "sockets"]

_PATIENCE = 1.0
"""Seconds for which a frame waits for room; the queue of a socket has more than the demonstration needs, as a rule."""


class Core1(Protocol):
    """Core 1 as played by the demonstration."""

    def fileno(self) -> int:
        """A descriptor that is readable when a frame waits."""

    def send(self, name: bytes) -> None:
        """Send a signal."""

    def receive(self) -> bytes:
        """The next whole frame."""


def _stay() -> None:
    """Core 0 is where this process is."""


@attrs.frozen
class Stage:
    """Two cores and their link; `about` is what a person reads of them."""

    link: str
    """As `inco-trio run` takes it."""
    about: str
    enter: Callable[[], None] = _stay
    """Moves a process that is starting into core 0."""
    peer: Core1 | None = None
    """Core 1, or None where that is `guest`, which answers by itself."""
    guest: Guest | None = None
    answers: Mapping[str, str] = attrs.Factory(dict)
    """The inbound signal by which `guest` answers each outbound one."""


@contextlib.contextmanager
def namespaces(_directory: Path, _wait: Wait) -> Iterator[Stage]:
    """Two network namespaces and a veth pair. Raises what `two_cores` raises."""
    with two_cores() as cores, Peer(cores) as peer:
        yield Stage(cores.link, f"Two cores (network namespaces), joined by {cores.link}", cores.core0.enter, peer)


def _address(local: Path, remote: Path) -> str:
    link = "unix:" + ",peer=".join(str(path).replace(",", ",,") for path in (local, remote))
    if fault := address_fault(link):
        raise InvalidArgumentError(f"there can be no link in the directory for temporary files (TMPDIR): {fault}")
    return link


class _SocketPeer:
    """Core 1 as a Unix datagram socket bound at `local`, whose frames go to whoever is bound at `remote`."""

    _MAC = bytes.fromhex("020000000001")

    def __init__(self, local: Path, remote: Path) -> None:
        self._remote = str(remote)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(local))
        self._socket.settimeout(_PATIENCE)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, name: bytes) -> None:
        # As on a wire: what nobody takes is lost, and counted so.
        with contextlib.suppress(OSError):
            self._socket.sendto(encode(name, self._MAC), self._remote)

    def receive(self) -> bytes:
        return self._socket.recv(65535)

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def sockets(directory: Path, _wait: Wait) -> Iterator[Stage]:
    """Two Unix datagram sockets in `directory`, without privilege. Raises InvalidArgumentError for a long path."""
    core0, core1 = directory / "core0", directory / "core1"
    link = _address(core0, core1)
    with contextlib.closing(_SocketPeer(core1, core0)) as peer:
        yield Stage(link, "Two cores, joined by a pair of Unix sockets", peer=peer)


@contextlib.contextmanager
def qemu(directory: Path, wait: Wait, answers: Mapping[str, str]) -> Iterator[Stage]:
    """Core 1 as a guest of QEMU, which has started; the link is a pair of Unix datagram sockets in `directory`.

    Raises GuestError, InvalidArgumentError if the path is too long, and what `wait` raises.
    """
    core0, core1 = directory / "core0", directory / "core1"
    link = _address(core0, core1)
    rules = "echo=" + ",".join(f"{name}:{answer}" for name, answer in answers.items())
    # QEMU would lose what it is sent before the guest has started its card: the proxy comes after that.
    with Guest(unix_netdev(core1, core0), rules, log=directory / "guest.log", wait=wait) as guest:
        about = f"Core 1 is RISC-V firmware in QEMU (process {guest.pid}), joined by a pair of Unix sockets"
        yield Stage(link, about, guest=guest, answers=answers)
