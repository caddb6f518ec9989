"""Tests of the bridge between two cores over a real mosquitto. Each side of the bridge is a separate process."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from inco_trio.cli.mqtt_link import bridge_label
from inco_trio.frame import FRAME_MAX, encode
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.links.names import Names
from inco_trio.mqtt.bridge import Bridge, _open_link
from inco_trio.mqtt.bridge_codec import NUMBER_MAX, Batch, encode_status
from inco_trio.mqtt.bridge_progress import WINDOW, Memory, Progress
from inco_trio.mqtt.configuration import parse_broker
from inco_trio.mqtt.session import Limits, Message, Received, SessionTakenError
from inco_trio.mqtt.topics import client_id
from inco_trio.persist.fdstore import NoFdStore
from netns.fixtures import Consumer, Proxy
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.processes import wait_stopped
from tests.faults.supervised import Service, main_process
from tests.mosquitto import Gateway, Mosquitto, Reader, free_port
from tests.mosquitto import Message as Published
from tests.support_control import COMMAND, MAC
from tests.support_mqtt import Relay
from tests.support_proxy import write_udrv

pytestmark = pytest.mark.tools

TOPICS = ("frames", "written", "status")


def frame(number: int) -> bytes:
    return encode(b"n%d" % number, MAC)


class Core:
    """A core that the test simulates with a socket."""

    def __init__(self, path: Path, bridge: Path) -> None:
        self.path, self.bridge = path, bridge
        self.socket = self.bound()

    def bound(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.settimeout(HANG)
        made.bind(os.fspath(self.path))
        return made

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, os.fspath(self.bridge))

    def receive(self) -> bytes:
        return self.socket.recv(4 * FRAME_MAX)

    def close(self) -> None:
        self.socket.close()

    def leave(self) -> None:
        self.close()
        self.path.unlink()


class Bench:
    """A broker and two cores. The bridge between the cores is not running yet."""

    def __init__(self, home: Path, stack: ExitStack, *lines: str) -> None:
        self.home, self.stack = home, stack
        self.broker = Mosquitto(
            home / "broker", *lines, "allow_anonymous true", f"persistence_location {home}/broker/", "persistence true"
        )
        stack.callback(self.broker.end)
        self.broker.start()
        self.cores = [Core(home / f"core{n}", home / f"wire{n}") for n in (0, 1)]
        for core in self.cores:
            stack.callback(core.close)

    def words(self, end: int, url: str | None = None) -> list[str]:
        link = f"unix:{self.home}/wire{end},peer={self.home}/core{end}"
        return ["mqtt-link", f"{url or self.broker.url}/wire", link, "--end", f"core{end}"]

    def bridge(self, end: int, url: str | None = None) -> Gateway:
        bridge = Gateway(self.home / f"wire{end}.log", *self.words(end, url))
        self.stack.callback(bridge.close)
        bridge.wait_ready()
        return bridge

    def joined(self) -> tuple[Gateway, Gateway]:
        bridges = self.bridge(0), self.bridge(1)
        bridges[0].wait_log("core1 is online")
        bridges[1].wait_log("core0 is online")
        return bridges


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def counters(bridge: Gateway, published: int = 0) -> dict[str, int]:
    """Wait until `published` frames have been acknowledged. Return the counters that a bridge logs on SIGUSR1."""
    for times in itertools.count(bridge.log.count("statistics: ") + 1):
        bridge.process.send_signal(signal.SIGUSR1)
        bridge.wait_log("statistics: ", times)
        line = [line for line in bridge.log.splitlines() if "statistics: " in line][-1]
        words = (word.split("=") for word in line.split("statistics: ")[1].split())
        told = {name: int(count) for name, count in words}
        if told["published"] >= published:
            return told
    raise AssertionError


def test_frames_pass_unchanged_in_both_directions(bench: Bench) -> None:
    bridges = bench.joined()
    odd = [bytes(1), b"no frame", bytes(range(256)) * 6, frame(1).ljust(60, b"\0"), bytes(FRAME_MAX)]
    for here, there in (bench.cores, bench.cores[::-1]):
        for data in odd:
            here.send(data)
        assert [there.receive() for _ in odd] == odd
    for bridge in bridges:
        told = counters(bridge, len(odd))
        assert (told["published"], told["written"], told["missed"], told["malformed"]) == (len(odd), len(odd), 0, 0)


def test_malformed_and_foreign_datagrams_are_counted(bench: Bench) -> None:
    bridges = bench.joined()
    here, there = bench.cores
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
        os.kill(bridges[0].process.pid, signal.SIGSTOP)
        for data in (b"", b"", frame(1), b"", bytes(FRAME_MAX + 1), frame(2), b""):
            here.send(data)
        foreign.sendto(frame(9), os.fspath(here.bridge))
        os.kill(bridges[0].process.pid, signal.SIGCONT)
    here.send(b"")
    here.send(frame(3))
    assert [there.receive() for _ in range(3)] == [frame(n) for n in (1, 2, 3)]
    told = counters(bridges[0], 3)
    assert (told["published"], told["malformed"], told["foreign"]) == (3, 6, 1)


@pytest.mark.parametrize(
    ("option", "reason"), [("max_packet_size", "its packet has "), ("message_size_limit", "Packet too large")]
)
def test_a_frame_that_is_larger_than_the_brokers_packets_does_not_block_others(
    tmp_path: Path, option: str, reason: str
) -> None:
    with ExitStack() as stack:
        bench = Bench(tmp_path, stack, f"{option} 700")
        bridges = bench.joined()
        here, there = bench.cores
        # Queue the frames while the bridge is stopped, so that it reads several of them at once.
        os.kill(bridges[0].process.pid, signal.SIGSTOP)
        small = [frame(number) + bytes(200) for number in range(6)]
        for data in (*small[:4], bytes(1500), small[4], bytes(1400), small[5]):
            here.send(data)
        os.kill(bridges[0].process.pid, signal.SIGCONT)
        assert [there.receive() for _ in small] == small
        told = counters(bridges[0], len(small))
        assert (told["published"], told["too_large"]) == (len(small), 2)
        assert counters(bridges[1])["missed"] == 0
        assert f"dropped a frame of 1500 bytes (counted as too_large): {reason}" in bridges[0].log
        announced = "the broker allows packets of 700 bytes, but the longest frames need "
        for bridge in bridges:
            # mosquitto does not announce its `message_size_limit`.
            assert (announced in bridge.log) is (option == "max_packet_size")


def test_the_longest_frame_fits_into_the_packets_that_the_bridge_asks_for(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bench = Bench(tmp_path, stack, "max_packet_size 700")
        bench.bridge(0).wait_log("the longest frames need ")
        (needed,) = {int(number) for number in re.findall(r"frames need (\d+)", (tmp_path / "wire0.log").read_text())}
    home = tmp_path / "again"
    home.mkdir()
    with ExitStack() as stack:
        bench = Bench(home, stack, f"max_packet_size {needed}")
        bridges = bench.joined()
        bench.cores[0].send(bytes(FRAME_MAX))
        assert bench.cores[1].receive() == bytes(FRAME_MAX)
        assert "the longest frames need" not in bridges[0].log


def unopened_bridge(directory: Path) -> Bridge:
    address = parse_address(f"unix:{directory}/wire,peer={directory}/core")
    assert isinstance(address, UnixAddress)
    return Bridge(parse_broker("mqtt://127.0.0.1/lab"), ("core0", "core1"), address, NoFdStore())


def test_what_the_broker_restricts_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bridge = unopened_bridge(tmp_path)
    limits = Limits("id", False, 60, 30, 20, None, 2, False, 0, True, True)
    bridge._check_limits(limits)
    assert "keeps frames only for 60 s while a side is offline" in caplog.text
    assert "does not keep retained messages" in caplog.text
    caplog.clear()
    bridge._check_limits(attrs.evolve(limits, session_expiry=86_400, retain_available=True))
    assert caplog.text == ""


class EchoingConnection:
    """A fake connection that delivers other messages on `topic` before or after the bridge's own status."""

    def __init__(self, topic: str, before: list[bytes], after: list[bytes]) -> None:
        self.entry, self.received = trio.open_memory_channel[Received](10)
        self._topic, self._before, self._after = topic, before, after

    def _deliver(self, payload: bytes, topic: str = "") -> None:
        self.entry.send_nowait(Received(topic or self._topic, payload, not topic, None, None, None))

    async def subscribe(self, _topics: list[str], _at_qos_0: list[str]) -> None:
        pass

    async def publish(self, messages: list[Message], **_: object) -> list[None]:
        for payload in self._before:
            self._deliver(payload)
        for message in messages:
            self._deliver(message.payload, message.topic)
        for payload in self._after:
            self._deliver(payload)
        return [None] * len(messages)

    async def acknowledge(self, _received: Received) -> None:
        pass


