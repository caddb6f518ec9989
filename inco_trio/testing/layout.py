"""The files of a board under test: udrv.json, register directories and sockets, all in one directory."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from inco_trio.config import parse_board, read_udrv
from inco_trio.errors import ConfigError, InvalidArgumentError
from inco_trio.linux.files import is_path
from inco_trio.linux.sockets import SOCKET_PATH_MAX
from inco_trio.signals import BUILTIN, Direction, Signal, direction_of

__all__ = ["DEVICE", "Layout", "make_layout", "path_from"]

DEVICE = "ihub-irq-dev"
"""The device in udrv.json whose directory contains the registers of the built-in signals."""
LONGEST = "/control.sock"
"""The longest file name of a socket in the board's directory."""


@attrs.frozen
class Layout:
    """The paths and signals of a board. All files exist, except the registers, which the proxy creates."""

    directory: Path
    sockets: Path
    """The directory of the sockets. It is a temporary directory if the path of `directory` is too long (unix(7))."""
    config: Path
    """The path of the udrv.json."""
    signals: tuple[Signal, ...]

    def socket(self, name: str) -> Path:
        return self.sockets / name

    def address(self, local: str, peer: str) -> str:
        """Return the link address for the socket `local` and the other side's socket `peer`."""
        return "unix:" + ",peer=".join(str(self.socket(name)).replace(",", ",,") for name in (local, peer))

    def signal(self, name: str, direction: Direction | None = None) -> Signal:
        """Return the signal with the given name and, optionally, `direction`. Raises InvalidArgumentError."""
        __tracebackhide__ = True  # Make pytest show the caller's line instead of this line.
        known = [signal for signal in self.signals if direction in (None, signal.direction)]
        for signal in known:
            if signal.name == name:
                return signal
        kind = "a signal" if direction is None else f"an {direction.value} signal"
        names = ", ".join(signal.name for signal in known) or "none"
        raise InvalidArgumentError(name, f"not {kind} of this board (expected one of: {names})")

    def remove(self) -> None:
        """Remove the directory of the sockets, unless it is `directory`."""
        if self.sockets != self.directory:
            shutil.rmtree(self.sockets, ignore_errors=True)


def path_from(what: str, value: Path | str) -> Path:
    """Return the argument `what` as an absolute path. Raises InvalidArgumentError."""
    __tracebackhide__ = True  # Make pytest show the caller's line instead of this line.
    if not isinstance(value, Path | str) or not str(value) or not is_path(str(value)):
        raise InvalidArgumentError(f"{what}={value!r}: expected a path")
    return Path(value).absolute()


def make_layout(
    directory: Path, config: Path | str | Mapping[str, Any] | None, signals: Mapping[str, str] | None
) -> Layout:
    """Create `directory` and the files of a board in it. Raises ConfigError, InvalidArgumentError.

    `config` is the path or the content of a udrv.json; its devices get directories in `directory`. `signals` maps
    additional wire names to `inbound` or `outbound`; their registers are NAME_state and NAME_trig.
    """
    if not isinstance(config, Path | str | Mapping | None):
        raise InvalidArgumentError(f"config={config!r}: expected the path of a udrv.json, or a dict")
    if not isinstance(signals, Mapping | None):
        raise InvalidArgumentError(f"signals={signals!r}: expected a dict from wire names to 'inbound' or 'outbound'")
    document = _document(config)
    devices = _tables(document, "file")
    for name, device in devices.items():
        if isinstance(device, dict) and isinstance(device.get("path"), str):
            device["path"] = str(directory / "registers" / name)
    if config is None or DEVICE not in devices:
        devices[DEVICE] = {"path": str(directory / "registers" / DEVICE)}
    added = _tables(_tables(_tables(document, "misc"), "inco_proxy"), "signals")
    for name, direction in (signals or {}).items():
        if not isinstance(name, str):
            raise InvalidArgumentError(f"signals: {name!r}: expected a wire name")
        try:
            chosen = direction_of(direction)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"signals: {name}: {error}") from None
        kind = "state" if chosen is Direction.INBOUND else "trig"
        added[name] = {"direction": chosen.value, "reg": f"{DEVICE}.{name.replace('/', '_')}_{kind}"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "registers").mkdir(exist_ok=True)
    path = directory / "udrv.json"
    text = json.dumps(document, indent=2)
    board = parse_board(text.encode(), str(config) if isinstance(config, Path | str) else "signals")
    path.write_text(text + "\n")
    sockets = directory
    if len(f"{directory}{LONGEST}".encode()) > SOCKET_PATH_MAX:
        sockets = Path(tempfile.mkdtemp(prefix="inco-trio-"))
    return Layout(directory, sockets, path, board.signals)


def _document(config: Path | str | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        regs = {builtin.reg: {"reg": f"{DEVICE}.{builtin.register}"} for builtin in BUILTIN}
        return {"misc": {"ihub_config_dev": {"regs": regs}}}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    text = read_udrv(path_from("config", config))
    parse_board(text, str(config))
    document: dict[str, Any] = json.loads(text)
    return document


def _tables(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.setdefault(key, {})
    if not isinstance(found, dict):
        raise ConfigError(key, "expected an object")
    return found
