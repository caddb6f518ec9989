"""The contents of all generated files, and a check of the files on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import attrs

from docs.fields import described, figures, table
from docs.manual.completion import complete
from docs.manual.page import command_pages, configuration_page, drop_in_page
from inco_trio import config
from inco_trio.board_files import BoardFile
from inco_trio.cli.parser import drop_in_parser, parser
from inco_trio.mqtt.configuration import Credentials, GatewayConfig
from inco_trio.signals import BUILTIN, builtin_signals

__all__ = ["COMPLETION", "MAN", "MAN5", "ROOT", "generate", "stale"]

ROOT = Path(__file__).parents[2]
MAN = Path("docs/man")
MAN5 = Path("docs/man5")
COMPLETION = Path("docs/completion")
DEVICE, REG, ENTRY = map(attrs.frozen, (config._Device, config._Reg, config._Entry))
"""The tables of a udrv.json. The proxy does not create instances of these classes."""
EXAMPLE = Path(config.__file__).with_name("example.json")
TABLE = re.compile(r"^(<!-- table: (.+?) -->\n)(?:\|.*\n)*", re.MULTILINE)
"""A generated table of a page, with the comment that names it."""


def generate() -> dict[Path, str]:
    """Return the text of each file, keyed by its path relative to ROOT.

    The text does not depend on the Python version or the terminal.
    """
    pages = {**command_pages(parser()), **drop_in_page(drop_in_parser())}
    return {
        **{MAN / name: text for name, text in pages.items()},
        **{MAN5 / name: text for name, text in configuration_page(_keys(), _files(), EXAMPLE.read_text()).items()},
        **{COMPLETION / name: text for name, text in complete(parser()).items()},
        **_pages(),
    }


def _pages() -> dict[Path, str]:
    """Return the pages that contain tables, with their current tables."""
    tables: dict[str, Callable[[], list[str]]] = {
        "file.<device>": lambda: table(DEVICE, "file.<device>."),
        "misc.ihub_config_dev.regs.<reg>": lambda: table(REG, "misc.ihub_config_dev.regs.<reg>."),
        "misc.inco_proxy.signals.<wire name>": lambda: table(ENTRY, "misc.inco_proxy.signals.<wire name>."),
        "NAME.json": lambda: table(BoardFile),
        "gateway.json": lambda: table(GatewayConfig),
        "broker": lambda: table(Credentials, "broker."),
        "signals": _signals,
        "figures": lambda: figures((ROOT / "docs/bench/results.md").read_text()),
    }

    def fill(found: re.Match[str]) -> str:
        return "\n".join([found[1].rstrip("\n"), *tables[found[2]](), ""])

    pages = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "docs").glob("*.md")}
    return {path: TABLE.sub(fill, text) for path, text in pages.items() if TABLE.search(text)}


def _signals() -> list[str]:
    """Return a table of the built-in signals, with the keys of udrv.json that change their registers."""
    rows = ["| signal | direction | key of its register | file without the key |", "|---|---|---|---|"]
    for each in BUILTIN:
        key = f"misc.ihub_config_dev.regs.{each.reg}.reg"
        rows.append(f"| `{each.name}` | {each.direction.value} | `{key}` | `{each.register}` |")
    return rows


def _keys() -> list[tuple[str, str]]:
    """Return each key of udrv.json with its description."""
    tables = {
        "file.DEVICE": DEVICE,
        "misc.ihub_config_dev.regs.REG": REG,
        "misc.inco_proxy.signals.SIGNAL": ENTRY,
    }
    return [(f"{table}.{key}", what) for table, cls in tables.items() for key, what in described(cls).items()]


def _files() -> list[str]:
    """Return the name, the direction and the file of each built-in signal."""
    return [f"`{each.path.name}` for {each.name} ({each.direction.value})" for each in builtin_signals(Path("/"))]


def stale(root: Path = ROOT) -> list[str]:
    """Return the files below `root` that are missing, outdated or no longer needed."""
    wanted = generate()
    there = {path.relative_to(root) for directory in (MAN, MAN5, COMPLETION) for path in (root / directory).glob("*")}
    there |= {path for path in wanted if (root / path).exists()}
    old = {path for path in wanted.keys() & there if (root / path).read_text() != wanted[path]}
    return sorted(map(str, old | (wanted.keys() ^ there)))
