"""The examination of all proxies that run on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from inco_trio.doctor import machine
from inco_trio.doctor.answers import Answers
from inco_trio.doctor.examination import examine
from inco_trio.doctor.proxies import counters, value_of
from inco_trio.doctor.result import Result, fail, hidden, warn
from inco_trio.errors import IncoError
from inco_trio.links.opening import inside
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import Process, Processes, interfaces_of, is_same_mount_namespace
from inco_trio.signals import Signal, builtin_signals

__all__ = ["survey"]


def survey(processes: Processes, answers: Answers) -> Iterator[Result]:
    """Examine each running proxy and its boards. Yield a failure if no proxy is running."""
    yield from answers.problems
    running = [process for process in processes.all if process.is_proxy or process.pid in answers.by_pid]
    if not running:
        text = "no proxy is running: start one with `inco-trio run LINK --config FILE`, or start its service"
        yield fail("proxy", "this machine", text)
        yield from machine.inotify_limits(processes, None)
    for process in running:
        if process.pid in answers.by_pid:
            yield from _answering(process, processes, answers)
        else:
            yield from _silent(process, processes, answers)


def _answering(process: Process, processes: Processes, answers: Answers) -> Iterator[Result]:
    """Examine the boards that a proxy reports."""
    answer = answers.by_pid[process.pid]
    configurations, networks = _files(process, answer.name)
    for board in answer.boards:
        if board.status is None:
            yield from counters(board)
            continue
        netns, file = networks.get(board.board), configurations.get(board.board)
        signals = tuple(
            Signal(each.signal, each.direction, Path(each.register).parent, Path(each.register).name)
            for each in board.status.signals
        )
        yield from _examine(process, board.status.link, signals, processes, answers, netns, file)


def _silent(process: Process, processes: Processes, answers: Answers) -> Iterator[Result]:
    """Examine a proxy without a control socket, such as inco_proxy, by its sockets and its command line."""
    subject = f"process {process.pid} ({process.name})"
    if process.hidden and processes.unseen:
        yield hidden(f"the link of {subject}")
        return
    yield warn("control", subject, "the process does not answer on a control socket: its counters are unknown")
    names: list[str] = []
    with contextlib.suppress(IncoError), inside(_network(process), subject):
        names = interfaces_of(process)
    names += [word for word in process.command if word.startswith("unix:")]
    signals, file = _registers(process)
    for link in names:
        yield from _examine(process, link, signals, processes, answers, None, file)


def _examine(
    process: Process,
    link: str,
    signals: Sequence[Signal],
    processes: Processes,
    answers: Answers,
    netns: Path | None,
    configuration: Path | None,
) -> Iterator[Result]:
    if not is_same_mount_namespace(process):
        text = f"process {process.pid} runs in another mount namespace: its registers are not examined"
        yield warn("registers", link, text, f"nsenter --target {process.pid} --mount --pid -- inco-trio doctor")
        signals, configuration = (), None
    netns = _network(process) if netns is None else netns
    yield from examine(link, signals, processes, answers, netns=netns, configuration=configuration)


def _network(process: Process) -> Path | None:
    """Return the network namespace of a process, or None if it is unknown or the same as this thread's."""
    path = Path(f"/proc/{process.pid}/ns/net")
    return path if identity(path) not in (identity(None), (0, 0)) else None


def _files(process: Process, name: str) -> tuple[dict[str, Path], dict[str, Path | None]]:
    """Return the configuration files and the network namespaces of a process's boards, each by board name."""
    if value_of("--boards", process.command) is None:
        file = _configuration(process)
        return ({} if file is None else {name: file}), {}
    from inco_trio.board_files import read_boards

    try:
        boards = read_boards(Path(name)).configs
    except IncoError:
        return {}, {}  # The directory was removed after the proxy had started.
    return {board: Path(name, f"{board}.json") for board in boards}, {b: boards[b].netns for b in boards}


def _registers(process: Process) -> tuple[tuple[Signal, ...], Path | None]:
    """Return the signals that a process's command line specifies, and its configuration file or None."""
    directory = value_of("--irq-dir", process.command)
    if directory is not None:
        return builtin_signals(_path(process, directory)), None
    file = _configuration(process)
    if file is None:
        return (), None
    from inco_trio.config import read_board

    try:
        return read_board(file).signals, file
    except IncoError:
        return (), file  # The file was changed after the proxy had started.


def _configuration(process: Process) -> Path | None:
    """Return the udrv.json of a process, or None if it uses none or this user cannot see it."""
    if value_of("--irq-dir", process.command) is not None:
        return None
    given = value_of("--config", process.command)
    if given is None:
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            values = [value for value in environment if value.startswith(b"UDRV_JSON_PATH=")]
            given = os.fsdecode(values[0].partition(b"=")[2]) if values else None
    return None if given is None else _path(process, given)


def _path(process: Process, path: str) -> Path:
    """Return a path from a process's command line or environment as an absolute path."""
    try:
        return Path(f"/proc/{process.pid}/cwd").readlink() / path
    except OSError:
        return Path(path)
