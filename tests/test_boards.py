"""Tests of many boards in one process: the boards directory, and proxies that share one inotify descriptor."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from inco_trio.board_files import read_boards, refuse_shared
from inco_trio.config import Config
from inco_trio.control.feed import Feed
from inco_trio.errors import BoardNotOpenError, ClosedError, ConfigError, ResourceError
from inco_trio.frame import decode, encode
from inco_trio.persist.fdstore import NoFdStore
from inco_trio.persist.inflight import Inflight
from inco_trio.proxy.fleet import Proxies, open_fleet, open_proxies
from inco_trio.proxy.proxy import Proxy
from inco_trio.proxy.share import Share, SharedInotify
from inco_trio.service.many_boards import ManyBoards
from inco_trio.signals import Direction, Signal, builtin_signals
from netns.hang import HANG
from tests.support_proxy import Cupboard
from tests.support_steps import at_each_step
from tests.test_history import SlowClient

P = ParamSpec("P")

FRAME = encode(b"ihub_hwwd_irq", bytes.fromhex("020000000001"))


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Return a test that runs an async function with Trio."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return run


class Place:
    """A directory with the registers and sockets of boards; the test acts as core 1 of each board."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home = home
        self._stack = stack

    def config(self, name: str) -> Config:
        link = f"unix:{self.home}/{name}.0,peer={self.home}/{name}.1"
        return Config(link, builtin_signals(self.home / name))

    def configs(self, *names: str) -> dict[str, Config]:
        return {name: self.config(name) for name in names}

    def peer(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._stack.callback(sock.close)
        sock.bind(str(self.home / f"{name}.1"))
        return sock

    def trigger(self, name: str) -> None:
        (self.home / name / "message_6_trig").write_text("1")

    def state(self, name: str) -> str:
        return (self.home / name / "message_5_state").read_text()

    def interrupt(self, name: str, peer: socket.socket) -> None:
        peer.sendto(FRAME, str(self.home / f"{name}.0"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


async def received(peer: socket.socket) -> bytes | None:
    with trio.fail_after(HANG):
        await trio.lowlevel.wait_readable(peer)
    return decode(peer.recv(200))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(HANG):
        while not condition():
            await wait_all_tasks_blocked()


async def wait_handled(proxies: Proxies, name: str, count: int) -> None:
    """Wait until a board has sent and delivered `count` notifications in total."""
    await until(lambda: proxies[name].stats.sent + proxies[name].stats.delivered >= count)


def write(directory: Path, files: Mapping[str, object]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_each_json_file_of_the_directory_is_a_board(tmp_path: Path) -> None:
    udrv = tmp_path / "udrv.json"
    udrv.write_text(json.dumps({"file": {"ihub-irq-dev": {"path": "/x/b"}}}))
    directory = write(
        tmp_path / "boards",
        {
            "a": {"link": "unix:/x/a.0,peer=/x/a.1", "irq_dir": "/x/a"},
            "b": {"link": "rpmsg0", "config": str(udrv), "netns": "b"},
            "c": {"link": "rpmsg0", "irq_dir": "/x/c", "netns": "/proc/1/ns/net"},
        },
    )
    (directory / "README").write_text("no board")
    (directory / ".d.json.swp").write_text("no board")
    boards = read_boards(directory)
    assert boards.refused == {}
    assert {name: (config.link, config.netns) for name, config in boards.configs.items()} == {
        "a": ("unix:/x/a.0,peer=/x/a.1", None),
        "b": ("rpmsg0", Path("/run/netns/b")),
        "c": ("rpmsg0", Path("/proc/1/ns/net")),
    }
    assert {signal.directory for signal in boards.configs["b"].signals} == {Path("/x/b")}
    assert len(boards.notes["b"]) == 3


LINK = "unix:/x/a.0,peer=/x/a.1"
EXPECTED = "expected an interface name or unix:LOCAL,peer=REMOTE"
EITHER = "expected either config, the path of a udrv.json, or irq_dir, a directory"
LONG = f"unix:/{'x' * 200},peer=/x/a.1"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("{", ["line 1 column 2: not JSON: Expecting property name enclosed in double quotes"]),
        ("[]", ["a list (expected a table)"]),
        ({}, [f"link: missing ({EXPECTED})", EITHER]),
        (
            {"link": LINK, "irq_dir": "/x", "config": "/y"},
            [EITHER],
        ),
        ({"link": 7, "irq_dir": "/x"}, [f"link: a number ({EXPECTED})"]),
        ({"link": LINK, "irq_dir": "x"}, ["irq_dir: 'x' (expected an absolute path)"]),
        (
            {"link": LINK, "irq_dir": "/x", "iface": "y"},
            ["iface: unknown key (expected one of link, config, irq_dir, netns, irq_owner)"],
        ),
        ('{"link": "a", "link": "b", "irq_dir": "/x"}', ["link: given more than once"]),
        ({"link": "unix:/x/a.0", "irq_dir": "/x"}, ["link: 'unix:/x/a.0': peer=REMOTE is missing (expected the "]),
        ({"link": "vsock:3", "irq_dir": "/x"}, ["link: 'vsock:3': expected unix:LOCAL,peer=REMOTE or an interface"]),
        (
            {"link": LONG, "irq_dir": "/x"},
            [f"link: '{LONG}': the path before ',peer=': the path has 201 bytes (expected at most 107"],
        ),
        ({"link": LINK, "irq_dir": "/x", "netns": "b"}, ["netns: not allowed for a unix: link (remove this key)"]),
        (
            {"link": "a", "irq_dir": "/x", "netns": "a/b"},
            ["netns: 'a/b' (expected a name under /run/netns or an absolute path)"],
        ),
    ],
)
def test_a_board_with_mistakes_is_refused_and_others_stay(tmp_path: Path, content: object, problems: list[str]) -> None:
    directory = write(tmp_path / "boards", {"bad": content, "good": {"link": "rpmsg0", "irq_dir": "/x/good"}})
    boards = read_boards(directory)
    assert list(boards.configs) == ["good"]
    said = str(boards.refused["bad"]).splitlines()
    assert len(said) == len(problems)
    for line, problem in zip(said, problems, strict=True):
        assert line.startswith(f"{directory}/bad.json: {problem}")


def test_an_invalid_board_name_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "boards", {"a b": {}, "-x": {}, "x" * 65: {}, "ä": {}})
    boards = read_boards(directory)
    assert boards.configs == {}
    assert {str(error) for error in boards.refused.values()} == {
        f"{directory}/{name}.json: a board's name must consist of 1 to 64 letters, digits, '.', '_' and '-'; "
        "the first must be a letter or digit"
        for name in ("a b", "-x", "x" * 65, "ä")
    }


def test_error_names_the_unreadable_udrv_json(tmp_path: Path) -> None:
    directory = write(tmp_path / "boards", {"a": {"link": "rpmsg0", "config": f"{tmp_path}/missing"}})
    assert str(read_boards(directory).refused["a"]) == f"{tmp_path}/missing: cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_an_unreadable_boards_directory_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "boards"
    if kind == "file":
        path.touch()
    with pytest.raises(ConfigError, match=f"{path}: cannot read the board directory: No"):
        read_boards(path)


def test_boards_that_share_a_link_or_directory_are_refused(place: Place) -> None:
    configs = place.configs("a", "b", "c", "d")
    configs["b"] = Config(configs["b"].link, configs["a"].signals)
    configs["c"] = Config(configs["a"].link, configs["c"].signals)
    (place.home / "link").symlink_to(place.home / "a")
    configs["d"] = Config(configs["d"].link, builtin_signals(place.home / "link"))
    assert refuse_shared(configs) == {
        "b": f"the directory {place.home}/a is already used by the board a",
        "c": f"the link {place.home}/a.0 is already used by the board a",
        "d": f"the directory {place.home}/link is already used by the board a",
    }
    # A board that is already open takes precedence.
    assert set(refuse_shared(configs, {"b": configs["b"]})) == {"a", "d"}


def test_a_reload_without_free_descriptors_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors, the proxy cannot find out which boards share a directory."""
    opened = os.open

    def refuse(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        if dir_fd is None:
            return opened(path, flags)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="boards: cannot compare their paths: Too many open files"):
        refuse_shared(place.configs("a"))


def test_an_open_board_keeps_its_link_and_directory(place: Place) -> None:
    now = place.configs("a", "b", "c")
    # Board b stays open although its file is now unreadable; board d must not use b's link.
    assert refuse_shared({"a": now["a"], "d": now["b"]}, now) == {
        "d": f"the link {place.home}/b.0 is already used by the board b"
    }
    # Board a cannot take b's link, so it keeps its own. Therefore board c cannot take a's link.
    refused = refuse_shared({"a": now["b"], "b": now["b"], "c": now["a"]}, {name: now[name] for name in "ab"})
    assert refused == {
        "a": f"the link {place.home}/b.0 is already used by the board b",
        "c": f"the link {place.home}/a.0 is already used by the board a",
    }
    # Two boards are allowed to swap their links and directories.
    assert refuse_shared({"a": now["b"], "b": now["a"]}, {name: now[name] for name in "ab"}) == {}


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_a_directory_of_many_boards_is_read(tmp_path: Path, count: int) -> None:
    directory = write(tmp_path / "boards", {f"b{i}": {"link": f"i{i}", "irq_dir": f"/x/{i}"} for i in range(count)})
    boards = read_boards(directory)
    assert (len(boards.configs), boards.refused) == (count, {})


@in_trio
async def test_each_board_handles_its_own_notifications(place: Place) -> None:
    names = [f"board{i}" for i in range(20)]
    peers = {name: place.peer(name) for name in names}
    async with open_proxies(place.configs(*names)) as proxies:
        assert sorted(proxies) == sorted(names)
        for name in names:
            place.trigger(name)
            place.interrupt(name, peers[name])
        for name in names:
            assert await received(peers[name]) == b"redun_notify_irq"
            await wait_handled(proxies, name, 2)
            assert place.state(name) == "1"
    assert {(stats.sent, stats.delivered) for stats in proxies.stats.values()} == {(1, 1)}
    # The proxies have removed their sockets.
    assert not [path for path in place.home.iterdir() if path.name.endswith(".0")]
    with pytest.raises(ClosedError):
        await proxies.reload({})


@contextlib.contextmanager
def covered(directory: Path) -> Iterator[None]:
    """Mount an empty tmpfs over a directory while the block runs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.netns  # Mounting needs root.
@in_trio
async def test_a_mount_over_the_directory_of_each_board_is_noticed(place: Place) -> None:
    peers = {name: place.peer(name) for name in ("a", "b")}
    async with open_proxies(place.configs("a", "b")):
        for name, peer in peers.items():
            directory = place.home / name
            with covered(directory):
                await until((directory / "message_6_trig").exists)
                place.trigger(name)
                assert await received(peer) == b"redun_notify_irq"


@in_trio
async def test_a_board_that_cannot_be_opened_is_retried(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    (place.home / "bad").mkdir()
    (place.home / "bad/message_5_state").symlink_to("/dev/null")
    peer = place.peer("good")
    async with open_proxies(place.configs("bad", "good")) as proxies:
        assert list(proxies) == ["good"]
        remedy = "remove it, or configure another register"
        problem = f"{place.home}/bad/message_5_state: not a regular file but a symlink ({remedy})"
        assert proxies.not_open == {"bad": problem}
        assert isinstance(proxies, Mapping)
        assert ("bad" in proxies, proxies.get("bad")) == (False, None)
        with pytest.raises(BoardNotOpenError, match=f"^bad: not open: {re.escape(problem)}$"):
            proxies["bad"]
        with pytest.raises(KeyError):
            proxies["bad"]
        place.trigger("good")
        assert await received(peer) == b"redun_notify_irq"
        (place.home / "bad/message_5_state").unlink()
        await proxies.reload(place.configs("bad", "good"))
        await until(lambda: len(proxies) == 2)
    assert len([record for record in caplog.records if "not open" in record.message]) == 1


@in_trio
async def test_a_failing_proxy_is_reopened_without_affecting_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peers = {name: place.peer(name) for name in ("a", "b")}
    monkeypatch.setattr("inco_trio.proxy.fleet.PAUSE", 0.01)
    async with open_proxies(place.configs("a", "b")) as proxies:
        broken, fine = proxies["a"], proxies["b"]

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(broken._inbound._states, "write_alone", fail)
        place.interrupt("a", peers["a"])
        await until(lambda: "a" in proxies and proxies["a"] is not broken)
        # The new proxy delivers the notification that was in flight, as it does after a crash.
        await wait_handled(proxies, "a", 1)
        assert place.state("a") == "1"
        assert proxies["b"] is fine
        place.trigger("a")
        assert await received(peers["a"]) == b"redun_notify_irq"
    assert "internal error: this is a bug in inco-trio; please report it" in caplog.text


@in_trio
async def test_a_board_that_was_open_is_retried_after_the_shortest_pause(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.proxy.fleet.PAUSE", 0.01)
    monkeypatch.setattr("inco_trio.proxy.fleet.PAUSE_MAX", math.inf)
    (place.home / "a").mkdir()
    (place.home / "a/message_5_state").symlink_to("/dev/null")
    peer = place.peer("a")
    async with open_proxies(place.configs("a")) as proxies:
        for _ in range(20):  # Each reload tries to open the board, and doubles the pause.
            await proxies.reload(place.configs("a"))
            await wait_all_tasks_blocked()
        (place.home / "a/message_5_state").unlink()
        await proxies.reload(place.configs("a"))
        await until(lambda: "a" in proxies)
        broken = proxies["a"]

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(broken._inbound._states, "write_alone", fail)
        place.interrupt("a", peer)
        await until(lambda: "a" in proxies and proxies["a"] is not broken)


@in_trio
async def test_a_reload_adds_removes_and_changes_boards(place: Place) -> None:
    peers = {name: place.peer(name) for name in ("a", "b", "c")}
    async with open_proxies(place.configs("a", "b")) as proxies:
        before = proxies["b"]
        more = (*place.config("b").signals, Signal("more", Direction.OUTBOUND, place.home / "b", "more_trig"))
        configs = place.configs("c") | {"b": Config(place.config("b").link, more)}
        # A board sends its pending notifications before it is removed.
        place.trigger("a")
        assert await proxies.reload(configs) == {}
        assert await received(peers["a"]) == b"redun_notify_irq"
        assert sorted(proxies) == ["b", "c"]
        assert proxies["b"] is before
        assert not (place.home / "a.0").exists()
        (place.home / "b/more_trig").write_text("1")
        assert await received(peers["b"]) == b"more"
        place.trigger("c")
        assert await received(peers["c"]) == b"redun_notify_irq"
        # The proxies no longer watch the trigger file of the removed board a.
        place.trigger("a")
        place.trigger("b")
        assert await received(peers["b"]) == b"redun_notify_irq"
        assert before.stats.unknown == 0
        # Board a can be added again.
        assert await proxies.reload(configs | place.configs("a")) == {}
        place.trigger("a")
        assert await received(peers["a"]) == b"redun_notify_irq"


@in_trio
async def test_a_changed_link_creates_a_new_proxy(place: Place) -> None:
    peer = place.peer("a")
    async with open_proxies(place.configs("a")) as proxies:
        before = proxies["a"]
        link = f"unix:{place.home}/other.0,peer={place.home}/a.1"
        assert await proxies.reload({"a": Config(link, place.config("a").signals)}) == {}
        assert proxies["a"] is not before
        place.trigger("a")
        assert await received(peer) == b"redun_notify_irq"
        assert not (place.home / "a.0").exists()
        assert (place.home / "other.0").exists()


@pytest.mark.parametrize("away", [False, True])
@in_trio
async def test_changing_the_link_loses_no_triggered_notification(place: Place, away: bool) -> None:
    former, later = place.peer("a"), place.peer("b")
    if away:
        former.close()
        (place.home / "a.1").unlink()
    triggered = 0
    came = 0

    def trigger() -> None:
        nonlocal triggered
        place.trigger("a")
        triggered += 1
        read()

    def read() -> bool:
        nonlocal came
        for peer in (later,) if away else (former, later):
            with contextlib.suppress(BlockingIOError):
                while peer.recv(200):
                    came += 1
        return came == triggered

    async with open_proxies(place.configs("a")) as proxies:
        trigger()
        moved = Config(place.config("b").link, place.config("a").signals)
        with at_each_step(trigger):
            assert await proxies.reload({"a": moved}) == {}
        assert triggered > 10
        trigger()
        await until(read)
        assert not (place.home / "a.0").exists()


@in_trio
async def test_a_slowly_closing_board_does_not_delay_others(place: Place) -> None:
    async with open_proxies(place.configs("slow")) as proxies:
        place.trigger("slow")  # The socket of core 1 does not exist yet.
        await until(lambda: proxies["slow"].stats.triggered == 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxies.reload, place.configs("new"))
            await until(lambda: "new" in proxies)
            assert "slow" in proxies.configs
            place.peer("slow")
        assert list(proxies) == ["new"]


@in_trio
async def test_a_reload_recreates_a_removed_directory(place: Place) -> None:
    place.peer("a")
    async with open_proxies(place.configs("a")) as proxies:
        shutil.rmtree(place.home / "a")
        await until(lambda: proxies["a"]._is_incomplete())
        assert await proxies.reload(place.configs("a")) == {}
        assert (place.home / "a").is_dir()


def large(place: Place, name: str, number: int = 30) -> Config:
    """Return a configuration with many triggers."""
    directory = place.home / name
    triggers = (Signal(f"many_{n}_irq", Direction.OUTBOUND, directory, f"many_{n}_trig") for n in range(number))
    return attrs.evolve(place.config(name), signals=(*builtin_signals(directory), *triggers))


@in_trio
async def test_a_reload_that_adds_a_large_board_lets_others_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # With TURN = 0, other tasks run after each step.
    monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
    peer, directory = place.peer("large"), place.home / "large"
    async with open_proxies(place.configs("a")) as proxies, trio.open_nursery() as nursery:
        nursery.start_soon(proxies.reload, {"a": place.config("a"), "large": large(place, "large")})
        made, largest = 0, 0
        written = False
        while "large" not in proxies:
            await trio.lowlevel.checkpoint()
            found = len(list(directory.glob("*_trig"))) if directory.exists() else 0
            made, largest = found, max(largest, found - made)
            if not written and (directory / "many_3_trig").exists():
                (directory / "many_3_trig").write_text("1")  # The board is not open yet.
                written = True
        assert (made, written) == (31, True)
        # Allow two steps: Trio might run the board last in one round of its tasks and first in the next round.
        assert largest <= 2
        assert await received(peer) == b"many_3_irq"
        place.trigger("large")
        assert await received(peer) == b"redun_notify_irq"
        assert proxies["large"].stats.triggered == 2


@in_trio
async def test_a_reload_that_adds_many_boards_opens_one_at_a_time(place: Place) -> None:
    names = ("a", *(f"b{number}" for number in range(20)))
    async with open_proxies(place.configs("a")) as proxies, trio.open_nursery() as nursery:
        nursery.start_soon(proxies.reload, place.configs(*names))
        opened, largest = 1, 0
        while opened < len(names):
            await trio.lowlevel.checkpoint()
            opened, largest = len(proxies), max(largest, len(proxies) - opened)
        # Allow two boards: Trio might run one last in a round of its tasks, and another one first in the next round.
        assert largest <= 2


@in_trio
async def test_a_reload_that_removes_a_large_board_lets_others_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_proxies({"a": place.config("a"), "large": large(place, "large")}) as proxies:
        monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
        watches = proxies._shared._watches
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxies.reload, place.configs("a"))
            before, largest = len(watches), 0
            while len(proxies.configs) > 1 or len(proxies._kept) > 1 or len(watches) > 10:
                await trio.lowlevel.checkpoint()
                before, largest = len(watches), max(largest, before - len(watches))
        assert largest <= 2


@in_trio
async def test_a_reload_is_planned_in_another_thread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def plan(*args: Mapping[str, Config]) -> dict[str, str]:
        threads.append(threading.current_thread() is threading.main_thread())
        return refuse_shared(*args)

    monkeypatch.setattr("inco_trio.proxy.fleet.refuse_shared", plan)
    async with open_proxies(place.configs("a")) as proxies:
        # The daemon drops its capabilities after the start, but other threads would keep them.
        assert set(threads) == {True}
        await proxies.reload(place.configs("a", "b"))
        assert threads[-1] is False


@in_trio
async def test_a_reload_during_a_retry_uses_the_new_configuration(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
    monkeypatch.setattr("inco_trio.proxy.fleet.PAUSE", 0.01)
    peer, directory, fewer = place.peer("large"), place.home / "large", large(place, "large", 5)
    directory.touch()
    async with open_proxies({"large": large(place, "large")}) as proxies:
        assert list(proxies) == []
        directory.unlink()
        with trio.fail_after(HANG):
            while not (directory / "many_3_trig").exists():
                await trio.lowlevel.checkpoint()
            assert list(proxies) == []
            assert await proxies.reload({"large": fewer}) == {}
        assert proxies["large"].config == fewer
        (directory / "many_4_trig").write_text("1")
        assert await received(peer) == b"many_4_irq"


@in_trio
async def test_a_board_can_be_removed_while_it_is_opened(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.nurseries.TURN", 0.0)
    monkeypatch.setattr("inco_trio.proxy.fleet.PAUSE", 0.01)
    directory = place.home / "large"
    directory.touch()
    place.peer("large")
    async with open_proxies({"a": place.config("a"), "large": large(place, "large")}) as proxies:
        directory.unlink()
        with trio.fail_after(HANG):
            while not (directory / "many_3_trig").exists():
                await trio.lowlevel.checkpoint()
            assert await proxies.reload(place.configs("a")) == {}
            assert list(proxies) == ["a"]
            assert await proxies.reload({"a": place.config("a"), "large": large(place, "large")}) == {}
        assert list(proxies) == ["a", "large"]
        assert proxies["large"].stats.triggered == 0


@in_trio
async def test_a_refused_reload_changes_nothing(place: Place) -> None:
    peers = {name: place.peer(name) for name in ("a", "b")}
    async with open_proxies(place.configs("a", "b")) as proxies:
        (place.home / "file").touch()
        bad = Config(place.config("a").link, builtin_signals(place.home / "file/irq"))
        twice = Config(place.config("b").link, place.config("a").signals)
        refused = await proxies.reload({"a": bad, "b": place.config("b")})
        assert list(refused) == ["a"]
        assert await proxies.reload(place.configs("a") | {"c": twice, "b": place.config("b")}) != {}
        # `keep` lists the boards with refused files, so board "a" stays open.
        assert await proxies.reload(place.configs("b"), keep=["a"]) == {}
        for name, peer in peers.items():
            place.trigger(name)
            assert await received(peer) == b"redun_notify_irq"


@in_trio
async def test_boards_that_share_something_cannot_be_opened(place: Place) -> None:
    configs = place.configs("a") | {"b": place.config("a")}
    with pytest.raises(ConfigError, match=f"^b: the link {place.home}/a.0 is already used by the board a$"):
        async with open_proxies(configs):
            pass


@in_trio
async def test_errors_of_the_block_are_raised_unchanged(place: Place) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_proxies(place.configs("a")):
            raise ZeroDivisionError


@in_trio
async def test_the_parent_directory_is_watched_for_each_board(place: Place) -> None:
    peers = {name: place.peer(name) for name in ("a", "b")}
    async with open_proxies(place.configs("a", "b")):
        for name, peer in peers.items():
            (place.home / name).rename(place.home / f"{name}.away")
            (place.home / name).mkdir()
            # A trigger file that another process creates counts as a notification.
            (place.home / name / "message_6_trig").write_text("1")
            assert await received(peer) == b"redun_notify_irq"


@in_trio
async def test_a_successor_inherits_the_stored_descriptors(place: Place) -> None:
    names = ("a", "b", "gone")
    peers = {name: place.peer(name) for name in names}
    holder = Cupboard()
    async with open_fleet(place.configs(*names), holder):
        pass
    for name in names:
        place.trigger(name)
        place.interrupt(name, peers[name])
    async with open_fleet(place.configs("a", "b"), heir := holder.heir()) as proxies:
        for name in ("a", "b"):
            assert await received(peers[name]) == b"redun_notify_irq"
            await wait_handled(proxies, name, 2)
            assert place.state(name) == "1"
        assert sorted(heir.kept) == ["bundle", "inflight", "inotify"]
        assert heir.stored == ["bundle", "bundle"]  # The second one does not contain the descriptors of "gone".
        # The new proxies do not send the inherited notifications a second time.
        place.trigger("a")
        assert await received(peers["a"]) == b"redun_notify_irq"
        assert proxies["a"].stats.sent == 2
    heir.close()


@in_trio
async def test_the_socket_of_a_board_that_was_removed_meanwhile_is_closed(place: Place) -> None:
    """Otherwise, it would receive frames that no process reads, and another proxy could not take over the path."""
    peer = place.peer("moved")
    holder = Cupboard()
    async with open_fleet(place.configs("a", "moved"), holder):
        pass
    async with open_fleet(place.configs("a"), heir := holder.heir()):
        with pytest.raises(ConnectionRefusedError):
            place.interrupt("moved", peer)
        async with open_proxies(place.configs("moved")) as others:
            place.interrupt("moved", peer)
            await wait_handled(others, "moved", 1)
    heir.close()


@in_trio
async def test_a_board_whose_link_is_down_fills_only_its_own_queue(place: Place) -> None:
    other = place.peer("other")
    async with open_proxies(place.configs("down", "other")) as proxies:
        for _ in range(2000):
            place.trigger("down")
        place.trigger("other")
        assert await received(other) == b"redun_notify_irq"
        peer = place.peer("down")
        for _ in range(2000):
            assert await received(peer) == b"redun_notify_irq"
        assert proxies["down"].stats.sent == 2000
        assert proxies["down"].stats.overflowed == 0


async def read_all(peer: socket.socket) -> None:
    while True:
        await trio.lowlevel.wait_readable(peer)
        peer.recv(200)


def rename(home: Path, number: int) -> None:
    for _ in range(number // 2):
        (home / "new").rename(home / "old").rename(home / "new")


def change_modes(home: Path, number: int) -> None:
    """Change the modes of two files in the directory above, which all boards watch."""
    for mode in (0o755, 0o700) * (number // 4):
        for name in ("one", "two"):
            (home.parent / name).chmod(mode)


def create_and_remove(home: Path, number: int) -> None:
    for _ in range(number):
        (home / "created").touch()
        (home / "created").unlink()


def write_in_turn(home: Path, number: int) -> None:
    with (home / "message_1_trig").open("ab", 0) as one, (home / "message_6_trig").open("ab", 0) as other:
        for _ in range(number):
            one.write(b"1")
            other.write(b"1")


@pytest.mark.parametrize(
    "flood",
    [rename, change_modes, pytest.param(create_and_remove, marks=pytest.mark.thorough), write_in_turn],
)
@in_trio
async def test_a_flood_of_one_board_overflows_no_queue_of_another(
    place: Place, monkeypatch: pytest.MonkeyPatch, flood: Callable[[Path, int], None]
) -> None:
    """At each read of its board, the application causes several times the events that the board reads."""
    peers = {name: place.peer(name) for name in ("a", "b")}
    flooded, sent = place.home / "a", 0
    read_into = Share.read_into
    configs = place.configs("a", "b")
    uart = Signal("uart_irq", Direction.OUTBOUND, flooded, "message_1_trig")
    configs["a"] = Config(configs["a"].link, [*configs["a"].signals, uart])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, peers["a"])
        async with open_proxies(configs) as proxies:
            for path in (flooded / "new", place.home / "one", place.home / "two"):
                path.touch()
            share = proxies._kept["a"].share

            def read(self: Share, buffer: memoryview) -> int:
                nonlocal sent
                if self is share and sent < 24:
                    flood(flooded, 1024)
                    place.trigger("b")
                    sent += 1
                return read_into(self, buffer)

            monkeypatch.setattr(Share, "read_into", read)
            # Fill a part of the board's queue.
            while len(share.queue) < 400_000 and flood is not change_modes:
                flood(flooded, 1024)
                proxies._shared.drain()
            for _ in range(24):
                if sent < 24:
                    place.trigger("a")
                assert await received(peers["b"]) == b"redun_notify_irq"
            await until(lambda: proxies["b"].stats.triggered >= sent)
            assert (sent, proxies["b"].stats.triggered, proxies["b"].stats.overflowed) == (24, 24, 0)
        nursery.cancel_scope.cancel()


@in_trio
async def test_unknown_names_are_one_cause_of_log_lines(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """With `-v`, the log contains unknown names, but core 1 must not be able to fill the log."""
    caplog.set_level(logging.DEBUG, "inco_trio")
    peer = place.peer("a")
    async with open_proxies(place.configs("a")) as proxies:
        for number in range(5):
            peer.sendto(encode(b"name%d" % number, bytes(6)), str(place.home / "a.0"))
        await until(lambda: proxies["a"].stats.unknown == 5)
    records = [record for record in caplog.records if "unknown signal" in record.getMessage()]
    assert [record.getMessage()[:5] for record in records] == [f"name{number}" for number in range(5)]
    assert {getattr(record, "cause", record.getMessage()) for record in records} == {"unknown signal"}


@in_trio
async def test_log_lines_name_the_board(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    from inco_trio.problems import board_name

    seen: list[str] = []

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.DEBUG:
                seen.append(board_name.get())

    caplog.set_level(logging.DEBUG, "inco_trio")
    handler = Names()
    logging.getLogger("inco_trio").addHandler(handler)
    try:
        peer = place.peer("a")
        async with open_proxies(place.configs("a", "b")) as proxies:
            place.trigger("a")
            assert await received(peer) == b"redun_notify_irq"
            place.interrupt("a", peer)
            await wait_handled(proxies, "a", 2)
    finally:
        logging.getLogger("inco_trio").removeHandler(handler)
    assert seen == ["a", "a"]


@in_trio
async def test_error_says_how_to_create_a_missing_network_namespace(place: Place) -> None:
    config = Config("none0", builtin_signals(place.home / "a"), wait_link=True, netns=place.home / "netns")
    async with open_proxies({"a": config}) as proxies:
        assert proxies.not_open["a"] == (
            f"none0: there is no network namespace {place.home}/netns (create it with `ip netns add NAME`)"
        )


@in_trio
async def test_20_boards_start_without_filling_the_inotify_queue(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[int] = []
    read: list[int] = []
    share = SharedInotify.share

    def counted(shared: SharedInotify, inflight: Inflight) -> Share:
        queued.append(shared.inotify.queued)
        read.append(shared.inotify.read)
        return share(shared, inflight)

    monkeypatch.setattr(SharedInotify, "share", counted)
    async with open_proxies(place.configs(*(f"b{number}" for number in range(20)))) as proxies:
        assert len(proxies) == 20
    assert len(queued) == 20
    # The number may exceed 0: while another process reads /proc/PID/fd, the kernel can queue the event of a close(2)
    # after the call has returned.
    assert max(queued) < read[-1] / 19, "the events of a whole board are queued"


def test_an_owner_that_is_removed_during_the_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"link": "a", "irq_dir": "/run/a", "irq_owner": "app"}
    (tmp_path / "a.json").write_text(json.dumps(entry))
    calls = iter([(12, 13)])

    def find(text: str) -> tuple[int, int]:
        for ids in calls:
            return ids
        raise ValueError(f"{text!r}: no such user or group")

    monkeypatch.setattr("inco_trio.board_files.find_owner", find)
    assert str(read_boards(tmp_path).refused["a"]) == f"{tmp_path}/a.json: irq_owner: 'app': no such user or group"


@in_trio
async def test_a_reload_reports_a_path_with_a_line_break_as_one_problem(tmp_path: Path) -> None:
    directory = tmp_path / "boards\nof a rack"
    directory.mkdir()
    boards = ManyBoards(directory)
    async with boards.open(NoFdStore(), None):
        (directory / "a.json").write_text("{}")
        found = await boards.reload()
    assert [problem.partition("a.json: ")[0] for problem in found] == [f"a: {directory}/"] * len(found)


@in_trio
async def test_the_status_of_many_boards_looks_up_each_board_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"b{number}" for number in range(20)]
    entries = {
        name: {"link": f"unix:{tmp_path}/{name}.0,peer=/x/{name}", "irq_dir": f"{tmp_path}/{name}"} for name in names
    }
    found: list[str] = []

    class Counted(Proxies):
        def __getitem__(self, name: str) -> Proxy:
            found.append(name)
            return super().__getitem__(name)

    monkeypatch.setattr("inco_trio.proxy.fleet.Proxies", Counted)
    boards = ManyBoards(write(tmp_path / "boards", entries))
    async with boards.open(NoFdStore(), None), trio.open_nursery() as nursery:
        client = SlowClient(Feed(boards))
        with client.closing:
            nursery.start_soon(client.connection.run)
            await client.read()
            found.clear()
            await client.send({"request": "status"})
            (answer,) = await client.read()
            nursery.cancel_scope.cancel()
    assert [board["board"] for board in answer["status"]] == found
    assert sorted(found) == sorted(names)


def test_a_board_file_may_name_the_owner_of_its_directory(tmp_path: Path) -> None:
    entry = {"link": "a", "irq_dir": "/run/a", "irq_owner": "12:13"}
    (tmp_path / "a.json").write_text(json.dumps(entry))
    (tmp_path / "b.json").write_text(
        json.dumps(entry | {"link": "b", "irq_dir": "/run/b", "irq_owner": "no such user"})
    )
    boards = read_boards(tmp_path)
    assert (boards.configs["a"].owner, boards.configs["a"].group) == (12, 13)
    assert str(boards.refused["b"]) == f"{tmp_path}/b.json: irq_owner: 'no such user': no such user or group"
