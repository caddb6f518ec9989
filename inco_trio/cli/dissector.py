"""`inco-trio dissector`: print or install the dissector for Wireshark and tshark."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from inco_trio.cli.streams import say, say_text
from inco_trio.errors import STRERROR, from_os_error
from inco_trio.linux.files import open_output_directory, replace_output

NAME = "inco_trio.lua"
USUAL = Path(".local/lib/wireshark/plugins")
"""Wireshark's default directory for a user's Lua plugins, relative to the home directory."""


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "Without options, the command prints the dissector, a Lua program.\n"
        "example: inco-trio dissector --install\n"
        "exit codes: 0 success, 71 out of resources, 77 no permission"
    )
    sub.add_argument("--install", action="store_true", help="install the dissector for this user's Wireshark")


def run(args: argparse.Namespace) -> int:
    """Print or install the dissector. Raises PermissionDeniedError, ResourceError."""
    text = files("inco_trio.capture").joinpath(NAME).read_text("utf-8")
    if not args.install:
        say_text(text.rstrip("\n"))
        return 0
    path = _directory() / NAME
    try:
        before = path.read_text("utf-8", "replace") if path.is_file() else None
        if before == text:
            say(f"{path}: already installed")
            return 0
        parent = open_output_directory(path.parent, make=True)
        try:
            replace_output(NAME, text.encode(), 0o644, parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise from_os_error(error, path, f"cannot be written: {STRERROR}") from error
    say(f"{path}: installed" if before is None else f"{path}: replaced")
    return 0


def _directory() -> Path:
    """Return the directory for this user's Lua plugins: the one that tshark reports, or else Wireshark's default."""
    if (tshark := shutil.which("tshark")) is not None:
        # Read bytes, because a path need not be valid text.
        folders = subprocess.run([tshark, "-G", "folders"], capture_output=True, check=False).stdout
        for line in os.fsdecode(folders).split("\n"):
            what, _, where = line.partition(":")
            if what == "Personal Lua Plugins" and where.strip().startswith("/"):
                return Path(where.strip())
    return Path.home() / USUAL
