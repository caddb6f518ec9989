"""What a check returns."""

from __future__ import annotations

import enum
import os
import shlex
from pathlib import Path

import attrs

__all__ = ["Level", "Result", "fail", "ok", "permit", "warn"]


class Level(enum.IntEnum):
    """How bad it is; a greater one is worse."""

    OK = 0
    WARN = 1
    """Notifications may be late, double or lost, or it cannot be told whether they are."""
    FAIL = 2
    """Notifications do not come, or a proxy could not start."""


@attrs.frozen
class Result:
    """One thing that was looked at."""

    level: Level
    check: str
    """What was looked at, in one word for scripts."""
    subject: str
    """The interface, path or setting."""
    found: str
    fix: str | None = None
    """The command that fixes it, by root where that is needed; None where there is none: `found` says what to do."""

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        return {
            "level": self.level.name.lower(),
            "check": self.check,
            "subject": self.subject,
            "found": self.found,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        """All but the level, in one line."""
        return f"{self.subject}: {self.found}" + ("" if self.fix is None else f": run: {self.fix}")


def ok(check: str, subject: object, found: str) -> Result:
    """It is as it should be."""
    return Result(Level.OK, check, str(subject), found)


def warn(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    """See `Level.WARN`."""
    return Result(Level.WARN, check, str(subject), found, fix)


def fail(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    """See `Level.FAIL`."""
    return Result(Level.FAIL, check, str(subject), found, fix)


def permit(path: Path, mode: str) -> str:
    """The command that lets this user use what is at `path`: chmod(1) with `mode` by its owner, or else chown(1)."""
    quoted, uid = shlex.quote(str(path)), os.geteuid()
    try:
        owned = path.lstat().st_uid == uid
    except OSError:
        owned = False  # It has gone this moment.
    return f"chmod {mode} {quoted}" if owned else f"chown {uid} {quoted}"
