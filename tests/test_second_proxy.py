"""Tests of two proxies that share a link or a directory: both must record when the second proxy starts and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio

from inco_trio.config import Config
from inco_trio.control.answering import Connection
from inco_trio.control.client import Client
from inco_trio.control.protocol import Event, HistoryRequest
from inco_trio.control.server import Peer
from inco_trio.counters import Counters
from inco_trio.linux.processes import look
from inco_trio.proxy.others import OF_LINK, OF_TRIGGERS, Others
from inco_trio.proxy_status import Status
from inco_trio.service.announcing import _own_sockets, announce, wait_for_end
from inco_trio.service.rivals import Rival
from inco_trio.simulation.world import Cores
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_control import patient_clients
from tests.test_privileges import restrictions

pytestmark = pytest.mark.netns

ENDED = " s after it was noticed: it had shared "
TEXT_MAX = 150
"""The flight recorder keeps this number of characters of a text. The directories of pytest have long names."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patient_clients(monkeypatch)


def status_of(control: Path, board: str | None = None) -> Status:
    with Client(control) as client:
        (found,) = client.status(board)
    assert found.status is not None
    return found.status


def events_of(control: Path, board: str | None = None) -> list[Event]:
    """Return the recorded problems and recoveries."""
    with Client(control) as client:
        past = client.request(HistoryRequest(board)).history
    assert past is not None
    return [event for event in past.events if event.event in ("problem", "works")]


def rivals_of(control: Path, board: str | None = None) -> dict[int, tuple[str, ...]]:
    return {rival.pid: rival.shared for rival in status_of(control, board).rivals}


def is_report(event: Event, subject: str | Path, pid: int, what: str) -> bool:
    """Return whether an event reports a second proxy. A proxy that found it itself also names its command."""
    starts = (f"{subject}: process {pid} {what}: ", f"{subject}: process {pid} (")
    return event.message.startswith(tuple(start[:TEXT_MAX] for start in starts))


def start_two(proxy: StartProxy, tmp_path: Path, *options: str) -> tuple[Proxy, Proxy]:
    """Start two proxies of the same link and directory, and wait until both have noticed that there are two."""
    one, two = (proxy("--irq-dir", tmp_path / "irq", "--control", tmp_path / name, *options) for name in ("one", "two"))
    for each in (one, two):
        for what in (OF_LINK, OF_TRIGGERS):
            each.wait_log(what)
    return one, two


@pytest.mark.parametrize(("number", "sandbox"), [(signal.SIGTERM, "on"), (signal.SIGKILL, "none")])
def test_a_second_proxy_leaves_a_trace(
    cores: Cores, proxy: StartProxy, tmp_path: Path, number: signal.Signals, sandbox: str
) -> None:
    shared = (cores.link, str(tmp_path / "irq"))
    one, two = start_two(proxy, tmp_path, "--sandbox", sandbox)
    assert rivals_of(tmp_path / "one") == {two.pid: shared}
    assert rivals_of(tmp_path / "two") == {one.pid: shared}
    two.stop(number)
    one.wait_log(ENDED)
    appeared, also, ended = events_of(tmp_path / "one")
    assert is_report(appeared, cores.link, two.pid, OF_LINK)
    assert is_report(also, f"{tmp_path}/irq", two.pid, OF_TRIGGERS)
    assert re.match(rf"process {two.pid} ended [0-9.]+{ENDED}{cores.link}, ", ended.message)
    assert [event.event for event in (appeared, also, ended)] == ["problem", "problem", "works"]
    # After its end, the history must still show what it was, so that you can prevent the next one.
    what = f"uid {os.getuid()}, parent {Path('/proc/self/comm').read_text().strip()} ({os.getpid()}), "
    with Client(tmp_path / "one") as client:
        past = client.request(HistoryRequest()).history
    assert past is not None
    (identity,) = [event.message for event in past.events if event.message.startswith(f"process {two.pid}: ")]
    assert identity.startswith(f"process {two.pid}: {what}inco_trio run {cores.link} "[:TEXT_MAX])
    assert f"; it was: {what}" in one.wait_log("; it was: ")
    status = status_of(tmp_path / "one")
    assert (status.rivals, status.counters.rivals) == ((), 1)
    logged = len(one.log)
    three = proxy("--irq-dir", tmp_path / "irq", "--control", "none")
    one.wait_log(OF_TRIGGERS, after=logged)
    status = status_of(tmp_path / "one")
    assert ([rival.pid for rival in status.rivals], status.counters.rivals) == ([three.pid], 2)


