"""What a gateway is told: the URL of the broker, and a file of JSON with what it may do and who it is.

    {"boards": ["b1", "b2"], "send": {"b1": ["redun_notify_irq"]}, "status_seconds": 10,
     "broker": {"ca_file": "/etc/inco-trio/ca.pem", "certificate_file": "/etc/inco-trio/host.pem",
                "key_file": "/etc/inco-trio/host.key", "user_file": "/etc/inco-trio/user",
                "password_file": "/etc/inco-trio/password"}}

Every key may be left out. Who may read the log, the list of processes or this file learns no password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.v import format_exception

from inco_trio.config import load_document, read_file, repeated_keys
from inco_trio.errors import ConfigError, PermissionDeniedError, UsageError
from inco_trio.signals import name_fault

__all__ = ["Broker", "Credentials", "GatewayConfig", "Identity", "parse_broker", "read_gateway"]

PREFIX = "inco-trio"
SECRET_MAX = 65_535
"""Bytes of the longest user name and password (MQTT 5, 1.5.6)."""


@attrs.frozen
class Broker:
    """Where the broker is, and below which topic everything stands."""

    host: str
    port: int
    tls: bool
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}/{self.prefix}"


@attrs.frozen
class Identity:
    """Who the gateway says that it is."""

    user: str | None
    password: str | None = attrs.field(repr=False)


@attrs.frozen
class Credentials:
    """The files that say who the gateway is, and whom it believes."""

    ca_file: str | None = None
    """Certificates of those who may vouch for the broker, PEM; without it those that the system trusts."""
    certificate_file: str | None = None
    """The certificate of the gateway, PEM."""
    key_file: str | None = None
    """The private key of that, PEM, not encrypted."""
    user_file: str | None = None
    """One line: who the gateway is."""
    password_file: str | None = None
    """One line: its password."""

    def read(self) -> Identity:
        """Read user and password. Raises ConfigError, PermissionDeniedError."""
        return Identity(_read_line(self.user_file, "user_file"), _read_line(self.password_file, "password_file"))


@attrs.frozen
class GatewayConfig:
    """What a gateway is to do."""

    boards: list[str] | None = None
    """The boards that it serves; without it all."""
    send: Mapping[str, list[str]] = attrs.Factory(dict)
    """The signals that may be sent from the broker, by board; `*` is every board, or every signal."""
    status_seconds: float = 10.0
    """Seconds between two looks at the counters."""
    broker: Credentials = Credentials()
    """Who the gateway is to the broker, and whom it believes: all absolute paths of files."""


def parse_broker(url: str) -> Broker:
    """The broker of `mqtt://HOST[:PORT][/PREFIX]`, or `mqtts://`. Raises UsageError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"broker {url!r}: {error}") from None
    fault = None
    prefix = unquote(parts.path).strip("/") or PREFIX
    if parts.username is not None or parts.password is not None:
        url = "URL"  # It is not shown.
        fault = "user and password are named in the file of --config, as everybody can read a command line"
    elif parts.scheme not in {"mqtt", "mqtts"}:
        fault = "it is mqtt://HOST[:PORT][/PREFIX], or mqtts:// for TLS"
    elif not parts.hostname:
        fault = "a host is missing"
    elif port == 0:
        fault = "port 0 is none"
    elif parts.query or parts.fragment or "?" in url or "#" in url:
        fault = "it has no ? and no #"
    elif any(char in "+#" or not char.isprintable() for char in prefix) or prefix.startswith("$"):
        fault = f"the prefix {prefix!r} has '+', '#' or a control character, or begins with '$'"
    elif "" in prefix.split("/"):
        fault = f"the prefix {prefix!r} has an empty level"
    elif len(prefix.encode(errors="replace")) > 1000:
        fault = "the prefix is longer than 1,000 bytes"
    if fault is not None:
        raise UsageError(f"broker {url}: {fault}")
    tls = parts.scheme == "mqtts"
    assert parts.hostname is not None  # noqa: S101 - see above
    return Broker(parts.hostname, port or (8883 if tls else 1883), tls, prefix)


