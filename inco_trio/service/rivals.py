"""Find the processes that use a link or an IRQ directory, to detect a second proxy."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import attrs

from inco_trio.control.client import sockets
from inco_trio.errors import IncoError
from inco_trio.frame import ETHERTYPE
from inco_trio.links.address import InterfaceAddress, UnixAddress
from inco_trio.links.opening import inside
from inco_trio.linux.capabilities import CAP_DAC_OVERRIDE
from inco_trio.linux.files import Resolver
from inco_trio.linux.if_packet import ETH_P_ALL
from inco_trio.linux.processes import (
    Process,
    Processes,
    is_beside,
    is_proxy_command,
    listening_sockets,
    look,
    named,
    packet_sockets,
    read,
    unix_sockets,
)
from inco_trio.proxy.others import OF_LINK, OF_TRIGGERS, REMEDY
from inco_trio.signals import Direction, Signal

__all__ = [
    "Rival",
    "Users",
    "rivals",
    "serving",
    "superfluous",
    "users_of",
    "users_of_interface",
    "users_of_socket",
    "watchers",
]
_REPORTED = 16
"""How many other proxies of a link or a directory are reported."""


@attrs.frozen
class Users:
    """The processes that have a link's sockets open."""

    proxies: tuple[Process, ...]
    """Processes whose command line runs a proxy, oldest first."""
    others: tuple[Process, ...]
    """Other processes, such as programs that use the library or only listen."""
    holders: tuple[Process, ...]
    """The fd stores that keep a socket of the link, of a running proxy or of a stopped service."""
    unseen: frozenset[int]
    """Inode numbers of the sockets whose processes this user is not permitted to inspect."""

    @property
    def keepers(self) -> tuple[Process, ...]:
        """The fd stores that keep the socket of `proxy`. The other fd stores keep the socket of a stopped service."""
        proxy = self.proxy
        return tuple(each for each in self.holders if proxy is not None and each.sockets & proxy.sockets)

    @property
    def proxy(self) -> Process | None:
        """The process that serves the link, if there is exactly one candidate."""
        if len(self.proxies) == 1:
            return self.proxies[0]
        return self.others[0] if not self.proxies and len(self.others) == 1 else None


