"""The interface of all kinds of links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inco_trio.errors import IncoError

__all__ = ["Link", "LinkDownError"]


class LinkDownError(OSError):
    """The link takes no frames now; its next change may fix that."""


class Link(Protocol):
    """Receives Ethernet frames, sends notifications. Only `async` methods wait.

    The kernel queues received frames for `fd`: a process that inherits the descriptor has the queue.
    """

    name: str
    """Its name in the log."""
    fd: int
    """The socket that receives frames; `refresh` may replace it."""
    foreign: int
    """Frames that the peer did not send; each is made malformed."""

    @property
    def running(self) -> bool:
        """Whether it is up and has a carrier, or a peer."""

    @property
    def fits(self) -> bool:
        """Whether an inherited socket is like a new one."""

    @property
    def description(self) -> str:
        """Its description in the log at the start."""

    def refresh(self) -> bool:
        """Check the state of the link, and bind it if needed; return whether it exists."""

    @property
    def absence(self) -> str:
        """Why it does not exist, for the log."""

    def missing(self) -> IncoError:
        """Return the error for a link that does not exist."""

    async def wait_readable(self) -> None:
        """Wait until frames may be queued."""

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        """Read queued frames, one into each of `rooms`; return their lengths.

        A frame longer than `step` ends the batch, as the rooms overlap beyond that. The lengths are those of the whole
        frames, also where a room is too short. An error ends the batch, too; OSError is raised if nothing was read,
        unless the link went down.
        """

    def receive_one(self, room: memoryview) -> int:
        """Read one frame into `room`; return its length, or -1 if none is queued. Raises as `receive_into` does."""

    def frame(self, name: str) -> bytes:
        """Return the frame that `send` sends for a notification."""

    def send(self, name: str) -> None:
        """Send the frame of one notification.

        Raises BlockingIOError if there is no room, LinkDownError, or OSError.
        """

    def send_frame(self, frame: bytes) -> None:
        """Send any frame, unchanged. Raises as `send` does."""

    async def wait_for_room(self) -> None:
        """Wait until there may be room to send, after BlockingIOError."""

    async def changed(self) -> None:
        """Wait for a change that `refresh` may see."""

    def dropped(self) -> int:
        """Return how many frames the kernel dropped since the last call, because the queue was full."""

    def close(self, *, remove: bool) -> None:
        """Close this process's descriptors; the queue lives on while another process has one.

        `remove` also deletes the path of a socket.
        """
