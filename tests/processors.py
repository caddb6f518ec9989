"""Run the unit tests on other processors: `python -m tests.processors [ARCHITECTURE...]`, as root.

mmdebstrap builds a Debian system for each architecture, and qemu-user-static emulates its programs. The tests run
in this system, so a wrong byte order or struct size in kernel data (inotify, BPF, memfd) makes a test fail.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fresh import ENTER, find_mirror

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build/processors"
ARCHITECTURES = {"arm64": "aarch64", "armhf": "arm", "s390x": "s390x"}
"""Map from Debian's name for each architecture to QEMU's name. s390x is big-endian."""
PACKAGES = "python3,python3-venv,python3-greenlet,procps"
TEST_PACKAGES = ("pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.103")

FILES = (
    *("test_frame.py", "test_inotify.py", "test_linux.py", "test_inflight.py", "test_history.py", "test_fdstore.py"),
    *("test_address.py", "test_config.py", "test_signals.py", "test_capture.py", "test_protocol.py", "test_link.py"),
    *("test_registers.py", "test_unix_link.py", "test_notify.py", "test_handoff.py", "test_validation.py"),
)
"""Test files for data formats that the kernel or other programs define."""

EMULATION_LACKS: dict[str, str] = {}
"""Map from each test that cannot pass under emulation to the reason."""

# binfmt_misc makes the kernel start QEMU for foreign programs. With the flag F, the kernel opens QEMU at registration,
# so QEMU does not have to be installed in the emulated system.
EMULATE = """
set -e
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/$1 ] || cat /usr/lib/binfmt.d/$1.conf > /proc/sys/fs/binfmt_misc/register
shift
exec "$@"
"""


def emulate(architecture: str, *command: str | Path) -> None:
    """Run a command that starts programs of this architecture. Raise CalledProcessError if it fails."""
    name = f"qemu-{ARCHITECTURES[architecture]}"
    subprocess.run(["unshare", "--mount", "sh", "-ec", EMULATE, "sh", name, *command], check=True)


def build(architecture: str) -> Path:
    """Install Debian in a directory, unless an earlier run has already done so."""
    tree = WORK / f"{architecture}.tree"
    if tree.exists():
        return tree
    WORK.mkdir(parents=True, exist_ok=True)
    partial = tree.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--arch={architecture}", f"--include={PACKAGES}"]
    emulate(architecture, *command, "bookworm", partial, f"deb {find_mirror()} bookworm main")
    return partial.rename(tree)


def install(tree: Path) -> None:
    """Install the wheel, its dependencies, pytest and the tests in the system."""
    python = (tree / "usr/bin/python3").readlink().name
    shutil.rmtree(tree / "opt", ignore_errors=True)
    for name in ("tests", "netns", "docs", "examples"):
        shutil.copytree(ROOT / name, tree / "opt/project" / name)
    for name in ("pyproject.toml", "noxfile.py", "README.md"):
        shutil.copy(ROOT / name, tree / "opt/project" / name)
    dist, packages = WORK / "dist", tree / "opt/packages"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", dist, ROOT], check=True)
    # trio-asyncio needs greenlet, which is compiled, so use Debian's package. Newer versions of hypothesis are also
    # compiled, so install the oldest supported version.
    wanted: list[str | Path] = [*dist.glob("*.whl"), *TEST_PACKAGES]
    options = ("--target", packages, "--python-version", python.removeprefix("python"), "--resolution", "lowest-direct")
    subprocess.run(["uv", "pip", "install", "--quiet", *options, *wanted], check=True)
    for compiled in packages.glob("greenlet*"):
        shutil.rmtree(compiled)


def run(architecture: str, tree: Path, *options: str) -> bool:
    """Run the tests in the system. Return whether they have passed."""
    deselected = [f"--deselect=tests/{name}" for name in EMULATION_LACKS]
    words = ["-p", "no:cacheprovider", "-m", "not netns and not s6 and not qemu and not faults and not tools"]
    files = [f"tests/{name}" for name in FILES]
    script = 'cd /opt/project && PYTHONPATH=/opt/packages exec python3 -m pytest -q "$@"'
    command: list[str | Path] = [".", "sh", "-ec", script, "sh", *words, *deselected, *(options or files)]
    try:
        emulate(architecture, "env", f"--chdir={tree}", "sh", "-c", ENTER, "sh", "--", *command)
    except subprocess.CalledProcessError:
        return False
    return True


def main() -> int:
    """Run the tests for each architecture and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__)
    parser.add_argument("architecture", nargs="*", choices=[*ARCHITECTURES, []], help="default: all")
    parser.add_argument("--only", action="append", default=[], metavar="TEST", help="run only this test or file")
    arguments = parser.parse_args()
    results = {}
    for architecture in arguments.architecture or ARCHITECTURES:
        tree = build(architecture)
        install(tree)
        results[architecture] = run(architecture, tree, *arguments.only)
    for architecture, passed in results.items():
        sys.stdout.write(f"{architecture}: {'passed' if passed else 'failed'}\n")
    return not all(results.values())


if __name__ == "__main__":
    sys.exit(main())
