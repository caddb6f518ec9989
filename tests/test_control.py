"""Tests of the control socket with real daemons on `unix:` links and clients on plain sockets."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from inco_trio.control import place
from inco_trio.control.answering import Connection
from inco_trio.control.client import answering
from inco_trio.control.feed import Batch, Feed
from inco_trio.control.monitors import CROWDED, PIECE, QUEUES_MAX, WAITING_BYTES_MAX, WAITING_MAX, Monitor
from inco_trio.control.protocol import AHEAD, LINE_MAX, SIGNALS_MAX, Event, event_now
from inco_trio.control.server import CLIENTS_MAX, USER_MAX, Control, Peer
from inco_trio.frame import FRAME_MAX, decode, encode
from inco_trio.linux.sockets import SOCKET_PATH_MAX
from inco_trio.persist.followed import KEPT
from inco_trio.service import launch
from inco_trio.signals import Direction, Signal
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.support_control import FRAME, MAC, Board, Client, NoProxies, block, child, descriptors_refused, no_threads


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """Run one proxy for the tests that only send requests to it."""
    with ExitStack() as stack:
        board = Board(tmp_path_factory.mktemp("shared"), stack)
        board.running()
        yield board


def test_the_socket_greets_and_reports_the_status(board: Board) -> None:
    peer = board.core1()
    proxy = board.running()
    greeting = board.client().greeting
    assert (greeting["protocol"], greeting["pid"], greeting["boards"]) == (1, proxy.pid, [f"{board.home}/core0"])
    told = board.client()
    assert told.ask({"request": "monitor"}) == {"monitor": True}
    board.inbound(peer)
    told.until(event="notification")
    board.trigger()
    board.trigger()
    for _ in range(2):
        told.until(event="notification")
    status = board.status()
    signals = {each["signal"]: each for each in status["signals"]}
    assert {name: each["count"] for name, each in signals.items()} == {
        "ihub_hwwd_irq": 1,
        "ihub_reset_irq": 0,
        "redun_notify_irq": 2,
    }
    assert signals["ihub_reset_irq"]["last"] is None
    assert status["since"] <= signals["ihub_hwwd_irq"]["last"] <= signals["redun_notify_irq"]["last"]
    assert signals["ihub_hwwd_irq"]["register"] == f"{board.irq}/message_5_state"
    assert (status["open"], status["running"], status["descriptors"], status["link"]) == (True, True, None, board.link)
    assert (status["counters"]["received"], status["counters"]["sent"]) == (1, 2)
    assert [task["problem"] for task in status["tasks"]] == [None] * 7


def test_the_status_contains_current_problems(board: Board) -> None:
    board.running()
    watching = board.client()
    watching.ask({"request": "monitor"})
    block(board.irq / "message_5_state")
    peer = board.core1()
    watching.until(event="link", running=True)
    board.inbound(peer)
    watching.until(event="problem")
    signals = {each["signal"]: each for each in board.status()["signals"]}
    assert signals["ihub_hwwd_irq"]["pending"] == 1
    assert signals["ihub_hwwd_irq"]["failures"] >= 1
    assert "not a regular file but a directory" in signals["ihub_hwwd_irq"]["problem"]
    (board.irq / "message_5_state").rmdir()
    watching.until(event="notification", signal="ihub_hwwd_irq")
    peer.close()
    Path(f"{board.home}/core1").unlink()
    watching.until(event="link", running=False)
    board.irq.rename(board.home / "away")
    watching.until(event="problem")
    assert all("missing" in each["problem"] for each in board.status()["signals"])


def test_a_monitor_receives_all_events(board: Board) -> None:
    peer = board.core1()
    proxy = board.running()
    monitor, filtered = board.client(), board.client()
    assert monitor.ask({"request": "monitor", "id": [1]}) == {"id": [1], "monitor": True}
    filtered.ask({"request": "monitor", "signals": ["redun_notify_irq"], "direction": "outbound"})
    board.inbound(peer)
    event = monitor.read()
    assert event.pop("time") == pytest.approx(event.pop("monotonic_ns") / 1e9 + _offset(), abs=HANG)
    assert event == {
        "event": "notification",
        "board": f"{board.home}/core0",
        "direction": "inbound",
        "signal": "ihub_hwwd_irq",
        "register": f"{board.irq}/message_5_state",
        "sequence": 1,
    }
    board.inbound(peer, encode(b"unlisted", MAC))
    assert monitor.until(event="ignored")["signal"] == "unlisted"
    board.inbound(peer, b"short")
    assert monitor.until(event="ignored")["reason"] == "malformed"
    board.trigger()
    assert monitor.until(event="notification")["sequence"] == 2
    assert filtered.read()["signal"] == "redun_notify_irq"
    proxy.process.send_signal(signal.SIGHUP)
    assert monitor.until(event="reloaded")["level"] == "info"
    assert proxy.stop() == 0
    assert monitor.at_end()
    assert not board.path.exists()


def _offset() -> float:
    import time

    return time.time() - time.monotonic()


def test_a_monitor_receives_frames_on_request(board: Board) -> None:
    peer = board.core1()
    proxy = board.running()
    monitor, other = board.client(), board.client()
    monitor.ask({"request": "monitor", "frames": True})
    other.ask({"request": "monitor"})
    padded = FRAME.ljust(60, b"\0")
    tagged = FRAME[:12] + bytes.fromhex("81000001") + FRAME[12:]
    proxy.process.send_signal(signal.SIGSTOP)  # The suspended proxy will read all frames in one batch.
    long = FRAME.ljust(9000, b"\0")
    sent = [padded, b"short", FRAME, encode(b"unlisted", MAC), tagged, long, FRAME.ljust(300, b"\0"), padded]
    for frame in sent:
        board.inbound(peer, frame)
    proxy.process.send_signal(signal.SIGCONT)
    told = [monitor.read() for _ in sent]
    frames = [(event.get("reason"), bytes.fromhex(event["frame"])) for event in told]
    known = [(None, frame) for frame in sent if b"ihub" in frame and frame is not long]
    assert [each for each in frames if each[0] is None] == known
    ignored = [("malformed", sent[1]), ("unknown", sent[3]), ("malformed", long[:FRAME_MAX])]
    assert [each for each in frames if each[0] is not None] == ignored
    assert all("frame" not in other.read() for _ in sent)
    board.trigger()
    assert monitor.read()["frame"] == peer.recv(2000).hex()
    assert board.client().ask({"request": "monitor", "frames": 1})["error"] == "invalid"
    assert board.client().ask({"request": "flush"})["error"] == "invalid"
    assert monitor.ask({"request": "flush", "id": 1}) == {"flush": True, "id": 1}
    assert monitor.read()["event"] == "flushed"


def test_a_monitor_receives_notifications_of_the_shutdown(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    program = child(f"from inco_trio.control import server; server.FAREWELL = {HANG}")
    monkeypatch.setattr(launch, "_CHILD", program)
    board.core1()
    proxy = board.running()
    monitor = board.client()
    monitor.ask({"request": "monitor"})
    proxy.process.send_signal(signal.SIGSTOP)
    for _ in range(8):  # Eight frames fit into the queue of core 1's socket.
        board.trigger()
    proxy.process.send_signal(signal.SIGTERM)
    proxy.process.send_signal(signal.SIGCONT)
    for sequence in range(1, 9):
        assert monitor.until(event="notification")["sequence"] == sequence


def test_send_sends_the_requested_number_of_notifications(board: Board) -> None:
    peer = board.core1()
    board.running()
    client = board.client()
    assert client.ask({"request": "send", "signal": "redun_notify_irq"}) == {"sent": 1}
    assert client.ask({"request": "send", "signal": "redun_notify_irq", "count": 3, "id": 5}) == {"id": 5, "sent": 3}
    assert [decode(peer.recv(200)) for _ in range(4)] == [b"redun_notify_irq"] * 4
    assert client.ask({"request": "send", "signal": "ihub_hwwd_irq"})["error"] == "unknown-signal"
    assert "(available: redun_notify_irq)" in client.ask({"request": "send", "signal": "x"})["message"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"nonsense\n", "not-json"),
        (b"[1]\n", "not-json"),
        (b'{"request": "status", "id": NaN}\n', "not-json"),
        (b'{"request": "status", "id": 1e999}\n', "invalid"),
        (b'{"request": "status", "id": {"a": -1e999}}\n', "invalid"),
        (b"\xff\n", "not-json"),
        (b"[" * 60_000 + b"\n", "not-json"),
        (b"{}\n", "unknown-request"),
        (b'{"request": "stop"}\n', "unknown-request"),
        (b'{"request": ["status"]}\n', "unknown-request"),
        (b'{"request": "status", "board": "b"}\n', "unknown-board"),
        (b'{"request": "status", "board": 1}\n', "invalid"),
        (b'{"request": "send"}\n', "invalid"),
        (b'{"request": "send", "signal": "redun_notify_irq", "count": 0}\n', "invalid"),
        (b'{"request": "send", "signal": "redun_notify_irq", "count": 1000001}\n', "invalid"),
        (b'{"request": "send", "signal": "redun_notify_irq", "count": true}\n', "invalid"),
        (b'{"request": "monitor", "direction": "up"}\n', "invalid"),
        (b'{"request": "monitor", "signals": [1]}\n', "invalid"),
        (b'{"request": "monitor", "signals": "x"}\n', "invalid"),
        (b'{"request": "monitor", "signals": [%s]}\n' % b",".join([b'"x"'] * (SIGNALS_MAX + 1)), "invalid"),
    ],
)
def test_an_invalid_request_is_refused_and_the_next_one_answered(shared: Board, line: bytes, error: str) -> None:
    client = shared.client()
    assert client.ask(line)["error"] == error
    assert client.ask(b'\n{"request": "status", "id": null}\n')["id"] is None


def test_a_second_monitor_request_of_a_connection_is_refused(board: Board) -> None:
    board.running()
    client = board.client()
    client.ask({"request": "monitor"})
    assert client.ask({"request": "monitor"})["error"] == "invalid"


def test_one_socket_serves_many_boards(board: Board) -> None:
    directory = board.home / "boards"
    directory.mkdir()
    for name in ("a", "b"):
        entry = {"link": f"unix:{board.home}/{name}.0,peer={board.home}/{name}.1", "irq_dir": f"{board.home}/{name}"}
        (directory / f"{name}.json").write_text(json.dumps(entry))
    (board.home / "b").write_text("")
    proxy = Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    client = board.client()
    assert (client.greeting["boards"], client.greeting["name"]) == (["a"], str(directory))
    status = {each["board"]: each for each in client.ask({"request": "status"})["status"]}
    assert (status["a"]["open"], status["b"]["open"]) == (True, False)
    assert f"{board.home}/b" in status["b"]["problem"]
    assert [each["board"] for each in client.ask({"request": "status", "board": "b"})["status"]] == ["b"]
    for request in ({"request": "send", "signal": "redun_notify_irq"}, {"request": "history"}):
        refusal = client.ask({**request, "board": "b"})
        assert refusal["error"] == "not-open"
        assert refusal["message"] == f"board 'b': not open: {status['b']['problem']}"
    (board.home / "b").unlink()
    told, mine = board.client(), board.client()
    told.ask({"request": "monitor"})
    mine.ask({"request": "monitor", "board": "b"})
    proxy.process.send_signal(signal.SIGHUP)
    told.until(event="reloaded")
    assert client.ask({"request": "send", "signal": "redun_notify_irq"})["error"] == "unknown-board"
    for name in ("a", "b"):
        (board.home / name / "message_6_trig").write_text("1")
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        board._stack.callback(peer.close)
        peer.bind(f"{board.home}/{name}.1")
        event = told.until(event="notification")
        assert (event["board"], event["sequence"]) == (name, 1)
    assert mine.until(event="notification")["board"] == "b"


def test_a_slow_monitor_loses_events_and_receives_their_number(board: Board) -> None:
    peer = board.core1()
    proxy = board.running()
    slow, quick = board.client(), board.client()
    slow.ask({"request": "monitor"})
    quick.ask({"request": "monitor"})
    number = 3 * WAITING_MAX
    for sequence in range(1, number + 1):
        board.inbound(peer)
        if sequence % 100 == 0:
            while quick.until(event="notification")["sequence"] != sequence:
                pass
    seen = lost = 0
    while seen + lost < number:
        event = slow.read()
        if event["event"] == "lost":
            lost += event["count"]
        else:
            seen += 1
    assert seen + lost == number
    assert lost > 0
    assert proxy.stop() == 0


@pytest.mark.parametrize("kind", ["ignored", "notification", "pending"])
def test_long_frames_that_a_monitor_has_not_read_need_limited_memory(kind: str) -> None:
    """The queued frames of a monitor that requested frames are limited, and other monitors queue no frames."""
    signals, frame, at = [Signal("x", Direction.INBOUND, Path("/x"), "x")] * 256, bytes(FRAME_MAX), (1, 1)
    feed = Feed(NoProxies())

    def offer(turn: int) -> None:
        if kind == "ignored":
            for _ in signals:
                feed.ignored("unknown", "x", frame, at)
        elif kind == "pending":
            feed.pending(signals, "link down", [frame] * len(signals), at)
        else:
            feed.carried(signals, 256 * turn + 1, [frame] * len(signals), at, 0)

    async def main() -> tuple[list[str], list[str]]:
        monitors = Monitor(frames=True), Monitor()
        for monitor in monitors:
            feed.add(monitor)
        turns = WAITING_MAX // len(signals)
        for turn in range(turns):
            offer(turn)
        some, others = monitors
        one_batch = len(signals) * FRAME_MAX
        assert WAITING_BYTES_MAX <= sum(what.frame_bytes for what in some._waiting) < WAITING_BYTES_MAX + one_batch
        assert sum(what.frame_bytes for what in others._waiting) == 0
        lines = list[str](), list[str]()
        for monitor, some_lines in zip(monitors, lines, strict=True):
            while monitor._waiting or monitor._lost:
                some_lines += (await monitor.take()).decode().splitlines()
        offer(turns)  # There is room again.
        for monitor, some_lines in zip(monitors, lines, strict=True):
            feed.remove(monitor)
            monitor.end()
            while piece := await monitor.take():
                some_lines += piece.decode().splitlines()
        return lines

    with_frames, without = (list(map(json.loads, lines)) for lines in trio.run(main))
    (place,) = (number for number, event in enumerate(with_frames) if event["event"] == "lost")
    lost = with_frames.pop(place)
    assert place + lost["count"] == WAITING_MAX
    assert len(with_frames) == place + len(signals)
    assert all(event["frame"] == frame.hex() for event in with_frames)
    assert len(without) == WAITING_MAX + len(signals)
    assert all("frame" not in event for event in without)


def test_monitors_of_other_users_share_a_limit_of_queued_events() -> None:
    """Beyond it, each of them queues a few events. Monitors of the proxy's user have their own limit."""

    async def main() -> None:
        feed = Feed(NoProxies())

        def fill() -> None:
            for _ in range(WAITING_MAX + 1):
                feed.offer("message")

        others = [Monitor(total=feed.waiting_of_others) for _ in range(QUEUES_MAX + 1)]
        for monitor in [*others, own := Monitor()]:
            feed.add(monitor)
            fill()
        few = int(WAITING_MAX * CROWDED)
        assert [monitor._number for monitor in others] == [WAITING_MAX] * QUEUES_MAX + [few]
        assert own._number == WAITING_MAX
        feed.remove(others[0])
        feed.remove(others[0])  # The end of a connection removes a monitor that has ended before.
        while others[1]._waiting:
            await others[1].take()
        fill()
        assert [monitor._number for monitor in others[1:]] == [WAITING_MAX] * QUEUES_MAX
        for monitor in others:
            feed.remove(monitor)
        assert (feed.waiting_of_others.number, feed.waiting_of_others.bytes) == (0, 0)

    trio.run(main)


