"""Run the README's commands unchanged on bare Debian systems: `python -m tests.fresh [SUITE...]`, as root.

debootstrap creates each system, with only python3 and python3-venv added to the minimal Debian packages. Two commands
from the README run in the system as root and as an ordinary user. pip uses the same index as on this machine.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITES = ("bookworm", "trixie", "sid")
DEFAULT_MIRROR = "http://deb.debian.org/debian"
HOMES = {"root": "/root", "user": "/home/user"}
LEFT_OUT = (".git", ".nox", ".venv", ".*cache", ".coverage*", ".hypothesis", "__pycache__")
"""The files that git does not track, and `.git`. The session lint needs the other hidden files."""
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
"""Command prefix that runs a program in new mount and PID namespaces, which are removed when the program ends."""

# In a chroot, the kernel refuses to create a user namespace (unshare(2), EPERM), because the root directory is not the
# root of the mount namespace. So the script moves the system to that root, as switch_root(8) does.
ENTER = """
set -e
mount --bind . .
cd "$PWD"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
for directory in dev/shm run tmp; do
    mount -t tmpfs -o mode=1777 tmpfs $directory
done
while [ "$1" != -- ]; do
    mount --bind "$1" ".$1"
    shift
done
shift
mount --move . /
exec chroot "$@"
"""

UV_SETTINGS = {
    "SSL_CERT_FILE": "PIP_CERT",
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX": "PIP_EXTRA_INDEX_URL",
}
"""The environment variables of uv, each with pip's variable for the same setting."""


def readme_command(section: str) -> str:
    """Return the first command in a section of the README."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2]
    found = re.search(r"^```sh\n(.+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md: {section}: no command")
    return found[1]


def find_mirror() -> str:
    """Return the Debian mirror from INCO_TRIO_DEBIAN_MIRROR, or the first mirror that apt uses."""
    if mirror := os.environ.get("INCO_TRIO_DEBIAN_MIRROR"):
        return mirror
    # The label excludes the security archive, which debootstrap cannot use.
    wanted = ("--format", "$(SITE)", "Origin: Debian", "Label: Debian", "Created-By: Packages")
    listed = subprocess.run(["apt-get", "indextargets", *wanted], capture_output=True, text=True, check=True).stdout
    return next(iter(listed.split()), DEFAULT_MIRROR)


def pip_settings() -> dict[str, str]:
    """Return pip's configuration on this machine as environment variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return as_environment(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def as_environment(listed: str) -> dict[str, str]:
    """Convert the output of `pip config list` to environment variables for pip and uv.

    Leave out local package directories: the new system contains neither these directories nor the package files that
    their index pages link to.
    """
    settings = {}
    # A later section overrides an earlier one, as in pip.
    for section in ("global.", "install.", ":env:."):
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            words = [word for word in ast.literal_eval(value).split() if not is_directory(word)]
            if key.startswith(section) and words:
                settings[f"PIP_{key.removeprefix(section).replace('-', '_').upper()}"] = " ".join(words)
    return settings | {name: settings[of_pip] for name, of_pip in UV_SETTINGS.items() if of_pip in settings}


def is_directory(word: str) -> bool:
    """Return whether a word in pip's configuration is a local package directory."""
    return word.startswith("file:") or (word.startswith("/") and Path(word).is_dir())


def local_files(settings: dict[str, str]) -> list[Path]:
    """Return the local files that pip's settings refer to, such as certificates."""
    words = dict.fromkeys(word for value in settings.values() for word in value.split())
    return [Path(word) for word in words if word.startswith("/") and Path(word).is_file()]


class System:
    """A bare Debian system in a directory, with a copy of the project for each user."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        self._directory = directory
        self._settings = settings
        # Without these two files, the system cannot resolve host names.
        self._shared = [Path("/etc/resolv.conf"), Path("/etc/hosts"), *local_files(settings)]

    def build(self, suite: str, mirror: str) -> None:
        """Install Debian and copy the project."""
        self._directory.mkdir()
        self._directory.chmod(0o755)
        include = "--include=python3,python3-venv"
        subprocess.run(
            [*ISOLATED, "debootstrap", "--variant=minbase", include, suite, str(self._directory), mirror], check=True
        )
        for path in self._shared:
            target = self._directory / str(path)[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        self.run("root", "/", "useradd --create-home user")
        for user, home in HOMES.items():
            copy = self._directory / home[1:] / "inco-trio"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
            self.run("root", home, f"chown -R {user}: inco-trio")

    def run(self, user: str, directory: str, command: str, **environment: str) -> str:
        """Run a shell command as `user` in a directory of the system; print and return its output.

        Raises CalledProcessError if the command fails.
        """
        shared = [str(path) for path in self._shared]
        inside = [f"--userspec={user}", ".", "env", f"--chdir={directory}", "sh", "-c", command]
        process = subprocess.Popen(
            [*ISOLATED, "sh", "-c", ENTER, "sh", *shared, "--", *inside],
            cwd=self._directory,
            env={"HOME": HOMES[user], "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._settings, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(line)
                lines.append(line)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return "".join(lines)


def session(suite: str, user: str) -> str:
    """Return the nox session that NOXSESSION selects for the README's test command.

    All sessions would take hours and need many packages. The unit tests run on sid because sid has the newest Python.
    """
    return "unit" if (suite, user) == ("sid", "root") else "lint"


def check(suite: str, mirror: str, settings: dict[str, str]) -> None:
    """Create a bare system of this Debian release, and run the README's two commands in it as each user."""
    # Do not use /tmp: it might be mounted nodev, and debootstrap creates device nodes.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=f"inco-trio-{suite}-") as directory:
        # Use a subdirectory, because only root can enter the temporary directory itself.
        system = System(Path(directory) / suite, settings)
        system.build(suite, mirror)
        for user, home in HOMES.items():
            sys.stdout.write(f"{suite}, as {user}\n")
            output = system.run(user, f"{home}/inco-trio", readme_command("Try it"))
            # Without permission to create namespaces, the demonstration falls back to a Unix socket.
            if "Two cores (network namespaces)" not in output:
                raise SystemExit(f"{suite}, as {user}: the demonstration did not use network namespaces")
            system.run(user, f"{home}/inco-trio", readme_command("Tests"), NOXSESSION=session(suite, user))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fresh", description=__doc__)
    about = f"name of a Debian suite (default: {' '.join(SUITES)})"
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=SUITES, help=about)
    suites = parser.parse_args().suites
    if os.geteuid() != 0:
        parser.error("must run as root: debootstrap creates device nodes and files of several users")
    if not shutil.which("debootstrap"):
        parser.error("debootstrap: not found (install the package debootstrap)")
    mirror, settings = find_mirror(), pip_settings()
    for suite in suites:
        check(suite, mirror, settings)


if __name__ == "__main__":
    main()
