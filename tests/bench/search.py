"""The search for the highest rate that a program sustains. The caller passes the functions that test a rate."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import attrs

__all__ = ["RESOLUTION", "Found", "Outcome", "Tried", "highest_kept"]

RESOLUTION = 1.05
"""The search ends when the upper end of the bracket is at most this multiple of its lower end."""

_LOWER = 0.04
"""Reduction of the rate after the first full-length run with losses. The next reductions are 8 %, 12 %, ..."""

_FIRST_STEP = 1.1
_LAST_STEP = 2.0
_REACHED = 0.98
"""The generator has reached a rate if it sent at least this share of the rate."""

_REPEATS = 3
"""Maximum number of attempts at a probe if the generator does not reach the rate, for example for lack of CPU time."""

_LEAST = 50.0


class Outcome(enum.Enum):
    """The result of testing a rate."""

    KEPT = enum.auto()
    LOST = enum.auto()
    UNCOUNTED = enum.auto()
    """The load generator could not count all arrivals, so the result is unknown."""


@attrs.frozen
class Tried:
    """One attempt: its outcome, the rate at which the generator sent, and the rate that the program handled."""

    outcome: Outcome
    offered: float
    handled: float

    def reached(self, rate: float) -> bool:
        """Return whether the generator actually sent at `rate`."""
        return self.offered >= _REACHED * rate


@attrs.frozen
class Found:
    """The sustained rate. If `at_least` is true, the load generator was the limit, not the program."""

    rate: float
    at_least: bool


def highest_kept(probe: Callable[[float], Tried], confirm: Callable[[float], Tried], start: float) -> Found | None:
    """Return the highest rate without loss, accurate to about 5 %, or None if every rate loses notifications.

    Short runs (`probe`) widen a bracket around `start` and then halve it. Full-length runs (`confirm`) then test the
    rate, reduced by 4 %, 8 %, ... until nothing is lost. The result is the rate that the generator actually reached.
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
    """Return the first probe that reached its rate, or the probe that came nearest to its rate."""
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
