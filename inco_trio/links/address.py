"""What names a link: today a network interface."""

from __future__ import annotations

__all__ = ["interface_fault"]

INTERFACE_MAX = 15
"""The longest interface name, in bytes (IFNAMSIZ of net/if.h, less its NUL)."""

# What dev_valid_name() of the kernel's net/core/dev.c refuses; its isspace() is that of Latin-1.
_REFUSED = frozenset(b"\0/:\t\n\v\f\r \xa0")


def interface_fault(name: str) -> str | None:
    """What keeps `name` from being an interface's, or None.

    The kernel would take any bytes; Python binds a packet socket to a name in UTF-8 only.
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raw = b""
    if 1 <= len(raw) <= INTERFACE_MAX and raw not in {b".", b".."} and _REFUSED.isdisjoint(raw):
        return None
    return f"a name is 1 to {INTERFACE_MAX} bytes of UTF-8 without '/', ':' and whitespace"
