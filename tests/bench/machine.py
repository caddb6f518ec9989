"""The machine that the figures were measured on."""

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
"""What the benchmark needs beside inco-trio itself."""


def describe() -> dict[str, Any]:
    """CPU, kernel, Python and libraries, date. Raises `BenchError` if a library that is needed is missing."""
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
    """What matters of a description, in half a line."""
    return f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}"
