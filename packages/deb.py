"""Build the Debian package for each suite and check it: `python -m packages.deb [SUITE...]`, as root.

For each suite, mmdebstrap creates two systems, and systemd-nspawn runs commands in them without a network. The first
system has the suite's build tools and lintian. The second system boots with systemd, and `packages/installed.py`
installs, upgrades and purges the package in it. The packages are written to dist/SUITE.
"""

from __future__ import annotations

import argparse
import email.utils
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packages import wheels
from tests.fresh import find_mirror

SUITES = ("bookworm", "trixie")
PROGRAMS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container"}
FOR_BUILD = ("debhelper", "dh-python", "lintian", "python3", "python3-greenlet")
FOR_CHECK = ("python3", "python3-greenlet", "s6", "systemd")

OF_DEBIAN = frozenset({"greenlet"})
"""Compiled dependencies, for which the package depends on Debian's own packages."""
OPTIONAL = frozenset({"mqtt5", "rich", "markdown-it-py", "mdurl", "pygments", "pip"})
"""Dependencies of extras and of the offline bundle. The package does not contain them."""

# systemd needs cgroup v2, but the host might have mounted version 1.
RUN = """
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec systemd-nspawn --quiet --register=no --keep-unit --private-network "$@"
"""

CHECK = """
[Unit]
Description=check of the package
SuccessAction=exit
FailureAction=exit

[Service]
Type=oneshot
Environment=PYTHONPATH=/opt/check/site:/opt/check
ExecStart=/usr/bin/python3 -u -m packages.installed
StandardOutput=append:/opt/check/log
StandardError=append:/opt/check/log
"""


class System:
    """A Debian system in a directory."""

    def __init__(self, directory: Path, suite: str, mirror: str, include: Iterable[str], variant: str) -> None:
        self.directory = directory
        command = ["mmdebstrap", "--quiet", f"--variant={variant}", f"--include={','.join(include)}"]
        subprocess.run([*command, suite, str(directory), mirror], check=True)

    def run(self, *command: str) -> None:
        """Run systemd-nspawn(1) on the system with the arguments `command`. Raises CalledProcessError on failure."""
        prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", RUN, "sh")
        subprocess.run([*prefix, f"--directory={self.directory}", *command], check=True, stdin=subprocess.DEVNULL)


def write_source(directory: Path, vendored: Path) -> str:
    """Write the source package's tree and its original tarball; return the version of the package."""
    tree = directory / "inco-trio"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(wheels.ROOT, tree, ignore=ignored)
    shutil.copytree(vendored, tree / "vendor")
    (wheel,) = vendored.glob("inco_trio-*.whl")
    # In Debian versions, ~ sorts before the end of the string, so 1.0~dev1 is older than 1.0.
    version = wheel.name.split("-")[1].replace(".dev", "~dev")
    with tarfile.open(directory / f"inco-trio_{version}.orig.tar.gz", "w:gz") as orig:
        orig.add(tree, "inco-trio")
    shutil.copytree(wheels.ROOT / "packages/debian", tree / "debian")
    revision = f"{version}-1"
    if not (tree / "debian/changelog").read_text().startswith(f"inco-trio ({revision})"):
        add_change(tree, revision, "Build of a version without a release.")
    return revision


def add_change(tree: Path, version: str, change: str) -> None:
    """Make `version` the current version of the source package in `tree`."""
    changelog = tree / "debian/changelog"
    old = changelog.read_text()
    author = re.findall(r"^ -- (.+?)  ", old, re.MULTILINE)[0]
    entry = f"inco-trio ({version}) unstable; urgency=medium\n\n  * {change}\n\n"
    changelog.write_text(f"{entry} -- {author}  {email.utils.formatdate()}\n\n{old}")


def build(suite: str, mirror: str, vendored: Path, work: Path) -> list[Path]:
    """Build two versions of the package, and run lintian. Return both packages, the older one first."""
    system = System(work / "build", suite, mirror, FOR_BUILD, "buildd")
    source = system.directory / "build"
    source.mkdir()
    version = write_source(source, vendored)
    in_tree = ("--chdir=/build/inco-trio", "dpkg-buildpackage", "--unsigned-source", "--unsigned-changes")
    system.run(*in_tree)
    (changes,) = source.glob("*.changes")
    strict = ("--fail-on", "error,warning", "--tag-display-limit", "0", "--color", "never")
    system.run("--chdir=/build", "lintian", "--allow-root", *strict, changes.name)
    add_change(source / "inco-trio", f"{version}+check1", "Build of a higher version for the check of upgrades.")
    system.run(*in_tree, "--build=binary")
    return sorted(source.glob("*.deb"), key=lambda path: path.stat().st_mtime)


def check(suite: str, mirror: str, debs: list[Path], vendored: Path, work: Path) -> None:
    """Boot a system and run `packages/installed.py` in it. Raises CalledProcessError if the check fails."""
    system = System(work / "check", suite, mirror, FOR_CHECK, "minbase")
    files = system.directory / "opt/check"
    files.mkdir()
    for deb in debs:
        shutil.copy(deb, files)
    for name in ("packages", "tests", "netns"):
        shutil.copytree(wheels.ROOT / name, files / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The programs that send and count notifications need their own copy of the modules, because dpkg replaces the
    # package's files.
    for wheel in vendored.iterdir():
        shutil.unpack_archive(wheel, files / "site", "zip")
    units = system.directory / "etc/systemd/system"
    (units / "check.service").write_text(CHECK)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/check.service").symlink_to("../check.service")
    try:
        system.run("--boot", "--console=pipe", "quiet", "systemd.show_status=no")
    finally:
        log = files / "log"
        sys.stdout.write(log.read_text() if log.exists() else "the system has not started the check\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="packages.deb", description=__doc__)
    about = f"name of a Debian suite (default: {' '.join(SUITES)})"
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=SUITES, help=about)
    suites = parser.parse_args().suites
    if os.geteuid() != 0:
        parser.error("must run as root: systemd-nspawn boots a system")
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            parser.error(f"{program}: not found (install the package {package})")
    mirror = find_mirror()
    # Do not use /tmp: it might be mounted nodev, and mmdebstrap creates device nodes.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="inco-trio-deb-") as directory:
        work = Path(directory)
        vendored = work / "vendor"
        vendored.mkdir()
        # The same wheels work with every Python version and on every machine: none of them contains compiled code.
        wheels.download(vendored, machine="x86_64", python="3.11", without=OF_DEBIAN | OPTIONAL)
        wheels.build_project(vendored)
        compiled = [wheel.name for wheel in vendored.iterdir() if not wheel.name.endswith("-none-any.whl")]
        if compiled:
            raise SystemExit(f"{', '.join(compiled)}: compiled (add the Debian package to Depends, or to OPTIONAL)")
        for suite in suites:
            print(f"{suite}: building", flush=True)
            (work / suite).mkdir()
            debs = build(suite, mirror, vendored, work / suite)
            print(f"{suite}: checking {debs[0].name}", flush=True)
            check(suite, mirror, debs, vendored, work / suite)
            target = wheels.ROOT / "dist" / suite
            target.mkdir(parents=True, exist_ok=True)
            print(f"{suite}: {shutil.copy(debs[0], target)}")


if __name__ == "__main__":
    main()
