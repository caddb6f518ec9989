"""Checks of the processes that use a link or a directory, of stored descriptors and of outdated configurations."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import attrs

from inco_trio.doctor.processes import Process, Processes, named, packet_sockets, unix_sockets
from inco_trio.doctor.result import Result, fail, ok, warn
from inco_trio.frame import ETHERTYPE
from inco_trio.links.address import UnixAddress
from inco_trio.linux.if_packet import ETH_P_ALL
from inco_trio.signals import Direction, Signal

__all__ = [
    "Users",
    "configuration",
    "descriptors",
    "users_of_directory",
    "users_of_interface",
    "users_of_link",
    "users_of_socket",
]


@attrs.frozen
class Users:
    """The processes that have sockets of a link open."""

    proxies: tuple[Process, ...]
    """Processes whose command runs a proxy, the oldest first."""
    others: tuple[Process, ...]
    """Other processes, such as programs that use the library or only listen."""
    holders: tuple[Process, ...]
    unseen: int
    """Number of sockets of processes that this user may not inspect."""

    @property
    def proxy(self) -> Process | None:
        """The process that serves the link, if there is exactly one candidate."""
        if len(self.proxies) == 1:
            return self.proxies[0]
        return self.others[0] if not self.proxies and len(self.others) == 1 else None


def users_of_interface(index: int, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes with packet sockets of our EtherType on the interface `index`.

    inco-trio's predecessor opens a socket for all EtherTypes. Ignore such sockets of other programs.
    """
    inodes = packet_sockets(index, ETHERTYPE, root)
    for inode in packet_sockets(index, ETH_P_ALL, root):
        if any(process.is_proxy for process in processes.with_socket(inode)):
            inodes.append(inode)
    return _users(inodes, processes)


def users_of_socket(address: UnixAddress, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes that hold the socket bound to the path of a `unix:` link."""
    return _users(unix_sockets(address.local, root), processes)


def _users(inodes: Iterable[int], processes: Processes) -> Users:
    found: dict[int, Process] = {}
    unseen = 0
    for inode in inodes:
        with_it = processes.with_socket(inode)
        found |= {process.pid: process for process in with_it}
        unseen += not with_it
    ordered = sorted(found.values(), key=lambda process: (process.started, process.pid))
    users = [process for process in ordered if not process.is_holder]
    proxies, others = [tuple(process for process in users if process.is_proxy is ours) for ours in (True, False)]
    return Users(proxies, others, tuple(process for process in ordered if process.is_holder), unseen)


def users_of_link(link: str, users: Users, start: str | None = None) -> Iterator[Result]:
    """Check that exactly one proxy serves the link. `start` is the command that starts a proxy."""
    if users.unseen:
        text = "a process that this user may not inspect has a socket of this link; only root can see which one"
        yield warn("proxy", link, text, f"sudo inco-trio doctor {shlex.quote(link)}")
    yield from _check_alone(link, (*users.proxies, *users.others), "serves the link", "receives each frame")
    if not users.unseen and not users.proxies and not users.others:
        kept = f"; {named(list(users.holders))} keeps notifications for the next proxy" if users.holders else ""
        yield warn("proxy", link, f"no proxy serves this link{kept}", start or f"inco-trio run {shlex.quote(link)}")


def users_of_directory(directory: Path, signals: Iterable[Signal], processes: Processes) -> Iterator[Result]:
    """Check that no two proxies watch the trigger files of a directory."""
    found: dict[int, Process] = {}
    for signal in signals:
        if signal.direction is Direction.OUTBOUND:
            try:
                status = signal.path.lstat()
            except OSError:
                continue
            found |= {p.pid: p for p in processes.watching(status.st_dev, status.st_ino) if p.pid != os.getpid()}
    yield from _check_alone(str(directory), found.values(), "watches its triggers", "sends each notification")


def _check_alone(subject: str, processes: Iterable[Process], does: str, harm: str) -> Iterator[Result]:
    """Check that only one process uses `subject`. `does` is its work; `harm` is what each of several proxies does."""
    everyone = sorted(processes, key=lambda process: (not process.is_proxy, process.started, process.pid))
    proxies = [process for process in everyone if process.is_proxy]
    if len(proxies) > 1:
        text = f"{len(proxies)} proxies: {named(proxies)}: each {harm}"
        yield fail("proxy", subject, text, f"kill {proxies[-1].pid}")
    elif len(everyone) > 1:
        text = f"several processes use it: {named(everyone)}: if two are proxies, each {harm}"
        yield warn("proxy", subject, text)
    elif everyone:
        yield ok("proxy", subject, f"only process {named(everyone)} {does}")


def descriptors(link: str, users: Users, processes: Processes) -> Iterator[Result]:
    """Check that an fd store keeps the proxy's socket, so that no notifications are lost during a restart."""
    proxy = users.proxy
    if proxy is None:
        return
    if users.holders:
        yield ok("descriptors", link, f"process {named(list(users.holders))} keeps its socket while the proxy restarts")
    elif processes.unseen:
        text = "this user cannot see whether an fd store keeps its socket while the proxy restarts"
        yield warn("descriptors", link, text, f"sudo inco-trio doctor {shlex.quote(link)}")
    elif _value_of("--fd-holder", proxy.command) is not None:
        text = f"process {proxy.pid} was started with --fd-holder, but no fd store has its socket: see the proxy's log"
        yield fail("descriptors", link, text)
    else:
        text = "no fd store keeps its socket: notifications that arrive while the proxy restarts are lost"
        config = _value_of("--config", proxy.command)
        option = "" if config is None else f" --config {shlex.quote(config)}"
        yield warn("descriptors", link, text, f"inco-trio s6 /run/service --iface {shlex.quote(link)}{option}")


def _value_of(option: str, command: Sequence[str]) -> str | None:
    """Return the value of an option in a command line, or None."""
    for word, following in pairwise([*command, ""]):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else following
    return None


def configuration(path: Path, proxy: Process, read_at: float | None = None) -> Iterator[Result]:
    """Check that a proxy has read the current version of its configuration file.

    `read_at` is the time of the last read in seconds since 1970 (default: the start of the process).
    """
    try:
        changed = path.stat().st_mtime
    except OSError:
        return
    if changed > (proxy.started if read_at is None else read_at):
        text = f"changed after process {proxy.pid} "
        text += "started: unless reloaded since, the proxy uses the old version" if read_at is None else "read it"
        yield warn("reload", path, text, f"kill -HUP {proxy.pid}")
    else:
        yield ok("reload", path, f"process {proxy.pid} has read the current version")
