"""Check what another user may access, for the files of a service that runs as that user."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["may_run", "unusable"]


def may_run(user: pwd.struct_passwd, *command: str | Path) -> bool:
    """Run a command as `user` and return whether it succeeds. Return True if this process cannot become the user."""
    try:
        done = subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        # subprocess names the program if execve(2) failed, but not if setreuid(2) or setgroups(2) failed.
        return not (isinstance(error, PermissionError) and error.filename == command[0])
    return done.returncode == 0


def unusable(name: str, program: Sequence[str], paths: Sequence[Path]) -> Iterator[str]:
    """Yield a warning if the user `name` may not run `program`, or may not read one of the files and directories.

    Such a service would fail at each start. Only root can check this: for other users, yield nothing.
    """
    if os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam(name)
    except (KeyError, ValueError):
        return  # A unit may be printed before its user exists.
    if program[0] == sys.executable and not may_run(user, *program, "--version"):
        remedy = "install inco-trio where all users can read it, such as /opt/inco-trio, and call that command"
        yield f"warning: {sys.prefix}: the user {name} may not run inco-trio there: {remedy}"
    for path in dict.fromkeys(paths):
        if (path.is_file() or path.is_dir()) and not may_run(user, "test", "-r", path):
            remedy = "choose a path that this user can read, or change the permissions"
            yield f"warning: {path}: the user {name} of the service may not read it: {remedy}"
