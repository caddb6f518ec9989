"""Board files: each `NAME.json` in a directory configures one board. Two examples:

{"link": "unix:/run/b1/core0,peer=/run/b1/core1", "config": "/etc/b1/udrv.json"}
{"link": "rpmsg4000", "irq_dir": "/run/b2/irq", "netns": "b2"}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated

import attrs

from inco_trio.config import Board, Config, read_board
from inco_trio.errors import ConfigError, IncoError, ResourceError
from inco_trio.links.address import UnixAddress, address_fault
from inco_trio.linux.files import Resolver, is_path
from inco_trio.linux.users import find_owner
from inco_trio.signals import builtin_signals
from inco_trio.validation import ABSOLUTE_PATH, InvalidValueError, Rule, parse_table, read_file

__all__ = ["NETNS", "BoardFile", "Boards", "claims", "read_boards", "refuse_shared"]

NETNS = Path("/run/netns")
SUFFIX = ".json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _link(text: str) -> str:
    if fault := address_fault(text):
        raise InvalidValueError(f"{text!r}: {fault}")
    return text


LINK_RULE = Rule((str,), "an interface name or unix:LOCAL,peer=REMOTE", convert=_link)
NETNS_RULE = Rule(
    (str,),
    f"a name under {NETNS} or an absolute path",
    lambda text: text not in {"", ".", ".."} and is_path(text) and ("/" not in text or text[0] == "/"),
)


def _owner(text: str) -> str:
    try:
        find_owner(text)
    except ValueError as error:
        raise InvalidValueError(str(error)) from None
    return text


OWNER_RULE = Rule((str,), "USER, USER:GROUP or :GROUP", convert=_owner)


@attrs.frozen
class BoardFile:
    """The keys of a board file. Exactly one of `config` and `irq_dir` is required."""

    link: Annotated[str, LINK_RULE]
    """The address of the link: an interface, or `unix:LOCAL,peer=REMOTE`."""
    config: Annotated[str | None, ABSOLUTE_PATH] = None
    """The absolute path of a udrv.json."""
    irq_dir: Annotated[str | None, ABSOLUTE_PATH] = None
    """The absolute path of the directory for the registers of the built-in signals."""
    netns: Annotated[str | None, NETNS_RULE] = None
    """The network namespace of the interface: a name under /run/netns, or an absolute path."""
    irq_owner: Annotated[str | None, OWNER_RULE] = None
    """`USER[:GROUP]`: the user who may own the IRQ directory besides root, and the group that may write to it."""


@attrs.frozen
class Boards:
    """The content of a directory of board files."""

    configs: Mapping[str, Config]
    refused: Mapping[str, IncoError]
    """The errors of invalid files, keyed by board name. The subject of each error is the path of the file."""
    notes: Mapping[str, tuple[str, ...]]
    """The notes of each board; see `config.Board.notes`."""


def read_boards(directory: Path, running: Mapping[str, Config] | None = None) -> Boards:
    """Read the board files in `directory`. `refuse_shared` explains `running`.

    Raises ConfigError or ResourceError.
    """
    try:
        files = sorted(file for file in directory.iterdir() if file.name.endswith(SUFFIX) and file.name[0] != ".")
    except OSError as error:
        raise ConfigError(directory, f"cannot read the board directory: {error.strerror}") from error
    configs: dict[str, Config] = {}
    refused: dict[str, IncoError] = {}
    notes: dict[str, tuple[str, ...]] = {}
    for file in files:
        name = file.name.removesuffix(SUFFIX)
        try:
            configs[name], notes[name] = _read(file, name)
        except IncoError as error:
            refused[name] = error
    kept = {name: config for name, config in (running or {}).items() if name in configs or name in refused}
    for name, why in refuse_shared(configs, kept).items():
        refused[name] = ConfigError(f"{directory / name}{SUFFIX}", why)
        del configs[name]
    return Boards(configs, refused, notes)


def _read(path: Path, name: str) -> tuple[Config, tuple[str, ...]]:
    """Read a board file, and return the configuration and the notes of the board. Raises IncoError."""
    if not NAME.fullmatch(name):
        rule = "1 to 64 letters, digits, '.', '_' and '-'; the first must be a letter or digit"
        raise ConfigError(path, f"a board's name must consist of {rule}")
    table = parse_table(read_file(path), str(path))
    file = table.structure(BoardFile)
    if ("config" in table.values) == ("irq_dir" in table.values):
        table.problems.append("expected either config, the path of a udrv.json, or irq_dir, a directory")
    if file and file.netns is not None and file.link.startswith("unix:"):
        table.fault("netns", "not allowed for a unix: link (remove this key)")
    table.finish(str(path))
    assert file is not None  # noqa: S101 - `finish` raises if there are mistakes
    netns = None if file.netns is None else NETNS / file.netns
    board = Board(builtin_signals(Path(file.irq_dir or "")), ()) if file.config is None else read_board(file.config)
    # With `wait_link`, a board whose link is missing does not prevent the other boards from starting.
    try:
        owner, group = (None, None) if file.irq_owner is None else find_owner(file.irq_owner)
    except ValueError as error:  # The user was removed, or the directory service failed, after the check in `_owner`.
        raise ConfigError(path, f"irq_owner: {error}") from None
    return Config(file.link, board.signals, wait_link=True, netns=netns, owner=owner, group=group), board.notes


def claims(configs: Iterable[Config]) -> list[dict[object, str]]:
    """Return the link and the directories of each board, which no other board may use, each with a description.

    Do not follow symlinks of applications: with such a symlink, one board could claim the directory of another board.
    Raises ResourceError if no descriptors or memory are left.
    """
    try:
        with closing(Resolver(wary=True)) as resolver:
            return [_claims(config, resolver) for config in configs]
    except OSError as error:
        raise ResourceError("boards", f"cannot compare their paths: {error.strerror}") from error


def _claims(config: Config, resolver: Resolver) -> dict[object, str]:
    address = config.address
    if isinstance(address, UnixAddress):
        claimed: dict[object, str] = {resolver.resolve(address.local): f"the link {address.local}"}
    else:
        claimed = {(address.name, config.netns): f"the link {address.name}"}
    for directory in {signal.directory for signal in config.signals}:
        claimed[resolver.resolve(directory)] = f"the directory {directory}"
    return claimed


def refuse_shared(configs: Mapping[str, Config], running: Mapping[str, Config] | None = None) -> dict[str, str]:
    """Return the boards whose link or directory is already in use by another board, each with the reason to refuse it.

    `running` contains the current configurations, which have priority. A refused board keeps its current configuration.
    Raises ResourceError.
    """
    running = running or {}
    now, wanted = (dict(zip(each, claims(each.values()), strict=True)) for each in (running, configs))
    refused: dict[str, str] = {}
    while True:
        taken: dict[object, str] = {}
        for name in running:
            if name not in configs or name in refused:
                taken |= dict.fromkeys(now[name], name)
        more: dict[str, str] = {}
        # Unchanged boards come first, then changed boards, then new ones.
        order = {name: (name not in running, running.get(name) != configs[name], name) for name in configs}
        for name in sorted(configs.keys() - refused.keys(), key=order.__getitem__):
            claimed = wanted[name]
            shared = next((what for what in claimed if what in taken), None)
            if shared is not None:
                more[name] = f"{claimed[shared]} is already used by the board {taken[shared]}"
            else:
                taken |= dict.fromkeys(claimed, name)
        refused |= more
        if more.keys().isdisjoint(running):
            return refused
