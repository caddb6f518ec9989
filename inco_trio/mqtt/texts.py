"""Check that the strings in an MQTT 5 packet from a broker are UTF-8.

The codec mqtt5 (0.8) prints a traceback of several lines if a string is not UTF-8. A broker could fill the log with
such tracebacks.
"""

from __future__ import annotations

__all__ = ["check_texts"]

_PUBLISH = 3
_QOS = 0x06
"""The bits of the first byte of PUBLISH that contain the QoS."""
_BEFORE_PROPERTIES = {2: 2, 4: 3, 5: 3, 6: 3, 7: 3, 9: 2, 11: 2, 14: 1, 15: 1}
"""For each packet type, the size in bytes of the fields between the header and the properties (MQTT 5, 3.2 to 3.15)."""
_TEXT, _PAIR, _BINARY, _NUMBER = range(1, 5)
_PROPERTIES = {
    0x26: _PAIR,
    **dict.fromkeys((0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, 0x1F), _TEXT),
    **dict.fromkeys((0x09, 0x16), _BINARY),
    0x0B: _NUMBER,
}
"""The type of each property that does not have a fixed size (MQTT 5, 2.2.2.2)."""
_SIZES = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22, 0x23), 2),
    **dict.fromkeys((0x02, 0x11, 0x18, 0x27), 4),
}
"""The size in bytes of each property that has a fixed size."""


def check_texts(packet: bytes) -> None:
    """Raise ValueError if a string in a complete packet is not UTF-8. Ignore other errors, which the codec reports."""
    if packet.isascii():
        return
    kind, (_, place) = packet[0] >> 4, _number(packet, 1)
    if kind == _PUBLISH:
        place = _text(packet, place) + (2 if packet[0] & _QOS else 0)
    elif kind in _BEFORE_PROPERTIES:
        place += _BEFORE_PROPERTIES[kind]
    else:
        return
    length, place = _number(packet, place)
    end = min(place + length, len(packet))
    while place < end:
        identifier, place = packet[place], place + 1
        kind_of_value = _PROPERTIES.get(identifier)
        if kind_of_value == _TEXT:
            place = _text(packet, place)
        elif kind_of_value == _PAIR:
            place = _text(packet, _text(packet, place))
        elif kind_of_value == _BINARY:
            place += 2 + int.from_bytes(packet[place : place + 2])
        elif kind_of_value == _NUMBER:
            _, place = _number(packet, place)
        elif identifier in _SIZES:
            place += _SIZES[identifier]
        else:
            return


def _number(packet: bytes, place: int) -> tuple[int, int]:
    """Return the variable byte integer at `place`, and where it ends (MQTT 5, 1.5.5)."""
    value = 0
    for shift, byte in zip(range(0, 28, 7), packet[place : place + 4], strict=False):
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            break
    return value, place


def _text(packet: bytes, place: int) -> int:
    """Check the string at `place`, and return where it ends. Raises ValueError."""
    start = place + 2
    end = start + int.from_bytes(packet[place:start])
    packet[start:end].decode()
    return end
