"""A link that is a network interface: an AF_PACKET socket on it.

See packet(7) and, for the filter, the kernel's Documentation/networking/filter.rst.
"""

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
from inco_trio.linux.packet import (
    GONE,
    PACKET_IGNORE_OUTGOING,
    PACKET_STATISTICS,
    SOL_PACKET,
    attach_filter,
    filter_of,
    program,
)
from inco_trio.linux.rtnetlink import Rtnetlink
from inco_trio.linux.sockets import set_receive_buffer

__all__ = ["PacketLink"]

logger = logging.getLogger(__name__)

RECEIVE_BUFFER = 24 * 1024 * 1024
"""Bytes asked for, which the kernel doubles: 20,000 frames even where a driver spends 2.4 kB on each."""

# Accept a frame of our EtherType whose packet type (SKF_AD_PKTTYPE) is host, broadcast or multicast (0 to 2), not one
# for another host (a foreign VLAN or a promiscuous interface) and not one of our own (3, 4).
_FILTER = (
    (0x28, 0, 0, 0xFFFFF000),  # ldh [protocol]
    (0x15, 0, 3, ETHERTYPE),  # jeq #0x8800
    (0x28, 0, 0, 0xFFFFF004),  # ldh [packet type]
    (0x25, 1, 0, 2),  # jgt #2
    (0x06, 0, 0, 0xFFFF),  # ret #65535
    (0x06, 0, 0, 0),  # ret #0
)


FILTER = program(_FILTER)

DOWN = GONE | {errno.ENETDOWN}
"""The interface is down or gone: the next change of an interface may mend it."""


