"""A real mosquitto on loopback, and an MQTT client that does not use the project's code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from netns.hang import HANG
from tests.faults.supervised import wait_path

__all__ = ["HELD", "ORIGINAL", "PATIENT", "Certificates", "Gateway", "Message", "Mosquitto", "Reader", "free_port"]

PROGRAM = os.environ.get("INCO_TRIO_MOSQUITTO", "mosquitto")
"""The broker's program. An environment variable selects another version, such as the one from tests/debian13.py."""


ORIGINAL = ("-m", "inco_trio")
"""The arguments of Python that run inco-trio."""
PATIENT = (
    "-c",
    f"""
import sys
from inco_trio.cli import main
from inco_trio.control import follower
from inco_trio.mqtt import connection, gateway
connection.open_connection.__wrapped__.__kwdefaults__["patience"] = {HANG}
follower.converse.__wrapped__.__defaults__ = ({HANG},)
follower.PATIENCE = gateway.AT_START = gateway.SEND_PATIENCE = gateway.FLUSH_PATIENCE = {HANG}
sys.exit(main())
""",
)
"""The same as ORIGINAL, but the gateway and the bridge wait for a slow broker and for slow proxies.

The gateway reports that it is ready only once it follows all of its proxies.
"""

HELD: list[int] = []
"""The descriptors of the sockets with which `free_port` holds its ports."""


def free_port() -> int:
    """Return an unused TCP port on loopback, outside the kernel's range for outgoing connections.

    Inside that range, another connection can take the port while no server uses it, and a client that connects to the
    port can even be connected to itself.

    Until this process ends, a socket that never listens holds the port, so that this function does not return it to
    another test process, even while a server restarts. Servers with SO_REUSEADDR can use the port.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(10_000, 65_536) if not first <= port <= last]
    for port in random.sample(ports, len(ports)):
        holder = socket.socket()
        try:
            # Only set SO_REUSEADDR afterwards: with it, the kernel would bind several of these sockets to the port.
            holder.bind(("127.0.0.1", port))
        except OSError:
            holder.close()
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        HELD.append(holder.detach())
        return port
    raise AssertionError("no TCP port is free")


class Certificates:
    """A certificate authority and the certificates it has signed for the broker and for a client."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self.ca = directory / "ca.pem"
        self._openssl(
            *("req", "-x509", "-subj", "/CN=authority", "-days", "2", "-keyout", f"{directory}/ca.key"),
            *("-out", str(self.ca)), *_KEY,
        )  # fmt: skip

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, stdin=subprocess.DEVNULL)

    def sign(self, name: str, days: int = 2) -> tuple[Path, Path]:
        """Return a certificate and key for an IP address or client name.

        If `days` is negative, the certificate has already expired.
        """
        place = self._directory / name
        certificate, key, request = (place.with_suffix(f".{end}") for end in ("pem", "key", "csr"))
        self._openssl("req", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request), *_KEY)
        extensions = place.with_suffix(".ext")
        extensions.write_text(f"subjectAltName=IP:{name}\n" if name[0].isdigit() else "")
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", f"{self._directory}/ca.key"),
            *("-CAcreateserial", "-days", str(days), "-out", str(certificate), "-extfile", str(extensions)),
        )
        return certificate, key


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Mosquitto:
    """A mosquitto broker; `lines` are added to its mosquitto.conf(5)."""

    def __init__(self, directory: Path, *lines: str, tls: bool = False, verbose: bool = True) -> None:
        self.directory = directory
        self._verbose = ["-v"] if verbose else []
        directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.tls = tls
        self._log = directory / "mosquitto.log"
        (directory / "mosquitto.conf").write_text(
            "\n".join((f"listener {self.port} 127.0.0.1", f"user {_me()}", *lines, ""))
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://127.0.0.1:{self.port}/lab"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> Mosquitto:
        """Start or restart the broker, and return once it answers clients.

        While mosquitto 2.0.11 starts, it already accepts connections, but ignores SIGTERM.
        """
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, *self._verbose, "-c", str(self.directory / "mosquitto.conf")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + HANG
        while True:
            try:
                client = socket.create_connection(("127.0.0.1", self.port), HANG)
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.01)  # Poll, because mosquitto does not report when it starts to listen.
                continue
            with client, contextlib.suppress(ConnectionResetError):
                client.sendall(b"no MQTT")
                client.recv(1)  # The broker refuses the text and closes the connection.
            return self

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the broker with a signal, even if it is suspended by SIGSTOP."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(HANG)
            self.process = None


def _me() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


@attrs.frozen
class Message:
    """A message that the reader received."""

    topic: str
    payload: bytes
    retain: bool
    correlation: bytes | None

    @functools.cached_property
    def body(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self.payload)
        return read


