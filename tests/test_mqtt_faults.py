"""Tests of brokers that refuse, fail or do not answer: each fault causes one error line, and nothing is lost."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import mqtt5
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from inco_trio.errors import IncoError
from inco_trio.mqtt.configuration import Broker, Credentials
from inco_trio.mqtt.connection import GRACE, Connection, open_connection
from inco_trio.mqtt.session import RECEIVE_MAX, BrokerLostError, BrokerRefusedError, Message, Receipts
from inco_trio.nurseries import plain_nursery
from netns.hang import HANG
from tests.faults.processes import wait_stopped
from tests.faults.supervised import wait_path
from tests.mosquitto import HELD, Certificates, Gateway, Mosquitto, Reader, free_port
from tests.support_control import COMMAND, Board, no_threads

pytestmark = pytest.mark.tools


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir())) - len(HELD)
    yield
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) - len(HELD) <= before


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def start(stack: ExitStack, broker: Mosquitto) -> Mosquitto:
    stack.callback(broker.end)
    return broker.start()


def connecting(broker: Broker, credentials: Credentials, patience: float = HANG) -> None:
    async def main() -> None:
        async with open_connection(broker, credentials, "test", patience=patience) as connection:
            assert await connection.publish([Message("lab/x", b"1")]) == [None]

    trio.run(main)


def refusal(broker: Broker, credentials: Credentials, patience: float = HANG) -> IncoError:
    with pytest.raises(IncoError) as refused:
        connecting(broker, credentials, patience)
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).startswith(f"{broker}: ")
    return refused.value


def at(port: int, *, tls: bool = False) -> Broker:
    return Broker("127.0.0.1", port, tls, "lab")


def test_certificates_are_checked_on_both_sides(tmp_path: Path, stack: ExitStack) -> None:
    ours, others = Certificates(tmp_path / "ours"), Certificates(tmp_path / "others")
    of_broker, of_client = ours.sign("127.0.0.1"), ours.sign("host1")
    stranger = others.sign("stranger")
    broker = start(stack, Mosquitto(
        tmp_path / "broker", f"cafile {ours.ca}", f"certfile {of_broker[0]}", f"keyfile {of_broker[1]}",
        "require_certificate true", "use_identity_as_username true", "allow_anonymous false", tls=True,
    ))  # fmt: skip
    where = at(broker.port, tls=True)

    def identity(ca: Path, pair: tuple[Path, Path] | None) -> Credentials:
        certificate, key = (None, None) if pair is None else map(str, pair)
        return Credentials(str(ca), certificate, key)

    connecting(where, identity(ours.ca, of_client))
    wrong = refusal(where, identity(others.ca, of_client))
    assert isinstance(wrong, BrokerRefusedError)
    assert "certificate is not valid" in str(wrong)
    assert "client certificate" in str(refusal(where, identity(ours.ca, None)))
    assert "certificate" in str(refusal(where, identity(ours.ca, stranger)))
    elsewhere = Broker("localhost", broker.port, tls=True, prefix="lab")
    assert "localhost" in str(refusal(elsewhere, identity(ours.ca, of_client))).split("not valid", 1)[1]
    assert "does it need TLS" in str(refusal(at(broker.port), Credentials()))
    assert "the certificate files" in str(refusal(where, identity(tmp_path / "nowhere", None)))
    (tmp_path / "empty").touch()
    assert "the certificate files" in str(refusal(where, identity(tmp_path / "empty", of_client)))


def test_a_reload_with_unusable_certificate_files_is_refused(tmp_path: Path, stack: ExitStack) -> None:
    ours = Certificates(tmp_path / "ours")
    certificate, key = ours.sign("host1")
    (tmp_path / "gateway.json").write_text(json.dumps({"broker": {
        "ca_file": str(ours.ca), "certificate_file": str(certificate), "key_file": str(key)}}))  # fmt: skip
    url = str(at(free_port(), tls=True))
    words = ("mqtt", url, "--control", tmp_path / "control", "--config", tmp_path / "gateway.json")
    gateway = Gateway(tmp_path / "gateway.log", *words)
    stack.callback(gateway.close)
    gateway.wait_ready()
    key.rename(tmp_path / "moved")
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_log("reload")
    assert "reload refused, keeping the old configuration" in gateway.log
    assert "cannot use the certificate files" in gateway.log


def test_an_expired_certificate_is_refused(tmp_path: Path, stack: ExitStack) -> None:
    ours = Certificates(tmp_path / "ours")
    certificate, key = ours.sign("127.0.0.1", days=-1)
    broker = start(stack, Mosquitto(
        tmp_path / "broker", f"certfile {certificate}", f"keyfile {key}", "allow_anonymous true", tls=True
    ))  # fmt: skip
    assert "expired" in str(refusal(at(broker.port, tls=True), Credentials(str(ours.ca))))


def test_tls_to_a_broker_without_tls_is_an_error(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    assert "TLS" in str(refusal(at(broker.port, tls=True), Credentials()))


def with_password(tmp_path: Path, stack: ExitStack, *acl: str) -> tuple[Mosquitto, Credentials]:
    words = tmp_path / "words"
    words.touch()
    for user in ("gateway", "reader"):
        subprocess.run(["mosquitto_passwd", "-b", str(words), user, "right"], check=True, capture_output=True)
    lines = [f"password_file {words}", "allow_anonymous false"]
    if acl:
        (tmp_path / "acl").write_text("\n".join(acl) + "\n")
        lines.append(f"acl_file {tmp_path}/acl")
    for path in (words, tmp_path / "acl"):
        if path.exists():
            path.chmod(0o600)
    (tmp_path / "user").write_text("gateway\n")
    (tmp_path / "word").write_text("right\n")
    broker = start(stack, Mosquitto(tmp_path / "broker", *lines))
    return broker, Credentials(user_file=str(tmp_path / "user"), password_file=str(tmp_path / "word"))


def test_wrong_passwords_are_refused(tmp_path: Path, stack: ExitStack) -> None:
    broker, credentials = with_password(tmp_path, stack)
    where = at(broker.port)
    connecting(where, credentials)
    assert isinstance(refusal(where, Credentials()), BrokerRefusedError)
    (tmp_path / "word").write_text("wrong")
    assert "Not authorized" in str(refusal(where, credentials))


def test_a_credential_file_that_vanishes_is_a_problem_of_the_connection(tmp_path: Path, stack: ExitStack) -> None:
    broker, credentials = with_password(tmp_path, stack)
    board = Board(tmp_path, stack)
    core1 = board.core1()
    board.running()
    (tmp_path / "gateway.json").write_text(json.dumps({"broker": {
        "user_file": credentials.user_file, "password_file": credentials.password_file}}))  # fmt: skip
    services = {
        "gateway": Gateway(
            tmp_path / "gateway.log", "mqtt", broker.url, "--control", board.path, "--config", tmp_path / "gateway.json"
        ),
        "bridge": Gateway(
            tmp_path / "bridge.log", "mqtt-link", f"{broker.url}/bridge", "--end", "core0", "--config",
            tmp_path / "gateway.json", "--link", f"unix:{tmp_path}/b0,peer={tmp_path}/b1",
        ),
    }  # fmt: skip
    for service in services.values():
        stack.callback(service.close)
        service.wait_ready()
    services["bridge"].wait_log("connected as core0")
    # Wait until the gateway is connected, too: it publishes the status of the board.
    wait_path(broker.directory / "mosquitto.log", lambda: bool(re.search("'lab/[^/']+/status'", broker.log)))
    (tmp_path / "word").rename(tmp_path / "away")
    broker.end()
    broker.start()
    for service in services.values():
        service.wait_log("cannot use the credentials: ")
    (tmp_path / "away").rename(tmp_path / "word")
    for service in services.values():
        service.wait_log("works again")
        assert "Traceback" not in service.log
    reader = Reader(broker, user=("reader", "right"))
    stack.callback(reader.close)
    board.inbound(core1)
    assert next(reader.notifications()).body["sequence"] == 1


@pytest.mark.parametrize("words", [("mqtt",), ("mqtt-link", "--end", "core0")], ids=["gateway", "bridge"])
def test_no_recovery_is_logged_while_the_broker_only_accepts_connections(
    words: tuple[str, ...], tmp_path: Path, stack: ExitStack
) -> None:
    board = Board(tmp_path, stack)
    board.core1()
    board.running()
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    server.settimeout(HANG)
    place = ["--control", board.path] if words == ("mqtt",) else ["--link", f"unix:{tmp_path}/b0,peer={tmp_path}/b1"]
    url = f"mqtt://127.0.0.1:{server.getsockname()[1]}/lab"
    service = Gateway(tmp_path / "service.log", words[0], url, *words[1:], *place)
    stack.callback(service.close)
    for _ in range(3):
        with server.accept()[0] as sock:
            sock.settimeout(HANG)
            sock.recv(1000)
            sock.sendall(b"\x20\x03\0\0\0")
            sock.recv(1000)
    assert "; retrying" in service.log
    assert "works again" not in service.log


def test_notifications_refused_by_an_acl_are_kept(tmp_path: Path, stack: ExitStack) -> None:
    broker, credentials = with_password(tmp_path, stack, "user reader", "topic readwrite #", "user gateway")
    board = Board(tmp_path, stack)
    board.core1()
    board.running()
    reader = Reader(broker, user=("reader", "right"))
    stack.callback(reader.close)
    (tmp_path / "gateway.json").write_text(json.dumps({"broker": {
        "user_file": credentials.user_file, "password_file": credentials.password_file}}))  # fmt: skip
    log = tmp_path / "gateway.log"
    gateway = Gateway(log, "mqtt", broker.url, "--control", board.path, "--config", tmp_path / "gateway.json")
    stack.callback(gateway.close)
    gateway.wait_ready()
    board.trigger()
    board.trigger()
    for text in ("the broker refused notifications", "/status: the broker refused the message"):
        gateway.wait_log(text)
    assert "Traceback" not in gateway.log
    assert board.status()["history"]["waiting"] == 2
    (tmp_path / "acl").write_text("user reader\ntopic readwrite #\nuser gateway\ntopic readwrite lab/#\n")
    assert broker.process is not None
    broker.process.send_signal(signal.SIGHUP)
    assert [told.body["sequence"] for _, told in zip(range(2), reader.notifications(), strict=False)] == [1, 2]
    assert gateway.log.count("the broker refused notifications") == 1


def test_unreachable_broker_is_an_error() -> None:
    assert "cannot be reached" in str(refusal(at(free_port()), Credentials()))
    assert "no such host" in str(refusal(Broker("nowhere.invalid", 1, False, "lab"), Credentials()))


def test_a_lack_of_threads_for_a_host_look_up_is_an_error() -> None:
    with no_threads():
        lost = refusal(Broker("nowhere.invalid", 1, False, "lab"), Credentials())
    assert isinstance(lost, BrokerLostError)
    assert str(lost).endswith(": cannot look up the host: can't start new thread")


def test_a_broker_that_never_answers_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        lost = refusal(at(server.getsockname()[1]), Credentials(), patience=0.2)
    assert isinstance(lost, BrokerLostError)
    assert "does not answer" in str(lost)


def test_a_broker_that_closes_the_connection_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            server.accept()[0].close()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, hang_up)
                broker = at(server.getsockname()[1])
                with pytest.raises(BrokerLostError, match=r"without an answer|broke|reset"):
                    async with open_connection(broker, Credentials(), "test", patience=HANG):
                        pytest.fail("connected without an answer from the broker")

        trio.run(main)


def with_keep_alive(server: socket.socket, seconds: int, pinged: Callable[[], None]) -> None:
    """Act as a broker that sends a Server Keep Alive, acknowledges `lab/x` and calls `pinged` for each ping."""
    sock, _ = server.accept()
    with sock:
        sock.settimeout(HANG)
        sock.recv(1000)
        sock.sendall(b"\x20\x06\0\0\x03\x13" + seconds.to_bytes(2))
        while packet := sock.recv(1000):
            while packet.startswith(b"\xc0\0"):  # A packet can follow in the same data.
                sock.sendall(b"\xd0\0")
                trio.from_thread.run_sync(pinged)
                packet = packet[2:]
            if packet.startswith(b"\x32"):  # PUBLISH at QoS 1; the packet identifier follows the topic.
                sock.sendall(b"\x40\x02" + packet[9:11])


@pytest.mark.parametrize("seconds", [1, 0])
def test_the_client_obeys_a_server_keep_alive(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the client used its own KEEPALIVE or patience, it would not ping before the test ends.

    See paho.mqtt.python#905.
    """
    monkeypatch.setattr("inco_trio.mqtt.connection.KEEPALIVE", 60_000)

    async def main() -> None:
        pings = trio.Semaphore(0)
        with socket.create_server(("127.0.0.1", 0)) as server:
            broker = at(server.getsockname()[1])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, with_keep_alive, server, seconds, pings.release)
                async with open_connection(broker, Credentials(), "test", patience=60_000) as connection:
                    for _ in range(3 if seconds else 0):
                        await pings.acquire()
                    assert await connection.publish([Message("lab/x", b"1")]) == [None]

    trio.run(main)


