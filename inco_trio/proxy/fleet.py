"""Many boards in one process: a proxy for each, and one inotify descriptor for all.

Each board runs in a task of its own, with its own scope, counters and log prefix (`service.log`). If a board cannot be
opened or fails, the process retries after a pause and at each reload, without disturbing the others. The in-flight
memory of a board and its share of the inotify queue stay for its next proxy.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager

import attrs
import trio

from inco_trio.board_files import claims, refuse_shared
from inco_trio.config import Config
from inco_trio.errors import BoardNotOpenError, ClosedError, ConfigError, IncoError, ResourceError
from inco_trio.links.opening import Surroundings
from inco_trio.linux.netns import identity
from inco_trio.notifications import Listener
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.fdstore import FdStore, NoFdStore
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.proxy import Ground, Proxy, build, running
from inco_trio.proxy.supervise import Health, board_name, starting_and_stopping, supervise, working_for
from inco_trio.registers.refusals import refusal
from inco_trio.registers.share import Share, SharedInotify
from inco_trio.status import Counters, Stats

__all__ = ["Proxies", "open_proxies"]

logger = logging.getLogger(__name__)

FRAMES_AT_ONCE = 16
"""The most frames that a board takes before it is the turn of the others."""
PAUSE = 1.0
PAUSE_MAX = 60.0
"""Seconds until a board that could not be opened is tried again: the first time, and at most."""


class _BoardStore:
    """The part of a bundle that is one board's; each of the board's proxies inherits from it as a process would."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.inherited: dict[str, int] = {}
        self.holder = bundle.holder
        self._bundle = bundle
        self._name = name

    def lend(self, inflight: int) -> None:
        """Have a proxy inherit what is kept: the in-flight memory itself, and a link that it may close.

        Raises ResourceError.
        """
        self.inherited = {"inflight": inflight} if f"{self._name}/inflight" in self._bundle.kept else {}
        link = self._bundle.kept.get(f"{self._name}/link")
        if link is not None:
            try:
                self.inherited["link"] = os.dup(link)
            except OSError as error:
                raise refusal(error, "the link that is kept") from error

    def store(self, name: str, fd: int) -> None:
        self._bundle.store(f"{self._name}/{name}", fd)

    def remove(self, name: str) -> None:
        self._bundle.remove(f"{self._name}/{name}")


@attrs.define(eq=False)
class _Kept:
    """What stays with a board from one proxy to the next."""

    ground: Ground
    share: Share
    store: _BoardStore | None
    """None where nothing outlives the process."""


@attrs.define(eq=False)
class _Board:
    """A board of the process; `proxy` is None while it is not open."""

    name: str
    config: Config
    netns: tuple[int, int]
    proxy: Proxy | None = None
    problem: str = ""
    """What was last said of why it is not open."""
    again: trio.Event = attrs.Factory(trio.Event)
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    ended: trio.Event = attrs.Factory(trio.Event)


