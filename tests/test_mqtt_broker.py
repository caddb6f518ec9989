"""Tests of the gateway with brokers that have limits, TLS and ACLs, and over connections that are cut or stalled."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from inco_trio.errors import IncoError
from inco_trio.mqtt.configuration import Credentials, parse_broker
from inco_trio.mqtt.connection import open_connection
from inco_trio.mqtt.gateway import REQUEST_MAX, RESPONSE_ATTEMPTS
from inco_trio.mqtt.session import BrokerRefusedError, Limits, Message
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.mosquitto import ORIGINAL, Certificates, Mosquitto, Reader
from tests.support_control import FRAME
from tests.support_mqtt import Bench, Relay, check_order
from tests.support_proxy import write_udrv

pytestmark = pytest.mark.tools

SIGNALS = [f"s{number}" for number in range(10)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def with_signals(bench: Bench) -> socket.socket:
    """Start the proxy with the outbound signals in SIGNALS, and return core 1's socket."""
    config = bench.home / "udrv.json"
    write_udrv(config, bench.board.irq, {}, {name: f"{name}_trig" for name in SIGNALS})
    peer = bench.board.core1()
    bench.board.running("--config", str(config))
    return peer


def names(peer: socket.socket, number: int) -> list[str]:
    """Receive `number` frames as core 1, and return their signal names."""
    return [peer.recv(2048)[14:].rstrip(b"\0").decode() for _ in range(number)]


def announced(broker: Mosquitto) -> Limits:
    async def main() -> Limits:
        async with open_connection(parse_broker(broker.url), Credentials(), "test", patience=HANG) as connection:
            return connection.limits

    return trio.run(main)


@pytest.mark.parametrize("lines", [(), ("max_topic_alias 3",), ("max_inflight_messages 1",), ("max_keepalive 20",)])
def test_notifications_arrive_in_order_within_the_limits(tmp_path: Path, stack: ExitStack, lines: tuple[str]) -> None:
    bench = Bench(tmp_path, stack, *lines)
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    bench.gateway()
    status = reader.until_status(bench.name, state="online").body["broker"]
    limits = announced(bench.broker)
    assert status["receive_maximum"] == limits.receive_maximum == (1 if "max_inflight_messages 1" in lines else 20)
    assert status["topic_alias_maximum"] == limits.topic_alias_maximum
    assert status["client_id"].startswith("inco-trio-")
    for _ in range(500):
        bench.board.inbound(peer)
    duplicates = check_order(reader, 500)
    # mosquitto 2.0.21 closes the first connection of a client whose keep-alive exceeds max_keepalive.
    assert duplicates == 0 or "has exceeded timeout, disconnecting" in bench.broker.log


def test_what_is_larger_than_the_brokers_packets_is_left_out(tmp_path: Path, stack: ExitStack) -> None:
    bench = Bench(tmp_path, stack, "max_packet_size 900")
    bench.broker.start()
    peer = with_signals(bench)
    reader = Reader(bench.broker, "lab/#")
    stack.callback(reader.close)
    gateway = bench.gateway(send={"*": ["*"]}, response_prefix="lab2", status_seconds=0.1)
    reader.until_status(bench.name, state="online")
    gateway.wait_log(f"lab/{bench.name}/counters: not published: its packet has ")
    assert "the broker allows only 900" in gateway.log
    reader.publish(f"lab/{bench.name}/send/s1")
    assert names(peer, 1) == ["s1"]
    assert next(reader.notifications()).topic.endswith("/outbound/s1")
    assert gateway.log.count("not published") == 1
    assert "retrying" not in gateway.log
    while bench.board.status()["history"]["acknowledged"] != 1:
        pass


def test_a_broker_without_retained_messages_is_used(tmp_path: Path, stack: ExitStack) -> None:
    bench = Bench(tmp_path, stack, "retain_available false")
    bench.broker.start()
    bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    gateway = bench.gateway()
    reader.until_status(bench.name, state="online")
    gateway.wait_log("the broker does not keep retained messages")
    bench.board.trigger()
    assert next(reader.notifications()).body["sequence"] == 1
    gateway.end(signal.SIGKILL)
    reader.until_status(bench.name, state="offline")


