"""Tests of `inco-trio replay`, which replays a recording to a real proxy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from inco_trio.capture.pcapng import interface_block, packet_block, section_block
from inco_trio.capture.recording import Entry, Mark, Recorder, open_recording
from inco_trio.cli.signalling import left_out
from inco_trio.frame import encode
from inco_trio.signals import Direction, SignalTable
from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import Consumer, Proxy, StartProxy
from netns.hang import HANG
from tests.support_proxy import trigger

pytestmark = pytest.mark.tools

MAC = bytes.fromhex("02005e100001")
IN, OUT = "ihub_reset_irq", "redun_notify_irq"
COUNT = 20

Watch = Callable[[Path], Consumer]


class Here:
    """A stand-in for `Namespace` that runs everything in the current namespace."""

    def run(self, start: Callable[[], Any]) -> Any:
        return start()


def record(path: Path, *names: str, apart_ns: int = 0) -> Path:
    recorder = Recorder(path)
    for number, name in enumerate(names):
        direction = Direction.OUTBOUND if name == OUT else Direction.INBOUND
        recorder.append(number * apart_ns, direction, name, "", encode(name.encode(), MAC), "rpmsg4000")
    recorder.close()
    return path


def replay(*arguments: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "inco_trio", "replay", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "UDRV_JSON_PATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("pace", [("--fast",), ("--speed", "10"), ()], ids=str)
def test_a_replay_as_core1_over_a_socket(tmp_path: Path, watch: Watch, pace: tuple[str, ...]) -> None:
    path = record(tmp_path / "f", *[IN] * COUNT, apart_ns=10**6)
    link = f"unix:{tmp_path}/0,peer={tmp_path}/1", f"unix:{tmp_path}/1,peer={tmp_path}/0"
    proxy = Proxy(None, [link[0], "--irq-dir", str(tmp_path / "irq")], {}, tmp_path / "log")
    try:
        proxy.wait_ready()
        state = watch(tmp_path / "irq/message_4_state")
        assert replay(path, link[1], *pace, "--wait", "0.1") == (0, f"{IN}: {COUNT} sent\n", "")
        state.wait(COUNT)
    finally:
        proxy.close()


def test_a_burst_over_a_socket_loses_nothing(tmp_path: Path, watch: Watch) -> None:
    path = record(tmp_path / "f", *[IN] * 5000, OUT)
    link = f"unix:{tmp_path}/0,peer={tmp_path}/1", f"unix:{tmp_path}/1,peer={tmp_path}/0"
    proxy = Proxy(None, [link[0], "--irq-dir", str(tmp_path / "irq")], {}, tmp_path / "log")
    try:
        proxy.wait_ready()
        state = watch(tmp_path / "irq/message_4_state")
        code, out, _ = replay(path, link[1], "--fast", "--wait", "0.1", "--json")
        state.wait(5000)
    finally:
        proxy.close()
    result = json.loads(out)
    assert (code, result["sent"], result["missing"]) == (1, {IN: 5000}, {OUT: 1})


@pytest.mark.netns
def test_a_tcpdump_capture_replays_the_same_frames(
    proxy: StartProxy, cores: Cores, core1: Peer, irq_dir: Path, watch: Watch, tmp_path: Path
) -> None:
    proxy("--irq-dir", irq_dir)
    state = watch(irq_dir / "message_4_state")
    path = tmp_path / "f"
    command = [
        "tcpdump",
        "-i",
        cores.link,
        "-n",
        "--immediate-mode",
        "-Z",
        "root",
        "-c",
        str(2 * COUNT),
        "-w",
        str(path),
        "ether proto 0x8800",
    ]
    start = functools.partial(subprocess.Popen[str], command, stderr=subprocess.PIPE, text=True)
    with cores.core1.run(start) as tcpdump:
        try:
            assert tcpdump.stderr is not None
            assert any("listening on" in line for line in iter(tcpdump.stderr.readline, ""))
            for _ in range(COUNT):
                core1.send(IN.encode())
                trigger(irq_dir / "message_6_trig")
                core1.receive(HANG)
            state.wait(COUNT)
            tcpdump.communicate(timeout=HANG)
        finally:
            tcpdump.kill()

    # As core 1, `replay` cannot write triggers, so it reports that all outbound notifications are missing.
    code, out, err = cores.core1.run(functools.partial(replay, path, cores.link, "--wait", "0.1"))
    assert (code, err) == (1, "")
    assert out == f"{IN}: {COUNT} sent\n{OUT}: 0 of {COUNT} came back, {COUNT} missing\n"
    state.wait(2 * COUNT)
    code, out, err = replay(path, "--irq-dir", irq_dir, "--wait", "0.1")
    assert out == f"{OUT}: {COUNT} sent\n{IN}: 0 of {COUNT} came back, {COUNT} missing\n"
    for _ in range(COUNT):
        core1.receive(HANG)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("none", "none0"), 65, "none: cannot be read: No such file or directory"),
        (("empty", "none0"), 65, "empty: not a recording: empty"),
        pytest.param(("f", "none0"), 69, "none0: no such interface (available: ", marks=pytest.mark.netns),
        (
            ("f", "unix:HOME/1,peer=HOME/0"),
            69,
            "HOME/1: the link accepts no frames: no process has bound HOME/0 (No such",
        ),
        (("f", "--irq-dir", "HOME/irq"), 69, "HOME/irq: missing: the proxy creates it (is a proxy running?)"),
        (("f", "--as", "core1"), 2, "--as core1 requires LINK, which carries the frames"),
        (
            ("f", "x", "--as", "core0"),
            2,
            "--as core0 writes trigger files and does not use LINK: give --irq-dir or --config",
        ),
        (("f", "x", "--fast", "--speed", "2"), 2, "--fast and --speed are mutually exclusive"),
        (("f", "x", "--speed", "0"), 2, "argument --speed: '0': expected a number above 0"),
        (("f", "x", "--wait", "nan"), 2, "argument --wait: 'nan': expected a duration, 0 or more"),
        (("f", "--irq-dir", "a", "--config", "b"), 2, "--irq-dir and --config are mutually exclusive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_invalid_recording_is_an_error(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    record(tmp_path / "f", IN)
    (tmp_path / "empty").touch()
    home = str(tmp_path)
    words = [f"{home}/{arguments[0]}", *(word.replace("HOME", home) for word in arguments[1:])]
    ended, out, err = replay(*words)
    assert (ended, out) == (code, "")
    assert len(err.splitlines()) == 1 or err.startswith("usage: inco-trio replay")
    assert said.replace("HOME", home) in err


def test_truncated_recordings_and_unknown_signals_are_reported(tmp_path: Path) -> None:
    path = record(tmp_path / "f", IN, "other", OUT, IN)
    path.write_bytes(path.read_bytes()[:-3])
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    code, out, err = replay(path, "--irq-dir", irq, "--wait", "0")
    assert (code, err) == (1, "")
    assert out == (
        f"{OUT}: 1 sent\n{IN}: 0 of 1 came back, 1 missing\nother: 1 left out: not in the signal table\n"
        f"note: {path}: truncated after {path.stat().st_size} bytes: the packets before this position were played\n"
    )
    assert (irq / "message_6_trig").read_text() == "1"


@pytest.mark.netns
def test_a_replay_without_permission_for_the_link_is_an_error(tmp_path: Path, nobody: list[str]) -> None:
    path = record(tmp_path / "f", IN)
    with path.open("rb") as file:
        # The other user cannot open the file by its path, so pass an open descriptor.
        path.chmod(0o644)
        command = [*nobody, sys.executable, "-m", "inco_trio", "replay", f"/proc/self/fd/{file.fileno()}", "lo"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=HANG, pass_fds=[file.fileno()]
        )
    assert (done.returncode, done.stdout) == (77, "")
    assert "lo: opening a packet socket needs CAP_NET_RAW" in done.stderr


def test_progress_fits_into_20_columns(tmp_path: Path) -> None:
    path = record(tmp_path / "f", OUT, OUT, apart_ns=1_200_000_000)
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (5, 20))
        # Show the progress at once: the program may not run between the default delay and the second notification.
        code = "import sys, inco_trio.cli.replay as replay; replay.SLOW = 0.0; from inco_trio.cli import main"
        command = [sys.executable, "-c", f"{code}; sys.exit(main())", "replay", str(path), "--irq-dir", str(irq)]
        command += ["--wait", "0"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=False, timeout=HANG)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stdout) == (0, f"{OUT}: 2 sent\n")
    assert "%, 1 sent" in shown
    assert max(map(len, shown.split("\r"))) < 20


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("side", ["core0", "core1"])
def test_a_notification_that_was_pending_is_played_once(tmp_path: Path, side: str, exact: bool) -> None:
    """The recording contains the notification twice: first as pending, and later as delivered or sent."""
    recorder = Recorder(tmp_path / "f")
    recorder.append(1, Direction.INBOUND, IN, "", encode(IN.encode(), MAC), "x", pending="cannot write: Is a directory")
    recorder.append(2, Direction.OUTBOUND, OUT, "", None, "x", pending="Network is down")
    delay, delay_max = (1e-9, 0.0) if exact else (0.0, 1e-9)
    frame = encode(OUT.encode(), MAC)
    recorder.append(3, Direction.INBOUND, IN, "", None, "x", delay=delay, delay_max=delay_max)
    recorder.append(4, Direction.OUTBOUND, OUT, "", frame, "x", delay=delay, delay_max=delay_max)
    recorder.close()
    played, expected = (IN, OUT) if side == "core1" else (OUT, IN)
    irq = tmp_path / "irq"
    proxy = Proxy(None, [f"unix:{tmp_path}/0,peer={tmp_path}/1", "--irq-dir", str(irq)], {}, tmp_path / "log")
    with contextlib.closing(proxy):
        proxy.wait_ready()
        where = [f"unix:{tmp_path}/1,peer={tmp_path}/0"] if side == "core1" else ["--irq-dir", irq]
        code, out, _ = replay(tmp_path / "f", *where, "--wait", "0.1")
    assert (code, out) == (1, f"{played}: 1 sent\n{expected}: 0 of 1 came back, 1 missing\n")


def test_notifications_that_became_pending_before_the_recording_are_played(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.append(1, Direction.OUTBOUND, OUT, "", None, "x", pending="Network is down")
    recorder.append(2, Direction.OUTBOUND, OUT, "", None, "y", delay=5.0)  # Another board.
    for delay in (4.0, 1e-9):  # The first one became pending before the recording began.
        recorder.append(3, Direction.OUTBOUND, OUT, "", None, "x", delay=delay)
    recorder.close()
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    code, out, _ = replay(tmp_path / "f", "--irq-dir", irq, "--wait", "0")
    assert (code, out.splitlines()[0]) == (0, f"{OUT}: 3 sent")


def entries(path: Path) -> list[Entry | Mark]:
    with open_recording(path, SignalTable(())) as recording:
        return list(recording)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Return a recording with every kind of entry."""
    recorder = Recorder(tmp_path / "mixed.pcapng")
    recorder.append(10**9, Direction.INBOUND, "a_irq", "/irq/a", encode(b"a_irq", MAC), "l0")
    recorder.append(2 * 10**9, Direction.OUTBOUND, "b_irq", "/irq/b", None, "l0")
    recorder.mark(3 * 10**9, "the link went down")
    recorder.append(4 * 10**9, Direction.INBOUND, "a_irq", "/irq/a", encode(b"a_irq", MAC), "l0", pending="no room")
    recorder.ignored(5 * 10**9, "ignored: unknown signal c_irq", encode(b"c_irq", MAC), "l0")
    recorder.close()
    return recorder.path


