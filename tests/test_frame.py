"""Tests of the frame codec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inco_trio.frame import BROADCAST, ETHERTYPE, FRAME_MAX, HEADER_LENGTH, NAME_MAX, decode, encode, is_wire_name

MAC = bytes.fromhex("02005e100001")
HEADER = BROADCAST + MAC + b"\x88\x00"
TAGGED = BROADCAST + MAC + b"\x81\x00\x0f\xa0\x88\x00"

macs = st.binary(min_size=6, max_size=6)
wire_names = st.binary(min_size=1, max_size=NAME_MAX).map(lambda b: bytes(0x21 + c % 0x5E for c in b))


def test_frame_constants_have_their_protocol_values() -> None:
    assert (ETHERTYPE, BROADCAST, HEADER_LENGTH, NAME_MAX) == (0x8800, b"\xff\xff\xff\xff\xff\xff", 14, 64)


def test_encode_gives_the_exact_bytes() -> None:
    assert encode(b"ihub_reset_irq", MAC) == bytes.fromhex("ffffffffffff 02005e100001 8800") + b"ihub_reset_irq"


@pytest.mark.parametrize(
    ("name", "source"),
    [(b"", MAC), (b"a b", MAC), (b"a\0", MAC), (b"n" * 65, MAC), (b"n", b""), (b"n", MAC[:5]), (b"n", MAC + b"\0")],
)
def test_invalid_names_cannot_be_encoded(name: bytes, source: bytes) -> None:
    with pytest.raises(ValueError, match="is not a"):
        encode(name, source)


@pytest.mark.parametrize(
    ("frame", "name"),
    [
        pytest.param(HEADER + b"x", b"x", id="shortest"),
        pytest.param(HEADER + b"!~", b"!~", id="first and last printable"),
        pytest.param(HEADER + b"n" * 64, b"n" * 64, id="longest"),
        pytest.param((HEADER + b"ihub_hwwd_irq").ljust(60, b"\0"), b"ihub_hwwd_irq", id="padded to 60"),
        pytest.param((HEADER + b"x").ljust(1514, b"\0"), b"x", id="padded to the MTU"),
        pytest.param(MAC + MAC + b"\x88\x00x", b"x", id="unicast"),
        pytest.param(TAGGED + b"x", b"x", id="802.1Q"),
        pytest.param((TAGGED + b"x").ljust(64, b"\0"), b"x", id="802.1Q, padded"),
        pytest.param(b"", None, id="empty"),
        pytest.param(HEADER[:13], None, id="no whole header"),
        pytest.param(HEADER, None, id="no payload"),
        pytest.param(HEADER.ljust(60, b"\0"), None, id="only padding"),
        pytest.param(BROADCAST + MAC + b"\x08\x00name", None, id="IPv4"),
        pytest.param(BROADCAST + MAC + b"\x00\x88name", None, id="EtherType swapped"),
        pytest.param(TAGGED[:17], None, id="802.1Q, no whole header"),
        pytest.param(TAGGED, None, id="802.1Q, no payload"),
        pytest.param(BROADCAST + MAC + b"\x81\x00\x0f\xa0\x08\x00name", None, id="802.1Q, IPv4"),
        pytest.param(BROADCAST + MAC + b"\x81\x00\x0f\xa0" * 2 + b"\x88\x00name", None, id="802.1Q twice"),
        pytest.param(HEADER + b"n" * 65, None, id="too long"),
        pytest.param(HEADER + b"n\0m", None, id="NUL inside"),
        pytest.param(HEADER + b"\0n", None, id="NUL in front"),
        pytest.param(HEADER + b"n m", None, id="space"),
        pytest.param(HEADER + b"n ", None, id="space behind"),
        pytest.param(HEADER + b"n\n", None, id="newline behind"),
        pytest.param(HEADER + b"n\x7f", None, id="DEL"),
        pytest.param(HEADER + "né".encode(), None, id="UTF-8"),
        pytest.param(HEADER + b"n\xff", None, id="not UTF-8"),
    ],
)
def test_decode_accepts_valid_frames_only(frame: bytes, name: bytes | None) -> None:
    assert decode(frame) == name


@pytest.mark.parametrize(("length", "name"), [(FRAME_MAX, b"x"), (FRAME_MAX + 1, None)])
def test_a_frame_longer_than_the_maximum_is_not_decoded(length: int, name: bytes | None) -> None:
    whole = (HEADER + b"x").ljust(length, b"\0")
    assert decode(whole) == name
    # Also decode from a receive buffer that is shorter or longer than the frame.
    assert decode(memoryview(whole)[:FRAME_MAX], length) == name
    assert decode(memoryview(whole + b"more"), length) == name


@given(name=wire_names, source=macs, padding=st.integers(0, 1500))
def test_round_trip_with_any_padding(name: bytes, source: bytes, padding: int) -> None:
    frame = encode(name, source)
    assert frame == BROADCAST + source + b"\x88\x00" + name
    assert decode(frame + bytes(padding)) == name


@given(name=wire_names, tci=st.binary(min_size=2, max_size=2))
def test_one_vlan_tag_is_skipped(name: bytes, tci: bytes) -> None:
    frame = encode(name, MAC)
    assert decode(frame[:12] + b"\x81\x00" + tci + frame[12:]) == name


@given(name=wire_names, junk=st.binary(min_size=1))
def test_trailing_junk_is_never_part_of_the_name(name: bytes, junk: bytes) -> None:
    assert decode(encode(name, MAC) + junk) != (name if junk.strip(b"\0") else None)


@given(name=wire_names)
def test_a_truncated_frame_never_decodes_to_the_whole_name(name: bytes) -> None:
    frame = encode(name, MAC)
    for length in range(len(frame)):
        assert decode(frame[:length]) == (name[: length - HEADER_LENGTH] if length > HEADER_LENGTH else None)


@given(st.binary() | st.builds(bytes.__add__, st.sampled_from([HEADER, TAGGED]), st.binary()))
def test_any_bytes_give_a_wire_name_or_none(frame: bytes) -> None:
    name = decode(frame)
    assert name is None or (is_wire_name(name) and name in frame)


@given(st.binary(max_size=70))
def test_wire_names_match_their_definition(name: bytes) -> None:
    assert is_wire_name(name) == (1 <= len(name) <= 64 and all(0x21 <= byte <= 0x7E for byte in name))
