"""A clock that keeps running while a test has frozen time.

Libraries that freeze time for tests, such as freezegun and time-machine, replace the functions of the module `time`,
even where other modules have imported them. They do not replace CLOCK_MONOTONIC of clock_gettime(2).
"""

from __future__ import annotations

import time

import trio

__all__ = ["RealClock", "now"]


def now() -> float:
    """Return the time of CLOCK_MONOTONIC in seconds."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class RealClock(trio.abc.Clock):
    """A clock for trio.run that works like Trio's own clock, even while a test has frozen time."""

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return now()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - now()
