"""Tests of the commands `inco-trio run --boards`, `check --boards` and `s6 --boards`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.cli.options import boards_label
from inco_trio.frame import decode, encode
from inco_trio.service.many_boards import ManyBoards
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.supervised import Service, main_process, wait_path

FRAME = encode(b"ihub_hwwd_irq", bytes.fromhex("020000000001"))


class Boards:
    """A directory of boards on `unix:` links; the test acts as core 1 of each board."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.directory = home, home / "boards"
        self._stack = stack
        self.directory.mkdir()

    def add(self, *names: str, **more: str) -> None:
        for name in names:
            board = {"link": f"unix:{self.home}/{name}.0,peer={self.home}/{name}.1", "irq_dir": f"{self.home}/{name}"}
            self.write(name, board | more)

    def write(self, name: str, board: object) -> None:
        (self.directory / f"{name}.json").write_text(board if isinstance(board, str) else json.dumps(board))

    def remove(self, name: str) -> None:
        (self.directory / f"{name}.json").unlink()

    def peer(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._stack.callback(sock.close)
        sock.settimeout(HANG)
        sock.bind(f"{self.home}/{name}.1")
        return sock

    def trigger(self, name: str) -> None:
        (self.home / name / "message_6_trig").write_text("1")

    def interrupt(self, name: str, peer: socket.socket) -> None:
        peer.sendto(FRAME, f"{self.home}/{name}.0")

    def delivered(self, name: str) -> None:
        """Wait until the proxy has written the notification to the state file."""
        state = self.home / name / "message_5_state"
        wait_path(state, lambda: state.exists() and state.read_text() == "1")


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    with ExitStack() as stack:
        yield Boards(tmp_path, stack)


StartDaemon = Callable[..., Proxy]


@pytest.fixture
def daemon(boards: Boards, tmp_path: Path) -> Iterator[StartDaemon]:
    with ExitStack() as stack:

        def start(*options: str) -> Proxy:
            arguments = ["--boards", str(boards.directory), "--log-format", "json", *options]
            proxy = Proxy(None, arguments, {}, tmp_path / "log")
            stack.callback(proxy.process.wait)
            stack.callback(proxy.process.kill)
            proxy.wait_ready()
            return proxy

        yield start


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "inco_trio", *map(str, words)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=HANG, check=False)


def test_a_board_that_is_added_after_a_crash_has_no_predecessor(boards: Boards, daemon: StartDaemon) -> None:
    boards.add("a")
    path = f"{boards.home}/control"
    first = daemon("--control", path)
    first.process.kill()
    first.process.wait()
    proxy = daemon("--control", path)
    boards.add("b")
    assert command("reload", "--control", path).returncode == 0
    for name, crashed in (("a", True), ("b", False)):
        (started,) = [
            json.loads(line)["message"]
            for line in command("history", "--control", path, "--board", name, "--json").stdout.splitlines()
            if json.loads(line)["event"] == "started"
        ]
        assert started.startswith("started after the previous process") is crashed
    assert proxy.stop() == 0


def test_boards_are_known_before_they_are_open(boards: Boards) -> None:
    """The control socket answers first. A client that names a board must not be refused as if it did not exist."""
    boards.add("a", "b")
    opening = ManyBoards(boards.directory)
    assert (opening.proxies(), opening.not_open()) == ({}, dict.fromkeys("ab", "it is being opened"))


