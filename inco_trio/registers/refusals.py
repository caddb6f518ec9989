"""What the kernel, or the state of a file, refuses while registers are opened: each as the error that a user meets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from inco_trio.errors import ConfigError, IncoError, PermissionDeniedError, ResourceError

__all__ = ["UnfitFileError", "refusal"]


class UnfitFileError(OSError):
    """A file or directory is there and cannot be what the configuration says: `mend` says what to do."""

    def __init__(self, path: Path, what: str, mend: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))
        self.mend = mend


def refusal(error: OSError, what: object) -> IncoError:
    """The error, with its exit code, for a refusal of the kernel; `what` names the place if the error does not."""
    named = error.filename is not None and not str(error.filename).startswith("/proc/self/fd/")
    text = f"{error.filename if named else what}: {error.strerror}"
    if isinstance(error, UnfitFileError):
        return ConfigError([f"{text}: {error.mend}"])
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(
            f"{text}: uid {os.geteuid()} needs to read triggers, write state files and write their directory "
            "(or CAP_DAC_OVERRIDE)"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL):
        return ConfigError([f"{text}: the configuration has to name a directory that can be made and written"])
    if error.errno == errno.EMFILE and error.filename == "inotify":
        # inotify_init(2) gives the same number for both.
        text = "inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n"
    return ResourceError(text)
