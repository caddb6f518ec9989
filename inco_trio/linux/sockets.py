"""Options and limits of sockets: socket(7), unix(7). The constants are those of <asm-generic/socket.h>."""

from __future__ import annotations

import socket

__all__ = ["SOCKET_PATH_MAX", "SO_PEEK_OFF", "set_receive_buffer"]

SO_RCVBUFFORCE = 33
SO_PEEK_OFF = 42
SOCKET_PATH_MAX = 107
"""The longest path of a socket, in bytes (sun_path of unix(7) without its NUL)."""


def set_receive_buffer(sock: socket.socket, size: int) -> None:
    """Ask for a receive buffer of `size` bytes, which the kernel doubles.

    Only CAP_NET_ADMIN in the first user namespace may exceed net.core.rmem_max; without it, that is the limit.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
