"""Collect the status that the running proxies on this machine report on their control sockets."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path

import attrs

from inco_trio.control.client import answering, sockets
from inco_trio.control.place import default_path
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor.result import Level, Result, fail, hidden, warn
from inco_trio.doctor.silence import silent
from inco_trio.errors import IncoError, PermissionDeniedError
from inco_trio.links.address import parse_address
from inco_trio.linux.processes import Process, Processes, listening_sockets
from inco_trio.service.rivals import serving
from inco_trio.service.systemd import runtime_directory

__all__ = ["Answer", "Answers", "ask"]


@attrs.frozen
class Answer:
    """The answer from one proxy process."""

    name: str
    """The name of the link, or the path of the directory of boards."""
    boards: tuple[BoardStatus, ...]


@attrs.frozen
class Answers:
    """The answers from all proxies."""

    by_pid: Mapping[int, Answer] = attrs.Factory(dict)
    problems: tuple[Result, ...] = ()
    """A result for each socket whose proxy did not answer."""

    def of(self, process: Process | None) -> tuple[BoardStatus, ...]:
        """Return the boards of a process, or () if it did not answer."""
        answer = None if process is None else self.by_pid.get(process.pid)
        return () if answer is None else answer.boards

    def problems_of(self, link: str) -> list[Result]:
        """Return the warnings for stale control sockets of a link, and for those that this user may not use.

        A proxy that does not answer may serve an interface of the same name in another network namespace.
        """
        label, warnings = parse_address(link).label, [each for each in self.problems if each.level is Level.WARN]
        return [each for each in warnings if not each.subject or _is_of(Path(each.subject), label)]


def ask(processes: Processes) -> Answers:
    """Ask all proxies on this machine for their status. Sockets outside the usual directories are found in /proc."""
    paths = [
        *sockets(),
        *(path for process in processes.all if process.is_proxy for path in listening_sockets(process)),
    ]
    unused = {
        path: silent("control", path, path.exists, elsewhere=path.is_relative_to("/proc"))
        for path in dict.fromkeys(paths)
    }
    clients, errors = answering([path for path, silence in unused.items() if silence is None])
    found: dict[int, Answer] = {}
    for client in clients:
        with client:
            try:
                found.setdefault(client.pid, Answer(client.greeting.name, client.status()))
            except IncoError as error:
                errors.append(error)
    silences = [silence for silence in unused.values() if silence is not None]
    labels = {label: pid for pid, answer in found.items() for label in _labels(answer)}
    problems = (result for error in errors for result in _problem(error, labels, processes))
    return Answers(found, (*silences, *problems))


def _labels(answer: Answer) -> list[str]:
    """Return the labels of the links that a proxy serves."""
    return [parse_address(board.status.link).label for board in answer.boards if board.status is not None]


def _server(path: Path, labels: Mapping[str, int], processes: Processes) -> int | None:
    """Return the PID of a proxy that serves the link for which the control socket `path` was created, or None.

    `labels` contains the PIDs of the proxies that answer.
    """
    for label, pid in labels.items():
        if _is_of(path, label):
            return pid
    # The proxy may not answer, or may have no control socket.
    with contextlib.suppress(IncoError):
        return next((each.pid for each in serving(parse_address(_name_of(path)), processes)), None)
    return None


def _is_of(path: Path, label: str) -> bool:
    """Return whether `path` is a usual control socket for the link with this label."""
    return _name_of(path) in (label, runtime_directory(label), default_path(label).stem)


def _name_of(path: Path) -> str:
    return path.parent.name if path.name == "control.sock" else path.stem


def _problem(error: IncoError, labels: Mapping[str, int], processes: Processes) -> list[Result]:
    if isinstance(error, PermissionDeniedError):
        return [hidden(f"the status of the proxy at {error.subject}")]
    if isinstance(error.__cause__, FileNotFoundError):
        return []  # The process that created the socket has ended.
    if isinstance(error.__cause__, ConnectionRefusedError):
        # A proxy that stops normally removes its socket.
        text, path = "the proxy of this socket was killed or has crashed", Path(str(error.subject))
        if (pid := _server(path, labels, processes)) is not None:
            return [warn("control", path, f"{text}, but process {pid} serves its link", f"rm {shlex.quote(str(path))}")]
        text += ", and no other proxy has replaced it: start its service, or remove this socket"
        return [warn("control", path, text)]
    return [fail("control", error.subject, error.reason)]
