"""Unpack Debian 13's mosquitto and its libraries into a directory, without installing them on this system.

`python -m tests.debian13 DIRECTORY` prints the path of a program that runs this mosquitto. This script needs apt-get,
dpkg-deb and the keys of debian-archive-keyring. If `INCO_TRIO_MOSQUITTO` is set to the path, the tests run the program.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"


def unpack(directory: Path) -> Path:
    """Return the program in `directory`. Download and unpack the packages unless the program already exists."""
    program, root, state = directory / "mosquitto", directory / "root", directory / "apt"
    if program.exists():
        return program
    for path in ("state/lists/partial", "cache/archives/partial"):
        (state / path).mkdir(parents=True, exist_ok=True)
    (state / "state/status").touch()
    (state / "sources.list").write_text(SOURCE)
    options = {
        "Dir::State": state / "state", "Dir::State::status": state / "state/status", "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": state / "sources.list", "Dir::Etc::sourceparts": "-", "Dir::Etc::parts": "-",
        "Debug::NoLocking": "1", "APT::Sandbox::User": "", "APT::Architecture": "amd64",
    }  # fmt: skip
    apt = ["apt-get", *(f"-o{key}={value}" for key, value in options.items())]
    subprocess.run([*apt, "update"], check=True, stdout=sys.stderr)
    install = ["install", "--yes", "--no-install-recommends", "--download-only", "mosquitto"]
    subprocess.run([*apt, *install], check=True, stdout=sys.stderr)
    for package in sorted((state / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    command = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), f"{root}/usr/sbin/mosquitto"]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    sys.stdout.write(f"{unpack(Path(sys.argv[1]).resolve())}\n")
