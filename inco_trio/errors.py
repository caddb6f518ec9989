"""The errors of inco-trio.

Three kinds are kept apart: a mistake of the user (`ConfigError`, `UsageError`), a refusal of the kernel
(`PermissionDeniedError`, `LinkNotFoundError`, `ResourceError`), and a closed proxy (`ClosedError`). What the peer
sends is never an error: garbage is counted. Each error ends the command with the exit code of its class (see
sysexits.h).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BoardNotOpenError",
    "ClosedError",
    "ConfigError",
    "IncoError",
    "LinkNotFoundError",
    "PermissionDeniedError",
    "ProgramNotFoundError",
    "ProtocolError",
    "ProxyNotFoundError",
    "RecordingError",
    "ResourceError",
    "UnknownSignalError",
    "UsageError",
]


class IncoError(Exception):
    """Base of every error that a caller can cause or meet; its text is one clear line."""

    exit_code = 70


class UsageError(IncoError):
    """The command line does not make sense."""

    exit_code = 2


class ConfigError(IncoError):
    """The configuration is invalid.

    `problems` holds every mistake that was found, one line each, each naming its key path.
    """

    exit_code = 78

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class PermissionDeniedError(IncoError):
    """The kernel refuses for want of a capability or of a file permission; the text names it."""

    exit_code = 77


class LinkNotFoundError(IncoError):
    """There is no interface of that name."""

    exit_code = 69


class ProxyNotFoundError(IncoError):
    """No running proxy answers on a control socket."""

    exit_code = 69


class BoardNotOpenError(IncoError, KeyError):
    """A configured board has no open proxy now; the text says why."""

    __str__ = Exception.__str__


class ProtocolError(ProxyNotFoundError):
    """The process at a control socket is not inco-trio, or uses another version of the protocol."""


class ProgramNotFoundError(IncoError):
    """A program or library that a command needs is not installed."""

    exit_code = 69


class RecordingError(IncoError):
    """A file that should be a recording is not there, or is none."""

    exit_code = 65


class ResourceError(IncoError):
    """The system has no room now: descriptors, inotify instances or watches, memory, disk."""

    exit_code = 71


class UnknownSignalError(IncoError):
    """`Proxy.send` was given a name that is not an outbound signal of the table."""


class ClosedError(IncoError):
    """The proxy has been closed."""
