"""Report this process to other proxies of its links and directories, and wait until they end."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import trio

from inco_trio.config import Config
from inco_trio.control.client import Client, answering, sockets
from inco_trio.control.protocol import RivalRequest
from inco_trio.errors import IncoError
from inco_trio.linux.files import pinned
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import Process, listening_sockets
from inco_trio.proxy.others import key_of
from inco_trio.service.rivals import Rival

__all__ = ["announce", "wait_for_end"]

logger = logging.getLogger(__name__)


def announce(rivals: Sequence[Rival], configs: Sequence[Config]) -> list[Client]:
    """Report to each other proxy what this process shares with it. `configs` contains the boards of this process.

    Return the connections. Keep them open: a proxy records that this process has ended when its connection is closed.
    """
    clients = []
    for process in {rival.process.pid: rival.process for rival in rivals}.values():
        shared = [rival for rival in rivals if rival.process.pid == process.pid]
        if (client := _client_of(process)) is not None:
            clients.append(client)
            try:
                for rival in shared:
                    client.request(_request(rival, configs[rival.board]))
            except (IncoError, OSError) as error:
                logger.info("process %d does not record that this process shares its link: %s", process.pid, error)
    return clients


def _client_of(process: Process) -> Client | None:
    """Connect to a proxy. If its sockets cannot be used, try the usual places. Return None if none answers."""
    # Another user's process may listen on a path on a FUSE filesystem of this user, where connect(2) would block.
    own = listening_sockets(process) if process.uid in (0, os.geteuid()) else []
    mine = None
    for paths in (own, sockets()):
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
