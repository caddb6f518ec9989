"""What a figure is: samples of several programs, the ratio of two of them pair by pair, the goal beside it. Pure."""

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
    """The smallest value that at least the share `q` (0 to 1) of `values` does not exceed (the nearest rank)."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


@attrs.frozen
class Goal:
    """What a figure is compared with: stated, never asserted."""

    relation: Literal["<=", "<", ">=", "="]
    bound: float
    of: str = ""
    """Text after the bound, such as "x C"."""

    def met(self, value: float) -> bool:
        """Whether `value` stands in the relation to the bound."""
        return _RELATIONS[self.relation](value, self.bound)

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:,g} {self.of}".strip()


@attrs.frozen
class Figure:
    """One line of the table.

    `samples` holds for each program one value a run, in `unit`. With `ratio` (two keys of `samples`) the figure is the
    median of the ratios of the runs that stood side by side; without, it is the worst value of the first program when
    there is a goal of equality (a loss is a loss), or else its median.
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    goal: Goal | None = None
    ratio: tuple[str, str] | None = None
    note: str = ""
    faults: tuple[str, ...] = ()
    """Losses where there must be none: the benchmark ends with an error after the table."""

    @property
    def values(self) -> list[float]:
        """What the figure is the middle of: the ratios of the pairs, or the first program's values."""
        if self.ratio is None:
            return list(next(iter(self.samples.values())))
        above, below = (self.samples[key] for key in self.ratio)
        return [a / b if b else math.inf for a, b in zip(above, below, strict=True)]

    @property
    def result(self) -> float:
        """The figure itself."""
        goal = self.goal
        if goal is not None and goal.relation == "=":
            return max(self.values, key=lambda value: abs(value - goal.bound))
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest of `values`."""
        return min(self.values), max(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return None if self.goal is None else self.goal.met(self.result)

    @property
    def medians(self) -> dict[str, float]:
        """The median of each program, in `unit`."""
        return {program: statistics.median(values) for program, values in self.samples.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was sampled and what follows from it."""
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
        """What `as_dict` made, also after JSON has had it."""
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
