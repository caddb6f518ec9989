"""Validation of JSON from users and other programs: file size limits, rules for values, and errors by key path."""

from __future__ import annotations

import codecs
import errno
import functools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import attrs

from inco_trio.errors import ConfigError, ResourceError
from inco_trio.frame import is_wire_name
from inco_trio.linux.files import FILE_NAME_MAX, PATH_MAX, is_path, kind_of_file
from inco_trio.signals import Direction

if TYPE_CHECKING:
    import cattrs

__all__ = ["ABSOLUTE_PATH", "NAMES", "RULES", "SIZE_MAX", "InvalidValueError", "Rule", "Table", "parse_table",
           "read_file", "structure"]  # fmt: skip

SIZE_MAX = 1 << 20
"""Default maximum size of a file, in bytes."""
REPORTED_MAX = 20
"""Maximum number of mistakes that are listed for one file. Further mistakes are only counted."""
SHOWN_MAX = 60
"""Maximum number of characters of an invalid value that a message shows."""
NAMES_MAX = 256
"""Maximum number of names in a path."""
SEPARATORS_MAX = 500_000
"""Maximum number of commas, opening brackets and opening braces in a file.

The largest signal table of a board needs 200,000.
The proxy reads a file in a thread, but json.loads does not let other threads run: notifications would wait for seconds.
"""
NUMBER_MAX = 1 << 64
TIME_MAX = 1 << 34
"""Latest valid time, in seconds since 1970. In nanoseconds, it still fits in 64 bits."""
_T = TypeVar("_T")
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def read_file(path: Path | str, size_max: int = SIZE_MAX) -> bytes:
    """Return the content of a regular file, without waiting for another process to write it.

    Raises ConfigError if the file is not a regular file, is too large or cannot be read. Raises ResourceError if a
    limit on open files or memory is reached.
    """
    if not is_path(str(path)):
        raise ConfigError(path, "cannot be read: the path has a NUL byte or an unpaired surrogate")
    try:
        # Check the type before open(2), which can start a device, and again after it: the path may have been replaced.
        _check_regular(path, os.stat(path))  # noqa: PTH116 - `path` may be text
        with open(path, "rb", opener=_open_at_once) as file:
            _check_regular(path, os.fstat(file.fileno()))
            # Do not use st_size, which is 0 for files in /proc. read() returns None if it would block.
            content = file.read(size_max + 1) or b""
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
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class _Repeating(dict[str, object]):
    """A JSON object with repeated keys. The last value of each key is used."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        table = _Repeating(table)
        table.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return table


class InvalidValueError(ValueError):
    """A value violates its rule. The exception's message gives the reason."""


