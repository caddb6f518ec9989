"""The exit codes of errors (sysexits.h), and the exception for an invalid command line."""

from __future__ import annotations

from inco_trio.errors import (
    ConfigError,
    IncoError,
    InvalidArgumentError,
    PermissionDeniedError,
    RecordingError,
    ResourceError,
    UnavailableError,
)

EXIT_INTERNAL = 70


class UsageError(IncoError):
    """The error for an invalid command line."""


CODES: dict[type[IncoError], int] = {
    UsageError: 2,
    InvalidArgumentError: 2,
    RecordingError: 65,
    UnavailableError: 69,
    ResourceError: 71,
    PermissionDeniedError: 77,
    ConfigError: 78,
}


def exit_code(error: IncoError) -> int:
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), EXIT_INTERNAL)
