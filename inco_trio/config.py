"""The configuration of one proxy (`Config`), and a board's udrv.json (`Board`).

A udrv.json describes every device of the board. The proxy reads only these keys:

    file.<device>.path                      the directory of a file device; ihub-irq-dev is required
    misc.ihub_config_dev.regs.<reg>.reg     "<device>.<register>" of a built-in signal
    misc.inco_proxy.signals.<wire name>     {"direction": "inbound" | "outbound", "reg": "<device>.<register>"}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from inco_trio.errors import ConfigError, InvalidArgumentError
from inco_trio.links.address import InterfaceAddress, UnixAddress, parse_address
from inco_trio.signals import BUILTIN, Direction, Signal, clashes, name_fault, register_fault
from inco_trio.validation import ABSOLUTE_PATH, RULES, InvalidValueError, Rule, Table, parse_table, read_file

__all__ = ["Board", "Config", "parse_board", "read_board", "read_udrv"]

UDRV_SIZE_MAX = 16 << 20
"""Maximum size of a udrv.json, in bytes."""
HISTORY_MAX = 65_536
IRQ_DEVICE = "ihub-irq-dev"
FILE = "file"
REGS = "misc.ihub_config_dev.regs"
OURS = "misc.inco_proxy"
SIGNALS = f"{OURS}.signals"


def _to_tuple(signals: Iterable[Signal]) -> tuple[Signal, ...]:
    return tuple(signals)


@attrs.frozen
class Config:
    """The configuration of one proxy. Raises `ConfigError` for an invalid link, signal or deadline."""

    link: str
    """The address of the link: an interface name or "unix:LOCAL,peer=REMOTE"."""
    signals: tuple[Signal, ...] = attrs.field(converter=_to_tuple)
    """The signals that the proxy carries."""
    wait_link: bool = False
    """Whether to wait for a link that is missing at the start, instead of failing."""
    stop_deadline: float = 5.0
    """Maximum time in seconds that a clean stop may take to finish pending notifications."""
    history: int | None = None
    """How many notifications the flight recorder keeps: 0 to 65,536 (default: 4,096, or fewer with many boards)."""
    netns: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """The path of the interface's network namespace, such as /run/netns/b2 (None: the namespace of this process)."""
    owner: int | None = None
    """The user ID that may own IRQ directories, besides root and the user of this process."""
    group: int | None = None
    """The group ID that may write to IRQ directories."""

    address: InterfaceAddress | UnixAddress = attrs.field(init=False, eq=False, repr=False)
    """The parsed `link`."""

    def __attrs_post_init__(self) -> None:
        strangers = [signal for signal in self.signals if not isinstance(signal, Signal)]
        problems = [f"signals: {stranger!r} is not a Signal" for stranger in strangers]
        problems += [] if strangers else [f"signal {signal.name}: {why}" for signal, why in clashes(self.signals)]
        try:
            object.__setattr__(self, "address", parse_address(self.link))
        except InvalidArgumentError as error:
            problems.append(f"link {self.link!r}: {error.reason}")
        deadline = self.stop_deadline
        for name, is_valid, expected in (
            ("wait_link", isinstance(self.wait_link, bool), "True or False"),
            ("stop_deadline", isinstance(deadline, int | float) and deadline >= 0, "a number of seconds, 0 or more"),
            ("history", _is_number(self.history, HISTORY_MAX), f"a number from 0 to {HISTORY_MAX}"),
            ("owner", _is_number(self.owner), "a user ID"),
            ("group", _is_number(self.group), "a group ID"),
        ):
            if not is_valid:
                problems.append(f"{name}: {getattr(self, name)!r} is not {expected}")
        if problems:
            raise ConfigError("", problems)

    def same_link(self, other: Config) -> bool:
        """Return whether both configurations use the same link."""
        return (self.address, self.netns) == (other.address, other.netns)


def _is_number(value: object, highest: float = math.inf) -> bool:
    """Return whether `value` is None, or an integer from 0 to `highest`."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= highest)


@attrs.frozen
class Board:
    """The content of a board's udrv.json."""

    signals: tuple[Signal, ...]
    """The built-in signals, followed by the signals of the table `misc.inco_proxy.signals` in the file's order."""
    notes: tuple[str, ...]
    """A line of text for each missing key whose default is used."""


def read_board(path: Path | str) -> Board:
    """Read the udrv.json at `path`. Raises ConfigError, which lists every mistake, and ResourceError."""
    return parse_board(read_udrv(path), str(path))