def test_lost_events_are_counted_where_they_are_missing() -> None:
    offered = range(1, 5 * WAITING_MAX + 1)

    async def read_slowly() -> list[str]:
        monitor, lines = Monitor(), list[str]()
        for number in offered:
            monitor.offer(event_now("notification", sequence=number))
            if number % 300 == 0:
                lines += (await monitor.take()).decode().splitlines()
        monitor.end()
        while piece := await monitor.take():
            lines += piece.decode().splitlines()
        return lines

    following, gaps = 1, 0
    for event in map(json.loads, trio.run(read_slowly)):
        if event["event"] == "lost":
            following += event["count"]
            gaps += 1
        else:
            assert event["sequence"] == following
            following += 1
    assert following == offered.stop
    assert gaps > 1


NAMES = ("in0", "in1")
BATCH = Batch("b", [Signal(name, Direction.INBOUND, Path("/irq"), name) for name in NAMES * 2], 1, (), 1, 2)


def test_only_events_that_a_filter_accepts_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int | None] = []

    def encode(event: Event, *, frames: bool = False) -> str:
        encoded.append(event.sequence)
        return f"{event.sequence} {frames}\n"

    async def taken(*names: str) -> bytes:
        monitor = Monitor(signals=names or None)
        monitor.carried(batch)
        monitor.end()
        return await monitor.take()

    monkeypatch.setattr("inco_trio.control.monitors.encode_event", encode)
    batch = copy.copy(BATCH)
    batch.lines = {}
    assert (trio.run(taken, "none"), encoded) == (b"", [])
    assert trio.run(taken, "in1") == b"2 False\n4 False\n"
    assert encoded == [2, 4]
    assert trio.run(taken) == trio.run(taken) == b"1 False\n2 False\n3 False\n4 False\n"
    assert encoded == [2, 4, 1, 3]


