"""Write a board's history as a table for people and as a recording for tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from inco_trio.capture.recording import Recorder
from inco_trio.testing.happenings import Happening, runs, summary

__all__ = ["record", "side_by_side"]

SHOWN = 200
"""Maximum number of lines in the table. The table omits older events."""
WIDTH = 36


def side_by_side(happenings: Sequence[Happening]) -> str:
    """Return a table of the events at core 0 and core 1, with the seconds since the first event.

    More than `SINGLE` consecutive identical events share one line.
    """
    if not happenings:
        return "nothing happened at either core"
    first = happenings[0].monotonic_ns
    lines = [f"{'seconds':>10}  {'core 0':{WIDTH}}core 1"]
    found = runs(happenings)
    if earlier := sum(len(run) for run in found[:-SHOWN]):
        lines.append(f"{'':>10}  ({earlier} earlier events)")
    for run in found[-SHOWN:]:
        each = run[0]
        within = f" within {(run[-1].monotonic_ns - each.monotonic_ns) / 1e9:.6f} s" if len(run) > 1 else ""
        text = summary(run, within)
        place = {0: f"{text}", 1: f"{'':{WIDTH}}{text}", None: f"-- {text}"}[each.core]
        lines.append(f"{(each.monotonic_ns - first) / 1e9:10.6f}  {place}")
    return "\n".join(lines)


def record(path: Path, happenings: Sequence[Happening], registers: Mapping[str, str], link: str) -> None:
    """Write core 1's frames to a recording, and other events as marks. Raises PermissionDeniedError, ResourceError."""
    recorder = Recorder(path)
    for each in happenings:
        if each.core is None:
            recorder.mark(each.time_ns, f"{each.what} {each.name}".rstrip())
        elif each.frame is not None and each.direction is not None:
            if each.name:
                register = registers.get(each.name, "")
                recorder.append(each.time_ns, each.direction, each.name, register, each.frame, link)
            else:
                recorder.ignored(each.time_ns, each.what, each.frame, link)
    recorder.close()
