"""Tests of core 1 as a QEMU guest on a Unix datagram link; the tests act as core 0."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import inco_trio.simulation.guest
from inco_trio.cli.exit_codes import exit_code
from inco_trio.frame import BROADCAST, decode, encode
from inco_trio.simulation.guest import FIRMWARE, MAC, Guest, GuestError, parse_counters, tap_netdev, unix_netdev
from inco_trio.simulation.world import Namespace, wait_running
from netns.hang import HANG
from tests.faults.processes import wait_idle
from tests.support_proxy import thread_count

pytestmark = pytest.mark.qemu

HOST_MAC = bytes.fromhex("020000000001")
GUEST_MAC = bytes.fromhex(MAC.replace(":", ""))


class Host:
    """Core 0's side of the link: a datagram socket that receives frames from QEMU and sends frames to QEMU's socket."""

    def __init__(self, directory: Path) -> None:
        self.local, self.remote = directory / "host", directory / "guest"
        self.netdev = unix_netdev(self.remote, self.local)
        self.bind()

    def bind(self) -> None:
        self.local.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.local))
        self.socket.settimeout(HANG)

    def send_raw(self, frame: bytes) -> None:
        self.socket.sendto(frame, str(self.remote))

    def send(self, name: bytes) -> None:
        self.send_raw(encode(name, HOST_MAC))

    def receive_raw(self) -> bytes:
        return self.socket.recv(65536)

    def receive(self) -> bytes | None:
        return decode(self.receive_raw())

    def waiting(self) -> list[bytes | None]:
        """Return the frames that are already queued."""
        names = []
        while select.select([self.socket], [], [], 0)[0]:
            names.append(self.receive())
        return names


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.socket.close()


Boot = Callable[..., Guest]


@pytest.fixture
def boot(host: Host, tmp_path: Path) -> Iterator[Boot]:
    """Yield `boot(command_line, reboot=True)`, which starts a guest on `host`'s link and waits until it is ready."""
    with contextlib.ExitStack() as stack:

        def start(command_line: str = "", *, reboot: bool = True) -> Guest:
            return stack.enter_context(Guest(host.netdev, command_line, log=log, reboot=reboot))

        log = tmp_path / "guest.log"
        yield start
    sys.stderr.write(f"the guest said:\n{log.read_text()}")  # pytest shows this output if the test fails.


def padded(name: bytes) -> bytes:
    return encode(name, GUEST_MAC).ljust(60, b"\0")


def test_boot_signals_are_sent_first_in_order_and_padded(boot: Boot, host: Host) -> None:
    longest = b"n" * 64
    guest = boot(f"boot=ihub_reset_irq,ihub_hwwd_irq boot={longest.decode()}")
    assert host.receive_raw() == padded(b"ihub_reset_irq")
    assert host.receive_raw() == padded(b"ihub_hwwd_irq")
    assert host.receive_raw() == encode(longest, GUEST_MAC)
    assert guest.wait_for("sends at boot ihub_hwwd_irq") == "core1: sends at boot ihub_hwwd_irq"


def test_every_signal_has_its_own_echo(boot: Boot, host: Host) -> None:
    echoes = {f"out_{number}".encode(): f"in_{number}".encode() for number in range(100)}
    echoes[b"a"] = b"b" * 64
    echoes[b"c" * 64] = b"d"
    boot("echo=" + ",".join(f"{name.decode()}:{echo.decode()}" for name, echo in echoes.items()))
    for name, echo in echoes.items():
        for pad in (0, 60, 1514):
            host.send_raw(encode(name, HOST_MAC).ljust(pad, b"\0"))
            assert host.receive_raw() == padded(echo)


def test_several_rules_of_a_signal_apply_in_order(boot: Boot, host: Host) -> None:
    guest = boot("echo=all:first,all:second report_on=all echo=all:third")
    host.send(b"all")
    assert [host.receive() for _ in range(3)] == [b"first", b"second", b"third"]
    assert guest.wait_counters()["sent"] == 2


def test_without_rules_the_guest_answers_with_the_watchdog(boot: Boot, host: Host) -> None:
    boot()
    host.send(b"redun_notify_irq")
    assert host.receive_raw() == padded(b"ihub_hwwd_irq")


