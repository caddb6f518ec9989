"""The frame codec. A notification is an Ethernet II broadcast frame with the signal's wire name as its payload."""

from __future__ import annotations

import re

__all__ = [
    "ADDRESSES",
    "BROADCAST",
    "ETHERTYPE",
    "FRAME_MAX",
    "HEADER_LENGTH",
    "NAME_MAX",
    "decode",
    "encode",
    "is_wire_name",
]

ETHERTYPE = 0x8800
"""The EtherType of the inter-core link."""
BROADCAST = b"\xff" * 6
"""The destination MAC address of every frame."""
HEADER_LENGTH = 14
"""Length of the header in bytes: destination, source and EtherType (packet(7))."""
NAME_MAX = 64
"""Maximum length of a wire name, in bytes."""
ADDRESSES = 12
"""Length of the two addresses at the beginning of a frame, in bytes."""
FRAME_MAX = 1600
"""Maximum length of a valid frame, in bytes: enough for an 802.1Q tag, a header and the usual MTU of 1,500."""

_TYPE = ETHERTYPE.to_bytes(2, "big")
_VLAN = b"\x81\x00"
_VLAN_LENGTH = 4
_WIRE_NAME = re.compile(rb"[!-~]{1,%d}" % NAME_MAX)


def is_wire_name(name: bytes) -> bool:
    """Return whether `name` is 1 to 64 bytes of printable ASCII without spaces."""
    return _WIRE_NAME.fullmatch(name) is not None


def encode(name: bytes, source: bytes) -> bytes:
    """Return the frame for a wire name, unpadded. `source` is the MAC address of the sender. Raises ValueError."""
    if len(source) != len(BROADCAST):
        raise ValueError(f"{source!r} is not a MAC address")
    if not is_wire_name(name):
        raise ValueError(f"{name!r} is not a valid wire name")
    return BROADCAST + source + _TYPE + name


def decode(frame: bytes | memoryview, length: int | None = None) -> bytes | None:
    """Return the wire name in a frame, or None if the frame is malformed. Never raises.

    `length` is the length of the frame if `frame` is a larger buffer or only the beginning of the frame. Trailing NUL
    bytes are padding: network cards and QEMU pad a frame to 60 bytes. An 802.1Q tag before the EtherType is skipped.
    """
    if (len(frame) if length is None else length) > FRAME_MAX:
        return None
    rest = bytes(frame[ADDRESSES:length])
    start = _VLAN_LENGTH if rest.startswith(_VLAN) else 0
    if not rest.startswith(_TYPE, start):
        return None
    name = rest[start + len(_TYPE) :].rstrip(b"\0")
    return name if is_wire_name(name) else None
