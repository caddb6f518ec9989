"""Sphinx's configuration: `nox -s docs` builds the site from these pages, and fails on any warning.

What can be known from the program is taken from it: help texts from the parser, built-in signals from their table, the
library from its docstrings.
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

from inco_trio.commands.line import COMMANDS, parser
from inco_trio.signals import BUILTIN

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


class Help(Directive):
    """The help of each command, as its users see it."""

    def run(self) -> list[nodes.Node]:
        """A section for each command."""
        sections: list[nodes.Node] = []
        commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        for name in COMMANDS:
            section = nodes.section(ids=[f"inco-trio-{name}"])
            text = commands[name].format_help()  # type: ignore[index]
            section += [nodes.title(text=f"inco-trio {name}"), nodes.literal_block(text, text, language="text")]
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
        node = nodes.section()
        self.state.nested_parse(StringList(rows, "inco_trio.signals"), self.content_offset, node)
        return list(node.children)


def setup(app: Sphinx) -> None:
    """Add what the pages use."""
    app.add_directive("inco-help", Help)
    app.add_directive("inco-signals", BuiltinSignals)
