"""The figures of the benchmark: samples of several programs, the ratios of paired runs, and the goal."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

__all__ = ["Figure", "Goal", "quantile"]

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    "=": operator.eq,
}


def quantile(values: Sequence[float], q: float) -> float:
    """Return the quantile `q` (0 to 1) of `values` by the nearest-rank method."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


@attrs.frozen
class Goal:
    """A bound for a figure. The benchmark only reports whether the figure is within the bound."""

    relation: Literal["<=", "<", ">=", "="]
    bound: float
    of: str = ""
    """Text that is printed after the bound, such as "x C"."""

    def met(self, value: float) -> bool:
        """Return whether `value` is within the bound."""
        return _RELATIONS[self.relation](value, self.bound)

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:,g} {self.of}".strip()


@attrs.frozen
class Figure:
    """One row of the table.

    `samples` holds one value per run, in `unit`, for each program. With `ratio` (two keys of `samples`), the result is
    the median of the ratios of paired runs. Without `ratio`, the result is the median of the first program. If the goal
    is an equality, the result is the worst value instead of the median.
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    goal: Goal | None = None
    ratio: tuple[str, str] | None = None
    note: str = ""
    faults: tuple[str, ...] = ()
    """Losses that are not allowed. They make the benchmark exit with an error."""

    @property
    def values(self) -> list[float]:
        """Return the ratios of paired runs or, without `ratio`, the first program's values."""
        if self.ratio is None:
            return list(next(iter(self.samples.values())))
        above, below = (self.samples[key] for key in self.ratio)
        return [a / b if b else math.inf for a, b in zip(above, below, strict=True)]

    @property
    def result(self) -> float:
        """Return the median or, if the goal is an equality, the worst value."""
        goal = self.goal
        if goal is not None and goal.relation == "=":
            return max(self.values, key=lambda value: abs(value - goal.bound))
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Return the minimum and maximum of `values`."""
        return min(self.values), max(self.values)

    @property
    def met(self) -> bool | None:
        """Return whether the result meets the goal, or None if the figure has no goal."""
        return None if self.goal is None else self.goal.met(self.result)

    @property
    def medians(self) -> dict[str, float]:
        """Return each program's median, in `unit`."""
        return {program: statistics.median(values) for program, values in self.samples.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the samples and results of this figure for JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            "goal": None if self.goal is None else attrs.asdict(self.goal),
            "met": self.met,
            "ratio_of": self.ratio,
            "result": self.result,
            "spread": self.spread,
            "medians": self.medians,
            "samples": {program: list(values) for program, values in self.samples.items()},
            "note": self.note,
            "faults": self.faults,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Figure:
        """Return the figure from the result of `as_dict`, which might have been converted to JSON and back."""
        goal, ratio = document["goal"], document["ratio_of"]
        return cls(
            name=document["name"],
            unit=document["unit"],
            samples=document["samples"],
            goal=goal and Goal(**goal),
            ratio=ratio and tuple(ratio),
            note=document["note"],
            faults=tuple(document["faults"]),
        )
