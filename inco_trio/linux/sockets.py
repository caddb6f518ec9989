"""Options and limits of sockets: socket(7) and unix(7), with the constants of <asm-generic/socket.h>."""

from __future__ import annotations

import socket

__all__ = ["SOCKET_PATH_MAX", "SO_PEEK_OFF", "set_receive_buffer"]

SO_RCVBUFFORCE = 33
SO_PEEK_OFF = 42
SOCKET_PATH_MAX = 107
"""Maximum length of a socket path in bytes (sun_path of unix(7) without the NUL)."""


def set_receive_buffer(sock: socket.socket, size: int) -> None:
    """Request a receive buffer of `size` bytes; the kernel doubles this value.

    Without CAP_NET_ADMIN in the initial user namespace, the kernel caps `size` at net.core.rmem_max.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