def test_a_broker_with_qos_0_only_is_refused(tmp_path: Path, stack: ExitStack) -> None:
    broker = Mosquitto(tmp_path / "broker", "allow_anonymous true")
    conf = broker.directory / "mosquitto.conf"
    conf.write_text(conf.read_text() + "max_qos 0\n")
    stack.callback(broker.end)
    broker.start()
    with pytest.raises(IncoError) as refused:
        announced(broker)
    assert isinstance(refused.value, BrokerRefusedError)
    assert "QoS" in str(refused.value)


def test_requests_are_sent_in_the_order_of_the_broker(tmp_path: Path, stack: ExitStack) -> None:
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    reader = bench.reader()
    bench.gateway(send={"*": ["*"]})
    reader.until_status(bench.name, state="online")
    expected = SIGNALS * 20
    for name in expected:
        reader.publish(f"lab/{bench.name}/send/{name}")
    assert names(peer, len(expected)) == expected


def test_only_topics_of_requests_send_signals(tmp_path: Path, stack: ExitStack) -> None:
    """Another program that uses the gateway's client identifier can leave subscriptions in the gateway's session."""
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    reader = bench.reader()
    gateway = bench.gateway(send={"*": ["*"]})
    status = reader.until_status(bench.name, state="online")
    words = ["-V", "5", "-p", str(bench.broker.port), "-i", status.body["broker"]["client_id"], "-c", "-x", "100"]
    subprocess.run(["mosquitto_sub", *words, "-q", "1", "-t", "#", "-E"], check=True, timeout=HANG)
    gateway.wait_log("works again")
    reader.publish("s0")
    reader.publish(f"lab/{bench.name}/send/s1/s2")
    reader.publish(f"lab/{bench.name}/send/s3")
    assert names(peer, 1) == ["s3"]
    gateway.wait_log(": does another program use the client identifier?")
    assert gateway.log.count("ignored a message with the topic") == 1


def test_boards_do_not_wait_for_the_requests_of_each_other(tmp_path: Path, stack: ExitStack) -> None:
    """Core 1 of one board has no socket. Therefore, the link of this board does not accept frames."""
    boards = tmp_path / "boards"
    boards.mkdir()
    for name in ("b1", "b2"):
        link = f"unix:{tmp_path}/{name}-0,peer={tmp_path}/{name}-1"
        (boards / f"{name}.json").write_text(json.dumps({"link": link, "irq_dir": f"{tmp_path}/{name}"}))
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    proxy = Proxy(None, ["--boards", str(boards), "--control", str(bench.board.path)], {}, tmp_path / "log")
    stack.callback(proxy.close)
    proxy.wait_ready()
    reader = bench.reader()
    bench.gateway(send={"*": ["*"]})
    waiting = {"lab/b1/status", "lab/b2/status"}
    while waiting:
        waiting.discard(reader.next(lambda told: told.topic.endswith("/status")).topic)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(f"{tmp_path}/b2-1")
        peer.settimeout(HANG)
        reader.publish("lab/b1/send/redun_notify_irq")
        reader.publish("lab/b2/send/redun_notify_irq")
        assert names(peer, 1) == ["redun_notify_irq"]


