"""The machine on which the benchmark runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .rivals import BenchError

__all__ = ["NEEDED", "describe", "in_words"]

NEEDED = ("matplotlib", "scapy", "watchdog")
"""Packages that the benchmark needs in addition to inco-trio."""


def describe() -> dict[str, Any]:
    """Describe the CPU, kernel, software versions and date. Raise `BenchError` if a needed library is missing."""
    try:
        versions = {name: importlib.metadata.version(name) for name in ("trio", *NEEDED)}
    except importlib.metadata.PackageNotFoundError as error:
        raise BenchError(f"{error.name} is not installed: the benchmark needs {', '.join(NEEDED)}") from error
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": versions,
        "load average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def in_words(machine: Mapping[str, Any]) -> str:
    """Shorten the description of a machine to its important parts, at most half a line."""
    return f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}"
