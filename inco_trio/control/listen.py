"""Listening on an interface without a proxy: frames of both directions, as events of a monitor."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

from inco_trio.errors import LinkNotFoundError, PermissionDeniedError, ProxyNotFoundError, ResourceError
from inco_trio.frame import ETHERTYPE, FRAME_MAX, decode
from inco_trio.linux.packet import ETH_P_ALL, GONE, PACKET_OUTGOING, attach_filter, program

__all__ = ["Listening"]

_FILTER = (
    (0x28, 0, 0, 0xFFFFF000),  # ldh [protocol]
    (0x15, 0, 1, ETHERTYPE),  # jeq #0x8800
    (0x06, 0, 0, 0xFFFF),  # ret #65535
    (0x06, 0, 0, 0),  # ret #0
)


class Listening:
    """The frames on an interface: those that this host sends are outbound. The filters are those of a monitor.

    Raises PermissionDeniedError, LinkNotFoundError, ResourceError.
    """

    def __init__(self, interface: str, signals: Collection[str] | None, direction: str | None) -> None:
        self.name = interface
        self._signals, self._direction = signals, direction
        self._numbers = 0
        self._gone = False
        try:
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError as error:
            raise PermissionDeniedError(interface, "no proxy answers, and listening needs CAP_NET_RAW") from error
        try:
            attach_filter(self._sock, program(_FILTER))
            # Of what this host sends, only sockets of every EtherType get a copy.
            self._sock.bind((interface, ETH_P_ALL))
        except OSError as error:
            self._sock.close()
            if error.errno in GONE:
                raise LinkNotFoundError(interface, "no proxy answers, and there is no such interface") from error
            raise ResourceError(interface, f"cannot listen: {error.strerror}") from error

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """The descriptor that is readable when `arrived` has something new."""
        return self._sock.fileno()

    def events(self) -> Iterator[dict[str, Any]]:
        """As of a monitor, each with its frame, until the interface is gone."""
        message = f"no proxy answers: listening on {self.name} itself"
        yield _event(event="message", level="info", message=message)
        while not self._gone:
            yield from self._receive(0)

    def arrived(self) -> list[dict[str, Any]]:
        """Those that are there, without waiting. Raises ProxyNotFoundError once the interface is gone."""
        if self._gone:
            raise ProxyNotFoundError(self.name, "the interface is gone")
        events: list[dict[str, Any]] = []
        with contextlib.suppress(BlockingIOError):
            while not self._gone:
                events += self._receive(socket.MSG_DONTWAIT)
        return events

    def rest(self) -> Iterator[dict[str, Any]]:
        """Those that came until now."""
        yield from self.arrived()

    def _receive(self, flags: int) -> Iterator[dict[str, Any]]:
        try:
            frame, address = self._sock.recvfrom(FRAME_MAX + 1, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            self._gone = error.errno in GONE
            yield _event(event="problem", level="warning", message=f"{self.name}: {error.strerror}")
            return
        way = "outbound" if address[2] == PACKET_OUTGOING else "inbound"
        if self._direction not in (None, way):
            return
        name = decode(memoryview(frame), len(frame))
        if name is None:
            yield _event(event="ignored", reason="malformed", direction=way, signal=None, frame=frame.hex())
        elif self._signals is None or name.decode() in self._signals:
            self._numbers += 1
            yield _event(
                event="notification", direction=way, signal=name.decode(), register=None,
                sequence=self._numbers, frame=frame.hex(),
            )  # fmt: skip


def _event(**fields: object) -> dict[str, Any]:
    return {**fields, "time": time.time(), "monotonic_ns": time.monotonic_ns()}
