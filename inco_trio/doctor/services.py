"""Checks of the services that inco-trio wrote: whether a supervisor runs them, and where their logs are."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from inco_trio.doctor.result import Result, fail, hidden, warn
from inco_trio.linux.processes import Processes
from inco_trio.service.descriptions import PREFIX

__all__ = ["not_running"]

PERMANENT = {str(code) for code in (os.EX_NOPERM, os.EX_CONFIG, 2)}
"""The exit codes after which the `finish` script keeps a service down. Other services that are down were stopped."""
PATIENCE = 5.0
"""Maximum time in seconds that a command of a supervisor may take."""


def not_running(processes: Processes, label: str = "*", root: Path = Path("/")) -> Iterator[Result]:
    """Report each service of s6 and systemd that is down, with the reason and the place of its log.

    `label` is the label of the service (default: all services; see `Service.label`).
    """
    name = f"{PREFIX}{label}"
    for process in processes.all:
        if process.name == "s6-supervise":
            try:
                # The service directory is the working directory of its s6-supervise.
                directory = (root / f"proc/{process.pid}/cwd").readlink()
            except OSError:
                continue  # This user may not see it, or the process has ended.
            if fnmatchcase(directory.name, name) and directory.is_dir():
                yield from _s6(directory)
    if (root / "run/systemd/system").is_dir():
        yield from _systemd(f"{name}.service")


def _s6(directory: Path) -> Iterator[Result]:
    answer = _output("s6-svstat", "-o", "up,wantedup,normallyup,exitcode,signum", str(directory))
    if answer is None:
        yield hidden(f"the state of the service {directory}")
        return
    up, wanted, normally, code, number = answer.split()
    if up == "true":
        return
    reason = f"its process was killed by {_signal(int(number))}" if int(number) > 0 else f"its exit code was {code}"
    if normally != "true":
        reason += f", and {directory}/down exists"
    log = directory / "log/main/current"
    text = f"the service is down ({reason}): its log is {log}"
    if wanted == "true":
        yield fail("service", directory, f"{text}; s6 starts it again")
    else:
        level = fail if code in PERMANENT else warn
        yield level("service", directory, text, f"s6-svc -u {shlex.quote(str(directory))}")


def _systemd(pattern: str) -> Iterator[Result]:
    answer = _output("systemctl", "show", "--property=Id,ActiveState,Result,ExecMainStatus", pattern)
    for block in (answer or "").split("\n\n"):
        unit = dict(line.partition("=")[::2] for line in block.splitlines())
        if unit.get("ActiveState") in ("failed", "inactive"):
            text = f"the service is {unit['ActiveState']} ({unit['Result']}, exit status {unit['ExecMainStatus']})"
            level = fail if unit["ActiveState"] == "failed" else warn
            name = shlex.quote(unit["Id"])
            yield level("service", unit["Id"], f"{text}: its log is `journalctl -u {name}`", f"systemctl start {name}")


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if it fails, is missing or takes too long."""
    if (program := shutil.which(command[0])) is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
