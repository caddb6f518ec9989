"""Examine all proxies that are running on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from inco_trio.config import Config
from inco_trio.control.place import silent_services
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor import machine
from inco_trio.doctor.answers import Answer, Answers
from inco_trio.doctor.examination import boards_of_link, examine
from inco_trio.doctor.proxies import board_files, counters, unanswered, value_of
from inco_trio.doctor.result import Result, fail, hidden, refused, warn
from inco_trio.doctor.services import FoundService, find_services, leftovers, network_of, services_of
from inco_trio.doctor.silence import silent
from inco_trio.errors import IncoError
from inco_trio.links.address import address_fault, parse_address
from inco_trio.links.opening import inside
from inco_trio.linux.processes import (
    ENVIRONMENT_MAX,
    Process,
    Processes,
    answered,
    interfaces_of,
    is_same_mount_namespace,
    is_same_system,
    read,
    working_directory,
)
from inco_trio.service.rivals import users_of
from inco_trio.signals import Signal, builtin_signals

__all__ = ["survey", "survey_link"]

_Content = tuple[Path, Config | Sequence[Signal]]
"""A configuration file and its current content (see `proxies.configuration`)."""


def survey(processes: Processes, answers: Answers) -> Iterator[Result]:
    """Examine each running proxy and its boards. Yield a failure if no proxy is running."""
    yield from answers.problems
    running = [process for process in processes.all if process.is_proxy or process.pid in answers.by_pid]
    services = find_services(processes)
    if not running:
        text = "no proxy is running: start one with `inco-trio run LINK --config FILE`, or start its service"
        if found := [str(each.directory or each.name) for each in services if each.links]:
            text = f"no proxy is running, although there is a service: {', '.join(found)}"
        elif names := silent_services():
            text = (
                f"no proxy is running, and no supervisor is known to run the service of {' or '.join(names)} any more"
            )
            text += ": start it or its supervisor, or write it again with `inco-trio service`"
        yield fail("proxy", "this machine", text)
        yield from machine.inotify_limits(processes, None)
    for service in services:
        yield from service.results
    yield from leftovers(services, processes)
    for process in running:
        if process.pid in answers.by_pid:
            yield from _answering(process, answers.of(process), processes, answers, services)
        else:
            yield from _silent(process, processes, answers, services)


def survey_link(
    link: str, processes: Processes, answers: Answers, services: Sequence[FoundService]
) -> Iterator[Result]:
    """Examine the proxies of a link in the same way. Yield nothing if there are none."""
    users = users_of(parse_address(link), processes)
    for process in processes.all:
        if boards := boards_of_link(process, answers, link):
            directory, own = Path(answers.by_pid[process.pid].name), {f"{each.board}.json" for each in boards}
            for result in _answering(process, boards, processes, answers, services):
                path = Path(result.subject)
                # The directory can also contain IRQ directories.
                if path.parent != directory or path.suffix != ".json" or path.name in own:
                    yield result
        elif process in users.proxies and process.pid not in answers.by_pid:
            yield from answers.problems
            yield from _silent(process, processes, answers, services, link)
        else:
            continue
        yield from answers.problems_of(link)


def _answering(
    process: Process,
    boards: Sequence[BoardStatus],
    processes: Processes,
    answers: Answers,
    services: Sequence[FoundService],
) -> Iterator[Result]:
    """Examine boards that a proxy reports."""
    answer = answers.by_pid[process.pid]
    contents: dict[str, _Content] = {}
    if is_same_mount_namespace(process):
        contents = yield from _contents(process, answer)
    for board in boards:
        if board.status is None:
            yield from counters(board)
            continue
        signals = tuple(
            Signal(each.signal, each.direction, Path(each.register).parent, Path(each.register).name)
            for each in board.status.signals
        )
        netns = None if board.status.netns is None else Path(board.status.netns)
        content = contents.get(board.board)
        yield from _examine(process, board.status.link, signals, processes, answers, services, netns, content)


def _silent(
    process: Process,
    processes: Processes,
    answers: Answers,
    services: Sequence[FoundService],
    wanted: str | None = None,
) -> Iterator[Result]:
    """Examine a proxy without a control socket, such as inco_proxy, by its sockets and its command line.

    If a link is `wanted`, do not examine other links.
    """
    subject = f"process {process.pid} ({process.name})"
    if process.hidden and processes.unseen:
        yield hidden(f"the link of {subject}")
        return
    yield unanswered(process)
    names: list[str] = []
    with contextlib.suppress(IncoError), inside(network_of(process), subject):
        names = interfaces_of(process)
    # Any user can start a process with an invalid link in its command line.
    names += [word for word in process.command if word.startswith("unix:") and address_fault(word) is None]
    signals = _registers(process)
    for link in names:
        if wanted in (None, link):
            yield from _examine(process, link, signals, processes, answers, services)


def _examine(
    process: Process,
    link: str,
    signals: Sequence[Signal],
    processes: Processes,
    answers: Answers,
    services: Sequence[FoundService],
    netns: Path | None = None,
    configuration: _Content | None = None,
) -> Iterator[Result]:
    if not is_same_mount_namespace(process):
        text = f"process {process.pid} runs in another mount namespace: its registers are not examined"
        root = Path(f"/proc/{process.pid}/root")
        if silence := silent("registers", root, lambda: is_same_system(process), elsewhere=True):
            yield silence
        elif is_same_system(process):
            yield warn("registers", link, text, f"nsenter --target {process.pid} --mount --pid -- inco-trio doctor")
        else:
            # Do not suggest nsenter(1): it would run a program from the container with this user's privileges.
            yield warn("registers", link, f"{text}: run `inco-trio doctor` in its container")
        signals, configuration = (), None
    netns = network_of(process) if netns is None else netns
    yield from examine(
        link, signals, processes, answers,
        netns=netns, configuration=configuration, serving=process, services=services_of(link, services, netns),
    )  # fmt: skip


def _contents(process: Process, answer: Answer) -> Generator[Result, None, dict[str, _Content]]:
    """Return the configuration file of each board of a process, keyed by name. Yield a result for each invalid file."""
    if value_of("--boards", process.command) is None:
        if (file := _configuration(process)) is None:
            return {}
        from inco_trio.config import read_board

        if silence := silent("configuration", file, lambda: read_board(file)):
            yield silence
            return {}
        try:
            return {answer.name: (file, read_board(file).signals)}
        except IncoError as error:
            yield from refused(file, error)
            return {}
    from inco_trio.board_files import read_boards

    directory = Path(answer.name)
    if silence := silent("configuration", directory, lambda: read_boards(directory)):
        yield silence
        return {}
    try:
        boards = read_boards(directory)
    except IncoError as error:
        yield from refused(directory, error)
        return {}
    for mistake in boards.refused.values():
        yield from refused(directory, mistake)
    yield from board_files(directory, boards, [board.board for board in answer.boards], process)
    return {name: (directory / f"{name}.json", config) for name, config in boards.configs.items()}


def _registers(process: Process) -> tuple[Signal, ...]:
    """Return the signals that a process's command line specifies, or () if the configuration cannot be read."""
    directory = value_of("--irq-dir", process.command)
    if directory is not None:
        return builtin_signals(_path(process, directory))
    file = _configuration(process)
    from inco_trio.config import read_board

    if file is None or silent("configuration", file, lambda: read_board(file)) is not None:
        return ()
    try:
        return read_board(file).signals
    except IncoError:
        return ()  # The file was changed after the proxy had started.


def _configuration(process: Process) -> Path | None:
    """Return a process's udrv.json, or None if the process does not use one or this user cannot see the path."""
    if value_of("--irq-dir", process.command) is not None:
        return None
    given = value_of("--config", process.command)
    if given is None:
        place = Path(f"/proc/{process.pid}")
        environment = answered(place, lambda: read(place / "environ", ENVIRONMENT_MAX), None) or ""
        values = [value for value in environment.split("\0") if value.startswith("UDRV_JSON_PATH=")]
        given = values[0].partition("=")[2] if values else None
    return None if given is None else _path(process, given)


def _path(process: Process, path: str) -> Path:
    """Return a path from a process's command line or environment as an absolute path."""
    return (working_directory(process.pid) or Path()) / path
