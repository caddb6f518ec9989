"""Options that several commands share, and checks of the option values."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from inco_trio.cli.exit_codes import UsageError
from inco_trio.cli.streams import standard_input
from inco_trio.errors import ConfigError, ProgramNotFoundError
from inco_trio.links.address import address_fault
from inco_trio.linux.files import is_path
from inco_trio.linux.users import find_owner

if TYPE_CHECKING:
    from inco_trio.config import Board

DIGITS_MAX = 12
HISTORY_MAX = 65_536
STREAM = "-"
"""The file argument that stands for standard input or standard output."""
_DURATIONS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
"""The number of seconds in each unit of a duration."""
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
"""The factor for each suffix of a number."""
LINK = "rpmsg4000"
LISTEN = "127.0.0.1:9478"
BOARDS_HELP = "directory of boards, one per file DIR/NAME.json"
CONTROL_HELP = "control socket (default: /run/inco-trio/NAME.sock)"
LINK_HELP = f"interface (default {LINK}) or unix:LOCAL,peer=REMOTE"


def number_of_seconds(text: str) -> float:
    return _number(text, "a duration above 0, such as 1.5, 10s, 5m or 2h", _DURATIONS, lowest=math.ulp(0))


def seconds(text: str) -> float:
    return _number(text, "a duration, 0 or more, such as 1.5, 10s, 5m or 2h", _DURATIONS, lowest=0)


def rate(text: str) -> float:
    return _number(text, "a number above 0, such as 50 or 2k", _MULTIPLES, lowest=math.ulp(0))


def size(text: str) -> int:
    return int(_number(text, "a number of bytes above 0, such as 500k, 10M or 1Gi", _MULTIPLES, lowest=1))


def _number(text: str, what: str, units: Mapping[str, float], *, lowest: float) -> float:
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", text)
    try:
        number = float(found[1]) * units[found[2]] if found else math.nan
    except (KeyError, ValueError):
        number = math.nan
    if not lowest <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {what}")
    return number


def history_size(text: str) -> int:
    if not text.isdecimal() or len(text) > DIGITS_MAX or int(text) > HISTORY_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to {HISTORY_MAX}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > DIGITS_MAX or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer above 0 with at most {DIGITS_MAX} digits")
    return int(text)


def check_listen(text: str) -> tuple[str, int]:
    """Parse `ADDRESS:PORT` and return both parts. Raises UsageError."""
    address, colon, port = text.rpartition(":")
    bare = address.removeprefix("[").removesuffix("]")
    if not colon or not bare or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--listen {text!r}: expected ADDRESS:PORT, such as {LISTEN} or [::1]:9478")
    return bare, int(port)


def check_link(address: str) -> None:
    """Raise UsageError if `address` is not the address of a link."""
    if fault := address_fault(address):
        raise UsageError(f"link {address!r}: {fault}")


def configuration_argument(sub: argparse.ArgumentParser, default: str = "$UDRV_JSON_PATH") -> None:
    """Add `--config`. `default` describes what the command uses without this option."""
    sub.add_argument("--config", metavar="FILE", help=f"path of udrv.json (default: {default})")


def irq_owner_argument(sub: argparse.ArgumentParser) -> None:
    help_text = "trusted owner of the directories, as USER[:GROUP]"
    sub.add_argument("--irq-owner", metavar="OWNER", type=_irq_owner, help=help_text)


def _irq_owner(text: str) -> str:
    try:
        find_owner(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def config_path(args: argparse.Namespace) -> Path:
    """Return the path of the configuration. Raises UsageError if none is given."""
    if args.config is not None:
        if args.config == STREAM:
            raise UsageError("--config -: this command can read its configuration only from a file")
        return path_of(args.config, "--config")
    if named := os.environ.get("UDRV_JSON_PATH"):
        return Path(named)
    raise UsageError("no configuration: use --config FILE or set UDRV_JSON_PATH (`run` also accepts --irq-dir DIR)")


def configured_board(args: argparse.Namespace) -> Board:
    """Read the configuration from a file, or from standard input with `--config -`. Raises UsageError, ConfigError."""
    from inco_trio.config import UDRV_SIZE_MAX, parse_board, read_board

    if args.config != STREAM:
        return read_board(config_path(args))
    text = standard_input().read(UDRV_SIZE_MAX + 1)
    if len(text) > UDRV_SIZE_MAX:
        raise ConfigError("standard input", f"cannot be read: it is larger than {UDRV_SIZE_MAX >> 20} MiB")
    return parse_board(text, "standard input")


def absolute(path: str | Path, option: str) -> Path:
    """Return the value of `option` as an absolute path. Raises UsageError if the path is invalid."""
    if path == STREAM:
        raise UsageError(f"{option} -: must be a path, not standard input or standard output")
    path = path_of(path, option)
    try:
        return path.absolute()
    except OSError as error:
        raise UsageError(f"{option} {path}: the working directory was removed (use an absolute path)") from error


def path_of(text: str | Path, option: str) -> Path:
    """Return the value of `option` as a path. Raises UsageError if the path is invalid."""
    # Refuse an empty path, because Path("") would be the working directory.
    if not str(text):
        raise UsageError(option, "the path is empty")
    if not is_path(str(text)):
        raise UsageError(f"{option} {str(text)!r}: not a valid path")
    return Path(text)


def add_service_options(sub: argparse.ArgumentParser, verbose: str = "log more") -> None:
    """Add the options that all services share. `verbose` is the help text of `-v`."""
    sub.add_argument("--notification-fd", type=int, metavar="N", help="write a newline to descriptor N once ready (s6)")
    formats = ("text", "json")
    sub.add_argument(
        "--log-format", metavar="FORMAT", choices=formats, default="text", help="log format: text (default) or json"
    )
    sub.add_argument(
        "--log-timestamps", metavar="MODE", choices=("auto", "always", "never"), default="auto",
        help="timestamps in the log: auto (default), always or never",
    )  # fmt: skip
    sub.add_argument("-v", "--verbose", action="store_true", help=verbose)


def add_place(sub: argparse.ArgumentParser) -> None:
    """Add the options that select a running proxy."""
    sub.add_argument("link", nargs="?", metavar="LINK", help="link or board directory of the proxy")
    sub.add_argument("--control", metavar="PATH", help="control socket (default: the socket of the only proxy)")


def add_color(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--color", metavar="MODE", choices=("auto", "always", "never"), default="auto",
        help="colours: auto (default: only on a terminal), always or never; see NO_COLOR and FORCE_COLOR",
    )  # fmt: skip


def add_selection(sub: argparse.ArgumentParser) -> None:
    """Add the options that select notifications: board, signal, direction and count."""
    sub.add_argument("--board", metavar="NAME", help="only this board")
    sub.add_argument("--signal", action="append", metavar="NAME", help="only this signal (repeatable)")
    sub.add_argument(
        "--direction", metavar="WAY", choices=("inbound", "outbound"), help="only this direction: inbound or outbound"
    )
    sub.add_argument("--count", type=positive, metavar="N", help="stop after N notifications")


def add_clients_option(sub: argparse.ArgumentParser) -> None:
    """Add `--control` for a service that connects to several proxies."""
    sub.add_argument(
        "--control",
        metavar="PATH",
        action="append",
        help="control socket of a proxy; repeatable (default: all proxies)",
    )


def control_paths(args: argparse.Namespace) -> list[Path] | None:
    """Return the paths given with `--control`, or None for all proxies. Raises UsageError."""
    return None if args.control is None else [absolute(path, "--control") for path in args.control]


@contextlib.contextmanager
def needing(package: str, module: str, extra: str) -> Iterator[None]:
    """Raise ProgramNotFoundError if the block cannot import the optional dependency `package`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module:
            raise
        raise ProgramNotFoundError(f"{package} is not installed: pip install 'inco-trio[{extra}]'") from error


def boards_directory(args: argparse.Namespace, *excluded: str) -> Path:
    """Return the directory given with `--boards`. Raises UsageError if an option in `excluded` is given as well."""
    for option in excluded:
        # An option that was not given has the value None or False.
        if getattr(args, option.strip("-").replace("-", "_").lower()) not in (None, False):
            other = "LINK" if option == "IFACE" else option
            text = "the file of each board names its link and registers"
            raise UsageError(f"--boards and {other} are mutually exclusive: {text}")
    return absolute(args.boards, "--boards")


def boards_label(directory: Path) -> str:
    """Return a boards directory's label, which is part of the names of its service and stored descriptors."""
    return f"boards-{blake2b(os.fsencode(directory), digest_size=4).hexdigest()}"
