"""Test the built wheel in an environment without other packages, which `nox -s wheel` creates.

Each test runs the environment's Python outside the checkout, so pytest's own import path has no effect.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from netns.hang import HANG

PYTHON = Path(os.environ["INCO_TRIO_WHEEL_PYTHON"])
DIST = Path(os.environ["INCO_TRIO_WHEEL_DIST"])
HERE = Path(__file__).parent
SAMPLE = HERE.parent / "data/udrv.json"


def run(cwd: Path, *command: str | Path) -> str:
    """Run a command with the environment's programs first on PATH; return its output. The exit code must be 0."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "HOME": str(cwd)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode} (expected 0)\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_wheel_contains_only_the_package() -> None:
    (wheel,) = DIST.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    info = f"inco_trio-{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {"inco_trio", info, f"inco_trio-{version}.data"}
    assert {"inco_trio/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)
    assert "inco_trio/simulation/firmware/core1.elf" in names


def test_sdist_contains_the_files_that_the_checks_need() -> None:
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {".ci/run", "LICENSE", "README.md", "noxfile.py", "tests/wheel/smoke.py", "netns/__init__.py"} <= names


def test_metadata_names_license_python_and_entry_points(tmp_path: Path) -> None:
    code = """
import json, importlib.metadata
wheel = importlib.metadata.distribution("inco-trio")
found = {key: wheel.metadata.get_all(key) for key in ("License-Expression", "License-File", "Requires-Python")}
points = {entry.group: {} for entry in wheel.entry_points}
for entry in wheel.entry_points:
    points[entry.group][entry.name] = entry.value
print(json.dumps({**found, **points}))
"""
    assert json.loads(run(tmp_path, PYTHON, "-c", code)) == {
        "License-Expression": ["MIT"],
        "License-File": ["LICENSE"],
        "Requires-Python": [">=3.11"],
        "console_scripts": {"inco-trio": "inco_trio.cli:main", "inco_proxy": "inco_trio.cli:inco_proxy"},
        "pytest11": {"inco_trio": "inco_trio.testing.plugin"},
    }


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import asyncio, logging, os, signal, sys, threading, warnings
def state():
    return {
        "descriptors": os.listdir("/proc/self/fd"),
        "threads": threading.active_count(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook),
        "handlers": list(logging.getLogger().handlers),
        "asyncio": type(asyncio.get_event_loop_policy()),
        "environment": dict(os.environ),
        "files": os.listdir("."),
    }
before = state()
import inco_trio
after = state()
assert after == before, (before, after)
assert not {"trio_asyncio"} & set(sys.modules), "the package imports a module that few programs need"
print(inco_trio.__file__)
"""
    (where,) = run(tmp_path, PYTHON, "-W", "error::SyntaxWarning", "-c", code).splitlines()
    assert Path(where).is_relative_to(PYTHON.parent.parent)


@pytest.mark.parametrize("command", [("inco-trio",), ("inco_proxy",), ("python", "-m", "inco_trio")], ids=" ".join)
def test_each_command_prints_its_usage(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "usage: " in run(tmp_path, *command, "--help")


def test_man_pages_and_completions_are_installed_where_tools_search(tmp_path: Path) -> None:
    share = PYTHON.parent.parent / "share"
    for path in (
        "bash-completion/completions/inco-trio",
        "zsh/site-functions/_inco-trio",
        "fish/vendor_completions.d/inco-trio.fish",
    ):
        assert "inco-trio" in (share / path).read_text()
    usage = run(tmp_path, "inco-trio", "--help")
    commands = re.findall(r"^  ([a-z][\w-]*)  ", usage, re.MULTILINE)
    assert "run" in commands
    # The list of commands has neither `help` nor `s6`, the former name of `service s6`.
    pages = {"inco-trio.1", "inco_proxy.1", *(f"inco-trio-{command}.1" for command in (*commands, "help", "s6"))}
    assert {page.name for page in (share / "man/man1").glob("inco*")} == pages


def test_check_accepts_the_sample(tmp_path: Path) -> None:
    table = run(tmp_path, "inco-trio", "check", "--config", SAMPLE)
    assert all(name in table for name in ("redun_notify_irq", "ihub_hwwd_irq", "ihub_reset_irq", "typeb_failure_irq"))


def test_a_user_program_type_checks_against_the_wheel(tmp_path: Path) -> None:
    program = tmp_path / "user_program.py"
    program.write_bytes((HERE / "user_program.py").read_bytes())
    run(tmp_path, sys.executable, "-m", "mypy", "--strict", "--python-executable", PYTHON, program)


def test_demo_runs_from_the_wheel(tmp_path: Path) -> None:
    run(tmp_path, "inco-trio", "demo", "--count", "3")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["mqtt", "mqtt://127.0.0.1"], "mqtt5 is not installed: pip install 'inco-trio[mqtt]'"),
        (
            ["mqtt-link", "mqtt://127.0.0.1", "unix:/a,peer=/b", "--end", "core0"],
            "mqtt5 is not installed: pip install 'inco-trio[mqtt]'",
        ),
    ],
)
def test_error_names_the_extra_that_is_not_installed(tmp_path: Path, words: list[str], line: str) -> None:
    program = PYTHON.parent / "inco-trio"
    done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stderr) == (69, f"inco-trio: error: {line}\n")


def test_wheel_contains_dashboard_and_alerts(tmp_path: Path) -> None:
    program = PYTHON.parent / "inco-trio"
    assert json.loads(run(tmp_path, program, "exporter", "--dashboard"))["title"] == "inco-trio"
    assert "IncoTrioFramesDropped" in run(tmp_path, program, "exporter", "--alerts")