def read_gateway(path: Path) -> GatewayConfig:
    """What the file at `path` says. Raises ConfigError with all that is wrong in it."""
    document = load_document(read_file(path), str(path))
    problems = repeated_keys(document, "")
    try:
        config = _converter().structure(document, GatewayConfig)
    except Exception as error:  # noqa: BLE001 - cattrs raises whatever a conversion raises
        problems += _problems(error, "")
    else:
        problems += _faults(config)
        if not problems:
            return config
    raise ConfigError(f"{path}: {problem}" for problem in problems)


def _converter() -> cattrs.Converter:
    """One that takes nothing for anything else."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def text(value: object, _: object) -> str:
        if not isinstance(value, str):
            raise TypeError("is not a string")
        return value

    def number(value: object, _: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("is not a number")
        return float(value)

    def texts(value: object, _: object) -> list[str]:
        if not isinstance(value, list):
            raise TypeError("is not a list of strings")
        return [text(each, str) for each in value]

    def table(value: object, _: object) -> dict[str, list[str]]:
        if not isinstance(value, dict):
            raise TypeError("is not an object")
        return {key: texts(each, list) for key, each in value.items()}

    converter.register_structure_hook(str, text)
    converter.register_structure_hook(float, number)
    converter.register_structure_hook_func(lambda kind: kind == list[str], texts)
    converter.register_structure_hook_func(lambda kind: kind == Mapping[str, list[str]], table)
    return converter


def _problems(error: BaseException, place: str) -> list[str]:
    """What cattrs found, with the key paths."""
    if isinstance(error, ClassValidationError | IterableValidationError):
        found = []
        with_notes, without = error.group_exceptions()
        for each, note in with_notes:
            name = getattr(note, "name", getattr(note, "index", ""))
            found += _problems(each, f"{place}.{name}" if place else str(name))
        for each in without:
            found += _problems(each, place)
        return found
    if isinstance(error, ForbiddenExtraKeysError):
        known = ", ".join(field.name for field in attrs.fields(error.cl))
        where = f"{place}." if place else ""
        return [f"{where}{key}: unknown key: {known} are those there are" for key in sorted(error.extra_fields)]
    text = str(error) if isinstance(error, TypeError) else format_exception(error, None)
    return [f"{place}: {text}" if place else text]


def _faults(config: GatewayConfig) -> list[str]:
    """What is wrong with values of the right kind."""
    faults = []
    if not 0 < config.status_seconds <= 86_400:
        faults.append(f"status_seconds: {config.status_seconds:g} is not more than 0, up to a day")
    if config.boards is not None and not config.boards:
        faults.append("boards: is empty: leave it out for all boards")
    for board, signals in config.send.items():
        named = [signal for signal in signals if signal != "*"]
        faults += [f"send.{board}: {signal!r}: {fault}" for signal in named if (fault := name_fault(signal))]
        if config.boards is not None and board != "*" and board not in config.boards:
            faults.append(f"send.{board}: is not among the boards that are served")
    credentials = config.broker
    for name, value in attrs.asdict(credentials).items():
        if value is not None and (not value.startswith("/") or "\0" in value):
            faults.append(f"broker.{name}: {value!r} is not an absolute path")
    if (credentials.certificate_file is None) != (credentials.key_file is None):
        faults.append("broker: certificate_file and key_file need each other")
    if credentials.password_file is not None and credentials.user_file is None:
        faults.append("broker: a password_file needs a user_file")
    return faults


def _read_line(file: str | None, key: str) -> str | None:
    """The line in a file. Raises ConfigError, PermissionDeniedError."""
    if file is None:
        return None
    try:
        data = read_file(Path(file)).rstrip(b"\r\n")
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError([f"{file}: broker.{key}: is not UTF-8"]) from None
    except PermissionError as error:
        raise PermissionDeniedError(f"{file}: broker.{key}: cannot be read: {error.strerror}") from error
    if not text or len(data) > SECRET_MAX or re.search(r"[\0\r\n]", text):
        raise ConfigError([f"{file}: broker.{key}: is one line of up to {SECRET_MAX} bytes"])
    return text
