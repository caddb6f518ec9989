"""The address of a link, as used on the command line, in `Config` and in a board file.

rpmsg4000                       the network interface of that name
unix:LOCAL,peer=REMOTE          a Unix datagram socket bound at LOCAL; the peer, such as QEMU, is bound at REMOTE
unix:LOCAL,peer=REMOTE,mac=MAC  the same, with the MAC address MAC
"""

from __future__ import annotations

import os
import re
from hashlib import blake2b

import attrs

from inco_trio.errors import InvalidArgumentError
from inco_trio.linux.sockets import SOCKET_PATH_MAX

__all__ = ["InterfaceAddress", "UnixAddress", "address_fault", "parse_address"]

INTERFACE_MAX = 15
"""Maximum length of an interface name in bytes (IFNAMSIZ of net/if.h without the NUL)."""
LABEL_MAX = 36
"""Maximum length of a label in bytes, because s6-fdholder-getdump 2.11 crashes on identifiers longer than 64 bytes."""
UNIX = "unix:"
# The kernel's dev_valid_name() refuses these bytes in interface names. Its isspace() assumes Latin-1.
_REFUSED = frozenset(b"\0/:\t\n\v\f\r \xa0")
_MAC = r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"  # Compiled only once it is needed.
_LOCALLY_ADMINISTERED = 0x02
_GROUP = 0x01


# attrs builds these classes at every proxy start. Without slots and repr, this takes less time.
@attrs.frozen(slots=False, repr=False)
class InterfaceAddress:
    """A network interface."""

    name: str

    @property
    def label(self) -> str:
        """The link's name without slashes, used in the names of services and stored descriptors."""
        return self.name

    @property
    def explanation(self) -> str:
        """A description of the link and the privilege that it needs."""
        return f"the network interface {self.name}, through an AF_PACKET socket, which needs CAP_NET_RAW"


@attrs.frozen(slots=False, repr=False)
class UnixAddress:
    """A Unix datagram socket and its peer, such as QEMU's `-netdev dgram`."""

    local: str
    peer: str
    mac: bytes

    @property
    def name(self) -> str:
        return self.local

    @property
    def label(self) -> str:
        """The path without slashes; see `InterfaceAddress.label`. A long path is replaced by its end and a hash."""
        whole = self.local.strip("/").replace("/", "-")
        if len(os.fsencode(whole)) <= LABEL_MAX:
            return whole
        digest = blake2b(os.fsencode(self.local), digest_size=4).hexdigest()
        end = os.fsencode(whole)[len(digest) + 1 - LABEL_MAX :].decode(errors="ignore")
        return f"{end}-{digest}"

    @property
    def explanation(self) -> str:
        return (
            f"a Unix datagram socket at {self.local}, which needs no privilege; the other side, such as QEMU, is "
            f"bound at {self.peer}; the MAC address is {self.mac.hex(':')}"
        )


def parse_address(text: str) -> InterfaceAddress | UnixAddress:
    """Parse the address of a link. Raises InvalidArgumentError."""
    if not isinstance(text, str):
        raise InvalidArgumentError(repr(text), "expected the name of an interface, or unix:LOCAL,peer=REMOTE")
    if text.startswith(UNIX):
        try:
            return _parse_unix(text.removeprefix(UNIX))
        except ValueError as error:
            raise InvalidArgumentError(text, str(error)) from None
    # The kernel also accepts names that are not UTF-8, but Python cannot bind a packet socket to such a name.
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = b""
    if 1 <= len(raw) <= INTERFACE_MAX and raw not in {b".", b".."} and _REFUSED.isdisjoint(raw):
        return InterfaceAddress(text)
    raise InvalidArgumentError(
        text,
        f"expected unix:LOCAL,peer=REMOTE or an interface name (1 to {INTERFACE_MAX} bytes of UTF-8 without '/', "
        "':' or whitespace)",
    )


def address_fault(text: str) -> str | None:
    """Return why `text` is not an address, or None if it is one."""
    try:
        parse_address(text)
    except InvalidArgumentError as error:
        return error.reason
    return None


def _parse_unix(text: str) -> UnixAddress:
    if "\0" in text:
        raise ValueError("a NUL byte cannot be part of a path")
    # As in QEMU's options, two commas stand for a comma in a path.
    local, *options = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    values: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in {"peer", "mac"} or not equals:
            raise ValueError(f"unknown option {option!r} (expected peer=REMOTE or mac=MAC)")
        if key in values:
            raise ValueError(f"{key}= given more than once")
        values[key] = value
    if "peer" not in values:
        raise ValueError("peer=REMOTE is missing (expected the socket path of the other side)")
    peer = values["peer"]
    for what, path in (("the path before ',peer='", local), ("peer=", peer)):
        if fault := _path_fault(path):
            raise ValueError(f"{what}: {fault}")
    if os.path.normpath(local) == os.path.normpath(peer):
        raise ValueError("both sides have the same path")
    return UnixAddress(local, peer, _parse_mac(values["mac"]) if "mac" in values else _mac_of(local))


def _path_fault(path: str) -> str | None:
    if not path:
        return "the path is empty"
    if not path.startswith("/"):
        return f"{path!r} is not an absolute path"
    if path.endswith("/"):
        return f"{path!r} is a directory"
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        return f"{path!r} cannot be a path"
    if length > SOCKET_PATH_MAX:
        return f"the path has {length} bytes (expected at most {SOCKET_PATH_MAX}, see unix(7))"
    return None


def _parse_mac(text: str) -> bytes:
    if not re.fullmatch(_MAC, text) or int(text[:2], 16) & _GROUP:
        raise ValueError(f"mac={text}: not a unicast MAC address (expected, for example, 02:00:00:00:00:01)")
    return bytes.fromhex(text.replace(":", ""))


def _mac_of(path: str) -> bytes:
    """Derive a locally administered MAC address from the path of the socket."""
    digest = bytearray(blake2b(os.fsencode(path), digest_size=6).digest())
    digest[0] = digest[0] & ~_GROUP | _LOCALLY_ADMINISTERED
    return bytes(digest)
