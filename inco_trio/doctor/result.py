"""The result of a check."""

from __future__ import annotations

import enum
import os
import shlex
from pathlib import Path

import attrs

__all__ = ["Level", "Result", "fail", "ok", "permit", "warn"]


class Level(enum.IntEnum):
    """How bad a result is; a greater level is worse."""

    OK = 0
    WARN = 1
    """Notifications may be late, duplicate or lost, or the check was not possible."""
    FAIL = 2
    """Notifications do not arrive, or a proxy could not start."""


@attrs.frozen
class Result:
    """The result of one check."""

    level: Level
    check: str
    """The name of the check, for scripts."""
    subject: str
    """The interface, path or setting."""
    found: str
    fix: str | None = None
    """The command that fixes the problem, for root where needed. If None, `found` says what to do."""

    def as_dict(self) -> dict[str, str | None]:
        """Return the JSON object of the result."""
        return {
            "level": self.level.name.lower(),
            "check": self.check,
            "subject": self.subject,
            "found": self.found,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        """Return all but the level in one line."""
        return f"{self.subject}: {self.found}" + ("" if self.fix is None else f": run: {self.fix}")


def ok(check: str, subject: object, found: str) -> Result:
    """Return a result without a problem."""
    return Result(Level.OK, check, str(subject), found)


def warn(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    """Return a result of `Level.WARN`."""
    return Result(Level.WARN, check, str(subject), found, fix)


def fail(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    """Return a result of `Level.FAIL`."""
    return Result(Level.FAIL, check, str(subject), found, fix)


def permit(path: Path, mode: str) -> str:
    """Return the command that gives this user access to `path`: chmod(1) with `mode` for its owner, else chown(1)."""
    quoted, uid = shlex.quote(str(path)), os.geteuid()
    try:
        owned = path.lstat().st_uid == uid
    except OSError:
        owned = False  # The path has just been removed.
    return f"chmod {mode} {quoted}" if owned else f"chown {uid} {quoted}"
