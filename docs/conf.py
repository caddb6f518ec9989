"""Sphinx's configuration: `nox -s docs` builds the site from these pages, and fails on any warning.

Parts of the site are generated from the program: help texts from the parser, and the library reference from docstrings.
The tables of the pages are generated too, but the repository contains them; see docs.manual.generated.
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

from docs.fields import hide_constructors
from docs.manual.page import markdown
from inco_trio.cli.parser import COMMANDS, drop_in_parser, parser

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


def _parsed(directive: Directive, lines: list[str], source: str) -> list[nodes.Node]:
    """Parse lines of Markdown, and return the docutils nodes."""
    node = nodes.section()
    directive.state.nested_parse(StringList(lines, source), directive.content_offset, node)
    return list(node.children)


def setup(app: Sphinx) -> None:
    """Add the directive that the pages use."""
    app.add_directive("inco-help", Help)