class Proxies(Mapping[str, Proxy]):
    """The open proxies of a process by the names of their boards; `open_proxies` creates it.

    It changes while boards open and close. A configured board that is not open is not in it: `proxies[name]` raises
    BoardNotOpenError, a KeyError that says why, and `not_open` lists all of them.
    """

    def __init__(self, fd_store: FdStore, resources: ExitStack, listener: Listener | None = None) -> None:
        whole = fd_store.inherited
        self._listener = listener
        self._bundle: Bundle | None = None
        self._resources = resources
        self._boards: dict[str, _Board] = {}
        self._kept: dict[str, _Kept] = {}
        self._changing = trio.Lock()
        self._closed = False
        self._last: dict[str, Stats] = {}
        self._nursery: trio.Nursery | None = None
        self._around = Surroundings()
        resources.callback(self._around.close)
        try:
            memory = Inflight.open(whole.get("inflight"))
            resources.callback(memory.close)
            self._shared = SharedInotify(whole.get("inotify"), memory.events[0])
            resources.callback(self._shared.inotify.close)
        except OSError as error:
            raise refusal(error, "shared memory") from error
        if not isinstance(fd_store, NoFdStore):
            self._bundle = Bundle(fd_store)
            resources.callback(self._bundle.close)
            # Before anything is read, so that what is queued for a board comes to it.
            for name in {name.rpartition("/")[0] for name in self._bundle.kept}:
                self._kept[name] = self._keep(name)
        self._shared.recover()
        for name, fd in (("inflight", memory.fd), ("inotify", self._shared.inotify.fd)):
            if whole.get(name) != fd:
                fd_store.store(name, fd)

    def _keep(self, name: str) -> _Kept:
        """What a board needs over its proxies, new or inherited. Raises ResourceError."""
        held = self._bundle.kept.get(f"{name}/inflight") if self._bundle is not None else None
        try:
            inflight = Inflight.open(held if held is None else os.dup(held), FRAMES_AT_ONCE)
        except OSError as error:
            raise refusal(error, "shared memory") from error
        share = self._shared.share(inflight)
        fds = {"inflight": inflight.fd}
        ground = Ground(inflight, share, fds, self._around, self._bundle is None, self._listener)
        return _Kept(ground, share, None if self._bundle is None else _BoardStore(self._bundle, name))

    # ------------------------------------------------------------------------------------------------ for callers

    def __getitem__(self, name: str) -> Proxy:
        """Return the proxy of a board. Raises BoardNotOpenError, and KeyError for a board that is not configured."""
        board = self._boards[name]
        if board.proxy is None:
            raise BoardNotOpenError(f"{name}: not open: {board.problem or 'it is being opened'}")
        return board.proxy

    def __iter__(self) -> Iterator[str]:
        """Return the names of the open boards."""
        return iter([name for name, board in self._boards.items() if board.proxy is not None])

    def __len__(self) -> int:
        return sum(board.proxy is not None for board in self._boards.values())

    @property
    def configs(self) -> Mapping[str, Config]:
        """The configuration of each board, open or not."""
        return {name: board.config for name, board in self._boards.items()}

    @property
    def not_open(self) -> Mapping[str, str]:
        """Why the other configured boards are not open, by name."""
        return {name: board.problem for name, board in self._boards.items() if board.proxy is None}

    @property
    def stats(self) -> Mapping[str, Stats]:
        """The counters of each open board; after the end, those of the boards that were open."""
        return {name: board.proxy.stats for name, board in self._boards.items() if board.proxy is not None} | self._last

    async def reload(self, configs: Mapping[str, Config], keep: Collection[str] = ()) -> dict[str, IncoError]:
        """Have these boards from now on; those named in `keep` stay as they are, if they are there.

        New ones are opened, others stopped cleanly, changed ones reloaded, or stopped and opened for another link: what
        was triggered is sent there. Returns the refused ones: of these, what was there before goes on. Raises
        ClosedError.
        """
        async with self._changing:
            if self._closed or self._nursery is None:
                raise ClosedError("the proxies are closed")
            staying = {*configs, *keep}
            running = {name: config for name, config in self.configs.items() if name in staying}
            refused: dict[str, IncoError] = {
                name: ConfigError([why]) for name, why in refuse_shared(configs, running).items()
            }
            wanted = {name: config for name, config in configs.items() if name not in refused}
            removed = [board for name, board in self._boards.items() if name not in staying]
            both = [board for name, board in self._boards.items() if name in wanted]
            moved = [board for board in both if not self._same_place(board, wanted[board.name])]
            # One that has much to finish keeps nobody waiting who needs nothing of it.
            freed = {what for board in (*removed, *moved) for what in claims(board.config)}
            late = {name for name, config in wanted.items() if not freed.isdisjoint(claims(config))}
            late |= {board.name for board in moved}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, removed)
                for board in moved:
                    nursery.start_soon(self._hand_on, board, wanted[board.name])
                await self._have({name: config for name, config in wanted.items() if name not in late}, refused)
            for name in [name for name in self._kept if name not in staying]:
                self._drop(name)
            await self._have({name: config for name, config in wanted.items() if name in late}, refused)
            return refused

    async def _have(self, configs: Mapping[str, Config], refused: dict[str, IncoError]) -> None:
        """Open boards, or change those that are open."""
        assert self._nursery is not None  # noqa: S101 - see `_start`
        started = []
        for name, config in configs.items():
            if name not in self._boards:
                board = self._boards[name] = _Board(name, config, identity(config.netns))
                opened = trio.Event()
                self._nursery.start_soon(self._run_board, board, opened, name=name)
                started.append(opened)
                continue
            try:
                await self._change(self._boards[name], config)
            except IncoError as error:
                refused[name] = error
        for opened in started:
            await opened.wait()

    @staticmethod
    def _same_place(board: _Board, config: Config) -> bool:
        return config.same_link(board.config) and identity(config.netns) == board.netns

    async def _change(self, board: _Board, config: Config) -> None:
        if board.proxy is None:
            board.config = config
            board.again.set()
            return
        if config != board.config or board.proxy.troubled:
            with working_for(board.name):
                await board.proxy.reload(config)
            board.config = config

    # ------------------------------------------------------------------------------------------ starting, stopping

    def _start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        nursery.start_soon(supervise, Health("triggers"), self._shared.run, Counters())

    async def _stop(self) -> None:
        async with self._changing:
            self._closed = True
            boards = [board for board in self._boards.values() if board.proxy is not None]
            proxies = {board.name: board.proxy for board in boards}
            await self._end(list(self._boards.values()), leave_nothing=False)
            self._last = {name: proxy.stats for name, proxy in proxies.items() if proxy is not None}
        assert self._nursery is not None  # noqa: S101 - see `_start`
        self._nursery.cancel_scope.cancel()
        for kept in self._kept.values():
            kept.ground.inflight.close()

    async def _end(self, boards: Collection[_Board], *, leave_nothing: bool = True) -> None:
        """Stop boards, cleanly and all at once."""
        if boards:
            self._shared.drain()  # What was triggered before it is sent.
        for board in boards:
            if leave_nothing and (kept := self._kept.get(board.name)):
                kept.ground.leave_nothing = True
            board.scope.cancel()
        for board in boards:
            await board.ended.wait()
            del self._boards[board.name]

    async def _hand_on(self, board: _Board, config: Config) -> None:
        """Stop a board whose next proxy has another link, and finishes what this one cannot."""
        if board.proxy is not None:
            board.proxy.hand_on()
        if kept := self._kept.get(board.name):
            # Of the former link nothing stays, but what the next one has too.
            kept.ground.leave_nothing = config.address.name != board.config.address.name
        board.scope.cancel()
        await board.ended.wait()
        del self._boards[board.name]

    def _drop(self, name: str) -> None:
        """Let go of what is kept of a board that is no more."""
        kept = self._kept.pop(name)
        self._shared.end(kept.share)
        if kept.store is not None:
            with contextlib.suppress(ResourceError):
                kept.store.remove("link")
                kept.store.remove("inflight")
        kept.ground.inflight.close()

    async def _run_board(self, board: _Board, opened: trio.Event) -> None:
        """Run a board until it is ended. `opened` is set once it is open, or could not be."""
        board_name.set(board.name)
        pause = PAUSE
        try:
            with board.scope:
                while True:
                    board.again = trio.Event()
                    try:
                        await self._open_board(board, opened)
                    except IncoError as error:
                        self._say(board, str(error))
                    except Exception as error:
                        logger.exception("internal error: this is a fault of inco-trio, please report it")
                        board.problem = f"internal error: {error!r}"
                    finally:
                        board.proxy = None
                        opened.set()
                    with trio.move_on_after(pause):
                        await board.again.wait()
                    pause = min(2 * pause, PAUSE_MAX)
        finally:
            board.ended.set()

    async def _open_board(self, board: _Board, opened: trio.Event) -> None:
        kept = self._kept.get(board.name)
        if kept is None:
            kept = self._kept[board.name] = self._keep(board.name)
        kept.ground.leave_nothing = self._bundle is None
        if kept.store is not None:
            kept.store.lend(kept.ground.inflight.fd)
        with ExitStack() as resources:
            proxy = build(board.config, kept.store or NoFdStore(), kept.ground, resources)
            # What it has made and watched is an event, and thousands of boards would make more than the kernel queues.
            self._shared.drain()
            # Called by the task that reads for all boards, in the name of this one.
            run_here = contextvars.copy_context().run
            kept.share.finish_alone = lambda events, length: run_here(proxy.finish_alone, events, length)
            resources.callback(kept.share.leave)
            async with running(proxy):
                board.proxy, board.problem = proxy, ""
                opened.set()
                await trio.sleep_forever()

    def _say(self, board: _Board, problem: str) -> None:
        if problem != board.problem:
            board.problem = problem
            for line in problem.splitlines():
                logger.error("not open: %s; tried again", line)


@asynccontextmanager
async def open_proxies(
    configs: Mapping[str, Config],
    *,
    fd_store: FdStore | None = None,
    keep: Collection[str] = (),
    listener: Listener | None = None,
) -> AsyncIterator[Proxies]:
    """Open a proxy for each board while the block runs; they are stopped cleanly when it ends or is cancelled.

    Once entered, each board is open, or `Proxies.not_open` says why not; that is tried again. Raises ConfigError for
    boards that share a link or a directory, and ResourceError. Otherwise as `open_proxy`.
    """
    if shared := refuse_shared(configs):
        raise ConfigError(f"{name}: {why}" for name, why in shared.items())
    with ExitStack() as resources:
        proxies = Proxies(fd_store or NoFdStore(), resources, listener)
        async with starting_and_stopping(proxies._start, proxies._stop):
            await proxies.reload(configs, keep)
            yield proxies
