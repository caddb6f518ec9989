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
    """Other processes: programs that use the library, or that listen."""
    holders: tuple[Process, ...]
    unseen: int
    """Sockets of processes that this user may not inspect."""

    @property
    def proxy(self) -> Process | None:
        """The process that serves the link, if there is exactly one candidate."""
        if len(self.proxies) == 1:
            return self.proxies[0]
        return self.others[0] if not self.proxies and len(self.others) == 1 else None


def users_of_interface(index: int, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes with packet sockets of our EtherType on the interface with that index.

    The predecessor of inco-trio has a socket of all EtherTypes. So do many unrelated programs, which are left out.
    """
    inodes = packet_sockets(index, ETHERTYPE, root)
    for inode in packet_sockets(index, ETH_P_ALL, root):
        if any(process.is_proxy for process in processes.with_socket(inode)):
            inodes.append(inode)
    return _users(inodes, processes)


def users_of_socket(address: UnixAddress, processes: Processes, root: Path = Path("/")) -> Users:
    """Return the processes with the socket that is bound at the path of a `unix:` link."""
    return _users(unix_sockets(address.local, root), processes)


def _users(inodes: Iterable[int], processes: Processes) -> Users:
    found: dict[int, Process] = {}
    unseen = 0
    for inode in inodes:
        with_it = processes.with_socket(inode)
        found |= {process.pid: process for process in with_it}
        unseen += not with_it
    ordered = sorted(found.values(), key=lambda process: (process.started, process.pid))
    return Users(
        tuple(process for process in ordered if process.is_proxy and not process.is_holder),
        tuple(process for process in ordered if not process.is_proxy and not process.is_holder),
        tuple(process for process in ordered if process.is_holder),
        unseen,
    )


def users_of_link(link: str, users: Users, start: str | None = None) -> Iterator[Result]:
    """Check that exactly one proxy serves the link; `start` is the command that starts one."""
    again = f"inco-trio doctor {shlex.quote(link)}"
    if users.unseen:
        text = "a process that this user may not inspect has a socket of it"
        yield warn("proxy", link, f"{text}; root can find out which", f"sudo {again}")
    yield from _crowd(link, [*users.proxies], [*users.others], "carries it", "takes each frame")
    if not users.unseen and not users.proxies and not users.others:
        kept = f"; {named(list(users.holders))} keeps notifications for the next one" if users.holders else ""
        yield warn("proxy", link, f"no proxy runs on it{kept}", start or f"inco-trio run {shlex.quote(link)}")


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
    ordered = sorted(found.values(), key=lambda process: (process.started, process.pid))
    proxies = [process for process in ordered if process.is_proxy]
    yield from _crowd(
        str(directory),
        proxies,
        [process for process in ordered if process not in proxies],
        "watches its triggers",
        "sends each notification",
    )


def _crowd(subject: str, proxies: list[Process], others: list[Process], does: str, harm: str) -> Iterator[Result]:
    """Check that one of the processes is the proxy. `does` and `harm` say what each of them does."""
    everyone = [*proxies, *others]
    if len(proxies) > 1:
        text = f"{len(proxies)} proxies: {named(proxies)}: each of them {harm}"
        yield fail("proxy", subject, text, f"kill {proxies[-1].pid}")
    elif len(everyone) > 1:
        text = f"several processes have it open: {named(everyone)}: of two proxies, each {harm}"
        yield warn("proxy", subject, text)
    elif everyone:
        yield ok("proxy", subject, f"process {named(everyone)} {does}, and no other process")


def descriptors(link: str, users: Users, processes: Processes) -> Iterator[Result]:
    """Check that an fd store keeps the descriptors of the proxy, so that its restart loses nothing.

    If it does, s6-fdholder-daemon or systemd has the same socket open.
    """
    proxy = users.proxy
    if proxy is None:
        return
    if users.holders:
        text = f"process {named(list(users.holders))} keeps its socket over a restart of the proxy"
        yield ok("descriptors", link, text)
    elif processes.unseen:
        text = "this user cannot see whether an fd store keeps its socket over a restart"
        yield warn("descriptors", link, text, f"sudo inco-trio doctor {shlex.quote(link)}")
    elif _value_of("--fd-holder", proxy.command) is not None:
        text = f"process {proxy.pid} was started with --fd-holder, but no fd store has its socket: see its log"
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
    """Check that a proxy has read its configuration since the file changed.

    `read_at` is when it read the file last (seconds since 1970), which only the proxy knows. None stands for the start
    of the process, although the proxy may have reloaded since.
    """
    try:
        changed = path.stat().st_mtime
    except OSError:
        return
    if changed > (proxy.started if read_at is None else read_at):
        text = f"was changed after process {proxy.pid} "
        text += "started: without a reload since, the proxy uses the old one" if read_at is None else "read it"
        yield warn("reload", path, text, f"kill -HUP {proxy.pid}")
    else:
        yield ok("reload", path, f"process {proxy.pid} has read it since it was changed")