@pytest.mark.parametrize(
    "command", ["mergecap -w OUT IN", "mergecap -a -w OUT IN", "editcap IN OUT", "tshark -r IN -w OUT"]
)
def test_recordings_are_recognized_after_other_programs_rewrote_them(mixed: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out.pcapng"
    words = [{"IN": str(mixed), "OUT": str(out)}.get(word, word) for word in command.split()]
    subprocess.run(words, check=True, timeout=HANG, stderr=subprocess.DEVNULL)
    assert entries(out) == entries(mixed)
    assert [type(entry).__name__ for entry in entries(out)] == ["Entry", "Entry", "Mark", "Entry", "Entry"]


def test_a_classic_pcap_of_a_recording_keeps_directions_and_marks(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pcap"
    subprocess.run(["editcap", "-F", "nsecpcap", str(mixed), str(out)], check=True, timeout=HANG)
    kept = [entry for entry in entries(out) if isinstance(entry, Mark) or entry.signal == "b_irq"]
    first, mark = entries(mixed)[1:3]
    assert isinstance(first, Entry)
    assert kept == [attrs.evolve(first, board=""), mark]


@pytest.mark.parametrize("command", ["editcap -F nsecpcap IN OUT", "tcpdump -Z root -r IN -w OUT"])
def test_frames_without_the_comments_of_a_recording_are_counted(mixed: Path, tmp_path: Path, command: str) -> None:
    """Without the comments, a notification that was pending looks like one that was delivered."""
    for words, number in ((["cp", str(mixed), str(tmp_path / "out")], 0), (command.split(), 3)):
        words = [{"IN": str(mixed), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
        subprocess.run(words, check=True, timeout=HANG)
        with open_recording(tmp_path / "out", SignalTable(())) as recording:
            list(recording)
            notes = left_out(recording)
        assert [note.partition(" ")[0] for note in notes] == [str(number)] * bool(number)
        assert all(" frames without a comment of inco-trio: another program" in note for note in notes)


def test_a_replay_reads_standard_input(mixed: Path, tmp_path: Path) -> None:
    irq = tmp_path / "irq"
    irq.mkdir()
    for name in ("message_6_trig", "message_4_state", "message_5_state"):
        (irq / name).touch()
    path = record(tmp_path / "f", OUT)
    command = [sys.executable, "-m", "inco_trio", "replay", "-", "--irq-dir", str(irq), "--wait", "0"]
    done = subprocess.run(command, input=path.read_bytes(), capture_output=True, check=False, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{OUT}: 1 sent\n".encode(), b"")
    done = subprocess.run(command, input=b"", capture_output=True, check=False, timeout=HANG)
    assert (done.returncode, done.stderr) == (65, b"inco-trio: error: standard input: not a recording: empty\n")


def test_a_replay_that_plays_nothing_fails(mixed: Path, tmp_path: Path) -> None:
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    code, out, err = replay(mixed, "--irq-dir", irq, "--wait", "0", "--json")
    assert (code, json.loads(out)["sent"]) == (65, {})
    assert (
        err == f"inco-trio: error: {mixed}: nothing was played: the file contains no notifications that core0 sends\n"
    )


def test_a_replay_of_several_boards_is_noted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    for board in ("b2", "b1"):
        recorder.append(1, Direction.OUTBOUND, OUT, "", encode(OUT.encode(), MAC), board)
    recorder.close()
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    code, out, _ = replay(tmp_path / "f", "--irq-dir", irq, "--wait", "0", "--fast")
    hint = "all were played together (`record --board NAME` records only one)"
    note = f"note: {tmp_path}/f: contains 2 boards, b1, b2: {hint}"
    assert (code, out) == (0, f"{OUT}: 2 sent\n{note}\n")


def test_a_replay_of_several_interfaces_that_another_program_captured_is_noted(tmp_path: Path) -> None:
    """`record --board` cannot record only one of them."""
    path = tmp_path / "f"
    blocks = [section_block("other"), interface_block("l0"), interface_block("l1")]
    path.write_bytes(b"".join([*blocks, *(packet_block(each, 1, encode(OUT.encode(), MAC), None) for each in (0, 1))]))
    irq = tmp_path / "irq"
    irq.mkdir()
    (irq / "message_6_trig").touch()
    code, out, _ = replay(path, "--irq-dir", irq, "--wait", "0", "--fast")
    note = f"note: {path}: contains 2 interfaces, l0, l1: all were played together (capture only one)"
    assert (code, out) == (0, f"{OUT}: 2 sent\n{note}\n")


def test_packets_that_a_replay_leaves_out_are_counted_by_reason(tmp_path: Path) -> None:
    path, frame = tmp_path / "f", encode(IN.encode(), MAC)
    packets = [
        *[frame] * 2,
        *[frame[:12] + b"\x08\x00" + frame[14:]] * 3,
        frame[:14] + b"a name with spaces",
        bytes(12) + b"\x88\xb5{",
    ]
    blocks = [section_block("other"), interface_block("l0")]
    blocks += [packet_block(0, number, packet, None) for number, packet in enumerate(packets)]
    short = bytearray(packet_block(0, 9, frame, None))
    short[24:28] = (100).to_bytes(4, "little")  # The original length: the capture kept only the start of the packet.
    other = bytearray(interface_block("can0"))
    other[8] = 227  # The link type is LINKTYPE_CAN_SOCKETCAN.
    path.write_bytes(b"".join([*blocks, short, other, packet_block(1, 10, frame, None)]))
    link = f"unix:{tmp_path}/1,peer={tmp_path}/0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as core0:
        core0.bind(f"{tmp_path}/0")
        code, out, _ = replay(path, link, "--wait", "0")
        notes = [line for line in out.splitlines() if line.startswith("note: ")]
        _, out, _ = replay(path, link, "--wait", "0", "--json")
    assert (code, notes) == (
        0,
        [
            "note: 1 packet left out: on an interface that is not Ethernet",
            "note: 1 packet left out: truncated by the capture",
            "note: 1 packet left out: with a damaged note of inco-trio",
            "note: 3 packets left out: with another EtherType than 0x8800",
            "note: 1 packet left out: without a valid wire name",
        ],
    )
    assert sum(json.loads(out)["left_out"].values()) == 7
