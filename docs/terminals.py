"""Draw the terminal screenshots of the pages: `python -m docs.terminals` writes docs/images/terminal-*.svg.

Each screenshot shows the output on the page. Tests compare this output with the output of the real command.
"""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.text import Text

from docs.diagrams import IMAGES
from inco_trio.cli.terminal import painted
from tests.support_pages import parts

__all__ = ["TERMINALS", "draw", "visible"]

TERMINALS = {
    "status": ("troubleshooting", "inco-trio status"),
    "monitor": ("troubleshooting", "inco-trio monitor --count 2"),
    "doctor": ("first-steps", "inco-trio doctor rpmsg4000 --config udrv.json"),
}
"""The page and the command of each screenshot, keyed by image name."""
COLUMNS = 92
"""Minimum width in columns. All screenshots are scaled to one width, so equal column counts give equal text sizes."""


def draw(name: str) -> str:
    """Return the screenshot as SVG."""
    page, command = TERMINALS[name]
    blocks = list(parts(page))
    at = next(number for number, block in enumerate(blocks) if block.text == f"{command}\n")
    lines = [f"$ {command}", *painted(blocks[at + 1].text.splitlines(), "always")]
    width = max(COLUMNS, *(len(Text.from_ansi(line)) for line in lines))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="", unique_id=name)
    # Remove the web fonts: browsers do not load fonts for images.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def visible(svg: str) -> str:
    """Return the text in a screenshot, without white space."""
    return re.sub(r"\s", "", "".join(re.findall(r"<text[^>]*>([^<]+)</text>", svg)))


if __name__ == "__main__":
    for each in TERMINALS:
        (IMAGES / f"terminal-{each}.svg").write_text(draw(each))
