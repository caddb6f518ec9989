"""`inco-trio dissector`: the dissector with which Wireshark and tshark name signals and directions."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

from inco_trio.cli.streams import say
from inco_trio.errors import STRERROR, from_os_error

__all__ = ["arguments", "run"]

NAME = "inco_trio.lua"
USUAL = Path(".local/lib/wireshark/plugins")
"""Where Wireshark looks for a user's plugins in Lua, below the home directory, if it does not say otherwise."""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of `dissector`."""
    sub.epilog = (
        "Without options it prints the dissector, a program in Lua.\n"
        "example: inco-trio dissector --install\n"
        "exit codes: 0 clean, 71 no room, 77 no permission; see inco-trio --help"
    )
    sub.add_argument("--install", action="store_true", help="put it where this user's Wireshark looks for it")


def run(args: argparse.Namespace) -> int:
    """Print or install it; raises PermissionDeniedError, ResourceError."""
    text = files("inco_trio.capture").joinpath(NAME).read_text("utf-8")
    if not args.install:
        say(text.rstrip("\n"))
        return 0
    path = _directory() / NAME
    try:
        before = path.read_text("utf-8", "replace") if path.is_file() else None
        if before == text:
            say(f"{path}: is installed already")
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise from_os_error(error, path, f"cannot be written: {STRERROR}") from error
    say(f"{path}: installed" if before is None else f"{path}: replaced")
    return 0


def _replace(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    fd, name = tempfile.mkstemp(prefix=".inco_trio", dir=path.parent)
    try:
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            file.write(text)
            os.fchmod(fd, 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _directory() -> Path:
    """The directory of this user's plugins in Lua: tshark knows it best."""
    if (tshark := shutil.which("tshark")) is not None:
        # In bytes: a path need not be text.
        said = subprocess.run([tshark, "-G", "folders"], capture_output=True, check=False).stdout
        for line in os.fsdecode(said).split("\n"):
            what, _, where = line.partition(":")
            if what == "Personal Lua Plugins" and where.strip().startswith("/"):
                return Path(where.strip())
    return Path.home() / USUAL
