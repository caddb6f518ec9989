"""The frame numbers of both directions of a bridge, in a memfd that an fd store can keep during a restart."""

from __future__ import annotations

import logging
import os
import re

import attrs

from inco_trio.mqtt.bridge_codec import NUMBER_MAX
from inco_trio.persist.memory import check_memory, map_memory, new_memory
from inco_trio.persist.tables import PAGE, TABLE, NumberTable

__all__ = ["WINDOW", "Memory", "Progress"]

WINDOW = 256
"""Maximum number of published frames not yet reported as written. mosquitto queues 1,000 messages by default."""
FIRST = 2
"""The number of the first frame of a numbering.

The request for a report before the first frame makes number 1 known to the other side. The other side therefore knows
the numbering, and can count the first frames as missed. A table cannot contain the number 0.
"""
BOOTS_MAX = 16
"""How many of the other side's numberings are kept. The broker may repeat messages of recent numberings."""
_MAGIC = b"inco-trio bridge 2\n"
_KEY = re.compile(rb"sent:([0-9a-f]{16}:[0-9]+)?|written:[0-9a-f]*|limit")

logger = logging.getLogger(__name__)


@attrs.define
class Memory:
    """A memfd with a page for the link's note (see `links.unix`) and a table of frame numbers."""

    fd: int
    note: memoryview
    numbers: NumberTable

    @classmethod
    def open(cls, held: int | None) -> Memory:
        """Map the inherited descriptor `held` if it is valid. Otherwise log the reason and map a new memfd.

        Raises OSError.
        """
        if held is not None:
            try:
                check_memory(held, PAGE + TABLE, _MAGIC)
                return cls._map_memory(held)
            except ValueError as error:
                logger.warning(
                    "bridge: cannot use the stored frame numbers (%s): restarting the numbering; "
                    "frames may be delivered twice", error
                )  # fmt: skip
        fd = new_memory("inco-trio bridge", PAGE + TABLE, _MAGIC)
        if held is not None:
            os.close(held)  # Close `held` last: the new descriptor is stored only if its number is different.
        return cls._map_memory(fd)

    @classmethod
    def _map_memory(cls, fd: int) -> Memory:
        """Map the memory. Raises OSError. Raises ValueError with the reason if the content is invalid."""
        view = map_memory(fd, PAGE + TABLE)
        return cls(
            fd, view[PAGE - 16 : PAGE], NumberTable(view[PAGE:], NUMBER_MAX, lambda key: bool(_KEY.fullmatch(key)))
        )

    def close(self) -> None:
        """Close the descriptor. The mapping lasts until its last view is deleted."""
        os.close(self.fd)


class Progress:
    """The number of the last frame processed in each direction."""

    _SENT, _WRITTEN, _LIMIT = b"sent:", b"written:", b"limit"

    def __init__(self, numbers: NumberTable) -> None:
        self._numbers = numbers
        self._boots = [key for key in numbers if key.startswith(self._WRITTEN)]
        self._sent = next((key for key in numbers if key.startswith(self._SENT)), self._SENT)
        self.is_inherited = bool(len(numbers))
        """Whether an earlier process of this side has stored numbers."""
        self.is_refuted = False
        """Whether the last report contained a number that this side cannot have used; see `reported`."""

    def number(self, queue: int) -> bool:
        """Start a new numbering if the socket, identified by its inode `queue`, is new. Return whether it is new.

        With the old numbering, a new frame could get the number of a published frame that was lost with its socket.
        """
        if self._sent.rpartition(b":")[2] == b"%d" % queue:
            return False
        self._start(queue)
        return True

    def restart(self) -> None:
        """Start a new numbering of the same socket."""
        self._start(int(self._sent.rpartition(b":")[2]))

    def _start(self, queue: int) -> None:
        self._numbers[self._sent] = self._numbers[self._LIMIT] = 0
        self._sent = self._SENT + b"%s:%d" % (os.urandom(8).hex().encode(), queue)
        self._numbers[self._sent] = FIRST
        self.is_refuted = False

    @property
    def has_room(self) -> bool:
        """Whether frames may be published.

        After starting a new numbering, this side first waits for the other side's report.
        """
        return self.room > 0

    @property
    def room(self) -> int:
        """How many frames may be published before the next report; not positive if none may be published."""
        return self._numbers[self._LIMIT] - self.following + 1

    @property
    def is_unconfirmed(self) -> bool:
        """Whether the last published frame is not reported, and no request is pending, because there is room."""
        return 0 < self.following <= self._numbers[self._LIMIT] < self.following - 1 + WINDOW

    def reported(self, number: int) -> None:
        """Record that the other side has written all frames up to `number`.

        `number` can exceed the number of the last acknowledged frame, because the broker's acknowledgements of further
        frames may be lost. There are at most WINDOW of them. A number above that proves that another program has
        published to a topic of the bridge.
        """
        self.is_refuted = number >= self.following + WINDOW
        written = min(number, self.following - 1)
        self._numbers[self._LIMIT] = max(self._numbers[self._LIMIT], written + WINDOW)

    def await_report(self) -> None:
        """Publish no further frames until the other side has sent a report."""
        self._numbers[self._LIMIT] = 0

    @property
    def boot(self) -> bytes:
        """The numbering of the published frames; see `Batch.boot`."""
        return bytes.fromhex(self._sent.split(b":")[1].decode())

    @property
    def following(self) -> int:
        """The number of the oldest frame that is still queued."""
        return self._numbers[self._sent]

    def taken(self) -> None:
        """Count the oldest frame as published. After a crash before `dequeue`, the frame is published again."""
        self._numbers[self._sent] += 1

    def written(self, boot: bytes) -> int:
        """Return the last written number of the numbering `boot`; 0 if the numbering is unknown."""
        return self._numbers[self._key(boot)]

    def wrote(self, boot: bytes, number: int) -> None:
        """Record that the frame `number` was written."""
        key = self._key(boot)
        self._numbers[key] = number
        if key not in self._boots:
            self._boots.append(key)
            if len(self._boots) > BOOTS_MAX:
                self._numbers[self._boots.pop(0)] = 0

    def _key(self, boot: bytes) -> bytes:
        return self._WRITTEN + boot.hex().encode()
