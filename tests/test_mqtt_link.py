"""The wire between two cores over a real mosquitto, each end a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from inco_trio.cli.mqtt_link import bridge_label
from inco_trio.frame import FRAME_MAX, encode
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.links.names import Names
from inco_trio.mqtt.bridge import Bridge, _open_link
from inco_trio.mqtt.bridge_codec import Batch
from inco_trio.mqtt.bridge_progress import WINDOW
from inco_trio.mqtt.configuration import parse_broker
from inco_trio.persist.fdstore import NoFdStore
from netns.fixtures import Consumer, Proxy
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.supervised import Service, main_process
from tests.mosquitto import Gateway, Mosquitto, Reader, free_port
from tests.support_control import COMMAND, MAC
from tests.support_proxy import write_udrv

pytestmark = pytest.mark.tools

TOPICS = ("frames", "written", "status")


def frame(number: int) -> bytes:
    return encode(b"n%d" % number, MAC)


class Core:
    """A core that the test plays."""

    def __init__(self, path: Path, wire: Path) -> None:
        self.path, self.wire = path, wire
        self.socket = self.bound()

    def bound(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.settimeout(HANG)
        made.bind(os.fspath(self.path))
        return made

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, os.fspath(self.wire))

    def receive(self) -> bytes:
        return self.socket.recv(4 * FRAME_MAX)

    def close(self) -> None:
        self.socket.close()

    def leave(self) -> None:
        self.close()
        self.path.unlink()


class Bench:
    """A broker, and two cores whose wires are not there yet."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.stack = home, stack
        self.broker = Mosquitto(
            home / "broker", "allow_anonymous true", f"persistence_location {home}/broker/", "persistence true"
        )
        stack.callback(self.broker.end)
        self.broker.start()
        self.cores = [Core(home / f"core{n}", home / f"wire{n}") for n in (0, 1)]
        for core in self.cores:
            stack.callback(core.close)

    def words(self, end: int) -> list[str]:
        link = f"unix:{self.home}/wire{end},peer={self.home}/core{end}"
        return ["mqtt-link", f"{self.broker.url}/wire", "--link", link, "--end", f"core{end}"]

    def wire(self, end: int) -> Gateway:
        wire = Gateway(self.home / f"wire{end}.log", *self.words(end))
        self.stack.callback(wire.close)
        wire.wait_ready()
        return wire

    def joined(self) -> tuple[Gateway, Gateway]:
        wires = self.wire(0), self.wire(1)
        wires[0].wait_log("core1 is online")
        wires[1].wait_log("core0 is online")
        return wires


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def counters(wire: Gateway, published: int = 0) -> dict[str, int]:
    """What a wire says at SIGUSR1, once so many are acknowledged: a frame may be at the other core before that."""
    for times in itertools.count(wire.log.count("statistics: ") + 1):
        wire.process.send_signal(signal.SIGUSR1)
        wire.wait_log("statistics: ", times)
        line = [line for line in wire.log.splitlines() if "statistics: " in line][-1]
        words = (word.split("=") for word in line.split("statistics: ")[1].split())
        told = {name: int(count) for name, count in words}
        if told["published"] >= published:
            return told
    raise AssertionError


def test_frames_go_each_way_as_they_are(bench: Bench) -> None:
    wires = bench.joined()
    odd = [bytes(1), b"no frame", bytes(range(256)) * 6, frame(1).ljust(60, b"\0"), bytes(FRAME_MAX)]
    for here, there in (bench.cores, bench.cores[::-1]):
        for data in odd:
            here.send(data)
        assert [there.receive() for _ in odd] == odd
    for wire in wires:
        told = counters(wire, len(odd))
        assert (told["published"], told["written"], told["missed"], told["malformed"]) == (len(odd), len(odd), 0, 0)


def test_what_is_no_frame_of_the_core_is_counted(bench: Bench) -> None:
    wires = bench.joined()
    here, there = bench.cores
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
        os.kill(wires[0].process.pid, signal.SIGSTOP)
        for data in (b"", b"", frame(1), b"", bytes(FRAME_MAX + 1), frame(2), b""):
            here.send(data)
        foreign.sendto(frame(9), os.fspath(here.wire))
        os.kill(wires[0].process.pid, signal.SIGCONT)
    here.send(b"")
    here.send(frame(3))
    assert [there.receive() for _ in range(3)] == [frame(n) for n in (1, 2, 3)]
    told = counters(wires[0], 3)
    assert (told["published"], told["malformed"], told["foreign"]) == (3, 6, 1)