class PacketLink:
    """The socket on the interface `name`: receives frames of our EtherType, sends notifications.

    It stays the same when the interface is deleted and made again: `refresh` binds it anew, and its queue and filter
    are kept. `mac` is the interface's address, `running` whether it is up and has a carrier. Raises ResourceError.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self.fd = sock.fileno()
        self.mac = b""
        self.running = False
        self.foreign = 0
        self.wait_readable = functools.partial(trio.lowlevel.wait_readable, self.fd)
        set_receive_buffer(sock, RECEIVE_BUFFER)
        self.granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        """The size of the receive buffer, in bytes."""
        self._socket = sock
        self._frames: dict[str, bytes] = {}
        self._bridge = ""
        # Bound methods of the hot path.
        self._recv_into = sock.recv_into
        self._send = sock.send
        try:
            self._rtnetlink = Rtnetlink()
        except OSError as error:
            raise ResourceError(name, f"cannot watch interfaces (rtnetlink): {error.strerror}") from error

    @classmethod
    def open(cls, name: str) -> PacketLink:
        """Open a socket that is not bound yet: `refresh` binds it.

        Raises PermissionDeniedError without CAP_NET_RAW, ResourceError for want of descriptors or memory.
        """
        try:
            # Protocol 0: nothing is queued until bind, when options and filter are in place.
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
            attach_filter(sock, FILTER)
            with contextlib.suppress(OSError):
                # Spares us our own frames. Before Linux 4.20 it is unknown, and the filter alone drops them.
                sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
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
        """Whether this socket is what `open` would make: our filter, and no other interface's."""
        try:
            bound, protocol = self._socket.getsockname()[:2]
            return (
                self._socket.family == socket.AF_PACKET
                and bound in ("", self.name)
                and protocol in (0, ETHERTYPE)
                and filter_of(self._socket, len(FILTER)) == FILTER
            )
        except (OSError, ValueError):
            return False

    @property
    def description(self) -> str:
        """The address, and the receive buffer that was granted."""
        address = self.mac.hex(":") or "unknown yet"
        return f"address {address}, receive buffer of {self.granted // 1024} kB granted"

    @property
    def absence(self) -> str:
        """See `Link.absence`."""
        return "the interface is gone" if self.mac else "no such interface yet"

    def missing(self) -> LinkNotFoundError:
        """The error for an interface that does not exist, with the names of those that do."""
        names = ", ".join(interface.name for interface in self._rtnetlink.interfaces()) or "none"
        return LinkNotFoundError(self.name, f"no such interface (there are: {names})", "--wait-link waits for it")

    def refresh(self) -> bool:
        """Bind to the interface if the socket is not bound to it now; learn its address and its state.

        Returns whether the interface exists. Raises OSError other than ENODEV (bind(2)).
        """
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
            return False  # It went this very moment.
        if mac != self.mac:
            self.mac = mac
            self._frames.clear()
        self.running = interface.running
        bridge = self._rtnetlink.interface(index=interface.master) if interface.port_of == "bridge" else None
        self._say_bridge("" if bridge is None else bridge.name)
        return True

    def _bound_address(self) -> bytes | None:
        """The address of the interface, or None if the socket is not bound to it."""
        name, protocol, _, _, address = self._socket.getsockname()
        return address[:6].ljust(6, b"\0") if name == self.name and protocol == ETHERTYPE else None

    def _say_bridge(self, bridge: str) -> None:
        """Say that the interface is the port of a bridge, which takes frames before our socket sees them."""
        before, self._bridge = self._bridge, bridge
        if bridge and bridge != before:
            logger.warning(
                "%s: is a port of the bridge %s, which takes its frames: use %s as the interface",
                self.name,
                bridge,
                bridge,
            )
        elif before and not bridge:
            logger.info("%s: is no port of the bridge %s any more", self.name, before)

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        """See `Link.receive_into`. Errors: packet(7)."""
        lengths: list[int] = []
        try:
            for length in map(self._recv_into, rooms, itertools.repeat(0), itertools.repeat(socket.MSG_TRUNC)):
                lengths.append(length)
                if length > step:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            # After some frames, which come first: it has passed, or comes again.
            if not lengths:
                self._not_down(error)
        return lengths

    def receive_one(self, room: memoryview) -> int:
        """See `Link.receive_one`. Errors: packet(7)."""
        try:
            return self._recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return -1
        except OSError as error:
            self._not_down(error)
            return -1

    def _not_down(self, error: OSError) -> None:
        # The kernel says once that the link went down; the queue is kept, and reading it goes on.
        if error.errno != errno.ENETDOWN:
            raise error

    def frame(self, name: str) -> bytes:
        """See `Link.frame`."""
        frame = self._frames.get(name)
        if frame is None:
            if not self.mac:  # An interface that has never been there.
                raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
            frame = self._frames[name] = encode(name.encode("ascii"), self.mac)
        return frame

    def send(self, name: str) -> None:
        """Send the frame of one notification. Raises BlockingIOError, LinkDownError, or OSError (packet(7))."""
        self.send_frame(self._frames.get(name) or self.frame(name))

    def send_frame(self, frame: bytes) -> None:
        """See `Link.send_frame`."""
        if not self.running:
            # Without a carrier the kernel would accept the frame, drop it, and say nothing.
            raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        try:
            self._send(frame)
        except OSError as error:
            if error.errno in DOWN:
                raise LinkDownError(error.errno, error.strerror) from None
            raise

    async def wait_for_room(self) -> None:
        """Wait until the socket is writable."""
        await trio.lowlevel.wait_writable(self.fd)

    async def changed(self) -> None:
        """Wait until an interface of the network namespace changes."""
        await self._rtnetlink.wait()

    def dropped(self) -> int:
        """See `Link.dropped` (PACKET_STATISTICS, which is reset when it is read)."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        return int(struct.unpack("=II", statistics)[1])

    def close(self, *, remove: bool = False) -> None:  # noqa: ARG002 - there is nothing to remove
        """See `Link.close`."""
        # A held descriptor never becomes invalid by our close, so that a waiter would not be woken.
        trio.lowlevel.notify_closing(self.fd)
        self._socket.close()
        self._rtnetlink.close()
