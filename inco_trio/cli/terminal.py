"""Terminal output, cut to the size of the terminal and coloured if rich is installed (the extra `rich`)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable

CLEAR = "\x1b[H\x1b[J"
"""The escape sequences that move the cursor home and erase the rest of the screen."""
STYLES = (
    (r"(?<=: )up\b|\bthe link came up\b|\bworks again\b|^ok\b", "green"),
    (r"(?<=: )(down|not open)\b|\bthe link went down\b|^fail\b|\b\d+ dropped\b|\bevents lost\b", "bold red"),
    (r"\bnot stored\b|\bignored: .*|^warn\b|\b(warning|error): .*|\brestarted .*", "yellow"),
    (r"^(?: +|[\d:.]+ (?:\S+: )?)(?P<cyan>in) ", ""),
    (r"^(?: +|[\d:.]+ (?:\S+: )?)(?P<magenta>out) ", ""),
    (r"\bnever\b", "dim"),
    (r"^ +signal +count .*", "underline"),
)
"""Regular expressions, each with the rich style for its matches. The name of a named group is the group's style."""


def is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def screen(lines: list[str], when: str) -> str:
    """Return text that clears the terminal and shows as many of `lines` as fit."""
    width, height = shutil.get_terminal_size()
    return CLEAR + "\n".join(painted((line[:width] for line in lines[: height - 1]), when))


def wants_color(when: str) -> bool:
    """Return whether to colour output. `when` is the value of `--color`; see no-color.org and force-color.org."""
    if when != "auto":
        return when == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (is_terminal() and os.environ.get("TERM") != "dumb")


def painted(lines: Iterable[str], when: str) -> list[str]:
    """Return `lines`, in colours if rich is installed and `wants_color` returns True."""
    lines = list(lines)
    if not wants_color(when):
        return lines
    try:
        # Import rich only if it is needed, because the import is slow.
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lines
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, force_terminal=True, no_color=False)
    shown = []
    for line in lines:
        text = Text(line)
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style or None)
        with console.capture() as captured:
            console.print(text, end="", soft_wrap=True)
        shown.append(captured.get())
    return shown