@attrs.frozen
class Rival:
    """Another proxy that serves the link or the IRQ directory `subject` of a board."""

    board: int
    """The position of the board in the argument of `rivals`."""
    subject: str
    process: Process
    text: str
    is_link: bool

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def users_of_interface(index: int, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes with packet sockets of inco-trio's EtherType on the interface `index`.

    inco-trio's predecessor opens a socket for all EtherTypes. Ignore such sockets if other programs opened them.
    """
    inodes = packet_sockets(index, ETHERTYPE, root)
    for inode in packet_sockets(index, ETH_P_ALL, root):
        if any(process.is_proxy for process in processes.with_socket(inode)):
            inodes.append(inode)
    return _users(inodes, processes)


def users_of_socket(address: UnixAddress, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes that hold the socket bound to the path of a `unix:` link."""
    return _users(unix_sockets(address.local, root), processes)


def users_of(address: InterfaceAddress | UnixAddress, processes: Processes) -> Users:
    """Return the processes that use a link in this thread's network namespace. A missing link has no users."""
    if isinstance(address, UnixAddress):
        return users_of_socket(address, processes)
    try:
        return users_of_interface(socket.if_nametoindex(address.name), processes)
    except OSError:
        return Users((), (), (), frozenset())


def _users(inodes: Iterable[int], processes: Processes) -> Users:
    found: dict[int, Process] = {}
    unseen: set[int] = set()
    for inode in inodes:
        with_it = processes.with_socket(inode)
        found |= {process.pid: process for process in with_it}
        if not with_it:
            unseen.add(inode)
    ordered = sorted(found.values(), key=lambda process: (process.started, process.pid))
    users = [process for process in ordered if not process.is_holder]
    proxies, others = [tuple(process for process in users if process.is_proxy is ours) for ours in (True, False)]
    return Users(proxies, others, tuple(process for process in ordered if process.is_holder), frozenset(unseen))


def watchers(signals: Iterable[Signal], processes: Processes) -> list[Process]:
    """Return the processes that watch a trigger file of `signals` and may write to its directory, as a proxy must.

    Any user who may read a trigger file can watch it, in a process with the command line of a proxy.
    """
    found: dict[int, Process] = {}
    with closing(Resolver()) as resolver:
        for signal in signals:
            if signal.direction is not Direction.OUTBOUND:
                continue
            try:
                status = os.fstat(resolver.open(signal.path, follow=False))
                directory = os.fstat(resolver.open(signal.directory))
            except OSError:
                continue
            watching = processes.watching(status.st_dev, status.st_ino)
            found |= {process.pid: process for process in watching if _may_write(process, directory)}
    return [*found.values()]


def _may_write(process: Process, directory: os.stat_result) -> bool:
    """Return whether a process may create files in a directory."""
    in_group = directory.st_mode & stat.S_IWGRP and directory.st_gid in process.groups
    if process.uid in (0, directory.st_uid) or directory.st_mode & stat.S_IWOTH or in_group:
        return True
    # Any user has all capabilities in a user namespace of their own.
    maps = [read(Path(f"/proc/{who}/uid_map")) for who in (process.pid, "self")]
    return bool(process.capabilities >> CAP_DAC_OVERRIDE & 1) and maps[0] == maps[1]


def superfluous(proxies: Iterable[Process]) -> Process:
    """Return the proxy to stop if several are running: one without a supervisor, or without the usual control socket.

    A proxy without a supervisor is not restarted, and has no fd store. Then prefer a proxy of a single board, because
    the others also serve other boards, and then the oldest one.
    """

    def rank(each: Process) -> tuple[object, ...]:
        return bool(each.supervised), each.serves_boards, _reach(each), each.started, each.pid

    return min(proxies, key=rank)


def _reach(process: Process) -> int:
    """Return how well clients reach the control socket of a proxy: 0 if it has none, 3 if it has the usual path.

    If another process used the usual path, the name ends with the PID of the proxy.
    """
    if process.hidden:
        return 2
    paths = listening_sockets(process)
    if any(path in sockets() and not path.stem.endswith(f"-{process.pid}") for path in paths):
        return 3
    return 1 if paths else 0


def rivals(
    boards: Iterable[tuple[InterfaceAddress | UnixAddress, Path | None, Iterable[Signal]]],
) -> Iterator[Rival]:
    """Yield each other proxy that serves a link or a directory of this process.

    `boards` contains the link, the network namespace and the signals of each board.
    """
    processes = look(wanted=is_proxy_command)
    if all(process.pid == os.getpid() for process in processes.all):
        return
    for board, (address, netns, signals) in enumerate(boards):
        try:
            with inside(netns, address.name):
                sharing = serving(address, processes)
        except IncoError:
            continue  # The network namespace no longer exists, or this user cannot enter it.
        yield from _rival(board, address.name, sharing, OF_LINK)
        for directory in dict.fromkeys(signal.directory for signal in signals):
            watching = watchers((signal for signal in signals if signal.directory == directory), processes)
            yield from _rival(board, str(directory), watching, OF_TRIGGERS)


def serving(address: InterfaceAddress | UnixAddress, processes: Processes | None = None) -> list[Process]:
    """Return the proxies that serve a link in this thread's network namespace. `processes` may contain others, too."""
    processes = look(wanted=is_proxy_command) if processes is None else processes
    users = users_of(address, processes)
    found = list(users.proxies)
    # This user cannot inspect these processes, but every user can read their command lines. They may serve a link with
    # the same name in another network namespace. Therefore, require a socket in their namespace that belongs to no
    # other process.
    hidden = [each for each in processes.all if each.hidden and each.is_proxy and _names(address.name, each.command)]
    if hidden and users.unseen and (unseen := users_of(address, look()).unseen):
        found += [each for each in hidden if is_beside(each, unseen)]
    return found


def _names(link: str, command: Sequence[str]) -> bool:
    return any(word == link or word.startswith(f"unix:{link},") for word in command)


def _rival(board: int, subject: str, proxies: Sequence[Process], what: str) -> Iterator[Rival]:
    others = [process for process in proxies if process.pid != os.getpid()]
    stop = superfluous(proxies).stop if others else None
    remedy = REMEDY if stop is None else f"run: {stop}"
    # Another user can start any number of processes that look like proxies.
    for process in others[:_REPORTED]:
        text = f"process {named([process])} {what}: {remedy}"
        yield Rival(board, subject, process, text, is_link=what == OF_LINK)
