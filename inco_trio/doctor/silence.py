"""Find files that do not answer, such as those of a FUSE filesystem (fuse(4)) whose server hangs.

Calling stat(2) or open(2) on such a file blocks, and sometimes not even a signal can end the call. A process can exit
only after all its threads have ended. Therefore a child process tries the files first, and the doctor does not wait for
it to exit.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable
from pathlib import Path

from inco_trio.doctor.result import Result, fail
from inco_trio.linux.processes import lines_of

__all__ = ["silent"]

_ANSWER = 3.0
"""Timeout in seconds for the child process."""
_WAITING = re.compile(r" - (?:fuse(?!ctl)|nfs|cifs|smb3|9p|virtiofs|ceph|afs|autofs(?! systemd-1 )|vboxsf)")
"""The types of filesystems that another program or another host serves, in a line of /proc/self/mountinfo.

This excludes the automount points of systemd, which every host has for binfmt_misc.
"""


def silent(check: str, path: Path, use: Callable[[], object], *, elsewhere: bool = False) -> Result | None:
    """Return a failure of `check` if `use`, which accesses the files at `path`, would not end in time; otherwise None.

    If no mounted filesystem can keep the doctor waiting, return None without calling `use`. With `elsewhere`, the path
    leads to another mount namespace, whose filesystems are unknown.
    """
    if not elsewhere and not any(_WAITING.search(line) for line in lines_of(Path("/proc/self/mountinfo"))):
        return None
    if _ends(use):
        return None
    text = (
        f"does not answer within {_ANSWER:g} s: restart the program or host that serves its filesystem, or unmount it"
    )
    return fail(check, path, text)


def _ends(use: Callable[[], object]) -> bool:
    """Return whether a call to `use` in a child process ends in time. Ignore its result and its exceptions."""
    child = os.fork()
    if child == 0:  # pragma: no cover - coverage.py does not measure this process
        try:
            # Do not keep a copy of our output open: the reader would wait until this process ends.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            use()
        finally:
            os._exit(0)
    fd = os.pidfd_open(child)
    try:
        ended = bool(select.select([fd], [], [], _ANSWER)[0])
    finally:
        os.close(fd)
    if not ended:
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0 if ended else os.WNOHANG)
    return ended
