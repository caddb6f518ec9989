"""Collect the status that the running proxies on this machine report on their control sockets."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from inco_trio.control.client import answering, sockets
from inco_trio.control.protocol import BoardStatus
from inco_trio.doctor.result import Result, fail, hidden, warn
from inco_trio.doctor.silence import silent
from inco_trio.errors import IncoError, PermissionDeniedError
from inco_trio.linux.processes import Process, Processes, listening_sockets

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
    return Answers(found, (*silences, *(result for error in errors for result in _problem(error))))


def _problem(error: IncoError) -> list[Result]:
    if isinstance(error, PermissionDeniedError):
        return [hidden(f"the status of the proxy at {error.subject}")]
    if isinstance(error.__cause__, FileNotFoundError):
        return []  # The process that created the socket has ended.
    if isinstance(error.__cause__, ConnectionRefusedError):
        # A proxy that stops normally removes its socket.
        text = (
            "the proxy of this socket was killed or has crashed, and no other proxy has replaced it: "
            "start its service, or remove this socket"
        )
        return [warn("control", error.subject, text)]
    return [fail("control", error.subject, error.reason)]
