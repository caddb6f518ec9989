"""Tests of recordings: the writer produces valid pcapng, and the reader returns all complete packets."""

from __future__ import annotations

import io
import itertools
import os
import resource
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inco_trio.capture.pcapng import Reader, interface_block, packet_block, section_block
from inco_trio.capture.recording import Entry, Mark, Recorder, open_recording
from inco_trio.errors import PermissionDeniedError, RecordingError, ResourceError
from inco_trio.frame import encode
from inco_trio.signals import Direction, SignalTable, builtin_signals
from netns.hang import HANG
from tests.support_control import COMMAND

MAC = bytes.fromhex("02005e100001")
TABLE = SignalTable(builtin_signals(Path("/irq")))
NOW = 1_700_000_000_123_456_789
HEAD = section_block("x") + interface_block("rpmsg4000")


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    """Return the type and body of each block, and check the block lengths."""
    found = []
    while data:
        kind, length = struct.unpack_from("<II", data)
        assert length % 4 == 0
        assert 12 <= length <= len(data)
        assert struct.unpack_from("<I", data, length - 4) == (length,)
        found.append((kind, data[8 : length - 4]))
        data = data[length:]
    return found


def everything(path: Path, table: SignalTable = TABLE) -> list[Entry | Mark]:
    with open_recording(path, table) as recording:
        return list(recording)


def entries(path: Path, table: SignalTable = TABLE) -> list[Entry]:
    return [entry for entry in everything(path, table) if isinstance(entry, Entry)]


def append_many(recorder: Recorder) -> None:
    for _ in range(100):
        recorder.append(NOW, Direction.INBOUND, "a", "", encode(b"a", MAC), "rpmsg4000")


packets = st.lists(
    st.tuples(
        st.integers(0, 2**64 - 1), st.binary(max_size=200), st.sampled_from([None, *Direction]), st.text(max_size=20)
    ),
    max_size=5,
)


@given(packets)
def test_written_packets_are_read_back(made: list[tuple[int, bytes, Direction | None, str]]) -> None:
    data = HEAD + b"".join(packet_block(0, *one) for one in made)
    assert len(blocks(data)) == 2 + len(made)
    reader = Reader(io.BytesIO(data), "x")
    read = list(reader)
    assert reader.cut is None
    assert reader.application == "x"
    assert [(p.time_ns, p.data, p.direction) for p in read] == [one[:3] for one in made]
    for packet, one in zip(read, made, strict=True):
        assert packet.comment == one[3].encode("utf-8", "backslashreplace").decode().rstrip("\0")
        assert packet.interface.name == "rpmsg4000"


@given(st.binary(max_size=60), st.integers(0, 200))
def test_a_damaged_packet_does_not_raise(junk: bytes, at: int) -> None:
    data = HEAD + packet_block(0, NOW, b"abc", Direction.INBOUND, "c")
    list(Reader(io.BytesIO(data + junk), "x"))
    try:
        list(Reader(io.BytesIO(data[:at] + junk + data[at:]), "x"))
    except RecordingError:
        assert at < len(section_block("x"))


def test_a_truncated_file_is_read_up_to_the_last_complete_packet() -> None:
    data = HEAD + packet_block(0, 1, b"a", None)
    whole = data + packet_block(0, 2, b"b", None)
    for end in range(len(data) + 1, len(whole)):
        reader = Reader(io.BytesIO(whole[:end]), "x")
        assert [p.data for p in reader] == [b"a"]
        assert reader.cut == f"truncated after {end} bytes"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("magic", "fraction"), [(0xA1B2C3D4, 123_456), (0xA1B23C4D, 123_456_000)])
def test_classic_pcap_files_are_read(order: str, magic: int, fraction: int) -> None:
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    data = head + struct.pack(f"{order}IIII", 7, fraction, 3, 9) + b"abc"
    reader = Reader(io.BytesIO(data), "x")
    (packet,) = reader
    assert (packet.time_ns, packet.data, packet.length) == (7_123_456_000, b"abc", 9)
    reader = Reader(io.BytesIO(data[:-1]), "x")
    assert list(reader) == []
    assert reader.cut
    reader = Reader(io.BytesIO(head + struct.pack(f"{order}IIII", 7, 0, 2**30, 9)), "x")
    assert list(reader) == []
    assert "the packet length 1073741824 is not valid" in str(reader.cut)