@pytest.mark.parametrize(
    ("before", "after", "topic", "is_taken"),
    [
        ([1, 2], [], "lab/core0/status", False),
        ([], [1], "lab/core0/status", False),
        ([], [1, 1], "lab/core0/status", False),  # The broker has restored the same older state twice.
        ([], [2, 1], "lab/core0/status", False),
        ([], [1, 2], "lab/core0/status", True),
        ([], [1, 2], "x/core0/status", False),  # Another program has subscribed to this topic in the session.
    ],
)
def test_only_a_process_that_connects_again_is_another_process(
    tmp_path: Path, before: list[int], after: list[int], topic: str, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = unopened_bridge(tmp_path)
    statuses = ([encode_status("online", "z", number) for number in numbers] for numbers in (before, after))
    connection: Any = EchoingConnection(topic, *statuses)

    async def sleep(_connection: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(bridge, "_publish_all", sleep)

    async def main() -> None:
        with trio.move_on_after(60):  # The clock is simulated.
            await bridge._exchange(connection)

    with pytest.raises(SessionTakenError) if is_taken else contextlib.nullcontext():
        trio.run(main, clock=MockClock(autojump_threshold=0))


def test_frames_wait_for_a_side_that_was_never_started(bench: Bench) -> None:
    bridge = bench.bridge(0)
    bench.cores[0].send(frame(1))
    bridge.wait_log("core1 was never online, or the broker has discarded its session")
    bench.bridge(1)
    assert bench.cores[1].receive() == frame(1)


def test_the_position_request_is_repeated(bench: Bench) -> None:
    """Because the test has subscribed, core 0's side cannot notice that core 1's side has not subscribed."""
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bench.bridge(0)
    assert reader.next(lambda told: told.topic == "lab/wire/core0/frames").payload.startswith(b"inw1")
    bench.cores[0].send(frame(1))
    bench.bridge(1)
    assert bench.cores[1].receive() == frame(1)


def test_the_broker_keeps_frames_for_a_stopped_side(bench: Bench) -> None:
    _, away = bench.joined()
    bench.cores[0].send(LAST)
    assert bench.cores[1].receive() == LAST
    assert away.end() == 0
    for number in range(WINDOW // 2):
        bench.cores[0].send(frame(number))
    bench.bridge(1)
    assert [bench.cores[1].receive() for _ in range(WINDOW // 2)] == [frame(n) for n in range(WINDOW // 2)]


def test_a_core_that_does_not_read_overflows_no_queue(bench: Bench) -> None:
    """The sender must block before the broker's queue of 1,000 messages or any other queue overflows."""
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
    assert sender.is_alive()  # The sender is blocked.
    while len(received) < total:
        received.append(there.receive())
    sender.join()
    assert received == [frame(number) for number in range(total)]


def test_repeated_restarts_without_state_overflow_no_queue(bench: Bench) -> None:
    """Without an fd store, each restart resets the sequence numbers. The other side is down during the restarts."""
    bridge, away = bench.joined()
    bench.cores[0].send(frame(0))
    assert bench.cores[1].receive() == frame(0)
    away.end(signal.SIGKILL)
    bench.cores[0].socket.setblocking(False)
    for _ in range(6):
        for number in range(1, 400):
            with contextlib.suppress(BlockingIOError, FileNotFoundError, ConnectionRefusedError):
                bench.cores[0].send(frame(number))
                threading.Event().wait(0.0005)
        bridge.end(signal.SIGKILL)
        bridge = bench.bridge(0)
    assert "being dropped" not in bench.broker.log
    bench.cores[0].socket.settimeout(HANG)
    back = bench.bridge(1)
    bench.cores[0].send(LAST)
    while bench.cores[1].receive() != LAST:
        pass
    assert counters(back)["missed"] == 0


def test_reconnections_leave_room_for_frames_in_the_queue_of_the_other_side(tmp_path: Path) -> None:
    """Each reconnection publishes two status messages. The other side is down and needs only the last of them."""

    def is_online(told: Published) -> bool:
        return told.topic == "lab/wire/core0/status" and told.body["state"] == "online"

    with ExitStack() as stack:
        bench = Bench(tmp_path, stack, "max_queued_messages 8")
        relay, reader = Relay(bench.broker, stack), Reader(bench.broker)
        stack.callback(reader.close)
        bridge, away = bench.bridge(0, relay.url), bench.bridge(1)
        away.wait_log("core0 is online")
        bench.cores[0].send(LAST)
        assert bench.cores[1].receive() == LAST
        counters(bridge, 1)
        counters(away)  # Let this side acknowledge the frame before it ends.
        assert away.end() == 0
        reader.next(is_online)
        for _ in range(6):
            relay.cut()
            reader.next(is_online)
        for number in range(6):
            bench.cores[0].send(frame(number))
        counters(bridge, 7)
        assert "being dropped" not in bench.broker.log
        back = bench.bridge(1)
        assert [bench.cores[1].receive() for _ in range(6)] == [frame(number) for number in range(6)]
        assert counters(back)["missed"] == 0
        back.wait_log("core0 is online", 2)


def test_frames_wait_for_a_core_that_left(bench: Bench) -> None:
    _, bridge = bench.joined()
    here, there = bench.cores
    there.leave()
    for number in range(5):
        here.send(frame(number))
    bridge.wait_log("frames are queued for the core")
    there.socket = there.bound()
    assert [there.receive() for _ in range(5)] == [frame(n) for n in range(5)]


def test_a_removed_socket_path_is_recreated_without_loss(bench: Bench) -> None:
    bridges = bench.joined()
    here, there = bench.cores
    bench.broker.end()
    bridges[0].wait_log("frames are queued; retrying")
    for number in range(5):
        here.send(frame(number))
    here.bridge.unlink()
    bridges[0].wait_log("bound a new socket")
    for number in range(5, 10):
        here.send(frame(number))
    bench.broker.start()
    assert [there.receive() for _ in range(10)] == [frame(n) for n in range(10)]


def test_two_processes_for_the_same_side_are_an_error(bench: Bench) -> None:
    bridge = bench.bridge(0)
    words = [word.replace("/wire0,", "/other,") for word in bench.words(0)]
    other = Gateway(bench.home / "other.log", *words)
    bench.stack.callback(other.close)
    deadline = time.monotonic() + HANG
    # Some brokers report the takeover to the first process. With other brokers, the process with the lower random ID
    # ends.
    while bridge.process.poll() is None and other.process.poll() is None:
        assert time.monotonic() < deadline
    ended, left, path = (bridge, other, "other") if other.process.poll() is None else (other, bridge, "wire0")
    assert ended.process.wait(HANG) == 69
    assert "another process also runs as core0: stop one of them" in ended.log
    bench.cores[0].bridge = bench.home / path
    bench.cores[0].send(frame(1))
    bench.bridge(1)
    assert bench.cores[1].receive() == frame(1)
    assert left.process.poll() is None


def test_a_broker_restored_from_an_older_state_is_accepted(bench: Bench) -> None:
    """An old retained status of a predecessor must not count as a second process on the same side."""
    bench.joined()[0].end()
    bench.broker.end()  # On SIGTERM, mosquitto saves its state.
    older = (bench.broker.directory / "mosquitto.db").read_bytes()
    bench.broker.start()
    bridge = bench.bridge(0)
    bridge.wait_log("core1 is online")
    bench.broker.end(signal.SIGKILL)
    (bench.broker.directory / "mosquitto.db").write_bytes(older)
    before = bridge.log.count("connected as core0")
    bench.broker.start()
    bridge.wait_log("connected as core0", before + 1)
    bench.cores[0].send(frame(1))
    assert bench.cores[1].receive() == frame(1)
    assert bridge.process.poll() is None


def test_an_invalid_configuration_is_one_error_line(bench: Bench) -> None:
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


def test_a_refused_reload_changes_nothing(bench: Bench) -> None:
    config = bench.home / "gateway.json"
    config.write_text("{}")
    bridge = Gateway(bench.home / "wire0.log", *bench.words(0), "--config", config)
    bench.stack.callback(bridge.close)
    bridge.wait_ready()
    bench.bridge(1)
    config.write_text("{")
    bridge.process.send_signal(signal.SIGHUP)
    bridge.wait_log("reload refused, keeping the old configuration")
    bench.cores[0].send(frame(1))
    assert bench.cores[1].receive() == frame(1)
    assert counters(bridge, 1)["published"] == 1


@pytest.mark.parametrize(("lost", "text"), [(1, "1 frame"), (3, "3 frames")])
def test_a_gap_is_counted_and_logged(bench: Bench, lost: int, text: str) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bridge = bench.bridge(0)
    reader.next(lambda told: told.topic == "lab/wire/core0/status" and told.body["state"] == "online")
    for first in (1, 2 + lost):
        reader.publish("lab/wire/core1/frames", Batch(bytes(8), first, [frame(first)]).encode())
        assert bench.cores[0].receive() == frame(first)
    bridge.wait_log(f"lost {text} of core1 that the broker had acknowledged")
    assert counters(bridge)["missed"] == lost


def restart_broker_without_sessions(bench: Bench, bridges: tuple[Gateway, Gateway], reader: Reader) -> None:
    """Restart the broker, which forgets all sessions, while both sides are stopped. Continue core 0's side."""
    for bridge in bridges:
        wait_stopped(bridge.process.pid)
    bench.broker.end(signal.SIGKILL)
    bench.broker.start()
    reader.settle()  # The reader has subscribed again.
    reader.messages.queue.clear()
    bridges[0].process.send_signal(signal.SIGCONT)


def test_a_loss_is_counted_before_the_other_side_has_written_a_frame(bench: Bench) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    relay = Relay(bench.broker, bench.stack)
    bridges = bench.bridge(0), bench.bridge(1, relay.url)
    reader.next(lambda told: told.topic == "lab/wire/core1/written")
    wait_stopped(bridges[1].process.pid)
    relay.cut()
    reader.next(lambda told: told.topic == "lab/wire/core1/status" and told.body["state"] == "offline")
    for number in range(3):
        bench.cores[0].send(frame(number))
    assert counters(bridges[0], 3)["published"] == 3
    restart_broker_without_sessions(bench, bridges, reader)
    bridges[1].process.send_signal(signal.SIGCONT)
    bridges[1].wait_log("lost 3 frames of core0 that the broker had acknowledged")
    bench.cores[0].send(LAST)
    assert bench.cores[1].receive() == LAST
    assert counters(bridges[1])["missed"] == 3


def test_a_loss_is_counted_although_no_frame_follows(bench: Bench) -> None:
    """The broker restores an older state of both sessions: no side can see that it has lost frames."""
    bridge, away = bench.joined()
    bench.cores[0].send(frame(0))
    assert bench.cores[1].receive() == frame(0)
    counters(bridge, 1)
    wait_stopped(away.process.pid)
    bench.broker.end()  # On SIGTERM, mosquitto saves its state.
    older = (bench.broker.directory / "mosquitto.db").read_bytes()
    bench.broker.start()
    for number in range(1, 4):
        bench.cores[0].send(frame(number))
    counters(bridge, 4)
    bench.broker.end(signal.SIGKILL)
    (bench.broker.directory / "mosquitto.db").write_bytes(older)
    bench.broker.start()
    away.process.send_signal(signal.SIGCONT)
    away.wait_log("lost 3 frames of core0 that the broker had acknowledged")
    assert "discarded the session" not in bridge.log + away.log
    assert counters(away)["missed"] == 3


def test_frames_wait_for_the_other_side_after_the_broker_has_discarded_the_sessions(bench: Bench) -> None:
    """Because the test has subscribed, the broker acknowledges frames before core 1's side has subscribed again."""
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bridges = bench.joined()
    bench.cores[0].send(frame(0))
    assert bench.cores[1].receive() == frame(0)
    restart_broker_without_sessions(bench, bridges, reader)
    for number in range(1, 4):
        bench.cores[0].send(frame(number))
    reader.next(lambda told: told.topic == "lab/wire/core0/frames")
    bridges[1].process.send_signal(signal.SIGCONT)
    assert [bench.cores[1].receive() for _ in range(3)] == [frame(number) for number in range(1, 4)]
    assert counters(bridges[1])["missed"] == 0


@pytest.mark.parametrize("is_online", [True, False])
def test_a_request_for_a_report_is_repeated(tmp_path: Path, is_online: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A broker may drop a request although it acknowledges it, for example because of an ACL."""
    bridge = unopened_bridge(tmp_path)
    memory = Memory.open(None)
    bridge._progress = Progress(memory.numbers)
    bridge._progress.number(1)
    bridge._other_is_online = is_online
    requests: list[float] = []

    class DroppingConnection:
        async def publish(self, messages: list[Message], **_: object) -> list[None]:
            requests.append(trio.current_time())
            if len(requests) == 4:
                bridge._progress.reported(1)
                bridge._reported.set()
            return [None] * len(messages)

    async def main() -> None:
        start = trio.current_time()
        await bridge._await_room(DroppingConnection())  # type: ignore[arg-type]
        assert [round(request - start) for request in requests] == [0, 10, 30, 70]

    caplog.set_level("INFO")
    trio.run(main, clock=MockClock(autojump_threshold=0))
    memory.close()
    warned = [line for line in caplog.messages if "core1 is online, but has not confirmed the last frames" in line]
    assert len(warned) == is_online
    assert ("works again" in caplog.text) is is_online


def test_each_online_status_repeats_the_request_for_a_report(tmp_path: Path) -> None:
    """A broker that restarts without sessions publishes no `offline` status in between."""
    bridge = unopened_bridge(tmp_path)
    bridge._take_status(True)
    bridge._reported = trio.Event()
    bridge._take_status(True)
    assert bridge._reported.is_set()


def test_a_report_may_include_frames_that_the_broker_has_not_acknowledged() -> None:
    """A broken connection can lose an acknowledgement of frames that the other side has written."""
    memory = Memory.open(None)
    progress = Progress(memory.numbers)
    progress.number(1)
    progress.reported(progress.following + 5)
    for _ in range(WINDOW):
        assert progress.has_room
        progress.taken()
    assert not progress.has_room
    memory.close()


def test_one_forged_message_does_not_stop_the_bridge(bench: Bench) -> None:
    """After a message with a high number, the other side takes the next frames for duplicates."""
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bridges = bench.joined()
    here, there = bench.cores
    here.send(frame(0))
    assert there.receive() == frame(0)
    own = reader.next(lambda told: told.topic == "lab/wire/core0/frames" and told.payload.endswith(frame(0)))
    forged = Batch(Batch.decode(own.payload).boot, NUMBER_MAX, [])
    reader.publish("lab/wire/core0/frames", forged.encode())
    bridges[1].wait_log("frames of core0 that the broker had acknowledged")
    for number in range(2 * WINDOW):
        here.send(frame(number))
    bridges[0].wait_log("core1 has confirmed frames that do not exist: another program publishes to the topics")
    here.send(LAST)
    while there.receive() != LAST:
        pass
    assert counters(bridges[1])["duplicates"] <= WINDOW


def test_forged_reports_do_not_stop_the_bridge(tmp_path: Path) -> None:
    bridge = unopened_bridge(tmp_path)
    memory = Memory.open(None)
    bridge._progress = Progress(memory.numbers)
    bridge._progress.number(1)
    boots: list[bytes] = []

    class ForgingConnection:
        async def publish(self, messages: list[Message], **_: object) -> list[None]:
            boots.append(Batch.decode(messages[0].payload).boot)
            bridge._progress.reported(NUMBER_MAX)
            bridge._reported.set()
            return [None] * len(messages)

    async def main() -> None:
        await bridge._await_room(ForgingConnection())  # type: ignore[arg-type]
        assert (len(boots), len(set(boots)), bridge._progress.has_room) == (2, 2, True)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    memory.close()


@pytest.mark.parametrize("is_inherited", [False, True])
def test_a_process_with_stored_numbers_reports_a_discarded_session(
    tmp_path: Path, is_inherited: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = unopened_bridge(tmp_path)
    memory = Memory.open(None)
    if is_inherited:
        Progress(memory.numbers).wrote(bytes(8), 1)
    bridge._progress = Progress(memory.numbers)
    bridge._start_session()
    assert ("discarded the session of this side: queued messages may be lost" in caplog.text) is is_inherited
    memory.close()


def test_retained_frames_and_reports_are_dropped(bench: Bench) -> None:
    """A new subscription receives retained messages, so each start would write the frames again."""
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    reader.publish("lab/wire/core1/frames", Batch(bytes(8), 1, [frame(1)]).encode(), retain=True)
    reader.publish("lab/wire/core1/written", b'{"boot": "00", "number": 1}', retain=True)
    bridge, _ = bench.joined()
    bench.cores[1].send(frame(2))
    assert bench.cores[0].receive() == frame(2)
    assert counters(bridge)["malformed"] == 2
    assert "dropped a retained message, which no bridge publishes (counted as malformed): delete it" in bridge.log


def test_messages_that_come_back_are_dropped(bench: Bench) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bridge, _ = bench.joined()
    bench.cores[0].send(frame(1))
    own = reader.next(lambda told: told.topic == "lab/wire/core0/frames" and told.payload.endswith(frame(1)))
    reader.publish("lab/wire/core1/frames", own.payload)
    bridge.wait_log("dropped a message that this side has published (counted as malformed)")
    bench.cores[1].send(frame(2))
    assert bench.cores[0].receive() == frame(2)
    assert counters(bridge)["malformed"] == 1


def test_frames_that_the_broker_delivers_twice_are_written_once(bench: Bench) -> None:
    """mosquitto delivers a message once for each subscription that another program has left in the session."""
    words = ["-V", "5", "-p", str(bench.broker.port), "-i", client_id("lab/wire/core1"), "-c", "-x", "100"]
    subprocess.run(["mosquitto_sub", *words, "-q", "1", "-t", "lab/wire/#", "-E"], check=True, timeout=HANG)
    _, bridge = bench.joined()
    for number in range(3):
        bench.cores[0].send(frame(number))
    assert [bench.cores[1].receive() for _ in range(3)] == [frame(number) for number in range(3)]
    told = counters(bridge)
    assert (told["written"], told["missed"]) == (3, 0)


def test_an_inherited_socket_with_another_path_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert "the inherited socket has a different address" in caplog.text


@pytest.mark.parametrize("topic", TOPICS)
def test_frames_refused_by_an_acl_wait(bench: Bench, topic: str) -> None:
    """The ACL lacks one of the topics to which core 1's side publishes."""
    acl = bench.home / "acl"
    allowed = [f"topic readwrite lab/wire/{end}/{name}" for end in ("core0", "core1") for name in TOPICS]
    acl.write_text("\n".join(line for line in allowed if line != f"topic readwrite lab/wire/core1/{topic}") + "\n")
    acl.chmod(0o600)
    bench.broker.end()
    with (bench.broker.directory / "mosquitto.conf").open("a") as conf:
        conf.write(f"acl_file {acl}\n")
    bench.broker.start()
    bridges = bench.bridge(0), bench.bridge(1)
    bridges[1].wait_log(f"lab/wire/core1/{topic}: the broker refused the message: Not authorized")
    for core in bench.cores:
        core.send(frame(1))
    acl.write_text("\n".join(allowed) + "\n")
    assert bench.broker.process is not None
    bench.broker.process.send_signal(signal.SIGHUP)
    assert [core.receive() for core in bench.cores] == [frame(1)] * 2
    assert "Traceback" not in bridges[0].log + bridges[1].log


def test_statistics_can_be_logged_before_opening() -> None:
    """SIGUSR1 can arrive before the bridge is open."""
    address = parse_address("unix:/x/wire,peer=/x/core")
    assert isinstance(address, UnixAddress)
    bridge = Bridge(parse_broker("mqtt://127.0.0.1"), ("core0", "core1"), address, NoFdStore())
    bridge.log_statistics()
    bridge.close()


def test_a_number_that_the_next_process_cannot_use_is_refused() -> None:
    """Any client that is allowed to publish to the topic could otherwise make the next process discard all numbers."""
    for first, is_valid in ((NUMBER_MAX - 2, True), (NUMBER_MAX - 1, False), ((1 << 63) - 1, False)):
        data = Batch(bytes(8), first, [b"x", b"y"]).encode()
        if not is_valid:
            with pytest.raises(ValueError, match="wrong header"):
                Batch.decode(data)
            continue
        memory = Memory.open(None)
        Progress(memory.numbers).wrote(bytes(8), Batch.decode(data).first + 1)
        following = Memory.open(memory.fd)
        assert (following.fd, Progress(following.numbers).written(bytes(8))) == (memory.fd, NUMBER_MAX - 1)
        following.close()


@pytest.mark.parametrize("topic", TOPICS)
def test_invalid_messages_are_ignored(bench: Bench, topic: str) -> None:
    reader = Reader(bench.broker)
    bench.stack.callback(reader.close)
    bridge = bench.bridge(0)
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
    bench.bridge(1)
    bench.cores[1].send(frame(2))
    assert bench.cores[0].receive() == frame(2)
    assert counters(bridge)["malformed"] >= 8
    assert "Traceback" not in bridge.log


class Flow:
    """Numbered frames that one thread sends and another thread receives, until `check` is called."""

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
        """Check that all frames arrived in order. Ignore duplicates, and return their number."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive(), (self._sent, self._received[-3:])
        assert list(dict.fromkeys(self._received)) == [*map(frame, range(self._sent)), LAST]
        duplicates = len(self._received) - self._sent - 1
        sys.stdout.write(f"{self._sent} frames, {duplicates} duplicates\n")
        return duplicates


LAST = encode(b"last", MAC)
ROUNDS = int(os.environ.get("INCO_TRIO_WIRE_ROUNDS", "25"))
"""The number of faults in a random walk. Thousands of faults take minutes."""


@pytest.mark.thorough
def test_nothing_is_lost_when_broker_or_reader_restart(bench: Bench) -> None:
    bridges = list(bench.joined())
    flow = Flow(*bench.cores)
    choice = random.Random(5)  # noqa: S311
    for _ in range(ROUNDS):
        what = choice.choice(["reader", "reader killed", "broker", "hang up"])
        if what == "broker":
            bench.broker.end()
            bench.broker.start()
        elif what == "hang up":
            for bridge in bridges:
                bridge.process.send_signal(signal.SIGHUP)
        else:
            bridges[1].end(signal.SIGKILL if "killed" in what else signal.SIGTERM)
            bridges[1] = bench.bridge(1)
        threading.Event().wait(choice.random() / 4)
    flow.check()
    for bridge in bridges:
        assert "that the broker had acknowledged" not in bridge.log
        assert "Traceback" not in bridge.log


@pytest.mark.s6
def test_nothing_is_lost_under_s6_when_any_process_restarts(bench: Bench) -> None:
    """Kill, restart and pause both sides, and restart the broker, while both cores send."""
    scan, services = bench.home / "scan", []
    for end in (0, 1):
        link = f"unix:{bench.home}/wire{end},peer={bench.home}/core{end}"
        words = [
            "s6",
            str(scan),
            "--user",
            "root",
            "--mqtt-link",
            f"{bench.broker.url}/wire",
            "--iface",
            link,
            "--end",
            f"core{end}",
        ]
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
        # Each kill can duplicate two frames: one that was being written and one that was not yet acknowledged.
        assert flow.check() <= 2 * kills
    assert "Traceback" not in running.log
    assert "never came" not in running.log


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["mqtt://h", "eth0", "--end", "core0"], "a bridge joins Unix sockets"),
        (["mqtt://h", "unix:/a", "--end", "core0"], "peer=REMOTE is missing"),
        (["mqtt://h", "unix:/a,peer=/b", "--end", "core2"], "invalid choice: 'core2'"),
        (["mqtt://h", "unix:/a,peer=/b"], "--end"),
        (["http://h", "unix:/a,peer=/b", "--end", "core0"], "mqtt://"),
        (["mqtt://h", "unix:/a,peer=/b", "--end", "core0", "--fd-holder", "/x"], "S6_FD#"),
    ],
)
def test_invalid_arguments_are_refused(words: list[str], text: str) -> None:
    done = subprocess.run([*COMMAND, "mqtt-link", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert text in done.stderr.splitlines()[-1]


def test_an_unusable_socket_path_is_an_error(tmp_path: Path) -> None:
    words = ["mqtt-link", f"mqtt://127.0.0.1:{free_port()}", "--end", "core1"]
    taken = tmp_path / "taken"
    taken.write_text("")
    for path, code in ((tmp_path / "missing/wire", 69), (taken, 69)):
        done = subprocess.run(
            [*COMMAND, *words, f"unix:{path},peer={tmp_path}/core"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith(f"inco-trio: error: {path}: ")


def test_two_proxies_communicate_over_the_bridge(bench: Bench) -> None:
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