@pytest.mark.parametrize("seconds", [0, 0xFFFF])
def test_a_broker_that_needs_no_pings_is_lost_when_it_does_not_answer(seconds: int) -> None:
    """A half-open connection is noticed although the client has nothing to publish."""
    clock = MockClock()

    def accept(server: socket.socket) -> socket.socket:
        sock, _ = server.accept()
        sock.recv(1000)
        sock.sendall(b"\x20\x06\0\0\x03\x13" + seconds.to_bytes(2))  # CONNACK with a Server Keep Alive
        return sock

    async def use(port: int) -> None:
        async with open_connection(at(port), Credentials(), "test"):
            clock.autojump_threshold = 0  # From now on, the clock advances whenever all tasks are waiting.
            await trio.sleep(60)  # The clock is simulated.
            pytest.fail("the connection is not checked")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as accepted:

            async def serve() -> None:
                accepted.enter_context(await trio.to_thread.run_sync(accept, server))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                with pytest.raises(BrokerLostError, match="does not answer for 10 s"):
                    await use(server.getsockname()[1])

    trio.run(main, clock=clock)


def flood(server: socket.socket) -> None:
    """Act as a broker that sends many messages at QoS 0, and then acknowledges `lab/x`."""
    sock, _ = server.accept()
    with sock:
        sock.settimeout(HANG)
        sock.recv(1000)
        sock.sendall(b"\x20\x03\0\0\0" + b"\x30\x04\0\x01x\0" * (10 * RECEIVE_MAX))
        sent = b""
        while len(sent) < 11:  # PUBLISH at QoS 1; the packet identifier follows the topic.
            data = sock.recv(1000)
            assert data
            sent += data
            while sent.startswith(b"\xc0\0"):  # The client sends a ping after 15 s without a packet.
                sent = sent[2:]
        sock.sendall(b"\x40\x02" + sent[9:11])
        while sock.recv(1000):
            pass


