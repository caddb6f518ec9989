"""What names a link: today a network interface."""

from __future__ import annotations

import os

from inco_trio.signals import is_path

__all__ = ["interface_fault"]

INTERFACE_MAX = 15
"""The longest interface name, in bytes (IFNAMSIZ of net/if.h, less its NUL)."""

# What dev_valid_name() of the kernel's net/core/dev.c refuses; its isspace() is that of Latin-1.
_REFUSED = frozenset(b"/:\t\n\v\f\r \xa0")


def interface_fault(name: str) -> str | None:
    """What keeps `name` from being an interface's, or None."""
    # No path, but given to the kernel in the same way: without NUL, in the encoding of the file system.
    raw = os.fsencode(name) if is_path(name) else b""
    if 1 <= len(raw) <= INTERFACE_MAX and raw not in {b".", b".."} and _REFUSED.isdisjoint(raw):
        return None
    return f"a name is 1 to {INTERFACE_MAX} bytes without '/', ':' and whitespace"
