"""Listening on an interface without a proxy: frames of both directions, as events of a monitor."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterator
from typing import Any

from inco_trio.errors import LinkMissing, PermissionRefused, ResourceRefused
from inco_trio.frame import ETHERTYPE, FRAME_MAX, decode
from inco_trio.links.packet import GONE, attach_filter, program

__all__ = ["listen"]

ETH_P_ALL = 3
PACKET_OUTGOING = 4
"""The packet type of what this host sends (packet(7))."""
_FILTER = (
    (0x28, 0, 0, 0xFFFFF000),  # ldh [protocol]
    (0x15, 0, 1, ETHERTYPE),  # jeq #0x8800
    (0x06, 0, 0, 0xFFFF),  # ret #65535
    (0x06, 0, 0, 0),  # ret #0
)


def listen(interface: str, signals: Collection[str] | None, direction: str | None) -> Iterator[dict[str, Any]]:
    """The frames on an interface, without end: those that this host sends are outbound.

    Raises PermissionRefused, LinkMissing, ResourceRefused.
    """
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError as error:
        raise PermissionRefused(f"{interface}: no proxy answers, and listening needs CAP_NET_RAW") from error
    with sock:
        try:
            attach_filter(sock, program(_FILTER))
            # Of what this host sends, only sockets of every EtherType get a copy.
            sock.bind((interface, ETH_P_ALL))
        except OSError as error:
            if error.errno in GONE:
                raise LinkMissing(f"{interface}: no proxy answers, and there is no such interface") from error
            raise ResourceRefused(f"{interface}: cannot listen: {error.strerror}") from error
        yield _event(event="message", level="info", message=f"no proxy answers: listening on {interface} itself")
        numbers = 0
        while True:
            try:
                frame, address = sock.recvfrom(FRAME_MAX + 1)
            except OSError as error:
                yield _event(event="problem", level="warning", message=f"{interface}: {error.strerror}")
                if error.errno in GONE:
                    return
                continue
            way = "outbound" if address[2] == PACKET_OUTGOING else "inbound"
            name = decode(memoryview(frame), len(frame))
            if direction not in (None, way):
                continue
            if name is None:
                yield _event(event="ignored", reason="malformed", signal=None)
            elif signals is None or name.decode() in signals:
                numbers += 1
                yield _event(event="notification", direction=way, signal=name.decode(), register=None, sequence=numbers)


def _event(**fields: object) -> dict[str, Any]:
    return {**fields, "time": time.time(), "monotonic_ns": time.monotonic_ns()}
