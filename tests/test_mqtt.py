"""Tests of the gateway with a real proxy and a real mosquitto."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inco_trio.mqtt.configuration import parse_broker
from inco_trio.mqtt.gateway import REQUEST_MAX
from inco_trio.mqtt.topics import level
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.faults.supervised import wait_path
from tests.mosquitto import ORIGINAL, Gateway, Reader
from tests.support_control import FRAME, Board
from tests.support_mqtt import Bench

pytestmark = pytest.mark.tools

PAGE = Path(__file__).parents[1] / "docs/mqtt.md"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def test_notifications_are_published(bench: Bench) -> None:
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    bench.gateway()
    reader.until_status(bench.name, state="online", running=True)
    notifications = reader.notifications()
    bench.board.inbound(peer)
    first = next(notifications)
    bench.board.trigger()
    second = next(notifications)
    boot = bench.board.status()["history"]["boot"]
    assert first.topic == f"lab/{bench.name}/inbound/ihub_hwwd_irq"
    assert second.topic == f"lab/{bench.name}/outbound/redun_notify_irq"
    for number, told in enumerate((first, second), 1):
        assert set(told.body) == {"time", "monotonic_ns", "sequence", "boot"}
        assert (told.body["sequence"], told.body["boot"], told.retain) == (number, boot, False)


def test_status_reports_the_end_of_a_gateway_and_of_a_proxy(bench: Bench) -> None:
    bench.broker.start()
    proxy = bench.proxy()
    reader = bench.reader()
    gateway = bench.gateway()
    reader.until_status(bench.name, state="online")
    proxy.stop()
    reader.until_status(bench.name, state="no proxy")
    proxy = bench.proxy()
    reader.until_status(bench.name, state="online")
    assert gateway.end() == 0
    reader.until_status(bench.name, state="offline")
    gateway = bench.gateway()
    reader.until_status(bench.name, state="online")
    gateway.end(signal.SIGKILL)
    reader.until_status(bench.name, state="offline")


def test_only_permitted_signals_are_sent(bench: Bench) -> None:
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = Reader(bench.broker, "answers/#")
    gateway = bench.gateway(send={"*": ["redun_notify_irq"]}, response_prefix="answers")
    watching = Reader(bench.broker, name="watching")
    watching.until_status(bench.name, state="online")
    send = f"lab/{bench.name}/send/"

    def ask(signal: str, payload: bytes = b"") -> object:
        reader.publish(send + signal, payload, response="answers/here", correlation=b"17")
        told = reader.next()
        assert (told.topic, told.correlation) == ("answers/here", b"17")
        return told.body.get("error", told.body)

    assert ask("redun_notify_irq") == {"sent": 1}
    peer.settimeout(HANG)
    assert b"redun_notify_irq" in peer.recv(2048)
    assert ask("redun_notify_irq", bytes(REQUEST_MAX - 300)) == {"sent": 1}
    assert b"redun_notify_irq" in peer.recv(2048)
    # The broker drops a request that is larger than the gateway's limit.
    reader.publish(send + "redun_notify_irq", bytes(1 << 20), response="answers/here", correlation=b"18")
    assert ask("ihub_hwwd_irq") == "not-permitted"
    assert ask("unlisted") == "not-permitted"
    assert ask("%2B") == "not-permitted"
    reader.publish(
        send + "redun_notify_irq", response=send + "redun_notify_irq"
    )  # The gateway publishes no answer if the response topic is a send topic.
    assert b"redun_notify_irq" in peer.recv(2048)
    assert ask("ihub_hwwd_irq") == "not-permitted"
    assert bench.board.status()["counters"]["sent"] == 3
    assert gateway.log.count("response topic outside of 'answers': sent no response") == 1
    for each in (reader, watching):
        each.close()


def test_nothing_is_lost_when_broker_gateway_or_network_fail(bench: Bench) -> None:
    bench.broker.start()
    peer = bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    gateway = bench.gateway()
    reader.until_status(bench.name, state="online")
    sent = 0

    def send(number: int) -> None:
        nonlocal sent
        for _ in range(number):
            bench.board.inbound(peer)
        sent += number

    def check() -> None:
        """Check that all notifications arrived in order. Ignore duplicates, which repeat a sequence number."""
        last = 0
        for told in reader.notifications():
            number = told.body["sequence"]
            assert number <= last + 1, "a gap"
            last = max(last, number)
            if last == sent:
                return

    send(300)
    bench.broker.end()
    send(300)
    bench.broker.start()
    send(100)
    gateway.end(signal.SIGKILL)
    send(300)
    gateway = bench.gateway()
    send(100)
    gateway.process.send_signal(signal.SIGSTOP)
    send(500)
    gateway.process.send_signal(signal.SIGCONT)
    send(300)
    bench.kill_broker(gateway, reader)
    send(310)
    check()


def test_the_command_of_the_page_runs(bench: Bench) -> None:
    (line,) = re.findall(r"^ {4}(inco-trio mqtt .*)$", PAGE.read_text(), re.MULTILINE)
    broker = parse_broker(line.split()[2])
    assert (broker.tls, line.split()[3]) == (True, "--config")
    bench.broker.start()
    bench.board.core1()
    bench.proxy()
    reader = bench.reader()
    gateway = bench.gateway()
    reader.until_status(bench.name, state="online")
    # A refused reload changes nothing, and a successful reload loses no notifications.
    (bench.home / "gateway.json").write_text('{"boards": []}')
    gateway.process.send_signal(signal.SIGHUP)
    while "reload refused" not in gateway.log:
        assert gateway.process.poll() is None
    (bench.home / "gateway.json").write_text("{}")
    gateway.process.send_signal(signal.SIGHUP)
    reader.until_status(bench.name, state="offline")
    reader.until_status(bench.name, state="online")
    bench.board.trigger()
    assert next(reader.notifications()).body["sequence"] == 1


def test_boards_can_be_added_and_removed(bench: Bench) -> None:
    boards = bench.home / "boards"
    boards.mkdir()

    def add(name: str) -> None:
        link = f"unix:{bench.home}/{name}-0,peer={bench.home}/{name}-1"
        (boards / f"{name}.json").write_text(json.dumps({"link": link, "irq_dir": f"{bench.home}/{name}"}))

    add("b1")
    add("b2")
    bench.broker.start()
    words = ["--boards", str(boards), "--control", str(bench.board.path)]
    proxy = Proxy(None, words, {}, bench.home / "log")
    bench.stack.callback(proxy.close)
    proxy.wait_ready()
    reader = bench.reader()
    gateway = bench.gateway(boards=["b1", "b3"])
    reader.until_status("b1", state="online")
    assert "b3: no proxy has a board with this name yet" in gateway.log
    add("b3")
    proxy.process.send_signal(signal.SIGHUP)
    reader.until_status("b3", state="online")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(f"{bench.home}/b3-1")
        for name in ("b2", "b3"):
            peer.sendto(FRAME, f"{bench.home}/{name}-0")
        assert next(reader.notifications()).topic == "lab/b3/inbound/ihub_hwwd_irq"
        # Notifications that precede the removal of a board still arrive once the broker is running again.
        bench.broker.end()
        for _ in range(200):
            peer.sendto(FRAME, f"{bench.home}/b3-0")
        (boards / "b3.json").unlink()
        proxy.process.send_signal(signal.SIGHUP)
        client = bench.board.client()
        while "b3" in [told["board"] for told in client.ask({"request": "status"})["status"]]:
            pass
        bench.broker.start()
        last = next(told for told in reader.notifications() if told.body["sequence"] == 201)
        assert last.topic == "lab/b3/inbound/ihub_hwwd_irq"
        # A board that is added again starts with sequence number 1.
        for _ in range(2):
            add("b3")
            proxy.process.send_signal(signal.SIGHUP)
            reader.until_status("b3", state="online")
            for _ in range(3):
                peer.sendto(FRAME, f"{bench.home}/b3-0")
            assert [next(reader.notifications()).body["sequence"] for _ in range(3)] == [1, 2, 3]
            (boards / "b3.json").unlink()
            proxy.process.send_signal(signal.SIGHUP)
            reader.until_status("b3", state="no proxy")
    assert "two proxies have a board" not in gateway.log
    (boards / "b1.json").unlink()
    proxy.process.send_signal(signal.SIGHUP)
    reader.until_status("b1", state="no proxy")


def test_a_stopped_proxy_does_not_delay_others(bench: Bench) -> None:
    bench.broker.start()
    still = bench.proxy()
    home = bench.home / "other"
    home.mkdir()
    other = Board(home, bench.stack)
    other.core1()
    other.running()
    reader = bench.reader()
    still.process.send_signal(signal.SIGSTOP)
    words = ("mqtt", bench.broker.url, "--control", bench.board.path, "--control", other.path)
    gateway = Gateway(bench.home / "gateway.log", *words, program=ORIGINAL)
    bench.stack.callback(gateway.close)
    gateway.wait_ready()
    other.wait_followed()
    other.trigger()
    assert next(reader.notifications()).topic == f"lab/{level(f'{home}/core0')}/outbound/redun_notify_irq"
    still.process.send_signal(signal.SIGCONT)
    reader.until_status(bench.name, state="online")


def test_two_gateways_with_the_same_session_log_a_warning(bench: Bench) -> None:
    bench.broker.start()
    gateways = []
    for name in ("one", "two"):
        home = bench.home / name
        (home / "boards").mkdir(parents=True)
        (home / "boards/b1.json").write_text(
            json.dumps({"link": f"unix:{home}/0,peer={home}/1", "irq_dir": f"{home}/irq"})
        )
        words = ["--boards", str(home / "boards"), "--control", str(home / "control")]
        proxy = Proxy(None, words, {}, home / "log")
        bench.stack.callback(proxy.close)
        proxy.wait_ready()
        gateways.append(Gateway(bench.home / f"{name}.log", "mqtt", bench.broker.url, "--control", home / "control"))
        bench.stack.callback(gateways[-1].close)
        gateways[-1].wait_ready()
    # Each of them takes over the session of the other, so either of them may be the first to warn.
    warning = "does another gateway publish this board below this prefix?"
    wait_path(bench.home / "one.log", lambda: any(warning in gateway.log for gateway in gateways))


def test_a_second_gateway_of_a_proxy_logs_a_warning(bench: Bench) -> None:
    bench.broker.start()
    bench.proxy()
    reader = bench.reader()
    first = bench.gateway()
    reader.until_status(bench.name, state="online")
    second = Gateway(bench.home / "second.log", "mqtt", f"{bench.broker.url}2", "--control", bench.board.path)
    bench.stack.callback(second.close)
    second.wait_ready()
    while "already follows" not in second.log:
        assert second.process.poll() is None
    assert f"process {first.process.pid} already follows" in second.log
    later = Reader(bench.broker, "lab2/#", name="later")
    bench.stack.callback(later.close)
    first.end()
    later.next(lambda told: told.topic.endswith("/status") and told.body["state"] == "online")
