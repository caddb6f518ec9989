"""Tests of a link in a named network namespace that is deleted and recreated under the same name."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trio

from inco_trio.config import Config
from inco_trio.control.feed import Feed
from inco_trio.control.monitors import Monitor
from inco_trio.links.address import InterfaceAddress
from inco_trio.links.names import Names
from inco_trio.links.namespace import NamespaceLink
from inco_trio.links.opening import Surroundings, open_link
from inco_trio.links.packet import PacketLink
from inco_trio.notifications import Listener
from inco_trio.proxy.fleet import open_proxies
from inco_trio.proxy.proxy import Proxy, open_supervised
from inco_trio.signals import builtin_signals
from inco_trio.simulation.world import Cores, Namespace, Peer, two_cores
from netns.hang import HANG
from tests.support_proxy import Cupboard, trigger

pytestmark = pytest.mark.netns

IN, OUT = "ihub_hwwd_irq", "redun_notify_irq"


@pytest.fixture
def others() -> Iterator[Cores]:
    """Yield two more cores, which replace the first two."""
    with two_cores() as cores:
        yield cores


@pytest.fixture
def name(tmp_path: Path) -> Path:
    """Return the path that names the network namespace."""
    return tmp_path / "netns"


def give(name: Path, namespace: Namespace) -> None:
    """Atomically make the name refer to a namespace."""
    new = name.with_suffix(".new")
    new.symlink_to(f"/proc/{os.getpid()}/fd/{namespace.fd}")
    new.rename(name)


def packet_sockets(namespace: Namespace) -> int:
    """Return the number of packet sockets in a namespace."""
    return len(namespace.run(Path("/proc/thread-self/net/packet").read_text).splitlines()) - 1


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(HANG):
        while not condition():  # noqa: ASYNC110 - no event reports the change
            await trio.sleep(0.01)  # The interval between two checks.


def following(
    name: Path,
    cores: Cores,
    tmp_path: Path,
    body: Callable[[Proxy, Cupboard], Awaitable[None]],
    listener: Listener | None = None,
) -> None:
    """Run `body` with a proxy in the network namespace that `name` refers to."""

    async def main() -> None:
        signals = builtin_signals(tmp_path / "irq")
        async with open_supervised(Config(cores.link, signals, netns=name), store, listener) as proxy:
            await body(proxy, store)

    give(name, cores.core0)
    store = Cupboard()
    try:
        trio.run(main)
    finally:
        store.close()


def test_an_interface_that_is_replaced_at_once_was_down(
    cores: Cores, name: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(proxy: Proxy, _store: Cupboard) -> None:
        await until(lambda: proxy.status.running)
        # The proxy runs in this thread, so it sees only the new interface.
        cores.delete_link()
        cores.make_link()
        await until(lambda: proxy.stats.link_downs == 1)

    following(name, cores, tmp_path, body)
    text = f"{cores.link}: the link went down and came up again at once (1 time): a new interface (index "
    assert any(message.startswith(text) for message in caplog.messages)


@pytest.mark.parametrize("at_once", [True, False], ids=["replaced at once", "missing meanwhile"])
def test_a_recreated_namespace_is_followed(
    cores: Cores, others: Cores, name: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    first, second = cores.peer(), others.peer()

    async def body(proxy: Proxy, store: Cupboard) -> None:
        first.send(IN.encode())
        await until(lambda: proxy.stats.delivered == 1)
        first.send(IN.encode())
        if not at_once:
            name.unlink()  # noqa: ASYNC240
            await until(lambda: not proxy.status.running)
            assert proxy.status.down_reason == f"the network namespace {name} is gone"
            await until(lambda: "link" not in store.kept)
            await until(lambda: packet_sockets(cores.core0) == 0)
            trigger(tmp_path / "irq/message_6_trig")
            await until(lambda: any(signal.pending for signal in proxy.status.signals))
        give(name, others.core0)
        await until(lambda: packet_sockets(others.core0) == 1 and proxy.status.running and "link" in store.kept)
        if at_once:
            trigger(tmp_path / "irq/message_6_trig")
        assert OUT.encode() in await trio.to_thread.run_sync(second.receive, HANG)
        second.send(IN.encode())
        await until(lambda: proxy.stats.delivered == 3)
        await until(lambda: packet_sockets(cores.core0) == 0)
        assert proxy.stats.link_downs == 1
        if not at_once:
            assert proxy.status.last_down_reason == f"the network namespace {name} is gone"
            assert (proxy.status.last_down_duration or 0.0) > 0.0

    following(name, cores, tmp_path, body)
    first.close()
    second.close()
    assert f"{cores.link}: the network namespace {name} was removed or replaced" in caplog.messages


@pytest.mark.parametrize("while_running", [True, False], ids=["while it runs", "during a restart"])
def test_frames_in_the_queue_of_a_deleted_namespace_are_delivered(
    cores: Cores, others: Cores, name: Path, tmp_path: Path, while_running: bool
) -> None:
    first, stores = cores.peer(), [Cupboard()]

    def replace() -> None:
        """Queue frames, and replace the namespace with its interface."""
        for _ in range(3):
            first.send(IN.encode())
        cores.delete_link()
        give(name, others.core0)

    async def main() -> None:
        config = Config(cores.link, builtin_signals(tmp_path / "irq"), netns=name)
        async with open_supervised(config, stores[0]) as proxy:
            await until(lambda: proxy.status.running)
            if while_running:
                replace()
                await until(lambda: proxy.stats.delivered == 3)
        if not while_running:
            replace()
            stores.append(stores[0].heir())
            async with open_supervised(config, stores[1]) as proxy:
                assert proxy.stats.delivered == 3

    give(name, cores.core0)
    try:
        trio.run(main)
    finally:
        first.close()
        stores[-1].close()


def overfill(fd: int, peer: Peer) -> None:
    """Send 100 frames to a socket whose queue has room for fewer."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # The kernel uses its minimum.
    for _ in range(100):
        peer.send(IN.encode())