def test_the_guest_counts_received_frames_by_kind(boot: Boot, host: Host) -> None:
    guest = boot("report_on=report echo=a:b")
    for kind, frames in {
        "foreign": [
            b"\0",
            BROADCAST + HOST_MAC + b"\x08\x00a",
            GUEST_MAC + HOST_MAC + b"\x88\x00a",
            BROADCAST + HOST_MAC + b"\x81\x00\x0f\xa0\x88\x00a",
        ],
        "malformed": [
            BROADCAST + HOST_MAC + b"\x88\x00" + payload
            for payload in (b"", bytes(46), b"a\0b", b"\0a", b"a b", b"\xff", b"n" * 65, b"n" * 1500)
        ],
        "unknown": [encode(b"unknown", HOST_MAC), encode(b"A", HOST_MAC), encode(b"aa", HOST_MAC)],
    }.items():
        for frame in frames:
            host.send_raw(frame)
        host.send(b"report")
        counters = guest.wait_counters()
        assert counters[kind] == len(frames)
    # QEMU drops a frame that is longer than its network card accepts.
    host.send_raw(BROADCAST + HOST_MAC + b"\x88\x00" + bytes(65_000))
    host.send(b"a")
    assert host.receive() == b"b"
    host.send(b"report")
    assert guest.wait_counters() == {
        "received": 20,
        "known": 5,
        "unknown": 3,
        "malformed": 8,
        "foreign": 4,
        "sent": 1,
    }


def test_verbose_prints_every_notification(boot: Boot, host: Host) -> None:
    guest = boot("verbose echo=a:b")
    host.send(b"a")
    host.send(b"z")
    assert guest.wait_for("sent b") == "core1: sent b"
    guest.wait_for("received z")
    assert guest.log.splitlines()[1:] == ["core1: received a", "core1: sent b", "core1: received z"]


def test_a_flood_that_is_not_read_for_2_s_arrives_complete(boot: Boot, host: Host) -> None:
    guest = boot("flood_on=start:20000:flooding echo=a:b report_on=report")
    host.send(b"start")
    guest.wait_for("floods: 20000 flooding")
    guest.wait_for("no room to send for 2 s")
    # The guest still receives while its sends are blocked.
    host.send(b"a")
    host.send(b"report")
    assert guest.wait_counters()["received"] == 3
    names = [host.receive() for _ in range(20_001)]
    guest.wait_for("flood ended: flooding")
    assert (names.count(b"flooding"), names.count(b"b")) == (20_000, 1)
    host.send(b"report")
    assert guest.wait_counters()["sent"] == 20_001
    assert host.waiting() == []


def test_floods_at_boot_are_sent_one_after_the_other(boot: Boot, host: Host) -> None:
    guest = boot("flood=300:x,200:y")
    assert [host.receive() for _ in range(500)] == [b"x"] * 300 + [b"y"] * 200
    guest.wait_for("flood ended: x")
    guest.wait_for("flood ended: y")


def test_a_burst_of_20000_loses_nothing_in_the_guest(boot: Boot, host: Host) -> None:
    guest = boot("report_on=report")
    for _ in range(20_000):
        host.send(b"burst")
    host.send(b"report")
    counters = guest.wait_counters()
    assert (counters["received"], counters["unknown"]) == (20_001, 20_000)


@pytest.mark.parametrize("number", [5_000, pytest.param(20_000, marks=pytest.mark.thorough)])
def test_unread_echoes_block_the_sender_and_are_not_lost(boot: Boot, host: Host, number: int) -> None:
    boot("echo=a:b")
    host.socket.setblocking(False)
    blocked = echoes = sent = 0
    while sent < number:
        # Fill all buffers of the link: the queue to the guest, the guest's two rings, and the queue from the guest.
        try:
            while sent < number:
                host.send(b"a")
                sent += 1
        except BlockingIOError:
            blocked += 1
        echoes += len(host.waiting())
    host.socket.settimeout(HANG)
    assert blocked
    while echoes < number:
        assert host.receive() == b"b"
        echoes += 1
    assert host.waiting() == []


