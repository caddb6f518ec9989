"""All checks of `inco-trio doctor`, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from inco_trio.doctor import links, machine, proxies, register_files
from inco_trio.doctor.answers import Answers
from inco_trio.doctor.result import Result, fail
from inco_trio.errors import IncoError
from inco_trio.links.address import InterfaceAddress, UnixAddress, parse_address
from inco_trio.links.opening import inside
from inco_trio.linux.processes import Process, Processes
from inco_trio.linux.users import find_owner
from inco_trio.registers.trust import Trust
from inco_trio.service.rivals import Users, users_of_interface, users_of_socket
from inco_trio.signals import Signal

__all__ = ["examine", "trust_of"]

_NO_USERS = Users((), (), (), 0)


def examine(
    link: str | None,
    signals: Sequence[Signal],
    processes: Processes,
    answers: Answers,
    *,
    netns: Path | None = None,
    configuration: Path | None = None,
    start: str | None = None,
) -> Iterator[Result]:
    """Check a link, if given, and the registers of `signals`.

    `answers` contains what the running proxies report. `netns` is the network namespace of the interface.
    `configuration` is the file that defines the signals. `start` is the command that starts the proxy (default:
    `inco-trio run LINK`).
    """
    users = _NO_USERS
    if link is not None:
        address = parse_address(link)
        if isinstance(address, UnixAddress):
            results, users = _unix(link, address, processes, start)
        else:
            try:
                # Collect the results in the namespace: a generator would run in the caller's namespace.
                with inside(netns, link):
                    results, users = _interface(address, processes, start, signals)
            except IncoError as error:
                results = [fail("netns", link, error.reason)]
        yield from results
    yield from machine.inotify_limits(processes, users.proxy)
    yield from _registers(signals, processes, users)
    boards = answers.of(users.proxy)
    for board in boards:
        if board.status is not None and board.status.link == link:
            yield from proxies.counters(board)
            if users.proxy is not None:
                yield from proxies.capabilities(users.proxy, board, netns)
    if configuration is not None and users.proxy is not None:
        read_at = min((board.status.table_since for board in boards if board.status is not None), default=None)
        yield from proxies.configuration(configuration, users.proxy, read_at)


def _unix(link: str, address: UnixAddress, processes: Processes, start: str | None) -> tuple[list[Result], Users]:
    users = users_of_socket(address, processes)
    results = [
        *links.socket_path(address),
        *links.peer(address),
        *machine.unix_queue(),
        *proxies.users_of_link(link, users, start),
        *proxies.descriptors(link, users, processes),
    ]
    return results, users


def _interface(
    address: InterfaceAddress, processes: Processes, start: str | None, signals: Sequence[Signal]
) -> tuple[list[Result], Users]:
    from inco_trio.links.packet import RECEIVE_BUFFER  # Imported lazily: `unix:` links do not need it.

    users = _NO_USERS
    found, state = links.interface(address.name)
    results = [*machine.capability(address.name), *state]
    if found is not None:
        users = users_of_interface(found.index, processes)
        results += [
            *links.short_names(found, signals),
            *links.order(found),
            *proxies.users_of_link(address.name, users, start),
            *proxies.descriptors(address.name, users, processes),
        ]
    return [*results, *machine.receive_buffer(users.proxy, RECEIVE_BUFFER)], users


def _registers(signals: Sequence[Signal], processes: Processes, users: Users) -> Iterator[Result]:
    for directory in dict.fromkeys(signal.directory for signal in signals):
        own = [signal for signal in signals if signal.directory == directory]
        yield from register_files.directory(directory)
        yield from register_files.trusted(directory, trust_of(users.proxy))
        yield from register_files.reported(directory)
        yield from register_files.kinds(own)
        yield from register_files.held_open(own, users.proxies)
        yield from proxies.users_of_directory(directory, own, processes)
        if users.proxy is not None:
            yield from register_files.watched(own, users.proxy)


def trust_of(proxy: Process | None) -> Trust:
    """Return whom a proxy trusts: the owner that its command line names, or else its own user."""
    if proxy is None:
        return Trust()
    named = proxies.value_of("--irq-owner", proxy.command)
    with contextlib.suppress(ValueError):  # The user was removed after the proxy had started.
        if named is not None:
            owner, group = find_owner(named)
            return Trust(proxy.uid if owner is None else owner, group)
    return Trust(proxy.uid)
