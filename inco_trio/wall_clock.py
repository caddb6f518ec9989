"""Detect when the wall clock is set, and convert times of the monotonic clock to the current wall clock."""

from __future__ import annotations

import time

from inco_trio import real_clock

__all__ = ["TOLERANCE_NS", "WallClock", "local_time", "step_text"]

TOLERANCE_NS = 10**9
"""Minimum step that counts as setting the wall clock, in nanoseconds. NTP's rate adjustments affect both clocks."""


def local_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as the local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def step_text(step_ns: int) -> str:
    """Describe in a sentence how the wall clock was set."""
    return f"the wall clock was set {'forward' if step_ns > 0 else 'back'} by {abs(step_ns) / 1e9:.1f} s"


class WallClock:
    """The difference between the wall clock and the monotonic clock, in nanoseconds."""

    def __init__(self) -> None:
        self.offset = real_clock.time_ns() - real_clock.monotonic_ns()

    def step(self, time_ns: int, monotonic_ns: int) -> int:
        """Return how many nanoseconds the wall clock was moved since the last call (negative: back; 0: not moved)."""
        step = time_ns - monotonic_ns - self.offset
        if -TOLERANCE_NS < step < TOLERANCE_NS:
            return 0
        self.offset += step
        return step

    def refresh(self) -> None:
        """Update the difference if the wall clock was set."""
        self.step(real_clock.time_ns(), real_clock.monotonic_ns())

    def seconds(self, monotonic_ns: int) -> float:
        """Convert a monotonic time to seconds since 1970, according to the current wall clock."""
        return (monotonic_ns + self.offset) / 1e9
