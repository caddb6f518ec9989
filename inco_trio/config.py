"""Configuration: what one proxy is told (`Config`), and a board's udrv.json (`Board`).

A board's file describes every device of the board. Two places of it matter here, and one optional table; the rest is
ignored, whatever is in it:

    file.<device>.path                      the directory of a file device; ihub-irq-dev must be there
    misc.ihub_config_dev.regs.<reg>.reg     "<device>.<register>" of a built-in signal
    misc.inco_proxy.signals.<wire name>     {"direction": "inbound" | "outbound", "reg": "<device>.<register>"}
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs

from inco_trio.errors import ConfigError, ResourceError
from inco_trio.links.address import InterfaceAddress, UnixAddress, parse_address
from inco_trio.signals import BUILTIN, FILE_NAME_MAX, Direction, Signal, clashes, is_path, name_fault, register_fault

if TYPE_CHECKING:
    import cattrs

__all__ = ["Board", "Config", "kind_of", "load_document", "parse_board", "read_board", "read_file", "repeated_keys"]

SIZE_MAX = 16 * 1024 * 1024
"""The largest udrv.json that is read, in bytes: many times a board's."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
IRQ_DEVICE = "ihub-irq-dev"
FILE = "file"
REGS = "misc.ihub_config_dev.regs"
OURS = "misc.inco_proxy"
SIGNALS = f"{OURS}.signals"

_T = TypeVar("_T")


@attrs.frozen
class Config:
    """What one proxy is told. Raises `ConfigError` for a link, signals or a deadline that cannot be."""

    link: str
    """The address of the link: an interface's name, or "unix:LOCAL,peer=REMOTE", see `links.address`."""
    signals: tuple[Signal, ...]
    """What is carried."""
    wait_link: bool = False
    """Wait for a missing link instead of failing at start."""
    stop_deadline: float = 5.0
    """Seconds that a clean stop may take to finish what was accepted."""
    netns: Path | None = None
    """The network namespace (a file as in /run/netns) in which an interface is looked for; None is our own."""

    address: InterfaceAddress | UnixAddress = attrs.field(init=False, eq=False, repr=False)
    """`link`, taken apart."""

    def __attrs_post_init__(self) -> None:
        problems = [f"signal {signal.name}: {why}" for signal, why in clashes(self.signals)]
        try:
            object.__setattr__(self, "address", parse_address(self.link))
        except ValueError as error:
            problems.append(f"link {self.link!r}: {error}")
        if not self.stop_deadline >= 0:  # `< 0` would let NaN pass
            problems.append(f"stop_deadline: {self.stop_deadline!r} is not a number of seconds, 0 or more")
        if problems:
            raise ConfigError(problems)

    def same_link(self, other: Config) -> bool:
        """Whether both have the same link."""
        return (self.address, self.netns) == (other.address, other.netns)


@attrs.frozen
class Board:
    """What a board's udrv.json says."""

    signals: tuple[Signal, ...]
    """The built-in signals first, then those of the signals table in its order."""
    notes: tuple[str, ...]
    """One line for each default that was taken."""


def read_board(path: Path | str) -> Board:
    """The board that the udrv.json at `path` describes.

    Raises `ConfigError` with every mistake, each line beginning with `path`, and as `read_file`.
    """
    return parse_board(read_file(path), str(path))


def read_file(path: Path | str) -> bytes:
    """The bytes of the udrv.json at `path`, without ever waiting for somebody to write them.

    Raises `ConfigError` for what is no regular file, too large or cannot be read, `ResourceError` where the system
    has no room now.
    """
    try:
        # Looked at before it is opened, as that can set a device off, and again after, as it may have been replaced.
        _refuse_unless_regular(path, os.stat(path))  # noqa: PTH116 - `path` may be text
        with open(path, "rb", opener=_open_at_once) as file:
            _refuse_unless_regular(path, os.fstat(file.fileno()))
            # Not by its size: files of /proc have none. None instead of bytes is one of those that would wait.
            content = file.read(SIZE_MAX + 1) or b""
    except OSError as e:
        line = f"{path}: cannot be read: {e.strerror}"
        raise (ResourceError(line) if e.errno in EXHAUSTED else ConfigError([line])) from e
    except ValueError as e:
        raise ConfigError([f"{path}: cannot be read: no file name has a NUL byte or half a character"]) from e
    if len(content) > SIZE_MAX:
        raise ConfigError([f"{path}: cannot be read: it is larger than {SIZE_MAX >> 20} MiB"])
    return content