def test_a_monitor_that_refuses_many_events_lets_other_tasks_run() -> None:
    """After each piece, it also pauses as it does after a write, but not at the end."""

    async def main() -> tuple[int, float]:
        monitor, turns = Monitor(signals=["none"], share=lambda: 0.5), 0
        for _ in range(WAITING_MAX // 4):
            monitor.carried(BATCH)

        async def take() -> None:
            assert await monitor.take() == b""
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await trio.sleep(0.25)  # The clock is simulated.
            assert monitor._number == WAITING_MAX - PIECE
            await trio.sleep(0.5)  # The clock is simulated.
            assert monitor._number == WAITING_MAX - 2 * PIECE
            monitor.end()
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1
        return turns, trio.current_time()

    turns, ended_at = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert turns >= WAITING_MAX // PIECE - 4
    assert ended_at < 1.0


def test_an_endless_line_closes_only_its_connection(board: Board) -> None:
    proxy = board.running()
    client = board.client()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(1600):
            client.sock.sendall(b"x" * LINE_MAX)
    assert client.at_end()
    assert board.status()["open"]
    assert "Traceback" not in proxy.log
    assert f"closed the connection of a client of user {os.getuid()}" in proxy.log
    assert f"a line is longer than {LINE_MAX} bytes" in proxy.log


def test_a_client_cannot_pass_a_descriptor(board: Board) -> None:
    """The kernel would close the descriptor in the proxy, which can block, for example with SO_LINGER."""
    board.running()
    client = board.client()
    with descriptors_refused(client.sock):
        socket.send_fds(client.sock, [b'{"request": "status"}\n'], [0])
    assert "status" in client.ask({"request": "status"})


def test_split_and_pipelined_requests_are_answered_in_order(board: Board) -> None:
    board.running()
    client = board.client()
    lines = b"".join(b'{"request": "status", "id": %d}\n' % number for number in range(500))
    for start in range(0, len(lines), 1000):
        client.sock.sendall(lines[start : start + 1000])
    client.sock.shutdown(socket.SHUT_WR)
    assert [client.read()["id"] for _ in range(500)] == list(range(500))
    assert client.at_end()


def test_a_monitor_may_shut_down_its_sending_side(board: Board) -> None:
    board.core1()
    board.running()
    client = board.client()
    client.ask({"request": "monitor"})
    client.sock.shutdown(socket.SHUT_WR)
    board.trigger()
    assert client.until(event="notification")["signal"] == "redun_notify_irq"


def test_clients_beyond_the_limit_are_refused_until_others_leave(board: Board) -> None:
    proxy = board.running()
    with ExitStack() as stack:
        clients: list[Client] = []
        while len(clients) < CLIENTS_MAX:
            client = Client(board.path, stack)
            if "error" in client.greeting:
                continue  # A tool that another test runs is briefly connected to this proxy.
            client.ask({"request": "monitor"})
            client.sock.shutdown(socket.SHUT_WR)
            clients.append(client)
        refused = Client(board.path, stack)
        assert refused.greeting["error"] == "busy"
        assert Client(board.path, stack).greeting["error"] == "busy"
        for client in clients[:2]:
            client._file.close()
            client.sock.close()
        assert "protocol" in Client(board.path, stack).greeting
    assert board.status()["open"]
    said = f"control: refused a client of user {os.getuid()} (pid {os.getpid()}): {CLIENTS_MAX} clients are connected"
    assert proxy.stop() == 0
    assert proxy.log.count(said) == proxy.log.count("refused a client") == 1


def test_clients_that_are_being_refused_take_no_connection_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.control.server.CLIENTS_MAX", 2)
    monkeypatch.setattr("inco_trio.control.server.RESERVED", 1)
    path, other = os.fspath(tmp_path / "socket"), os.geteuid() + 1
    users = [other, other, os.geteuid()]
    following = iter(users)
    monkeypatch.setattr(Peer, "of", lambda _: Peer(os.getpid(), next(following)))

    async def main() -> list[bytes]:
        refuse = Connection.refuse

        async def refuse_slowly(connection: Connection, message: str) -> None:
            if not connection.peer.is_owner:
                await trio.sleep_forever()
            await refuse(connection, message)

        monkeypatch.setattr(Connection, "refuse", refuse_slowly)
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(Control(NoProxies(), listener, reload).serve)
            clients = [await stack.enter_async_context(await trio.open_unix_socket(path)) for _ in users]
            answers = [await clients[number].receive_some() for number in (0, 2)]
            nursery.cancel_scope.cancel()
        return answers

    async def reload() -> list[str]:
        return []

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert ["protocol" in json.loads(answer) for answer in trio.run(main)] == [True, True]


def test_a_client_that_disconnects_midway_does_no_harm(board: Board) -> None:
    board.core1()
    proxy = board.running()
    for request in (b'{"request": "status"}\n' * 500, b'{"request": "monitor"}\n', b'{"request"'):
        with ExitStack() as stack:
            client = Client(board.path, stack)
            client.sock.sendall(request)
    board.trigger()
    assert board.status()["open"]
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.log


@pytest.fixture
def open_home() -> Iterator[Path]:
    """Yield a directory that all users can enter, unlike pytest's own temporary directories."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        yield Path(home)


@pytest.mark.netns
def test_other_users_may_read_but_not_send(open_home: Path, nobody: list[str]) -> None:
    with ExitStack() as stack:
        board = Board(open_home, stack)
        board.running()
        _others_read(board, nobody)


@pytest.mark.netns
def test_the_connection_limit_per_user_leaves_room_for_the_owner(open_home: Path, nobody: list[str]) -> None:
    code = (
        "import socket, sys\n"
        "connections = []\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    connections.append(socket.socket(socket.AF_UNIX))\n"
        "    connections[-1].connect(sys.argv[1])\n"
        "print(sum(b'protocol' in each.recv(4096) for each in connections), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with ExitStack() as stack:
        board = Board(open_home, stack)
        board.running()
        board.path.chmod(0o666)
        command = [*nobody, sys.executable, "-c", code, os.fspath(board.path), str(CLIENTS_MAX)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert int(other.stdout.readline()) == USER_MAX
            assert board.status()["open"]
            other.communicate()


def _others_read(board: Board, nobody: list[str]) -> None:
    code = (
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect(sys.argv[1])\n"
        "file = sock.makefile('rwb', 0)\n"
        "file.readline()\n"
        "for request in ('status', 'send', 'reload', 'rival'):\n"
        '    file.write(b\'{"request": "%s", "signal": "redun_notify_irq"}\\n\' % request.encode())\n'
        "    print(file.readline().decode()[:30])\n"
    )

    def ask() -> subprocess.CompletedProcess[str]:
        command = [*nobody, sys.executable, "-c", code, os.fspath(board.path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)

    assert stat.S_IMODE(board.path.stat().st_mode) == 0o660
    assert "PermissionError" in ask().stderr
    board.path.chmod(0o666)  # This has the same effect as adding the user to the socket's group.
    status, *refused = ask().stdout.splitlines()
    assert status.startswith('{"status": [')
    assert [answer.startswith('{"error": "not-permitted"') for answer in refused] == [True, True, True]


def test_the_socket_of_a_crashed_proxy_is_replaced(board: Board) -> None:
    proxy = board.running()
    proxy.process.kill()
    proxy.wait()
    assert board.path.is_socket()
    proxy = board.running()
    assert board.client().greeting["pid"] == proxy.pid


@pytest.mark.parametrize("what", ["file", "live", "directory", "missing", "long"])
def test_an_unusable_socket_path_is_logged_and_the_proxy_runs(board: Board, what: str) -> None:
    path = board.path
    with ExitStack() as stack:
        if what == "file":
            path.write_text("mine")
        elif what == "live":
            stack.enter_context(place.listening(path))
        elif what == "directory":
            path.mkdir()
        elif what == "missing":
            path = board.home / "nowhere/x.sock"
        else:
            path = board.home / ("x" * 120)
        board.core1()
        proxy = board.start(control=str(path))
        proxy.wait_ready()
        assert "None" not in proxy.wait_log("control socket: cannot open ")
        board.trigger()
        assert proxy.stop() == 0
    if what == "file":
        assert path.read_text() == "mine"


def test_the_default_path_is_in_the_runtime_directory(board: Board, runtime_environment: dict[str, str]) -> None:
    proxy = board.start(environment=runtime_environment, control=None)
    proxy.wait_ready()
    (path,) = [path for path in _default_directory(runtime_environment).glob("*.sock") if _pid(path) == proxy.pid]
    assert proxy.stop() == 0
    assert not path.exists()


@pytest.fixture
def runtime_environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "runtime").mkdir()
    return {"XDG_RUNTIME_DIR": str(tmp_path / "runtime")}


def _default_directory(environment: Mapping[str, str]) -> Path:
    return Path("/run/inco-trio" if os.geteuid() == 0 else f"{environment['XDG_RUNTIME_DIR']}/inco-trio")


def _pid(path: Path) -> int:
    with ExitStack() as stack:
        try:
            pid: int = Client(path, stack).greeting["pid"]
        except ConnectionRefusedError:
            return 0
        return pid


def test_a_user_without_a_runtime_directory_has_a_private_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(place, "_TEMPORARY", str(tmp_path))
    uid = os.geteuid()
    private = tmp_path / f"inco-trio-{uid}"
    place.make_directory(private)
    place.make_directory(private)
    assert private.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert place.runtime_directories() == [Path("/run/inco-trio"), private]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert place.default_path("rpmsg0") == tmp_path / "inco-trio-1000/rpmsg0.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert place.default_path("rpmsg0") == Path("/run/user/1000/inco-trio/rpmsg0.sock")
    assert len(os.fsencode(place.default_path("x" * 200))) <= SOCKET_PATH_MAX
    assert place.runtime_directories() == [Path("/run/inco-trio"), Path("/run/user/1000/inco-trio")]


IN_TMP = """
import contextlib, os, subprocess, sys
from pathlib import Path
home, project, setup = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, project)
from inco_trio.service.launch import Launched
from netns.hang import HANG
from netns.unprivileged import ORDINARY, drop, uncover
uncover([Path(path).resolve() for path in (project, sys.prefix, sys.base_prefix, home)], private=Path("/tmp"))
if Path("/run/inco-trio").is_dir():
    # Hide the sockets that other tests have left. This user may not connect to them.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "inco-trio-test", "/run/inco-trio"], check=True)
