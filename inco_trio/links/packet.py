"""The link: an AF_PACKET socket on one interface, and the rtnetlink socket that tells when interfaces change.

See packet(7), rtnetlink(7) and, for the filter, the kernel's Documentation/networking/filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

import trio

from inco_trio.errors import LinkMissing, PermissionRefused, ResourceRefused
from inco_trio.frame import ETHERTYPE, encode

__all__ = ["Link", "LinkWatcher"]

SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
SO_ATTACH_FILTER = 26
SO_GET_FILTER = 26
SO_LOCK_FILTER = 44
SO_RCVBUFFORCE = 33
RTMGRP_LINK = 1
SIOCGIFFLAGS = 0x8913
IFF_UP_AND_RUNNING = 0x1 | 0x40

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
FILTER = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)

GONE = frozenset({errno.ENODEV, errno.ENXIO})
DOWN = GONE | {errno.ENETDOWN}
"""The interface is down or gone: the next change of an interface may mend it."""


def _attach_filter(sock: socket.socket) -> None:
    program = ctypes.create_string_buffer(FILTER, len(FILTER))
    # struct sock_fprog: the number of instructions, and where they are.
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(_FILTER), ctypes.addressof(program)))
    # From here on nobody who is handed the descriptor can widen it.
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def _filter_of(sock: socket.socket) -> bytes:
    """The filter that is attached, as the kernel gives it back."""
    # SO_GET_FILTER counts instructions where other options count bytes, so that socket.getsockopt would cut the answer.
    program = ctypes.create_string_buffer(len(FILTER))
    length = ctypes.c_uint(len(_FILTER))
    libc = ctypes.CDLL(None)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, program, ctypes.byref(length)) < 0:
        return b""
    return program.raw[: length.value * len(FILTER) // len(_FILTER)]


def _set_receive_buffer(sock: socket.socket) -> int:
    """Ask for RECEIVE_BUFFER and return what was granted, in the same unit."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # capped by net.core.rmem_max
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


class Link:
    """The socket on `interface`: receives frames of our EtherType, sends notifications.

    `granted` is the size of the receive buffer in bytes. The socket stays the same when the interface is deleted and
    made again: `refresh` binds it anew, and its queue and filter are kept. `mac` is the interface's address, `running`
    whether it is up and has a carrier.
    """

    def __init__(self, sock: socket.socket, interface: str) -> None:
        self.interface = interface
        self._socket = sock
        self._frames: dict[str, bytes] = {}
        self.mac = b""
        self.running = False
        self.fd = sock.fileno()
        self.granted = _set_receive_buffer(sock)
        # Bound methods of the hot path.
        self._recv_into = sock.recv_into
        self._send = sock.send

    @classmethod
    def open(cls, interface: str) -> Link:
        """Open a socket that is not bound yet: `refresh` binds it.

        Raises PermissionRefused without CAP_NET_RAW, ResourceRefused for want of descriptors or memory.
        """
        try:
            # Protocol 0: nothing is queued until bind, when options and filter are in place.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except PermissionError as error:
            raise PermissionRefused(
                f"{interface}: opening a packet socket needs CAP_NET_RAW "
                "(run as root, or `setcap cap_net_raw+ep` / ambient capability for the service)"
            ) from error
        except OSError as error:
            raise ResourceRefused(f"{interface}: cannot open a packet socket: {error.strerror}") from error
        try:
            sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            _attach_filter(sock)
            return cls(sock, interface)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def take(cls, interface: str, held: int) -> Link:
        """Take over the inherited descriptor `held`; see `fits`."""
        sock = socket.socket(fileno=held)
        sock.setblocking(False)
        return cls(sock, interface)

    @property
    def fits(self) -> bool:
        """Whether this socket is what `open` would make: our filter, and no other interface's."""
        try:
            bound, protocol = self._socket.getsockname()[:2]
            return (
                self._socket.family == socket.AF_PACKET
                and bound in ("", self.interface)
                and protocol in (0, ETHERTYPE)
                and _filter_of(self._socket) == FILTER
            )
        except (OSError, ValueError):
            return False

    def refresh(self) -> bool:
        """Bind to the interface if the socket is not bound to it now; learn its address and its state.

        Returns whether the interface exists. Raises OSError other than ENODEV (bind(2)).
        """
        self.running = False
        if self._bound_address() is None:
            try:
                self._socket.bind((self.interface, ETHERTYPE))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return False
        mac = self._bound_address()
        if mac is None:
            return False
        if mac != self.mac:
            self.mac = mac
            self._frames.clear()
        self.running = self._is_running()
        return True

    def _is_running(self) -> bool:
        request = struct.pack("16sH14x", self.interface.encode(), 0)
        try:
            answer = fcntl.ioctl(self.fd, SIOCGIFFLAGS, request)
        except OSError:
            return False  # It went this very moment.
        flags: int = struct.unpack("16sH14x", answer)[1]
        return flags & IFF_UP_AND_RUNNING == IFF_UP_AND_RUNNING

    def _bound_address(self) -> bytes | None:
        """The address of the interface, or None if the socket is not bound to it."""
        name, protocol, _, _, address = self._socket.getsockname()
        return address[:6].ljust(6, b"\0") if name == self.interface and protocol == ETHERTYPE else None

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        """Read queued frames, one into each of `rooms`, until none is left; returns their lengths.

        A frame longer than `step` is the last one read, as the rooms overlap beyond that. One longer than its room is
        cut; its length is the true one. An error (packet(7)) ends the batch; OSError is raised if nothing was read, but
        not for a link that went down.
        """
        lengths: list[int] = []
        receive, truncated = self._recv_into, socket.MSG_TRUNC
        try:
            for room in rooms:
                length = receive(room, 0, truncated)
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
        """Read one frame into `room`; returns its length, 0 if none is queued. Otherwise as `receive_into`."""
        try:
            return self._recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._not_down(error)
            return 0

    def _not_down(self, error: OSError) -> None:
        # The kernel says once that the link went down; the queue is kept, and reading it goes on.
        if error.errno != errno.ENETDOWN:
            raise error

    def send(self, name: str) -> None:
        """Send the frame of one notification. Raises BlockingIOError, or OSError (packet(7))."""
        if not self.running:
            # Without a carrier the kernel would accept the frame, drop it, and say nothing.
            raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        frame = self._frames.get(name)
        if frame is None:
            frame = self._frames[name] = encode(name.encode("ascii"), self.mac)
        self._send(frame)

    def dropped(self) -> int:
        """Frames dropped by the kernel since the last call (PACKET_STATISTICS resets when read)."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        return int(struct.unpack("=II", statistics)[1])

    def close(self) -> None:
        """Close this process's descriptor; the queue lives on if somebody else holds one."""
        # A held descriptor never becomes invalid by our close, so that a waiter would not be woken.
        trio.lowlevel.notify_closing(self.fd)
        self._socket.close()


def missing(interface: str) -> LinkMissing:
    """The error for an interface that does not exist, with the names of those that do."""
    names = ", ".join(name for _, name in socket.if_nameindex()) or "none"
    return LinkMissing(f"{interface}: no such interface (there are: {names}); --wait-link waits for it")


class LinkWatcher:
    """Wakes when any interface of the network namespace changes (rtnetlink, RTMGRP_LINK)."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, RTMGRP_LINK))
        except BaseException:
            self._socket.close()
            raise

    async def wait(self) -> None:
        """Wait for a change. What changed is not told: look."""
        await trio.lowlevel.wait_readable(self._socket.fileno())
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                # The queue overran: something changed, which is all we ask.
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
