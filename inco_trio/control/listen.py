"""Monitor an interface without a proxy: each frame in either direction becomes an event."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Collection, Iterator

from inco_trio.control.protocol import Event, event_now
from inco_trio.errors import LinkNotFoundError, PermissionDeniedError, ProxyNotFoundError, ResourceError
from inco_trio.frame import ETHERTYPE, FRAME_MAX, decode
from inco_trio.linux import bpf
from inco_trio.linux.if_packet import ETH_P_ALL, GONE, PACKET_OUTGOING
from inco_trio.signals import Direction

__all__ = ["Listening"]

_FILTER = (
    (bpf.LOAD_HALF, 0, 0, bpf.PROTOCOL),
    (bpf.JUMP_IF_EQUAL, 1, 0, ETHERTYPE),
    bpf.REJECT,
    bpf.ACCEPT,
)


class Listening(contextlib.AbstractContextManager["Listening"]):
    """A capture of the frames on an interface. Frames that this host sends are outbound. Raises IncoError."""

    has_received = False
    """Whether `arrived` returns events even if the socket is not readable."""
    patience = math.inf
    """The seconds until `arrived` must be called even if no frame arrives."""

    def __init__(self, interface: str, signals: Collection[str] | None, direction: Direction | None) -> None:
        self.name = interface
        self._signals, self._direction = signals, direction
        self._numbers = 0
        self._gone = False
        try:
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError as error:
            raise PermissionDeniedError(interface, "no proxy answers; capturing needs root or CAP_NET_RAW") from error
        try:
            bpf.attach_filter(self._sock, bpf.program(_FILTER))
            # Only sockets that are bound to ETH_P_ALL receive copies of the frames that this host sends.
            self._sock.bind((interface, ETH_P_ALL))
        except OSError as error:
            self._sock.close()
            if error.errno in GONE:
                raise LinkNotFoundError(interface, "no proxy answers, and no such interface exists") from error
            raise ResourceError(interface, f"cannot listen: {error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when `arrived` has new events."""
        return self._sock.fileno()

    def events(self) -> Iterator[Event]:
        """Yield events with their frames until the interface is gone."""
        yield event_now("message", level="info", message=f"no proxy answers: listening on interface {self.name}")
        while not self._gone:
            yield from self._receive(0)

    def arrived(self) -> list[Event]:
        """Return the events that have arrived. Raises ProxyNotFoundError once the interface is gone."""
        if self._gone:
            raise ProxyNotFoundError(self.name, "the interface is gone")
        events: list[Event] = []
        with contextlib.suppress(BlockingIOError):
            while not self._gone:
                events += self._receive(socket.MSG_DONTWAIT)
        return events

    def rest(self) -> Iterator[Event]:
        """Yield the events that had arrived but had not been read when the recording ended."""
        yield from self.arrived()

    def _receive(self, flags: int) -> Iterator[Event]:
        try:
            frame, address = self._sock.recvfrom(FRAME_MAX + 1, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            self._gone = error.errno in GONE
            yield event_now("problem", level="warning", message=f"{self.name}: {error.strerror}")
            return
        direction = Direction.OUTBOUND if address[2] == PACKET_OUTGOING else Direction.INBOUND
        if self._direction not in (None, direction):
            return
        name = decode(memoryview(frame), len(frame))
        if name is None:
            yield event_now("ignored", reason="malformed", direction=direction, frame=frame.hex())
        elif self._signals is None or name.decode() in self._signals:
            self._numbers += 1
            yield event_now(
                "notification", direction=direction, signal=name.decode(), sequence=self._numbers, frame=frame.hex()
            )