def test_10000_round_trips_complete(boot: Boot, host: Host) -> None:
    boot("echo=there:back")
    for _ in range(10_000):
        host.send(b"there")
        assert host.receive() == b"back"
    assert host.waiting() == []


def test_a_hung_guest_does_not_answer_until_it_is_reset(boot: Boot, host: Host) -> None:
    guest = boot("hang_on=hang echo=a:b,c:d")
    host.send(b"hang")
    guest.wait_for("hangs on hang")
    for _ in range(10):
        host.send(b"a")
    wait_idle(guest.pid)
    assert host.waiting() == []
    guest.system_reset()
    guest.wait_ready()
    host.send(b"c")
    # The reset cleared the frames in the guest's memory, so no echo of "a" arrives.
    assert host.receive() == b"d"


def test_the_guest_resets_itself_after_sending_pending_frames(boot: Boot, host: Host) -> None:
    guest = boot("boot=up reset_on=reset echo=a:b")
    assert host.receive() == b"up"
    for _ in range(3):
        for _ in range(100):
            host.send(b"a")
            assert host.receive() == b"b"
        host.send(b"a")
        host.send(b"reset")
        guest.wait_for("resets itself on reset")
        guest.wait_ready()
        assert [host.receive(), host.receive()] == [b"b", b"up"]
    assert host.waiting() == []


def test_without_reboot_a_reset_ends_qemu(boot: Boot, host: Host) -> None:
    guest = boot("reset_on=reset", reboot=False)
    host.send(b"reset")
    assert guest.wait() == 0
    assert guest.log.splitlines()[-1] == "core1: resets itself on reset"


def test_the_monitor_can_reset_the_guest_during_a_flood(boot: Boot, host: Host) -> None:
    guest = boot("boot=up flood_on=start:20000:flooding report_on=report")
    assert host.receive() == b"up"
    host.send(b"start")
    assert host.receive() == b"flooding"
    guest.system_reset()
    guest.wait_ready()
    while (name := host.receive()) == b"flooding":
        pass
    assert name == b"up"
    host.send(b"report")
    assert guest.wait_counters() == {
        "received": 1,
        "known": 1,
        "unknown": 0,
        "malformed": 0,
        "foreign": 0,
        "sent": 1,
    }


def test_frames_wait_while_the_guest_is_paused(boot: Boot, host: Host) -> None:
    guest = boot("echo=" + ",".join(f"out_{number}:in_{number}" for number in range(10)))
    for _ in range(20):
        guest.stop()
        for number in range(10):
            host.send(f"out_{number}".encode())
        assert host.waiting() == []
        guest.cont()
        assert [host.receive() for _ in range(10)] == [f"in_{number}".encode() for number in range(10)]


def test_the_guest_can_be_killed_and_restarted(boot: Boot, host: Host) -> None:
    guest = boot("boot=up echo=a:b")
    assert host.receive() == b"up"
    for _ in range(3):
        guest.kill()
        with pytest.raises(ConnectionRefusedError):
            host.send(b"a")
        guest.start()
        guest.wait_ready()
        assert host.receive() == b"up"
        host.send(b"a")
        assert host.receive() == b"b"


def test_the_guest_sends_to_a_recreated_socket_at_once(boot: Boot, host: Host) -> None:
    boot("echo=a:b")
    for _ in range(10):
        host.socket.close()
        host.bind()
        host.send(b"a")
        assert host.receive() == b"b"


def test_an_idle_guest_uses_no_cpu(boot: Boot, host: Host) -> None:
    guest = boot("echo=a:b")
    host.send(b"a")
    assert host.receive() == b"b"
    wait_idle(guest.pid)


def test_a_closed_guest_leaves_nothing_behind(host: Host, tmp_path: Path) -> None:
    def held() -> tuple[list[str], int]:
        return sorted(map(str, Path("/proc/self/fd").iterdir())), thread_count()

    before = held()
    with Guest(host.netdev, log=tmp_path / "guest.log") as guest:
        pid = guest.pid
    assert held() == before
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with Guest(host.netdev, log=tmp_path / "guest.log") as guest:
        assert guest.quit() == 0
    assert held() == before


