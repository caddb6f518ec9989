"""Tests of `inco-trio record`, as users run it, with a real daemon."""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from inco_trio.capture.gaps import TIMES, Gaps, separated
from inco_trio.capture.pcapng import Packet
from inco_trio.capture.recording import Entry, Mark, open_recording
from inco_trio.capture.recording import Recorder as CaptureRecorder
from inco_trio.cli.parser import parse
from inco_trio.cli.record import HELD_MAX, _Stop, _write
from inco_trio.cli.record import _Proxy as RecordedProxy
from inco_trio.control.client import Client
from inco_trio.control.feed import Feed
from inco_trio.control.monitors import Monitor
from inco_trio.control.past import past_events
from inco_trio.control.protocol import BoardStatus, Event, Past, decode_reply, encode_board, encode_status
from inco_trio.counters import Counters
from inco_trio.frame import encode
from inco_trio.notifications import Events
from inco_trio.persist.followed import HISTORY, History
from inco_trio.persist.recorder import AREA, Recorder, truncated
from inco_trio.problems import noted_by, report
from inco_trio.proxy_status import Status
from inco_trio.registers.states import RUNS
from inco_trio.service import launch
from inco_trio.signals import Direction, Signal, SignalTable
from inco_trio.simulation.world import Cores, Peer
from inco_trio.stats import Stats
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.support_control import FRAME, LIMITS, MAC, PATIENT, Board, NoProxies, Running, block, child
from tests.test_fdstore import Daemon as Holder

pytestmark = pytest.mark.tools

PATIENT_PROXY = child(f"from inco_trio.control import server; server.FAREWELL = {HANG}")
"""The program of a proxy that ends only once its clients have read all events."""
PATIENT_DEMO = [
    sys.executable,
    "-c",
    f"""
import sys
from inco_trio.cli import main
from inco_trio.service import launch
from inco_trio.simulation import traffic
traffic._LOST_AFTER = {HANG}
launch._CHILD = {child(LIMITS)!r}
sys.exit(main())
""",
    "demo",
]
"""A demonstration that waits for slow processes, and so does its recording."""
IN, OUT = "ihub_hwwd_irq", "redun_notify_irq"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ExitStack() as stack:
        yield Board(tmp_path, stack)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limits that a slow process could reach."""
    monkeypatch.setattr(launch, "_CHILD", PATIENT_PROXY)
    monkeypatch.setattr("inco_trio.cli.record.FAREWELL", HANG)
    monkeypatch.setattr(Client.__init__, "__defaults__", (HANG,))
    monkeypatch.setattr(Client.request, "__defaults__", (HANG,))
    monkeypatch.setattr(Client.status, "__defaults__", (None, HANG))


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, AREA))


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Yield a function that starts `record` and waits until it is listening."""
    with ExitStack() as stack:

        def started(*words: str | Path) -> Running:
            running = Running("record", *words)
            stack.callback(running.close)
            running.listening("recording ")
            return running

        yield started


def finish(running: Running, number: signal.Signals = signal.SIGINT) -> str:
    """Stop `record` with a Unix signal and return its last line of output."""
    running.process.send_signal(number)
    out, err = running.process.communicate(timeout=HANG)
    assert (running.process.returncode, out) == (0, "")
    return err.splitlines()[-1]


def everything(path: Path, *, is_complete: bool = True) -> list[Entry | Mark]:
    """Read a recording. While it is not complete, its last block may be cut off."""
    with open_recording(path, SignalTable([])) as recording:
        found = list(recording)
        assert recording.reader.cut is None or not is_complete
        return found


def names(path: Path) -> list[tuple[str, Direction | None]]:
    return [(entry.signal, entry.direction) for entry in everything(path) if isinstance(entry, Entry)]


def packets(path: Path) -> list[Packet]:
    with open_recording(path, SignalTable([])) as recording:
        return list(recording.reader)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_directions_are_recorded_with_their_frames(
    board: Board, start: Callable[..., Running], tmp_path: Path, number: signal.Signals
) -> None:
    peer = board.core1()
    board.running()
    file = tmp_path / "f.pcapng"
    recording = start(file, "--control", board.path)
    sent = [FRAME, FRAME.ljust(60, b"\0"), encode(b"nobody", MAC), b"short"]
    for frame in sent:
        board.inbound(peer, frame)
    board.trigger()
    sent.append(peer.recv(2000))
    while board.status()["counters"]["received"] < 4:
        pass
    assert finish(recording, number) == f"inco-trio: 3 notifications in {file}"
    assert Counter(names(file)) == {
        (IN, Direction.INBOUND): 2,
        (OUT, Direction.OUTBOUND): 1,
        ("nobody", Direction.INBOUND): 1,
    }
    comments = {packet.data: packet.comment for packet in packets(file)}
    assert comments == {
        sent[0]: f"inbound {IN} {board.irq}/message_5_state",
        sent[1]: f"inbound {IN} {board.irq}/message_5_state",
        sent[2]: "ignored: unknown signal nobody",
        sent[3]: "ignored: malformed frame",
        sent[4]: f"outbound {OUT} {board.irq}/message_6_trig",
    }
    assert {packet.interface.name for packet in packets(file)} == {f"{board.home}/core0"}


