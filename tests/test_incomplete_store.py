"""Tests of a start with an fd store that has lost some of the stored descriptors."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio

from inco_trio.config import Config
from inco_trio.frame import decode, encode
from inco_trio.links.address import UnixAddress
from inco_trio.mqtt.bridge import Bridge
from inco_trio.mqtt.configuration import parse_broker
from inco_trio.persist.bundle import Bundle
from inco_trio.persist.memory import new_memory
from inco_trio.proxy.fleet import open_fleet
from inco_trio.proxy.proxy import Proxy, open_supervised
from inco_trio.signals import builtin_signals
from netns.hang import HANG
from tests.support_proxy import Cupboard, trigger

ORDER = ("inflight", "inotify", "link")
"""The descriptors of a proxy, in the order in which it stores them."""
KEPT = [kept for number in range(1, 4) for kept in itertools.combinations(ORDER, number)]
"""All sets of descriptors that an fd store can have after it has lost some."""


def lost_line(name: str) -> str:
    return f"fd store: the stored descriptor {name} is missing: starting without it; the data in it is lost"


class Board:
    """A board with a `unix:` link; the test acts as core 1."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        home.mkdir(exist_ok=True)
        self.irq = home / "irq"
        self.config = Config(f"unix:{home}/core0,peer={home}/core1", builtin_signals(self.irq))
        self._home, self._stack = home, stack
        self.bind()

    def bind(self) -> None:
        """Open the socket of core 1."""
        (self._home / "core1").unlink(missing_ok=True)
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        self.core1 = self._stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        self.core1.bind(str(self._home / "core1"))

    def notify(self) -> None:
        """Send a notification in each direction while no proxy is running."""
        self.core1.sendto(encode(b"ihub_reset_irq", bytes(6)), self.config.address.name)
        trigger(self.irq / "message_6_trig")

    async def check(self, proxy: Proxy, inherited: Collection[str]) -> None:
        """Check that the proxy works, and that it has handled the notifications in the inherited descriptors."""
        delivered, sent = 1 + ("link" in inherited), 1 + ("inotify" in inherited)
        self.notify()
        while (proxy.stats.delivered, proxy.stats.sent) != (delivered, sent):  # noqa: ASYNC110 - no event says that both have been handled
            await trio.sleep(0.01)  # The interval between two checks.
        assert [decode(self.core1.recv(200)) for _ in range(sent)] == [b"redun_notify_irq"] * sent
        with pytest.raises(BlockingIOError):
            self.core1.recv(200)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[dict[str, Board]]:
    with ExitStack() as stack:
        yield {name: Board(tmp_path / name, stack) for name in ("b1", "b2")}


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(HANG):
            await main()

    trio.run(guarded)


async def stored(configs: Mapping[str, Config]) -> Cupboard:
    """Return the fd store that a fleet has left after a clean stop."""
    store = Cupboard()
    async with open_fleet(configs, store):
        return store


def remaining(kept: Mapping[str, int], names: Collection[str]) -> Cupboard:
    """Return an fd store that has only the descriptors `names` of `kept`."""
    return Cupboard({name: os.dup(fd) for name, fd in kept.items() if name in names})