user = ORDINARY if os.geteuid() == 0 else os.geteuid()
os.chown(home, user, -1)
private = f"/tmp/inco-trio-{user}"
subprocess.run(["sh", "-ec", setup, "sh", private, str(user)], check=True)
drop()
os.environ.pop("XDG_RUNTIME_DIR", None)
proxy = Launched("run", f"unix:{home}/a,peer={home}/b", "--irq-dir", home / "irq", log=home / "log")
with contextlib.closing(proxy):
    assert proxy.wait_ready(HANG), proxy.log
    status = subprocess.run([sys.executable, "-m", "inco_trio", "status"], capture_output=True, text=True)
    made = os.lstat(private)
    print(status.returncode, f"{made.st_mode & 0o7777:o}", made.st_uid == user)
    print(status.stdout, status.stderr, "".join(line for line in proxy.log.splitlines(True) if "warning" in line))
"""
"""A program that runs a shell command with an empty /tmp, then a proxy and `status` as a user without a runtime
directory. It prints the exit code, the mode of the private directory, and the output."""


def in_tmp(home: Path, setup: str) -> tuple[list[str], str]:
    command = [sys.executable, "-c", IN_TMP, str(home), str(Path(__file__).parents[1]), setup]
    out = subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.PIPE, text=True).stdout
    first, _, rest = out.partition("\n")
    return first.split(), rest


@pytest.mark.netns
def test_tools_find_the_proxy_of_a_user_without_a_runtime_directory(tmp_path: Path) -> None:
    result, said = in_tmp(tmp_path, "")
    assert result == ["0", "700", "True"]
    assert f"{tmp_path}/a: down (no process has bound {tmp_path}/b (No such file or directory)), open since " in said
    # The proxy and `status` reuse a directory that this user left behind.
    result, said = in_tmp(tmp_path, 'mkdir -m 700 "$1"; chown "$2" "$1"')
    assert result == ["0", "700", "True"]
    assert "warning" not in said


@pytest.mark.netns
@pytest.mark.parametrize(
    "setup",
    [
        # A user namespace might not map any other user. /usr belongs to a user outside the namespace.
        'mkdir -m 700 "$1"; chown 12 "$1" || mount --bind /usr "$1"',
        'mkdir -m 777 "$1"; chown "$2" "$1"; chmod 777 "$1"',
        'mkdir -m 710 "$1"; chown "$2" "$1"',
        'mkdir -m 700 /tmp/other; chown "$2" /tmp/other; ln -s other "$1"; chown -h "$2" "$1"',
        'touch "$1"; chmod 600 "$1"; chown "$2" "$1"',
    ],
    ids=["of another user", "open to all", "open to the group", "symlink", "file"],
)
def test_a_directory_that_another_user_may_use_is_not_used(tmp_path: Path, setup: str) -> None:
    (code, _, _), said = in_tmp(tmp_path, setup)
    # The proxy runs without a control socket, and the tools do not search the directory.
    assert code == "69"
    assert "inco-trio: error: no running proxy answers in /run/inco-trio: " in said
    assert re.search("warning: .*control socket.*/tmp/inco-trio-", said)


def _open_to_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


@pytest.mark.parametrize("kind", ["symlink", "file", "open to others", "of another user"])
def test_a_private_directory_that_others_control_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(place, "_TEMPORARY", str(tmp_path))
    uid = os.geteuid() + (kind == "of another user")
    path = tmp_path / f"inco-trio-{uid}"
    makers: dict[str, Callable[[Path], object]] = {
        "symlink": lambda path: path.symlink_to(tmp_path),
        "file": Path.touch,
        "open to others": _open_to_others,
        "of another user": lambda path: path.mkdir(mode=0o700),
    }
    makers[kind](path)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(OSError, match=re.escape(f"inco-trio-{uid}")):
        place.make_directory(path)
    assert path not in place.runtime_directories()


def test_a_full_connection_queue_counts_as_a_listener(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        server.bind(str(path))
        server.listen(0)
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.connect(str(path))
        assert place.is_live(path)
        with pytest.raises(OSError, match="another process is already listening on this socket"):
            place.bind(path)


@pytest.mark.netns
def test_the_status_says_that_the_link_does_not_exist_yet(board: Board) -> None:
    board.link = "nothere0"
    proxy = board.start("--wait-link")
    proxy.wait_log("waiting for the link")
    status = board.status()
    assert (status["open"], status["problem"]) == (False, "the link does not exist yet")
    refused = board.client().ask({"request": "reload"})["refused"]
    assert refused == ["not ready yet: reload again once the service is ready"]
    proxy.process.terminate()
    assert proxy.wait() == 0


def test_the_mode_is_set_before_the_path_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the socket with a symlink directly after bind(2), as an attacker who owns the directory could do."""
    victim, path = tmp_path / "victim", tmp_path / "x.sock"
    victim.touch(0o600)
    modes = []

    class Swapped(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            modes.append(stat.S_IMODE(path.stat().st_mode))
            path.unlink()
            path.symlink_to(victim)

    monkeypatch.setattr(socket, "socket", Swapped)
    umask = os.umask(0o077)
    try:
        with place.bind(path):
            assert modes == [0o660]
            assert stat.S_IMODE(victim.stat().st_mode) == 0o600
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)


