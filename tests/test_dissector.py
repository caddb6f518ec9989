"""Tests of `inco-trio dissector` with tshark."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest

from inco_trio.capture.pcapng import ETHERNET, interface_block, packet_block, section_block
from inco_trio.capture.recording import Recorder
from inco_trio.frame import FRAME_MAX, HEADER_LENGTH, encode
from inco_trio.signals import Direction
from netns.hang import HANG
from tests.support_control import COMMAND, MAC

LUA = files("inco_trio.capture") / "inco_trio.lua"
ETHERTYPE = b"\x88\x00"
HEAD = b"\xff" * 6 + MAC


def dissector(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")}
    command = [*COMMAND, "dissector", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, env=environment)


def tshark(home: Path, file: Path, *fields: str, limit: Sequence[str] = ()) -> list[list[str]]:
    """Return the fields of each frame in a file, decoded by the dissector that is installed in `home`.

    Lua errors in the dissector appear in the packet tree of the frame; tshark does not print them on stderr.
    """
    command = [*limit, "tshark", "-r", str(file), "-T", "fields", "-E", "occurrence=l", "-e", "_ws.lua.error"]
    done = subprocess.run(
        [*command, *(word for field in fields for word in ("-e", field))],
        capture_output=True, timeout=HANG, check=True, env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    said = done.stderr.decode()
    assert "lua" not in said.lower(), said
    rows = [line.split("\t") for line in done.stdout.decode(errors="replace").split("\n")[:-1]]
    failed = [number for number, row in enumerate(rows, 1) if row[0]]
    assert not failed, f"the dissector fails at the frames {failed}"
    return [row[1:] for row in rows]


def test_the_command_prints_the_dissector(tmp_path: Path) -> None:
    done = dissector(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, LUA.read_text(), "")


@pytest.mark.tools
def test_the_dissector_is_installed_where_tshark_searches(tmp_path: Path) -> None:
    done = dissector(tmp_path, "--install")
    path = tmp_path / ".local/lib/wireshark/plugins/inco_trio.lua"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: installed\n", "")
    assert path.read_text() == LUA.read_text()
    assert dissector(tmp_path, "--install").stdout == f"{path}: already installed\n"
    path.write_text("older")
    assert dissector(tmp_path, "--install").stdout == f"{path}: replaced\n"
    assert path.read_text() == LUA.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["inco_trio.lua"]


@pytest.mark.tools
def test_the_home_directory_may_contain_any_bytes(tmp_path: Path) -> None:
    home = tmp_path / os.fsdecode(b"h\xff")
    home.mkdir()
    done = dissector(home, "--install")
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / ".local/lib/wireshark/plugins/inco_trio.lua").read_text() == LUA.read_text()


@pytest.mark.parametrize("obstacle", ["file", "directory"])
def test_an_unwritable_directory_is_an_error(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / ".local/lib/wireshark/plugins"
    if obstacle == "file":
        path.parent.mkdir(parents=True)
        path.write_text("")
    else:
        (path / "inco_trio.lua").mkdir(parents=True)
    done = dissector(tmp_path, "--install")
    assert (done.returncode, done.stdout) == (71, "")
    assert done.stderr.startswith(f"inco-trio: error: {path}/inco_trio.lua: cannot be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.netns  # Changing owners needs root.
def test_no_symlink_of_another_user_leads_elsewhere(tmp_path: Path) -> None:
    """As for root with the HOME of another user."""
    link, victim = tmp_path / ".local", tmp_path / "victim"
    victim.mkdir()
    link.symlink_to(victim)
    os.lchown(link, 12345, 12345)
    done = dissector(tmp_path, "--install")
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.endswith(f": {link} is a symlink that another user owns\n")
    assert list(victim.iterdir()) == []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert dissector(tmp_path, "--install").returncode == 0
    return tmp_path


@pytest.mark.tools
def test_signals_of_a_recording_are_named(home: Path) -> None:
    name = b"ihub_hwwd_irq"
    frame = encode(name, MAC)
    recorder = Recorder(home / "f")
    recorder.append(1, Direction.INBOUND, name.decode(), "/irq/ö x", frame.ljust(60, b"\0"), "rpmsg4000")
    recorder.append(2, Direction.OUTBOUND, "b", '/irq/"\\ü😀\n', None, "rpmsg4000")
    recorder.mark(3, "the link went down")
    recorder.append(4, Direction.OUTBOUND, name.decode(), "/t", frame[:12] + b"\x81\0\0\1" + frame[12:], "rpmsg4000")
    recorder.close()
    fields = ("inco.signal", "inco.direction", "inco.register", "inco.mark", "_ws.col.Protocol", "_ws.col.Info")
    assert tshark(home, home / "f", *fields) == [
        ["ihub_hwwd_irq", "inbound", "/irq/ö x", "", "inco", "core 1 > core 0  ihub_hwwd_irq"],
        ["b", "outbound", '/irq/"\\ü😀\\n', "", "inco", "core 0 > core 1  b (without a frame)"],
        ["", "", "", "the link went down", "inco", "the link went down"],
        ["ihub_hwwd_irq", "outbound", "/t", "", "inco", "core 0 > core 1  ihub_hwwd_irq"],
    ]


@pytest.mark.tools
def test_foreign_frames_are_decoded_like_in_the_proxy(home: Path) -> None:
    payloads = {
        b"a": "a",
        b"a\0\0": "a",
        b"~" * 64: "~" * 64,
        b"~" * 65: "",
        b"": "",
        b"\0" * 46: "",
        b"two words": "",
        b"a\0b": "",
        "ö".encode(): "",
        b"x" * 1500: "",
        b"a".ljust(FRAME_MAX - HEADER_LENGTH, b"\0"): "a",
        b"a".ljust(FRAME_MAX - HEADER_LENGTH + 1, b"\0"): "",
    }
    recorder = Recorder(home / "f")
    for payload in payloads:
        recorder.ignored(1, "", HEAD + ETHERTYPE + payload, "rpmsg4000")
    # Any program may use EtherType 0x88b5, which is reserved for local experiments.
    recorder.ignored(1, "", HEAD + b"\x88\xb5" + b'{"signal": "a"}', "rpmsg4000")
    recorder.close()
    shown = tshark(home, home / "f", "inco.signal", "_ws.expert.message", "_ws.col.Protocol")
    assert [row[0] for row in shown] == [*payloads.values(), ""]
    assert [row[1] == "No wire name" for row in shown] == [not name for name in payloads.values()] + [False]
    assert [row[2] for row in shown[:-1]] == ["inco"] * len(payloads)


@pytest.mark.tools
def test_truncated_frames_are_not_named(home: Path) -> None:
    frame = encode(b"ihub_hwwd_irq", MAC)
    header = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 20, ETHERNET)
    (home / "f").write_bytes(header + struct.pack("<IIII", 1, 0, 20, len(frame)) + frame[:20])
    assert tshark(home, home / "f", "inco.signal", "_ws.expert.message", "_ws.col.Protocol") == [
        ["", "Truncated capture", "inco"]
    ]


@pytest.mark.tools
def test_only_valid_comments_of_recordings_are_used(home: Path) -> None:
    """The comment that records a signal without a frame must contain a wire name and a direction."""
    told: list[tuple[dict[str, str], tuple[str, str, str]]] = [
        ({"signal": "a", "direction": "inbound", "register": "r"}, ("a", "inbound", "r")),
        ({"signal": "a", "direction": "sideways", "register": "r"}, ("a", "", "r")),
        ({"signal": "two words", "direction": "inbound", "register": "r"}, ("", "", "")),
        ({"signal": "", "direction": "inbound", "register": "r"}, ("", "", "")),
        ({"signal": "a\0b", "direction": "inbound", "register": "r"}, ("", "", "")),
        ({"signal": "~" * 65, "direction": "inbound", "register": "r"}, ("", "", "")),
    ]
    recorder = Recorder(home / "f")
    for each, _ in told:
        recorder.ignored(1, "", bytes(12) + b"\x88\xb5" + json.dumps(each).encode(), "rpmsg4000")
    recorder.close()
    shown = tshark(home, home / "f", "inco.signal", "inco.direction", "inco.register", "_ws.expert.message")
    assert [tuple(row[:3]) for row in shown] == [fields for _, fields in told]
    assert [row[3] for row in shown] == ["", "", *["No wire name"] * 4]


@pytest.mark.tools
def test_random_frames_do_not_make_the_dissector_fail(home: Path) -> None:
    """Decode random frames of both EtherTypes, and valid frames with random changes, from a fixed seed."""
    chance = random.Random(1)  # noqa: S311 - test data
    recorder = Recorder(home / "whole")
    recorder.append(1, Direction.INBOUND, "b", '/irq/"\\ü😀', None, "rpmsg4000")
    recorder.close()
    whole = (home / "whole").read_bytes()
    ours = whole[whole.index(b"\x88\xb5") :].partition(b"\n")[0]
    recorder = Recorder(home / "f")
    for number in range(3000):
        data = bytearray(chance.choice([ours, ETHERTYPE + b"name", ETHERTYPE]) + chance.randbytes(number % 7))
        for _ in range(chance.randrange(4)):
            data[2 + chance.randrange(len(data) - 2) if len(data) > 2 else 0] = chance.choice(b'"\\u\0:{}\xff')
        recorder.ignored(1, chance.choice(["", "inbound b", "outbound name /x"]), bytes(12) + bytes(data), "rpmsg4000")
    recorder.close()
    assert len(tshark(home, home / "f", "frame.number", "inco.signal")) == 3000


@pytest.mark.tools
def test_a_comment_without_an_end_takes_little_time(home: Path) -> None:
    comment = "inbound a /irq/a" + " [pending: " * 5900
    block = packet_block(0, 1, encode(b"a", MAC), Direction.INBOUND, comment)
    (home / "f").write_bytes(section_block("inco-trio") + interface_block("x") + 20 * block)
    # tshark takes about 2 s of CPU time. With quadratic time, it would take 5 minutes.
    assert (
        tshark(home, home / "f", "inco.register", limit=("sh", "-c", 'ulimit -t 60; exec "$@"', "sh"))
        == [[comment[10:]]] * 20
    )


@pytest.mark.tools
def test_pending_notifications_are_distinguished(home: Path) -> None:
    frame = encode(b"a", MAC)
    recorder = Recorder(home / "f")
    recorder.append(1, Direction.INBOUND, "a", "/irq/a", frame, "rpmsg4000", pending="cannot write: Is a directory")
    recorder.append(2, Direction.INBOUND, "a", "/irq/a", None, "rpmsg4000", delay=1.5)
    recorder.append(3, Direction.OUTBOUND, "b", "/irq/b", None, "rpmsg4000", pending="Network is down")
    recorder.append(4, Direction.OUTBOUND, "b", "/irq/b", encode(b"b", MAC), "rpmsg4000", delay=0.25)
    recorder.append(5, Direction.INBOUND, "a", "", None, "rpmsg4000", delay=2e-7, count=3)
    recorder.append(6, Direction.INBOUND, "a", "", frame, "rpmsg4000", pending="no room [left]")
    recorder.append(7, Direction.INBOUND, "a", "/irq/a", frame, "rpmsg4000", delay_max=0.5)
    recorder.append(8, Direction.INBOUND, "a", "/irq/a", None, "rpmsg4000", delay_max=2.5, count=2)
    recorder.close()
    assert tshark(home, home / "f", "_ws.col.Info", "inco.delay", "inco.count") == [
        ["core 1 > core 0  a (pending: cannot write: Is a directory)", "", ""],
        ["core 1 > core 0  a (was pending for 1.500000 s, without a frame)", "1.5", ""],
        ["core 0 > core 1  b (pending: Network is down, without a frame)", "", ""],
        ["core 0 > core 1  b (was pending for 0.250000 s)", "0.25", ""],
        ["core 1 > core 0  a (3 times, was pending for 0.000000 s, without a frame)", "2e-07", "3"],
        ["core 1 > core 0  a (pending: no room [left])", "", ""],
        ["core 1 > core 0  a (was pending for up to 0.500000 s)", "", ""],
        ["core 1 > core 0  a (2 times, was pending for up to 2.500000 s, without a frame)", "", "2"],
    ]
    assert tshark(home, home / "f", "inco.register", "inco.delay_max")[-2:] == [["/irq/a", "0.5"], ["/irq/a", "2.5"]]
    assert tshark(home, home / "f", "inco.signal", "inco.register", "inco.pending", "frame.comment")[:4] == [
        ["a", "/irq/a", "cannot write: Is a directory", "inbound a /irq/a [pending: cannot write: Is a directory]"],
        ["a", "/irq/a", "", "inbound a /irq/a [after 1.500000 s]"],
        ["b", "/irq/b", "Network is down", "outbound b /irq/b [pending: Network is down]"],
        ["b", "/irq/b", "", "outbound b /irq/b [after 0.250000 s]"],
    ]
