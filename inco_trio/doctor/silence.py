"""Find files that do not answer, such as those of a FUSE filesystem (fuse(4)) whose server hangs.

Calling stat(2) or open(2) on such a file blocks, and sometimes not even a signal can end the call. A process can exit
only after all its threads have ended. Therefore a child process tries the files first, and the doctor does not wait for
it to exit.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

from inco_trio.doctor.result import Result, fail, warn
from inco_trio.linux.processes import lines_of, wait_of

__all__ = ["silent"]

_PAUSE = 0.1
"""Pause in seconds between two looks at the child process."""
_LOOKS = 25
"""The child process hangs if this number of looks in a row find it in the same wait.

This takes less than the 3 s after which the NFS client begins a new wait for an unreachable server. On a busy host, the
child process may take longer, but it is runnable or enters further waits.
"""
_WAITS = 600
"""The doctor also gives up if this number of looks find the child process in any wait.

This limits a server that answers endlessly in small steps, and takes at least a minute. A slow server can be healthy,
so the result is only a warning. Looks that find the child process runnable do not count: the host may be busy.
"""
_CPU = 60
"""The maximum CPU time of the child process in seconds: a server may list endlessly many files."""
_HANGS = "does not answer: restart the program or host that serves its filesystem, or unmount it"
_SLOW = "not checked, because it takes longer than a minute: find out why the server of its filesystem is slow"
_KILLED = (
    "not checked, because signal {} ended the process that read it: "
    "see whether the host has too little memory, or the directory too many files"
)
_WAITING = re.compile(r" - (?:fuse(?!ctl)|nfs|cifs|smb3|9p|virtiofs|ceph|afs|autofs(?! systemd-1 )|vboxsf)")
"""The types of filesystems that another program or another host serves, in a line of /proc/self/mountinfo.

This excludes the automount points of systemd, which every host has for binfmt_misc.
"""


def silent(check: str, path: Path, use: Callable[[], object], *, elsewhere: bool = False) -> Result | None:
    """Return a failure of `check` if `use`, which accesses the files at `path`, would hang; otherwise None.

    Return a warning if `use` takes too long, or if the kernel ends the process that calls it.

    If no mounted filesystem can keep the doctor waiting, return None without calling `use`. With `elsewhere`, the path
    leads to another mount namespace, whose filesystems are unknown.
    """
    if not elsewhere and not any(_WAITING.search(line) for line in lines_of(Path("/proc/self/mountinfo"))):
        return None
    problem = _problem(use)
    return (fail if problem == _HANGS else warn)(check, path, problem) if problem else None


def _problem(use: Callable[[], object]) -> str:
    """Call `use` in a child process. Return why it does not end, or "" if it ends. Ignore its result and exceptions."""
    child = os.fork()
    if child == 0:  # pragma: no cover - coverage.py does not measure this process
        try:
            # Do not keep a copy of our output open: the reader would wait until this process ends.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            with contextlib.suppress(ValueError):  # A lower limit already applies.
                resource.setrlimit(resource.RLIMIT_CPU, (_CPU, _CPU))
            use()
        finally:
            os._exit(0)
    fd = os.pidfd_open(child)
    try:
        ended, looks, waits, before = False, 0, 0, ""
        while not ended and looks < _LOOKS and waits < _WAITS:
            ended = bool(select.select([fd], [], [], _PAUSE)[0])
            now = _wait_of(child)
            looks, before = looks + 1 if now and now == before else 0, now
            waits += bool(now)
    finally:
        os.close(fd)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = 0
    with contextlib.suppress(ChildProcessError):
        _, status = os.waitpid(child, 0 if ended else os.WNOHANG)
    if not ended:
        return _SLOW if looks < _LOOKS else _HANGS
    # The kernel kills a process that exceeds the limit of CPU time, and when the host has no memory left.
    return _KILLED.format(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ""


def _wait_of(process: int) -> str:
    """Return the number of the current wait of a process, counted from its start, or "" if it is runnable."""
    return wait_of(Path(f"/proc/{process}"))