def test_control_none_opens_no_control_socket(board: Board) -> None:
    proxy = board.start(control="none")
    proxy.wait_ready()
    assert _sockets(proxy.pid) == [f"{board.home}/core0"]
    assert proxy.stop() == 0


def _sockets(pid: int) -> list[str]:
    """Return the paths of a process's Unix sockets."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [words[7] for words in lines if len(words) > 7 and words[6] in inodes]


def test_a_follower_receives_all_it_did_not_acknowledge(board: Board) -> None:
    peer = board.core1()
    board.running()
    name = f"{board.home}/core0"
    board.trigger()  # This notification precedes the first follower.
    first = board.client()
    follow = first.ask({"request": "follow"})["follow"]
    boot = follow[name]["boot"]
    assert follow == {name: {"boot": boot, "acknowledged": 1, "sequence": 1}}
    board.inbound(peer)
    event = first.until(event="notification")
    assert (event["signal"], event["direction"], event["sequence"], event["boot"]) == (
        "ihub_hwwd_irq", "inbound", 2, boot,
    )  # fmt: skip
    assert first.ask({"request": "acknowledge", "board": name, "boot": boot, "sequence": 2}) == {"acknowledged": 2}
    board.trigger()
    assert first.until(event="notification")["sequence"] == 3
    first.end()
    board.trigger()
    second = board.client()
    assert second.ask({"request": "follow", "boards": [name]})["follow"][name]["acknowledged"] == 2
    assert [second.until(event="notification")["sequence"] for _ in range(2)] == [3, 4]
    history = board.status()["history"]
    assert history == {
        "boot": boot, "sequence": 4, "acknowledged": 2, "waiting": 2, "merged": 0, "followed": True,
    }  # fmt: skip
    assert second.ask({"request": "acknowledge", "board": name, "sequence": 99}) == {"acknowledged": 4}
    assert second.ask({"request": "forget"}) == {"forgotten": []}
    second.end()
    third = board.client()
    assert third.ask({"request": "forget"}) == {"forgotten": [name]}
    assert board.status()["history"] is None


def test_a_removed_and_restored_board_has_a_new_history(board: Board) -> None:
    directory = board.home / "boards"
    directory.mkdir()
    entry = {"link": f"unix:{board.home}/core0,peer={board.home}/core1", "irq_dir": str(board.irq)}
    file = directory / "a.json"
    file.write_text(json.dumps(entry))
    peer = board.core1()
    proxy = Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    follower = board.client()
    follower.ask({"request": "follow"})
    told: dict[str, list[int]] = {}
    for _ in range(3):
        for _ in range(5):
            board.inbound(peer)
        for _ in range(5):
            event = follower.until(event="notification")
            told.setdefault(event["boot"], []).append(event["sequence"])
        file.rename(board.home / "a.json")
        proxy.process.send_signal(signal.SIGHUP)
        follower.until(event="closed")
        follower.until(event="reloaded")
        (board.home / "a.json").rename(file)
        proxy.process.send_signal(signal.SIGHUP)
        follower.until(event="opened")
    assert list(told.values()) == [[1, 2, 3, 4, 5]] * 3


def test_a_board_whose_link_changes_continues_its_history(board: Board) -> None:
    directory = board.home / "boards"
    directory.mkdir()
    file = directory / "a.json"

    def use(name: str) -> None:
        link = f"unix:{board.home}/{name},peer={board.home}/core1"
        file.write_text(json.dumps({"link": link, "irq_dir": str(board.irq)}))

    use("core0")
    board.core1()
    proxy = Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    follower = board.client()
    boot = follower.ask({"request": "follow"})["follow"]["a"]["boot"]
    told = []
    for name in ("other", "core0"):
        board.trigger()
        told.append(follower.until(event="notification"))
        use(name)
        proxy.process.send_signal(signal.SIGHUP)
        follower.until(event="opened")
    board.trigger()
    told.append(follower.until(event="notification"))
    assert [(event["boot"], event["sequence"]) for event in told] == [(boot, 1), (boot, 2), (boot, 3)]
    assert follower.ask({"request": "acknowledge", "board": "a", "sequence": 3}) == {"acknowledged": 3}
    assert board.status()["history"]["waiting"] == 0


@pytest.mark.parametrize(
    ("boards", "forget", "kept"),
    [
        (None, None, True),
        (["b"], None, True),
        (["a"], None, False),
        (None, {}, False),
        (None, {"boards": ["b"]}, False),
        (["b"], {"boards": ["b"]}, False),
        (None, {"boards": ["a"]}, True),
    ],
)
def test_a_board_that_opens_without_its_former_follower_keeps_its_notifications(
    board: Board, boards: list[str] | None, forget: dict[str, object] | None, kept: bool
) -> None:
    directory = board.home / "boards"
    directory.mkdir()
    (directory / "a.json").write_text(
        json.dumps({"link": f"unix:{board.home}/a0,peer={board.home}/a1", "irq_dir": str(board.home / "a")})
    )
    peer = board.core1()
    proxy = Proxy(None, ["--boards", str(directory), "--control", str(board.path)], {}, board.home / "log")
    board._stack.callback(proxy.close)
    proxy.wait_ready()
    first = board.client()
    first.ask({"request": "follow", "boards": boards} if boards else {"request": "follow"})
    first.end()
    client, monitor = board.client(), board.client()
    monitor.ask({"request": "monitor"})
    if forget is not None:
        client.ask({"request": "forget", **forget})
    (directory / "b.json").write_text(
        json.dumps({"link": f"unix:{board.home}/core0,peer={board.home}/core1", "irq_dir": str(board.irq)})
    )
    assert client.ask({"request": "reload"}) == {"refused": []}
    board.inbound(peer)
    monitor.until(event="notification", board="b")
    second = board.client()
    position = second.ask({"request": "follow"})["follow"]["b"]
    assert (position["acknowledged"], position["sequence"]) == ((0, 1) if kept else (1, 1))
    if kept:
        assert second.until(event="notification")["sequence"] == 1


def test_notifications_beyond_the_limit_are_merged_by_signal(board: Board) -> None:
    peer = board.core1()
    board.running()
    name = f"{board.home}/core0"
    client, watching = board.client(), board.client()
    client.ask({"request": "follow"})
    client.end()
    watching.ask({"request": "monitor"})
    number = KEPT + 100
    for sequence in range(1, number + 1):
        board.inbound(peer)
        if sequence % 100 == 0 or sequence == number:
            watching.until(event="notification", sequence=sequence)
    history = board.status()["history"]
    assert (history["waiting"], history["merged"]) == (number, 100)
    client = board.client()
    client.ask({"request": "follow"})
    merged = client.until(event="merged")
    assert (merged["signal"], merged["count"], merged["sequence"]) == ("ihub_hwwd_irq", 100, 100)
    told = [client.until(event="notification")["sequence"] for _ in range(AHEAD)]
    assert told == list(range(101, 101 + AHEAD))
    assert client.ask({"request": "acknowledge", "board": name, "sequence": told[-1]}) == {"acknowledged": told[-1]}
    assert client.until(event="notification")["sequence"] == told[-1] + 1
    assert board.status()["history"]["waiting"] == number - told[-1]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"request": "follow", "boards": "x"}, "invalid"),
        ({"request": "follow", "boards": [1]}, "invalid"),
        ({"request": "acknowledge", "board": "x", "sequence": 1}, "invalid"),
        ({"request": "acknowledge-all", "positions": []}, "invalid"),
        ({"request": "forget", "boards": {}}, "invalid"),
    ],
)
def test_invalid_follower_requests_are_refused(board: Board, request_: dict[str, object], error: str) -> None:
    board.running()
    assert board.client().ask(request_)["error"] == error


def test_a_follower_may_receive_and_acknowledge_notifications_in_batches(board: Board) -> None:
    peer = board.core1()
    board.running()
    name, client = f"{board.home}/core0", board.client()
    boot = client.ask({"request": "follow", "batches": True})["follow"][name]["boot"]
    number = 300
    for _ in range(number):
        board.inbound(peer)
    board.trigger()
    told: list[tuple[int, str, str]] = []
    while len(told) < number + 1:
        batch = client.until(event="notifications", board=name, boot=boot)
        for sequence, (index, time_, monotonic_ns) in enumerate(batch["items"], batch["sequence"]):
            assert time_ > 0
            assert monotonic_ns > 0
            told.append((sequence, *batch["signals"][index]))
    assert sorted(signal for _, _, signal in told) == ["ihub_hwwd_irq"] * number + ["redun_notify_irq"]
    assert [sequence for sequence, *_ in told] == [*range(1, number + 2)]
    positions = [[name, boot, 200], ["missing", boot, 1], [name, "other", 250]]
    assert client.ask({"request": "acknowledge-all", "positions": positions}) == {"acknowledged": 1}
    assert board.status()["history"]["acknowledged"] == 200


def test_invalid_acknowledgements_are_refused(board: Board) -> None:
    board.running()
    name = f"{board.home}/core0"
    client = board.client()
    client.ask({"request": "follow"})
    for fields, error in (
        ({"board": "missing", "sequence": 1}, "unknown-board"),
        ({"board": name}, "invalid"),
        ({"board": name, "sequence": "1"}, "invalid"),
        ({"board": name, "sequence": 1, "boot": "0"}, "invalid"),
    ):
        assert client.ask({"request": "acknowledge", **fields})["error"] == error
    assert client.ask({"request": "follow"})["error"] == "invalid"
    other = board.client()
    assert other.ask({"request": "follow"})["error"] == "busy"
    client.end()
    assert "follow" in other.ask({"request": "follow"})


@pytest.mark.parametrize("left", [0, 1, 3])
def test_all_control_sockets_are_tried_even_if_few_threads_can_be_started(tmp_path: Path, left: int) -> None:
    with no_threads(left):
        found, errors = answering([tmp_path / name for name in "abc"])
    assert found == []
    assert sorted(Path(error.subject).name for error in errors) == ["a", "b", "c"]