def test_a_message_never_continues_the_line_of_the_progress(board: Board, tmp_path: Path) -> None:
    proxy = board.running()
    master, slave = pty.openpty()
    code = f"{LIMITS}\nrecord.SHOWN = 0.0\nimport sys\nfrom inco_trio.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, "record", str(tmp_path / "f"), "--control"]
    with subprocess.Popen([*command, str(board.path)], stderr=slave) as process, os.fdopen(master, "rb", 0) as terminal:
        os.close(slave)
        shown = b""
        while b" notifications" not in shown:
            shown += terminal.read(4096)
        assert proxy.stop() == 0
        while b"waiting for the next proxy" not in shown:
            shown += terminal.read(4096)
        process.send_signal(signal.SIGINT)
    assert b"\r\x1b[Kinco-trio: " in shown
    assert b"notificationsinco-trio" not in shown


def test_record_waits_for_a_proxy_that_restarts(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    proxy = board.running()
    recording = start(tmp_path / "f", "--control", board.path)
    board.trigger()
    peer.recv(2000)
    assert proxy.stop() == 0
    assert recording.remark().endswith("the proxy has ended: waiting for the next proxy\n")
    board.running()
    while not any(
        isinstance(each, Mark) and "again" in each.text for each in everything(tmp_path / "f", is_complete=False)
    ):
        assert recording.process.poll() is None
    board.trigger()
    peer.recv(2000)
    finish(recording)
    assert names(tmp_path / "f") == [(OUT, Direction.OUTBOUND)] * 2
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert [text for text in marks if "proxy" in text][-3:] == [
        "the proxy has ended",
        "earlier events are unknown: the history was lost when the proxy exited",
        "the proxy was started again",
    ]


def test_record_ends_after_count_notifications_within_a_batch(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    """The flight recorder reports a batch as one event, which may contain more notifications than are wanted."""
    peer = board.core1()
    first = board.running()
    recording = start(tmp_path / "f", "--control", board.path, "--count", "3")
    wait_stopped(recording.process.pid)
    assert first.stop() == 0
    second = board.running()
    wait_stopped(second.process.pid)
    for _ in range(5):
        board.inbound(peer)
    second.process.send_signal(signal.SIGCONT)
    while board.status()["counters"]["delivered"] < 5:
        pass
    recording.process.send_signal(signal.SIGCONT)
    assert recording.end() == 0
    assert counts(tmp_path / "f") == {IN: 3}


def test_a_link_that_goes_down_is_marked(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "f", "--control", board.path)
    peer.close()
    Path(f"{board.home}/core1").unlink()
    while not any(
        isinstance(each, Mark) and each.text.startswith("the link went down")
        for each in everything(tmp_path / "f", is_complete=False)
    ):
        assert recording.process.poll() is None
    assert finish(recording).startswith("inco-trio: 0 notifications in ")


@pytest.mark.parametrize("wanted", [("--count", "3"), ("--direction", "inbound", "--count", "2")], ids=str)
def test_record_ends_after_count_notifications(
    board: Board, start: Callable[..., Running], tmp_path: Path, wanted: tuple[str, ...]
) -> None:
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "f", "--control", board.path, *wanted)
    board.trigger()
    peer.recv(2000)
    board.inbound(peer)
    board.inbound(peer)
    assert recording.end() == 0
    assert len(names(tmp_path / "f")) == int(wanted[-1])


def test_record_ends_after_duration(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    board.core1()
    proxy = board.running()
    assert start(tmp_path / "f", "--control", board.path, "--duration", "0.2").end() == 0
    # The duration ends a recording even if no proxy is running.
    recording = start(tmp_path / "g", "--control", board.path, "--duration", "1")
    assert proxy.stop() == 0
    assert recording.end() == 0


def test_size_and_keep_rotate_the_files(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "f.pcapng", "--control", board.path, "--size", "2000", "--keep", "2", "--count", "100")
    for _ in range(100):
        board.trigger()
        peer.recv(2000)
    _, err = recording.process.communicate(timeout=HANG)
    files = sorted(tmp_path.glob("f*.pcapng"))
    assert err.splitlines()[-1] == f"inco-trio: 100 notifications in 2 files, the last one {files[-1]}"
    assert len(files) == 2
    assert all(path.stat().st_size <= 2000 and names(path) for path in files)


def test_a_killed_recorder_leaves_a_readable_file(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "f", "--control", board.path)
    for _ in range(50):
        board.trigger()
        peer.recv(2000)
    while not names(tmp_path / "f"):
        assert recording.process.poll() is None
    recording.process.kill()
    recording.process.wait()
    assert set(names(tmp_path / "f")) == {(OUT, Direction.OUTBOUND)}


def test_notifications_sent_before_the_proxy_ended_are_kept(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    peer = board.core1()
    proxy = board.running()
    recording = start(tmp_path / "f", "--control", board.path)
    wait_stopped(recording.process.pid)
    os.waitid(os.P_PID, recording.process.pid, os.WSTOPPED)
    for _ in range(5):
        board.trigger()
        peer.recv(2000)
    assert proxy.stop() == 0
    # Interrupt `record` as well, as Ctrl-C does if a script runs both programs.
    recording.process.send_signal(signal.SIGINT)
    recording.process.send_signal(signal.SIGCONT)
    _, err = recording.process.communicate(timeout=HANG)
    assert recording.process.returncode == 0
    assert err.splitlines()[-1] == f"inco-trio: 5 notifications in {tmp_path}/f"
    assert names(tmp_path / "f") == [(OUT, Direction.OUTBOUND)] * 5


@pytest.mark.netns
@pytest.mark.parametrize("rotation", [(), ("--size", "8000")], ids=str)
def test_a_full_file_system_ends_the_recording_with_an_error(
    board: Board, tmp_path: Path, rotation: tuple[str, ...]
) -> None:
    peer = board.core1()
    board.running()
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    kept.mkdir()
    # The filesystem has four pages. Two files fill it, so the header of a third file does not fit.
    command = [*PATIENT, "record", str(small / "f"), "--control", str(board.path), *rotation]
    script = f'mount -t tmpfs -o size=16384 inco-trio-test {small} && "$@"; code=$?; cp {small}/* {kept}; exit $code'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "recording" in process.stderr.readline()
        for _ in range(200):
            board.trigger()
            peer.recv(2000)
        _, err = process.communicate(timeout=HANG)
    assert process.returncode == 71
    files = sorted(kept.iterdir())
    assert len(files) == (2 if rotation else 1)
    written = sum(len(names(path)) for path in files)
    assert written > 0
    many = "2 files, the last one " if rotation else ""
    last = small / files[-1].name
    end = f"the recording ends after {written} notifications, which are kept"
    assert err.splitlines() == [
        f"inco-trio: {written} notifications in {many}{last}",
        f"inco-trio: error: {last}: No space left on device: {end}",
    ]


def replay(*words: str | Path) -> int:
    return subprocess.run([*PATIENT, "replay", *map(str, words)], timeout=HANG, check=False).returncode


def test_a_replay_gives_the_same_counts(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    board.running()
    first = start(tmp_path / "first", "--control", board.path, "--count", "30")
    for number in range(30):
        if number % 3:
            board.inbound(peer)
        else:
            board.trigger()
            peer.recv(2000)
    assert first.end() == 0
    second = start(tmp_path / "second", "--control", board.path, "--count", "30")
    # Replay in the role of core 0's applications, while this test acts as core 1.
    replay(tmp_path / "first", "--irq-dir", board.irq, "--fast", "--wait", "0.1")
    for _ in range(10):
        peer.recv(2000)
    peer.close()
    Path(f"{board.home}/core1").unlink()
    # Now replay the same recording as core 1.
    replay(tmp_path / "first", f"unix:{board.home}/core1,peer={board.home}/core0", "--fast", "--wait", "0.1")
    assert second.end() == 0
    assert Counter(names(tmp_path / "second")) == Counter(names(tmp_path / "first"))


def test_tshark_reads_a_recording(board: Board, start: Callable[..., Running], tmp_path: Path) -> None:
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "f", "--control", board.path, "--count", "1")
    board.trigger()
    peer.recv(2000)
    assert recording.end() == 0
    tshark = shutil.which("tshark")
    assert tshark
    fields = ("-e", "frame.packet_flags_direction", "-e", "frame.comment", "-e", "eth.type")
    command = [tshark, "-r", str(tmp_path / "f"), "-Y", "eth.type == 0x8800", "-T", "fields", *fields]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG).stdout
    assert said.splitlines() == [f"0x00000002\toutbound {OUT} {board.irq}/message_6_trig\t0x8800"]


@pytest.mark.netns
def test_the_demo_can_be_recorded(tmp_path: Path) -> None:
    file = tmp_path / "demo.pcapng"
    command = [*PATIENT_DEMO, "--count", "5", "--rate", "1000", "--record", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Recorded: 30 notifications in {file}"
    assert set(Counter(names(file)).values()) == {5}
    done = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 71
    assert done.stderr == f"inco-trio: error: --record: {tmp_path}: cannot be written: Is a directory\n"


@pytest.mark.netns
def test_record_listens_on_the_interface_without_a_proxy(cores: Cores, core1: Peer, tmp_path: Path) -> None:
    command = [*PATIENT, "record", str(tmp_path / "f"), cores.link, "--count", "2"]
    # Hide the control sockets of other proxies in /run: they could serve a link with the same name.
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs inco-trio-test /run && exec "$@"', "sh", *command]
    with cores.core0.run(lambda: subprocess.Popen(hidden, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"inco-trio: no proxy answers: capturing frames on {cores.link}\n"
        assert "recording" in process.stderr.readline()
        core1.send(b"one")
        core1.send(b"two")
        process.communicate(timeout=HANG)
    assert process.returncode == 0
    assert names(tmp_path / "f") == [("one", Direction.INBOUND), ("two", Direction.INBOUND)]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("FILE", "--control", "/nowhere/x.sock"), 69, "/nowhere/x.sock: no proxy is listening on this socket"),
        (("FILE", "--keep", "2"), 2, "--keep requires --size or --period: without them, only one file is written"),
        (("FILE", "--since", "10m"), 2, "--since applies only to --past (add --past, or omit --since)"),
        (
            ("FILE", "--past", "--count", "5"),
            2,
            "--past and --count are mutually exclusive: the history is written at once",
        ),
        (("FILE", "--past", "--size", "1M", "--keep", "2"), 2, "--past and --size are mutually exclusive"),
        (("FILE", "--duration", "0"), 2, "'0': expected a duration above 0"),
        (("",), 2, "FILE"),
    ],
)
def test_invalid_arguments_are_refused(words: tuple[str, ...], code: int, text: str, tmp_path: Path) -> None:
    words = tuple(str(tmp_path / "f") if word == "FILE" else word for word in words)
    done = subprocess.run([*PATIENT, "record", *words], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert not (tmp_path / "f").exists()


def test_an_unwritable_file_is_an_error(board: Board, tmp_path: Path) -> None:
    board.core1()
    board.running()
    command = [*PATIENT, "record", str(tmp_path), "--control", str(board.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 71
    assert done.stderr == f"inco-trio: error: {tmp_path}: cannot be written: Is a directory\n"


FLOOD = 20_000
"""More events than fit into the proxy's queue for a client and the buffers of the client's socket together."""


def flood(board: Board, peer: socket.socket) -> None:
    """Send FLOOD frames, and wait until all have been delivered."""
    for _ in range(FLOOD):
        board.inbound(peer)
    while board.status()["counters"]["delivered"] < FLOOD:
        pass


def counts(path: Path) -> Counter[str]:
    found = everything(path, is_complete=False)
    return Counter(entry.signal for entry in found if isinstance(entry, Entry) and not entry.pending)


# One record can hold a whole batch, so thousands of records can hold the whole flood, but 16 records cannot.
@pytest.mark.parametrize(
    "size", [65_536, pytest.param(16, marks=pytest.mark.thorough), pytest.param(0, marks=pytest.mark.thorough)]
)
def test_what_a_slow_recording_missed_is_filled_in_or_counted(
    board: Board, start: Callable[..., Running], tmp_path: Path, size: int
) -> None:
    peer = board.core1()
    board.running("--history", str(size))
    recording = start(tmp_path / "f", "--control", board.path)
    wait_stopped(recording.process.pid)
    flood(board, peer)
    recording.process.send_signal(signal.SIGCONT)
    finish(recording)
    there = counts(tmp_path / "f")[IN]
    marks = [each for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    missing = [int(each.text.split()[0]) for each in marks if "lost" in each.text or "not recorded" in each.text]
    assert there + sum(missing) == FLOOD
    assert len(missing) == (size < FLOOD)


def test_a_history_that_does_not_arrive_in_time_is_not_the_end_of_the_proxy(board: Board, tmp_path: Path) -> None:
    peer = board.core1()
    board.running("--history", "65536")
    code = f"""
import sys
from inco_trio.cli import main
{LIMITS}
from inco_trio.control.protocol import encode_request
request = client.Client.request
def impatient(self, wanted, *patience):
    if type(wanted).__name__ != "HistoryRequest":
        return request(self, wanted, *patience)
    self._sock.setblocking(True)
    self._sock.sendall(encode_request(wanted))
    self._unanswered += 1
    raise self._silent()
client.Client.request = impatient
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "record", str(tmp_path / "f"), "--control", str(board.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "recording" in process.stderr.readline()
        wait_stopped(process.pid)
        flood(board, peer)
        process.send_signal(signal.SIGCONT)
        silent = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANG)
    there = counts(tmp_path / "f")[IN]
    assert silent == (
        f"inco-trio: {board.path}: the proxy does not answer: the recording lacks {FLOOD - there} events "
        "(`inco-trio history` may show them)\n"
    )
    assert err == f"inco-trio: {there} notifications in {tmp_path}/f\n"
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert marks == [f"{FLOOD - there} events were lost here: they arrived too fast"]


Replies = dict[str, list[bytes]]
"""The bytes to send in response to each kind of request; the last ones also in response to further requests."""


def line(**content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"


def notification(board: str, sequence: int) -> dict[str, object]:
    at = {"board": board, "time": time.time(), "monotonic_ns": time.monotonic_ns()}
    return {"event": "notification", **at, "direction": "inbound", "signal": IN, "sequence": sequence, "count": 1}


def history(board: str, *sequences: int) -> bytes:
    return line(history={"board": board, "boot": "1", "events": [notification(board, each) for each in sequences]})


def statuses(*names: str, closed: str = "x") -> bytes:
    """Return a response that reports these boards as open, and the boards in `closed` as not open."""
    boards = [BoardStatus(name, "", Status(name, 1, 1, True, "", None, Stats(), (), ())) for name in names]
    boards += [BoardStatus(name, "no room") for name in closed]
    return "".join(encode_status(map(encode_board, boards), {})).encode()


MONITOR, LOST = line(monitor=True), line(event="lost", count=5, time=time.time(), monotonic_ns=time.monotonic_ns())
FLUSHED = line(flush=True) + line(event="flushed")


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Yield a function that starts a stand-in for a proxy and returns the path of its control socket.

    Each argument has the replies for one connection. A request with an empty reply or none ends the connection.
    """
    path, threads = tmp_path / "scripted.sock", []

    def serve(listener: socket.socket, connections: Sequence[Replies]) -> None:
        greeting = {"name": "b", "pid": os.getpid(), "boot": "1", "boards": ["a", "b", "c"], "protocol": 1}
        for number, replies in enumerate(connections, 1):
            accepted, _ = listener.accept()
            if number == len(connections):
                listener.close()
            with accepted, accepted.makefile("rb") as lines:
                accepted.sendall(line(**greeting))
                for each in lines:
                    some = replies.get(json.loads(each)["request"], [b""])
                    if not (reply := some.pop(0) if len(some) > 1 else some[0]):
                        break
                    accepted.sendall(reply)

    def start(*connections: Replies) -> Path:
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(HANG)
        listener.bind(str(path))
        listener.listen()
        threads.append(threading.Thread(target=serve, args=(listener, connections), daemon=True))
        threads[0].start()
        return path

    yield start
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive()


def test_an_event_that_arrives_with_a_history_is_recorded_at_once(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path
) -> None:
    replies = {
        "status": [statuses("b")],
        "monitor": [MONITOR + LOST],
        "history": [history("b") + line(**notification("b", 6))],
        "flush": [FLUSHED],
    }
    recording = start(tmp_path / "f", "--control", scripted(replies), "--count", "1")
    assert recording.end() == 0
    assert counts(tmp_path / "f") == {IN: 1}


@pytest.mark.parametrize("is_followed", [True, False])
def test_events_that_arrived_before_the_proxy_ended_are_recorded(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path, is_followed: bool
) -> None:
    """The proxy ends while it is asked for the events that the recording has lost."""
    arrived = b"".join(line(**notification("b", each)) for each in (1, 2, 3))
    ends = {"status": [statuses("b")], "monitor": [MONITOR + arrived + LOST]}
    follows = {
        "status": [statuses("b")],
        "monitor": [MONITOR],
        "history": [history("b", 4, 5, 6, 7, 8)],
        "flush": [FLUSHED],
    }
    recording = start(tmp_path / "f", "--control", scripted(ends, *([follows] if is_followed else [])))
    ended = "the proxy was started again" if is_followed else "waiting"
    if is_followed:
        while not any(
            isinstance(each, Mark) and each.text == ended for each in everything(tmp_path / "f", is_complete=False)
        ):
            assert recording.process.poll() is None
    else:
        assert ended in recording.remark()
    finish(recording)
    assert counts(tmp_path / "f") == {IN: 8 if is_followed else 3}
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert ("5 events were lost here: they arrived too fast" in marks) is not is_followed


@pytest.mark.parametrize(
    ("before", "after", "is_complete"),
    [("a", "ab", True), ("abc", "ab", False), ("ab", "abc", False)],
    ids=["added", "removed", "without a history"],
)
def test_boards_that_a_reload_adds_or_removes_are_filled_in_or_marked(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path,
    before: str, after: str, is_complete: bool,
) -> None:  # fmt: skip
    replies = {
        "status": [statuses(*before), statuses(*after)],
        "monitor": [MONITOR + LOST],
        "history": [history("a", 1), history("b", 1), line(error="invalid", message="the proxy records no history")],
        "flush": [FLUSHED],
    }
    recording = start(tmp_path / "f", "--control", scripted(replies))
    while sum(counts(tmp_path / "f").values()) < 2:
        assert recording.process.poll() is None
    finish(recording)
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert ("5 events were lost here: they arrived too fast" in marks) is not is_complete


@pytest.mark.parametrize("others", ["", "a"], ids=["alone", "with another board"])
@pytest.mark.parametrize("opens", ["early", "late", "never", "without a history"])
def test_a_board_that_opens_after_the_restart_is_filled_in(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path, opens: str, others: str
) -> None:
    """The new proxy answers before the board is open, for example because it waits for the link."""
    first = {"status": [statuses("b", *others)], "monitor": [MONITOR + line(**notification("b", 1)) + LOST]}
    past = history("b", 2, 3, 4, 5, 6)
    arrived, at = line(**notification("b", 7)), {"time": time.time(), "monotonic_ns": time.monotonic_ns()}
    link = line(event="link", board="b", running=True, message="the link is up", duration=0, **at)
    later = line(**notification("b", 8))
    before, after = statuses(*others, closed="b"), statuses("b", *others)
    refusal = line(error="invalid", message="the proxy records no history")
    second = {
        "status": [before, before if opens == "never" else after],
        "monitor": [MONITOR + arrived + link + later if opens == "early" else MONITOR + arrived],
        "history": [*(history("a") for _ in others), refusal if opens == "without a history" else past],
        "flush": [FLUSHED],
    }
    recording = start(tmp_path / "f", "--control", scripted(first, second))
    while len(second["status"]) > 1:  # The first answer has been sent: `record` has connected again.
        assert recording.process.poll() is None
    finish(recording)
    expected = {"early": 8, "late": 7, "never": 2, "without a history": 2}[opens]
    found = everything(tmp_path / "f")
    assert [entry.signal for entry in found if isinstance(entry, Entry)] == [IN] * expected
    marks = [each.text for each in found if isinstance(each, Mark)]
    assert ("5 events were lost here: they arrived too fast" in marks) is (expected == 2)
    assert ("b: not open: earlier events may be missing here" in marks) is (opens == "never")
    times = [entry.time_ns for entry in found if isinstance(entry, Entry)]
    assert times == sorted(times)


def test_a_board_whose_opening_no_event_reports_is_filled_in(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path
) -> None:
    """The event of a fleet that has opened its boards has the name of the directory, so `--board` excludes it."""
    first = {"status": [statuses("b")], "monitor": [MONITOR + LOST]}
    closed = statuses(closed="b")
    second = {"status": [closed, closed, statuses("b")], "monitor": [MONITOR], "history": [history("b", 1, 2, 3)]}
    recording = start(tmp_path / "f", "--control", scripted(first, second), "--board", "b", "--count", "3")
    assert recording.end() == 0
    assert counts(tmp_path / "f") == {IN: 3}


class _Restarting(_Stop):
    """A condition that never ends the recording and never waits, so that `record` connects again at once."""

    def wait(self, seconds: float, *others: object) -> bool:  # noqa: ARG002 - the same arguments as in the base class
        return False


@pytest.fixture
def recorded() -> Iterator[Callable[[Path], RecordedProxy]]:
    """Yield a function that begins to record the proxy with this control socket, in this process."""
    with ExitStack() as stack:

        def begin(path: Path) -> RecordedProxy:
            stop = _Restarting(stack.enter_context(socket.socket()), None)
            found = RecordedProxy(Client(path), parse(["record", "FILE", "--control", str(path)]), stop)
            stack.callback(found.close)
            return found

        yield begin


@pytest.mark.parametrize(("board", "asks"), [("a", False), ("c", True), ("b", True), ("", True)])
def test_only_events_of_closed_boards_and_of_the_process_cause_requests(
    scripted: Callable[..., Path], recorded: Callable[[Path], RecordedProxy], monkeypatch: pytest.MonkeyPatch,
    board: str, asks: bool,
) -> None:  # fmt: skip
    """The name of the process is b. Without such an event, the next request follows after a pause."""
    monkeypatch.setattr("inco_trio.cli.record.OPENS_MIN", math.inf)
    event = line(event="reloaded", board=board, time=time.time(), monotonic_ns=time.monotonic_ns())
    first = {"status": [statuses("a", "c")], "monitor": [MONITOR + LOST]}
    second = {
        "status": [statuses("a", closed="c"), statuses("a", "c"), b""],
        "monitor": [MONITOR + event],
        "history": [history("a"), history("c", 1)],
    }
    proxy = recorded(scripted(first, second))
    while len(second["status"]) == 3:
        proxy.arrived()
    assert ("notification" in [event.event for event in proxy.arrived()]) is asks
    assert len(second["status"]) == (1 if asks else 2)


def test_events_are_in_order_after_two_restarts(
    scripted: Callable[..., Path], recorded: Callable[[Path], RecordedProxy]
) -> None:
    first = {"status": [statuses("b")], "monitor": [MONITOR + LOST]}
    second = {
        "status": [statuses(closed="b"), b""],
        "monitor": [MONITOR + line(**notification("b", 1)) + LOST],
    }
    third = {"status": [statuses(closed="b")], "monitor": [MONITOR], "flush": [FLUSHED]}
    proxy = recorded(scripted(first, second, third))
    events: list[Event] = []
    while len(second["status"]) > 1:
        events += proxy.arrived()
    events += [*proxy.arrived(), *proxy.arrived(), *proxy.rest()]
    assert Counter(event.message for event in events)["the proxy was started again"] == 2
    times = [event.monotonic_ns for event in events]
    assert times == sorted(times)


def test_events_wait_for_a_board_that_opens_late_up_to_a_limit(
    scripted: Callable[..., Path], start: Callable[..., Running], tmp_path: Path
) -> None:
    first = {"status": [statuses("b")], "monitor": [MONITOR + LOST]}
    flood = b"".join(line(**notification("b", each)) for each in range(1, HELD_MAX + 3))
    second = {"status": [statuses(closed="b")], "monitor": [MONITOR + flood], "flush": [FLUSHED]}
    recording = start(tmp_path / "f", "--control", scripted(first, second))
    while counts(tmp_path / "f")[IN] < HELD_MAX + 2:
        assert recording.process.poll() is None
    finish(recording)
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert marks.count("b: not open: earlier events may be missing here") == 1


@pytest.mark.s6
def test_what_a_killed_proxy_did_not_report_is_filled_in(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    holder = Holder(board.home)
    holder.start()
    words = [board.link, "--irq-dir", str(board.irq), "--control", str(board.path), "--fd-holder", holder.socket,
             "--history", "65536"]  # fmt: skip
    prefix = ["s6-fdholder-getdump", holder.socket]
    peer = board.core1()
    with ExitStack() as stack:
        stack.callback(holder.stop)
        first = Proxy(None, words, {}, board.home / "log", prefix=prefix)
        stack.callback(first.close)
        first.wait_ready()
        recording = start(tmp_path / "f", "--control", board.path)
        board.trigger()
        peer.recv(2000)
        wait_stopped(recording.process.pid)
        flood(board, peer)
        first.process.kill()
        first.process.wait(HANG)
        second = Proxy(None, words, {}, board.home / "log2", prefix=prefix)
        stack.callback(second.close)
        second.wait_ready()
        recording.process.send_signal(signal.SIGCONT)
        while not any(
            isinstance(each, Mark) and "again" in each.text for each in everything(tmp_path / "f", is_complete=False)
        ):
            assert recording.process.poll() is None
        board.trigger()
        peer.recv(2000)
        finish(recording)
    assert counts(tmp_path / "f") == {IN: FLOOD, OUT: 2}
    marks = [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)]
    assert any(text.startswith("started again after the previous process had ended without a stop") for text in marks)
    assert not any("not recorded" in text or "unknown" in text for text in marks)


def test_what_happened_before_can_be_recorded(board: Board, tmp_path: Path) -> None:
    peer = board.core1()
    board.running("--history", "65536")
    flood(board, peer)
    board.trigger()
    peer.recv(2000)
    while board.status()["counters"]["sent"] < 1:
        pass
    file = tmp_path / "f"
    command = [*PATIENT, "record", str(file), "--control", str(board.path), "--past"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"inco-trio: {FLOOD + 1} notifications of the history of {board.home}/core0 in {file}\n"
    assert counts(file) == {IN: FLOOD, OUT: 1}
    assert file.stat().st_size < 300 * FLOOD  # A notification that was not merged with others takes about 220 bytes.
    subprocess.run([*command, "--signal", OUT, "--since", "1h"], capture_output=True, timeout=HANG, check=True)
    assert counts(file) == {OUT: 1}


def test_the_number_of_merged_events_is_recorded(tmp_path: Path) -> None:
    recorder = CaptureRecorder(tmp_path / "f")
    at: dict[str, Any] = {"board": "b", "time": 1e9, "monotonic_ns": 10**9, "last_ns": 3 * 10**9}
    _write(recorder, Event("ignored", **at, signal="foo", reason="unknown", count=500), "b")
    _write(recorder, Event("problem", **at, message="/irq/x: cannot write", count=3), "b")
    recorder.close()
    assert [each.text for each in everything(tmp_path / "f") if isinstance(each, Mark)] == [
        "ignored: unknown signal foo (500 times within 2.0 s)",
        "/irq/x: cannot write (3 times within 2.0 s)",
    ]


def test_recording_ends_when_the_reader_of_its_pipe_has_gone(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    board.running()
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    running = start(tmp_path / "fifo", "--control", board.path)
    os.close(reader)
    _, err = running.process.communicate(timeout=HANG)
    assert running.process.returncode == 0
    assert err == f"inco-trio: 0 notifications in {tmp_path}/fifo\n"


def test_standard_output_is_recorded_until_its_reader_ends(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    peer = board.core1()
    board.running()
    running = start("-", "--control", board.path)
    board.inbound(peer)
    assert running.process.stdout is not None
    command = ["tshark", "-l", "-c", "1", "-r", "-", "-T", "fields", "-e", "eth.type"]
    with subprocess.Popen(command, stdin=running.process.stdout, stdout=subprocess.PIPE, text=True) as shark:
        running.process.stdout.close()
        out, _ = shark.communicate(timeout=HANG)
    assert "0x8800" in out
    assert running.process.wait(HANG) == 0
    done = subprocess.run([*PATIENT, "record", "-", "--size", "1M"], capture_output=True, text=True, check=False)
    said = "inco-trio: error: FILE -: standard output cannot be split (omit --size and --period)\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_the_history_can_be_plotted(board: Board, tmp_path: Path) -> None:
    peer = board.core1()
    run = tmp_path / "runtime/inco-trio"
    run.mkdir(parents=True)
    board.path = run / "core0.sock"
    board.running()
    board.trigger()
    peer.recv(2000)
    while board.status()["counters"]["sent"] < 1:
        pass
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(run.parent)}
    command = [*PATIENT, "plot", "--past", f"{board.home}/core0", "--json", "--out", str(tmp_path / "f.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(each["signal"], each["count"]) for each in json.loads(done.stdout)["signals"]] == [(OUT, 1)]
    assert (tmp_path / "f.svg").stat().st_size > 1000
    done = subprocess.run([*PATIENT, "plot"], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, "give either FILE or --past" in done.stderr) == (2, True)
    # If several proxies answer, the error suggests --control.
    command = [*PATIENT, "plot", "--control", str(board.path), "--json"]
    done = subprocess.run([*command, "--past"], capture_output=True, text=True, timeout=HANG, check=True)
    assert json.loads(done.stdout)["version"] == 1
    done = subprocess.run([*command, str(tmp_path / "f")], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("inco-trio: error: --control applies only to --past (add --past, or omit --control)\n")


def test_only_notifications_that_are_still_pending_are_plotted_as_pending(
    board: Board, start: Callable[..., Running], tmp_path: Path
) -> None:
    """The flight recorder merges equal `pending` events, even if the first ones have been delivered meanwhile."""
    many = 2 * RUNS
    peer = board.core1()
    board.running()
    recording = start(tmp_path / "live", "--control", board.path)
    state = board.irq / "message_5_state"
    with ExitStack() as stack:
        client = board.client()
        stack.callback(client.end)
        client.ask({"request": "monitor"})
        block(state)
        for _ in range(many):
            board.inbound(peer)
            client.until(event="pending")
        state.rmdir()
        for _ in range(many):
            client.until(event="notification")
        block(state)
        board.inbound(peer)
        client.until(event="pending")
    finish(recording)
    command = [*PATIENT, "record", str(tmp_path / "past"), "--control", str(board.path), "--past"]
    subprocess.run(command, capture_output=True, timeout=HANG, check=True)
    for name in ("live", "past"):
        command = [*PATIENT, "plot", str(tmp_path / name), "--json", "--out", str(tmp_path / "f.svg")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
        (flow,) = json.loads(done.stdout)["signals"]
        # Of half of them, the proxy has merged the times.
        late = flow["late"], flow["possibly_late"]
        assert (name, flow["count"], late, flow["pending"]) == (name, many, (RUNS, RUNS), 1)


def test_merged_pending_events_keep_the_time_of_the_last_one() -> None:
    """The wall clock was set forward by an hour between the two times, which the time of the last one must contain."""

    base = 10**18  # This is later than the beginning of the recording.

    def event(kind: str, seconds: float, step: float = 0.0, count: int = 1, last: float = 0.0) -> Event:
        last_ns = base + round(last * 10**9) if last else 0
        return Event(
            kind, "b", 1000 + seconds + step, base + round(seconds * 10**9), Direction.INBOUND, IN, reason="full",
            count=count, last_ns=last_ns,
        )  # fmt: skip

    delivered = event("notification", 3, 3600)
    merged = [event("pending", 1, count=4, last=5), delivered, event("ignored", 4, 3600, count=2, last=6)]
    expected = [event("pending", 1, count=3), *merged[1:], event("pending", 5, 3600)]
    assert list(separated(merged)) == expected
    gaps = Gaps()
    past = Past("b", "boot", tuple(merged))
    assert gaps.is_new(event("pending", 2))
    assert list(gaps.missing(past)) == [event("pending", 2, count=2), *expected[1:]]
    assert list(gaps.missing(past)) == []


def test_a_filled_gap_contains_each_pending_notification_once() -> None:
    def event(seconds: int, count: int = 0, last: int = 0, reason: str = "full") -> Event:
        start = 10**18
        at, last_ns = start + seconds * 10**9, last and start + last * 10**9
        return Event(
            "pending", "b", 1e9 + seconds, at, Direction.INBOUND, IN, reason=reason, count=count, last_ns=last_ns
        )

    def number(gaps: Gaps, *events: Event) -> int:
        missing = [each for each in gaps.missing(Past("b", "boot", events)) if each.event == "pending"]
        assert [each.monotonic_ns for each in missing] == sorted(each.monotonic_ns for each in missing)
        return sum(max(1, each.count) for each in missing)

    gaps, long = Gaps(), "a reason that is longer than a record of the flight recorder " * 4
    stored = truncated(long.encode()).decode()
    for second in range(10):
        assert gaps.is_new(event(second))
        assert gaps.is_new(event(second, reason=long))
    # The third of these began after the second had ended.
    assert number(gaps, event(0, 12, 20), event(0, 30, 29, stored), event(25, 3, 29)) == 2 + 20 + 3
    assert number(gaps, event(0, 12, 20), event(0, 30, 29, stored), event(25, 8, 39)) == 5
    assert gaps.is_new(event(40))
    assert number(gaps, event(25, 9, 40)) == 0
    # An unknown number of these became pending before the recording began.
    old = attrs.evolve(event(0, 50, 60), monotonic_ns=1)
    assert [(each.message, each.count) for each in gaps.missing(Past("b", "boot", (old,)))] == [
        (f"up to 28 earlier notifications of {IN} became pending: not recorded", 0), ("", 1),
    ]  # fmt: skip
    for second in range(61, 61 + 3 * TIMES):
        assert gaps.is_new(event(second))
    assert number(gaps, event(61 + 2 * TIMES, TIMES + 1, 61 + 3 * TIMES)) == 1
    assert number(gaps, event(61, 4 * TIMES, 61 + 3 * TIMES)) == 0


def test_a_filled_gap_is_not_older_than_the_recording() -> None:
    """The flight recorder merges recorded events with lost ones, and keeps the time of the first occurrence."""
    start = 10**18

    def event(kind: str, seconds: int, last: int = 0, **fields: Any) -> Event:
        at, last_ns = start + seconds * 10**9, last and start + last * 10**9
        return Event(kind, "b", 1e9 + seconds, at, Direction.INBOUND, IN, last_ns=last_ns, **fields)

    gaps = Gaps()
    for seconds in (1, 2):
        assert gaps.is_new(event("pending", seconds, reason="full"))
        assert gaps.is_new(event("ignored", seconds, reason="unknown"))
    for sequence in (1, 2, 3):
        assert gaps.is_new(event("notification", 2 + sequence, sequence=sequence))
    past = Past(
        "b", "boot",
        (
            event("pending", 1, 9, reason="full", count=5), event("ignored", 1, 10, reason="unknown", count=4),
            event("notification", 6, sequence=4, count=1),
        ),
    )  # fmt: skip
    found = [(each.event, each.monotonic_ns // 10**9 - 10**9, each.time - 1e9) for each in gaps.missing(past)]
    # `ignored` becomes a mark that contains the number of occurrences and the time between the first and the last one.
    assert found == [("ignored", 1, 1), ("pending", 5, 5), ("notification", 6, 6), ("pending", 9, 9)]


def test_a_board_that_is_first_seen_in_a_gap_keeps_its_events() -> None:
    gaps = Gaps()
    problem = Event("problem", "b", 1e9, time.monotonic_ns(), message="a problem")
    assert gaps.after("b") <= problem.monotonic_ns
    assert list(gaps.missing(Past("b", "boot", (problem,)))) == [problem]


def test_the_events_at_the_end_of_a_filled_gap_are_recorded_once(memory: memoryview) -> None:
    """The history that fills the gap also contains events that the monitor reports afterwards."""
    feed, recorder, monitor = Feed(NoProxies()), Recorder(memory), Monitor("b")
    events = Events(Counters(), History(memoryview(bytearray(HISTORY))), feed, recorder)
    gaps = Gaps()
    gaps.begin("b", recorder.status())

    async def main() -> None:
        feed.add(monitor)
        full = Signal(IN, Direction.INBOUND, Path("/irq"), "a")
        events.pending([full] * 3, "full", ())
        events.ignored("unknown", "a", None)
        events.link_changed(False, "the link went down", 1.0)
        with noted_by(events.note):
            report(logging.getLogger("inco_trio"), logging.WARNING, "a problem", "problem")
        feed.remove(monitor)
        past = Past("b", recorder.boot, tuple(past_events("b", recorder)))
        assert Counter(each.event for each in gaps.missing(past)) == {
            "pending": 2, "ignored": 1, "link": 1, "problem": 1
        }  # fmt: skip
        monitor.end()
        lines = (await monitor.take()).splitlines()
        assert len(lines) == 6
        for each in map(decode_reply, lines):
            assert isinstance(each, Event)
            assert not gaps.is_new(each), each

    trio.run(main)
