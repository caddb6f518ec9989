"""Options and limits of sockets: socket(7) and unix(7), with the constants of <asm-generic/socket.h>."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Protocol

__all__ = [
    "RECEIVED_WITH_DATA", "SOCKET_PATH_MAX", "SO_LOCK_FILTER", "SO_PASSRIGHTS", "SO_PEEK_OFF", "peer_of",
    "refuse_descriptors", "set_receive_buffer", "set_send_buffer",
]  # fmt: skip

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_PEEK_OFF = 42
SO_LOCK_FILTER = 44
SO_PASSPIDFD = 76
SO_PASSRIGHTS = 83
SO_INQ = 84
RECEIVED_WITH_DATA = (socket.SO_PASSCRED, socket.SO_PASSSEC, SO_PASSPIDFD, SO_INQ)
"""Options of a Unix socket that make the kernel add control messages other than descriptors to received data."""
SOCKET_PATH_MAX = 107
"""Maximum length of a socket path in bytes (sun_path of unix(7) without the NUL)."""

_UCRED = struct.Struct("iII")
"""struct ucred (unix(7)): PID, user and group."""


class _Socket(Protocol):
    """A socket from the standard library or from Trio."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes: ...


def peer_of(sock: _Socket) -> tuple[int, int]:
    """Return the PID and the user ID of the process at the other end of a connection (SO_PEERCRED, unix(7))."""
    process, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return process, user


def refuse_descriptors(sock: socket.socket) -> None:
    """Let the kernel refuse descriptors that other processes pass to a Unix socket (SCM_RIGHTS, unix(7)).

    Otherwise, reading a message or closing the socket closes these descriptors in this process. That can block, for
    example for a TCP socket with SO_LINGER. Kernels before Linux 6.16 do not have this option.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def set_receive_buffer(sock: socket.socket, size: int) -> None:
    """Request a receive buffer of `size` bytes; the kernel doubles this value.

    Without CAP_NET_ADMIN in the initial user namespace, the kernel caps `size` at net.core.rmem_max.
    """
    _set_buffer(sock, size, SO_RCVBUFFORCE, socket.SO_RCVBUF)


def set_send_buffer(sock: socket.socket, size: int) -> None:
    """Request a send buffer, like `set_receive_buffer`. The limit is net.core.wmem_max."""
    _set_buffer(sock, size, SO_SNDBUFFORCE, socket.SO_SNDBUF)


def _set_buffer(sock: socket.socket, size: int, forced: int, limited: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, limited, size)
