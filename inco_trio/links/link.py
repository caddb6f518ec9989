"""What a link is for the rest of the program, whichever kind its address names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inco_trio.errors import IncoError

__all__ = ["Link", "LinkDownError"]


class LinkDownError(OSError):
    """The link takes no frames now; its next change may mend that."""


class Link(Protocol):
    """Receives Ethernet frames, sends notifications. Nothing here waits but what is `async`.

    The queue of received frames is the kernel's, and belongs to `fd`: whoever holds that has them.
    """

    name: str
    """What the log calls it."""
    fd: int
    """The socket that frames are received from; `refresh` may replace it."""
    foreign: int
    """Frames of somebody who is not the peer; each is made malformed."""

    @property
    def running(self) -> bool:
        """Whether it is up and has a carrier, or somebody at its other end."""

    @property
    def fits(self) -> bool:
        """Whether an inherited socket is what a new one would be."""

    @property
    def description(self) -> str:
        """What is said of it at the start."""

    def refresh(self) -> bool:
        """Look how the link is now, and do what can be done for it; returns whether it exists."""

    @property
    def absence(self) -> str:
        """Why it does not exist, in words for the log."""

    def missing(self) -> IncoError:
        """The error for a link that does not exist."""

    async def wait_readable(self) -> None:
        """Wait until frames may be queued."""

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        """Read queued frames, one into each of `rooms`, until none is left; returns their lengths.

        A frame longer than `step` is the last one read, as the rooms overlap beyond that. One longer than its room is
        cut; its length is the true one. An error ends the batch; OSError is raised if nothing was read, but not for a
        link that went down.
        """

    def receive_one(self, room: memoryview) -> int:
        """Read one frame into `room`; returns its length, -1 if none is queued. Otherwise as `receive_into`."""

    def frame(self, name: str) -> bytes:
        """The frame of one notification, as `send` sends it."""

    def send(self, name: str) -> None:
        """Send the frame of one notification.

        Raises BlockingIOError if there is no room, LinkDownError, or OSError.
        """

    def send_frame(self, frame: bytes) -> None:
        """Send a frame as it is, whatever it holds. Raises as `send` does."""

    async def wait_for_room(self) -> None:
        """Wait until it may be worth to send again what raised BlockingIOError."""

    async def changed(self) -> None:
        """Wait until something happened that `refresh` may see."""

    def dropped(self) -> int:
        """Frames that the kernel dropped since the last call, as the queue was full."""

    def close(self, *, remove: bool) -> None:
        """Close this process's descriptors; the queue lives on if somebody else holds it.

        If nobody does, `remove` what there is of it in the file system.
        """
