"""Tests of `inco-trio history`, as users run it, with a real daemon."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inco_trio.control import place
from inco_trio.frame import encode
from inco_trio.links.address import parse_address
from inco_trio.service import launch
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Proxy, StartProxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_control import FRAME, MAC, PATIENT, Board, block, child
from tests.test_fdstore import Daemon as Holder

IN, OUT = "ihub_hwwd_irq", "redun_notify_irq"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


def history(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PATIENT, "history", *map(str, words)], capture_output=True, text=True, timeout=HANG, check=False
    )


def events(board: Board, *words: str) -> list[dict[str, Any]]:
    done = history("--control", board.path, "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_history_has_what_happened_before_it_was_asked(board: Board) -> None:
    board.running()
    with ExitStack() as stack:
        client = board.client()
        stack.callback(client.end)
        client.ask({"request": "monitor"})
        peer = board.core1()
        client.until(event="link", running=True)
        board.trigger()
        peer.recv(2000)
        client.until(event="notification")
        state = board.irq / "message_5_state"
        block(state)
        board.inbound(peer)
        client.until(event="pending")
        state.rmdir()
        client.until(event="notification")
        for _ in range(3):
            board.inbound(peer, encode(b"stranger", MAC))
            client.until(event="ignored")
    found = events(board)
    kinds = [(each["event"], each.get("signal")) for each in found]
    assert kinds[:2] == [("started", None), ("link", None)]
    assert [kind for kind in kinds if kind[1]] == [
        ("notification", OUT), ("pending", IN), ("notification", IN), ("ignored", "stranger")
    ]  # fmt: skip
    assert [each["monotonic_ns"] for each in found] == sorted(each["monotonic_ns"] for each in found)
    late = next(each for each in found if each.get("delay"))
    assert (late["signal"], late["sequence"]) == (IN, 2)
    assert found[-1]["count"] == 3
    assert [each["signal"] for each in events(board, "--signal", IN) if "signal" in each] == [IN, IN]
    assert [each["signal"] for each in events(board, "--direction", "outbound") if "signal" in each] == [OUT]
    assert events(board, "--since", "1ms") == []
    assert events(board, "--since", "1h") == found
    done = history("--control", board.path)
    lines = done.stdout.splitlines()
    begins = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found[0]["time"]))
    assert done.stderr == f"inco-trio: {len(found)} lines of the history of {board.home}/core0, which begins {begins}\n"
    assert lines[0].endswith(":")
    assert f"in  {IN} pending: cannot write: not a regular file but a directory" in done.stdout
    assert f"in  {IN} (was pending for " in done.stdout
    assert "ignored: unknown signal stranger (3 times within " in done.stdout
    recorded = board.status()["recorded"]
    assert recorded["notifications"] == 2
    assert recorded["kept"] == 4096
    assert recorded["since"] <= found[0]["time"] + 1


def test_several_boards_are_merged_and_one_can_be_named(board: Board) -> None:
    directory = board.home / "boards"
    directory.mkdir()
    for name in "ab":
        entry = {"link": f"unix:{board.home}/{name}0,peer={board.home}/{name}1", "irq_dir": str(board.home / name)}
        (directory / f"{name}.json").write_text(json.dumps(entry))
    proxy = Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    done = history("--control", board.path)
    assert [line.split()[1] for line in done.stdout.splitlines() if "started" in line] in (["a:", "b:"], ["b:", "a:"])
    done = history("--control", board.path, "--board", "b", "--json")
    assert {json.loads(line)["board"] for line in done.stdout.splitlines()} == {"b"}
    assert board.client().ask({"request": "history"})["error"] == "unknown-board"


def test_a_history_that_is_off_is_an_error(board: Board) -> None:
    board.running("--history", "0")
    done = history("--control", board.path)
    assert done.returncode == 2
    assert done.stderr.endswith(f"board '{board.home}/core0': the proxy records no history (--history 0 disables it)\n")
    assert board.status()["recorded"] is None


def test_an_unknown_signal_is_reported(board: Board) -> None:
    board.running()
    past = ["record", str(board.home / "f"), "--past"]
    for command in (["history"], past):
        words = [*PATIENT, *command, "--control", str(board.path), "--signal", "ihub_hwd_irq", "--signal", IN]
        done = subprocess.run(words, capture_output=True, text=True, timeout=HANG, check=True)
        first, *rest = done.stderr.splitlines()
        assert first.startswith("inco-trio: ihub_hwd_irq: not in the signal table (available: ")
        assert len(rest) == 1


def test_an_invalid_size_is_refused(board: Board) -> None:
    for size in ("-1", "65537", "x"):
        done = subprocess.run([*PATIENT, "run", "--history", size], capture_output=True, text=True, timeout=HANG,
                              check=False)  # fmt: skip
        assert done.returncode == 2
        assert "expected a number from 0 to 65536" in done.stderr


@pytest.fixture
def patient_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let proxies wait for a slow fd store."""
    program = child(f"from inco_trio.persist import fdstore; fdstore._TIMEOUT_MS = {1000 * HANG}")
    monkeypatch.setattr(launch, "_CHILD", program)