def test_a_flood_of_messages_that_are_not_handled_needs_limited_memory(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            broker = at(server.getsockname()[1])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, flood, server)
                async with open_connection(broker, Credentials(), "test", patience=HANG) as connection:
                    # The acknowledgement follows the flood, so the client has then read all messages.
                    assert await connection.publish([Message("lab/x", b"1")]) == [None]
                    assert connection.received.statistics().current_buffer_used == RECEIVE_MAX

    trio.run(main)
    assert f"dropped QoS 0 messages, because {RECEIVE_MAX} messages are queued" in caplog.text


def answer_and_end(server: socket.socket) -> None:
    """Act as a broker that acknowledges a message and ends the connection in a single write."""
    sock, _ = server.accept()
    with sock:
        sock.settimeout(HANG)
        sock.recv(1000)
        sock.sendall(b"\x20\x03\0\0\0")
        packet = sock.recv(1000)
        sock.sendall(b"\x40\x02" + packet[9:11] + b"\xe0\x01\x8b")
        sock.recv(1000)


def test_acknowledgements_that_arrive_with_a_disconnect_count() -> None:
    receipts, left = Receipts(1, [None]), list[int]()

    async def send(port: int) -> None:
        async with open_connection(at(port), Credentials(), "test", patience=HANG) as connection:
            connection.room_changed = lambda: left.append(receipts.left)
            connection.send(receipts, [(0, Message("lab/x", b"1"))])
            await trio.sleep_forever()

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, answer_and_end, server)
                with pytest.raises(BrokerLostError, match="ended the connection: Server shutting down"):
                    await send(server.getsockname()[1])

    trio.run(main)
    assert left == [0]


