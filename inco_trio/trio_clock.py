"""A clock for Trio that keeps running while a test has frozen time."""

from __future__ import annotations

import trio

from inco_trio import real_clock

__all__ = ["RealClock"]


class RealClock(trio.abc.Clock):
    """A clock for trio.run that works like Trio's own clock, even while a test has frozen time."""

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return real_clock.monotonic()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - real_clock.monotonic()
