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
from collections.abc import Collection, Iterable, Sequence

import trio

from inco_trio.errors import LinkNotFoundError, PermissionDeniedError, ResourceError
from inco_trio.frame import ETHERTYPE, FRAME_MAX, HEADER_LENGTH, encode
from inco_trio.links import name_filter
from inco_trio.links.link import LinkDownError
from inco_trio.linux import bpf, if_packet
from inco_trio.linux.bpf import Instruction
from inco_trio.linux.if_packet import GONE, SOL_PACKET
from inco_trio.linux.rtnetlink import Interface, Rtnetlink
from inco_trio.linux.sockets import SO_LOCK_FILTER, set_receive_buffer
from inco_trio.problems import report

__all__ = ["PacketLink"]

logger = logging.getLogger(__name__)

RECEIVE_BUFFER = 24 * 1024 * 1024
"""Requested receive buffer in bytes. The kernel doubles it, so 20,000 frames fit even if each of them needs 2.4 kB."""

HEAD: tuple[Instruction, ...] = (
    # Accept only frames of our EtherType.
    (bpf.LOAD_HALF, 0, 0, bpf.PROTOCOL),
    (bpf.JUMP_IF_EQUAL, 1, 0, ETHERTYPE),
    bpf.REJECT,
    # Accept only the packet types host, broadcast and multicast (0 to 2). Reject sent frames (4) and frames for other
    # hosts (3), which arrive for an unknown VLAN or at a promiscuous interface.
    (bpf.LOAD_HALF, 0, 0, bpf.PACKET_TYPE),
    (bpf.JUMP_IF_GREATER, 0, 1, 2),
    bpf.REJECT,
    # Accept only frames that belong to the interface itself. The socket also sees the frames that the kernel passes to
    # a VLAN, bond or team above the interface. `_from_interface` adds the comparison with the interface's index.
    (bpf.LOAD_WORD, 0, 0, bpf.INTERFACE),
)
"""The instructions at the start of every filter. Their binary form, HEAD_CODE, identifies our filters."""
HEAD_CODE = bpf.program(HEAD)


def _from_interface(index: int) -> tuple[Instruction, ...]:
    """Return the instructions after HEAD, which reject the frames of all interfaces except `index`."""
    return (bpf.JUMP_IF_EQUAL, 1, 0, index), bpf.REJECT


def too_short(interface: Interface, names: Iterable[bytes]) -> str | None:
    """Return the names that the kernel may be unable to send on this interface, with the reason, or None.

    Without transmit offload, the kernel drops a tagged frame with one byte of payload.
    """
    short = sorted(name.decode() for name in names if len(name) == 1) if interface.kind == "vlan" else []
    if not short:
        return None
    return f"{', '.join(short)}: the kernel may drop frames with a name of one character on a VLAN (use a longer name)"


def _unfiltered(name: str, error: OSError) -> ResourceError:
    return ResourceError(name, f"cannot attach a filter: {error.strerror} (raise net.core.optmem_max)")


DOWN = GONE | {errno.ENETDOWN}
"""Error numbers for an interface that is down or gone. A later change to the interface may fix this."""


