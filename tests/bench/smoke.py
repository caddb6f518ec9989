"""Check that the benchmark works: run its quick form in four processes, each with a quarter of the figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from netns.hang import HANG

from .measures import MEASURES

PROCESSES = 4
QUARTERS = [",".join(list(MEASURES)[first::PROCESSES]) for first in range(PROCESSES)]


@pytest.mark.parametrize("figures", QUARTERS)
def test_the_quick_form_works(figures: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--smoke", "--only", figures, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"results.json", "results.md"} <= {path.name for path in tmp_path.iterdir()}
