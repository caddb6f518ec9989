"""Output for a terminal: fitted to its size, and coloured if rich is installed (the extra `rich`)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable

__all__ = ["is_terminal", "painted", "screen"]

CLEAR = "\x1b[H\x1b[J"
"""Move the cursor home, and erase the rest of the screen."""
STYLES = (
    (r"(?<=: )up\b|\bthe link came up\b|\bworks again\b|^ok\b", "green"),
    (r"(?<=: )(down|not open)\b|\bthe link went down\b|^fail\b|\b\d+ dropped\b|\bevents were lost here\b", "bold red"),
    (r"\bkept by nobody\b|\bignored: .*|^warn\b|\b(warning|error): .*|\brestarted .*", "yellow"),
    (r"(?<=\s)in(?=\s+\S+_irq\b)", "cyan"),
    (r"(?<=\s)out(?=\s+\S+_irq\b)", "magenta"),
    (r"\bnever\b", "dim"),
    (r"^ +signal +count .*", "underline"),
)
"""Patterns and their styles."""


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def screen(lines: list[str]) -> str:
    """Return lines from the top of the terminal on, as many as fit."""
    width, height = shutil.get_terminal_size()
    return CLEAR + "\n".join(painted(line[:width] for line in lines[: height - 1]))


def painted(lines: Iterable[str]) -> list[str]:
    """Return lines for the terminal, in colours if rich and the terminal support them and NO_COLOR is not set."""
    lines = list(lines)
    if not is_terminal():
        return lines
    try:
        # Imported here because it takes longer than everything else, and only people need it.
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lines
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    shown = []
    for line in lines:
        text = Text(line)
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style)
        with console.capture() as captured:
            console.print(text, end="", soft_wrap=True)
        shown.append(captured.get())
    return shown
