"""Tests that a proxy with `--sandbox on` works with every feature in use."""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.cli.options import boards_label
from inco_trio.frame import decode
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.processes import wait_idle
from tests.faults.supervised import Service, main_process, wait_path
from tests.support_control import Board, Running
from tests.test_boards_run import Boards, command
from tests.test_odd_registers import mounted
from tests.test_privileges import status_of
from tests.test_record import finish, names

SANDBOX = ("--sandbox", "on")
OUT, IN = "redun_notify_irq", "ihub_hwwd_irq"


@pytest.fixture(autouse=True)
def _without_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure coverage in subprocesses: the sandbox prevents them from writing the data when they exit."""
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    with ExitStack() as stack:
        yield Boards(tmp_path, stack)


def running(stack: ExitStack, log: Path, *arguments: str | Path, cores: Cores | None = None) -> Proxy:
    """Start a proxy in the sandbox, and wait until it is ready."""
    proxy = Proxy(None if cores is None else cores.core0, [*arguments, *SANDBOX], {}, log)
    stack.callback(proxy.close)
    proxy.wait_ready()
    assert status_of(proxy.pid)["Seccomp"] == "2"
    return proxy


def check_boards(boards: Boards, peers: Mapping[str, socket.socket]) -> None:
    """Check that each board delivers and sends notifications."""
    for name, peer in peers.items():
        state = boards.home / name / "message_5_state"
        state.write_text("")
        boards.trigger(name)
        boards.interrupt(name, peer)
        assert decode(peer.recv(200)) == OUT.encode()
        boards.delivered(name)


def test_a_reload_adds_and_removes_boards(boards: Boards, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = [f"b{number}" for number in range(40)]
        boards.add(*first)
        proxy = running(stack, tmp_path / "log", "--boards", boards.directory)
        peers = {name: boards.peer(name) for name in first}
        check_boards(boards, peers)
        boards.remove("b0")
        del peers["b0"]
        boards.add("new")
        peers["new"] = boards.peer("new")
        end = len(proxy.log)
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_log("40 boards open, 0 not", after=end)
        assert not (tmp_path / "b0.0").exists()
        check_boards(boards, peers)
        assert proxy.stop() == 0
        assert "Traceback" not in proxy.log


def test_a_board_that_a_reload_adds_outside_is_refused_with_the_reason(boards: Boards, tmp_path: Path) -> None:
    with ExitStack() as stack:
        boards.add("a")
        proxy = running(stack, tmp_path / "log", "--boards", boards.directory)
        outside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        boards.write("b", {"link": f"unix:{tmp_path}/b.0,peer={tmp_path}/b.1", "irq_dir": f"{outside}/irq"})
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_log("1 boards open, 1 not")
        (line,) = [line for line in proxy.log.splitlines() if str(outside) in line]
        assert "Permission denied" in line
        check_boards(boards, {"a": boards.peer("a")})
        assert "Traceback" not in proxy.log


def test_clients_record_monitor_and_ask(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        peer = board.core1()
        board.running(*SANDBOX)
        file = tmp_path / "f.pcapng"
        recording = Running("record", file, "--control", board.path)
        stack.callback(recording.close)
        recording.listening("recording ")
        monitor = board.client()
        monitor.ask({"request": "monitor"})
        board.trigger()
        assert peer.recv(100)
        monitor.until(event="notification", direction="outbound")
        board.inbound(peer)
        monitor.until(event="notification", direction="inbound")
        counters = board.status()["counters"]
        assert (counters["sent"], counters["delivered"]) == (1, 1)
        finish(recording)
        assert {name for name, _ in names(file)} == {OUT, IN}
        past = command("history", "--control", board.path)
        assert past.returncode == 0
        assert IN in past.stdout
        assert OUT in past.stdout


@pytest.mark.netns
def test_a_board_uses_an_interface_in_another_network_namespace(
    boards: Boards, cores: Cores, core1: Peer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        netns = tmp_path / "netns"
        netns.touch()
        stack.enter_context(mounted(netns, "--bind", f"/proc/{os.getpid()}/fd/{cores.core0.fd}"))
        boards.write("board", {"link": cores.link, "irq_dir": f"{tmp_path}/board", "netns": str(netns)})
        proxy = running(stack, tmp_path / "log", "--boards", boards.directory)
        check_interface(core1, tmp_path / "board")
        cores.delete_link()
        proxy.wait_log("the interface is gone")
        cores.make_link()
        with cores.peer() as again:
            check_interface(again, tmp_path / "board")
        assert proxy.stop() == 0
        assert "Traceback" not in proxy.log


@pytest.mark.netns
def test_an_interface_is_recreated(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        options = ("--irq-dir", tmp_path / "board", "--control", tmp_path / "control.sock")
        proxy = running(stack, tmp_path / "log", cores.link, *options, cores=cores)
        check_interface(core1, tmp_path / "board")
        cores.delete_link()
        proxy.wait_log("the interface is gone")
        cores.make_link()
        with cores.peer() as again:
            check_interface(again, tmp_path / "board")
        assert proxy.stop() == 0
        assert "Traceback" not in proxy.log


def check_interface(core1: Peer, irq: Path) -> None:
    """Check that a board on an interface delivers and sends notifications."""
    state = irq / "message_5_state"
    state.write_text("")
    (irq / "message_6_trig").write_text("1")
    while True:
        assert select.select([core1.fileno()], [], [], HANG)[0]
        if decode(core1.receive()) == OUT.encode():
            break
    core1.send(IN.encode())
    wait_path(state, lambda: state.read_text() == "1")


@pytest.mark.s6
def test_a_killed_proxy_under_s6_loses_nothing(boards: Boards) -> None:
    first = [f"b{number}" for number in range(10)]
    boards.add(*first)
    peers = {name: boards.peer(name) for name in first}
    words = ("s6", boards.home / "scan", "--user", "root", "--boards", boards.directory, *SANDBOX)
    done = command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    with Service(Here(), boards.home / "scan", boards_label(boards.directory)) as service:  # type: ignore[arg-type]
        service.wait("U")
        # The second process inherits the first one's descriptors. The third inherits descriptors that a reload stored.
        for turn in range(3):
            pid = main_process(service.directory)
            assert status_of(pid)["Seccomp"] == "2"
            wait_idle(pid)
            service.control("-O")  # Do not restart the service when it ends.
            os.kill(pid, signal.SIGKILL)
            service.wait("D")
            for name, peer in peers.items():
                boards.trigger(name)
                (boards.home / name / "message_5_state").write_text("")
                boards.interrupt(name, peer)
            service.control("-u")
            service.wait("U")
            for name, peer in peers.items():
                assert decode(peer.recv(200)) == OUT.encode()
                boards.delivered(name)
            boards.add(f"new{turn}")
            peers[f"new{turn}"] = boards.peer(f"new{turn}")
            end = len(service.log)
            service.control("-h")
            service.wait_log(f"{len(peers)} boards open, 0 not", after=end)
            check_boards(boards, peers)
        for peer in peers.values():
            peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer.recv(200)
        assert "Traceback" not in service.log


@pytest.mark.netns  # Changing owners needs root.
def test_a_recreated_directory_gets_its_owner(tmp_path: Path) -> None:
    with ExitStack() as stack:
        board = Board(tmp_path, stack)
        proxy = board.running(*SANDBOX, "--irq-owner", "daemon:daemon")
        before = board.irq.stat()
        assert (before.st_uid, before.st_gid, before.st_mode & 0o7777) == (1, 1, 0o2775)
        board.irq.rename(tmp_path / "former")
        proxy.process.send_signal(signal.SIGHUP)  # The proxy recreates the directory now, instead of after 60 s.
        wait_path(board.irq / "message_6_trig")
        after = board.irq.stat()
        assert (after.st_uid, after.st_gid, after.st_mode) == (1, 1, before.st_mode)
