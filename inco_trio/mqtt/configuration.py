"""The configuration of a gateway: the URL of the broker, and a JSON file with permissions and credentials.

All keys are optional. Passwords appear neither in the log nor on the command line nor in the JSON file.
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
URL_EXPECTED = "mqtt://HOST[:PORT][/PREFIX]"
STATUS_SECONDS_MAX = 86_400.0
SECRET_MAX = 65_535
"""Maximum length of a user name or password, in bytes (MQTT 5, 1.5.6)."""


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
    """The user name and the password for the broker."""

    user: str | None
    password: str | None = attrs.field(repr=False)


@attrs.frozen
class Credentials:
    """The files with the credentials of the gateway and with the trusted certificates."""

    ca_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The trusted CA certificates, in PEM format (default: the system's CA certificates)."""
    certificate_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The gateway's certificate, in PEM format."""
    key_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """The private key of the certificate, in PEM format and not encrypted."""
    user_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """A file with one line: the user name of the gateway."""
    password_file: Annotated[str | None, ABSOLUTE_PATH] = None
    """A file with one line: the password of the gateway."""

    def read(self) -> Identity:
        """Read the user name and the password. Raises ConfigError, ResourceError."""
        return Identity(_read_line(self.user_file, "user_file"), _read_line(self.password_file, "password_file"))


SECONDS = Rule(
    (float,), f"seconds: more than 0, up to {STATUS_SECONDS_MAX:g}", lambda value: 0 < value <= STATUS_SECONDS_MAX
)


@attrs.frozen
class GatewayConfig:
    """The configuration of a gateway."""

    boards: Annotated[list[str] | None, NAMES] = None
    """The boards to serve (default: all)."""
    send: Mapping[str, Annotated[list[str], NAMES]] = attrs.Factory(dict)
    """The signals that MQTT clients may send, for each board; `*` stands for every board or every signal."""
    response_prefix: str | None = None
    """The gateway publishes responses to topics below this prefix, and to no other topics (default: no responses)."""
    status_seconds: Annotated[float, SECONDS] = 10.0
    """Seconds between two queries of the counters."""
    broker: Credentials = Credentials()
    """The absolute paths of the files with the credentials and the trusted CA certificates."""

    def check_response_prefix(self, broker: Broker) -> None:
        """Raise ConfigError if a response could be mistaken for a gateway's message or for a request to a gateway."""
        if self.response_prefix is None:
            return
        responses, gateway = f"{self.response_prefix}/", f"{broker.prefix}/"
        if responses.startswith(gateway) or gateway.startswith(responses):
            text = f"{self.response_prefix!r} overlaps the prefix {broker.prefix!r} of the gateway (use another prefix)"
            raise ConfigError("response_prefix", text)


def parse_broker(url: str) -> Broker:
    """Parse `mqtt://HOST[:PORT][/PREFIX]`, or `mqtts://...` for TLS. Raises InvalidArgumentError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgumentError(f"broker {url!r}: {error}") from None
    if parts.username is not None or parts.password is not None:
        # Do not show the URL, because it may contain a password.
        text = "contains a user name or password, which all users can see (use user_file and password_file of --config)"
        raise InvalidArgumentError("broker URL", text)
    prefix = unquote(parts.path).strip("/") or PREFIX
    prefix_problem = _prefix_fault(prefix)
    faults = {
        f"unknown scheme (expected {URL_EXPECTED}, or mqtts:// for TLS)": parts.scheme not in {"mqtt", "mqtts"},
        f"the host is missing (expected {URL_EXPECTED})": not parts.hostname,
        "port 0 is not valid (expected 1 to 65535)": port == 0,
        f"contains '?' or '#' (expected {URL_EXPECTED})": "?" in url or "#" in url,
        f"the prefix {prefix!r} {prefix_problem}": prefix_problem is not None,
    }
    for fault, is_present in faults.items():
        if is_present:
            raise InvalidArgumentError(f"broker {url}", fault)
    tls = parts.scheme == "mqtts"
    assert parts.hostname is not None  # noqa: S101 - a missing host is a fault
    return Broker(parts.hostname, port or (8883 if tls else 1883), tls, prefix)


def _prefix_fault(prefix: str) -> str | None:
    """Return why `prefix` is not valid as the prefix of topics, or None if it is valid."""
    if prefix.startswith("$") or any(char in "+#" or not char.isprintable() for char in prefix):
        return "contains '+', '#' or a control character, or starts with '$'"
    if "" in prefix.split("/"):
        return "has an empty level"
    return "is longer than 1,000 bytes" if len(prefix.encode(errors="replace")) > 1000 else None


def read_gateway(path: Path) -> GatewayConfig:
    """Return the configuration in the file at `path`. Raises a ConfigError that lists all mistakes."""
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
    """Return the mistakes in a configuration whose values have the right types."""
    faults = []
    if config.boards is not None and not config.boards:
        faults.append("boards: an empty list (omit the key to serve all boards)")
    for board, signals in config.send.items():
        named = [signal for signal in signals if signal != "*"]
        faults += [f"send.{board}: {signal!r}: {fault}" for signal in named if (fault := name_fault(signal))]
        if config.boards is not None and board != "*" and board not in config.boards:
            faults.append(f"send.{board}: not a served board (expected one of boards, or *)")
    if config.response_prefix is not None and (fault := _prefix_fault(config.response_prefix)):
        faults.append(f"response_prefix: {config.response_prefix!r} {fault}")
    credentials = config.broker
    if (credentials.certificate_file is None) != (credentials.key_file is None):
        faults.append("broker: certificate_file or key_file is missing (expected both or neither)")
    if credentials.password_file is not None and credentials.user_file is None:
        faults.append("broker: password_file needs user_file")
    return faults


def _read_line(file: str | None, key: str) -> str | None:
    """Return the only line of a file. Raises ConfigError, ResourceError."""
    if file is None:
        return None
    data = read_file(Path(file)).rstrip(b"\r\n")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(file, f"broker.{key}: not UTF-8") from None
    if not text or len(data) > SECRET_MAX or re.search(r"[\0\r\n]", text):
        raise ConfigError(file, f"broker.{key}: expected one line of 1 to {SECRET_MAX} bytes")
    return text