@pytest.mark.parametrize("prefix", [None, "answers"])
def test_no_request_makes_the_gateway_publish_elsewhere(tmp_path: Path, stack: ExitStack, prefix: str | None) -> None:
    """No client may use the gateway's permissions to publish, whether or not the signal is permitted."""
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    config = {} if prefix is None else {"response_prefix": prefix}
    gateway = bench.gateway(send={"*": ["s1"]}, **config)
    everything = Reader(bench.broker, "#", name="everything")
    stack.callback(everything.close)
    everything.until_status(bench.name, state="online")
    elsewhere = [
        f"lab/{bench.name}/send/s1", "lab/host2/b1/send/s1", "answers", "answersx/1", "$SYS/x", "other", "a/b/c",
        f"lab/{bench.name}/status",
    ]  # fmt: skip
    for topic in elsewhere:
        for name in ("s1", "s2"):
            everything.publish(f"lab/{bench.name}/send/{name}", response=topic, correlation=b"17")
    assert names(peer, len(elsewhere)) == ["s1"] * len(elsewhere)
    everything.publish(f"lab/{bench.name}/send/s1")
    assert names(peer, 1) == ["s1"]
    # The gateway has handled all earlier requests, because it handles them in order.
    everything.publish("end")
    while (message := everything.next()).topic != "end":
        if message.payload:  # Requests have no payload; responses have one.
            assert message.topic.removeprefix(f"lab/{bench.name}/") in ("outbound/s1", "status", "counters")
            assert "sent" not in message.body
            assert "error" not in message.body
    assert bench.board.status()["counters"]["sent"] == len(elsewhere) + 1
    assert gateway.log.count("sent no response") == 1


def test_each_request_gets_a_response_over_a_cut_connection(tmp_path: Path, stack: ExitStack) -> None:
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    dice = random.Random(7)  # noqa: S311
    relay = Relay(bench.broker, stack)
    relay.bytes_until_cut = lambda: dice.randint(12_000, 24_000)
    reader = Reader(bench.broker, "answers/#")
    stack.callback(reader.close)
    watching = Reader(bench.broker, name="watching")
    stack.callback(watching.close)
    bench.gateway(relay.url, send={"*": ["*"]}, response_prefix="answers")
    watching.until_status(bench.name, state="online")
    peer.settimeout(0)
    missing = {b"%d" % number for number in range(100)}
    for number in range(100):
        reader.publish(f"lab/{bench.name}/send/s1", response="answers/1", correlation=b"%d" % number)
        drain(peer)
    while missing:
        message = reader.next()
        assert message.body == {"sent": 1} or message.body["error"] == "closed", message
        missing.discard(message.correlation or b"")
        drain(peer)
    assert relay.connections > 1


def test_no_request_ends_the_connection_again_and_again(tmp_path: Path, stack: ExitStack) -> None:
    """mosquitto 2.0 ends the connection of a client that publishes to a topic with more than 200 levels."""
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    reader = Reader(bench.broker, "answers/#")
    stack.callback(reader.close)
    watching = Reader(bench.broker, name="watching")
    stack.callback(watching.close)
    gateway = bench.gateway(send={"*": ["*"]}, response_prefix="answers")
    watching.until_status(bench.name, state="online")
    reader.publish(f"lab/{bench.name}/send/s1", response="answers" + "/x" * 300)
    reader.publish(f"lab/{bench.name}/send/s2", response="answers/1", correlation=b"17")
    assert reader.next().correlation == b"17"
    assert names(peer, RESPONSE_ATTEMPTS + 1) == ["s1"] * RESPONSE_ATTEMPTS + ["s2"]
    gateway.wait_log("gave up the response")


def test_requests_of_all_sizes_are_handled_or_dropped(tmp_path: Path, stack: ExitStack) -> None:
    """mosquitto 2.0.11 sends packets that are one byte larger than the client allows."""
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = with_signals(bench)
    reader = bench.reader()
    gateway = bench.gateway(send={"*": ["*"]})
    reader.until_status(bench.name, state="online")
    topic = f"lab/{bench.name}/send/s1"
    for size in range(REQUEST_MAX - 12, REQUEST_MAX + 1):
        reader.publish(topic, bytes(size - len(topic)))
    reader.publish(f"lab/{bench.name}/send/s2")
    while names(peer, 1) != ["s2"]:
        pass
    assert "bytes, but was allowed only" not in gateway.log


