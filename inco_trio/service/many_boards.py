"""What the daemon runs with `--boards DIR`: the proxies of many boards."""

from __future__ import annotations

import argparse
import gc
import logging
import resource
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from inco_trio.board_files import Boards, read_boards
from inco_trio.cli.daemon import aside
from inco_trio.cli.options import boards_directory, boards_label
from inco_trio.config import Config
from inco_trio.errors import IncoError
from inco_trio.notifications import Listener
from inco_trio.persist.fdstore import FdStore
from inco_trio.problems import working_for
from inco_trio.proxy.fleet import Proxies, open_proxies
from inco_trio.proxy.proxy import Proxy
from inco_trio.service.log import log_statistics
from inco_trio.signals import Signal

__all__ = ["ManyBoards"]

logger = logging.getLogger(__name__)


class ManyBoards:
    """The boards of a directory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._directory = boards_directory(args, "IFACE", "--config", "--irq-dir", "--wait-link")
        self._boards = read_boards(self._directory)
        self._proxies: Proxies | None = None
        self.name, self.label = str(self._directory), boards_label(self._directory)

    @asynccontextmanager
    async def open(self, fd_store: FdStore, listener: Listener | None) -> AsyncIterator[None]:
        """Open the proxies of all boards while the block runs."""
        _raise_descriptor_limit()
        gc.disable()
        self._say(self._boards, self._boards.refused, "refused")
        async with open_proxies(
            self._boards.configs, fd_store=fd_store, keep=self._boards.refused, listener=listener
        ) as proxies:
            self._proxies = proxies
            self._say_open()
            # What is there now stays: the collector of garbage would hold all boards up to look through it.
            gc.freeze()
            gc.enable()
            yield

    async def reload(self) -> None:
        """Read the directory again."""
        assert self._proxies is not None  # noqa: S101 - see `daemon._Service.open`
        boards = await aside(self._read, self._proxies.configs)
        refused = await self._proxies.reload(boards.configs, keep=boards.refused)
        self._say(boards, {**boards.refused, **refused}, "refused, what was there before goes on")
        self._say_open()

    def _read(self, running: Mapping[str, Config]) -> Boards:
        return read_boards(self._directory, running)

    def _say(self, boards: Boards, refused: Mapping[str, IncoError], what: str) -> None:
        for name, notes in boards.notes.items():
            with working_for(name):
                for note in notes:
                    logger.info("%s", note)
        for name, error in refused.items():
            with working_for(name):
                for problem in str(error).splitlines():
                    logger.error("%s: %s", what, problem)

    def _say_open(self) -> None:
        assert self._proxies is not None  # noqa: S101 - see `daemon._Service.open`
        logger.info(
            "%s: %d boards open, %d not", self.name, len(self._proxies), len(self._proxies.not_open),
            extra={"event": "reloaded"},
        )  # fmt: skip

    def log_statistics(self) -> None:
        """Log the counters of each board."""
        for name, stats in ({} if self._proxies is None else self._proxies.stats).items():
            with working_for(name):
                log_statistics(stats.as_dict())

    def signals(self) -> Collection[Signal]:
        """All signals of all boards."""
        return [signal for config in self._boards.configs.values() for signal in config.signals]

    def proxies(self) -> Mapping[str, Proxy]:
        """See `Served.proxies`."""
        return {} if self._proxies is None else {name: self._proxies[name] for name in self._proxies}

    def not_open(self) -> Mapping[str, str]:
        """See `Served.not_open`."""
        return {} if self._proxies is None else self._proxies.not_open


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as may be had: a board needs four or five."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
