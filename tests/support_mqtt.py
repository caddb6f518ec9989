"""Helpers for tests of the gateway and the bridge: a board with a broker, and a TCP proxy that fails on request."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from inco_trio.mqtt.topics import level
from netns.fixtures import Proxy
from tests.mosquitto import PATIENT, Gateway, Mosquitto, Reader
from tests.support_control import Board

__all__ = ["Bench", "Relay", "check_order"]


class Bench:
    """A broker, a board with its proxy, and a gateway that connects them."""

    def __init__(self, home: Path, stack: ExitStack, *lines: str, tls: bool = False) -> None:
        self.home, self.stack = home, stack
        self.board = Board(home, stack)
        self.broker = Mosquitto(home / "broker", *lines, "allow_anonymous true",
                                f"persistence_location {home}/broker/", "persistence true",
                                "max_queued_messages 0", tls=tls)  # fmt: skip
        stack.callback(self.broker.end)
        self.name = level(f"{home}/core0")

    def proxy(self) -> Proxy:
        return self.board.running()

    def gateway(self, url: str | None = None, *, program: Sequence[str] = PATIENT, **config: object) -> Gateway:
        """Start a gateway with this configuration, and wait until it is ready."""
        file = self.home / "gateway.json"
        file.write_text(json.dumps(config))
        words = ("mqtt", url or self.broker.url, "--control", self.board.path, "--config", file)
        gateway = Gateway(self.home / "gateway.log", *words, program=program)
        self.stack.callback(gateway.close)
        gateway.wait_ready()
        return gateway

    def kill_broker(self, gateway: Gateway, reader: Reader) -> None:
        """Kill and restart the broker.

        A killed mosquitto loses messages that it has acknowledged but not delivered, so first wait until it has
        delivered all messages. It also loses its sessions, so the reader reconnects before the gateway continues.
        """
        gateway.process.send_signal(signal.SIGSTOP)
        reader.settle()
        self.broker.end(signal.SIGKILL)
        self.broker.start()
        reader.settle()
        gateway.process.send_signal(signal.SIGCONT)

    def reader(self) -> Reader:
        reader = Reader(self.broker)
        self.stack.callback(reader.close)
        return reader


def check_order(reader: Reader, last: int) -> int:
    """Check that notifications 1 to `last` arrive in order without a gap; return the number of duplicates."""
    seen = duplicates = 0
    for message in reader.notifications():
        number: int = message.body["sequence"]
        assert number <= seen + 1, f"{number} follows {seen}"
        duplicates += number <= seen
        seen = max(seen, number)
        if seen == last:
            return duplicates
    raise AssertionError


@attrs.define(eq=False)
class _Pair:
    """The two sockets of one connection through a relay."""

    sockets: tuple[socket.socket, socket.socket]
    left: int
    """Number of bytes until the connection is cut."""
    flows: threading.Event = attrs.Factory(threading.Event)

    def reset(self) -> None:
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                # Close the connection abruptly: the other side receives RST (socket(7), SO_LINGER).
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RD)
            sock.close()


class Relay:
    """A TCP proxy that cuts, stalls and half-opens connections to a broker."""

    def __init__(self, broker: Mosquitto, stack: ExitStack) -> None:
        self.bytes_until_cut: Callable[[], int] = lambda: sys.maxsize
        """A function that returns the number of bytes after which a new connection is cut, even within a packet."""
        self.connections = 0
        self._broker = broker
        self._pairs: list[_Pair] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = broker.url.replace(str(broker.port), str(self._server.getsockname()[1]))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        stack.callback(self.close)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                try:
                    broker = socket.create_connection(("127.0.0.1", self._broker.port))
                except ConnectionRefusedError:
                    client.close()
                    continue
                self.connections += 1
                for sock in (client, broker):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pair = _Pair((client, broker), self.bytes_until_cut())
                pair.flows.set()
                self._pairs.append(pair)
                for ends in (pair.sockets, pair.sockets[::-1]):
                    self._threads.append(threading.Thread(target=self._pump, args=(pair, *ends), daemon=True))
                    self._threads[-1].start()

    def _pump(self, pair: _Pair, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                pair.flows.wait()
                data = data[: pair.left]
                pair.left -= len(data)
                target.sendall(data)
                if not pair.left:
                    break
        pair.reset()

    def cut(self) -> None:
        """Reset all connections."""
        for pair in self._pairs:
            pair.reset()

    def stall(self) -> None:
        """Stop transferring data on the current connections without closing them."""
        for pair in self._pairs:
            pair.flows.clear()

    def resume(self) -> None:
        for pair in self._pairs:
            pair.flows.set()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.resume()
        self.cut()
        for thread in self._threads:
            thread.join()
