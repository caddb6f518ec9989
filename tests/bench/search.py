"""The search for the highest rate that a program sustains. The caller passes the functions that try a rate."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import attrs

__all__ = ["RESOLUTION", "Found", "Outcome", "Tried", "highest_kept"]

RESOLUTION = 1.05
"""The search ends when the ratio of the bracket's ends is at most this."""

_LOWER = 0.04
"""Each full-length run with a loss lowers the rate by one step more; long runs near the limit gain no precision."""

_FIRST_STEP = 1.1
_LAST_STEP = 2.0
_REACHED = 0.98
"""A generator has reached a rate if it sent at least this share of the rate."""

_REPEATS = 3
"""Attempts at a probe whose rate was not reached, in case the generator had no CPU for a moment."""

_LEAST = 50.0


class Outcome(enum.Enum):
    """The result of trying a rate."""

    KEPT = enum.auto()
    LOST = enum.auto()
    UNCOUNTED = enum.auto()
    """The load generator could not count all arrivals, so nothing is known about the program."""


@attrs.frozen
class Tried:
    """One try: its outcome, the rate at which the generator really sent, and the rate that was handled."""

    outcome: Outcome
    offered: float
    handled: float

    def reached(self, rate: float) -> bool:
        """Return whether the generator really sent at `rate`."""
        return self.offered >= _REACHED * rate


@attrs.frozen
class Found:
    """The sustained rate. With `at_least`, the load generator set the limit, not the program."""

    rate: float
    at_least: bool


def highest_kept(probe: Callable[[float], Tried], confirm: Callable[[float], Tried], start: float) -> Found | None:
    """Return the highest rate without loss, to about 5 %, or None if there is none.

    Short tries (`probe`) widen a bracket around `start` and then halve it. The rate found is then tried in full length
    (`confirm`), and lowered by 4 %, 8 %, ... until nothing is lost. The rate that the generator really sent is what
    counts.
    """
    found = _bracket(probe, start)
    rate, at_least, lower = found.rate, found.at_least, 1.0
    while rate >= _LEAST:
        tried = confirm(rate)
        if tried.outcome is Outcome.KEPT:
            return Found(tried.offered, at_least or not tried.reached(rate))
        at_least = tried.outcome is Outcome.UNCOUNTED
        lower += _LOWER
        rate = min(rate / lower, tried.handled if tried.reached(rate) else rate)
    return None


def _reaching(probe: Callable[[float], Tried], rate: float) -> Tried:
    """Return the first probe that reached its rate, or the one that came nearest."""
    tries: list[Tried] = []
    while len(tries) < _REPEATS and not (tries and tries[-1].reached(rate)):
        tries.append(probe(rate))
    return max(tries, key=lambda tried: tried.offered)


def _bracket(probe: Callable[[float], Tried], start: float) -> Found:
    low, high, at_least = 0.0, math.inf, False
    rate, step = start, _FIRST_STEP
    while high > RESOLUTION * low and rate >= _LEAST:
        tried = _reaching(probe, rate)
        if tried.outcome is Outcome.KEPT:
            low = tried.offered
            if not tried.reached(rate):
                return Found(low, at_least=True)
        else:
            high, at_least = min(rate, tried.offered), tried.outcome is Outcome.UNCOUNTED
        if low > 0 and high < math.inf:
            rate = math.sqrt(low * high)
        else:
            rate = low * step if low else high / step
            step = min(step * step, _LAST_STEP)
    return Found(low or rate, at_least)
