"""What several commands take: the interface, and the configuration by `--config FILE` or $UDRV_JSON_PATH."""

from __future__ import annotations

import argparse
import math
import os
import re
from hashlib import blake2b
from pathlib import Path

from inco_trio.cli.exit_codes import UsageError
from inco_trio.links.address import address_fault
from inco_trio.linux.files import is_path

__all__ = [
    "BOARDS_HELP",
    "CONTROL_HELP",
    "LINK",
    "LINK_HELP",
    "LISTEN",
    "absolute",
    "add_service_options",
    "check_link",
    "check_listen",
    "config_path",
    "configuration_argument",
    "number_of_seconds",
    "path_of",
    "positive",
]

DIGITS_MAX = 12
LINK = "rpmsg4000"
"""The interface that is used unless another link is named."""
LISTEN = "127.0.0.1:9478"
"""Where the exporter listens."""
BOARDS_HELP = "boards, one for each file DIR/NAME.json"
CONTROL_HELP = "control socket (default: /run/inco-trio/NAME.sock)"
LINK_HELP = f"interface (default: {LINK}), or unix:LOCAL,peer=REMOTE"


def number_of_seconds(text: str) -> float:
    """More than 0 seconds, as an option gives them. Raises ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def positive(text: str) -> int:
    """A whole number above 0, as an option gives it. Raises ArgumentTypeError."""
    if not text.isdecimal() or len(text) > DIGITS_MAX or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, of {DIGITS_MAX} digits at most")
    return int(text)


def check_listen(text: str) -> tuple[str, int]:
    """Address and port of `ADDRESS:PORT`. Raises UsageError."""
    address, colon, port = text.rpartition(":")
    bare = address.removeprefix("[").removesuffix("]")
    if not colon or not bare or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--listen {text!r}: it is ADDRESS:PORT, as {LISTEN} or [::1]:9478")
    return bare, int(port)


def check_link(address: str) -> None:
    """Raise UsageError if `address` cannot be a link's."""
    if fault := address_fault(address):
        raise UsageError(f"link {address!r}: {fault}")


def configuration_argument(sub: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    sub.add_argument("--config", metavar="FILE", help="udrv.json (default: $UDRV_JSON_PATH)")


def config_path(args: argparse.Namespace) -> Path:
    """The configuration that was named. Raises UsageError if none was."""
    if args.config is not None:
        return path_of(args.config, "--config")
    if named := os.environ.get("UDRV_JSON_PATH"):
        return Path(named)
    raise UsageError("no configuration: give --config FILE, or set UDRV_JSON_PATH (`run` also takes --irq-dir DIR)")


def absolute(path: str | Path, option: str) -> Path:
    """The path that `option` names, in full. Raises UsageError if it has no meaning."""
    path = path_of(path, option)
    try:
        return path.absolute()
    except OSError as error:
        raise UsageError(f"{option} {path}: the working directory is gone: give an absolute path") from error


def path_of(text: str | Path, option: str) -> Path:
    """The path that `option` names. Raises UsageError if it is none."""
    # Path("") is the working directory.
    if not str(text):
        raise UsageError(option, "the path is empty")
    if not is_path(str(text)):
        raise UsageError(f"{option} {str(text)!r}: it cannot be a path")
    return Path(text)


def add_service_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of every service."""
    sub.add_argument("--notification-fd", type=int, metavar="N", help="write a newline to descriptor N once ready (s6)")
    formats = ("text", "json")
    sub.add_argument("--log-format", metavar="FORMAT", choices=formats, default="text", help="text (default) or json")
    sub.add_argument("-v", "--verbose", action="store_true", help="log more")


def boards_directory(args: argparse.Namespace, *excluded: str) -> Path:
    """The directory of `--boards`. Raises UsageError, also for an option of `excluded` that is given beside it."""
    for option in excluded:
        # None and False are what is not given.
        if getattr(args, option.strip("-").replace("-", "_").lower()) not in (None, False):
            raise UsageError(f"--boards and {option} exclude each other: a board's file names its link and registers")
    return absolute(args.boards, "--boards")


def boards_label(directory: Path) -> str:
    """What services and kept descriptors of a directory of boards are named after."""
    return f"boards-{blake2b(os.fsencode(directory), digest_size=4).hexdigest()}"
