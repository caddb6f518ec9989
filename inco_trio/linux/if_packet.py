"""Packet sockets: packet(7) and <linux/if_packet.h>."""

from __future__ import annotations

import errno

__all__ = ["GONE"]

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_OUTGOING = 4
"""The packet type of frames that this host sends."""
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
GONE = frozenset({errno.ENODEV, errno.ENXIO})
"""Error numbers that system calls report for an interface that does not exist."""