def drain(peer: socket.socket) -> None:
    """Receive all frames that are queued in core 1's socket."""
    try:
        while True:
            peer.recv(2048)
    except BlockingIOError:
        pass


def secured(tmp_path: Path) -> tuple[list[str], dict[str, str], tuple[Path, Path, Path]]:
    """Return the mosquitto.conf lines for TLS and an ACL, and the TLS files of the gateway and the reader."""
    ours = Certificates(tmp_path / "certificates")
    broker, gateway, reader = (ours.sign(name) for name in ("127.0.0.1", "gateway", "reader"))
    acl = tmp_path / "acl"
    acl.write_text("user gateway\ntopic readwrite lab/#\nuser reader\ntopic readwrite #\n")
    acl.chmod(0o600)
    lines = [
        f"cafile {ours.ca}", f"certfile {broker[0]}", f"keyfile {broker[1]}", "require_certificate true",
        "use_identity_as_username true", f"acl_file {acl}",
    ]  # fmt: skip
    files = {"ca_file": str(ours.ca), "certificate_file": str(gateway[0]), "key_file": str(gateway[1])}
    return lines, files, (ours.ca, *reader)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_nothing_is_lost_over_connections_that_are_cut_inside_packets(
    tmp_path: Path, stack: ExitStack, tls: bool
) -> None:
    lines, files, certificates = secured(tmp_path) if tls else ([], {}, None)
    bench = Bench(tmp_path, stack, *lines, tls=tls)
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = Reader(bench.broker, certificates=certificates)
    stack.callback(reader.close)
    dice = random.Random(3)  # noqa: S311
    relay = Relay(bench.broker, stack)
    relay.bytes_until_cut = lambda: dice.randint(20_000, 90_000)
    bench.gateway(relay.url, broker=files)
    for number in range(2000):
        bench.board.inbound(peer)
        if number % 500 == 250:
            relay.cut()
    check_order(reader, 2000)
    assert relay.connections > 3


def test_nothing_is_lost_over_connections_that_stall(tmp_path: Path, stack: ExitStack) -> None:
    bench = Bench(tmp_path, stack)
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    relay = Relay(bench.broker, stack)
    gateway = bench.gateway(relay.url)
    reader.until_status(bench.name, state="online")
    for _ in range(3):
        relay.stall()
        for _ in range(300):
            bench.board.inbound(peer)
        relay.resume()
        for _ in range(100):
            bench.board.inbound(peer)
    check_order(reader, 1200)
    assert relay.connections == 1
    # The gateway replaces a connection that never resumes, for example because a router has lost its state.
    assert gateway.end() == 0
    gateway = bench.gateway(relay.url, program=ORIGINAL)
    reader.until_status(bench.name, state="online")
    last = 1200
    # Repeat this: on a slow machine, the gateway may already be replacing a connection that did not stall.
    while "does not answer for 10 s" not in gateway.log:
        relay.stall()
        peer.sendto(FRAME, f"{bench.home}/core0")
        last += 1
        assert next(told.body["sequence"] for told in reader.notifications() if told.body["sequence"] >= last) == last


def test_publishing_is_checked_although_the_broker_accepts_the_connection(tmp_path: Path, stack: ExitStack) -> None:
    lines, files, certificates = secured(tmp_path)
    acl = tmp_path / "acl"
    acl.write_text("user gateway\ntopic readwrite lab/+/status\nuser reader\ntopic readwrite #\n")
    broker = Mosquitto(tmp_path / "broker", *lines, tls=True)
    stack.callback(broker.end)
    broker.start()
    assert certificates

    async def main() -> list[str | None]:
        where = open_connection(parse_broker(broker.url), Credentials(**files), "test", patience=HANG)
        async with where as connection:
            refusals = await connection.publish([Message("lab/b1/status", b""), Message("lab/b1/inbound/x", b"")])
            return [None if refusal is None else str(refusal) for refusal in refusals]

    assert trio.run(main) == [None, "Not authorized"]
