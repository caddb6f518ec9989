"""Several boards in one process: one proxy for each board, and one inotify descriptor for all boards.

If a board fails or cannot be opened, the fleet retries after a pause and at each reload. Other boards keep running. The
next proxy of that board inherits the in-flight buffer and the board's share of the inotify queue.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import attrs
import trio

from inco_trio.board_files import claims, refuse_shared
from inco_trio.config import Config
from inco_trio.counters import Counters
from inco_trio.errors import BoardNotOpenError, ClosedError, ConfigError, IncoError, ResourceError
from inco_trio.links.opening import Surroundings
from inco_trio.linux.mounts import Mounts
from inco_trio.notifications import Listener
from inco_trio.nurseries import in_turns, read_aside, starting_and_stopping
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.fdstore import FdStore, NoFdStore, inherited_fd, report_missing
from inco_trio.persist.inflight import Inflight
from inco_trio.persist.recorder import KEPT
from inco_trio.problems import board_name, working_for
from inco_trio.proxy.proxy import Ground, Proxy, build, running
from inco_trio.proxy.share import Share, SharedInotify
from inco_trio.proxy.supervise import Health, supervise
from inco_trio.registers.refusals import refusal

if TYPE_CHECKING:
    from inco_trio.stats import Stats

__all__ = ["Proxies", "open_fleet", "open_proxies"]

logger = logging.getLogger(__name__)

FRAMES_AT_ONCE = 16
"""Maximum number of frames that a board reads before it lets other boards run."""
RECORDED = 8 * KEPT
"""Default total number of notifications in the flight recorders of all boards."""
RECORDED_MIN = 256
"""By default, each board's flight recorder keeps at least this number of notifications."""
PAUSE = 1.0
PAUSE_MAX = 60.0
"""Maximum pause in seconds before the fleet retries opening a board. The pause starts at PAUSE and doubles each time.

When a board has been opened, the pause is reset to PAUSE.
"""


class _BoardStore:
    """The stored descriptors of one board, in the `Bundle` of all boards. Each new proxy of the board inherits them."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.inherited: dict[str, int] = {}
        self.supervisor = bundle.supervisor
        self._bundle = bundle
        self._name = name

    def lend(self, inflight: int) -> None:
        """Fill `inherited` for the board's next proxy. Duplicate the link's descriptor. Raises ResourceError."""
        self.inherited = {"inflight": inflight} if f"{self._name}/inflight" in self._bundle.kept else {}
        link = self._bundle.kept.get(f"{self._name}/link")
        if link is not None:
            try:
                self.inherited["link"] = os.dup(link)
            except OSError as error:
                raise refusal(error, "the stored link") from error

    def store(self, name: str, fd: int) -> None:
        self._bundle.store(f"{self._name}/{name}", fd)

    def remove(self, name: str) -> None:
        self._bundle.remove(f"{self._name}/{name}")


@attrs.define(eq=False)
class _Kept:
    """The resources that the next proxy of a board inherits."""

    ground: Ground
    share: Share
    store: _BoardStore | None
    """The board's descriptors in the fd store, or None if there is no fd store."""


@attrs.frozen
class _Plan:
    """The changes that a reload makes."""

    removed: list[_Board]
    moved: list[_Board]
    """Boards whose configuration names another link or network namespace. Their proxies are replaced."""
    now: dict[str, Config]
    """Boards to open or reload immediately."""
    later: dict[str, Config]
    """Boards to open once the boards in `removed` and `moved` have stopped and released their links and directories."""
    staying: Collection[str]


@attrs.define(eq=False)
class _Board:
    """A configured board. `proxy` is None while the board is not open."""

    name: str
    config: Config
    proxy: Proxy | None = None
    problem: str = ""
    """Why the last attempt to open the board failed."""
    again: trio.Event = attrs.Factory(trio.Event)
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    ended: trio.Event = attrs.Factory(trio.Event)


