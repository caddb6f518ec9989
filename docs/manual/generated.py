"""The texts of all generated files, and a check of the files on disk."""

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
    """Return each text by its path relative to ROOT. The texts do not depend on Python or the terminal width."""
    pages = {**command_pages(parser()), **drop_in_page(drop_in_parser())}
    return {
        **{MAN / name: text for name, text in pages.items()},
        **{COMPLETION / name: text for name, text in complete(parser()).items()},
    }


def stale(root: Path = ROOT) -> list[str]:
    """Return the files below `root` that are missing, outdated or no longer needed."""
    wanted = generate()
    there = {path.relative_to(root) for directory in (MAN, COMPLETION) for path in (root / directory).glob("*")}
    old = {path for path in wanted.keys() & there if (root / path).read_text() != wanted[path]}
    return sorted(map(str, old | (wanted.keys() ^ there)))
