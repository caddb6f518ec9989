"""Format the results as a table, in plain text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import Figure

__all__ = ["as_markdown", "as_text"]

_HEADER = ("figure", "goal", "result", "spread", "met", "medians", "note")


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _cells(figure: Figure) -> tuple[str, ...]:
    low, high = figure.spread
    sign = "x " if figure.ratio else ""
    return (
        figure.name,
        "" if figure.goal is None else str(figure.goal),
        f"{sign}{_number(figure.result)}",
        f"{_number(low)}..{_number(high)}",
        {None: "", True: "yes", False: "NO"}[figure.met],
        ", ".join(f"{program} {_number(value)}" for program, value in figure.medians.items()) + f" {figure.unit}",
        "; ".join(filter(None, (figure.note, *(f"LOSS: {fault}" for fault in figure.faults)))),
    )


def as_text(figures: Sequence[Figure]) -> str:
    """Return the table with aligned columns."""
    rows = [_HEADER, *map(_cells, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def as_markdown(figures: Sequence[Figure], origins: Sequence[str]) -> str:
    """Return the table, followed by lines that state where and when the figures were measured."""
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_cells, figures)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    what = "Result: the median of the ratios of the pairs; spread: the least and the greatest."
    return "\n\n".join([table, *origins, what]) + "\n"
