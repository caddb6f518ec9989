"""The protocol that all kinds of links implement."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from inco_trio.errors import IncoError

__all__ = ["Link", "LinkDownError"]


class LinkDownError(OSError):
    """The link does not accept frames at the moment. A later change to the link may fix this."""


class Link(Protocol):
    """A link that receives Ethernet frames and sends notifications. Only its `async` methods block.

    The kernel queues received frames for the socket `fd`. A process that inherits the descriptor inherits the queue.
    """

    name: str
    fd: int
    """The socket that receives frames; `refresh` may replace it."""
    foreign: int
    """Number of foreign frames. The link replaces them with malformed frames, which the proxy ignores."""

    @property
    def renewal(self) -> str:
        """What is new since the link last ran, if `refresh` has just found a new interface, or ""."""

    @property
    def mac(self) -> bytes:
        """The MAC address, or b"" if the link has never existed."""

    @property
    def granted(self) -> int | None:
        """The size of the receive buffer in bytes, or None if the link does not set it."""

    @property
    def running(self) -> bool:
        """Whether the link is up and has a carrier or a peer."""

    @property
    def down_reason(self) -> str:
        """Why the link is not running, or "" if it is running."""

    @property
    def downs(self) -> int:
        """How many times the carrier of the link has gone down. `refresh` updates this number."""

    @property
    def fits(self) -> bool:
        """Whether an inherited socket can still be used for this link."""

    @property
    def description(self) -> str:
        """A description for the log."""

    def refresh(self) -> bool:
        """Check the state of the link, and bind the socket if necessary. Return whether the link exists."""

    @property
    def absence(self) -> str:
        """The reason why the link does not exist, for the log."""

    def missing(self) -> IncoError:
        """Return the error for a link that does not exist."""

    async def wait_readable(self) -> None:
        """Wait until frames may be available to read."""

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        """Read queued frames, one into each of `rooms`, and return their original lengths.

        A frame longer than `step` ends the batch, because it extends into the next room. An error also ends the batch.
        Raises OSError if nothing was read, unless the link went down.
        """

    def receive_one(self, room: memoryview) -> int:
        """Read one frame into `room`. Return its length, or -1 if none is queued. Raises OSError."""

    def expect(self, inbound: Collection[bytes], outbound: Collection[bytes]) -> None:
        """Set the names of the signals. `restrict` lets the frames of inbound signals pass."""

    def restrict(self, on: bool) -> bool:
        """Start filtering if `on`, otherwise stop.

        The filter drops frames without an expected name, except a random sample.

        Return whether the kernel now drops such frames.
        """

    def stands_for(self, frame: memoryview, length: int) -> int:
        """Return how many frames a received frame represents: more than 1 if it is part of a random sample.

        `length` is the length of the frame, of which `frame` contains at most the first FRAME_MAX bytes.
        """

    def frame(self, name: str) -> bytes:
        """Return the frame that `send` sends for a notification."""

    def send(self, name: str) -> None:
        """Send the frame of one notification. Raises BlockingIOError if the queue is full, LinkDownError or OSError."""

    def send_frame(self, frame: bytes) -> None:
        """Send a frame unchanged. Raises the same errors as `send`."""

    async def wait_for_room(self) -> None:
        """Wait until the send queue may have room again. Call this after `send` has raised BlockingIOError."""

    async def changed(self) -> None:
        """Wait until the link may have changed. The caller then calls `refresh`."""

    def dropped(self) -> int:
        """Return how many frames the kernel has dropped since the last call because the queue was full."""

    def close(self, *, remove: bool) -> None:
        """Close this process's descriptors. With `remove`, also delete the socket file."""