def test_a_stopped_broker_is_lost_after_10_s(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    clock = MockClock()

    async def main() -> None:
        async with open_connection(at(broker.port), Credentials(), "test") as connection:
            assert broker.process is not None
            wait_stopped(broker.process.pid)
            clock.autojump_threshold = 0  # From now on, the clock advances whenever all tasks are waiting.
            await connection.publish([Message("lab/x", b"")] * 100)

    with pytest.raises(BrokerLostError, match="does not answer for 10 s"):
        trio.run(main, clock=clock)


def test_a_broker_that_has_answered_is_not_lost_when_the_client_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's process seems to be stopped for 60 s. Afterwards, its tasks continue in a random order."""
    clock = MockClock()
    monkeypatch.setattr("inco_trio.mqtt.connection.KEEPALIVE", 60_000)

    def accept(server: socket.socket) -> socket.socket:
        sock, _ = server.accept()
        sock.settimeout(HANG)
        sock.recv(1000)
        sock.sendall(b"\x20\x03\0\0\0")
        return sock

    async def use(port: int, accepted: trio.Event, broker: list[socket.socket]) -> None:
        async with open_connection(at(port), Credentials(), "test") as connection:
            assert isinstance(connection._stream, trio.SocketStream)
            await accepted.wait()
            for _ in range(30):
                receipts = Receipts(1, [None])
                connection.send(receipts, [(0, Message("lab/x", b"1"))])
                await wait_all_tasks_blocked()
                packet = broker[0].recv(1000)
                broker[0].sendall(b"\x40\x02" + packet[9:11])
                assert select.select([connection._stream.socket], [], [], HANG)[0]
                clock.jump(60)
                await receipts.done.wait()
                clock.jump(GRACE)

    async def main() -> None:
        accepted, broker = trio.Event(), list[socket.socket]()
        with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, server.getsockname()[1], accepted, broker)
                broker.append(stack.enter_context(await trio.to_thread.run_sync(accept, server)))
                accepted.set()

    trio.run(main, clock=clock)


