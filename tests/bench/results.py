"""The results of one or more benchmark runs, stored as JSON. The table and the plots are generated from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .figures import Figure
from .machine import in_words
from .report import as_markdown

__all__ = ["Results"]


@attrs.frozen
class Results:
    """All runs (machine, arguments, sizes) and, for each measurement, its run, duration, figures and plot data."""

    runs: list[dict[str, Any]] = attrs.field(factory=list)
    measures: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Results:
        """Load the results that `save` wrote into a directory."""
        return cls(**json.loads((directory / "results.json").read_text()))

    def add(self, name: str, seconds: float, figures: Sequence[Figure], series: Any) -> None:
        """Add the results of a measurement from the last run. They replace earlier results of the same measurement."""
        self.measures[name] = {
            "run": len(self.runs) - 1,
            "seconds": round(seconds, 1),
            "figures": [figure.as_dict() for figure in figures],
            "series": series,
        }

    def figures(self, order: Sequence[str]) -> list[Figure]:
        """Return the rows of the table, with the measurements in the given order."""
        present = [self.measures[name] for name in order if name in self.measures]
        return [Figure.from_dict(figure) for measure in present for figure in measure["figures"]]

    @property
    def series(self) -> dict[str, Any]:
        """Return the plot data of each measurement that has any."""
        return {name: measure["series"] for name, measure in self.measures.items() if measure["series"] is not None}

    @property
    def origins(self) -> list[str]:
        """Return, for each run that provided figures, a line that states where and when it took place."""
        lines = []
        for index, run in enumerate(self.runs):
            names = [name for name, measure in self.measures.items() if measure["run"] == index]
            if names:
                what = "" if len(names) == len(self.measures) else f" ({', '.join(names)})"
                machine = run["machine"]
                busy = f"load average {machine['load average']:.1f} at the start"
                lines.append(f"Measured on {in_words(machine)}, {busy}, {machine['date']}{what}.")
        return lines

    def save(self, directory: Path, order: Sequence[str]) -> None:
        """Write results.json and results.md. An interruption leaves the old files intact."""
        texts = {
            "results.json": json.dumps(attrs.asdict(self, recurse=False), indent=1),
            "results.md": as_markdown(self.figures(order), self.origins),
        }
        for name, text in texts.items():
            new = directory / f"{name}.new"
            new.write_text(text)
            new.replace(directory / name)