_KINDS_OF_FILE = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def _refuse_unless_regular(path: Path | str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind := _KINDS_OF_FILE.get(stat.S_IFMT(status.st_mode)):
        raise ConfigError([f"{path}: cannot be read: it is {kind}, not a regular file"])


def _open_at_once(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO would wait for somebody to write to it.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def parse_board(text: bytes, source: str) -> Board:
    """The board that `text`, the bytes of a udrv.json, describes.

    Raises `ConfigError` with every mistake, each line beginning with `source`.
    """
    document = load_document(text, source)
    problems: list[str] = []
    notes: list[str] = []
    found = list(_find(document, problems, notes))
    directories = _directories(document, found, problems)
    places = {
        Signal(f.name, f.direction, directories[f.address.device], f.address.register): f.where
        for f in found
        if f.address.device in directories
    }
    problems += [f"{places[signal]}.reg: {why}" for signal, why in clashes(places)]
    if problems:
        # A mistake high up is met on several ways down.
        raise ConfigError(f"{source}: {problem}" for problem in dict.fromkeys(problems))
    return Board(tuple(places), tuple(notes))


@attrs.frozen
class _Address:
    """A register as the file writes it: "<device>.<register>"."""

    device: str
    register: str


@attrs.frozen
class _Device:
    """An entry of `file`."""

    path: Path
    """The directory, absolute, and by one path only. It is made with its parents if it is missing."""


@attrs.frozen
class _Reg:
    """An entry of `misc.ihub_config_dev.regs`."""

    reg: _Address
    """`"<device>.<register>"`: the register is a file name in the device's directory, all after the first dot."""


@attrs.frozen
class _Entry:
    """An entry of `misc.inco_proxy.signals`, under its wire name. Other keys are refused."""

    direction: Direction
    """`"inbound"`, from core 1 to core 0, or `"outbound"`."""
    reg: _Address
    """`"<device>.<register>"`, as above."""


@attrs.frozen
class _Found:
    """A signal whose device is still to be looked up; `where` is the key path of its entry."""

    name: str
    direction: Direction
    address: _Address
    where: str


def _find(document: dict[str, object], problems: list[str], notes: list[str]) -> Iterator[_Found]:
    regs = _table(document, REGS, problems) or {}
    ours = _table(document, OURS, problems) or {}
    signals = _table(document, SIGNALS, problems) or {}
    # In a table of our own, a key that we do not know is a typing error.
    problems += [f"{OURS}: unknown key {key!r}: 'signals' is the one it has" for key in ours if key != "signals"]
    problems += [*repeated_keys(ours, OURS), *repeated_keys(signals, SIGNALS)]
    builtins = {b.name: b for b in BUILTIN}
    for name in dict.fromkeys([*builtins, *signals]):
        if name in signals:
            yield from _find_own(name, signals[name], problems)
            continue
        builtin = builtins[name]
        where = f"{REGS}.{builtin.reg}"
        if builtin.reg not in regs:
            notes.append(f"{where} is missing: using {IRQ_DEVICE}.{builtin.register}")
            yield _Found(name, builtin.direction, _Address(IRQ_DEVICE, builtin.register), where)
            continue
        problems += [*repeated_keys(regs, REGS, [builtin.reg]), *repeated_keys(regs[builtin.reg], where, ["reg"])]
        if reg := _structure(regs[builtin.reg], _Reg, where, problems):
            yield _Found(name, builtin.direction, reg.reg, where)


def _find_own(name: str, value: object, problems: list[str]) -> Iterator[_Found]:
    fault = name_fault(name)
    where = f"{SIGNALS}.{_shown(name)}"
    if fault:
        problems.append(f"{where}: {fault}")
    problems += repeated_keys(value, where)
    entry = _structure(value, _Entry, where, problems)
    if entry and not fault:
        yield _Found(name, entry.direction, entry.reg, where)


def _directories(document: dict[str, object], found: list[_Found], problems: list[str]) -> dict[str, Path]:
    """The directory of each device that is wanted and valid."""
    files = _table(document, FILE, problems)
    if files is None:
        return {}
    # Without it the file is not a board's, even if no signal names it.
    wanted = {IRQ_DEVICE: f"{FILE}.{IRQ_DEVICE}: is missing: its path is the directory of the IRQ files"}
    for f in found:
        device = f.address.device
        wanted.setdefault(device, f"{f.where}.reg: {device!r} is not a device of {FILE}")
    directories = {}
    for device, missing in wanted.items():
        if device not in files:
            problems.append(missing)
            continue
        where = f"{FILE}.{_shown(device)}"
        problems += [*repeated_keys(files, FILE, [device]), *repeated_keys(files[device], where, ["path"])]
        if entry := _structure(files[device], _Device, where, problems):
            directories[device] = entry.path
    return directories


def _table(document: dict[str, object], path: str, problems: list[str]) -> dict[str, object] | None:
    """The table at `path`, empty if it is missing, None if something on the way is not a table."""
    table = document
    where = ""
    for key in path.split("."):
        problems += repeated_keys(table, where, [key])
        where = f"{where}.{key}".removeprefix(".")
        value = table.get(key, {})
        if not isinstance(value, dict):
            problems.append(f"{where}: {kind_of(value)} is not a table")
            return None
        table = value
    return table


def _structure(value: object, cls: type[_T], where: str, problems: list[str]) -> _T | None:
    """The `cls` that the JSON table `value` holds, or None after its mistakes were added to `problems`."""
    import cattrs

    if not isinstance(value, dict):
        problems.append(f"{where}: {kind_of(value)} is not a table")
        return None
    try:
        return _converter().structure(value, cls)
    except cattrs.BaseValidationError as e:
        for line in cattrs.transform_error(e, where, _describe):
            what, _, field = line.rpartition(f" @ {where}")
            problems.append(f"{where}{field}: {what}")
        return None


@functools.cache
def _converter() -> cattrs.Converter:
    # Imported here, so that a program that needs no udrv.json does not pay for it at start.
    import cattrs
    from cattrs.gen import make_dict_structure_fn

    converter = cattrs.Converter()
    converter.register_structure_hook(Path, _to_directory)
    converter.register_structure_hook(Direction, _to_direction)
    converter.register_structure_hook(_Address, _to_address)
    # A table of our own, too.
    converter.register_structure_hook(_Entry, make_dict_structure_fn(_Entry, converter, _cattrs_forbid_extra_keys=True))
    return converter


def _describe(error: BaseException, _: type | None) -> str:
    import cattrs

    if isinstance(error, KeyError):
        return "is missing"
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return f"unknown key {', '.join(repr(key) for key in sorted(error.extra_fields))}"
    return str(error)


def _to_string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{kind_of(value)} is not a string")
    return value


def _to_directory(value: object, _: type) -> Path:
    text = _to_string(value)
    # A daemon has no meaningful working directory.
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path")
    if not is_path(text):
        raise ValueError(f"{text!r} cannot be a path: no file name has a NUL byte or half a character")
    if any(len(os.fsencode(part)) > FILE_NAME_MAX for part in text.split("/")):
        raise ValueError(f"a name in {text[:40]!r}... has more than {FILE_NAME_MAX} bytes")
    return Path(text)


def _to_direction(value: object, _: type) -> Direction:
    text = _to_string(value)
    try:
        return Direction(text)
    except ValueError:
        raise ValueError(f"{text!r} is not inbound or outbound") from None


def _to_address(value: object, _: type) -> _Address:
    text = _to_string(value)
    device, dot, register = text.partition(".")
    if not dot:
        raise ValueError(f"{text!r} is not <device>.<register>")
    if fault := register_fault(register):
        raise ValueError(f"in {text!r}, {fault}")
    return _Address(device, register)


class _Repeating(dict[str, object]):
    """A JSON object in which the keys `repeated` came more than once, and their last value counts."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        table = _Repeating(table)
        table.repeated = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return table


def repeated_keys(table: object, where: str, matter: Collection[str] | None = None) -> list[str]:
    """A line for each key that came more than once, of those that `matter`; None: all do."""
    keys = table.repeated if isinstance(table, _Repeating) else ()
    place = f"{where}: " if where else ""
    return [f"{place}{key!r} is there more than once" for key in keys if matter is None or key in matter]


def _shown(key: str) -> str:
    """`key` as a part of a key path: quoted unless it is plain."""
    return repr(key) if name_fault(key) else key


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "a table", list: "a list", str: "a string", float: "a number", bool: "a boolean"}
    return kinds.get(type(value), "null")


def load_document(text: bytes, source: str) -> dict[str, object]:
    """The JSON object `text`. Raises `ConfigError`, its line beginning with `source`."""
    try:
        # No number matters here, and int() refuses the very long ones.
        document = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=float)
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise ConfigError([f"{source}: line {line}: not UTF-8: byte 0x{e.object[e.start]:02x}"]) from e
    except json.JSONDecodeError as e:
        raise ConfigError([f"{source}: line {e.lineno} column {e.colno}: not JSON: {e.msg}"]) from e
    except RecursionError as e:
        raise ConfigError([f"{source}: not a table: nested too deeply"]) from e
    if not isinstance(document, dict):
        raise ConfigError([f"{source}: {kind_of(document)} is not a table"])
    return document
