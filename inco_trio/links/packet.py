"""A link over a network interface: an AF_PACKET socket (packet(7)) with a filter."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import socket
import struct
from collections.abc import Sequence

import trio

from inco_trio.errors import LinkNotFoundError, PermissionDeniedError, ResourceError
from inco_trio.frame import ETHERTYPE, encode
from inco_trio.links.link import LinkDownError
from inco_trio.linux import if_packet
from inco_trio.linux.if_packet import GONE, SOL_PACKET
from inco_trio.linux.rtnetlink import Rtnetlink
from inco_trio.linux.sockets import set_receive_buffer
from inco_trio.problems import report

__all__ = ["PacketLink"]

logger = logging.getLogger(__name__)

RECEIVE_BUFFER = 24 * 1024 * 1024
"""Requested size in bytes. The kernel doubles it: room for 20,000 frames even if a driver uses 2.4 kB per frame."""

# Accept frames of our EtherType with the packet type (SKF_AD_PKTTYPE) host, broadcast or multicast (0 to 2). Refuse
# frames for other hosts (a foreign VLAN, a promiscuous interface) and sent frames (3, 4). See the kernel's
# Documentation/networking/filter.rst.
FILTER = if_packet.program((
    (0x28, 0, 0, 0xFFFFF000),  # ldh [protocol]
    (0x15, 0, 3, ETHERTYPE),  # jeq #0x8800
    (0x28, 0, 0, 0xFFFFF004),  # ldh [packet type]
    (0x25, 1, 0, 2),  # jgt #2
    (0x06, 0, 0, 0xFFFF),  # ret #65535
    (0x06, 0, 0, 0),  # ret #0
))  # fmt: skip

DOWN = GONE | {errno.ENETDOWN}
"""Error numbers if the interface is down or gone. A later change of the interface may fix this."""


class PacketLink:
    """The `Link` of the interface `name`. Raises ResourceError.

    If the interface is deleted and recreated, `refresh` binds the same socket again, which keeps its queue and filter.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self.fd = sock.fileno()
        self.mac = b""
        self.running = False
        self.foreign = self.downs = 0
        self.wait_readable = functools.partial(trio.lowlevel.wait_readable, self.fd)
        set_receive_buffer(sock, RECEIVE_BUFFER)
        self.granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        """The size of the receive buffer that the kernel granted, in bytes."""
        self._socket = sock
        self._frames: dict[str, bytes] = {}
        self._bridge = ""
        # Cache the bound methods: looking them up costs time for each frame.
        self._recv_into = sock.recv_into
        self._send = sock.send
        try:
            self._rtnetlink = Rtnetlink()
        except OSError as error:
            raise ResourceError(name, f"cannot watch interfaces (rtnetlink): {error.strerror}") from error

    @classmethod
    def open(cls, name: str) -> PacketLink:
        """Open a socket; `refresh` binds it. Raises PermissionDeniedError without CAP_NET_RAW, and ResourceError."""
        try:
            # With protocol 0, the kernel queues nothing until bind(2); by then, options and filter are set.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except PermissionError as error:
            raise PermissionDeniedError(
                name,
                "opening a packet socket needs CAP_NET_RAW "
                "(run as root, or `setcap cap_net_raw+ep` / ambient capability for the service)",
            ) from error
        except OSError as error:
            raise ResourceError(name, f"cannot open a packet socket: {error.strerror}") from error
        try:
            if_packet.attach_filter(sock, FILTER)
            with contextlib.suppress(OSError):
                # Do not receive our own frames. Before Linux 4.20, only the filter drops them.
                sock.setsockopt(SOL_PACKET, if_packet.PACKET_IGNORE_OUTGOING, 1)
            return cls(sock, name)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def take(cls, name: str, held: int) -> PacketLink:
        """Take over the inherited descriptor `held`; see `fits`."""
        sock = socket.socket(fileno=held)
        sock.setblocking(False)
        return cls(sock, name)

    @property
    def fits(self) -> bool:
        """Whether the socket has our filter and is not bound to another interface."""
        try:
            bound, protocol = self._socket.getsockname()[:2]
            return (
                self._socket.family == socket.AF_PACKET
                and bound in ("", self.name)
                and protocol in (0, ETHERTYPE)
                and if_packet.filter_of(self._socket, len(FILTER)) == FILTER
            )
        except (OSError, ValueError):
            return False

    @property
    def description(self) -> str:
        address = self.mac.hex(":") or "unknown yet"
        return f"address {address}, receive buffer of {self.granted // 1024} kB granted"

    @property
    def absence(self) -> str:
        return "the interface is gone" if self.mac else "no such interface yet"

    def missing(self) -> LinkNotFoundError:
        names = ", ".join(interface.name for interface in self._rtnetlink.interfaces()) or "none"
        return LinkNotFoundError(self.name, f"no such interface (there are: {names})", "--wait-link waits for it")

    def refresh(self) -> bool:
        """Update address and state, bind the socket if necessary, and return whether the interface exists."""
        self.running = False
        if self._bound_address() is None:
            try:
                self._socket.bind((self.name, ETHERTYPE))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return False
        mac, interface = self._bound_address(), self._rtnetlink.interface(self.name)
        if mac is None or interface is None:
            return False  # The interface was removed just now.
        if mac != self.mac:
            self.mac = mac
            self._frames.clear()
        self.running, self.downs = interface.running, interface.downs
        bridge = self._rtnetlink.interface(index=interface.master) if interface.port_of == "bridge" else None
        self._log_bridge("" if bridge is None else bridge.name)
        return True

    def _bound_address(self) -> bytes | None:
        """Return the address of the interface, or None if the socket is not bound to it."""
        name, protocol, _, _, address = self._socket.getsockname()
        return address[:6].ljust(6, b"\0") if name == self.name and protocol == ETHERTYPE else None

    def _log_bridge(self, bridge: str) -> None:
        """Log when the interface joins or leaves a bridge, which takes frames before our socket receives them."""
        before, self._bridge = self._bridge, bridge
        if bridge and bridge != before:
            text = f"a port of the bridge {bridge}, which takes all frames (use {bridge} as the interface)"
            report(logger, logging.WARNING, f"{self.name}: {text}")
        elif before and not bridge:
            report(logger, logging.INFO, f"{self.name}: no longer a port of the bridge {before}")

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        lengths: list[int] = []
        try:
            for length in map(self._recv_into, rooms, itertools.repeat(0), itertools.repeat(socket.MSG_TRUNC)):
                lengths.append(length)
                if length > step:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            # Return the frames that were read. A persistent error occurs again in the next call.
            if not lengths:
                self._not_down(error)
        return lengths

    def receive_one(self, room: memoryview) -> int:
        try:
            return self._recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return -1
        except OSError as error:
            self._not_down(error)
            return -1

    def _not_down(self, error: OSError) -> None:
        # The kernel reports only once that the link went down (ENETDOWN). The queue remains readable.
        if error.errno != errno.ENETDOWN:
            raise error

    def frame(self, name: str) -> bytes:
        frame = self._frames.get(name)
        if frame is None:
            if not self.mac:  # The interface has never existed.
                raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
            frame = self._frames[name] = encode(name.encode("ascii"), self.mac)
        return frame

    def send(self, name: str) -> None:
        self.send_frame(self._frames.get(name) or self.frame(name))

    def send_frame(self, frame: bytes) -> None:
        if not self.running:
            # Without a carrier, the kernel would accept the frame and drop it silently.
            raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        try:
            self._send(frame)
        except OSError as error:
            if error.errno in DOWN:
                raise LinkDownError(error.errno, error.strerror) from None
            raise

    async def wait_for_room(self) -> None:
        await trio.lowlevel.wait_writable(self.fd)

    async def changed(self) -> None:
        await self._rtnetlink.wait()

    def dropped(self) -> int:
        # Reading PACKET_STATISTICS resets the counters.
        statistics = self._socket.getsockopt(SOL_PACKET, if_packet.PACKET_STATISTICS, 8)
        return int(struct.unpack("=II", statistics)[1])

    def close(self, *, remove: bool = False) -> None:  # noqa: ARG002 - there is nothing to remove
        # While another process has the descriptor, closing it here would not wake a waiting task.
        trio.lowlevel.notify_closing(self.fd)
        self._socket.close()
        self._rtnetlink.close()
