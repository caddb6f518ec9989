"""All checks of `inco-trio doctor`, in order."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from inco_trio.config import Config
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor import links, machine, proxies, register_files
from inco_trio.doctor.answers import Answers
from inco_trio.doctor.result import Level, Result, fail
from inco_trio.doctor.services import FoundService
from inco_trio.doctor.silence import silent
from inco_trio.errors import IncoError
from inco_trio.links.address import InterfaceAddress, UnixAddress, parse_address
from inco_trio.links.opening import inside
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import Process, Processes
from inco_trio.linux.users import find_owner
from inco_trio.proxy_status import Status
from inco_trio.service.descriptions import USER
from inco_trio.service.rivals import Users, users_of_interface, users_of_socket
from inco_trio.signals import Signal
from inco_trio.trust import Trust

__all__ = ["boards_of_link", "examine", "expected_trust", "trust_of"]

_NO_USERS = Users((), (), (), frozenset())


def examine(
    link: str | None,
    signals: Sequence[Signal],
    processes: Processes,
    answers: Answers,
    *,
    netns: Path | None = None,
    configuration: tuple[Path, Config | Sequence[Signal]] | None = None,
    trust: Trust | None = None,
    start: str | None = None,
    serving: Process | None = None,
    services: Sequence[FoundService] = (),
) -> Iterator[Result]:
    """Check a link, if given, and the registers of `signals`.

    `answers` contains what the running proxies report. `netns` is the network namespace of the interface.
    `configuration` is a configuration file with its current content (see `proxies.configuration`). `trust` applies if
    no proxy serves the link. `start` is the command that starts the proxy (default: `inco-trio run LINK`). It does not
    apply if the link has services, which are `services`. `serving` is the proxy of the link (default: the only process
    with a socket of the link). Pass it if the interface may be missing, because the sockets of a missing interface
    cannot be found.
    """
    if services:
        # A proxy without a supervisor would run next to the service, and would not use its stored queue.
        start = next((service.fix for service in services if service.fix is not None), None)
    has_service = bool(services)

    def boards_of(users: Users) -> list[BoardStatus]:
        proxy = serving or users.proxy
        return [] if link is None or proxy is None else boards_of_link(proxy, answers, link, netns)

    users = _NO_USERS
    if link is not None:
        address = parse_address(link)
        if isinstance(address, UnixAddress):
            results, users = _unix(link, address, processes, start, boards_of, has_service=has_service)
        else:
            try:
                # Collect the results in the namespace: a generator would run in the caller's namespace.
                with inside(netns, link):
                    results, users = _interface(
                        address, netns, processes, start, signals, boards_of, has_service=has_service
                    )
            except IncoError as error:
                results = [fail("netns", link, error.reason)]
        yield from results
    yield from machine.inotify_limits(processes, users.proxy)
    proxy = serving or users.proxy
    silent_ones = [each for each in (*users.proxies, *users.others) if each.pid not in answers.by_pid]
    if serving is None and link is not None:
        yield from answers.problems if silent_ones else answers.problems_of(link)
    yield from (proxies.unanswered(each) for each in silent_ones if each.is_proxy)
    boards = boards_of(users)
    status = _status_of(boards)
    if proxy is not None:
        trust = trust_of(proxy, status)
    yield from _registers(signals, processes, users, trust or expected_trust(), proxy, status)
    for board in boards:
        yield from proxies.counters(board)
    if proxy is not None and status is not None:
        yield from proxies.capabilities(proxy, status)
        if configuration is not None:
            yield from proxies.configuration(*configuration, proxy, status)


def _status_of(boards: Sequence[BoardStatus]) -> Status | None:
    return boards[0].status if boards else None


def boards_of_link(proxy: Process, answers: Answers, link: str, netns: Path | None = None) -> list[BoardStatus]:
    """Return the boards of a proxy that use a link. Interfaces in different network namespaces can have the same name.

    If no board is known to use the namespace `netns`, return the boards whose namespace cannot be identified.
    """
    wanted = identity(netns)
    found: dict[tuple[int, int], list[BoardStatus]] = {}
    for board in answers.of(proxy):
        if board.status is not None and board.status.link == link:
            path = f"/proc/{proxy.pid}/ns/net" if board.status.netns is None else board.status.netns
            place = wanted if link.startswith("unix:") else identity(Path(path))
            found.setdefault(place, []).append(board)
    return found.get(wanted) or found.get((0, 0), [])


def _unix(
    link: str,
    address: UnixAddress,
    processes: Processes,
    start: str | None,
    boards_of: Callable[[Users], list[BoardStatus]],
    *,
    has_service: bool,
) -> tuple[list[Result], Users]:
    users = users_of_socket(address, processes)
    for check, path in (("socket", address.local), ("peer", address.peer)):
        if silence := silent(check, Path(path), partial(links.bound, path)):
            return [silence], users
    results = [
        *links.socket_path(address),
        *links.peer(address),
        *machine.unix_queue(),
        *proxies.users_of_link(link, users, start, has_service=has_service),
        *proxies.descriptors(link, users, processes, _status_of(boards_of(users)), has_service=has_service),
    ]
    return results, users


def _interface(
    address: InterfaceAddress,
    netns: Path | None,
    processes: Processes,
    start: str | None,
    signals: Sequence[Signal],
    boards_of: Callable[[Users], list[BoardStatus]],
    *,
    has_service: bool,
) -> tuple[list[Result], Users]:
    from inco_trio.links.packet import RECEIVE_BUFFER  # Import lazily: `unix:` links do not need this.

    users = _NO_USERS
    found, state = links.interface(address.name, netns)
    results = [*machine.capability(address.name), *state]
    status = None
    if found is not None:
        users = users_of_interface(found.index, processes)
        status = _status_of(boards_of(users))
        results += [
            *links.short_names(found, signals),
            *links.order(found),
            *proxies.users_of_link(address.name, users, start, has_service=has_service),
            *proxies.descriptors(address.name, users, processes, status, has_service=has_service),
        ]
    # A proxy that does not answer may have a large buffer.
    if users.proxy is None or status is not None:
        granted = None if status is None else status.receive_buffer
        results += machine.receive_buffer(users.proxy, RECEIVE_BUFFER, granted)
    return results, users


def _registers(
    signals: Sequence[Signal],
    processes: Processes,
    users: Users,
    trust: Trust,
    proxy: Process | None,
    status: Status | None,
) -> Iterator[Result]:
    # A proxy of another user may have different rights and capabilities. It reports the files that it cannot use.
    access = proxy is None or proxy.uid == os.geteuid()
    present = () if status is None else status.signals
    reported = () if status is None or status.owner is not None else status.signals
    refused = {each.register for each in reported if os.strerror(errno.EACCES) in (each.problem or "")}

    def checks(directory: Path) -> Iterator[Result]:
        own = [signal for signal in signals if signal.directory == directory]
        names = [signal.register for signal in own]
        problems = [each.problem for each in present if each.problem and Path(each.register).parent == directory]
        yield from register_files.directory(directory, access=access, registers=names, problems=problems)
        confidence = list(register_files.trusted(directory, trust))
        yield from confidence
        yield from register_files.reported(directory)
        yield from register_files.kinds(own, access=access)
        if proxy is not None and not access:
            yield from register_files.denied([each for each in own if str(each.path) in refused], proxy)
        yield from register_files.held_open(own, users.proxies)
        yield from proxies.users_of_directory(directory, own, processes)
        if users.proxy is not None:
            fit = all(result.level is Level.OK for result in confidence)
            yield from register_files.watched(own, users.proxy, fit=fit)

    for directory in dict.fromkeys(signal.directory for signal in signals):
        if silence := silent("directory", directory, partial(list, checks(directory))):
            yield silence
        else:
            yield from checks(directory)


def expected_trust(owner: int | None = None, group: int | None = None) -> Trust:
    """Return the users and the group that the next proxy will trust.

    If root runs the doctor and the user of the services exists, assume that a service will run the proxy as this user.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            return Trust(owner, group, pwd.getpwnam(USER).pw_uid)
    return Trust(owner, group)


def trust_of(proxy: Process, status: Status | None) -> Trust:
    """Return the users and group that a proxy trusts: its own user, and the owner from its status or command line."""
    if status is not None:
        return Trust(status.owner, status.group, proxy.uid)
    named = proxies.value_of("--irq-owner", proxy.command)
    with contextlib.suppress(ValueError):  # The user was removed after the proxy had started.
        if named is not None:
            return Trust(*find_owner(named), proxy.uid)
    return Trust(user=proxy.uid)
