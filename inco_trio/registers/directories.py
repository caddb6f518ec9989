"""The IRQ directories of a signal table, and the watches on them.

Each directory is held open, watched for events of its names, and opened again when it is replaced. A directory that
another process removed is recreated only after `ABANDONED`, or by a reload.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Watcher
from inco_trio.persist.tables import NumberTable
from inco_trio.problems import Problems
from inco_trio.registers.directory import Directory, proc_is_mounted, watch_key
from inco_trio.registers.refusals import UnfitFileError
from inco_trio.registers.retries import FALLBACK, Retries

__all__ = ["ABANDONED", "Directories"]

ABANDONED = 60.0
"""Seconds until a directory that another process removed is recreated."""

SELF_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
APPEARED = ino.IN_CREATE | ino.IN_MOVED_TO
VANISHED = ino.IN_DELETE | ino.IN_MOVED_FROM
NAMES_MASK = SELF_MASK | APPEARED | VANISHED
GONE_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_UNMOUNT | ino.IN_IGNORED


@attrs.define
class _Awaited:
    """A directory that is watched for new names: `names` has the missing ones below by the next name of their path."""

    path: Path
    names: dict[bytes, set[Directory]] = attrs.Factory(dict)

    def next_name(self, directory: Directory) -> bytes:
        """Return the next name on the path to `directory`."""
        return os.fsencode(directory.path.relative_to(self.path).parts[0])


class Directories:
    """The IRQ directories of a signal table, and the watches on them and on the directories above them.

    `retries` has the directories in which something failed; it calls `announce` for a new one.
    """

    def __init__(self, inotify: Watcher, noted: NumberTable, problems: Problems, announce: Callable[[], None]) -> None:
        self.by_path: dict[Path, Directory] = {}
        self._inotify = inotify
        self._noted = noted
        self._problems = problems
        self.retries = Retries(announce)
        # Until IN_IGNORED, the last event of a watch, is read: also directories that were replaced or dropped.
        self._by_wd: dict[int, Directory] = {}
        self._above: dict[int, set[Directory]] = {}
        self._awaited: dict[int, _Awaited] = {}

    # ------------------------------------------------------------------------------------------------ opening

    def add(self, path: Path) -> Directory:
        """Add a directory that is not open yet."""
        directory = self.by_path[path] = Directory(path)
        return directory

    def open(self, directory: Directory, *, make: bool) -> None:
        """Open the directory at the path, and watch it and those above; `make` a missing one.

        Raises OSError, and UnfitFileError for a directory that is already open under another path.
        """
        while True:
            if make:
                directory.path.mkdir(parents=True, exist_ok=True)
            self._open(directory)
            directory.missing_since = None
            self._watch_above(directory, waiting=False)
            if directory.current:
                return
            # Replaced before all watches existed, so no event reports it.

    def _open(self, directory: Directory) -> None:
        fd = os.open(directory.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            place = f"/proc/self/fd/{fd}/." if proc_is_mounted() else str(directory.path)
            wd = self._inotify.watch(place, NAMES_MASK)
            self._check_only_one(directory, wd)
        except BaseException:
            os.close(fd)
            raise
        key = watch_key(directory.path)
        former = directory.wd if directory.opened else self._noted[key]
        directory.opened = True
        directory.release()
        directory.fd, directory.wd, directory.identity = fd, wd, (found.st_dev, found.st_ino)
        self._by_wd[wd] = directory
        if former not in (0, wd):
            self._by_wd.setdefault(former, directory)
            self._unwatch(former)
        self._noted[key] = wd

    def _check_only_one(self, directory: Directory, wd: int) -> None:
        """Raise UnfitFileError if another directory has the watch `wd`; lose that one if it has left its path."""
        other = self._by_wd.get(wd, directory)
        if other is not directory and other.wd == wd:
            if other.current:
                raise UnfitFileError(
                    directory.path,
                    f"is the same directory as {other.path}",
                    "name it by one path only; another than before takes a restart",
                )
            self.lose(other)

    def _watch_above(self, directory: Directory, *, waiting: bool) -> None:
        """Watch the directories above for moves and removals; if `waiting`, the lowest one also for new names."""
        before, directory.above = directory.above, set()
        for parent in directory.path.parents:
            mask = SELF_MASK | ino.IN_MASK_ADD | (APPEARED if waiting else 0)
            try:
                wd = self._inotify.watch(str(parent), mask)
            except OSError:
                continue  # Missing too, or not readable; then a failed write notices.
            if waiting:
                self._await(directory, wd, parent)
                waiting = False
            directory.above.add(wd)
            self._above.setdefault(wd, set()).add(directory)
            if parent not in self.by_path:
                self._noted[watch_key(parent)] = wd
        for wd in before - directory.above:
            self._above[wd].discard(directory)
            self._unwatch(wd)
        if directory.missing_since is None:
            self._await_no_more(directory)

    def _await(self, directory: Directory, wd: int, above: Path) -> None:
        """Wait for a missing directory to reappear through a new name in `above`."""
        if directory.awaited_in == wd:
            return
        self._await_no_more(directory)
        awaited = self._awaited.setdefault(wd, _Awaited(above))
        awaited.names.setdefault(awaited.next_name(directory), set()).add(directory)
        directory.awaited_in = wd

    def _await_no_more(self, directory: Directory) -> None:
        wd, directory.awaited_in = directory.awaited_in, 0
        awaited = self._awaited.get(wd)
        if awaited is None:
            return
        name = awaited.next_name(directory)
        awaited.names[name].discard(directory)
        if not awaited.names[name]:
            del awaited.names[name]
        if not awaited.names:
            del self._awaited[wd]
            if not self._watches_names(wd):
                self._watch_only_self(awaited.path, wd)

    def _watch_only_self(self, path: Path, wd: int) -> None:
        """Restrict the watch `wd`, of `path`, to events of the directory itself."""
        with contextlib.suppress(OSError):
            found = self._inotify.watch(str(path), SELF_MASK)
            if found != wd:
                self._unwatch(found)  # The path leads to another directory now.

    def _watches_names(self, wd: int) -> bool:
        directory = self._by_wd.get(wd)
        return directory is not None and directory.wd == wd

    def watches(self, wd: int) -> bool:
        """Return whether `wd` is a watch on a directory or on one above."""
        return self._watches_names(wd) or bool(self._above.get(wd))

    def _unwatch(self, wd: int) -> None:
        """End a watch that is not used any more. Its queued events are still read."""
        if not self.watches(wd):
            self._above.setdefault(wd, set())
            self._inotify.unwatch(wd)

    def lose(self, directory: Directory) -> None:
        """Close a directory that is not at its path any more, and retry."""
        if directory.missing_since is None:
            directory.missing_since = time.monotonic()
        directory.release()
        former, directory.wd, directory.identity = directory.wd, 0, (0, 0)
        if former:
            self._unwatch(former)
        self.trouble(directory)

    def drop(self, directory: Directory) -> None:
        """Remove a directory from the table."""
        del self.by_path[directory.path]
        self.retries.discard(directory)
        self._problems.forget(directory.path)
        directory.missing_since = None
        self._await_no_more(directory)
        directory.release()
        former, directory.wd = directory.wd, 0
        if former and self._above.get(former):
            self._watch_only_self(directory.path, former)  # Still above another one.
        elif former:
            self._unwatch(former)
        for wd in directory.above:
            self._above[wd].discard(directory)
            self._unwatch(wd)

    def forget_noted(self, others: Iterable[bytes]) -> list[int]:
        """Forget the stored watches of paths that are neither in the table nor have a key in `others`.

        Return those that the kernel still has.
        """
        needed = {*self.by_path, *(parent for path in self.by_path for parent in path.parents)}
        keys = {*others, *map(watch_key, needed)}
        stale = []
        for key in self._noted:
            if key not in keys:
                stale.append(self._noted[key])
                self._noted[key] = 0
        return [wd for wd in stale if not self.watches(wd)]

    # ----------------------------------------------------------------------------------------------- following

    def follow(self, wd: int, mask: int, name: bytes) -> Directory | None:
        """Follow one event; return the directory in which `name` appeared or vanished.

        Raises KeyError for an unknown watch.
        """
        directory, below = self._by_wd.get(wd), self._above.get(wd)
        if directory is None and below is None:
            raise KeyError(wd)
        if mask & GONE_MASK:
            if mask & ino.IN_IGNORED:
                self._by_wd.pop(wd, None)
                for other in self._above.pop(wd, ()):
                    other.above.discard(wd)
                if awaited := self._awaited.pop(wd, None):
                    for waiting in set[Directory]().union(*awaited.names.values()):
                        waiting.awaited_in = 0
                self._inotify.forget(wd)
            # There may be thousands below, so they are only scheduled.
            for other in below or ():
                self.trouble(other)
            if directory is not None:
                self.look(directory)
            return None
        if mask & APPEARED and (awaited := self._awaited.get(wd)):
            for waiting in tuple(awaited.names.get(name, ())):
                self.look(waiting)
        if mask & VANISHED and directory is not None and directory.wd == wd:
            directory.vanished_at = time.monotonic()
            if os.fsdecode(name) in directory.states:
                self.miss_states(directory)
        return directory

    def look(self, directory: Directory, *, make: bool = False) -> None:
        """Open the directory again if its path leads elsewhere. Log a failure once, and retry."""
        if not self.has(directory) or directory.current:
            return
        if newly := directory.missing_since is None:
            self.lose(directory)
        try:
            try:
                self.open(directory, make=make)
            except FileNotFoundError:
                self._watch_above(directory, waiting=True)
                # It may have reappeared before the watch above existed.
                self.open(directory, make=make)
        except FileNotFoundError:
            if newly:
                self._problems.failed(
                    directory.path,
                    f"is missing: its notifications are kept until it is back; made again after {ABANDONED:.0f} s, or "
                    "at SIGHUP",
                )
            return
        except OSError as error:
            self._watch_above(directory, waiting=True)
            self._problems.failed(directory.path, f"cannot be opened: {error.strerror}; retried")
            return
        self._problems.well(directory.path)
        self.miss_states(directory)

    def look_at_all(self) -> None:
        """Check all directories and files soon: events may be lost."""
        for directory in self.by_path.values():
            directory.making_in = 0
            self.miss_states(directory)

    # ------------------------------------------------------------------------------------------------ retrying

    def has(self, directory: Directory) -> bool:
        """Return whether it is in the table; a former directory of the same path is not."""
        return self.by_path.get(directory.path) is directory

    def trouble(self, directory: Directory) -> None:
        """Retry in a directory soon."""
        if self.has(directory):
            self.retries.add(directory)

    def miss_states(self, directory: Directory) -> None:
        """Check soon whether state files are missing."""
        if directory.states and directory.states_missing_since is None:
            directory.states_missing_since = time.monotonic()
        self.trouble(directory)

    def restore(self, directory: Directory) -> float | None:
        """Try to open a directory and to create its missing state files.

        Return None if nothing is left to do, else the earliest time of the next retry (time.monotonic()).
        """
        now = time.monotonic()
        abandoned = math.inf if directory.missing_since is None else directory.missing_since + ABANDONED
        self.look(directory, make=now >= abandoned)
        if directory.fd < 0:
            return now + FALLBACK if now >= abandoned else min(now + FALLBACK, abandoned)
        if directory.states_missing_since is None:
            return None
        made_again = max(directory.states_missing_since, directory.vanished_at) + directory.patience
        if now < made_again:
            return made_again
        problem = (directory.path, "states")
        try:
            for register in sorted(directory.states):
                directory.make_state(register)
        except OSError as error:
            self._problems.failed(problem, f"cannot be made: {error.strerror}; retried", error.filename)
            return now
        self._problems.well(problem, directory.path)
        directory.states_missing_since = None
        return None

    def close(self) -> None:
        """Close the directories. Watches stay for a successor that inherits them."""
        for directory in self.by_path.values():
            directory.release()