@pytest.mark.s6
def test_the_history_survives_a_kill(board: Board, patient_store: None) -> None:
    """The fd store is a real s6-fdholder-daemon, and the process is killed with SIGKILL."""
    holder = Holder(board.home)
    holder.start()
    words = [board.link, "--irq-dir", str(board.irq), "--control", str(board.path), "--fd-holder", holder.socket]
    found: list[dict[str, Any]] = []
    try:
        peer = board.core1()
        for number in range(1, 3):
            log = board.home / f"log{number}"
            with contextlib.closing(
                Proxy(None, words, {}, log, prefix=["s6-fdholder-getdump", holder.socket])
            ) as proxy:
                proxy.wait_ready()
                board.trigger()
                peer.recv(2000)
                while board.status()["counters"]["sent"] < 1:
                    pass
                found = events(board)
                proxy.process.kill()
                proxy.process.wait(HANG)
            assert [each["sequence"] for each in found if each["event"] == "notification"] == [*range(1, number + 1)]
    finally:
        holder.stop()
    started = [each["message"].partition(" (")[0] for each in found if each["event"] == "started"]
    assert started == ["started", "started again after the previous process had ended without a stop"]


@pytest.mark.parametrize("given", [True, False], ids=["--control", "default path"])
def test_the_history_says_that_a_killed_process_left_none(board: Board, given: bool) -> None:
    if not given:
        board.path = place.default_path(parse_address(board.link).label)
    messages = []
    for number in range(3):
        proxy = board.start(control="" if given else None)
        proxy.wait_ready()
        messages.append(events(board)[0]["message"].replace(str(proxy.process.pid), "N"))
        if number == 0:
            proxy.process.kill()
            proxy.process.wait(HANG)
        else:
            proxy.stop()
    lost = "earlier history is unknown: no fd store keeps it"
    assert messages == [
        f"started (PID N); {lost}",
        f"started after the previous process had ended without a stop (PID N); {lost}",
        f"started (PID N); {lost}",
    ]


def test_the_history_names_what_it_no_longer_keeps(board: Board) -> None:
    board.running("--history", "1")
    peer = board.core1()
    client = board.client()
    client.ask({"request": "monitor"})
    for _ in range(2):
        board.inbound(peer)
        client.until(event="notification")
    for number in range(17):
        board.inbound(peer, encode(f"stranger{number}".encode(), MAC))
        client.until(event="ignored")
    done = history("--control", board.path)
    assert f"{board.home}/core0: notifications before 2" in done.stderr
    assert f"{board.home}/core0: events before 2" not in done.stderr
    assert " are not kept (`inco-trio run --history N` keeps more)\n" in done.stderr


@pytest.mark.netns
def test_a_link_that_goes_down_is_logged_counted_and_recorded(
    proxy: StartProxy, cores: Cores, core1: Peer, irq_dir: Path, tmp_path: Path
) -> None:
    control = tmp_path / "control.sock"
    running = proxy("--irq-dir", irq_dir, "--control", control)
    for state in ("down", "up"):
        cores.core1.run(functools.partial(subprocess.run, ["ip", "link", "set", cores.link, state], check=True))
        running.wait_log(f"the link {'went' if state == 'down' else 'came'} {state} after ")
    board = Board.__new__(Board)
    board.path = control
    found = [each for each in events(board) if each["event"] == "link"]
    assert [each["running"] for each in found] == [True, False, True]
    assert [each["message"].partition(" s: ")[2] for each in found] == ["", "no carrier", ""]
    assert "duration" not in found[0]
    for before, after in itertools.pairwise(found):
        assert 0 < after["duration"] < (after["monotonic_ns"] - before["monotonic_ns"]) / 1e9 + 1e-3
    done = subprocess.run([*PATIENT, "status", "--control", str(control)], capture_output=True, text=True, check=True,
                          timeout=HANG)  # fmt: skip
    assert "the link went down 1 time, last " in done.stdout


