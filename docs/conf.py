"""Sphinx's configuration: `nox -s docs` builds the site from these pages, and fails on any warning.

Parts of the pages are generated from the program: help texts from the parser, built-in signals from their table,
configuration keys from the classes that parse them, and the library reference from docstrings.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.fields import figures, hide_constructors, table
from docs.manual.page import markdown
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
"""The class that parses each table of a configuration file, keyed by the table name that the pages use."""

project = "inco-trio"
author = copyright = "The inco-trio developers"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["man", "man5", "completion", "manual", "bench", "_build"]
html_theme = "furo"
html_title = f"inco-trio {metadata.version('inco-trio').partition('+')[0]}"
html_static_path = ["static"]
html_css_files = ["blocks.css"]
html_theme_options = {
    "source_repository": "https://github.com/inco-trio/inco-trio/",
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": "https://github.com/inco-trio/inco-trio", "html": "Repository"}],
}
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "literal"
hide_constructors()


class Help(Directive):
    """A directive that documents every command with its `--help` text. Only GitHub shows the content of its block."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        sections: list[nodes.Node] = []
        commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        for each in (*(commands[name] for name in COMMANDS), drop_in_parser()):  # type: ignore[index]
            section = nodes.section(ids=[each.prog.replace(" ", "-")])
            section += [nodes.title(text=each.prog), *_parsed(self, markdown(each), "inco_trio.cli")]
            sections.append(section)
        return sections


class BuiltinSignals(Directive):
    """A directive that lists the built-in signals, with the keys of udrv.json that change their registers."""

    def run(self) -> list[nodes.Node]:
        """Return a table with a row for each signal."""
        rows = ["| signal | direction | key of its register | default |", "|---|---|---|---|"]
        for each in BUILTIN:
            key = f"misc.ihub_config_dev.regs.{each.reg}.reg"
            rows.append(f"| `{each.name}` | {each.direction.value} | `{key}` | `ihub-irq-dev.{each.register}` |")
        return _parsed(self, rows, "inco_trio.signals")


class Keys(Directive):
    """A directive that lists the keys of one table in a configuration file. The argument is a key of KEYS."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        cls = KEYS[self.arguments[0]]
        prefix = "" if cls in (BoardFile, GatewayConfig) else f"{self.arguments[0]}."
        return _parsed(self, table(cls, prefix), cls.__module__)


class Figures(Directive):
    """A directive that shows the results of the benchmark, without the details that only developers need."""

    def run(self) -> list[nodes.Node]:
        results = Path(__file__).with_name("bench") / "results.md"
        self.state.document.settings.record_dependencies.add(str(results))
        return _parsed(self, figures(results.read_text()), str(results))


def _parsed(directive: Directive, lines: list[str], source: str) -> list[nodes.Node]:
    """Parse lines of Markdown, and return the docutils nodes."""
    node = nodes.section()
    directive.state.nested_parse(StringList(lines, source), directive.content_offset, node)
    return list(node.children)


def setup(app: Sphinx) -> None:
    """Add the directives that the pages use."""
    app.add_directive("inco-help", Help)
    app.add_directive("inco-signals", BuiltinSignals)
    app.add_directive("inco-keys", Keys)
    app.add_directive("inco-figures", Figures)
