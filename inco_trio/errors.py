"""The errors of inco-trio. The message of an error is "SUBJECT: REASON", where the subject is the object that failed.

Most errors also derive from a built-in class. Invalid frames from core 1 raise no error: the proxy counts them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable

__all__ = [
    "BoardNotOpenError",
    "ClosedError",
    "ConfigError",
    "IncoError",
    "InvalidArgumentError",
    "LinkNotFoundError",
    "PermissionDeniedError",
    "ProgramNotFoundError",
    "ProtocolError",
    "ProxyNotFoundError",
    "RecordingError",
    "ResourceError",
    "UnavailableError",
    "UnknownSignalError",
    "from_os_error",
    "unwrapped",
]

STRERROR = "{strerror}"
"""Placeholder for the kernel's error text in the reasons of `from_os_error`."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class IncoError(Exception):
    """Base class of all errors: `IncoError(subject, reason)` or `IncoError(reason)`. The message ends with `remedy`."""

    def __init__(self, subject: object, reason: str | None = None, remedy: str | None = None) -> None:
        self.subject, self.reason = ("", str(subject)) if reason is None else (str(subject), reason)
        self.remedy = remedy
        text = self.reason if remedy is None else f"{self.reason}; {remedy}"
        super().__init__(f"{self.subject}: {text}" if self.subject else text)
        self.problems: tuple[str, ...] = (str(self),)
        """The message, with one line for each mistake. A path in a line may contain line breaks."""


class InvalidArgumentError(IncoError, ValueError):
    """An argument is invalid, either always or in the object's current state."""


class ConfigError(IncoError, ValueError):
    """The configuration is invalid: `ConfigError(subject, reasons)`, or `ConfigError(reason)`.

    `problems` has one line for each mistake. Each line starts with the subject (usually a path) and the key path.
    """

    def __init__(self, subject: str | os.PathLike[str], reasons: str | Iterable[str] | None = None) -> None:
        if reasons is None:
            subject, reasons = "", str(subject)
        lines = [reasons] if isinstance(reasons, str) else list(reasons)
        super().__init__(subject, "\n".join(lines))
        self.problems = tuple(f"{subject}: {line}" if subject else line for line in lines)
        self.args = ("\n".join(self.problems),)


class PermissionDeniedError(IncoError, PermissionError):
    """A capability or a file permission is missing; the error message names it."""


class UnavailableError(IncoError):
    """A link, proxy, broker or program does not exist or does not answer."""


class LinkNotFoundError(UnavailableError, FileNotFoundError):
    """The link does not exist, or cannot be used at the moment."""


class ProxyNotFoundError(UnavailableError, FileNotFoundError):
    """No proxy is running: none answers on a control socket, or none has created the IRQ directory."""


class ProtocolError(ProxyNotFoundError):
    """The process at a control socket is not inco-trio, or uses another version of the protocol."""


class BoardNotOpenError(UnavailableError, KeyError):
    """A configured board has no open proxy at the moment."""

    __str__ = Exception.__str__


class ProgramNotFoundError(UnavailableError, FileNotFoundError):
    """A program or library is not installed."""


class RecordingError(IncoError):
    """A recording is missing, or the file is not a recording."""


class ResourceError(IncoError):
    """A system limit has been reached: descriptors, inotify instances or watches, memory, or disk space."""


class UnknownSignalError(IncoError, LookupError):
    """The signal table has no signal with this name and direction."""


class ClosedError(IncoError):
    """The proxy has been closed."""


def from_os_error(
    error: OSError,
    subject: object,
    reason: str = STRERROR,
    *cases: tuple[Collection[int], type[IncoError], str],
    otherwise: type[IncoError] = ResourceError,
) -> IncoError:
    """Return the IncoError for an OSError.

    Each case consists of error numbers and the class and reason to use for them. For other error numbers, return an
    error with `reason`: a PermissionDeniedError if the kernel denied access, otherwise an error of the class
    `otherwise`.
    """
    if error.errno == errno.EMFILE and error.filename == "inotify":
        # inotify_init(2) fails with EMFILE for either of two limits, but the kernel's message mentions only open files.
        what = "" if subject == "inotify" else "inotify: "
        return ResourceError(subject, f"{what}limit reached: raise fs.inotify.max_user_instances or ulimit -n")
    kind, text = (PermissionDeniedError, reason) if error.errno in DENIED else (otherwise, reason)
    for numbers, its_kind, its_reason in reversed(cases):
        if error.errno in numbers:
            kind, text = its_kind, its_reason
    return kind(subject, text.replace(STRERROR, error.strerror or str(error)))


def unwrapped(error: BaseException, *, only: bool = False) -> BaseException:
    """Return the KeyboardInterrupt in nested groups, or else the first error.

    With `only`, do not unwrap a group that contains several errors.
    """
    while isinstance(error, BaseExceptionGroup) and not (only and len(error.exceptions) > 1):
        error = (error.subgroup(KeyboardInterrupt) or error).exceptions[0]
    return error