def read_udrv(path: Path | str) -> bytes:
    """Return the content of a udrv.json. Raises the errors of `validation.read_file`."""
    return read_file(path, UDRV_SIZE_MAX)


def parse_board(text: bytes, source: str) -> Board:
    """Parse the content of a udrv.json. Raises ConfigError, which lists every mistake after the file name `source`."""
    document = parse_table(text, source)
    notes: list[str] = []
    found = list(_find(document, notes))
    directories = _directories(document, found)
    places = {
        Signal(f.name, f.direction, directories[f.address.device], f.address.register): f.where
        for f in found
        if f.address.device in directories
    }
    document.problems.extend(f"{places[signal]}.reg: {why}" for signal, why in clashes(places))
    document.finish(source)
    return Board(tuple(places), tuple(notes))


class _Address:
    """A register in the form that udrv.json uses: "<device>.<register>"."""

    def __init__(self, device: str, register: str) -> None:
        self.device = device
        self.register = register


def _to_address(text: str) -> _Address:
    device, _, register = text.partition(".")
    if fault := register_fault(register):
        raise InvalidValueError(f"in {text!r}, {fault}")
    return _Address(device, register)


ADDRESS = Rule((str,), "<device>.<register>", lambda text: "." in text, _to_address)


class _Device:
    """An entry of the table `file` in a udrv.json."""

    path: Path
    """The absolute path of the directory. Devices that share it must use the same path. The proxy creates it."""


class _Reg:
    """An entry of the table `misc.ihub_config_dev.regs` in a udrv.json."""

    reg: _Address
    """`"<device>.<register>"`: the text after the first dot is the name of a file in the device's directory."""


class _Entry:
    """An entry of `misc.inco_proxy.signals`, whose key is the wire name. Unknown keys in the entry are an error."""

    direction: Direction
    """`"inbound"` (core 1 to core 0) or `"outbound"` (core 0 to core 1)."""
    reg: _Address
    """`"<device>.<register>"`, in the same form as for the built-in signals."""


class _Found:
    """A signal whose device has not been looked up yet. `where` is the key path of its entry."""

    def __init__(self, name: str, direction: Direction, address: _Address, where: str) -> None:
        self.name = name
        self.direction = direction
        self.address = address
        self.where = where


def _find(document: Table, notes: list[str]) -> Iterator[_Found]:
    regs, ours, signals = document.walk(REGS), document.walk(OURS), document.walk(SIGNALS)
    # Only inco-trio uses these tables, so an unknown key in them is a typo.
    ours.only(["signals"])
    signals.only(signals.values)
    builtins = {builtin.name: builtin for builtin in BUILTIN}
    for name in dict.fromkeys([*builtins, *signals.values]):
        if name in signals.values:
            if fault := name_fault(name):
                signals.fault(name, fault)
            if entry := signals.table(name):
                entry.only(_Entry.__annotations__)
                direction, address = entry.value("direction", RULES[Direction]), entry.value("reg", ADDRESS)
                if direction and address and not fault:
                    yield _Found(name, direction, address, entry.where)
        elif (builtin := builtins[name]).reg in regs.values:
            if (entry := regs.table(builtin.reg)) and (address := entry.value("reg", ADDRESS)):
                yield _Found(name, builtin.direction, address, entry.where)
        else:
            where = regs.path(builtin.reg)
            notes.append(f"{where} is missing: using {IRQ_DEVICE}.{builtin.register}")
            yield _Found(name, builtin.direction, _Address(IRQ_DEVICE, builtin.register), where)


def _directories(document: Table, found: list[_Found]) -> dict[str, Path]:
    """Return the directory of each device that signals use. Omit devices whose entries are invalid."""
    files = document.table(FILE)
    if files is None:
        return {}
    # IRQ_DEVICE is required, even if no signal uses it.
    devices = {IRQ_DEVICE: "", **{f.address.device: f.where for f in reversed(found)}}
    directories = {}
    for device, first_use in devices.items():
        if device not in files.values:
            if device == IRQ_DEVICE:
                files.fault(device, "missing (expected a table whose path is the directory of the IRQ files)")
            else:
                document.problems.append(f"{first_use}.reg: {device!r} is not a device of {FILE}")
        elif (entry := files.table(device)) and (path := entry.value("path", ABSOLUTE_PATH)):
            directories[device] = Path(path)
    return directories
