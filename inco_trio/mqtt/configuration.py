"""The configuration of a gateway: the URL of the broker, and a JSON file with its permissions and credentials.

    {"boards": ["b1", "b2"], "send": {"b1": ["redun_notify_irq"]}, "status_seconds": 10,
     "broker": {"ca_file": "/etc/inco-trio/ca.pem", "certificate_file": "/etc/inco-trio/host.pem",
                "key_file": "/etc/inco-trio/host.key", "user_file": "/etc/inco-trio/user",
                "password_file": "/etc/inco-trio/password"}}

All keys are optional. The log, the command line and this file have no passwords.
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
PREFIX_MAX = 1000
"""Bytes of the longest prefix of topics."""
STATUS_SECONDS_MAX = 86_400.0
SECRET_MAX = 65_535
"""Bytes of the longest user name and password (MQTT 5, 1.5.6)."""


@attrs.frozen
class Broker:
    """The address of the broker, and the prefix of all topics."""

    host: str
    port: int
    tls: bool
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}/{self.prefix}"


@attrs.frozen
class Identity:
    """The user name and the password of the gateway."""

    user: str | None
    password: str | None = attrs.field(repr=False)


@attrs.frozen
class Credentials:
    """The files with the credentials of the gateway and of the broker's authorities: absolute paths."""

    ca_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The certificates of the authorities that sign the broker's, PEM. Without it, those of the system."""
    certificate_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The certificate of the gateway, PEM."""
    key_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The private key of the certificate, PEM, not encrypted."""
    user_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """A file of one line: the user name."""
    password_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """A file of one line: the password."""

    def read(self) -> Identity:
        """Read user and password. Raises ConfigError, ResourceError."""
        return Identity(_read_line(self.user_file, "user_file"), _read_line(self.password_file, "password_file"))


SECONDS = Rule(
    (float,), f"seconds: more than 0, up to {STATUS_SECONDS_MAX:g}", lambda value: 0 < value <= STATUS_SECONDS_MAX
)


@attrs.frozen
class GatewayConfig:
    """The content of the file."""

    boards: Annotated[list[str] | None, NAMES] = None
    """The boards that the gateway serves. Without it, all boards."""
    send: Mapping[str, Annotated[list[str], NAMES]] = attrs.Factory(dict)
    """The signals that clients of the broker may send, by board. `*` stands for all boards or all signals."""
    status_seconds: Annotated[float, SECONDS] = 10.0
    """Seconds between two readings of the counters."""
    broker: Credentials = Credentials()
    """The files with credentials, see below."""


def parse_broker(url: str) -> Broker:
    """Return the broker of `mqtt://HOST[:PORT][/PREFIX]`, or `mqtts://`. Raises InvalidArgumentError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgumentError(f"broker {url!r}: {error}") from None
    has_user = parts.username is not None or parts.password is not None
    prefix = unquote(parts.path).strip("/") or PREFIX
    is_odd = prefix.startswith("$") or any(char in "+#" or not char.isprintable() for char in prefix)
    for is_wrong, fault in (
        (has_user, "user and password are named in the file of --config because all users can read a command line"),
        (parts.scheme not in {"mqtt", "mqtts"}, "expected mqtt://HOST[:PORT][/PREFIX], or mqtts:// for TLS"),
        (not host, "a host is missing"),
        (port == 0, "port 0 is invalid"),
        ("?" in url or "#" in url, "it must have no ? and no #"),
        (is_odd, f"the prefix {prefix!r} has '+', '#' or a control character, or begins with '$'"),
        ("" in prefix.split("/"), f"the prefix {prefix!r} has an empty level"),
        (len(prefix.encode(errors="replace")) > PREFIX_MAX, f"the prefix is longer than {PREFIX_MAX:,} bytes"),
    ):
        if is_wrong:
            raise InvalidArgumentError(f"broker {'URL' if has_user else url}: {fault}")
    tls = parts.scheme == "mqtts"
    return Broker(host or "", port or (8883 if tls else 1883), tls, prefix)


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
        faults.append("boards: is empty (leave it out for all boards)")
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