def test_frames_wait_for_an_end_that_was_never_there(bench: Bench) -> None:
    wire = bench.wire(0)
    bench.cores[0].send(frame(1))
    wire.wait_log("core1 has never been online")
    bench.wire(1)
    assert bench.cores[1].receive() == frame(1)


def test_a_question_that_nobody_got_is_asked_again(bench: Bench) -> None:
    """Not every broker says that nobody has subscribed: here somebody else has."""
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bench.wire(0)
    assert reader.next(lambda told: told.topic == "lab/wire/core0/frames").payload.startswith(b"inw1")
    bench.cores[0].send(frame(1))
    bench.wire(1)
    assert bench.cores[1].receive() == frame(1)


def test_the_broker_keeps_frames_for_an_end_that_is_away(bench: Bench) -> None:
    _, away = bench.joined()
    bench.cores[0].send(LAST)
    assert bench.cores[1].receive() == LAST
    assert away.end() == 0
    for number in range(WINDOW // 2):
        bench.cores[0].send(frame(number))
    bench.wire(1)
    assert [bench.cores[1].receive() for _ in range(WINDOW // 2)] == [frame(n) for n in range(WINDOW // 2)]


def test_a_core_that_takes_nothing_overflows_no_queue(bench: Bench) -> None:
    """Neither the broker's, of 1,000 messages, nor anybody else's: whoever sends has to wait."""
    bench.joined()
    here, there = bench.cores
    total = 3000
    received: list[bytes] = []

    def send() -> None:
        for number in range(total):
            here.send(frame(number))

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(1.0)
    assert sender.is_alive()  # It has to wait.
    while len(received) < total:
        received.append(there.receive())
    sender.join()
    assert received == [frame(number) for number in range(total)]


def test_an_end_that_begins_anew_again_and_again_overflows_no_queue(bench: Bench) -> None:
    """Each time it begins to count anew, as nobody holds its memory, while the other end is away."""
    wire, away = bench.joined()
    bench.cores[0].send(frame(0))
    assert bench.cores[1].receive() == frame(0)
    away.end(signal.SIGKILL)
    bench.cores[0].socket.setblocking(False)
    for _ in range(6):
        for number in range(1, 400):
            with contextlib.suppress(BlockingIOError, FileNotFoundError, ConnectionRefusedError):
                bench.cores[0].send(frame(number))
                threading.Event().wait(0.0005)
        wire.end(signal.SIGKILL)
        wire = bench.wire(0)
    assert "being dropped" not in bench.broker.log
    bench.cores[0].socket.settimeout(HANG)
    back = bench.wire(1)
    bench.cores[0].send(LAST)
    while bench.cores[1].receive() != LAST:
        pass
    assert counters(back)["missed"] == 0


def test_a_core_that_goes_and_comes_back(bench: Bench) -> None:
    _, wire = bench.joined()
    here, there = bench.cores
    there.leave()
    for number in range(5):
        here.send(frame(number))
    wire.wait_log("frames wait for the core")
    there.socket = there.bound()
    assert [there.receive() for _ in range(5)] == [frame(n) for n in range(5)]


def test_a_path_that_is_removed_is_bound_again_and_loses_nothing(bench: Bench) -> None:
    wires = bench.joined()
    here, there = bench.cores
    bench.broker.end()
    wires[0].wait_log("frames wait, retrying")
    for number in range(5):
        here.send(frame(number))
    here.wire.unlink()
    wires[0].wait_log("bound again")
    for number in range(5, 10):
        here.send(frame(number))
    bench.broker.start()
    assert [there.receive() for _ in range(10)] == [frame(n) for n in range(10)]


def test_two_that_are_the_same_end(bench: Bench) -> None:
    wire = bench.wire(0)
    words = [word.replace("/wire0,", "/other,") for word in bench.words(0)]
    other = Gateway(bench.home / "other.log", *words)
    bench.stack.callback(other.close)
    assert wire.process.wait(HANG) == 69
    assert "another process is also core0: stop one of them" in wire.log
    bench.cores[0].wire = bench.home / "other"
    bench.cores[0].send(frame(1))
    bench.wire(1)
    assert bench.cores[1].receive() == frame(1)


def test_a_broker_that_was_restored_from_an_older_state(bench: Bench) -> None:
    """What it says of a predecessor is no sign of a process that is the same end."""
    bench.joined()[0].end()
    bench.broker.end()  # It saves what it knows.
    older = (bench.broker.directory / "mosquitto.db").read_bytes()
    bench.broker.start()
    wire = bench.wire(0)
    wire.wait_log("core1 is online")
    bench.broker.end(signal.SIGKILL)
    (bench.broker.directory / "mosquitto.db").write_bytes(older)
    before = wire.log.count("connected as core0")
    bench.broker.start()
    wire.wait_log("connected as core0", before + 1)
    bench.cores[0].send(frame(1))
    assert bench.cores[1].receive() == frame(1)
    assert wire.process.poll() is None


def test_a_configuration_that_cannot_be_used(bench: Bench) -> None:
    config = bench.home / "gateway.json"
    for text, code, said in (
        ('{"broker": {"user_file": "/nowhere"}}', 78, "/nowhere"),
        ('{"broker": {"user": "me"}}', 78, "unknown key"),
        ("", 78, str(config)),
    ):
        config.write_text(text)
        words = [*COMMAND, *bench.words(0), "--config", str(config)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
        assert said in done.stderr


def test_a_reload_that_is_refused_changes_nothing(bench: Bench) -> None:
    config = bench.home / "gateway.json"
    config.write_text("{}")
    wire = Gateway(bench.home / "wire0.log", *bench.words(0), "--config", config)
    bench.stack.callback(wire.close)
    wire.wait_ready()
    bench.wire(1)
    config.write_text("{")
    wire.process.send_signal(signal.SIGHUP)
    wire.wait_log("reload refused, keeping the old configuration")
    bench.cores[0].send(frame(1))
    assert bench.cores[1].receive() == frame(1)
    assert counters(wire, 1)["published"] == 1


def test_a_gap_is_counted_and_said(bench: Bench) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    wire = bench.wire(0)
    reader.next(lambda told: told.topic == "lab/wire/core0/status" and told.body["state"] == "online")
    for first in (1, 5):
        reader.publish("lab/wire/core1/frames", Batch(bytes(8), first, [frame(first)]).encode())
        assert bench.cores[0].receive() == frame(first)
    wire.wait_log("lost 3 frames of core1 that the broker had acknowledged")
    assert counters(wire)["missed"] == 3


def test_a_held_socket_of_another_path_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = parse_address(f"unix:{tmp_path}/wire,peer={tmp_path}/core")
    assert isinstance(address, UnixAddress)

    async def main() -> None:
        names = Names()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(f"{tmp_path}/other")
            link = _open_link(address, os.dup(other.fileno()), memoryview(bytearray(16)), names)
        assert link.refresh()
        link.close(remove=True)
        names.close()

    trio.run(main)
    assert "the inherited socket has another address" in caplog.text


@pytest.mark.parametrize("topic", TOPICS)
def test_what_an_acl_refuses_waits(bench: Bench, topic: str) -> None:
    """Each of the topics that an end publishes to may be forgotten in an ACL."""
    acl = bench.home / "acl"
    allowed = [f"topic readwrite lab/wire/{end}/{name}" for end in ("core0", "core1") for name in TOPICS]
    acl.write_text("\n".join(line for line in allowed if line != f"topic readwrite lab/wire/core1/{topic}") + "\n")
    acl.chmod(0o600)
    bench.broker.end()
    with (bench.broker.directory / "mosquitto.conf").open("a") as conf:
        conf.write(f"acl_file {acl}\n")
    bench.broker.start()
    wires = bench.wire(0), bench.wire(1)
    wires[1].wait_log(f"lab/wire/core1/{topic}: the broker refuses to publish: Not authorized")
    for core in bench.cores:
        core.send(frame(1))
    acl.write_text("\n".join(allowed) + "\n")
    assert bench.broker.process is not None
    bench.broker.process.send_signal(signal.SIGHUP)
    assert [core.receive() for core in bench.cores] == [frame(1)] * 2
    assert "Traceback" not in wires[0].log + wires[1].log


def test_it_has_nothing_to_tell_before_it_is_open() -> None:
    """SIGUSR1 may come at any time."""
    address = parse_address("unix:/x/wire,peer=/x/core")
    assert isinstance(address, UnixAddress)
    bridge = Bridge(parse_broker("mqtt://127.0.0.1"), ("core0", "core1"), address, NoFdStore())
    bridge.log_statistics()
    bridge.close()


@pytest.mark.parametrize("topic", TOPICS)
def test_garbage_on_its_topics(bench: Bench, topic: str) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    wire = bench.wire(0)
    reader.next(lambda told: told.topic == "lab/wire/core0/status" and told.body["state"] == "online")
    batch = Batch(bytes(8), 1, [frame(1)]).encode()
    garbage = [
        b"",
        b"\0",
        b"[]",
        b"{}",
        b'{"state": 1, "boot": "z", "number": "x"}',
        b"\xff\xfe",
        batch[:-1],
        batch + b"\0",
    ]
    garbage += [b'{"instance": "x", "boot": "00", "number": Infinity}', b"[" * 100_000, b'{"number": NaN, "boot": ""}']
    garbage.append(Batch(bytes(8), (1 << 64) - 1, [b"x", b"y"]).encode())
    for payload in (*garbage, bytes(1 << 20), batch.replace(b"inw1", b"inw2"), Batch(bytes(8), 0, [b"x"]).encode()):
        reader.publish(f"lab/wire/core1/{topic}", payload)
    reader.publish("lab/wire/core1/frames", batch)
    assert bench.cores[0].receive() == frame(1)
    bench.wire(1)
    bench.cores[1].send(frame(2))
    assert bench.cores[0].receive() == frame(2)
    assert counters(wire)["malformed"] >= 8
    assert "Traceback" not in wire.log


class Flow:
    """Numbered frames from a core to the other one, sent and read by threads of their own until it is checked."""

    def __init__(self, here: Core, there: Core) -> None:
        self._here, self._there = here, there
        self._sent = 0
        self._received: list[bytes] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stopped.is_set():
            try:
                self._here.send(frame(self._sent))
            except (FileNotFoundError, ConnectionRefusedError):
                self._stopped.wait(0.001)
            else:
                self._sent += 1
                self._stopped.wait(0.0002)
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._here.send(LAST)
                return

    def _receive(self) -> None:
        while not self._received or self._received[-1] != LAST:
            self._received.append(self._there.receive())

    def check(self) -> int:
        """All came, in order but for what was repeated; returns the number of doubles."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive(), (self._sent, self._received[-3:])
        assert list(dict.fromkeys(self._received)) == [*map(frame, range(self._sent)), LAST]
        doubles = len(self._received) - self._sent - 1
        sys.stdout.write(f"{self._sent} frames, {doubles} doubles\n")
        return doubles


LAST = encode(b"last", MAC)
ROUNDS = int(os.environ.get("INCO_TRIO_WIRE_ROUNDS", "25"))
"""Faults of a walk; thousands are minutes."""


def test_nothing_is_lost_over_the_end_of_broker_and_reader(bench: Bench) -> None:
    wires = list(bench.joined())
    flow = Flow(*bench.cores)
    choice = random.Random(5)  # noqa: S311
    for _ in range(ROUNDS):
        what = choice.choice(["reader", "reader killed", "broker", "hang up"])
        if what == "broker":
            bench.broker.end()
            bench.broker.start()
        elif what == "hang up":
            for wire in wires:
                wire.process.send_signal(signal.SIGHUP)
        else:
            wires[1].end(signal.SIGKILL if "killed" in what else signal.SIGTERM)
            wires[1] = bench.wire(1)
        threading.Event().wait(choice.random() / 4)
    flow.check()
    for wire in wires:
        assert "that the broker had acknowledged" not in wire.log
        assert "Traceback" not in wire.log


@pytest.mark.s6
def test_nothing_is_lost_under_s6_over_the_end_of_anybody(bench: Bench) -> None:
    """Both ends are killed, stopped and paused, and the broker is, while both cores send."""
    scan, services = bench.home / "scan", []
    for end in (0, 1):
        link = f"unix:{bench.home}/wire{end},peer={bench.home}/core{end}"
        words = ["s6", str(scan), "--mqtt-link", f"{bench.broker.url}/wire", "--iface", link, "--end", f"core{end}"]
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
        services.append(scan / f"inco-trio-{bridge_label(parse_address(link))}")  # type: ignore[arg-type]
    running = Service(Here(), scan, services[0].name.removeprefix("inco-trio-"))  # type: ignore[arg-type]
    bench.stack.enter_context(running)
    running.wait("U")
    running.wait_log("core1 is online")
    flows = [Flow(*bench.cores), Flow(*bench.cores[::-1])]
    choice, kills = random.Random(7), 0  # noqa: S311
    for _ in range(ROUNDS):
        service = choice.choice(services)
        what = choice.choice(["kill", "kill", "restart", "pause", "hang up", "broker"])
        if what == "kill" and (pid := main_process(service)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        elif what == "restart":
            subprocess.run(["s6-svc", "-r", str(service)], check=True)
        elif what == "hang up":
            subprocess.run(["s6-svc", "-h", str(service)], check=True)
        elif what == "broker":
            bench.broker.end()
            bench.broker.start()
        elif what == "pause":
            subprocess.run(["s6-svc", "-p", str(service)], check=True)
            threading.Event().wait(choice.random() / 10)
            subprocess.run(["s6-svc", "-c", str(service)], check=True)
        threading.Event().wait(choice.random() / 2)
    assert kills
    for flow in flows:
        # Per kill what was being written, or was counted and not taken yet.
        assert flow.check() <= 2 * kills
    assert "Traceback" not in running.log
    assert "never came" not in running.log


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["mqtt://h", "--link", "eth0", "--end", "core0"], "a bridge joins Unix sockets"),
        (["mqtt://h", "--link", "unix:/a", "--end", "core0"], "peer=REMOTE is missing"),
        (["mqtt://h", "--link", "unix:/a,peer=/b", "--end", "core2"], "invalid choice: 'core2'"),
        (["mqtt://h", "--link", "unix:/a,peer=/b"], "--end"),
        (["http://h", "--link", "unix:/a,peer=/b", "--end", "core0"], "mqtt://"),
        (["mqtt://h", "--link", "unix:/a,peer=/b", "--end", "core0", "--fd-holder", "/x"], "S6_FD#"),
    ],
)
def test_what_is_refused(words: list[str], text: str) -> None:
    done = subprocess.run([*COMMAND, "mqtt-link", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert text in done.stderr.splitlines()[-1]


def test_a_path_that_cannot_be_bound(tmp_path: Path) -> None:
    words = ["mqtt-link", f"mqtt://127.0.0.1:{free_port()}", "--end", "core1"]
    taken = tmp_path / "taken"
    taken.write_text("")
    for path, code in ((tmp_path / "missing/wire", 69), (taken, 69)):
        done = subprocess.run(
            [*COMMAND, *words, "--link", f"unix:{path},peer={tmp_path}/core"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith(f"inco-trio: error: {path}: ")


def test_two_proxies_that_share_no_host(bench: Bench) -> None:
    bench.joined()
    for core in bench.cores:
        core.leave()
    tables = ({"up": "up_state"}, {"down": "down_trig"}), ({"down": "down_state"}, {"up": "up_trig"})
    for end, (inbound, outbound) in enumerate(tables):
        irq = bench.home / f"irq{end}"
        config = bench.home / f"udrv{end}.json"
        write_udrv(config, irq, inbound, outbound)
        link = f"unix:{bench.home}/core{end},peer={bench.home}/wire{end}"
        proxy = Proxy(None, [link, "--config", str(config), "--control", "none"], {}, bench.home / f"proxy{end}")
        bench.stack.callback(proxy.close)
        proxy.wait_ready()
    for end, name in ((0, "up"), (1, "down")):
        consumer = Consumer(bench.home / f"irq{end}/{name}_state")
        bench.stack.callback(consumer.close)
        for _ in range(10):
            (bench.home / f"irq{1 - end}/{name}_trig").write_text("1")
        consumer.wait(10)