class Rule:
    """A rule for a JSON value. `convert` returns the Python value, or raises InvalidValueError."""

    def __init__(
        self,
        types: tuple[type, ...],
        expected: str,
        is_valid: Callable[[Any], bool] = lambda _: True,
        convert: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.types = types
        self.expected = expected
        self.is_valid = is_valid
        self.convert = convert

    def __call__(self, value: object, _: object = None) -> Any:
        """Check and convert a value. Raises InvalidValueError."""
        is_typed = type(value) in self.types
        if is_typed and self.is_valid(value):
            return self.convert(value)
        shown = _KINDS.get(type(value), "null")
        if shown == "a string" or (shown == "a number" and is_typed):
            shown = repr(value).removesuffix(".0")
        shown = shown if len(shown) <= SHOWN_MAX else f"{shown[:SHOWN_MAX]}..."
        raise InvalidValueError(f"{shown} (expected {self.expected})")


def _path(text: str) -> str:
    if not is_path(text):
        raise InvalidValueError(f"{text!r} cannot be a path: it has a NUL byte or an unpaired surrogate")
    # The proxy opens a path one name at a time. Longer paths would block its other boards for seconds or even hours.
    if len(os.fsencode(text)) > PATH_MAX or text.count("/") > NAMES_MAX:
        raise InvalidValueError(f"{text[:40]!r}... has more than {PATH_MAX} bytes or {NAMES_MAX} names")
    if any(len(os.fsencode(part)) > FILE_NAME_MAX for part in text.split("/")):
        raise InvalidValueError(f"a name in {text[:40]!r}... has more than {FILE_NAME_MAX} bytes")
    return text


_KINDS = {str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "a table",
          _Repeating: "a table"}  # fmt: skip
_DIRECTIONS = [direction.value for direction in Direction]
RULES: dict[type, Rule] = {
    str: Rule((str,), "a string"),
    bool: Rule((bool,), "true or false"),
    int: Rule((int,), "a whole number of at most 64 bits", lambda value: -NUMBER_MAX < value < NUMBER_MAX),
    float: Rule((int, float), "seconds since 1970", lambda value: 0 <= value < TIME_MAX),
    Direction: Rule((str,), " or ".join(_DIRECTIONS), lambda value: value in _DIRECTIONS, Direction),
    list: Rule((list,), "a list"),
    dict: Rule((dict, _Repeating), "a table"),
}
"""The default rule for each type."""
NAMES = Rule((list,), "a list of strings", lambda value: all(isinstance(each, str) for each in value))
# Refuse relative paths, because a daemon has no meaningful working directory.
ABSOLUTE_PATH = Rule((str,), "an absolute path", lambda value: value.startswith("/"), _path)


def structure(value: object, kind: type[_T], problems: list[str], where: str = "") -> _T | None:
    """Convert a JSON value to the attrs class `kind`. If it is invalid, record errors in `problems` and return None.

    A rule in the `Annotated` type of a field replaces the default rule. Unknown keys are ignored.
    """
    import cattrs

    try:
        return _converter().structure(value, kind)
    except (cattrs.BaseValidationError, InvalidValueError) as error:
        # A NUL separates the error from the path. Neither contains a NUL, because repr() escapes it.
        for line in cattrs.transform_error(error, "\0", _describe):
            what, _, path = line.partition(" @ \0")
            place = (where + re.sub(r"\['([\w*-]+)'\]", r".\1", path)).removeprefix(".")
            problems.append(f"{place}: {what}" if place else what)
        return None


def _describe(error: BaseException, kind: Any) -> str:
    if not isinstance(error, KeyError):
        return str(error)
    rule = _special_rule(kind) or RULES.get(kind)
    return f"missing (expected {rule.expected})" if rule else "missing"


def _special_rule(kind: Any) -> Rule | None:
    return next(iter(getattr(kind, "__metadata__", ())), None)


@functools.cache
def _converter() -> cattrs.Converter:
    # Import cattrs lazily: `inco-trio run` starts faster without it.
    import cattrs
    from cattrs.gen import make_dict_structure_fn

    def message(kind: Any) -> Callable[[object, Any], Any]:
        hook = make_dict_structure_fn(kind, converter)
        return lambda value, kind: hook(RULES[dict](value), kind)

    def items(value: object, kind: Any) -> tuple[Any, ...]:
        plain: Any = GenericAlias(list, get_args(kind)[:1])
        return tuple(converter.structure(RULES[list](value), plain))

    def entries(value: object, kind: Any) -> Any:
        plain: Any = GenericAlias(dict, get_args(kind))
        return converter.structure(RULES[dict](value), plain)

    converter = cattrs.Converter()
    converter.register_structure_hook_factory(attrs.has, message)
    converter.register_structure_hook_func(lambda kind: getattr(kind, "__origin__", None) is tuple, items)
    converter.register_structure_hook_func(lambda kind: getattr(kind, "__origin__", None) is Mapping, entries)
    converter.register_structure_hook_func(
        lambda kind: _special_rule(kind) is not None, lambda value, kind: kind.__metadata__[0](value)
    )
    for kind in (str, bool, int, float, Direction):
        converter.register_structure_hook(kind, RULES[kind])
    return converter


class Table:
    """A JSON object at the key path `where`. Its methods record errors in `problems`."""

    def __init__(self, values: dict[str, object], where: str = "", problems: list[str] | None = None) -> None:
        self.values = values
        self.where = where
        self.problems = [] if problems is None else problems

    def path(self, key: str) -> str:
        """Return the key path of a key. Quote a key that is not a plain word."""
        shown = key if is_wire_name(key.encode(errors="replace")) and key.isascii() else repr(key)
        return f"{self.where}.{shown}" if self.where else shown

    def fault(self, key: str, what: str) -> None:
        """Record an error in the value of a key in `problems`."""
        self.problems.append(f"{self.path(key)}: {what}")

    def only(self, keys: Iterable[str]) -> None:
        """Record an error for each key that is not in `keys`, and for each repeated key."""
        known = dict.fromkeys(keys)
        for key in self.values:
            if key not in known:
                one_of = "" if len(known) == 1 else "one of "
                self.fault(key, f"unknown key (expected {one_of}{', '.join(known)})")
            self._check_once(key)

    def _check_once(self, key: str) -> None:
        if isinstance(self.values, _Repeating) and key in self.values.repeated:
            self.fault(key, "given more than once")

    def value(self, key: str, rule: Rule) -> Any:
        """Return the value of a key. If the key is missing or its value is invalid, record an error and return None."""
        self._check_once(key)
        try:
            return rule(self.values[key])
        except KeyError:
            self.fault(key, f"missing (expected {rule.expected})")
        except InvalidValueError as error:
            self.fault(key, str(error))
        return None

    def table(self, key: str) -> Table | None:
        """Return the table at a key: an empty table if the key is missing, or None if the value is not a table."""
        value = self.value(key, RULES[dict]) if key in self.values else {}
        return None if value is None else Table(value, self.path(key), self.problems)

    def walk(self, path: str) -> Table:
        """Return the table at a dotted key path, or an empty table if the value is missing or not a table."""
        table: Table | None = self
        for key in path.split("."):
            table = None if table is None else table.table(key)
        return table or Table({}, path, self.problems)

    def structure(self, kind: type[_T]) -> _T | None:
        """Convert this table to the attrs class `kind`; return None if a value is invalid. Report unknown keys."""
        self.only(field.name for field in attrs.fields(kind))  # type: ignore[arg-type]
        return structure(self.values, kind, self.problems, self.where)

    def finish(self, source: str) -> None:
        """Raise a ConfigError that lists the mistakes, if there are any."""
        found = list(dict.fromkeys(self.problems))
        more = [f"and {len(found) - REPORTED_MAX} more mistakes"] if len(found) > REPORTED_MAX else []
        if found:
            raise ConfigError(source, found[:REPORTED_MAX] + more)


def parse_table(text: bytes, source: str) -> Table:
    """Parse a JSON object. Integers become floats. Raises ConfigError with the subject `source`."""
    if sum(map(text.count, (b",", b"[", b"{"))) > SEPARATORS_MAX:
        raise ConfigError(source, f"more than {SEPARATORS_MAX:,} commas, opening brackets and opening braces")
    try:
        # Parse integers as floats, because int() refuses very long numbers. No key needs exact integers.
        document = json.loads(text.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_object, parse_int=float)
        return Table(RULES[dict](document))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(source, f"line {line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(source, f"line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ConfigError(source, "nested too deeply") from error
    except InvalidValueError as error:
        raise ConfigError(source, str(error)) from error
