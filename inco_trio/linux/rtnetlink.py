"""The interfaces of a network namespace: rtnetlink(7), netlink(7)."""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator

import trio

__all__ = ["Interface", "Rtnetlink"]

RTMGRP_LINK = 1
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_CREATE_EXCL = 0x600
NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINK = 5
IFLA_MASTER = 10
IFLA_OPERSTATE = 16
IFLA_LINKINFO = 18
IFLA_CARRIER_DOWN_COUNT = 48
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
IFLA_INFO_SLAVE_KIND = 4
IFLA_NET_NS_FD = 28
IFLA_LINK_NETNSID = 37
VETH_INFO_PEER = 1
NLA_TYPE_MASK = 0x3FFF

# struct nlmsghdr: length, type, flags, sequence, port. struct ifinfomsg: family, type, index, flags, change.
_HEADER = struct.Struct("=IHHII")
_INTERFACE = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")

PASSIVE_MASTERS = frozenset({"vrf", "batadv"})
"""Kinds of masters that take only some frames from their ports: a VRF takes IP, batman-adv takes its own EtherType."""

IFF_UP = 0x1
IFF_UP_AND_RUNNING = IFF_UP | 0x40
IFF_LOWER_UP = 0x10000
IF_OPER_UP = 6
OPERSTATES = ("UNKNOWN", "NOTPRESENT", "DOWN", "LOWERLAYERDOWN", "TESTING", "DORMANT", "UP")
"""The names of the operational states, as `ip link` prints them."""


class Interface:
    """One interface, as RTM_NEWLINK describes it."""

    def __init__(
        self,
        index: int,
        name: str,
        up: bool,
        running: bool,
        master: int,
        port_of: str,
        mtu: int,
        address: bytes,
        kind: str = "",
        below: int = 0,
        activated: bool = False,
        downs: int = 0,
        carrier: bool = False,
        operstate: int = 0,
    ) -> None:
        self.index = index
        self.name = name
        self.up = up
        self.running = running
        """Whether the interface is up and RUNNING: its operational state is UP or UNKNOWN."""
        self.master = master
        """The index of the bridge, bond or other master device that the interface is a port of, or 0."""
        self.port_of = port_of
        """The kind of `master`, such as "bridge", "bond" or "openvswitch", or "" if the kernel does not report it."""
        self.mtu = mtu
        """Maximum payload of a frame in bytes."""
        self.address = address
        self.kind = kind
        """The kind of a virtual interface, such as "vlan" or "veth"."""
        self.below = below
        """The index of the lower interface or of the veth peer, or 0 if it is in another network namespace."""
        self.activated = activated
        """Whether the operational state is UP (RFC 2863). Before that, a running interface may still drop frames."""
        self.downs = downs
        """How many times the carrier has gone down."""
        self.carrier = carrier
        """Whether the lower layer reports a carrier (IFF_LOWER_UP). The interface may still not be running."""
        self.operstate = operstate
        """The operational state (RFC 2863), an index of OPERSTATES."""

    @property
    def is_taken(self) -> bool:
        """Whether the master takes the frames that arrive at this interface."""
        return bool(self.master) and self.port_of not in PASSIVE_MASTERS

    @property
    def down_reason(self) -> str:
        """Why the interface is not running, or "" if it is running."""
        if self.running:
            return ""
        if not self.up:
            return "the interface was set down"
        return f"the interface is not RUNNING, but {self.state}" if self.carrier else "no carrier"

    @property
    def state(self) -> str:
        """The operational state in words."""
        return OPERSTATES[self.operstate] if self.operstate < len(OPERSTATES) else str(self.operstate)

    @property
    def master_kind(self) -> str:
        """The kind of the master in words."""
        return self.port_of or "master device"


