"""Sphinx's configuration: `nox -s docs` builds the site from these pages, and fails on any warning.

What can be known from the program is taken from it: help texts from the parser, built-in signals from their table, keys
of files from the classes that read them, the library from its docstrings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["COLUMNS"] = "100"  # of the help texts

from docs.fields import hide_constructors, table
from inco_trio import config
from inco_trio.board_files import BoardFile
from inco_trio.cli.parser import COMMANDS, drop_in_parser, parser
from inco_trio.mqtt.configuration import Credentials, GatewayConfig
from inco_trio.signals import BUILTIN

KEYS = {
    "file.<device>": config._Device,
    "misc.ihub_config_dev.regs.<reg>": config._Reg,
    "misc.inco_proxy.signals.<wire name>": config._Entry,
    "NAME.json": BoardFile,
    "gateway.json": GatewayConfig,
    "broker": Credentials,
}
"""What the pages call a table of a file, and the class that reads it."""

project = "inco-trio"
author = copyright = "The inco-trio developers"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["man", "completion", "manual", "bench", "_build"]
html_theme = "furo"
html_title = "inco-trio"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "literal"
hide_constructors()


class Help(Directive):
    """The help of each command, as its users see it."""

    def run(self) -> list[nodes.Node]:
        """A section for each command."""
        sections: list[nodes.Node] = []
        commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        for each in (*(commands[name] for name in COMMANDS), drop_in_parser()):  # type: ignore[index]
            section = nodes.section(ids=[each.prog.replace(" ", "-")])
            text = each.format_help()
            section += [nodes.title(text=each.prog), nodes.literal_block(text, text, language="text")]
            sections.append(section)
        return sections


class BuiltinSignals(Directive):
    """The built-in signals, and where udrv.json moves them."""

    def run(self) -> list[nodes.Node]:
        """A table."""
        rows = ["| signal | direction | key of its register | default |", "|---|---|---|---|"]
        for each in BUILTIN:
            key = f"misc.ihub_config_dev.regs.{each.reg}.reg"
            rows.append(f"| `{each.name}` | {each.direction.value} | `{key}` | `ihub-irq-dev.{each.register}` |")
        return _parsed(self, rows, "inco_trio.signals")


class Keys(Directive):
    """The keys of one table of a file, which is named in KEYS."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """A table."""
        cls = KEYS[self.arguments[0]]
        prefix = "" if cls in (BoardFile, GatewayConfig) else f"{self.arguments[0]}."
        return _parsed(self, table(cls, prefix), cls.__module__)


def _parsed(directive: Directive, lines: list[str], source: str) -> list[nodes.Node]:
    """The nodes of lines of Markdown."""
    node = nodes.section()
    directive.state.nested_parse(StringList(lines, source), directive.content_offset, node)
    return list(node.children)


def setup(app: Sphinx) -> None:
    """Add what the pages use."""
    app.add_directive("inco-help", Help)
    app.add_directive("inco-signals", BuiltinSignals)
    app.add_directive("inco-keys", Keys)
