"""The search for the highest rate that a program keeps. Pure: it is handed what tries a rate."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import attrs

__all__ = ["RESOLUTION", "Found", "Outcome", "Tried", "highest_kept"]

RESOLUTION = 1.05
"""The bracket is narrow enough when its ends are no further apart."""

_LOWER = 0.04
"""After each loss in full length, once more so much: many long runs near the limit would not make it any sharper."""

_FIRST_STEP = 1.1
_LAST_STEP = 2.0
_REACHED = 0.98
"""A generator that sends at least so much of the rate that it was asked for has reached it."""

_REPEATS = 3
"""Of a probe whose rate was not reached: a moment without a CPU is not the generator's limit."""

_LEAST = 50.0


class Outcome(enum.Enum):
    """What can come of trying a rate."""

    KEPT = enum.auto()
    LOST = enum.auto()
    UNCOUNTED = enum.auto()
    """The load generator could not count what arrived: nothing is known of the program."""


@attrs.frozen
class Tried:
    """One try: what came of it, at which rate the generator really sent, and what was handled a second."""

    outcome: Outcome
    offered: float
    handled: float

    def reached(self, rate: float) -> bool:
        """Whether the generator really sent at `rate`."""
        return self.offered >= _REACHED * rate


@attrs.frozen
class Found:
    """The rate that was kept. With `at_least`, it was the load generator that set the limit, not the program."""

    rate: float
    at_least: bool


def highest_kept(probe: Callable[[float], Tried], confirm: Callable[[float], Tried], start: float) -> Found | None:
    """The highest rate that is kept, to about 5 %, or None if none is.

    Short tries (`probe`) widen a bracket round `start` and then halve it; only the rate found so is tried in full
    length (`confirm`), and lowered by 4 %, 8 %, ... until it is kept. A rate counts as what the generator reached of
    it.
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
    """The first probe that reached its rate, or that which came nearest."""
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