def test_sighup_adds_removes_and_refuses_boards(boards: Boards, daemon: StartDaemon) -> None:
    boards.add("a", "b")
    boards.write("bad", {"link": "unix:/x", "irq_dir": "/x"})
    peers = {name: boards.peer(name) for name in ("a", "b", "c")}
    proxy = daemon()
    said = [json.loads(line) for line in proxy.log.splitlines()]
    missing = "peer=REMOTE is missing (expected the socket path of the other side)"
    assert [(line.get("board"), line["message"]) for line in said if line["level"] == "error"] == [
        (
            "bad",
            f"refused: {boards.directory}/bad.json: link: 'unix:/x': {missing}",
        )
    ]
    for name in ("a", "b"):
        boards.trigger(name)
        assert decode(peers[name].recv(200)) == b"redun_notify_irq"
        boards.interrupt(name, peers[name])
        boards.delivered(name)
    boards.remove("bad")
    boards.remove("b")
    boards.add("c")
    boards.write("a", "{")
    end = len(proxy.log)
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log("2 boards open, 0 not", after=end)
    assert "refused, keeping the old configuration: " in proxy.wait_log("a.json: line 1 column 2: not JSON", after=end)
    for name in ("a", "c"):
        boards.trigger(name)
        assert decode(peers[name].recv(200)) == b"redun_notify_irq"
    assert not Path(f"{boards.home}/b.0").exists()
    # If the boards directory is missing during a reload, the boards stay open.
    boards.directory.rename(boards.home / "away")
    end = len(proxy.log)
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log(f"{boards.directory}: cannot read the board directory: No such file", after=end)
    boards.trigger("c")
    assert decode(peers["c"].recv(200)) == b"redun_notify_irq"
    assert proxy.stop() == 0
    counts = {line["board"]: line for line in map(json.loads, proxy.log.splitlines()) if line["event"] == "statistics"}
    assert {name: (line["sent"], line["delivered"]) for name, line in counts.items()} == {"a": (2, 1), "c": (2, 0)}


def test_the_command_reload_waits_and_reports_what_was_refused(boards: Boards, daemon: StartDaemon) -> None:
    control = boards.home / "control.sock"
    boards.add("a")
    proxy = daemon("--control", str(control))
    boards.add("b")
    done = command("reload", "--control", control)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{boards.directory}: reloaded\n", "")
    boards.trigger("b")  # The board is open, so its trigger exists.
    boards.write("a", "{")
    boards.add("c")
    done = command("reload", "--control", control)
    assert (done.returncode, done.stdout) == (78, "")
    refused = f"refused, keeping the old configuration: a: {boards.directory}/a.json: line 1 column 2: not JSON"
    assert done.stderr.startswith(f"inco-trio: error: {refused}")
    boards.trigger("c")
    boards.directory.rename(boards.home / "away")
    done = command("reload", "--control", control)
    assert (done.returncode, done.stdout) == (78, "")
    refused = f"refused, keeping the old configuration: {boards.directory}: cannot read the board directory"
    assert done.stderr.startswith(f"inco-trio: error: {refused}")
    assert done.stderr.count("\n") == 1
    assert proxy.stop() == 0


