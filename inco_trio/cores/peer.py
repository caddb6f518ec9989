"""Core 1 for blocking code: a plain socket.

It shares no code with the proxy's links, because it is used to test them.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inco_trio.frame import ETHERTYPE, encode
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.linux.sockets import set_receive_buffer

__all__ = ["Peer"]

BUFFER = 16 * 2**20
"""Size of the receive buffer in bytes: a burst of 20,000 small frames fits."""
PATIENCE = 1.0
"""Timeout for sending while the peer's queue is full, in seconds."""


class Peer(contextlib.AbstractContextManager["Peer"]):
    """Core 1's end of the link with the address `link`. For a pair of sockets, core 1's path comes first.

    `run` calls a function in core 1's network namespace and returns the result.
    """

    def __init__(self, link: str, *, run: Callable[[Callable[[], Any]], Any] = lambda function: function()) -> None:
        self._address = parse_address(link)
        self._run = run
        self._socket: socket.socket = run(self._open)

    def _open(self) -> socket.socket:
        if isinstance(self._address, UnixAddress):
            opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        else:
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            if isinstance(self._address, UnixAddress):
                opened.settimeout(PATIENCE)
                opened.bind(self._address.local)
                return opened
            set_receive_buffer(opened, BUFFER)
            opened.bind((self._address.name, ETHERTYPE))
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def mac(self) -> bytes:
        """The source MAC address of the frames that core 1 sends."""
        if isinstance(self._address, UnixAddress):
            return self._address.mac
        address: bytes = self._socket.getsockname()[4]
        return address

    def fileno(self) -> int:
        return self._socket.fileno()

    def rebind(self) -> None:
        """Bind again to an interface that was recreated. Queued frames are kept."""
        self._run(lambda: self._socket.bind((self._address.name, ETHERTYPE)))

    def send(self, name: bytes, pad: int = 0) -> None:
        """Send the signal `name`, padded with NULs to a frame of `pad` bytes (QEMU pads to 60). Raises OSError."""
        self.send_raw(encode(name, self.mac).ljust(pad, b"\0"))

    def _forget_error(self) -> None:
        # Clear the error of an earlier link failure. Otherwise the next call would raise ENETDOWN.
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def send_raw(self, data: bytes) -> None:
        """Send a whole frame unchanged. Raises OSError."""
        self._forget_error()
        if isinstance(self._address, UnixAddress):
            self._socket.sendto(data, self._address.peer)
        else:
            self._socket.send(data)

    def receive(self, timeout: float = 600.0) -> bytes:
        """Return the next whole frame. Raises TimeoutError after `timeout` seconds (0: do not wait)."""
        self._forget_error()
        if not select.select([self._socket], [], [], timeout)[0]:
            raise TimeoutError(f"no frame on {self._address.name} arrived at core 1 within {timeout:g} s")
        return self._socket.recv(65535)

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._socket.close()
        if isinstance(self._address, UnixAddress):
            Path(self._address.local).unlink(missing_ok=True)

    def __exit__(self, *raised: object) -> None:
        self.close()