def since_pending(found: list[dict[str, Any]], pending: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Return, for each notification in `found`, the least and the greatest possible delay, and its two fields.

    `pending` contains the `pending` event of each notification. The notification became pending before that event and
    after the previous one.
    """
    each = [one for one in found for _ in range(one.get("count", 1))]
    assert len(each) == len(pending)
    earlier = [0, *(one["monotonic_ns"] for one in pending)]
    return [
        (
            (one["monotonic_ns"] - then["monotonic_ns"]) / 1e9, (one["monotonic_ns"] - before) / 1e9,
            one.get("delay", 0), one.get("delay_max", 0),
        )
        for one, then, before in zip(each, pending, earlier, strict=False)
    ]  # fmt: skip


def test_the_delays_after_a_blocked_register_are_true(board: Board) -> None:
    """The proxy remembers fewer distinct times than notifications. What it no longer knows, it must not state."""
    board.running()
    peer, client = board.core1(), board.client()
    client.ask({"request": "monitor"})
    state = board.irq / "message_5_state"
    block(state)
    pending = []
    for _ in range(195):
        board.inbound(peer)
        pending.append(client.until(event="pending"))
    state.rmdir()
    told = [client.until(event="notification") for _ in pending]
    found = [each for each in events(board) if each["event"] == "notification"]
    for delivered in (told, found):
        for least, most, delay, delay_max in since_pending(delivered, pending):
            # The recorder stores 24 bits of each number.
            assert (least - 1e-4 <= delay <= most + 1e-4) if delay else (least - 1e-4 <= delay_max)
            assert bool(delay) is not bool(delay_max)
    exact = [each for each in found if "delay" in each]
    assert all(each["count"] == 1 for each in exact)
    # The times of all notifications are equally coarse, and not those of the last ones only.
    assert len(exact) >= 32
    assert len({each["delay_max"] for each in found if "delay_max" in each}) >= 16
    assert " times +" in (shown := history("--control", board.path).stdout)
    assert f"in  {IN} +" in shown
    assert " s (was pending for up to " in shown


def test_a_trigger_that_waited_in_the_kernel_is_marked_as_possibly_late(board: Board) -> None:
    board.running()
    client = board.client()
    client.ask({"request": "monitor"})
    for _ in range(2):
        triggered = time.monotonic_ns()
        board.trigger()
        client.until(event="pending")
    # The proxy reads no further events of its triggers until the link has accepted the first frame.
    board.trigger()
    written = time.monotonic_ns()
    peer = board.core1()
    told = [client.until(event="notification") for _ in range(3)]
    assert [("delay" in each, "delay_max" in each) for each in told] == [(True, False), (True, False), (False, True)]
    waited = (told[2]["monotonic_ns"] - written) / 1e9
    # The proxy has read nothing since it read the second trigger. The bound is rounded.
    assert waited <= told[2]["delay_max"] <= (told[2]["monotonic_ns"] - triggered) / 1e9 + 1e-4
    for _ in range(3):
        peer.recv(2000)
    board.trigger()
    assert not {"delay", "delay_max"} & client.until(event="notification").keys()
    found = [each for each in events(board) if each["event"] == "notification"]
    assert [each.get("delay_max", 0) > 0 for each in found] == [False, False, True, False]
    assert f"out {OUT} +" in (shown := history("--control", board.path).stdout)
    assert shown.count("(was pending for up to ") == 1


@pytest.mark.s6
@pytest.mark.parametrize("end", ["kill", "stop"])
@pytest.mark.parametrize("options", ["LINK", "--boards"])
def test_notifications_that_waited_for_a_restart_are_marked_as_possibly_late(
    board: Board, end: str, options: str, patient_store: None
) -> None:
    holder = Holder(board.home)
    holder.start()
    words = ["--control", str(board.path), "--fd-holder", holder.socket]
    if options == "LINK":
        words += [board.link, "--irq-dir", str(board.irq)]
    else:
        (directory := board.home / "boards").mkdir()
        (directory / "b.json").write_text(json.dumps({"link": board.link, "irq_dir": str(board.irq)}))
        words += ["--boards", str(directory)]
    prefix = ["s6-fdholder-getdump", holder.socket]
    state = board.irq / "message_5_state"
    try:
        peer = board.core1()
        with contextlib.closing(Proxy(None, words, {}, board.home / "log1", prefix=prefix)) as proxy:
            proxy.wait_ready()
            client = board.client()
            client.ask({"request": "monitor"})
            block(state)
            board.inbound(peer)
            client.until(event="pending")
            board.trigger()
            client.until(event="notification")
            if end == "kill":
                proxy.process.kill()
                proxy.process.wait(HANG)
            else:
                proxy.stop()
        state.rmdir()
        board.inbound(peer, encode(b"ihub_reset_irq", MAC))
        board.trigger()
        written = time.monotonic_ns()
        with contextlib.closing(Proxy(None, words, {}, board.home / "log2", prefix=prefix)) as proxy:
            proxy.wait_ready()
            client = board.client()
            client.ask({"request": "monitor"})
            for _ in range(2):
                peer.recv(2000)
            found: dict[str, Any] = {}
            while found.keys() != {IN, OUT, "ihub_reset_irq"}:
                found = {each["signal"]: each for each in events(board) if each.get("sequence", 0) > 1}
            for each in found.values():
                assert "delay" not in each
                assert (each["monotonic_ns"] - written) / 1e9 <= each["delay_max"] + 1e-4
            following = 1 + max(each["sequence"] for each in found.values())
            board.trigger()
            # The monitor may also receive the earlier notifications.
            assert not {"delay", "delay_max"} & client.until(event="notification", sequence=following).keys()
    finally:
        holder.stop()


def test_one_of_several_boards_may_have_waited_for_a_stopped_process(board: Board) -> None:
    """The boards share an inotify descriptor. SIGCONT must not mark later notifications of a board without a queue."""
    directory = board.home / "boards"
    directory.mkdir()
    peers = []
    for name in "ab":
        entry = {"link": f"unix:{board.home}/{name}0,peer={board.home}/{name}1", "irq_dir": str(board.home / name)}
        (directory / f"{name}.json").write_text(json.dumps(entry))
        peers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        board._stack.callback(peers[-1].close)
        peers[-1].bind(f"{board.home}/{name}1")
    with contextlib.closing(
        Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    ) as proxy:
        proxy.wait_ready()
        client = board.client()
        client.ask({"request": "monitor"})
        wait_stopped(proxy.pid)
        (board.home / "a/message_6_trig").write_text("1")
        os.kill(proxy.pid, signal.SIGCONT)
        assert client.until(event="notification", board="a")["delay_max"] > 0
        # The proxy examines the queues and records this after SIGCONT; until then, both boards may have waited.
        while [each["event"] for each in events(board)].count("message") < 2:
            pass
        for name in "ba":
            (board.home / name / "message_6_trig").write_text("1")
            peers[name == "b"].recv(2000)
            assert not {"delay", "delay_max"} & client.until(event="notification", board=name).keys()
            peers[name == "b"].sendto(FRAME, f"{board.home}/{name}0")
            assert not {"delay", "delay_max"} & client.until(event="notification", board=name).keys()


def test_notifications_that_waited_for_a_stopped_process_are_marked_as_possibly_late(board: Board) -> None:
    proxy = board.running()
    peer, client = board.core1(), board.client()
    client.ask({"request": "monitor"})
    board.trigger()
    client.until(event="notification")
    wait_stopped(proxy.pid)
    board.inbound(peer)
    board.trigger()
    written = time.monotonic_ns()
    os.kill(proxy.pid, signal.SIGCONT)
    told = [client.until(event="notification") for _ in range(2)]
    assert {each["signal"] for each in told} == {IN, OUT}
    for each in told:
        assert (each["monotonic_ns"] - written) / 1e9 <= each["delay_max"]
    board.trigger()
    assert not {"delay", "delay_max"} & client.until(event="notification").keys()
    assert [each["event"] for each in events(board)].count("message") == 1
