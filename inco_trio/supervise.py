"""Restart of a failed leg, with back-off; other legs are untouched."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Awaitable, Callable

import trio

from inco_trio.stats import Stats

__all__ = ["TRANSIENT", "Backoff", "Health", "supervise"]

logger = logging.getLogger(__name__)

TRANSIENT = frozenset({
    errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO, errno.EINTR,
    errno.ENETDOWN, errno.ENODEV, errno.ENXIO,
})  # fmt: skip
"""What is tried again, and a leg restarted for. Anything else is a programming error and ends the proxy."""


class Backoff:
    """Growing pauses, capped and jittered, in seconds.

    The cap is what a user waits at most, beyond the cause itself, for a service that was mended.
    """

    FIRST = 0.005
    CAP = 0.08

    def __init__(self) -> None:
        self._pause = self.FIRST

    def next(self) -> float:
        """The next pause."""
        pause = self._pause * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load, hides nothing
        self._pause = min(self._pause * 2, self.CAP)
        return pause

    def reset(self) -> None:
        """Start from the first pause again, after a success."""
        self._pause = self.FIRST


class Health:
    """What a leg says of itself: `failed` and `well` each log once a change."""

    def __init__(self, leg: str) -> None:
        self.leg = leg
        self.backoff = Backoff()
        self.problem: str | None = None

    def failed(self, problem: str) -> None:
        """Log `problem`, unless it was the last thing said."""
        if problem != self.problem:
            self.problem = problem
            logger.warning("%s: %s", self.leg, problem)

    def well(self) -> None:
        """The leg does its work."""
        if self.problem is not None:
            self.problem = None
            self.backoff.reset()
            logger.info("%s: works again", self.leg)


async def supervise(name: str, leg: Callable[[Health], Awaitable[None]], stats: Stats) -> None:
    """Run `leg` until it returns; after an OSError of the kinds in TRANSIENT run it again, after a pause."""
    health = Health(name)
    while True:
        try:
            return await leg(health)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            health.failed(f"{error.strerror}; restarted")
            stats.restarts += 1
        await trio.sleep(health.backoff.next())
