"""Clocks that keep running while a test has frozen time. They have the same names as in the module `time`.

Libraries that freeze time for tests, such as freezegun and time-machine, replace the functions of the module `time`,
even where other modules have imported them. They do not replace CLOCK_MONOTONIC of clock_gettime(2), and freezegun does
not replace CLOCK_REALTIME.
"""

from __future__ import annotations

import functools
import time

__all__ = ["monotonic", "monotonic_ns", "time_ns"]

monotonic = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
monotonic_ns = functools.partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)
time_ns = functools.partial(time.clock_gettime_ns, time.CLOCK_REALTIME)