def test_the_proxy_raises_the_soft_limit_of_descriptors(boards: Boards, daemon: StartDaemon) -> None:
    names = [f"b{number}" for number in range(40)]
    boards.add(*names)
    peer = boards.peer("b39")
    proxy = daemon()
    limits = Path(f"/proc/{proxy.pid}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert soft == hard
    boards.trigger("b39")
    assert decode(peer.recv(200)) == b"redun_notify_irq"
    watching = 0
    for descriptor in Path(f"/proc/{proxy.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # The proxy has closed this descriptor since iterdir() listed it.
            watching += "inotify wd:" in descriptor.read_text()
    assert watching == 2


def test_datagrams_of_any_size_are_counted_as_malformed(boards: Boards, daemon: StartDaemon) -> None:
    boards.add("a", "b")
    peers = {name: boards.peer(name) for name in ("a", "b")}
    proxy = daemon()
    for size in (0, 1, 13, 14, 1600, 65_000):
        peers["a"].sendto(bytes(size), f"{boards.home}/a.0")
    for name in ("a", "b"):
        boards.interrupt(name, peers[name])
        boards.delivered(name)
    assert proxy.stop() == 0
    counts = {line["board"]: line for line in map(json.loads, proxy.log.splitlines()) if line["event"] == "statistics"}
    assert (counts["a"]["received"], counts["a"]["malformed"], counts["b"]["malformed"]) == (7, 6, 0)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (
            ["run", "--boards", "{missing}"],
            78,
            "{missing}: cannot read the board directory: No such file or directory",
        ),
        (["check", "--boards", "{missing}"], 78, "{missing}: cannot read the board directory: No such file or "),
        (["run", "--boards", ""], 2, "--boards: the path is empty"),
        (
            ["run", "rpmsg0", "--boards", "/x"],
            2,
            "--boards and LINK are mutually exclusive: the file of each board names its link",
        ),
        (
            ["run", "--boards", "/x", "--irq-dir", "/y"],
            2,
            "--boards and --irq-dir are mutually exclusive: the file of each board ",
        ),
        (
            ["run", "--boards", "/x", "--wait-link"],
            2,
            "--boards and --wait-link are mutually exclusive: the file of each board ",
        ),
        (
            ["check", "--boards", "/x", "--config", "/y"],
            2,
            "--boards and --config are mutually exclusive: the file of each board ",
        ),
        (
            ["s6", "/z", "--boards", "/x", "--iface", "i"],
            2,
            "--boards and LINK are mutually exclusive: the file of each board ",
        ),
    ],
)
def test_invalid_arguments_are_one_error_line(tmp_path: Path, words: list[str], code: int, line: str) -> None:
    missing = str(tmp_path / "missing")
    done = command(*(word.format(missing=missing) for word in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"inco-trio: error: {line.format(missing=missing)}")
    assert done.stderr.count("\n") == 1


def test_check_lists_boards_and_refused_files(boards: Boards) -> None:
    boards.add("a")
    boards.write("b", {"link": "rpmsg0", "irq_dir": "/x/b", "netns": "b"})
    done = command("check", "--boards", boards.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"a  unix:{boards.home}/a.0,peer={boards.home}/a.1, 3 signals\nb  rpmsg0 in /run/netns/b, 3 signals\n"
    )
    boards.write("c", {"link": "rpmsg0", "irq_dir": "/x/b"})
    done = command("check", "--boards", boards.directory, "--json")
    refused = f"{boards.directory}/c.json: the directory /x/b is already used by the board b"
    assert (done.returncode, done.stderr) == (78, f"inco-trio: error: {refused}\n")
    said = json.loads(done.stdout)
    assert [board["board"] for board in said["boards"]] == ["a", "b"]
    assert said["refused"] == {"c": [refused]}


@pytest.mark.netns
def test_a_board_uses_an_interface_in_another_network_namespace(
    boards: Boards, daemon: StartDaemon, cores: Cores, core1: Peer
) -> None:
    with ExitStack() as stack:
        fd = os.dup(cores.core0.fd)
        stack.callback(os.close, fd)
        board = {"link": cores.link, "irq_dir": f"{boards.home}/board", "netns": f"/proc/{os.getpid()}/fd/{fd}"}
        boards.write("board", board)
        boards.add("other")
        peer = boards.peer("other")
        proxy = daemon()
        boards.trigger("board")
        assert select.select([core1.fileno()], [], [], HANG)[0]
        assert decode(core1.receive()) == b"redun_notify_irq"
        core1.send(b"ihub_hwwd_irq")
        boards.delivered("board")
        # The proxy process and the board `other` stay in the network namespace in which the proxy was started.
        assert Path(f"/proc/{proxy.pid}/ns/net").samefile("/proc/self/ns/net")
        boards.trigger("other")
        assert decode(peer.recv(200)) == b"redun_notify_irq"
        assert proxy.stop() == 0


@pytest.mark.s6
# 300 boards need more descriptors than s6-fdholder-getdump can pass.
@pytest.mark.parametrize("count", [50, pytest.param(300, marks=pytest.mark.thorough)])
def test_many_boards_lose_nothing_in_a_crash_under_s6(boards: Boards, count: int) -> None:
    names = [f"b{number}" for number in range(count)]
    boards.add(*names)
    peers = {name: boards.peer(name) for name in names}
    done = command("s6", boards.home / "scan", "--user", "root", "--boards", boards.directory)
    assert (done.returncode, done.stderr) == (0, "")
    with Service(Here(), boards.home / "scan", boards_label(boards.directory)) as service:  # type: ignore[arg-type]
        service.wait("U")
        service.control("-O")  # Do not restart the service when it ends.
        # At this point, the proxy might not have read the events for the trigger files that it created.
        os.kill(main_process(service.directory), signal.SIGKILL)
        service.wait("D")
        for name, peer in peers.items():
            boards.trigger(name)
            boards.interrupt(name, peer)
        service.control("-u")
        service.wait("U")
        for name, peer in peers.items():
            assert decode(peer.recv(200)) == b"redun_notify_irq"
            boards.delivered(name)
        # Each notification arrives exactly once, because none was in flight when the proxy was killed.
        for peer in peers.values():
            peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer.recv(200)