def test_big_endian_files_and_other_time_resolutions_are_read() -> None:
    def block(kind: int, body: bytes) -> bytes:
        return struct.pack(">II", kind, len(body) + 12) + body + struct.pack(">I", len(body) + 12)

    resolution = struct.pack(">HHB3xHHq", 9, 1, 0x81, 14, 8, 100)
    data = block(0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1))
    data += block(1, struct.pack(">HHI", 1, 0, 0) + resolution) + block(5, bytes(8))
    data += block(6, struct.pack(">IIIII", 0, 0, 3, 1, 1) + b"a\0\0\0")
    # A second section resets the byte order and the interfaces.
    (one, two) = Reader(io.BytesIO(data + HEAD + packet_block(0, 5, b"b", None)), "x")
    assert (one.time_ns, one.data, two.time_ns) == (101_500_000_000, b"a", 5)


def test_packets_of_other_kinds_of_blocks_are_counted(tmp_path: Path) -> None:
    """A Simple Packet Block has no timestamp. Only old programs write the obsolete Packet Block."""
    frame = encode(b"ihub_reset_irq", MAC)
    padded = frame + bytes(-len(frame) % 4)
    bodies = {
        3: struct.pack("<I", len(frame)) + padded,
        2: struct.pack("<HHIIII", 0, 0, 0, 1, len(frame), len(frame)) + padded,
        5: bytes(12),
    }
    data = HEAD + packet_block(0, 1, frame, None)
    for kind, body in bodies.items():
        data += struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)
    (tmp_path / "f").write_bytes(data + packet_block(0, 2, frame, None))
    with open_recording(tmp_path / "f", TABLE) as recording:
        assert len(list(recording)) == 2
    assert recording.left_out == {
        "in a Simple Packet Block, which has no timestamp": 1,
        "in an obsolete Packet Block": 1,
    }


