"""All files that are generated, and whether those on the disk are the same."""

from __future__ import annotations

from pathlib import Path

from docs.manual.completion import complete
from docs.manual.page import command_pages, drop_in_page
from inco_trio.cli.parser import drop_in_parser, parser

__all__ = ["COMPLETION", "MAN", "ROOT", "generate", "stale"]

ROOT = Path(__file__).parents[2]
MAN = Path("docs/man")
COMPLETION = Path("docs/completion")


def generate() -> dict[Path, str]:
    """Text by path, which is relative to ROOT; the same on each Python, and for each width of a terminal."""
    pages = {**command_pages(parser()), **drop_in_page(drop_in_parser())}
    return {
        **{MAN / name: text for name, text in pages.items()},
        **{COMPLETION / name: text for name, text in complete(parser()).items()},
    }


def stale(root: Path = ROOT) -> list[str]:
    """The files below `root` that are missing, are not what `generate` gives, or are there for nothing."""
    wanted = generate()
    there = {path.relative_to(root) for directory in (MAN, COMPLETION) for path in (root / directory).glob("*")}
    old = {path for path in wanted.keys() & there if (root / path).read_text() != wanted[path]}
    return sorted(map(str, old | (wanted.keys() ^ there)))
