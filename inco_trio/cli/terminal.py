"""What is shown on a terminal: cut to its size, and coloured where rich is there (the extra `rich`)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable

__all__ = ["is_terminal", "painted", "screen"]

CLEAR = "\x1b[H\x1b[J"
"""Cursor home, and all behind it erased."""
STYLES = (
    (r"(?<=: )up\b|\bthe link came up\b|\bworks again\b|^ok\b", "green"),
    (r"(?<=: )(down|not open)\b|\bthe link went down\b|^fail\b|\b\d+ dropped\b|\bevents were lost here\b", "bold red"),
    (r"\bkept by nobody\b|\bignored: .*|^warn\b|\b(warning|error): .*|\brestarted .*", "yellow"),
    (r"(?<=\s)in(?=\s+\S+_irq\b)", "cyan"),
    (r"(?<=\s)out(?=\s+\S+_irq\b)", "magenta"),
    (r"\bnever\b", "dim"),
    (r"^ +signal +count .*", "underline"),
)
"""Patterns of what is shown, and how."""


def is_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout is not None and sys.stdout.isatty()


def screen(lines: list[str]) -> str:
    """Lines that begin at the top of the terminal, as far as they fit."""
    width, height = shutil.get_terminal_size()
    return CLEAR + "\n".join(painted(line[:width] for line in lines[: height - 1]))


def painted(lines: Iterable[str]) -> list[str]:
    """Lines as a terminal shows them: in colours if rich is there, the terminal knows them, and NO_COLOR is not set."""
    lines = list(lines)
    if not is_terminal():
        return lines
    try:
        # Takes longer to import than all else, and is seen by people only.
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
