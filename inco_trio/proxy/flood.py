"""Let the kernel drop floods of unknown or malformed frames before they fill the receive queue."""

from __future__ import annotations

import trio

from inco_trio import real_clock
from inco_trio.links.link import Link
from inco_trio.proxy.supervise import Health

__all__ = ["FLOOD", "Flood"]

FLOOD = 1000
"""Ignored frames per second above which the kernel drops them. The receive queue holds 256 frames by default."""
CALM = 5.0
"""Seconds between checks for the end of a flood."""


class Flood:
    """Lets the kernel drop ignored frames while the link receives more than FLOOD of them per second."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ignored = 0
        self._counted_until = 0.0
        self._restricted = trio.Event()

    def ignored(self, frames: int) -> None:
        """Count ignored frames, and let the kernel drop them if more than FLOOD arrive within a second."""
        self._ignored += frames
        if self._ignored <= FLOOD or self._restricted.is_set():
            return
        now = real_clock.monotonic()
        if now >= self._counted_until:
            self._ignored, self._counted_until = frames, now + 1
        elif self._link.restrict(True):
            self._restricted.set()
        else:
            self._ignored = 0  # Ask again after as many frames, because each request takes time.

    async def filter(self, health: Health) -> None:
        """Run the task that reports a flood and lets frames through again when the flood ends."""
        while True:
            await self._restricted.wait()
            health.failed(
                f"more than {FLOOD} unknown or malformed frames per second: the kernel drops them; "
                "the proxy reads and counts a random sample"
            )
            while self._restricted.is_set():
                before = self._ignored
                await trio.sleep(CALM)
                if self._ignored - before < FLOOD and not self._link.restrict(False):
                    self._ignored, self._restricted = 0, trio.Event()
            health.well()
