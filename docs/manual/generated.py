"""The contents of all generated files, and a check of the files on disk."""

from __future__ import annotations

from pathlib import Path

from docs.fields import described
from docs.manual.completion import complete
from docs.manual.page import command_pages, configuration_page, drop_in_page
from inco_trio import config
from inco_trio.cli.parser import drop_in_parser, parser
from inco_trio.signals import builtin_signals

__all__ = ["COMPLETION", "MAN", "MAN5", "ROOT", "generate", "stale"]

ROOT = Path(__file__).parents[2]
MAN = Path("docs/man")
MAN5 = Path("docs/man5")
COMPLETION = Path("docs/completion")
EXAMPLE = Path(config.__file__).with_name("example.json")


def generate() -> dict[Path, str]:
    """Return the text of each file, keyed by its path relative to ROOT.

    The text does not depend on the Python version or the terminal.
    """
    pages = {**command_pages(parser()), **drop_in_page(drop_in_parser())}
    return {
        **{MAN / name: text for name, text in pages.items()},
        **{MAN5 / name: text for name, text in configuration_page(_keys(), _files(), EXAMPLE.read_text()).items()},
        **{COMPLETION / name: text for name, text in complete(parser()).items()},
    }


def _keys() -> list[tuple[str, str]]:
    """Return each key of udrv.json with its description."""
    tables = {
        "file.DEVICE": config._Device,
        "misc.ihub_config_dev.regs.REG": config._Reg,
        "misc.inco_proxy.signals.SIGNAL": config._Entry,
    }
    return [(f"{table}.{key}", what) for table, cls in tables.items() for key, what in described(cls).items()]


def _files() -> list[str]:
    """Return the name, the direction and the file of each built-in signal."""
    return [f"`{each.path.name}` for {each.name} ({each.direction.value})" for each in builtin_signals(Path("/"))]


def stale(root: Path = ROOT) -> list[str]:
    """Return the files below `root` that are missing, outdated or no longer needed."""
    wanted = generate()
    there = {path.relative_to(root) for directory in (MAN, MAN5, COMPLETION) for path in (root / directory).glob("*")}
    old = {path for path in wanted.keys() & there if (root / path).read_text() != wanted[path]}
    return sorted(map(str, old | (wanted.keys() ^ there)))