class PacketLink:
    """The `Link` of the interface `name`. Raises ResourceError.

    If the interface is deleted and recreated, `refresh` binds the same socket again, so its queue is kept.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self.fd = sock.fileno()
        self.mac = b""
        self.running = False
        self.foreign = self.downs = 0
        self.renewal = ""
        self.wait_readable = functools.partial(trio.lowlevel.wait_readable, self.fd)
        set_receive_buffer(sock, RECEIVE_BUFFER)
        self.granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        """The size of the receive buffer that the kernel granted, in bytes."""
        self._socket = sock
        self._index = 0
        self._names: Collection[bytes] = ()
        self._outbound: Collection[bytes] = ()
        self._form: tuple[int, bool] | None = None
        """The filter's entry in `name_filter.FORMS`, or None if the filter accepts all frames."""
        self._sampled = False
        """Whether the queue contains only frames that the current filter has accepted."""
        self._frames: dict[str, bytes] = {}
        self._master = ""
        self._interface: Interface | None = None
        self._ran = 0, b""
        """The index and the address of the interface when it was last running."""
        self._too_short: str | None = None
        # Cache the bound methods: looking them up costs time for each frame.
        self._recv_into = sock.recv_into
        self._send = sock.send
        try:
            self._rtnetlink = Rtnetlink()
        except OSError as error:
            raise ResourceError(name, f"cannot watch interfaces (rtnetlink): {error.strerror}") from error

    @classmethod
    def open(cls, name: str) -> PacketLink:
        """Open a socket; `refresh` binds it. Raises PermissionDeniedError (CAP_NET_RAW is missing), ResourceError."""
        try:
            # With protocol 0, the kernel queues nothing until bind(2); by then, the options and filter are set.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except PermissionError as error:
            raise PermissionDeniedError(
                name,
                "opening a packet socket needs CAP_NET_RAW "
                "(run as root, or give the service this capability, for example as an ambient capability)",
            ) from error
        except OSError as error:
            raise ResourceError(name, f"cannot open a packet socket: {error.strerror}") from error
        try:
            try:
                bpf.attach_filter(sock, bpf.program((*HEAD, *_from_interface(0), bpf.ACCEPT)))
            except OSError as error:
                raise _unfiltered(name, error) from error
            with contextlib.suppress(OSError):
                # Do not receive our own frames. Before Linux 4.20, only the filter drops them.
                sock.setsockopt(SOL_PACKET, if_packet.PACKET_IGNORE_OUTGOING, 1)
            return cls(sock, name)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def take(cls, name: str, held: int) -> PacketLink:
        """Take over the inherited descriptor `held`. The caller must check `fits`."""
        sock = socket.socket(fileno=held)
        sock.setblocking(False)
        return cls(sock, name)

    @property
    def fits(self) -> bool:
        """Whether the socket has one of our filters and is not bound to a different interface."""
        try:
            bound, protocol = self._socket.getsockname()[:2]
            return (
                self._socket.family == socket.AF_PACKET
                and bound in ("", self.name)
                and protocol in (0, ETHERTYPE)
                and bpf.filter_of(self._socket).startswith(HEAD_CODE)
                and not self._socket.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER)
            )
        except (OSError, ValueError):
            return False

    @property
    def description(self) -> str:
        address = self.mac.hex(":") or "unknown yet"
        return f"address {address}, receive buffer of {self.granted // 1024} kB granted"

    @property
    def absence(self) -> str:
        return "the interface is gone or was renamed" if self.mac else "no such interface yet"

    @property
    def down_reason(self) -> str:
        if self.running:
            return ""
        return self.absence if self._interface is None else self._interface.down_reason or self.absence

    def missing(self) -> LinkNotFoundError:
        names = ", ".join(interface.name for interface in self._rtnetlink.interfaces()) or "none"
        return LinkNotFoundError(self.name, f"no such interface (available: {names})", "--wait-link waits for it")

    def refresh(self) -> bool:
        """Update the address and the state, bind the socket if necessary, and return whether the interface exists."""
        self.running = False
        interface = self._interface = self._rtnetlink.interface(self.name)
        # If the interface was renamed, the socket is still bound to it. A filter for index 0 rejects the interface's
        # frames.
        index = 0 if interface is None else interface.index
        if index != self._index:
            self._filter(self._form is not None, index)
        if interface is None:
            return False
        if self._bound_address(interface) is None:
            try:
                self._socket.bind((self.name, ETHERTYPE))
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return False
        mac = self._bound_address(interface)
        if mac is None:
            return False  # The interface has just been removed or replaced. An event will follow.
        if mac != self.mac:
            self.mac = mac
            self._frames.clear()
        self.running, self.downs = interface.running, interface.downs
        if self.running:
            (before, old), self._ran = self._ran, (index, mac)
            changed = f"index {before}, now {index}; address {old.hex(':')}, now {mac.hex(':')}"
            self.renewal = f"a new interface ({changed})" if before not in (0, index) else ""
        master = self._rtnetlink.interface(index=interface.master) if interface.is_taken else None
        self._log_master("" if master is None else f"{interface.master_kind} {master.name}")
        self._warn_of_short_names()
        return True

    def _bound_address(self, interface: Interface) -> bytes | None:
        """Return the address of the interface, or None if the socket is not bound to it."""
        name, protocol, _, _, address = self._socket.getsockname()
        # `self.name` may be an alternative name of the interface.
        return address[:6].ljust(6, b"\0") if name == interface.name and protocol == ETHERTYPE else None

    def expect(self, inbound: Collection[bytes], outbound: Collection[bytes]) -> None:
        before, self._names, self._outbound = self._names, inbound, outbound
        self._warn_of_short_names()
        if self._form is not None:
            try:
                self._filter(True, self._index)
            except OSError as error:
                self._names = before
                raise _unfiltered(self.name, error) from error

    def restrict(self, on: bool) -> bool:
        with contextlib.suppress(OSError):  # The former filter remains.
            self._filter(on, self._index)
        return self._form is not None

    def _filter(self, restricted: bool, index: int) -> None:
        """Accept the frames of the interface `index`. Raises OSError if the kernel refuses even the shortest filter."""
        # A filter that compares fewer bytes needs less memory, which net.core.optmem_max limits.
        for form in name_filter.FORMS if restricted else ():
            with contextlib.suppress(OSError):
                self._attach(form, index)
                return
        self._attach(None, index)

    def _attach(self, form: tuple[int, bool] | None, index: int) -> None:
        names: Sequence[bpf.Instruction] = (bpf.ACCEPT,)
        if form is not None:
            names = name_filter.name_filter(self._names, form[0], padding=form[1])
        bpf.attach_filter(self._socket, bpf.program((*HEAD, *_from_interface(index), *names)))
        # Only now: if the kernel refuses the filter, `refresh` must try again.
        self._form, self._index = form, index
        self._sampled = False

    def stands_for(self, frame: memoryview, length: int) -> int:
        if self._form is None or not self._sampled:
            return 1
        depth, padding = self._form
        # Of a longer frame, only the first FRAME_MAX bytes are known, so the filter's decision cannot be repeated.
        known = length <= FRAME_MAX and name_filter.accepts(
            bytes(frame[HEADER_LENGTH:]), self._names, depth, padding=padding
        )
        return 1 if known else name_filter.SAMPLE

    def _warn_of_short_names(self) -> None:
        if self._interface is None:
            return
        before, self._too_short = self._too_short, too_short(self._interface, self._outbound)
        if self._too_short not in (None, before):
            logger.warning("%s: %s", self.name, self._too_short)

    def _log_master(self, master: str) -> None:
        """Log when the interface joins or leaves a bridge, bond or other master. The master takes received frames."""
        before, self._master = self._master, master
        if master and master != before:
            text = f"a port of the {master}, which takes all frames (use {master.rpartition(' ')[2]} as the interface)"
            report(logger, logging.WARNING, f"{self.name}: {text}")
        elif before and not master:
            report(logger, logging.INFO, f"{self.name}: no longer a port of the {before}")

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        lengths: list[int] = []
        try:
            for length in map(self._recv_into, rooms, itertools.repeat(0), itertools.repeat(socket.MSG_TRUNC)):
                lengths.append(length)
                if length > step:
                    break
        except BlockingIOError:
            # If this call has read frames, they may be older than the filter.
            self._sampled = self._sampled or not lengths
        except OSError as error:
            # Return the frames that were read before the error. If the error persists, the next call handles it.
            if not lengths:
                self._not_down(error)
                return self.receive_into(rooms, step)
        return lengths

    def receive_one(self, room: memoryview) -> int:
        try:
            return self._recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            self._sampled = True
            return -1
        except OSError as error:
            self._not_down(error)
            return self.receive_one(room)

    def _not_down(self, error: OSError) -> None:
        # When the link goes down, the kernel reports ENETDOWN once, before the queued frames. Callers must read again:
        # if they returned no frame, the socket of a replaced link would be closed with its queue.
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