def test_the_guest_ends_with_its_parent_process(host: Host, tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from inco_trio.cli.exit_codes import exit_code
from inco_trio.simulation.guest import Guest
with Guest({host.netdev!r}, log=Path({str(tmp_path / "guest.log")!r})) as guest:
    print(guest.pid, flush=True)
    input()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        qemu = os.pidfd_open(int(started.stdout.readline()))
        started.kill()
        assert select.select([qemu], [], [], HANG)[0]
        os.close(qemu)


def test_an_ordinary_user_can_run_a_guest(nobody: list[str]) -> None:
    program = """
import os, socket, tempfile
from pathlib import Path
from inco_trio.frame import decode, encode
from inco_trio.cli.exit_codes import exit_code
from inco_trio.simulation.guest import Guest, unix_netdev
capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
    host, card = Path(directory, "host"), Path(directory, "guest")
    link.bind(str(host))
    with Guest(unix_netdev(card, host), "echo=a:b", log=Path(directory, "log")):
        link.sendto(encode(b"a", bytes(6)), str(card))
        print(int(capabilities, 16), decode(link.recv(100)))
"""
    done = subprocess.run(
        [*nobody, sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 b'b'\n", "")


@pytest.mark.netns
def test_a_guest_behind_a_tap_starts_when_the_tap_passes_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "guest.log"
    with Namespace() as switch, switch.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as link:
        # Create a persistent tap before QEMU starts, because a bridge needs it in advance (ip-tuntap(8)).
        switch.run(lambda: subprocess.run(["ip", "tuntap", "add", "tap_rpmsg", "mode", "tap"], check=True))
        link.settimeout(HANG)

        def set_up_and_wait(name: str, namespace: Namespace | None) -> None:
            assert not log.read_text()
            switch.run(lambda: subprocess.run(["ip", "link", "set", name, "up"], check=True))
            wait_running(name, namespace)
            switch.run(lambda: link.bind((name, 0x8800)))

        monkeypatch.setattr("inco_trio.simulation.guest.wait_running", set_up_and_wait)
        with Guest(tap_netdev("tap_rpmsg"), "echo=a:b boot=up", log=log, namespace=switch):
            assert link.recv(100) == padded(b"up")
            for _ in range(100):
                link.send(encode(b"a", HOST_MAC))
                assert link.recv(100) == padded(b"b")


@pytest.mark.parametrize(
    ("command_line", "complaint"),
    [
        ("nonsense", "unknown word on the command line: nonsense"),
        ("ech=a:b", "unknown word on the command line: ech=a:b"),
        ("boot=up verbose=1", "unknown word on the command line: verbose=1"),
        ("echo=a", "a name has 1 to 64 printable characters, not so in echo=a"),
        ("echo=:b", "a name has 1 to 64 printable characters, not so in echo=:b"),
        ("boot=", "a name has 1 to 64 printable characters, not so in boot="),
        ("boot=a,,b", "a name has 1 to 64 printable characters, not so in boot=a,,b"),
        (f"hang_on={'n' * 65}", f"a name has 1 to 64 printable characters, not so in hang_on={'n' * 65}"),
        ("flood=:a", "a count is a number of 1 to 9 digits, not so in flood=:a"),
        ("flood=1x:a", "a count is a number of 1 to 9 digits, not so in flood=1x:a"),
        ("flood_on=a:-1:b", "a count is a number of 1 to 9 digits, not so in flood_on=a:-1:b"),
        ("flood_on=a:1000000000:b", "a count is a number of 1 to 9 digits, not so in flood_on=a:1000000000:b"),
        ("boot=" + ",".join("a" * 257), "more than 256 rules, the last is in boot=" + ",".join("a" * 257)),
    ],
)
def test_an_invalid_command_line_ends_the_guest(host: Host, tmp_path: Path, command_line: str, complaint: str) -> None:
    with (
        pytest.raises(GuestError) as caught,
        Guest(host.netdev, command_line, log=tmp_path / "guest.log"),
    ):
        pass
    expected = f"QEMU has ended with exit code 1; its last output: core1: error: {complaint}"
    assert (str(caught.value), exit_code(caught.value)) == (expected, 69)
    assert host.waiting() == []


def test_256_rules_are_accepted(boot: Boot, host: Host) -> None:
    boot("boot=" + ",".join(f"n{number}" for number in range(256)))
    assert [host.receive() for _ in range(256)] == [f"n{number}".encode() for number in range(256)]


def test_missing_qemu_is_one_error_line(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError) as caught:
        Guest(host.netdev, log=tmp_path / "guest.log").start()
    assert str(caught.value) == ("qemu-system-riscv64 is not installed (Debian: install qemu-system-misc)")
    with pytest.raises(GuestError) as caught:
        Guest(host.netdev, log=tmp_path / "guest.log", program="qemu-system-arm").start()
    assert str(caught.value) == "qemu-system-arm is not installed (install it, or correct `program`)"


@pytest.mark.parametrize("name", ["n" * 200, "missing/guest"], ids=["too long", "no directory"])
def test_errors_of_qemu_are_one_error_line(host: Host, tmp_path: Path, name: str) -> None:
    guest = Guest(unix_netdev(tmp_path / name, host.local), log=tmp_path / "guest.log")
    with pytest.raises(GuestError) as caught:
        guest.start()
    assert re.fullmatch("QEMU has ended with exit code 1; its last output: qemu-system-riscv64: .*", str(caught.value))
    with pytest.raises(GuestError, match="the guest is not running"):
        guest.wait_ready()


def test_wrong_calls_are_one_error_line(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = boot()
    with pytest.raises(GuestError, match=f"the guest is already running .PID {guest.pid}."):
        guest.start()
    with pytest.raises(GuestError, match="QEMU's monitor refused nonsense: The command nonsense has not been found"):
        guest._execute("nonsense")
    monkeypatch.setattr(inco_trio.simulation.guest, "_DEADLINE", 0.0)
    with pytest.raises(GuestError, match="the guest has not printed 'good night' within 0 s"):
        guest.wait_for("good night")
    with pytest.raises(GuestError, match="QEMU has not ended within 0 s"):
        guest.wait()


def test_a_monitor_that_does_not_answer_is_one_error_line(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = boot()
    os.kill(guest.pid, signal.SIGSTOP)
    with monkeypatch.context() as shortly:
        shortly.setattr(inco_trio.simulation.guest, "_DEADLINE", 0.0)
        with pytest.raises(GuestError, match="QEMU's monitor has not answered within 0 s"):
            guest._execute("nonsense")
    os.kill(guest.pid, signal.SIGCONT)
    # The late answer must not count as the answer to the next command.
    guest.stop()


def test_a_killed_qemu_is_detected(boot: Boot) -> None:
    guest = boot()
    os.kill(guest.pid, signal.SIGKILL)
    with pytest.raises(GuestError, match="QEMU has ended with exit code -9; its last output: core1: ready"):
        guest.wait_for("good night")
    with pytest.raises(GuestError, match="QEMU has ended with exit code -9"):
        guest.stop()
    assert guest.wait() == -9
    with pytest.raises(GuestError, match="the guest is not running"):
        guest.cont()


def test_a_counters_line_is_parsed() -> None:
    assert parse_counters("core1: counters received=12 sent=0") == {"received": 12, "sent": 0}


def built(directory: Path) -> bytes:
    """Build the firmware in a copy of its source directory and return the file's content."""
    directory.mkdir()
    for source in FIRMWARE.parent.iterdir():
        if source != FIRMWARE:
            (directory / source.name).write_bytes(source.read_bytes())
    subprocess.run(["sh", str(directory / "build.sh")], check=True, timeout=HANG)
    return (directory / FIRMWARE.name).read_bytes()


def compiler(firmware: bytes) -> bytes:
    """Return the GCC version string from the section `.comment`."""
    found = re.search(rb"GCC: [^\0]*", firmware)
    assert found
    return found[0]


def test_the_firmware_is_built_reproducibly_from_its_source(tmp_path: Path) -> None:
    first = built(tmp_path / "first")
    assert first == built(tmp_path / "a second one, with a longer name")
    shipped = FIRMWARE.read_bytes()
    # Different compiler versions may generate different bytes.
    assert compiler(first) != compiler(shipped) or first == shipped