def test_sending_more_does_not_hide_that_a_broker_is_lost(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    clock = MockClock()

    async def main() -> None:
        async with open_connection(at(broker.port), Credentials(), "test") as connection:
            assert broker.process is not None
            wait_stopped(broker.process.pid)
            clock.autojump_threshold = 0  # From now on, the clock advances whenever all tasks are waiting.
            for _ in range(12):
                connection.send(Receipts(1, [None]), [(0, Message("lab/x", b""))])
                await trio.sleep(1)  # The clock is simulated.
            pytest.fail("a message has extended the time limit for the first one")

    with pytest.raises(BrokerLostError, match="does not answer for 10 s"):
        trio.run(main, clock=clock)


def test_a_full_send_buffer_does_not_hide_that_a_broker_is_lost() -> None:
    """The broker reads nothing, and the kernel's buffer is full when the client sends a ping."""
    clock = MockClock()

    def accept(server: socket.socket) -> socket.socket:
        sock, _ = server.accept()
        sock.recv(1000)
        sock.sendall(b"\x20\x06\0\0\x03\x13\0\x01")  # CONNACK with a Server Keep Alive of 1 s
        return sock

    async def use(port: int) -> None:
        async with open_connection(at(port), Credentials(), "test") as connection:
            assert isinstance(connection._stream, trio.SocketStream)
            for size in (1 << 16, 1):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(connection._stream.socket.fileno(), bytes(size))
            clock.autojump_threshold = 0  # From now on, the clock advances whenever all tasks are waiting.
            await trio.sleep(60)  # The clock is simulated.
            pytest.fail("the client waits for a broker that does not read")

    async def main() -> None:
        with socket.socket() as server, ExitStack() as accepted:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            server.bind(("127.0.0.1", 0))
            server.listen()

            async def serve() -> None:
                accepted.enter_context(await trio.to_thread.run_sync(accept, server))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                with pytest.raises(BrokerLostError, match="does not answer for 10 s"):
                    await use(server.getsockname()[1])

    trio.run(main, clock=clock)


def answer(packet: mqtt5.Packet) -> mqtt5.Packet | None:
    """Return the answer of a broker that leaves subscriptions and messages to `lab/ignored` unanswered."""
    match packet:
        case mqtt5.ConnectPacket():
            return mqtt5.ConnAckPacket()
        case mqtt5.PublishPacket(topic="lab/x", packet_id=int(number)):
            return mqtt5.PubAckPacket(number)
        case mqtt5.PingReqPacket():
            return mqtt5.PingRespPacket()
    return None


async def answer_most(stream: trio.SocketStream) -> None:
    async for data in stream:
        rest = memoryview(data)
        while rest:
            packet, length = mqtt5.read(rest)
            rest = rest[length:]
            if (reply := answer(packet)) is not None:
                await stream.send_all(reply.write())


async def send_ignored(connection: Connection) -> None:
    await connection.publish([Message("lab/ignored", b"1")])


async def send_subscription(connection: Connection) -> None:
    await connection.subscribe(["lab/x"])


@pytest.mark.parametrize("sender", ["client", "broker"])
@pytest.mark.parametrize("request_", [send_ignored, send_subscription])
def test_other_packets_do_not_hide_a_missing_answer(
    request_: Callable[[Connection], Awaitable[None]], sender: str
) -> None:
    """The broker leaves one packet unanswered, and each second, the client or the broker sends a message."""
    clock = MockClock()

    async def use(port: int, streams: list[trio.SocketStream]) -> None:
        async with open_connection(at(port), Credentials(), "test") as connection, plain_nursery() as nursery:
            clock.autojump_threshold = 0  # From now on, the clock advances whenever all tasks are waiting.
            nursery.start_soon(request_, connection)
            await wait_all_tasks_blocked()
            while trio.current_time() < 30.0:
                if sender == "client":
                    assert await connection.publish([Message("lab/x", b"1")]) == [None]
                else:
                    # `send_all` fails if `answer_most` is sending at the same time.
                    await streams[0].socket.send(mqtt5.PublishPacket("lab/x", b"1").write())
                await trio.sleep(1)  # The clock is simulated.
            pytest.fail("the client waits for an answer that does not arrive")

    async def main() -> None:
        streams = list[trio.SocketStream]()

        async def serve(stream: trio.SocketStream) -> None:
            streams.append(stream)
            await answer_most(stream)

        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            with pytest.raises(
                BrokerLostError, match="has not answered a packet for 10 s, but has answered later ones"
            ):
                await use(listener.socket.getsockname()[1], streams)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


async def relay_slowly(listener: trio.SocketListener, port: int, pass_time: Callable[[], None]) -> None:
    """Relay the broker's data byte by byte, and advance the clock before each byte."""

    async def forth(client: trio.SocketStream, broker: trio.SocketStream) -> None:
        async for data in client:
            await broker.send_all(data)
        await broker.send_eof()

    async with (
        await listener.accept() as client,
        await trio.open_tcp_stream("127.0.0.1", port) as broker,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(forth, client, broker)
        with contextlib.suppress(trio.BrokenResourceError):  # The client ends before it has received everything.
            while byte := await broker.receive_some(1):
                pass_time()
                await client.send_all(byte)
                await wait_all_tasks_blocked()


def over_a_slow_network(broker: Mosquitto, use: Callable[[Connection], Awaitable[None]]) -> None:
    """Call `use` with a connection to the broker on which each byte from the broker takes 0.1 s of simulated time."""
    clock = MockClock()

    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        slow = Broker("127.0.0.1", listener.socket.getsockname()[1], tls=False, prefix="lab")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay_slowly, listener, broker.port, lambda: clock.jump(0.1))
            async with open_connection(slow, Credentials(), "test", patience=10.0) as connection:
                await use(connection)
        await listener.aclose()

    trio.run(main, clock=clock)


def test_a_slow_broker_is_not_lost(tmp_path: Path, stack: ExitStack) -> None:
    async def publish(connection: Connection) -> None:
        began = trio.current_time()
        messages = [Message("lab/x", b"%d" % number) for number in range(40)]
        assert await connection.publish(messages) == [None] * 40
        assert trio.current_time() - began > 10.0

    over_a_slow_network(start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true")), publish)


def test_a_broker_that_sends_a_long_message_slowly_is_not_lost(tmp_path: Path, stack: ExitStack) -> None:
    """If the client replaced the connection, the broker would send the same message again and again."""

    async def receive(connection: Connection) -> None:
        await connection.subscribe(["lab/x"])
        began = trio.current_time()
        assert await connection.publish([Message("lab/x", bytes(300))]) == [None]
        assert (await connection.received.receive()).payload == bytes(300)
        assert trio.current_time() - began > 30.0

    over_a_slow_network(start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true")), receive)


def test_the_gateway_runs_although_its_log_is_full(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    reader = Reader(broker)
    stack.callback(reader.close)
    board = Board(tmp_path, stack)
    peer = board.core1()
    board.running()
    gateway = Gateway(Path("/dev/full"), "mqtt", broker.url, "--control", board.path, "--verbose")
    stack.callback(gateway.close)
    gateway.wait_ready()
    notifications = reader.notifications()
    for number in range(1, 4):
        board.inbound(peer)
        assert next(notifications).body["sequence"] == number
    assert gateway.end() == 0


def test_concurrent_publishers_keep_their_order(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true", "max_queued_messages 0"))
    reader = Reader(broker)
    stack.callback(reader.close)

    async def publish(name: int) -> None:
        where = open_connection(at(broker.port), Credentials(), f"test{name}", patience=HANG)
        async with where as connection, trio.open_nursery() as nursery:
            for task in range(4):
                nursery.start_soon(series, connection, name, task)

    async def series(connection: Connection, name: int, task: int) -> None:
        for first in range(0, 500, 100):
            messages = [Message(f"lab/{name}/{task}", b"%d" % number) for number in range(first, first + 100)]
            assert await connection.publish(messages) == [None] * 100

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for name in range(3):
                nursery.start_soon(publish, name)

    trio.run(main)
    told: dict[str, list[int]] = {}
    for _ in range(3 * 4 * 500):
        message = reader.next()
        told.setdefault(message.topic, []).append(int(message.payload))
    assert list(told.values()) == [list(range(500))] * 12


def take_packet(sock: socket.socket, kind: int) -> bytes:
    """Return the content of the next packet of a kind, and discard the packets before it."""
    while True:
        first, size = sock.recv(2, socket.MSG_WAITALL)
        content = sock.recv(size, socket.MSG_WAITALL)
        if first >> 4 == kind:
            return content


def leave_subscription_at_qos_2(port: int, client_id: bytes) -> None:
    """Subscribe to `lab/#`, receive a message, answer with PUBREC but not PUBCOMP, and leave the session."""
    publish, pubrec, pubrel, suback = 3, 5, 6, 9
    with socket.create_connection(("127.0.0.1", port), HANG) as sock:
        sock.sendall(
            b"\x10%c\0\x04MQTT\x05\0\0\0\x05\x11\0\0\x0e\x10\0%c" % (18 + len(client_id), len(client_id)) + client_id
        )
        sock.sendall(b"\x82\x0b\0\x01\0\0\x05lab/#\x02")
        take_packet(sock, suback)
        sock.sendall(b"\x34\x0b\0\x05lab/x\0\x02\0" + b"0")
        take_packet(sock, pubrec)
        sock.sendall(b"\x62\x02\0\x02")
        identifier = take_packet(sock, publish)[7:9]
        sock.sendall(b"\x50\x02" + identifier)
        assert take_packet(sock, pubrel)[:2] == identifier


def test_a_subscription_at_qos_2_in_the_session_ends_no_connection(
    tmp_path: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program has used the client identifier. The broker still has its messages, finished or not."""
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    reader = Reader(broker)
    stack.callback(reader.close)
    leave_subscription_at_qos_2(broker.port, b"test")
    where = at(broker.port)

    async def main() -> None:
        for _ in range(2):
            async with open_connection(where, Credentials(), "test", session=60) as connection:
                assert connection.session_present
                await connection.subscribe(["end"])
                await connection.publish([Message("end", b"")])
                received = await connection.received.receive()
                assert received.topic == "end"
                await connection.acknowledge(received)

    reader.publish("lab/x", qos=2)
    trio.run(main)
    assert caplog.text.count("ignored a message at QoS 2") == 1


def test_unacknowledged_messages_are_received_again(tmp_path: Path, stack: ExitStack) -> None:
    broker = start(stack, Mosquitto(tmp_path / "broker", "allow_anonymous true"))
    reader = Reader(broker)
    stack.callback(reader.close)

    async def receive(acknowledged: int) -> list[bytes]:
        where = open_connection(at(broker.port), Credentials(), "test", session=60, patience=HANG)
        async with where as connection:
            if not connection.session_present:
                await connection.subscribe(["lab/#"])
                return []
            received = [await connection.received.receive() for _ in range(3)]
            for each in received[:acknowledged]:
                await connection.acknowledge(each)
            # This acknowledgement shows that the broker has read the earlier packets.
            await connection.publish([Message("other", b"")])
            return [each.payload for each in received]

    assert trio.run(receive, 0) == []
    for number in range(4):
        reader.publish("lab/x", b"%d" % number)
    assert trio.run(receive, 1) == [b"0", b"1", b"2"]
    assert trio.run(receive, 0) == [b"1", b"2", b"3"]
    assert trio.run(receive, 0) == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["http://x"], 2, "unknown scheme (expected mqtt://"),
        (["mqtt://me:word@x"], 2, "contains a user name or password"),
        (["mqtt://x", "--config", "/nowhere"], 78, "/nowhere: cannot be read"),
        (["mqtt://x", "--notification-fd", "99"], 2, "--notification-fd 99"),
    ],
)
def test_command_line_mistakes_are_one_error_line(words: list[str], code: int, text: str) -> None:
    done = subprocess.run([*COMMAND, "mqtt", *words], capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == code
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "word@" not in done.stderr