def test_frames_that_an_inherited_socket_has_dropped_are_counted(
    cores: Cores, others: Cores, name: Path, tmp_path: Path
) -> None:
    first, store = cores.peer(), Cupboard()

    async def main() -> None:
        nonlocal store
        config = Config(cores.link, builtin_signals(tmp_path / "irq"), netns=name)
        async with open_supervised(config, store):
            pass
        overfill(store.kept["link"], first)
        give(name, others.core0)
        store = store.heir()
        async with open_supervised(config, store) as proxy:
            assert 0 < proxy.stats.delivered < 100
            assert proxy.stats.delivered + proxy.stats.dropped == 100

    give(name, cores.core0)
    try:
        trio.run(main)
    finally:
        first.close()
        store.close()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_NETLINK, socket.SOCK_DGRAM),
    ],
)
def test_an_inherited_socket_of_another_family_is_replaced(
    cores: Cores, tmp_path: Path, family: int, kind: int
) -> None:
    async def main() -> None:
        held = socket.socket(family, kind).detach()
        async with open_supervised(Config(cores.link, builtin_signals(tmp_path / "irq")), Cupboard({"link": held})):
            pass

    cores.core0.run(lambda: trio.run(main))


def test_a_reload_keeps_a_board_whose_namespace_was_replaced(
    cores: Cores, others: Cores, name: Path, tmp_path: Path
) -> None:
    """A new proxy would lose the counters and, if a register is blocked, could not be opened."""

    async def main() -> None:
        configs = {"b": Config(cores.link, builtin_signals(tmp_path / "irq"), wait_link=True, netns=name)}
        async with open_proxies(configs) as proxies:
            proxy = proxies["b"]
            await until(lambda: proxy.status.running)
            give(name, others.core0)
            await until(lambda: proxy.stats.link_downs == 1 and proxy.status.running)
            (tmp_path / "irq/message_5_state").unlink()
            (tmp_path / "irq/message_5_state").mkdir()
            assert await proxies.reload(configs) == {}
            assert proxies["b"] is proxy

    give(name, cores.core0)
    trio.run(main)


class Board:
    """The board on which a `Feed` reports."""

    name = ""

    def __init__(self) -> None:
        self.open: dict[str, Proxy] = {}

    def proxies(self) -> Mapping[str, Proxy]:
        return self.open

    def not_open(self) -> Mapping[str, str]:
        return {}


