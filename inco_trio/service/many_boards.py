"""The boards in a directory, for `inco-trio run --boards DIR`."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from inco_trio.board_files import Boards, read_boards
from inco_trio.config import Config
from inco_trio.errors import IncoError
from inco_trio.notifications import Listener
from inco_trio.nurseries import read_aside
from inco_trio.persist.fdstore import FdStore
from inco_trio.problems import working_for
from inco_trio.proxy.fleet import Proxies, open_fleet
from inco_trio.proxy.proxy import Proxy
from inco_trio.service.log import log_statistics
from inco_trio.signals import Signal

__all__ = ["ManyBoards"]

logger = logging.getLogger(__name__)


class ManyBoards:
    """The boards in a directory; see `daemon.Boards`. Raises IncoError if the directory cannot be read."""

    def __init__(self, directory: Path, history: int | None = None) -> None:
        self._directory = directory
        self._history = history
        self._boards = read_boards(directory)
        self._proxies: Proxies | None = None
        self.name = str(directory)

    @asynccontextmanager
    async def open(self, fd_store: FdStore, listener: Listener | None) -> AsyncIterator[None]:
        gc.disable()
        self._log_problems(self._boards, self._boards.refused, "refused")
        async with open_fleet(self._with_history(self._boards), fd_store, self._boards.refused, listener) as proxies:
            self._proxies = proxies
            self._log_open()
            # Do not let the garbage collector scan all objects created so far: that would delay all boards.
            gc.freeze()
            gc.enable()
            yield

    async def reload(self) -> Sequence[str]:
        assert self._proxies is not None  # noqa: S101 - the runner reloads only after `open`
        boards = await read_aside(functools.partial(read_boards, self._directory, self._proxies.configs))
        refused = {**boards.refused, **await self._proxies.reload(self._with_history(boards), keep=boards.refused)}
        self._log_problems(boards, refused, "refused, keeping the old configuration")
        self._log_open()
        return [f"{name}: {problem}" for name, error in refused.items() for problem in error.problems]

    def _with_history(self, boards: Boards) -> Mapping[str, Config]:
        return {name: attrs.evolve(config, history=self._history) for name, config in boards.configs.items()}

    def _log_problems(self, boards: Boards, refused: Mapping[str, IncoError], what: str) -> None:
        for name, notes in boards.notes.items():
            with working_for(name):
                for note in notes:
                    logger.info("%s", note)
        for name, error in refused.items():
            with working_for(name):
                for problem in error.problems:
                    logger.error("%s: %s", what, problem)

    def _log_open(self) -> None:
        assert self._proxies is not None  # noqa: S101 - called after `open`
        logger.info(
            "%s: %d boards open, %d not open", self.name, len(self._proxies), len(self._proxies.not_open),
            extra={"event": "reloaded"},
        )  # fmt: skip

    def log_statistics(self) -> None:
        for name, counters in ({} if self._proxies is None else self._proxies._counted()).items():
            with working_for(name):
                log_statistics(counters.as_dict())

    def signals(self) -> Collection[Signal]:
        return [signal for config in self._boards.configs.values() for signal in config.signals]

    def configs(self) -> Collection[Config]:
        return self._boards.configs.values()

    def proxies(self) -> Mapping[str, Proxy]:
        return {} if self._proxies is None else self._proxies

    def not_open(self) -> Mapping[str, str]:
        if self._proxies is None:
            return dict.fromkeys(self._boards.configs, "it is being opened")
        return self._proxies.not_open
