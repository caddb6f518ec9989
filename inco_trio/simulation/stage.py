"""The two cores of the demonstration and their link: network namespaces, Unix sockets or a QEMU guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from inco_trio.cores.peer import Peer
from inco_trio.errors import InvalidArgumentError
from inco_trio.links.address import address_fault
from inco_trio.service.launch import Wait
from inco_trio.simulation.guest import Guest, unix_netdev
from inco_trio.simulation.world import two_cores

__all__ = ["Stage", "namespaces", "qemu", "sockets"]


@attrs.frozen
class Stage:
    """Two cores and their link."""

    link: str
    """The address of the link, for `inco-trio run`."""
    about: str
    """The description of the cores and their link that the demonstration prints."""
    netns: int | None = None
    """The network namespace of core 0, or None for the current one."""
    peer: Peer | None = None
    """Core 1, or None if `guest` is core 1."""
    guest: Guest | None = None
    answers: Mapping[str, str] = attrs.Factory(dict)
    """For each outbound signal, the inbound signal that `guest` sends as the answer."""


@contextlib.contextmanager
def namespaces(_directory: Path, _wait: Wait) -> Iterator[Stage]:
    """Set up two network namespaces and a veth pair. Raises the same errors as `two_cores`."""
    with two_cores() as cores, cores.peer() as peer:
        yield Stage(cores.link, f"Two cores (network namespaces), joined by {cores.link}", cores.core0.fd, peer)


def _address(local: Path, remote: Path) -> str:
    link = "unix:" + ",peer=".join(str(path).replace(",", ",,") for path in (local, remote))
    if fault := address_fault(link):
        raise InvalidArgumentError(f"TMPDIR: cannot create the link's sockets in this directory: {fault}")
    return link


@contextlib.contextmanager
def sockets(directory: Path, _wait: Wait) -> Iterator[Stage]:
    """Set up two Unix datagram sockets in `directory`. Raises InvalidArgumentError if a socket's path is too long."""
    core0, core1 = directory / "core0", directory / "core1"
    link = _address(core0, core1)
    with Peer(_address(core1, core0)) as peer:
        yield Stage(link, "Two cores, joined by a pair of Unix sockets", peer=peer)


@contextlib.contextmanager
def qemu(directory: Path, wait: Wait, answers: Mapping[str, str]) -> Iterator[Stage]:
    """Start a QEMU guest as core 1, linked by Unix sockets in `directory`. Raises GuestError, InvalidArgumentError."""
    core0, core1 = directory / "core0", directory / "core1"
    link = _address(core0, core1)
    rules = "echo=" + ",".join(f"{name}:{answer}" for name, answer in answers.items())
    # Start the guest before the proxy: QEMU loses frames that arrive before the guest's network card works.
    with Guest(unix_netdev(core1, core0), rules, log=directory / "guest.log", wait=wait) as guest:
        about = f"Core 1 is RISC-V firmware in QEMU (process {guest.pid}), joined by a pair of Unix sockets"
        yield Stage(link, about, guest=guest, answers=answers)