@pytest.mark.parametrize("kept", KEPT, ids=" ".join)
def test_a_proxy_uses_each_descriptor_that_is_left(
    board: Board, kept: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store = Cupboard()
        async with open_supervised(board.config, store):
            pass
        board.notify()
        caplog.set_level(logging.WARNING)
        heir = remaining(store.kept, kept)
        store.close()
        async with open_supervised(board.config, heir) as proxy:
            await board.check(proxy, kept)
        # The log names each descriptor that an earlier proxy certainly had stored.
        before = ORDER[: ORDER.index(kept[-1])]
        assert caplog.messages == [lost_line(name) for name in before if name not in kept]
        assert sorted(heir.kept) == sorted(ORDER)
        heir.close()

    run(main)


def test_a_proxy_starts_with_the_buffer_of_another_version(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = Cupboard()
        async with open_supervised(board.config, store):
            pass
        board.notify()
        caplog.set_level(logging.WARNING)
        store.store("inflight", new_memory("other", 4096, b"inco-trio inflight 4"))
        async with open_supervised(board.config, heir := store.heir()) as proxy:
            await board.check(proxy, ORDER)
        (line,) = caplog.messages
        assert line.startswith("in-flight buffer: cannot use the stored memory (")
        heir.close()

    run(main)


def changed(store: Cupboard, change: Callable[[Bundle], None]) -> Cupboard:
    """Return the heir of a fleet's fd store after `change` has changed its bundle."""
    bundle = Bundle(before := store.heir())
    change(bundle)
    bundle.close()
    heir = before.heir()
    for fd in before.inherited.values():
        os.close(fd)
    return heir


@pytest.mark.parametrize("kept", [("link",), ("inflight",), ("inflight", "link")], ids=" ".join)
def test_a_fleet_uses_each_descriptor_that_is_left(
    boards: dict[str, Board], kept: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """The boards' trigger events are in the shared inotify descriptor, which this test does not remove."""
    configs = {name: board.config for name, board in boards.items()}

    def remove(bundle: Bundle) -> None:
        for name in {"inflight", "link"} - {*kept}:
            bundle.remove(f"b1/{name}")

    async def main() -> None:
        store = await stored(configs)
        for board in boards.values():
            board.notify()
        heir = changed(store, remove)
        caplog.set_level(logging.WARNING)
        async with open_fleet(configs, heir) as proxies:
            await boards["b2"].check(proxies["b2"], ORDER)
            await boards["b1"].check(proxies["b1"], {*kept, "inotify"})
        assert caplog.messages == ([lost_line("b1/inflight")] if kept == ("link",) else [])
        heir.close()

    run(main)


def test_a_fleet_names_the_shared_descriptors_that_are_missing(
    boards: dict[str, Board], caplog: pytest.LogCaptureFixture
) -> None:
    configs = {name: board.config for name, board in boards.items()}

    async def main() -> None:
        store = await stored(configs)
        heir = remaining(store.kept, ["bundle"])
        store.close()
        caplog.set_level(logging.WARNING)
        async with open_fleet(configs, heir):
            pass
        assert caplog.messages == [lost_line("inflight"), lost_line("inotify")]
        heir.close()

    run(main)


def test_a_fleet_starts_with_the_buffers_of_another_version(
    boards: dict[str, Board], caplog: pytest.LogCaptureFixture
) -> None:
    configs = {name: board.config for name, board in boards.items()}
    other = new_memory("other", 4096, b"inco-trio inflight 4")

    def replace(bundle: Bundle) -> None:
        for name in boards:
            bundle.store(f"{name}/inflight", other)

    async def main() -> None:
        store = await stored(configs)
        for board in boards.values():
            board.notify()
        store.store("inflight", other)
        heir = changed(store, replace)
        os.close(other)
        caplog.set_level(logging.WARNING)
        async with open_fleet(configs, heir) as proxies:
            for name, board in boards.items():
                await board.check(proxies[name], ORDER)
        assert [line.startswith("in-flight buffer: cannot use the stored memory (") for line in caplog.messages] == [
            True
        ] * 3
        heir.close()

    run(main)


def test_a_bridge_starts_without_its_frame_numbers(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        stores, address = [Cupboard()], board.config.address
        assert isinstance(address, UnixAddress)
        for _ in range(2):
            bridge = Bridge(parse_broker("mqtt://127.0.0.1"), ("core0", "core1"), address, stores[-1])
            bridge._open()
            bridge.close()
            stores.append(remaining(stores[-1].kept, ["link"]))
        assert caplog.messages == [lost_line("memory")]
        for store in stores:
            store.close()

    run(main)


def frames(board: Board) -> list[bytes | None]:
    """Return the names in the frames that core 1 has received."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while True:
            received.append(decode(board.core1.recv(200)))
    return received


def replace(path: Path) -> None:
    """Replace a file with a new one."""
    (path.parent / "new").touch()
    (path.parent / "new").rename(path)


def replace_directory(path: Path) -> None:
    """Replace the directory of a file with a new one, which contains a new file."""
    path.parent.rename(path.parent.with_name("old"))
    path.parent.mkdir()
    path.touch()


async def until_sent(proxy: Proxy, number: int) -> None:
    while proxy.stats.sent < number:  # noqa: ASYNC110 - no event says that it has been sent
        await trio.sleep(0.01)  # The interval between two checks.


def test_a_lost_inotify_descriptor_causes_no_notification(board: Board) -> None:
    """The new descriptor numbers the watch of a replaced trigger differently."""

    async def main() -> None:
        store = Cupboard()
        async with open_supervised(board.config, store) as proxy:
            replace(board.irq / "message_6_trig")
            await until_sent(proxy, 1)
        heir = remaining(store.kept, ["inflight", "link"])
        store.close()
        async with open_supervised(board.config, heir):
            pass
        assert frames(board) == [b"redun_notify_irq"]
        heir.close()

    run(main)


def test_a_lost_inotify_descriptor_of_a_fleet_causes_no_notification(boards: dict[str, Board]) -> None:
    """The boards open in another order, so the new descriptor gives the watch of one board to another board."""
    configs = {name: board.config for name, board in boards.items()}

    async def main() -> None:
        store = await stored(configs)
        heir = remaining(store.kept, ["inflight", "bundle"])
        store.close()
        async with open_fleet(dict(reversed(configs.items())), heir) as proxies:
            trigger(boards["b2"].irq / "message_6_trig")
            await until_sent(proxies["b2"], 1)
        assert {name: frames(board) for name, board in boards.items()} == {"b1": [], "b2": [b"redun_notify_irq"]}
        heir.close()

    run(main)


@pytest.mark.parametrize("in_fleet", [False, True])
def test_unfinished_triggers_of_a_lost_inotify_descriptor_are_sent(
    board: Board, in_fleet: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = attrs.evolve(board.config, stop_deadline=0.0)

    @contextlib.asynccontextmanager
    async def opened(store: Cupboard) -> AsyncIterator[Proxy]:
        if in_fleet:
            async with open_fleet({"b1": config}, store) as proxies:
                yield proxies["b1"]
        else:
            async with open_supervised(config, store) as proxy:
                yield proxy

    async def main() -> None:
        store = Cupboard()
        board.core1.close()
        async with opened(store) as proxy:
            trigger(board.irq / "message_6_trig")
            while not proxy.stats.triggered:  # noqa: ASYNC110 - no event says that it has been read
                await trio.sleep(0.01)  # The interval between two checks.
        board.bind()
        heir = remaining(store.kept, ["inflight", "link", "bundle"])
        store.close()
        caplog.clear()
        caplog.set_level(logging.WARNING)
        async with opened(heir) as proxy:
            await until_sent(proxy, 1)
            assert proxy.stats.overflowed == 0
        assert caplog.messages == [
            lost_line("inotify"),
            "the fd store lost the inotify descriptor, with unfinished events: sending every trigger once",
        ]
        assert frames(board) == [b"redun_notify_irq"]
        heir.close()

    run(main)


@pytest.mark.parametrize("change", [replace, replace_directory])
def test_a_trigger_that_was_replaced_before_a_fleet_waits_is_sent_once(
    boards: dict[str, Board], change: Callable[[Path], None]
) -> None:
    """The fleet waits until all boards are open, because the fd store has lost the numbers of a board's watches."""
    configs = {name: board.config for name, board in boards.items()}

    async def main() -> None:
        store = await stored(configs)
        heir = changed(store, lambda bundle: bundle.remove("b1/inflight"))
        change(boards["b2"].irq / "message_6_trig")
        async with open_fleet(configs, heir) as proxies:
            await until_sent(proxies["b2"], 1)
        assert {name: frames(board) for name, board in boards.items()} == {"b1": [], "b2": [b"redun_notify_irq"]}
        heir.close()

    run(main)
