"""Errors for registers that cannot be opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from inco_trio.errors import STRERROR, ConfigError, IncoError, PermissionDeniedError, from_os_error
from inco_trio.linux.files import pinned
from inco_trio.trust import UnfitFileError

__all__ = ["refusal"]

_MISPLACED = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL)


def refusal(error: OSError, what: object, *, is_directory: bool = False) -> IncoError:
    """Convert an OSError to an IncoError. `what` is the subject if the error contains no file name.

    With `is_directory`, `what` is the path of an IRQ directory, which may be missing.
    """
    named = error.filename is not None and not str(error.filename).startswith("/proc/self/fd/")
    subject = error.filename if named else str(what)
    if isinstance(error, UnfitFileError):
        return ConfigError(subject, f"{error.strerror} ({error.remedy})")
    # For other errors, do not inspect the path: lstat(2) could block on a FUSE filesystem.
    needed = _needed(what, is_directory) if error.errno in (errno.EACCES, errno.EPERM) else ""
    denied = ((errno.EACCES, errno.EPERM), PermissionDeniedError, f"{STRERROR}: {needed}")
    misplaced = (_MISPLACED, ConfigError, f"{STRERROR} (configure a directory that can be created and written)")
    return from_os_error(error, subject, STRERROR, denied, misplaced)


def _needed(what: object, is_directory: bool) -> str:
    """Describe the permission that this user lacks, and how to grant it. See `refusal` for the arguments."""
    uid = os.geteuid()
    if is_directory and _is_missing(Path(str(what))):
        import shlex

        command = f"install -d -o {uid} -g {os.getegid()} {shlex.quote(str(what))}"
        return f"uid {uid} may not create {what} (run as root at each boot: {command})"
    needed = "must be able to read triggers and to write state files and their directory"
    return f"uid {uid} {needed} (or have CAP_DAC_OVERRIDE)"


def _is_missing(path: Path) -> bool:
    try:
        with pinned(path, follow=False):
            return False
    except FileNotFoundError:
        return True
    except OSError:
        return False
