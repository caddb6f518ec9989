"""Report this process to other proxies of its links and directories, and wait until they end."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from inco_trio.config import Config
from inco_trio.control.client import Client, answering, dial, sockets
from inco_trio.control.protocol import RivalRequest, encode_request
from inco_trio.errors import IncoError
from inco_trio.linux.files import pinned
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import Process, is_stopped, listening_sockets
from inco_trio.proxy.others import key_of
from inco_trio.service.rivals import Rival

__all__ = ["announce", "wait_for_end"]

logger = logging.getLogger(__name__)


def announce(rivals: Sequence[Rival], configs: Sequence[Config]) -> list[Client | socket.socket]:
    """Report to each other proxy what this process shares with it. `configs` contains the boards of this process.

    Return the connections. Keep them open: a proxy records that this process has ended when its connection is closed.
    """
    opened: list[Client | socket.socket] = []
    for process in {rival.process.pid: rival.process for rival in rivals}.values():
        shared = [rival for rival in rivals if rival.process.pid == process.pid]
        client = None if is_stopped(process.pid) else _client_of(process)
        try:
            if client is None:
                opened += _left([_request(rival, configs[rival.board]) for rival in shared], process)
            else:
                opened.append(client)
                for rival in shared:
                    client.request(_request(rival, configs[rival.board]))
        except (IncoError, OSError) as error:
            logger.info("process %d does not record that this process shares its link: %s", process.pid, error)
    return opened


def _left(requests: Sequence[RivalRequest], process: Process) -> Iterator[socket.socket]:
    """Send reports to a proxy that does not answer. A stopped proxy reads them once it continues.

    Yield each connection before its use, so that the caller has it in any case. Raises IncoError, OSError.
    """
    for path in _own_sockets(process):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        yield sock
        if dial(sock, path):
            sock.send(b"".join(map(encode_request, requests)))
            text = "process %d does not answer: it may record that this process shares its link once it continues"
            logger.info(text, process.pid)


def _own_sockets(process: Process) -> list[Path]:
    """Return the sockets of a proxy that may be used: those of another user only in the usual places.

    Another path may be on a FUSE filesystem of this user, where connect(2) would block.
    """
    paths = listening_sockets(process)
    return paths if process.uid in (0, os.geteuid()) else [path for path in paths if path in sockets()]


def _client_of(process: Process) -> Client | None:
    """Connect to a proxy. If its sockets cannot be used, try the usual places. Return None if none answers."""
    mine = None
    for paths in (_own_sockets(process), sockets()):
        if mine is None:
            clients, _ = answering(paths)
            mine = next((client for client in clients if client.pid == process.pid), None)
            for client in clients:
                if client is not mine:
                    client.close()
    return mine


def _request(rival: Rival, config: Config) -> RivalRequest:
    """Return the report for one link or directory. Raises OSError if the directory has been removed."""
    if rival.is_link:
        return RivalRequest(rival.subject, key_of(identity(config.netns)))
    with pinned(rival.subject) as fd:
        found = os.fstat(fd)
    return RivalRequest(directory=key_of((found.st_dev, found.st_ino)))


async def wait_for_end(pid: int) -> None:
    """Wait until a process has ended. Raises OSError (pidfd_open(2))."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
