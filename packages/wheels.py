"""The wheels of the project and of its dependencies, in the versions that requirements.txt lists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

__all__ = [
    "MACHINES",
    "ROOT",
    "WITHOUT_WHEEL",
    "build_project",
    "download",
    "name_of",
    "pip",
    "platforms",
    "requirements",
]

ROOT = Path(__file__).parents[1]
LOCK = Path(__file__).with_name("requirements.txt")

MACHINES = ("x86_64", "aarch64", "armv7l")
WITHOUT_WHEEL = {"armv7l": frozenset({"greenlet"})}
"""The dependencies that have no wheel for a machine, keyed by machine. Only trio-asyncio needs greenlet."""
_GLIBC = ("manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_28")


def requirements(*, hashes: bool = False, markers: bool = True) -> list[str]:
    """Return the requirements of the lock file, one for each dependency."""
    text = LOCK.read_text().replace("\\\n", "")
    lines = [" ".join(line.split()) for line in text.splitlines() if not line.startswith("#")]
    if not hashes:
        lines = [re.sub(r" --hash=\S+", "", line) for line in lines]
    return lines if markers else [re.sub(r" ; [^-]*(?= --hash|$)", "", line) for line in lines]


def name_of(requirement: str) -> str:
    """Return the normalized name of a requirement or wheel."""
    return re.split(r"==|-[0-9]", requirement)[0].replace("_", "-").lower()


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--quiet", *arguments], check=True)


def build_project(into: Path, source: Path = ROOT) -> Path:
    """Build the project's wheel and return its path."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "build", "--installer", "uv", "--wheel", "--outdir", directory, str(source)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(directory).iterdir()
        return Path(shutil.move(wheel, into / wheel.name))


def platforms(machine: str) -> list[str]:
    """Return pip's options that select the wheels for a machine."""
    return [f"--platform={glibc}_{machine}" for glibc in _GLIBC]


def download(
    into: Path, *, machine: str, python: str, only: Collection[str] = (), without: Collection[str] = ()
) -> None:
    """Download the dependencies' wheels for a machine and a Python version. Build missing wheels.

    `only` and `without` contain the names of dependencies. If `only` is empty, download all dependencies that are not
    in `without`.
    """
    left_out = {*without, *WITHOUT_WHEEL.get(machine, ())}
    # pip evaluates markers for the Python that runs it, so download the dependencies of all versions.
    lines = [
        line
        for line in requirements(hashes=True, markers=False)
        if name_of(line) not in left_out and (not only or name_of(line) in only)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        target = (*platforms(machine), f"--python-version={python}", "--no-deps", f"--dest={into}")
        pip("download", *target, "--require-hashes", f"--requirement={file.name}")
    for sdist in into.glob("*.tar.gz"):
        pip("wheel", "--no-deps", f"--wheel-dir={into}", str(sdist))
        sdist.unlink()
