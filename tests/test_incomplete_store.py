"""Tests of a start with an fd store that has lost some of the stored descriptors."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

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
        self.core1 = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        self.core1.bind(str(home / "core1"))

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
        store = Cupboard()
        async with open_fleet(configs, store):
            pass
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
        store = Cupboard()
        async with open_fleet(configs, store):
            pass
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
        store = Cupboard()
        async with open_fleet(configs, store):
            pass
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