class Proxies(Mapping[str, Proxy]):
    """A mapping from board names to open proxies. Use `open_proxies` to create one.

    The mapping changes when a board opens or closes. If a configured board is not open, `proxies[name]` raises
    BoardNotOpenError, a KeyError that contains the reason. `not_open` lists all boards that are not open.
    """

    def __init__(self, fd_store: FdStore, resources: ExitStack, listener: Listener | None = None) -> None:
        whole = fd_store.inherited
        self._listener = listener
        self._bundle: Bundle | None = None
        self._resources = resources
        self._boards: dict[str, _Board] = {}
        self._kept: dict[str, _Kept] = {}
        self._changing = trio.Lock()
        self._opening = trio.Lock()
        """Only one board opens at a time. Otherwise, the turns of many boards would add up and delay open boards."""
        self._closed = False
        self._last: dict[str, Counters] = {}
        self._nursery: trio.Nursery | None = None
        self._around = Surroundings()
        self._recorded = KEPT
        resources.callback(self._around.close)
        try:
            memory = Inflight.open(inherited_fd(whole, "inflight"))
            resources.callback(memory.close)
            held = inherited_fd(whole, "inotify")
            self._has_new_inotify = held is None
            if self._has_new_inotify:
                memory.forget_watches()
            self._shared = SharedInotify(held, memory.events[0])
            resources.callback(self._shared.inotify.close)
            self._mounts = Mounts()
            resources.callback(self._mounts.close)
        except OSError as error:
            raise refusal(error, "shared memory") from error
        if not isinstance(fd_store, NoFdStore):
            self._bundle = Bundle(fd_store)
            resources.callback(self._bundle.close)
            if self._bundle.kept:
                report_missing(whole, ("inflight", "inotify", "bundle"))
            if (former := whole.pop("bundle", None)) is not None:
                os.close(former)  # This old queue would keep sockets open that no board uses anymore.
            # Create the share of each board before the first read, so that queued events reach their boards.
            for name in {name.rpartition("/")[0] for name in self._bundle.kept}:
                self._kept[name] = self._keep(name)
            if not all(kept.ground.inflight.inherited for kept in self._kept.values()):
                self._shared.hold()
        self._shared.recover()
        for name, fd in (("inflight", memory.fd), ("inotify", self._shared.inotify.fd)):
            if whole.get(name) != fd:
                fd_store.store(name, fd)

    def _keep(self, name: str) -> _Kept:
        """Open or inherit the resources of a board. Raises ResourceError."""
        kept = {} if self._bundle is None else self._bundle.kept
        held = kept.get(f"{name}/inflight")
        try:
            with working_for(name):
                report_missing(kept, (f"{name}/inflight", f"{name}/link"))
                inflight = Inflight.open(held if held is None else os.dup(held), FRAMES_AT_ONCE)
        except OSError as error:
            raise refusal(error, "shared memory") from error
        if self._has_new_inotify and inflight.inherited:
            inflight.forget_watches()
        if self._bundle is not None and not inflight.inherited:
            self._bundle.remove(f"{name}/inflight")  # The stored memory is invalid: the proxy will store new memory.
        share = self._shared.share(inflight)
        fds = {"inflight": inflight.fd}
        ground = Ground(
            inflight, share, self._mounts, fds, self._around, self._bundle is None, self._listener, self._recorded
        )
        return _Kept(ground, share, None if self._bundle is None else _BoardStore(self._bundle, name))

    def __getitem__(self, name: str) -> Proxy:
        """Return the proxy of a board. Raises BoardNotOpenError, or KeyError if the board is not configured."""
        board = self._boards[name]
        if board.proxy is None:
            raise BoardNotOpenError(name, f"not open: {self.not_open[name]}")
        return board.proxy

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, board in self._boards.items() if board.proxy is not None])

    def __len__(self) -> int:
        return sum(board.proxy is not None for board in self._boards.values())

    @property
    def configs(self) -> Mapping[str, Config]:
        """The current configuration of each board, including boards that are not open."""
        return {name: board.config for name, board in self._boards.items()}

    @property
    def not_open(self) -> Mapping[str, str]:
        """The names of the configured boards that are not open, each with the reason."""
        boards = [board for board in self._boards.values() if board.proxy is None]
        return {board.name: board.problem or "it is being opened or closed" for board in boards}

    @property
    def stats(self) -> Mapping[str, Stats]:
        """The counters of each open board or, after the fleet has closed, of each board that was open at the end."""
        return {name: counters.snapshot() for name, counters in self._counted().items()}

    def _counted(self) -> Mapping[str, Counters]:
        """Return the counters of the boards in `stats`; see `Proxy._counted`."""
        opened = {name: board.proxy for name, board in self._boards.items() if board.proxy is not None}
        return {name: proxy._counted() for name, proxy in opened.items()} | self._last

    async def reload(self, configs: Mapping[str, Config], keep: Collection[str] = ()) -> dict[str, IncoError]:
        """Replace the set of boards. Existing boards in `keep` do not change.

        New boards are opened, removed boards are stopped cleanly, and changed boards are reloaded. A board whose link
        changed gets a new proxy, which also sends notifications that were triggered before the change. Return an error
        for each refused board; a refused board keeps its old configuration. Raises ClosedError.
        """
        async with self._changing:
            if self._closed or self._nursery is None:
                raise ClosedError("the proxies are closed")
            refused: dict[str, IncoError] = {}
            self._recorded = max(RECORDED_MIN, min(KEPT, RECORDED // max(1, len(configs))))
            plan_changes = functools.partial(self._plan, configs, keep, refused)
            # At the start, there is no board that this could delay, and a thread would keep the capabilities that this
            # process drops later.
            plan = await read_aside(plan_changes) if self._boards else plan_changes()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, plan.removed)
                for board in plan.moved:
                    nursery.start_soon(self._replace, board, plan.later[board.name])
                await self._open_or_change(plan.now, refused)
            for name in [name for name in self._kept if name not in plan.staying]:
                await self._drop(name)
            await self._open_or_change(plan.later, refused)
            if self._bundle is not None:
                with contextlib.suppress(ResourceError):  # The descriptors stay open for now.
                    self._bundle.tidy()
            self._shared.release()
            return refused

    def _plan(self, configs: Mapping[str, Config], keep: Collection[str], refused: dict[str, IncoError]) -> _Plan:
        """Plan a reload. Add boards that conflict with others to `refused`."""
        staying = {*configs, *keep}
        running = {name: config for name, config in self.configs.items() if name in staying}
        refused |= {name: ConfigError(why) for name, why in refuse_shared(configs, running).items()}
        wanted = {name: config for name, config in configs.items() if name not in refused}
        removed = [board for name, board in self._boards.items() if name not in staying]
        # A link that is open follows a network namespace that is replaced.
        moved = [
            board for name, board in self._boards.items() if name in wanted and not wanted[name].same_link(board.config)
        ]
        # A proxy that is slow to stop delays only the boards that need its link or directories.
        late = {board.name for board in moved}
        if leaving := [board.config for board in (*removed, *moved)]:
            freed = {claim for claimed in claims(leaving) for claim in claimed}
            late |= {
                name for name, claimed in zip(wanted, claims(wanted.values()), strict=True) if freed & claimed.keys()
            }
        return _Plan(
            removed,
            moved,
            now={name: config for name, config in wanted.items() if name not in late},
            later={name: config for name, config in wanted.items() if name in late},
            staying=staying,
        )

    async def _open_or_change(self, configs: Mapping[str, Config], refused: dict[str, IncoError]) -> None:
        """Open new boards and reload existing ones. Add the error of each refused board to `refused`."""
        assert self._nursery is not None  # noqa: S101 - set by `_start`
        started = []
        for name, config in configs.items():
            if name not in self._boards:
                board = self._boards[name] = _Board(name, config)
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

    async def _change(self, board: _Board, config: Config) -> None:
        if board.proxy is None:
            async with self._opening:  # An attempt that is in progress uses the old configuration.
                if board.proxy is None:
                    board.config = config
                    board.again.set()
                    return
        if config != board.config or board.proxy._is_incomplete():
            with working_for(board.name):
                await board.proxy.reload(config)
            board.config = config

    def _start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        nursery.start_soon(supervise, Health("triggers"), self._shared.run, Counters())
        nursery.start_soon(self._mounts.run)

    async def _stop(self) -> None:
        async with self._changing:
            self._closed = True
            boards = [board for board in self._boards.values() if board.proxy is not None]
            proxies = {board.name: board.proxy for board in boards}
            await self._end(list(self._boards.values()), leave_nothing=False)
            self._last = {name: proxy._counted() for name, proxy in proxies.items() if proxy is not None}
        assert self._nursery is not None  # noqa: S101 - set by `_start`
        self._nursery.cancel_scope.cancel()
        for kept in self._kept.values():
            kept.ground.inflight.close()

    async def _end(self, boards: Collection[_Board], *, leave_nothing: bool = True) -> None:
        """Stop boards cleanly and in parallel. With `leave_nothing`, also delete the socket files of their links."""
        if boards:
            self._shared.drain()  # Send notifications that were triggered before the stop.
        for board in boards:
            if leave_nothing and (kept := self._kept.get(board.name)):
                kept.ground.leave_nothing = True
            board.scope.cancel()
        for board in boards:
            await board.ended.wait()
            del self._boards[board.name]

    async def _replace(self, board: _Board, config: Config) -> None:
        """Stop the proxy of a board whose link changes. The board's next proxy finishes the pending notifications."""
        if board.proxy is not None:
            board.proxy._expect_successor()
        if kept := self._kept.get(board.name):
            # Remove the old link's socket file unless the new link uses the same path.
            kept.ground.leave_nothing = config.address.name != board.config.address.name
        board.scope.cancel()
        await board.ended.wait()
        del self._boards[board.name]

    async def _drop(self, name: str) -> None:
        kept = self._kept[name]
        await in_turns(self._shared.end(kept.share))
        if kept.store is not None:
            with contextlib.suppress(ResourceError):
                kept.store.remove("link")
                kept.store.remove("inflight")
        kept.ground.inflight.close()
        del self._kept[name]  # Last, so that the next reload repeats a cancelled drop.

    async def _run_board(self, board: _Board, opened: trio.Event) -> None:
        """Keep a board open until its scope is cancelled. Set `opened` after the first attempt to open the board."""
        board_name.set(board.name)
        pause = PAUSE
        try:
            with board.scope:
                while True:
                    board.again = trio.Event()
                    try:
                        await self._open_board(board, opened)
                    except IncoError as error:
                        self._log_problem(board, error)
                    except Exception as error:
                        logger.exception("internal error: this is a bug in inco-trio; please report it")
                        board.problem = f"internal error: {error!r}"
                    finally:
                        if board.proxy is not None:
                            pause = PAUSE
                        board.proxy = None
                        opened.set()
                    with trio.move_on_after(pause):
                        await board.again.wait()
                    pause = min(2 * pause, PAUSE_MAX)
        finally:
            board.ended.set()

    async def _open_board(self, board: _Board, opened: trio.Event) -> None:
        with ExitStack() as resources:
            async with self._opening:
                proxy = await self._build(board, resources)
            async with running(proxy):
                board.proxy, board.problem = proxy, ""
                opened.set()
                await trio.sleep_forever()

    async def _build(self, board: _Board, resources: ExitStack) -> Proxy:
        """Open the proxy of a board. `resources` will close it. Raises IncoError."""
        kept = self._kept.get(board.name)
        if kept is None:
            kept = self._kept[board.name] = self._keep(board.name)
        kept.ground.leave_nothing = self._bundle is None
        if kept.store is not None:
            kept.store.lend(kept.ground.inflight.fd)
        proxy = await build(board.config, kept.store or NoFdStore(), kept.ground, resources)
        # Opening a board causes inotify events. Read them now, so that many boards do not overflow the queue.
        self._shared.drain()
        # Another task calls `finish_alone`. Run it in this context, which contains the board's log prefix.
        run_here = contextvars.copy_context().run
        kept.share.finish_alone = lambda events, length: run_here(proxy._outbound.finish_alone, events, length)
        resources.callback(kept.share.leave)
        return proxy

    def _log_problem(self, board: _Board, error: IncoError) -> None:
        if str(error) != board.problem:
            board.problem = str(error)
            for problem in error.problems:
                logger.error("not open: %s; retrying", problem)


@asynccontextmanager
async def open_proxies(configs: Mapping[str, Config]) -> AsyncIterator[Proxies]:
    """Run a proxy for each board while the block runs. Stop all proxies cleanly when the block ends or is cancelled.

    When the block starts, each board is open or listed in `Proxies.not_open`. The fleet keeps trying to open the listed
    boards. Raises ResourceError, ConfigError if boards share a link or directory, and ExceptionGroup under the same
    conditions as `open_proxy`.
    """
    async with open_fleet(configs, NoFdStore()) as proxies:
        yield proxies


@asynccontextmanager
async def open_fleet(
    configs: Mapping[str, Config], fd_store: FdStore, keep: Collection[str] = (), listener: Listener | None = None
) -> AsyncIterator[Proxies]:
    """Run proxies as `open_proxies` does, and store descriptors in `fd_store`. For `keep`, see `Proxies.reload`."""
    if shared := refuse_shared(configs):
        raise ConfigError("", (f"{name}: {why}" for name, why in shared.items()))
    with ExitStack() as resources:
        proxies = Proxies(fd_store, resources, listener)
        async with starting_and_stopping(proxies._start, proxies._stop):
            await proxies.reload(configs, keep)
            yield proxies
