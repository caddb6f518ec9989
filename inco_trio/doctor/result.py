"""The result of a check."""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import attrs

from inco_trio.errors import IncoError, PermissionDeniedError

__all__ = ["Level", "Result", "fail", "hidden", "ok", "permit", "refused", "summarize", "warn"]


_HIDDEN = "permission"
"""The name of the check in results that report missing permissions."""


class Level(enum.IntEnum):
    """The severity of a result. A higher level is worse."""

    OK = 0
    WARN = 1
    """Notifications may be late, duplicated or lost, or the check could not be performed."""
    FAIL = 2
    """Notifications do not arrive, or a proxy could not start."""


@attrs.frozen
class Result:
    level: Level
    check: str
    """The name of the check, for scripts."""
    subject: str
    """The interface, path or setting that was checked."""
    found: str
    fix: str | None = None
    """The command that fixes the problem; it may need root. If it is None, `found` explains what to do."""
    ends: str | None = None
    """The subject of the results for the process that `fix` ends, which `summarize` leaves out."""

    def as_dict(self) -> dict[str, str | None]:
        return {
            "level": self.level.name.lower(),
            "check": self.check,
            "subject": self.subject,
            "found": self.found,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        """Return everything except the level in one line."""
        return f"{self.subject}: {self.found}" + ("" if self.fix is None else f": run: {self.fix}")


def ok(check: str, subject: object, found: str) -> Result:
    return Result(Level.OK, check, str(subject), found)


def warn(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    return Result(Level.WARN, check, str(subject), found, fix)


def fail(check: str, subject: object, found: str, fix: str | None = None) -> Result:
    return Result(Level.FAIL, check, str(subject), found, fix)


def hidden(what: str) -> Result:
    """Return the result of a check that this user is not permitted to perform. `summarize` merges such results."""
    return warn(_HIDDEN, "", what)


def refused(path: Path, error: IncoError) -> list[Result]:
    """Return a result for each mistake in a configuration file, or a hidden result if this user may not read it."""
    if isinstance(error, PermissionDeniedError):
        return [hidden(f"the configuration {error.subject or path}")]
    problems = [problem.removeprefix(f"{error.subject}: ") for problem in error.problems]
    return [fail("configuration", error.subject or path, problem) for problem in problems]


def summarize(results: Iterable[Result], again: str) -> list[Result]:
    """Return each result once, the worst first. Merge all results of `hidden` into one.

    `again` is the command that repeats the examination as root.
    """
    unique = list(dict.fromkeys(results))
    ended = {result.ends for result in unique}
    shown = [result for result in unique if result.check != _HIDDEN and result.subject not in ended]
    if unseen := [result.found for result in unique if result.check == _HIDDEN]:
        shown.append(warn(_HIDDEN, f"uid {os.geteuid()}", f"may not see {'; '.join(unseen)}", again))
    # A stopped proxy may continue only after the commands that end other proxies of its link.
    return sorted(shown, key=lambda each: (-each.level, each.check == "control" and "kill -CONT" in (each.fix or "")))


def permit(path: Path, mode: str, uid: int | None = None) -> str:
    """Return the command that gives a user access to `path`: chmod(1) if the user owns it, else chown(1).

    `uid` is the user (default: the user of this process).
    """
    quoted, uid = shlex.quote(str(path)), os.geteuid() if uid is None else uid
    try:
        owned = path.lstat().st_uid == uid
    except OSError:
        owned = False  # The path no longer exists.
    return f"chmod {mode} {quoted}" if owned else f"chown {uid} {quoted}"