class Rtnetlink:
    """A socket that lists, changes and observes interfaces. Raises OSError (netlink(7))."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._numbers = itertools.count(1)
        try:
            self._socket.bind((0, RTMGRP_LINK))
        except BaseException:
            self._socket.close()
            raise

    def interfaces(self) -> list[Interface]:
        return list(self._ask(NLM_F_DUMP, 0, b""))

    def interface(self, name: str = "", index: int = 0) -> Interface | None:
        """Return the interface with this name or index, or None if it does not exist."""
        return next(self._ask(0, index, _name(name) if name else b""), None)

    def add_veth(self, name: str, peer: str, peer_netns: int) -> None:
        """Create a veth pair. Its other end `peer` is in the network namespace that `peer_netns` refers to."""
        other = _INTERFACE.pack(0, 0, 0, 0, 0) + _name(peer) + _attribute(IFLA_NET_NS_FD, struct.pack("=I", peer_netns))
        self._change(RTM_NEWLINK, name, _new("veth", _attribute(VETH_INFO_PEER, other)), flags=NLM_F_CREATE_EXCL)

    def add_bridge(self, name: str) -> None:
        self._change(RTM_NEWLINK, name, _new("bridge", b""), flags=NLM_F_CREATE_EXCL)

    def set_up(self, name: str, up: bool) -> None:
        self._change(RTM_NEWLINK, name, b"", up=up)

    def set_master(self, name: str, master: int) -> None:
        """Make the interface a port of the bridge with the index `master`."""
        self._change(RTM_NEWLINK, name, _attribute(IFLA_MASTER, struct.pack("=I", master)))

    def delete(self, name: str) -> None:
        self._change(RTM_DELLINK, name, b"")

    def _change(self, kind: int, name: str, attributes: bytes, *, flags: int = 0, up: bool | None = None) -> None:
        interface = _INTERFACE.pack(0, 0, 0, IFF_UP if up else 0, 0 if up is None else IFF_UP)
        number = self._request(kind, NLM_F_ACK | flags, interface + _name(name) + attributes)
        while True:
            for answer, answered, message in _messages(self._socket.recv(65536)):
                # The kernel also sends a message about the change itself, with the same sequence number.
                if (answer, answered) == (NLMSG_ERROR, number):
                    code = -int.from_bytes(message[:4], sys.byteorder, signed=True)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return

    def _request(self, kind: int, flags: int, body: bytes) -> int:
        """Send a request and return its sequence number."""
        # Discard queued messages: they are older than the answer, and a full queue would drop the answer.
        self._drain()
        number = next(self._numbers)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | flags, number, 0) + body)
        return number

    def _ask(self, flags: int, index: int, attribute: bytes) -> Iterator[Interface]:
        number = self._request(RTM_GETLINK, flags, _INTERFACE.pack(0, 0, index, 0, 0) + attribute)
        while True:
            # The kernel queues the first part of the answer before send(2) returns, and further parts after each read.
            for kind, answered, message in _messages(self._socket.recv(65536)):
                if answered != number:
                    continue
                if kind == RTM_NEWLINK:
                    yield _parse(message)
                if kind in (NLMSG_DONE, NLMSG_ERROR) or not flags:
                    return

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                # ENOBUFS: the queue overflowed. Lost messages do not matter: they only report that something has
                # changed.
                if error.errno != errno.ENOBUFS:
                    raise

    async def wait(self) -> None:
        """Wait until any interface changes."""
        await trio.lowlevel.wait_readable(self._socket.fileno())
        self._drain()

    def wait_blocking(self, timeout: float) -> bool:
        """Block the thread until any interface changes. Return False after `timeout` seconds."""
        return bool(select.select([self._socket], [], [], timeout)[0])

    def close(self) -> None:
        self._socket.close()


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _name(name: str) -> bytes:
    return _attribute(IFLA_IFNAME, name.encode() + b"\0")


def _new(kind: str, data: bytes) -> bytes:
    """Return the attribute IFLA_LINKINFO, which selects the kind of a new interface."""
    info = _attribute(IFLA_INFO_KIND, kind.encode())
    return _attribute(IFLA_LINKINFO, info + (_attribute(IFLA_INFO_DATA, data) if data else b""))


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the type, the sequence number and the body of each message."""
    while len(data) >= _HEADER.size:
        length, kind, _flags, number, _port = _HEADER.unpack_from(data)
        yield kind, number, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a message, keyed by type."""
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & NLA_TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def _number(attributes: dict[int, bytes], kind: int) -> int:
    """Return a numeric attribute, or 0 if it is missing. The kernel uses the byte order of the machine."""
    return int.from_bytes(attributes.get(kind, b""), sys.byteorder)


def _parse(message: bytes) -> Interface:
    _family, _type, index, flags, _change = _INTERFACE.unpack_from(message)
    attributes = _attributes(message[_INTERFACE.size :])
    kinds = {
        number: value.rstrip(b"\0").decode("ascii", "replace")
        for number, value in _attributes(attributes.get(IFLA_LINKINFO, b"")).items()
    }
    return Interface(
        index,
        os.fsdecode(attributes.get(IFLA_IFNAME, b"").rstrip(b"\0")),
        bool(flags & IFF_UP),
        flags & IFF_UP_AND_RUNNING == IFF_UP_AND_RUNNING,
        _number(attributes, IFLA_MASTER),
        kinds.get(IFLA_INFO_SLAVE_KIND, ""),
        _number(attributes, IFLA_MTU),
        attributes.get(IFLA_ADDRESS, b""),
        kinds.get(IFLA_INFO_KIND, ""),
        0 if IFLA_LINK_NETNSID in attributes else _number(attributes, IFLA_LINK),
        attributes.get(IFLA_OPERSTATE) == bytes([IF_OPER_UP]),
        _number(attributes, IFLA_CARRIER_DOWN_COUNT),
        bool(flags & IFF_LOWER_UP),
        _number(attributes, IFLA_OPERSTATE),
    )