def test_no_thread_keeps_privileges_while_a_second_proxy_runs(cores: Cores, proxy: StartProxy, tmp_path: Path) -> None:
    one, two = start_two(proxy, tmp_path, "--sandbox", "on")
    assert rivals_of(tmp_path / "one") == {two.pid: (cores.link, str(tmp_path / "irq"))}
    for each in (one, two):
        assert restrictions(each.pid)[-2:] == ("1", "2")  # NoNewPrivs and Seccomp (proc_pid_status(5))
    two.stop(signal.SIGKILL)
    one.wait_log(ENDED)


def test_the_second_proxy_records_the_end_of_the_first(cores: Cores, proxy: StartProxy, tmp_path: Path) -> None:
    one, two = start_two(proxy, tmp_path)
    one.stop(signal.SIGKILL)
    two.wait_log(ENDED)
    assert [event.event for event in events_of(tmp_path / "two")] == ["problem", "problem", "works"]
    assert status_of(tmp_path / "two").rivals == ()
    # The supervisor of the first proxy restarts it.
    logged = len(two.log)
    again = proxy("--irq-dir", tmp_path / "irq", "--control", tmp_path / "one")
    two.wait_log(OF_TRIGGERS, after=logged)
    assert rivals_of(tmp_path / "two") == {again.pid: (cores.link, str(tmp_path / "irq"))}


@pytest.mark.parametrize("ends", [True, False])
def test_a_stopped_proxy_records_a_second_proxy_once_it_continues(
    cores: Cores, proxy: StartProxy, tmp_path: Path, ends: bool
) -> None:
    one = proxy("--irq-dir", tmp_path / "irq", "--control", tmp_path / "one")
    wait_stopped(one.pid)
    try:
        two = proxy("--irq-dir", tmp_path / "irq", "--control", "none")
        two.wait_log(f"process {one.pid} does not answer: it may record")
        if ends:
            two.stop(signal.SIGKILL)
    finally:
        os.kill(one.pid, signal.SIGCONT)
    one.wait_log(OF_TRIGGERS)
    if not ends:
        assert rivals_of(tmp_path / "one") == {two.pid: (cores.link, str(tmp_path / "irq"))}
        two.stop(signal.SIGKILL)
    one.wait_log(ENDED)
    appeared, also, ended = events_of(tmp_path / "one")
    assert is_report(appeared, cores.link, two.pid, OF_LINK)
    assert is_report(also, f"{tmp_path}/irq", two.pid, OF_TRIGGERS)
    assert re.match(rf"process {two.pid} ended [0-9.]+{ENDED}{cores.link}, ", ended.message)
    assert status_of(tmp_path / "one").counters.rivals == 1


def test_a_search_that_ends_after_the_second_proxy_does_not_report_it_again() -> None:
    """The second proxy has reported itself through the control socket."""
    events, counters = list[str](), Counters()

    def note(kind: str, text: str, level: int) -> tuple[int, int]:
        events.append(f"{kind} {text} {level}")
        return 0, 0

    others = Others("b1", counters, note, lambda: False)
    for pid in (1, 2):
        others.appeared(pid, "link", OF_LINK, "a proxy")
    others.ended(1)
    recorded = len(events)
    for pid in (1, 2):
        others.found(pid, "link", OF_LINK, "a proxy")
    assert (len(events), counters.rivals) == (recorded, 2)
    others.found(3, "link", OF_LINK, "a proxy")
    assert (len(events) > recorded, counters.rivals) == (True, 3)