@pytest.mark.parametrize("content", [b"", b"abc", b"nonsense", section_block("x")[:20], b"\xd4\xc3\xb2\xa1\0"])
def test_other_files_are_not_a_recording(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(RecordingError, match="not a recording"):
        entries(tmp_path / "f")


def test_files_that_cannot_be_opened_are_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(RecordingError, match="not a regular file"):
            entries(path)
    with pytest.raises(RecordingError, match="No such file"):
        entries(tmp_path / "none")
    with pytest.raises(ResourceError, match="cannot be written"):
        Recorder(tmp_path)


def test_a_fifo_needs_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    # A blocking open(2) would wait for a reader, and signals would not end the wait.
    with pytest.raises(ResourceError, match="fifo: cannot be written: no process reads from it"):
        Recorder(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    recorder = Recorder(tmp_path / "fifo")
    recorder.append(NOW, Direction.INBOUND, "a", "", encode(b"a", MAC), "x")
    recorder.close()
    assert [kind for kind, _ in blocks(os.read(fd, 65536))] == [0x0A0D0D0A, 1, 1, 6]
    os.close(fd)


def test_missing_directions_are_inferred_from_table_and_mac(tmp_path: Path) -> None:
    other = bytes.fromhex("02005e100002")
    names = [(b"x", MAC), (b"ihub_reset_irq", MAC), (b"x", MAC), (b"redun_notify_irq", other), (b"y", other)]
    data = HEAD + b"".join(packet_block(0, 1, encode(n, mac), Direction.OUTBOUND) for n, mac in names)
    (tmp_path / "f").write_bytes(data + packet_block(0, 1, b"no frame of ours", None))
    inbound, outbound = Direction.INBOUND, Direction.OUTBOUND
    assert [e.direction for e in entries(tmp_path / "f")] == [None, inbound, inbound, outbound, outbound]


def test_recorder_writes_notifications_marks_and_ignored_frames(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    # The direction in the packet flags takes precedence over the signal table.
    recorder.append(NOW, Direction.OUTBOUND, "ihub_reset_irq", "/r", encode(b"ihub_reset_irq", MAC), "rpmsg4000")
    recorder.append(NOW + 1, Direction.INBOUND, "b", "/irq/ö", None, "rpmsg4000")
    recorder.mark(NOW + 2, "the link went down")
    recorder.ignored(NOW + 3, "malformed", b"no frame of ours", "rpmsg4001")
    recorder.close()
    recorder.close()
    with pytest.raises(ResourceError, match="is closed"):
        recorder.append(NOW, Direction.INBOUND, "b", "", None, "rpmsg4000")
    assert recorder.count == 2
    assert everything(tmp_path / "f") == [
        Entry(NOW, "ihub_reset_irq", Direction.OUTBOUND, board="rpmsg4000"),
        Entry(NOW + 1, "b", Direction.INBOUND, "/irq/ö", board="rpmsg4000"),
        Mark(NOW + 2, "the link went down"),
    ]
    assert [kind for kind, _ in blocks((tmp_path / "f").read_bytes())] == [0x0A0D0D0A, 1, 1, 6, 6, 6, 1, 6]


@pytest.mark.parametrize("limits", [{"size_max": 600}, {"seconds_max": 2.0}], ids=str)
def test_recorder_rotates_files_by_size_or_time(tmp_path: Path, limits: dict[str, float]) -> None:
    seconds = itertools.count()
    recorder = Recorder(tmp_path / "f.pcapng", keep=2, clock=lambda: next(seconds), **limits)  # type: ignore[arg-type]
    for number in range(20):
        recorder.append(NOW + number * 10**9, Direction.INBOUND, "a", "", encode(b"a", MAC), "rpmsg4000")
    recorder.close()
    assert recorder.count == 20
    assert recorder.path.name > "f_00003.pcapng"
    assert sorted(tmp_path.iterdir()) == recorder.written
    assert len(recorder.written) == 2
    last = [e.time_ns for path in recorder.written for e in entries(path)]
    assert last == [NOW + number * 10**9 for number in range(20 - len(last), 20)]


def test_a_second_recorder_of_one_file_is_refused(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "f")
    append_many(first)
    with pytest.raises(ResourceError, match="f: another process is recording to this file \\(use another file\\)"):
        Recorder(tmp_path / "f")
    append_many(first)
    first.close()
    assert len(entries(tmp_path / "f")) == 200
    Recorder(tmp_path / "f").close()
    assert entries(tmp_path / "f") == []


def test_a_restarted_recorder_keeps_the_files_of_the_previous_one(tmp_path: Path) -> None:
    others = ("f_1", "f_000009", "f_20261128", "g_00009")
    for other in (*(f"{name}.pcapng" for name in others), "f_00009.txt", "f_00009.pcapng.gz"):
        (tmp_path / other).touch()
    for number in range(1, 6):
        recorder = Recorder(tmp_path / "f.pcapng", size_max=10**6, keep=3)
        recorder.append(NOW + number, Direction.INBOUND, "a", "", None, "rpmsg4000")
        recorder.close()
        assert recorder.written == [tmp_path / f"f_{number:05}.pcapng"]
    files = sorted(tmp_path.glob("f_????[345].pcapng"))
    assert [each.time_ns - NOW for path in files for each in entries(path)] == [3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3 + len(others) + 2


def test_the_numbers_of_the_files_continue_beyond_five_digits(tmp_path: Path) -> None:
    (tmp_path / "f_99999").touch()
    for number in (100_000, 100_001):
        recorder = Recorder(tmp_path / "f", seconds_max=1000.0, keep=2)
        recorder.close()
        assert recorder.path == tmp_path / f"f_{number}"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "f_100000", tmp_path / "f_100001"]


def test_a_second_recorder_of_numbered_files_is_refused(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "f", size_max=10**6)
    with pytest.raises(ResourceError, match="f_00001: another process is recording to this file"):
        Recorder(tmp_path / "f", size_max=10**6)
    append_many(first)
    first.close()
    assert sorted(tmp_path.iterdir()) == first.written
    (tmp_path / "f_00002").symlink_to("gone")  # The recorder cannot check the lock of a file that it cannot open.
    second = Recorder(tmp_path / "f", size_max=10**6)
    second.close()
    assert second.written == [tmp_path / "f_00003"]


def test_restarts_on_a_full_disk_keep_the_earlier_files(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "f", size_max=10**6, keep=2)
    append_many(first)
    first.close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(ResourceError, match="f_00002: File too large: the recording ends after 0"):
                Recorder(tmp_path / "f", size_max=10**6, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(tmp_path.iterdir()) == first.written
    assert len(entries(first.path)) == first.count


def test_a_recorder_in_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be written"):
        Recorder(tmp_path / "gone" / "f", size_max=10**6)


def test_ignored_frames_are_marked_as_ignored(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.append(NOW, Direction.INBOUND, "a", "/irq/a", encode(b"a", MAC), "rpmsg4000")
    recorder.ignored(NOW, "ignored: unknown signal b", encode(b"b", MAC), "rpmsg4000")
    recorder.append(NOW, Direction.OUTBOUND, "c", "", None, "rpmsg4000")
    recorder.close()
    assert [(each.signal, each.ignored) for each in entries(tmp_path / "f")] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]


def test_a_frame_whose_comment_was_removed_is_not_ignored(tmp_path: Path) -> None:
    frame = encode(b"a", MAC)
    data = section_block("inco-trio") + interface_block("b1") + packet_block(0, 1, frame, Direction.OUTBOUND)
    (tmp_path / "f").write_bytes(data)
    assert entries(tmp_path / "f") == [Entry(1, "a", Direction.OUTBOUND, board="b1")]


def test_a_full_disk_leaves_a_valid_recording(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(tmp_path / "f")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ResourceError, match="File too large: the recording ends after"):
            append_many(recorder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < recorder.count == len(entries(tmp_path / "f"))
    assert len(blocks((tmp_path / "f").read_bytes())) == 3 + recorder.count


@pytest.mark.netns
def test_tshark_and_tcpdump_read_a_recording(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.append(NOW, Direction.OUTBOUND, "a", "/irq/a", encode(b"a", MAC), "rpmsg4000")
    recorder.append(NOW + 1, Direction.INBOUND, "b", "/irq/b", None, "rpmsg4000")
    recorder.close()
    tshark, tcpdump = shutil.which("tshark"), shutil.which("tcpdump")
    assert tshark
    assert tcpdump
    fields = ("frame.interface_name", "frame.packet_flags_direction", "frame.comment", "eth.type")
    said = subprocess.run(
        [tshark, "-r", tmp_path / "f", "-T", "fields", *(part for field in fields for part in ("-e", field))],
        capture_output=True, text=True, check=True, timeout=HANG,
    ).stdout  # fmt: skip
    assert [line.split("\t") for line in said.splitlines()] == [
        ["rpmsg4000", "0x00000002", "outbound a /irq/a", "0x8800"],
        ["registers", "0x00000001", "inbound b /irq/b", "0x88b5"],
    ]
    said = subprocess.run(
        [tcpdump, "-n", "-e", "-r", tmp_path / "f"], capture_output=True, text=True, check=True, timeout=HANG
    ).stdout
    assert len([line for line in said.splitlines() if "ethertype" in line]) == 2


def test_an_unreadable_file_is_a_permission_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionDeniedError, match="cannot be read"):
        entries(tmp_path / "f")


def test_times_do_not_depend_on_a_wall_clock_that_is_set(tmp_path: Path) -> None:
    """Packets carry wall-clock time, and marks record by how much the clock was changed."""
    second, start = 10**9, 5 * 10**9
    steps = (0, 0, 86_400 * second, 86_400 * second, -3600 * second)
    recorder = Recorder(tmp_path / "f")
    for number, step in enumerate(steps):
        recorder.follow_clock(NOW + number * second + step, start + number * second)
        recorder.append(NOW + number * second + step, Direction.INBOUND, "a", "", None, "x")
    recorder.close()
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        found = list(recording)
    assert [each.time_ns - NOW for each in found if isinstance(each, Entry)] == [n * second for n in range(5)]
    assert [(each.time_ns - NOW, each.text) for each in found if isinstance(each, Mark)] == [
        (2 * second, "the wall clock was set forward by 86400.0 s"),
        (4 * second, "the wall clock was set back by 90000.0 s"),
    ]
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        packets = [packet.time_ns for packet in recording.reader if b"signal" in packet.data]
    assert packets == [NOW + number * second + step for number, step in enumerate(steps)]


def test_times_that_go_back_without_a_mark_are_marked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    for seconds in (100, 101, 50, 51, 50.5):
        recorder.append(round(seconds * 10**9), Direction.INBOUND, "a", "", None, "x")
    recorder.close()
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        found = list(recording)
    assert [each.time_ns / 1e9 for each in found if isinstance(each, Entry)] == [100, 101, 101, 102, 101.5]
    assert [each.text for each in found if isinstance(each, Mark)] == ["the packet timestamps go back by 51.0 s"]


def test_a_board_may_add_entries_that_are_older_than_those_of_other_boards(tmp_path: Path) -> None:
    """`record` adds the history of a board that opens late after a restart."""
    recorder = Recorder(tmp_path / "f")
    added = [(100, "x"), (110, "x"), (101, "y"), (102, "y"), (111, "x")]
    for seconds, board in added:
        recorder.append(seconds * 10**9, Direction.INBOUND, "a", "", None, board)
    recorder.mark(103 * 10**9, "y was filled in")
    recorder.close()
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        assert [each.time_ns // 10**9 for each in recording] == [*(seconds for seconds, _ in added), 103]


@pytest.mark.parametrize("key", ["delay", "delay_max"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e300, 1e10])
def test_an_entry_with_an_impossible_delay_is_left_out(tmp_path: Path, key: str, value: float) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.append(NOW, Direction.INBOUND, "a", "", None, "x", **{key: value})  # type: ignore[arg-type]
    recorder.append(NOW, Direction.INBOUND, "b", "", None, "x")
    recorder.close()
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        assert [each.signal for each in recording if isinstance(each, Entry)] == ["b"]
        assert recording.left_out


@pytest.mark.parametrize("seconds", ["9" * 400, "1" * 10])
def test_an_impossible_delay_in_a_comment_is_ignored(tmp_path: Path, seconds: str) -> None:
    block = packet_block(0, NOW, encode(b"a", MAC), Direction.INBOUND, f"inbound a /irq/a [after {seconds}.0 s]")
    (tmp_path / "f").write_bytes(section_block("inco-trio") + interface_block("x") + block)
    assert [(entry.signal, entry.delay) for entry in entries(tmp_path / "f")] == [("a", 0)]


@pytest.mark.parametrize("step_ns", [10**400, -(10**400), 2**64])
def test_an_impossible_step_of_the_clock_is_ignored(tmp_path: Path, step_ns: int) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.append(NOW, Direction.INBOUND, "a", "", None, "x")
    recorder.mark(NOW, "the clock was set", step_ns)
    recorder.append(NOW, Direction.INBOUND, "a", "", None, "x")
    recorder.close()
    assert [each.time_ns for each in everything(tmp_path / "f")] == [NOW] * 3


def test_a_comment_without_an_end_takes_little_time(tmp_path: Path) -> None:
    comment = "inbound a" + " [pending: " * 5900
    block = packet_block(0, NOW, encode(b"a", MAC), Direction.INBOUND, comment)
    (tmp_path / "f").write_bytes(section_block("inco-trio") + interface_block("x") + 200 * block)
    # The command takes less than a second of CPU time. With quadratic time, it would take 10 minutes.
    command = ["sh", "-c", 'ulimit -t 60; exec "$@"', "sh", *COMMAND, "plot", str(tmp_path / "f"), "--json"]
    done = subprocess.run(command, capture_output=True, timeout=HANG, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_number_too_large_for_one_packet_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.capture.recording.COUNT_MAX", 10)
    recorder = Recorder(tmp_path / "f")
    recorder.append(NOW, Direction.INBOUND, "a", "", None, "x", pending="full", count=21)
    recorder.append(NOW + 1, Direction.INBOUND, "a", "", None, "x", delay_max=1.0, count=21)
    recorder.close()
    with open_recording(tmp_path / "f", SignalTable([])) as recording:
        found = [(entry.pending, entry.delay_max) for entry in recording if isinstance(entry, Entry)]
        assert (found, recording.reader.cut) == ([("full", 0)] * 21 + [("", 1)] * 21, None)
        assert not recording.left_out
