"""pytest plugin that reports the outcome of each check to the host, over a serial port of the virtual machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPORT = "INCO_TRIO_REPORT"
"""Environment variable with the path of the file or serial port that receives the results as JSON lines."""


def write_report(**report: object) -> None:
    """Report to the host immediately, so that nothing is lost if the machine crashes."""
    with Path(os.environ[REPORT]).open("a") as port:
        port.write(json.dumps(report) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Report which check is running, so that the host can name it if the machine hangs."""
    write_report(check=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.passed else report.longreprtext
        write_report(check=report.nodeid, outcome=report.outcome, text=text, figures=report.user_properties)
