"""JSON files that people write: bounded reading, and mistakes with their key paths.

Every mistake is one line: `b1.json: link: missing (expected an interface name or unix:LOCAL,peer=REMOTE)`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import attrs

from inco_trio.errors import ConfigError, ResourceError
from inco_trio.frame import is_wire_name
from inco_trio.linux.files import is_path, kind_of_file

__all__ = ["SIZE_MAX", "Table", "parse_table", "path_fault", "read_file"]

SIZE_MAX = 1 << 20
"""The largest file that is read by default, in bytes."""
REPORTED_MAX = 20
"""Mistakes of one file that are reported; the others are counted."""
_T = TypeVar("_T")
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_KINDS = {dict: "a table", list: "a list", str: "a string", float: "a number", bool: "a boolean"}


def read_file(path: Path | str, size_max: int = SIZE_MAX) -> bytes:
    """Return the content of a regular file, without waiting for another process to write it.

    Raises ConfigError for another kind of file, or one that is too large or cannot be read, and ResourceError.
    """
    if not is_path(str(path)):
        raise ConfigError(path, "cannot be read: the path has a NUL byte or an unpaired surrogate")
    try:
        # Before the file is opened, as opening can start a device; and after that, as the file may have been replaced.
        _check_regular(path, os.stat(path))  # noqa: PTH116 - `path` may be text
        with open(path, "rb", opener=_open_at_once) as file:
            _check_regular(path, os.fstat(file.fileno()))
            # The size of a file in /proc is 0. read() returns None where it would have to wait.
            content = file.read(size_max + 1) or b""
    except ConfigError:
        raise
    except OSError as error:
        kind = ResourceError if error.errno in _EXHAUSTED else ConfigError
        raise kind(path, f"cannot be read: {error.strerror}") from error
    if len(content) > size_max:
        raise ConfigError(path, f"cannot be read: it is larger than {size_max >> 20} MiB")
    return content


def _check_regular(path: Path | str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(path, f"cannot be read: it is {kind_of_file(status.st_mode)}, not a regular file")


def _open_at_once(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO would wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class _Repeating(dict[str, object]):
    """A JSON object with repeated keys; the last value of each is valid."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        table = _Repeating(table)
        table.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return table


@attrs.frozen
class Table:
    """A JSON object at the key path `where`. Its methods add the mistakes that they find to `problems`.

    A repeated or unknown key is a mistake only if it is asked for, or if `only` names the keys.
    """

    values: dict[str, object]
    where: str = ""
    problems: list[str] = attrs.Factory(list)

    def path(self, key: str) -> str:
        """Return the key path of a key; a key that is not a plain word is quoted."""
        shown = key if is_wire_name(key.encode(errors="replace")) and key.isascii() else repr(key)
        return f"{self.where}.{shown}" if self.where else shown

    def fault(self, key: str, what: str) -> None:
        """Add a mistake."""
        self.problems.append(f"{self.path(key)}: {what}")

    def expect(self, key: str, expected: str) -> None:
        """Add that the key is missing, or has another value than expected."""
        value = self.values.get(key)
        found = repr(value) if isinstance(value, str) else _kind(value)
        self.fault(key, f"{found if key in self.values else 'missing'} (expected {expected})")

    def only(self, keys: Iterable[str]) -> None:
        """Add unknown and repeated keys."""
        known = tuple(keys)
        for key in self.values:
            if key not in known:
                one_of = "" if len(known) == 1 else "one of "
                self.fault(key, f"unknown key (expected {one_of}{', '.join(known)})")
            self.check_once(key)

    def check_once(self, key: str) -> None:
        """Add the key if it is repeated."""
        if isinstance(self.values, _Repeating) and key in self.values.repeated:
            self.fault(key, "given more than once")

    def _get(self, key: str, kind: type[_T], expected: str, *, required: bool = False) -> _T | None:
        self.check_once(key)
        value = self.values.get(key)
        if isinstance(value, kind):
            return value
        if required or key in self.values:
            self.expect(key, expected)
        return None

    def text(self, key: str, expected: str, *, required: bool = False) -> str | None:
        """Return a string; None if it is missing or has another type."""
        return self._get(key, str, expected, required=required)

    def number(self, key: str, expected: str, default: float) -> float:
        """Return a number."""
        value = self._get(key, float, expected)
        return default if value is None else value

    def texts(self, key: str) -> list[str] | None:
        """Return a list of strings; None if it is missing or has another type."""
        expected = "a list of strings"
        value = self._get(key, list, expected)
        if value is not None and not all(isinstance(each, str) for each in value):
            self.expect(key, expected)
            return None
        return value

    def table(self, key: str) -> Table | None:
        """Return a table, empty if it is missing; None if it has another type."""
        value = self._get(key, dict, "a table")
        return None if value is None and key in self.values else Table(value or {}, self.path(key), self.problems)

    def walk(self, path: str) -> Table:
        """Return the table at the end of a dotted key path; empty if it is missing or not a table."""
        table: Table | None = self
        for key in path.split("."):
            table = None if table is None else table.table(key)
        return table or Table({}, path, self.problems)

    def finish(self, source: str) -> None:
        """Raise ConfigError for the mistakes, if there are any."""
        found = list(dict.fromkeys(self.problems))
        more = [f"and {len(found) - REPORTED_MAX} more mistakes"] if len(found) > REPORTED_MAX else []
        if found:
            raise ConfigError(source, found[:REPORTED_MAX] + more)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def path_fault(text: str) -> str | None:
    """Return why `text` is not an absolute path, or None. A daemon has no meaningful working directory."""
    if not is_path(text):
        return f"{text!r} cannot be a path: it has a NUL byte or an unpaired surrogate"
    return None if text.startswith("/") else f"{text!r} (expected an absolute path)"


def parse_table(text: bytes, source: str) -> Table:
    """Return the JSON object `text`; integers are floats. Raises ConfigError, with `source` as its subject."""
    try:
        # int() refuses very long numbers, none of which matters here.
        document = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=float)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(source, f"line {line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(source, f"line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ConfigError(source, "nested too deeply") from error
    if not isinstance(document, dict):
        raise ConfigError(source, f"{_kind(document)} (expected a table)")
    return Table(document)
