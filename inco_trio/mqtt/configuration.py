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
from typing import Annotated
from urllib.parse import unquote, urlsplit

import attrs

from inco_trio.errors import ConfigError, InvalidArgumentError
from inco_trio.signals import name_fault
from inco_trio.validation import ABSOLUTE_PATH, NAMES, Rule, parse_table, read_file

__all__ = ["Broker", "Credentials", "GatewayConfig", "Identity", "parse_broker", "read_gateway"]

PREFIX = "inco-trio"
STATUS_SECONDS_MAX = 86_400.0
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

    ca_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """Certificates of those who may vouch for the broker, PEM; without it those that the system trusts."""
    certificate_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The certificate of the gateway, PEM."""
    key_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The private key of that, PEM, not encrypted."""
    user_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """One line: who the gateway is."""
    password_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """One line: its password."""

    def read(self) -> Identity:
        """Read user and password. Raises ConfigError, ResourceError."""
        return Identity(_read_line(self.user_file, "user_file"), _read_line(self.password_file, "password_file"))


SECONDS = Rule(
    (float,), f"seconds: more than 0, up to {STATUS_SECONDS_MAX:g}", lambda value: 0 < value <= STATUS_SECONDS_MAX
)


@attrs.frozen
class GatewayConfig:
    """What a gateway is to do."""

    boards: Annotated[list[str] | None, NAMES] = None
    """The boards that it serves; without it all."""
    send: Mapping[str, Annotated[list[str], NAMES]] = attrs.Factory(dict)
    """The signals that may be sent from the broker, by board; `*` is every board, or every signal."""
    status_seconds: Annotated[float, SECONDS] = 10.0
    """Seconds between two looks at the counters."""
    broker: Credentials = Credentials()
    """Who the gateway is to the broker, and whom it believes: all absolute paths of files."""


def parse_broker(url: str) -> Broker:
    """The broker of `mqtt://HOST[:PORT][/PREFIX]`, or `mqtts://`. Raises InvalidArgumentError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgumentError(f"broker {url!r}: {error}") from None
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
        raise InvalidArgumentError(f"broker {url}: {fault}")
    tls = parts.scheme == "mqtts"
    assert parts.hostname is not None  # noqa: S101 - see above
    return Broker(parts.hostname, port or (8883 if tls else 1883), tls, prefix)


def read_gateway(path: Path) -> GatewayConfig:
    """Return what the file at `path` configures. Raises ConfigError with every mistake."""
    table = parse_table(read_file(path), str(path))
    config = table.structure(GatewayConfig)
    if broker := table.table("broker"):
        broker.only(field.name for field in attrs.fields(Credentials))
    if send := table.table("send"):
        send.only(send.values)
    if config and not table.problems:
        table.problems.extend(_faults(config))
    table.finish(str(path))
    assert config is not None  # noqa: S101 - there are no mistakes
    return config


def _faults(config: GatewayConfig) -> list[str]:
    """Return what is wrong with valid values that do not fit together."""
    faults = []
    if config.boards is not None and not config.boards:
        faults.append("boards: is empty: leave it out for all boards")
    for board, signals in config.send.items():
        named = [signal for signal in signals if signal != "*"]
        faults += [f"send.{board}: {signal!r}: {fault}" for signal in named if (fault := name_fault(signal))]
        if config.boards is not None and board != "*" and board not in config.boards:
            faults.append(f"send.{board}: is not among the boards that are served")
    credentials = config.broker
    if (credentials.certificate_file is None) != (credentials.key_file is None):
        faults.append("broker: certificate_file and key_file need each other")
    if credentials.password_file is not None and credentials.user_file is None:
        faults.append("broker: a password_file needs a user_file")
    return faults


def _read_line(file: str | None, key: str) -> str | None:
    """Return the line in a file. Raises ConfigError, ResourceError."""
    if file is None:
        return None
    data = read_file(Path(file)).rstrip(b"\r\n")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(file, f"broker.{key}: is not UTF-8") from None
    if not text or len(data) > SECRET_MAX or re.search(r"[\0\r\n]", text):
        raise ConfigError(file, f"broker.{key}: is not one line of up to {SECRET_MAX} bytes")
    return text