def test_a_monitor_of_frames_delays_no_frame_of_a_batch(
    cores: Cores, others: Cores, name: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The namespace vanishes while the device queue is full. The frame of the sent notification is then unknown."""
    second, board, monitor = others.peer(), Board(), Monitor(frames=True)
    is_full, sent, send = True, list[str](), PacketLink.send

    def send_some(link: PacketLink, signal: str) -> None:
        """Accept the first frame at once and the second frame when it is retried. Then the queue stays full."""
        sent.append(signal)
        if is_full and len(sent) not in (1, 3):
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        send(link, signal)

    async def body(proxy: Proxy, _store: Cupboard) -> None:
        nonlocal is_full
        board.open[""] = proxy
        feed.add(monitor)
        await until(lambda: proxy.status.running)
        monkeypatch.setattr(PacketLink, "send", send_some)
        for _ in range(3):
            trigger(tmp_path / "irq/message_6_trig")
        await until(lambda: len(sent) > 4)
        name.unlink()  # noqa: ASYNC240
        await until(lambda: not proxy.status.running and proxy.stats.sent == 2)
        await until(lambda: any("Network is down" in (task.problem or "") for task in proxy.status.tasks))
        is_full = False
        give(name, others.core0)
        assert OUT.encode() in await trio.to_thread.run_sync(second.receive, HANG)
        await until(lambda: proxy.stats.sent == 3)
        assert proxy.stats.restarts == 0
        feed.remove(monitor)
        monitor.end()
        events = [json.loads(line) for line in (await monitor.take()).splitlines()]
        told = [event for event in events if event["event"] == "notification"]
        assert [event["sequence"] for event in told] == [1, 2, 3]
        assert [event["frame"] is None for event in told] == [False, True, False]

    feed = Feed(board)
    following(name, cores, tmp_path, body, feed)
    second.close()


@pytest.fixture
def opened(cores: Cores, name: Path) -> Iterator[Callable[[], NamespaceLink]]:
    """Return a function that opens a link in the network namespace that `name` refers to."""
    around = Surroundings()

    def open_named() -> NamespaceLink:
        link, _ = open_link(InterfaceAddress(cores.link), name, None, memoryview(bytearray(16)), around)
        assert isinstance(link, NamespaceLink)
        return link

    yield open_named
    around.close()


def test_a_flood_is_also_filtered_in_the_new_namespace(
    cores: Cores, others: Cores, name: Path, opened: Callable[[], NamespaceLink]
) -> None:
    async def main() -> None:
        give(name, cores.core0)
        link = opened()
        assert link.refresh()
        link.expect({IN.encode()}, ())
        assert link.restrict(True)
        for cores_now, on in ((others, True), (cores, False)):
            if not on:
                link.restrict(False)
            give(name, cores_now.core0)
            assert link.refresh()
            assert link._inner is not None
            assert (link._inner._form is not None) == on
        link.close()

    trio.run(main)


@pytest.mark.parametrize("at_once", [1, 200])
def test_frames_that_were_dropped_in_the_old_namespace_are_counted(
    cores: Cores, others: Cores, name: Path, opened: Callable[[], NamespaceLink], at_once: int
) -> None:
    first, rooms = cores.peer(), [memoryview(bytearray(200)) for _ in range(at_once)]

    async def main() -> None:
        give(name, cores.core0)
        link = opened()
        assert link.refresh()
        overfill(link.fd, first)
        give(name, others.core0)
        assert link.refresh()
        received = 0
        while read := len(link.receive_into(rooms, 200)) if at_once > 1 else int(link.receive_one(rooms[0]) > 0):
            received += read
        assert 0 < received < 100
        assert received + link.dropped() == 100
        assert link.dropped() == 0
        link.close()

    trio.run(main)
    first.close()


@pytest.mark.parametrize("at_start", [True, False])
def test_a_namespace_that_is_replaced_while_the_link_enters_it_is_left_again(
    cores: Cores,
    others: Cores,
    name: Path,
    opened: Callable[[], NamespaceLink],
    monkeypatch: pytest.MonkeyPatch,
    at_start: bool,
) -> None:
    open_inner = PacketLink.open

    def replace_and_open(link: str) -> PacketLink:
        give(name, others.core0)
        return open_inner(link)

    async def main() -> None:
        give(name, cores.core0)
        if not at_start:
            link = opened()
            name.unlink()  # noqa: ASYNC240
            assert not link.refresh()
            give(name, cores.core0)
        with monkeypatch.context() as patch:
            patch.setattr(PacketLink, "open", replace_and_open)
            if at_start:
                link = opened()
            else:
                assert link.refresh()
        assert link.refresh()
        assert packet_sockets(others.core0) == 1
        link.close()

    trio.run(main)


def test_a_namespace_whose_path_cannot_be_watched_is_checked_regularly(
    cores: Cores, others: Cores, name: Path, opened: Callable[[], NamespaceLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Names, "watch", lambda *_: False)

    async def main() -> None:
        give(name, cores.core0)
        link = opened()
        assert link.refresh()
        give(name, others.core0)
        with trio.fail_after(HANG):
            await link.changed()
        assert link.refresh()
        assert packet_sockets(others.core0) == 1
        link.close()

    trio.run(main)


def test_a_name_that_is_not_a_namespace_is_waited_for(
    cores: Cores, others: Cores, name: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`ip netns add` first creates a file and then mounts the namespace on it."""

    async def body(proxy: Proxy, store: Cupboard) -> None:
        name.unlink()  # noqa: ASYNC240
        name.touch()  # noqa: ASYNC240
        await until(lambda: not proxy.status.running)
        give(name, others.core0)
        await until(lambda: proxy.status.running)

    following(name, cores, tmp_path, body)
    assert not [record for record in caplog.records if "cannot enter" in record.getMessage()]
