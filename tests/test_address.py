"""Tests of link addresses: interface names and `unix:LOCAL,peer=REMOTE`."""

from __future__ import annotations

import re

import pytest

from inco_trio.links.address import InterfaceAddress, UnixAddress, address_fault, parse_address

LONGEST = "/" + "p" * 106
TOO_LONG = "/" + "ö" * 54


@pytest.mark.parametrize("name", ["rpmsg4000", "br0.4000", "unix", "i" * 15, "é" * 7])
def test_interface_name_is_an_address(name: str) -> None:
    assert parse_address(name) == InterfaceAddress(name)
    assert parse_address(name).label == name
    assert address_fault(name) is None


@pytest.mark.parametrize(
    ("text", "local", "peer"),
    [
        ("unix:/run/core0,peer=/run/core1", "/run/core0", "/run/core1"),
        ("unix:/a b/ö,peer=/x=y:z", "/a b/ö", "/x=y:z"),
        # A doubled comma is a literal comma, as in QEMU's options.
        ("unix:/a,,b,peer=/,,,,", "/a,b", "/,,"),
        (f"unix:{LONGEST},peer=/q", LONGEST, "/q"),
    ],
)
def test_unix_address_has_a_local_and_a_peer_path(text: str, local: str, peer: str) -> None:
    address = parse_address(text)
    assert isinstance(address, UnixAddress)
    assert (address.local, address.peer, address.name) == (local, peer, local)
    assert "/" not in address.label


def test_labels_of_long_paths_are_short_and_differ() -> None:
    labels = set()
    for number in range(100):
        address = parse_address(f"unix:/run/{'long' * 10}/{number}/" + "ö" * 10 + "/core0,peer=/q")
        labels.add(address.label)
        assert len(address.label.encode()) <= 36
        assert re.fullmatch(r"[^/]*-core0-[0-9a-f]{8}", address.label)
    assert len(labels) == 100


def test_default_mac_is_stable_unicast_and_locally_administered() -> None:
    addresses = [parse_address(f"unix:/run/{number},peer=/q") for number in range(200)]
    macs = [address.mac for address in addresses if isinstance(address, UnixAddress)]
    assert len(set(macs)) == 200
    assert {mac[0] & 3 for mac in macs} == {2}
    assert {len(mac) for mac in macs} == {6}
    assert parse_address("unix:/run/0,peer=/other") == UnixAddress("/run/0", "/other", macs[0])


def test_mac_option_sets_the_mac_address() -> None:
    assert parse_address("unix:/a,mac=02:00:5E:10:00:01,peer=/b") == UnixAddress(
        "/a", "/b", bytes.fromhex("02005e100001")
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected unix:LOCAL,peer=REMOTE or an interface name"),
        ("tcp:host", "expected unix:LOCAL,peer=REMOTE or an interface name"),
        ("UNIX:/a,peer=/b", "expected unix:LOCAL,peer=REMOTE or an interface name"),
        ("unix:", "peer=REMOTE is missing"),
        ("unix:/a", "peer=REMOTE is missing"),
        ("unix:/a,,peer=/b", "peer=REMOTE is missing"),
        ("unix:,peer=/b", "the path before ',peer=': the path is empty"),
        ("unix:/a,peer=", "peer=: the path is empty"),
        ("unix:a,peer=/b", "the path before ',peer=': 'a' is not an absolute path"),
        ("unix:/a,peer=b", "peer=: 'b' is not an absolute path"),
        ("unix:/a/,peer=/b", "the path before ',peer=': '/a/' is a directory"),
        (f"unix:{LONGEST}p,peer=/b", "the path has 108 bytes (expected at most 107, see unix(7))"),
        (f"unix:/a,peer={TOO_LONG}", "peer=: the path has 109 bytes"),
        ("unix:/a,peer=/b,peer=/c", "peer= given more than once"),
        ("unix:/a,peer=/b,mtu=9000", "unknown option 'mtu=9000'"),
        ("unix:/a,peer=/b,mac", "unknown option 'mac'"),
        ("unix:/a,peer=/b,", "unknown option ''"),
        ("unix:/a,peer=/x/../a", "both sides have the same path"),
        ("unix:/a\0,peer=/b", "a NUL byte cannot be part of a path"),
        ("unix:/\ud800,peer=/b", "cannot be a path"),
        ("unix:/a,peer=/b,mac=02:00:00:00:00", "mac=02:00:00:00:00: not a unicast MAC address"),
        ("unix:/a,peer=/b,mac=03:00:00:00:00:01", "not a unicast MAC address"),
        ("unix:/a,peer=/b,mac=ff:ff:ff:ff:ff:ff", "not a unicast MAC address"),
    ],
)
def test_invalid_address_is_an_error(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        parse_address(text)
    assert fault in str(address_fault(text))
