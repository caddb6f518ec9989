"""A link between the proxy and core 1 that drops and changes frames as configured by `FrameFaults`."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Awaitable, Callable

import trio

from inco_trio.errors import LinkNotFoundError, ResourceError
from inco_trio.frame import decode
from inco_trio.signals import Direction
from inco_trio.testing.faults import FrameFaults
from inco_trio.testing.happenings import History

__all__ = ["Lane"]

PATIENCE = 1.0
"""Timeout of `Lane.settled`, in seconds."""


class Lane:
    """One direction of the link. It delivers frames one at a time. If `deliver` raises IncoError, the frame is lost."""

    def __init__(self, direction: Direction, history: History, deliver: Callable[[bytes], Awaitable[None]]) -> None:
        self.faults = FrameFaults()
        self._direction = direction
        self._history = history
        self._deliver = deliver
        self._due: list[tuple[float, int, bytes]] = []
        self._number = itertools.count()
        self._news = trio.lowlevel.ParkingLot()
        self._rest = trio.lowlevel.ParkingLot()
        self._delivering = False

    def put(self, frame: bytes) -> None:
        """Send a frame: apply the faults and schedule the delivery."""
        for late, whole, done in self.faults.fates(frame):
            if done:
                self._note(f"{done} on the link", frame)
            if done != "dropped":
                heapq.heappush(self._due, (trio.current_time() + late, next(self._number), whole))
        self._news.unpark_all()

    def _note(self, what: str, frame: bytes) -> None:
        name = decode(frame)
        self._history.add(None, what, "a frame" if name is None else name.decode("ascii"), self._direction)

    async def carry(self) -> None:
        """Deliver frames until cancelled."""
        while True:
            due = self._due[0][0] if self._due else math.inf
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._news.park()
                continue
            _, _, frame = heapq.heappop(self._due)
            self._delivering = True
            try:
                await self._deliver(frame)
            except (LinkNotFoundError, ResourceError) as error:
                self._note(f"lost ({error})", frame)
            finally:
                self._delivering = False
                self._rest.unpark_all()

    async def settled(self) -> None:
        """Wait until all due frames are delivered. Give up after PATIENCE seconds: the receiver's queue may be full."""
        with trio.move_on_after(PATIENCE):
            while self._delivering or (self._due and self._due[0][0] <= trio.current_time()):
                await self._rest.park()
