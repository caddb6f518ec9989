"""A writer for pcapng, and a streaming reader for pcapng and classic pcap.

See draft-ietf-opsawg-pcapng and pcap-savefile(5). The existing libraries do not fit: python-pcapng and dpkt have had no
release since 2022, importing scapy takes longer than a replay, and none of them reports where a file is truncated.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

import attrs

from inco_trio.errors import RecordingError
from inco_trio.signals import Direction

__all__ = ["OBJECT", "Interface", "Packet", "Reader", "interface_block", "packet_block", "section_block"]

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
UNREAD = {2: "in an obsolete Packet Block", 3: "in a Simple Packet Block, which has no timestamp"}
"""The types of blocks that contain a packet which the reader skips, and how to describe these packets."""
BYTE_ORDER = 0x1A2B3C4D
ETHERNET = 1
"""The link type LINKTYPE_ETHERNET."""

COMMENT, END = 1, 0
IF_NAME, IF_TSRESOL, IF_TSOFFSET = 2, 9, 14
SHB_USERAPPL, EPB_FLAGS = 4, 2
NANOSECONDS = 9
BILLION = 10**9

DIRECTIONS = {1: Direction.INBOUND, 2: Direction.OUTBOUND}
"""The direction of a packet, for each value of the lowest two bits of epb_flags."""
_FLAGS = {direction: bits for bits, direction in DIRECTIONS.items()}

BLOCK_MAX = 16 * 2**20
"""Maximum size of a block in bytes. Like libpcap, the reader treats a larger block as damaged."""
MEMORY_MAX = 2**30
"""Maximum memory in bytes, as estimated, for what the reader of a recording keeps of it."""
OBJECT = 400
"""Estimated memory of an object that the reader keeps, without its texts, in bytes."""
OPTION_MAX = 0xFFFF
"""Maximum size of an option in bytes."""

# The time units per second in a classic pcap file, for each magic number.
_CLASSIC = {0xA1B2C3D4: 10**6, 0xA1B23C4D: BILLION}


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    # Never truncate in the middle of a character: a text option must be valid UTF-8.
    return _option(code, text.encode("utf-8", "backslashreplace")[:OPTION_MAX].decode("utf-8", "ignore").encode())


def _block(kind: int, body: bytes, options: bytes) -> bytes:
    if options:
        options += struct.pack("<HH", END, 0)
    length = 12 + len(body) + len(options)
    return struct.pack("<II", kind, length) + body + options + struct.pack("<I", length)


def section_block(application: str) -> bytes:
    """Return the header of a little-endian section of unspecified length, written by `application`."""
    return _block(SECTION, struct.pack("<IHHq", BYTE_ORDER, 1, 0, -1), _text(SHB_USERAPPL, application))


def interface_block(name: str) -> bytes:
    """Return the block that describes an Ethernet interface with timestamps in nanoseconds."""
    options = _text(IF_NAME, name) + _option(IF_TSRESOL, bytes([NANOSECONDS]))
    return _block(INTERFACE, struct.pack("<HHI", ETHERNET, 0, 0), options)


def packet_block(interface: int, time_ns: int, data: bytes, direction: Direction | None, comment: str = "") -> bytes:
    """Return the block of a packet on interface number `interface`. `time_ns` counts from 1970 (0 to 2**64 - 1)."""
    options = _text(COMMENT, comment) if comment else b""
    if direction is not None:
        options += _option(EPB_FLAGS, struct.pack("<I", _FLAGS[direction]))
    head = struct.pack("<IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), len(data))
    return _block(PACKET, head + data + bytes(-len(data) % 4), options)


@attrs.frozen
class Interface:
    """A capture interface in a file. `name` is empty if the file contains no name for it."""

    name: str
    linktype: int
    units: int = 10**6
    """Time units per second."""
    offset: int = 0
    """Seconds to add to the timestamps."""


@attrs.frozen
class Packet:
    """A captured packet. `time_ns` counts from 1970; `length` is the original length, even if `data` is truncated."""

    time_ns: int
    interface: Interface
    data: bytes
    length: int
    direction: Direction | None = None
    comment: str = ""


class _CutError(Exception):
    """The file is truncated or damaged at the current position."""


class Reader:
    """An iterable of the complete packets in a recording.

    After the last packet, `cut` is the reason why the rest of the file could not be read, or None. `application` is
    the program that wrote the file, or "" if unknown. Raises RecordingError if `file` is neither pcapng nor pcap.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.application = ""
        self.cut: str | None = None
        self.skipped: Counter[str] = Counter()
        """The number of packets that were skipped, keyed by the values of `UNREAD`."""
        self.position = 0
        """Number of bytes read so far."""
        self._file = file
        self._name = name
        self._kept = 0
        self._order = "<"
        self._interfaces: list[Interface] = []
        try:
            magic = self._read(4)
        except _CutError:
            raise RecordingError(name, f"not a recording: {'truncated' if self.position else 'empty'}") from None
        self._units = 0
        if magic != SECTION.to_bytes(4, "little"):
            for order in "<>":
                if units := _CLASSIC.get(struct.unpack(f"{order}I", magic)[0]):
                    self._order, self._units = order, units
        try:
            if self._units:
                self._classic_header()
            elif magic == SECTION.to_bytes(4, "little"):
                self._section()
            else:
                raise RecordingError(name, "not a recording: neither pcapng nor pcap")
        except _CutError as cut:
            raise RecordingError(name, f"not a recording: {cut}") from None

    def keep(self, size: int, text: str = "") -> None:
        """Count memory that is needed until the end: `size` bytes, and a text, also as JSON.

        Raises RecordingError if it is too much.
        """
        self._kept += size + 16 * len(text)
        if self._kept > MEMORY_MAX:
            advice = "split the recording, for example with editcap -c"
            raise RecordingError(self._name, f"needs more than {MEMORY_MAX >> 20} MiB of memory ({advice})")

    def __iter__(self) -> Iterator[Packet]:
        try:
            yield from self._classic() if self._units else self._blocks()
        except _CutError as cut:
            self.cut = str(cut)

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise _CutError(f"cannot be read after {self.position} bytes: {error.strerror}") from error
        self.position += len(data)
        if len(data) < size and (data or not may_end):
            raise _CutError(f"truncated after {self.position} bytes")
        return data

    def _unpack(self, layout: str, data: bytes, offset: int = 0) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self._order + layout, data, offset)
        except struct.error:
            raise self._damage("a block is too short") from None

    def _damage(self, what: str) -> _CutError:
        return _CutError(f"damaged before byte {self.position}: {what}")

    def _classic_header(self) -> None:
        *_, linktype = self._unpack("HHiIII", self._read(20))
        self._interfaces = [Interface("", linktype & 0xFFFF, self._units)]

    def _classic(self) -> Iterator[Packet]:
        (interface,) = self._interfaces
        while head := self._read(16, may_end=True):
            seconds, fraction, captured, length = self._unpack("IIII", head)
            if captured > BLOCK_MAX:
                raise self._damage(f"the packet length {captured} is not valid")
            time_ns = seconds * BILLION + fraction * BILLION // self._units
            yield Packet(time_ns, interface, self._read(captured), length)

    def _section(self) -> None:
        length, magic = self._read(4), self._read(4)
        orders = [order for order in "<>" if struct.unpack(f"{order}I", magic)[0] == BYTE_ORDER]
        if not orders:
            raise self._damage("invalid byte order")
        self._order = orders[0]
        (size,) = self._unpack("I", length)
        body = self._body(size, 12)
        major, _minor, _length = self._unpack("HHq", body)
        if major != 1:
            raise self._damage(f"unknown version {major}")
        self._interfaces = []
        self.application = _string(self._options(body, 12).get(SHB_USERAPPL, b""))

    def _body(self, size: int, already: int) -> bytes:
        """Return the rest of a block after its first `already` bytes, without the repeated length at the end."""
        if size % 4 or not already + 4 <= size <= BLOCK_MAX:
            raise self._damage(f"the block length {size} is not valid")
        rest = self._read(size - already)
        if self._unpack("I", rest, len(rest) - 4) != (size,):
            raise self._damage("the two lengths of a block differ")
        return rest[:-4]

    def _blocks(self) -> Iterator[Packet]:
        while head := self._read(4, may_end=True):
            (kind,) = self._unpack("I", head)
            if kind == SECTION:
                self._section()
                continue
            (size,) = self._unpack("I", self._read(4))
            body = self._body(size, 8)
            if kind == INTERFACE:
                self._interfaces.append(self._interface(body))
            elif kind == PACKET:
                yield self._packet(body)
            elif kind in UNREAD:
                self.skipped[UNREAD[kind]] += 1

    def _interface(self, body: bytes) -> Interface:
        linktype, _reserved, _snaplen = self._unpack("HHI", body)
        options = self._options(body, 8)
        (resolution,) = options.get(IF_TSRESOL, b"")[:1] or b"\6"
        units = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
        offset = options.get(IF_TSOFFSET, bytes(8))
        name = _string(options.get(IF_NAME, b""))
        self.keep(OBJECT, name)
        return Interface(name, linktype, units, self._unpack("q", offset)[0])

    def _packet(self, body: bytes) -> Packet:
        number, high, low, captured, length = self._unpack("IIIII", body)
        end = 20 + captured
        if number >= len(self._interfaces) or end > len(body):
            fault = "a packet without an interface" if end <= len(body) else "a packet is longer than its block"
            raise self._damage(fault)
        interface = self._interfaces[number]
        options = self._options(body, end + -captured % 4)
        flags = self._unpack("I", options[EPB_FLAGS])[0] if EPB_FLAGS in options else 0
        return Packet(
            (high << 32 | low) * BILLION // interface.units + interface.offset * BILLION,
            interface,
            body[20:end],
            length,
            DIRECTIONS.get(flags & 3),
            _string(options.get(COMMENT, b"")),
        )

    def _options(self, body: bytes, offset: int) -> dict[int, bytes]:
        """Return the options that start at `offset`, keyed by code. If a code is repeated, use its first option."""
        found: dict[int, bytes] = {}
        while offset < len(body):
            code, length = self._unpack("HH", body, offset)
            if code == END:
                break
            offset += 4
            if offset + length > len(body):
                raise self._damage("an option is longer than its block")
            found.setdefault(code, body[offset : offset + length])
            offset += length + -length % 4
        return found


def _string(value: bytes) -> str:
    return value.decode("utf-8", "replace").rstrip("\0")