def test_a_restart_is_no_second_proxy(proxy: StartProxy, tmp_path: Path) -> None:
    proxy("--irq-dir", tmp_path / "irq", "--control", tmp_path / "one").stop(signal.SIGKILL)
    again = proxy("--irq-dir", tmp_path / "irq", "--control", tmp_path / "one")
    # The diagnosis of this third proxy finds nothing in the second one's directory but the proxy `again`.
    other = proxy("--irq-dir", tmp_path / "irq", "--control", "none")
    again.wait_log(OF_TRIGGERS)
    other.wait_log(OF_TRIGGERS)
    # The diagnosis of the second proxy may find the third one itself. Its message then also contains the name.
    messages = [event.message for event in events_of(tmp_path / "one")]
    assert {pid for message in messages for pid in re.findall(r"process ([0-9]+) ", message)} == {str(other.pid)}


def test_only_the_board_that_shares_a_directory_is_concerned(tmp_path: Path) -> None:
    boards, control = tmp_path / "boards", tmp_path / "fleet"
    boards.mkdir()
    for name in ("b1", "b2"):
        board = {"link": f"unix:{tmp_path}/{name}.0,peer={tmp_path}/{name}.1", "irq_dir": f"{tmp_path}/{name}"}
        (boards / f"{name}.json").write_text(json.dumps(board))
    with ExitStack() as stack:

        def start(*words: object) -> Proxy:
            started = Proxy(None, [*map(str, words)], {}, tmp_path / f"{words[-1]}.log")
            stack.callback(started.close)
            started.wait_ready()
            return started

        fleet = start("--boards", boards, "--control", control, "--log-format", "json")
        link = f"unix:{tmp_path}/other.0,peer={tmp_path}/other.1"
        other = start(link, "--irq-dir", tmp_path / "b1", "--control", "none")
        fleet.wait_log(OF_TRIGGERS)
        assert rivals_of(control, "b1") == {other.pid: (str(tmp_path / "b1"),)}
        assert rivals_of(control, "b2") == {}
        other.stop()
        assert json.loads(fleet.wait_log(ENDED))["board"] == "b1"
        assert [event.event for event in events_of(control, "b1")] == ["problem", "works"]


def test_a_process_that_has_already_ended_is_reported_at_once() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    trio.run(wait_for_end, child.pid)


def test_a_proxy_that_refuses_the_report_keeps_its_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An older proxy does not know the request. This process is then recorded only in its own history."""
    path = tmp_path / "s"
    greeting = {"protocol": 1, "name": "l0", "pid": os.getpid(), "boot": "b", "boards": ["l0"]}
    refusal = {"error": "unknown-request", "message": "request: unknown"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                print(json.dumps(greeting), file=lines, flush=True)
                lines.readline()
                print(json.dumps(refusal), file=lines, flush=True)
                lines.readline()

        thread = threading.Thread(target=answer)
        thread.start()
        (own,) = (each for each in look().all if each.pid == os.getpid())
        rivals = [Rival(0, "l0", own, "", is_link=True)]
        with caplog.at_level("INFO"):
            (client,) = announce(rivals, [Config("l0", ())])
        client.close()
        thread.join(HANG)
    assert f"process {own.pid} does not record that this process shares its link" in caplog.text


def test_a_proxy_without_a_control_socket_gets_no_report(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "infinity"]) as child:
        (process,) = (each for each in look().all if each.pid == child.pid)
        assert announce([Rival(0, "l0", process, "", is_link=True)], [Config("l0", ())]) == []
        child.kill()


def test_the_socket_of_another_users_proxy_is_used_only_in_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another path may lead to a FUSE filesystem of this user, where connect(2) would block."""
    usual = tmp_path / "inco-trio/s.sock"
    usual.parent.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(usual))
        listener.listen()
        (own,) = (each for each in look().all if each.pid == os.getpid())
        assert _own_sockets(attrs.evolve(own, uid=12345)) == [usual]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        (own,) = (each for each in look().all if each.pid == os.getpid())
        rival = Rival(0, "l0", attrs.evolve(own, uid=12345), "", is_link=True)
        assert announce([rival], [Config("l0", ())]) == []
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_reports_of_another_user_are_not_read() -> None:
    """Such a client could close its socket for reading, and then send requests without end."""
    connection = Connection.__new__(Connection)
    connection.peer = Peer(1, os.geteuid() + 1)
    trio.run(connection._read_reports)  # This connection has no stream, so reading would fail.
