"""Build and check the offline bundle: `python -m packages.bundle`.

The bundle is a tar.gz file in dist/. It contains wheels of the project and of all its dependencies, and the script
`install`, which does not need a package index. The check installs the bundle without a network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from packages.wheels import (
    MACHINES,
    ROOT,
    WITHOUT_WHEEL,
    build_project,
    download,
    name_of,
    pip,
    platforms,
    requirements,
)

PYTHONS = ("3.11", "3.12", "3.13")
NOT_EVERYWHERE = frozenset[str]().union(*WITHOUT_WHEEL.values())
OFFLINE = ("unshare", "--map-root-user", "--net")
"""Command prefix that runs a program without a network."""


def build(directory: Path) -> Path:
    """Create the bundle's directory and return its path."""
    found = directory / "wheels"
    found.mkdir()
    project = build_project(found)
    download(found, machine=MACHINES[0], python=PYTHONS[0])
    compiled = {name_of(path.name) for path in found.iterdir() if not path.name.endswith("-none-any.whl")}
    for machine in MACHINES:
        for python in PYTHONS:
            download(found, machine=machine, python=python, only=compiled)
    bundle = directory / f"{project.name.partition('-py3')[0].replace('_', '-')}-bundle"
    bundle.mkdir()
    found.rename(bundle / "wheels")
    wanted = [line for line in requirements() if name_of(line) not in {*NOT_EVERYWHERE, "pip"}]
    version = project.name.split("-")[1]
    (bundle / "requirements.txt").write_text("".join(f"{line}\n" for line in [*wanted, f"inco-trio=={version}"]))
    for file in (ROOT / "packages/install", ROOT / "LICENSE"):
        shutil.copy(file, bundle)
    return bundle


def check(archive: Path, work: Path) -> None:
    """Install the bundle without a network and run the demonstration. Raises CalledProcessError on failure."""
    subprocess.run(["tar", "-xf", str(archive), "-C", str(work)], check=True)
    (bundle,) = work.iterdir()
    for machine in MACHINES:
        for python in PYTHONS:
            complete = ("--no-index", "--no-deps", "--only-binary=:all:", f"--find-links={bundle / 'wheels'}")
            target = (*platforms(machine), f"--python-version={python}", f"--dest={work / 'found'}")
            pip("download", *complete, *target, f"--requirement={bundle / 'requirements.txt'}")
    environment = work / "environment"
    subprocess.run([*OFFLINE, str(bundle / "install"), str(environment)], check=True)
    demonstration = [*OFFLINE, str(environment / "bin/inco-trio"), "demo", "--count", "20"]
    subprocess.run(demonstration, check=True)
    # On a machine without these dependencies, everything except inco_trio.aio must work.
    for name in NOT_EVERYWHERE:
        pip("--python", str(environment), "uninstall", "--yes", name)
    subprocess.run(demonstration, check=True)


def main() -> None:
    argparse.ArgumentParser(prog="packages.bundle", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        bundle = build(work)
        archive = ROOT / "dist" / f"{bundle.name}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(bundle, bundle.name)
        (work / "check").mkdir()
        check(archive, work / "check")
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB, {len(MACHINES)} machines, Python {', '.join(PYTHONS)}")


if __name__ == "__main__":
    main()