class Reader:
    """A client that subscribes to `topic`, reconnects automatically and can publish."""

    def __init__(
        self,
        broker: Mosquitto,
        topic: str = "lab/#",
        *,
        name: str = "reader",
        certificates: tuple[Path, Path, Path] | None = None,
        user: tuple[str, str] | None = None,
    ) -> None:
        self.messages: queue.Queue[Message] = queue.Queue()
        self._subscribed: queue.Queue[None] = queue.Queue()
        self._marked: queue.Queue[int] = queue.Queue()
        self._number = self._mark = 0
        self._topic = topic
        self._client = client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        client.on_message = self._on_message
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.reconnect_delay_set(1, 1)
        if certificates is not None:
            context = ssl.create_default_context(cafile=certificates[0])
            context.load_cert_chain(*certificates[1:])
            client.tls_set_context(context)
        if user is not None:
            client.username_pw_set(*user)
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        client.connect("127.0.0.1", broker.port, clean_start=False, properties=properties)
        client.loop_start()
        self._subscribed.get(timeout=HANG)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        client.subscribe(self._topic, qos=1)

    def _on_subscribe(self, *_: object) -> None:
        self._subscribed.put(None)
        if self._mark:
            # `settle` might have published the mark after the reconnection, but before the subscription.
            self._publish_mark()

    def _publish_mark(self) -> None:
        self._client.publish(f"{self._topic.removesuffix('#')}mark", str(self._mark).encode(), 1)

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        self._number += 1
        if message.topic.endswith("/mark"):
            self._marked.put(int(message.payload))
        else:
            self.messages.put(Message(message.topic, bytes(message.payload), message.retain, correlation))

    def publish(
        self, topic: str, payload: bytes = b"", *, response: str | None = None, correlation: bytes | None = None,
        retain: bool = False, qos: int = 1,
    ) -> None:  # fmt: skip
        """Publish a message and wait for the acknowledgement."""
        properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if response is not None:
            properties.ResponseTopic = response
        if correlation is not None:
            properties.CorrelationData = correlation
        info = self._client.publish(topic, payload, qos, retain, properties)
        info.wait_for_publish(HANG)

    def next(self, wanted: Callable[[Message], bool] = lambda _: True) -> Message:
        """Return the next message for which `wanted` is true, and discard the messages before it."""
        while True:
            message = self.messages.get(timeout=HANG)
            if wanted(message):
                return message

    def settle(self) -> None:
        """Wait until the broker has delivered all queued messages. All publishers must have stopped.

        The broker handles one packet per client in each turn, so its queues are empty after 30 turns without a message.
        """
        quiet = 0
        while quiet < 30:
            before = self._number
            self._mark += 1
            # While the client is disconnected, paho queues the message and publishes it later.
            self._publish_mark()
            while self._marked.get(timeout=HANG) != self._mark:
                pass  # This mark was published twice.
            quiet = quiet + 1 if self._number == before + 1 else 0

    def until_status(self, board: str, **fields: object) -> Message:
        """Return the next status message of a board that contains these fields and values."""
        return self.next(
            lambda message: message.topic == f"lab/{board}/status" and fields.items() <= message.body.items()
        )

    def notifications(self) -> Iterator[Message]:
        """Yield only the messages that are notifications, in order."""
        while True:
            yield self.next(lambda message: message.topic.split("/")[2] in ("inbound", "outbound"))

    def close(self) -> None:
        self._client.loop_stop()
        self._client.disconnect()
        self._client.loop_misc()
        self._client._reset_sockets(sockpair_only=True)  # Otherwise, the garbage collector may close them first.


class Gateway:
    """A process that runs `inco-trio mqtt` or another service of inco-trio."""

    def __init__(
        self,
        log: Path,
        *words: str | Path,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = PATIENT,
    ) -> None:
        self._log = log
        read_ready, write_ready = os.pipe()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *map(str, words), "--notification-fd", str(write_ready)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[write_ready],
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        os.close(write_ready)
        self._ready = read_ready

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        """Wait until the process reports that it is ready."""
        with open(self._ready, "rb", closefd=False) as ready:
            assert ready.read(1) == b"\n", self.log

    def wait_log(self, text: str, times: int = 1) -> None:
        """Wait until the log contains `text` at least `times` times."""
        wait_path(self._log, lambda: self.log.count(text) >= times)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the process with a signal; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(HANG)

    def close(self) -> None:
        """Stop the process with SIGTERM, so that coverage writes its data."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.process.send_signal(number)
        try:
            self.process.wait(HANG)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ready)
