"""The errors of registers that cannot be opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from inco_trio.errors import STRERROR, ConfigError, IncoError, PermissionDeniedError, from_os_error

__all__ = ["UnfitFileError", "refusal"]

_MISPLACED = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL)


class UnfitFileError(OSError):
    """A file or directory exists, but is not what the configuration needs."""

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))
        self.remedy = remedy


def refusal(error: OSError, what: object) -> IncoError:
    """Return our error for one of the kernel's; `what` names the object if the error does not."""
    named = error.filename is not None and not str(error.filename).startswith("/proc/self/fd/")
    subject = error.filename if named else str(what)
    if isinstance(error, UnfitFileError):
        return ConfigError(subject, f"{error.strerror}: {error.remedy}")
    needed = f"uid {os.geteuid()} needs to read triggers, write state files and write their directory"
    return from_os_error(
        error,
        subject,
        STRERROR,
        ((errno.EACCES, errno.EPERM), PermissionDeniedError, f"{STRERROR}: {needed} (or CAP_DAC_OVERRIDE)"),
        (
            _MISPLACED,
            ConfigError,
            f"{STRERROR}: the configuration has to name a directory that can be made and written",
        ),
    )
