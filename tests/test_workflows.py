"""Tests that the GitHub Actions workflow agrees with the project's metadata and README."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.fresh import readme_command

# The nox session `unit` skips tests with this marker, because it runs in a copy of the tree without hidden directories.
pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/ci.yml"


def test_the_workflow_runs_each_supported_python() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata["classifiers"]))
    workflow = WORKFLOW.read_text()
    matrix = re.findall(r'"(3\.\d+)"', workflow)
    installed = re.findall(r"^ +(3\.\d+)$", workflow, re.MULTILINE)
    assert matrix == installed == supported


def test_the_workflow_runs_the_test_command_of_the_readme() -> None:
    assert "command: .ci/run\n" in WORKFLOW.read_text()
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert command == readme_command("Tests")
