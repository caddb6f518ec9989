"""Test each example project in its own environment with the built wheel; run by `nox -s examples`.

An example's tests must pass unchanged. With a fault in the tested program, they must fail and name the missing signal.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from netns.hang import HANG

EXAMPLES = Path(__file__).parents[2] / "examples"
WHEEL = Path(os.environ["INCO_TRIO_WHEEL"])
ENVIRONMENTS = Path(os.environ["INCO_TRIO_ENVIRONMENTS"])
PYTEST = ("pytest", "-x", "-p", "no:cacheprovider")


@attrs.frozen
class Fault:
    """A line of a program, and the faulty line that replaces it."""

    file: str
    right: str
    wrong: str
    missing: str
    """The signal that does not arrive because of the fault."""
    wait: str
    """The code in the test that waits for this signal."""
    short: str
    """The same code with a short deadline. The deadline always expires, because the signal never arrives."""


FAULTS = {
    "guard": Fault(
        *("guard.py", 'answer.write_text("1")', "answer.read_text()", "redun_notify_irq"),
        *('expect("redun_notify_irq")', 'expect("redun_notify_irq", timeout=2)'),
    ),
    "firmware": Fault(
        *("watchdog.c", "link_send(signal);", "(void)signal;", "ihub_hwwd_irq"),
        *('expect("ihub_hwwd_irq")', 'expect("ihub_hwwd_irq", timeout=2)'),
    ),
    # Shorten only the wait for a number other than "0": the page already shows "0" before the signal is sent.
    "web": Fault(
        *("signals_page.py", 'row["count"] += 1', 'row["count"] += 0', "ihub_hwwd_irq"),
        *("WebDriverWait(browser, HANG)", 'WebDriverWait(browser, HANG if text == "0" else 2)'),
    ),
    "shell": Fault(
        *("answer.sh", 'echo 1 > "$1/message_6_trig"', ":", "redun_notify_irq"),
        *("--timeout 300", "--timeout 2"),
    ),
}
COMMANDS = {"shell": ("./test.sh",)}
MISSING = ("did not arrive", "did not appear", "0 of 1 arrived")
"""Messages that the examples' tests print if a signal is missing."""


@pytest.fixture(scope="session", params=sorted(FAULTS))
def example(request: pytest.FixtureRequest) -> str:
    """Create the example's environment and return the example's name."""
    name: str = request.param
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    # Take a lock, because tests in other processes use the same environment.
    with (ENVIRONMENTS / f"{name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read() != (wanted := str(WHEEL.stat().st_mtime_ns)):
            make_environment(name)
            lock.truncate(0)
            lock.write(wanted)
    return name


def make_environment(name: str) -> None:
    environment = ENVIRONMENTS / name
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, environment], check=True)
    # uv writes build files into the source directory, so it builds a copy.
    shutil.copytree(EXAMPLES / name, environment / "source")
    project = environment / "source/pyproject.toml"
    needs = [f"{WHEEL}[testing]"]
    if project.exists():
        needs += ["--group", f"{project}:test"]
        if "[project]" in project.read_text():
            needs.append(str(project.parent))
    install = (
        "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        environment / "bin/python",
        "--reinstall-package",
        "inco-trio",
    )
    subprocess.run([*install, *needs], check=True)


def run(name: str, tmp_path: Path, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
    """Copy the example, inject the fault if one is given, and run the copy's tests."""
    home = tmp_path / name
    shutil.copytree(EXAMPLES / name, home)
    if fault is not None:
        text = (home / fault.file).read_text()
        assert text.count(fault.right) == 1
        (home / fault.file).write_text(text.replace(fault.right, fault.wrong))
        (test,) = home.glob("test*")
        text = test.read_text()
        assert fault.wait in text
        test.write_text(text.replace(fault.wait, fault.short))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COVERAGE"))
    }
    return subprocess.run(
        COMMANDS.get(name, PYTEST),
        cwd=home,
        env={**environment, "PATH": f"{ENVIRONMENTS / name / 'bin'}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def test_an_example_passes_its_own_tests(example: str, tmp_path: Path) -> None:
    done = run(example, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout


def test_a_fault_in_an_example_fails_and_names_the_signal(example: str, tmp_path: Path) -> None:
    fault = FAULTS[example]
    done = run(example, tmp_path, fault)
    assert done.returncode == 1, done.stdout + done.stderr
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if fault.missing in line and any(text in line for text in MISSING)], said
