"""The IRQ directories of a signal table, and the watches on them.

The proxy keeps each directory open, watches it for changes to its file names, and reopens it when another process
replaces it. If another process removes a directory, the proxy recreates it after `ABANDONED` seconds or at a reload.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from inco_trio import real_clock
from inco_trio.linux import inotify as ino
from inco_trio.linux.files import mount_id
from inco_trio.linux.inotify import Watcher
from inco_trio.persist.tables import NumberTable
from inco_trio.problems import Problems
from inco_trio.registers.directory import Directory, proc_is_mounted, watch_key
from inco_trio.registers.retries import FALLBACK, Retries
from inco_trio.trust import Trust, UnfitFileError, open_trusted

__all__ = ["ABANDONED", "Directories"]

ABANDONED = 60.0
"""Seconds to wait before recreating a directory that another process removed."""

_STATES = "states"
"""(PATH, _STATES) is the key of a problem: the missing state files in the directory PATH cannot be created."""
ATTEMPTS = 4
"""Maximum number of consecutive attempts to open a directory that another process keeps replacing."""
SELF_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
ABOVE_MASK = SELF_MASK | ino.IN_ATTRIB
"""Events to watch on an ancestor. IN_ATTRIB reports a new owner or mode of the ancestor and of its entries."""
APPEARED = ino.IN_CREATE | ino.IN_MOVED_TO
VANISHED = ino.IN_DELETE | ino.IN_MOVED_FROM
NAMES_MASK = SELF_MASK | APPEARED | VANISHED | ino.IN_ATTRIB
"""Events to watch on an IRQ directory; see `_watch_attributes_only_above` for IN_ATTRIB."""
GONE_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_UNMOUNT | ino.IN_IGNORED


class _Awaited:
    """An ancestor that is watched for new entries. `names` maps each awaited entry to missing directories."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[bytes, set[Directory]] = {}

    def next_name(self, directory: Directory) -> bytes:
        """Return the next component of the path to `directory`."""
        return os.fsencode(directory.path.relative_to(self.path).parts[0])


class Directories:
    """The IRQ directories of a signal table, and the watches on them and their ancestors."""

    def __init__(
        self,
        inotify: Watcher,
        noted: NumberTable,
        problems: Problems,
        announce: Callable[[], None],
        trust: Trust | None = None,
    ) -> None:
        self.trust = trust or Trust()
        self.by_path: dict[Path, Directory] = {}
        self._inotify = inotify
        self._noted = noted
        self._problems = problems
        self.retries = Retries(announce)
        # Replaced and dropped directories stay in this dict until IN_IGNORED, the last event of a watch, is read.
        self._by_wd: dict[int, Directory] = {}
        self._above: dict[int, set[Directory]] = {}
        self._awaited: dict[int, _Awaited] = {}

    def add(self, path: Path) -> Directory:
        directory = self.by_path[path] = Directory(path)
        return directory

    def open(self, directory: Directory, *, make: bool) -> None:
        """Open the directory at its path, and watch it and its ancestors. With `make`, create a missing directory.

        Raises OSError, or UnfitFileError if the directory is already open under another path.
        """
        for _ in range(ATTEMPTS):
            self._open(directory, make=make)
            directory.missing_since = None
            self._watch_above(directory, waiting=False)
            self._watch_attributes_only_above(directory)
            if directory.current:
                return
            # Retry: the directory was replaced before all watches existed, so no event reports the replacement.
        self.trouble(directory)

    def _open(self, directory: Directory, *, make: bool) -> None:
        fd, found = open_trusted(directory.path, self.trust, make=make)
        try:
            place = f"/proc/self/fd/{fd}/." if proc_is_mounted() else str(directory.path)
            wd = self._inotify.watch(place, NAMES_MASK)
            if self._is_taken_over(directory, wd):
                wd = self._inotify.watch(place, NAMES_MASK)
        except BaseException:
            os.close(fd)
            raise
        key = watch_key(directory.path)
        former = directory.wd if directory.openings else self._noted[key]
        directory.openings += 1
        directory.release()
        directory.fd, directory.wd, directory.identity = fd, wd, (found.st_dev, found.st_ino)
        directory.devices = {found.st_dev}
        directory.found_trusted(self.trust, found)
        self._by_wd[wd] = directory
        if former not in (0, wd):
            self._by_wd.setdefault(former, directory)
            self._unwatch(former)
        self._noted[key] = wd

    def _is_taken_over(self, directory: Directory, wd: int) -> bool:
        """Return whether the directory was moved here from another path in the table. If so, end its old watch.

        Raises UnfitFileError if both paths refer to the directory.
        """
        other = self._by_wd.get(wd, directory)
        if other is not directory and other.wd == wd:
            if other.current:
                raise UnfitFileError(
                    directory.path,
                    f"the same directory as {other.path}",
                    "use one path for both; to change the path of a directory, restart the proxy",
                )
            self.lose(other)
            return True
        return False

    def _watch_above(self, directory: Directory, *, waiting: bool, refused: bool = False) -> None:
        """Watch the ancestors for moves and removals. If `waiting`, also watch the nearest one for new entries.

        If `refused`, the directory or one of its ancestors was refused, so watch only the trusted ancestors.
        """
        watch = self._watch_trusted if refused or self.trust.delegated else self._inotify.watch
        before, directory.above = directory.above, set()
        for parent in directory.path.parents:
            mask = ABOVE_MASK | ino.IN_MASK_ADD | (APPEARED if waiting else 0)
            try:
                wd = watch(str(parent), mask)
            except OSError:
                continue  # This ancestor is missing or unreadable. Only a failed write will show that it was moved.
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

    def _watch_attributes_only_above(self, directory: Directory) -> None:
        """Stop watching for new attributes in the directory, if a watch above it reports those of the directory itself.

        With IN_ATTRIB, the kernel looks up this watch whenever a file in the directory is opened, written or closed.
        This takes 0.3 us for each notification, unless the kernel does so anyway for the watch of an application.
        """
        if self._above.get(directory.wd):
            return  # The directory is an ancestor of another one.
        with contextlib.suppress(OSError):
            if Path(f"/proc/self/fd/{directory.fd}").readlink() != directory.path:
                return  # The path contains a symlink, so an event above it would contain another name.
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
            try:
                if mount_id(above) != mount_id(directory.fd):
                    return  # The directory is the root of a mount, so no event above it reports its attributes.
                wd = self._inotify.watch(f"/proc/self/fd/{above}/.", ABOVE_MASK | ino.IN_MASK_ADD)
            finally:
                os.close(above)
            if wd not in directory.above:
                self._unwatch(wd)
            else:
                self._inotify.watch(directory.name("."), NAMES_MASK & ~ino.IN_ATTRIB)

    def _watch_trusted(self, path: str, mask: int) -> int:
        """Watch an ancestor without blocking on another user's FUSE filesystem. Raises OSError."""
        with self._opened(path) as place:
            return self._inotify.watch(place, mask)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[str]:
        """Open a trusted ancestor, and yield a path to it that stays valid if the ancestor is moved."""
        fd, _ = open_trusted(Path(path), self.trust, ancestor=True)
        try:
            yield f"/proc/self/fd/{fd}/." if proc_is_mounted() else path
        finally:
            os.close(fd)

    def _await(self, directory: Directory, wd: int, above: Path) -> None:
        """Make `follow` open a missing directory when the next component of its path appears in `above`."""
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
        """Restrict the watch `wd` on the directory `path` to the events in ABOVE_MASK."""
        with contextlib.suppress(OSError), self._opened(str(path)) as place:
            # IN_MASK_ADD: the path may now refer to a different directory, which is watched for more events.
            found = self._inotify.watch(place, ABOVE_MASK | ino.IN_MASK_ADD)
            if found == wd:
                self._inotify.watch(place, ABOVE_MASK)
            else:
                self._unwatch(found)

    def _watches_names(self, wd: int) -> bool:
        directory = self._by_wd.get(wd)
        return directory is not None and directory.wd == wd

    def watches(self, wd: int) -> bool:
        """Return whether `wd` watches an IRQ directory or an ancestor of one."""
        return self._watches_names(wd) or bool(self._above.get(wd))

    def _unwatch(self, wd: int) -> None:
        """End a watch unless it is still needed. Events that are already queued will still be handled."""
        if not self.watches(wd):
            self._above.setdefault(wd, set())
            self._inotify.unwatch(wd)

    def lose(self, directory: Directory) -> None:
        """Close a directory that is no longer at its path, and schedule an attempt to open the path again."""
        if directory.missing_since is None:
            directory.missing_since = real_clock.monotonic()
        directory.release()
        directory.openings += 1
        former, directory.wd, directory.identity = directory.wd, 0, (0, 0)
        if former:
            self._unwatch(former)
        self.trouble(directory)

    def drop(self, directory: Directory) -> None:
        del self.by_path[directory.path]
        self.retries.discard(directory)
        self._problems.forget(directory.path)
        directory.missing_since = None
        self._await_no_more(directory)
        directory.release()
        former, directory.wd = directory.wd, 0
        if former and self._above.get(former):  # The directory is also an ancestor of another directory in the table.
            self._watch_only_self(directory.path, former)
        elif former:
            self._unwatch(former)
        for wd in directory.above:
            self._above[wd].discard(directory)
            self._unwatch(wd)

    def forget_noted(self, others: Iterable[bytes]) -> list[int]:
        """Delete stored watches that neither the table nor `others` needs. Return the ones to remove from inotify."""
        needed = {*self.by_path, *(parent for path in self.by_path for parent in path.parents)}
        keys = {*others, *map(watch_key, needed)}
        stale = []
        for key in self._noted:
            if key not in keys:
                stale.append(self._noted[key])
                self._noted[key] = 0
        return [wd for wd in stale if not self.watches(wd)]

    def follow(self, wd: int, mask: int, name: bytes) -> Directory | None:
        """Handle an event. Return the directory where `name` changed, or None. Raises KeyError if `wd` is unknown."""
        directory, below = self._by_wd.get(wd), self._above.get(wd)
        if directory is None and below is None:
            raise KeyError(wd)
        if mask & GONE_MASK:
            if mask & ino.IN_IGNORED:
                self._by_wd.pop(wd, None)
                if directory is not None and directory.wd == wd:
                    directory.wd = 0
                for other in self._above.pop(wd, ()):
                    other.above.discard(wd)
                if awaited := self._awaited.pop(wd, None):
                    for waiting in set[Directory]().union(*awaited.names.values()):
                        waiting.awaited_in = 0
                self._inotify.forget(wd)
            # Do not check the directories below it now, because there may be thousands of them.
            for other in below or ():
                self.trouble(other)
            if directory is not None:
                self.look(directory)
            return None
        if mask & ino.IN_ATTRIB:
            for other in below or ():
                if not name or os.fsdecode(name) in other.path.parts:
                    self.trouble(other)  # Check whether the path is still trusted.
            if directory is not None and not name:
                self.trouble(directory)
            return None
        if mask & APPEARED and (awaited := self._awaited.get(wd)):
            for waiting in tuple(awaited.names.get(name, ())):
                self.look(waiting)
        if mask & APPEARED and directory is not None:
            directory.checked.clear()  # A state file may have been replaced, or may have a second name.
        if mask & VANISHED and directory is not None and directory.wd == wd:
            directory.vanished_at = real_clock.monotonic()
            if os.fsdecode(name) in directory.states:
                self.miss_states(directory)
        return directory

    def look(self, directory: Directory, *, make: bool = False) -> None:
        """Reopen the directory if its path now refers to a different directory or is no longer trusted.

        Log a failure once, and schedule a retry.
        """
        if not self.has(directory) or self._is_well(directory):
            return
        if newly := directory.missing_since is None:
            self.lose(directory)
        try:
            try:
                self.open(directory, make=make)
            except FileNotFoundError:
                self._watch_above(directory, waiting=True)
                # Retry: the directory may have reappeared before its ancestor was watched.
                self.open(directory, make=make)
        except FileNotFoundError:
            if newly:
                self._problems.failed(
                    directory.path,
                    f"missing: notifications are kept until the directory reappears (recreated after {ABANDONED:.0f} s "
                    "or at SIGHUP)",
                )
            return
        except OSError as error:
            self._watch_above(directory, waiting=True, refused=isinstance(error, UnfitFileError))
            self._problems.failed(directory.path, f"cannot open: {error.strerror}; retrying")
            return
        self._problems.well(directory.path)
        self.miss_states(directory)

    def _is_well(self, directory: Directory) -> bool:
        """Return whether the path still refers to the open directory and only trusted users can change the path."""
        if directory.fd < 0 or not directory.wd:
            return False
        try:
            fd, found = open_trusted(directory.path, self.trust)
        except OSError:
            return False
        os.close(fd)
        directory.found_trusted(self.trust, found)
        return (found.st_dev, found.st_ino) == directory.identity

    def look_at_all(self) -> None:
        """Schedule a check of all directories and files, because events may have been lost."""
        for directory in self.by_path.values():
            directory.making_in = directory.any_making_in = 0
            directory.checked.clear()
            self.miss_states(directory)

    def has(self, directory: Directory) -> bool:
        """Return whether the table contains this Directory object itself, not just another one with the same path."""
        return self.by_path.get(directory.path) is directory

    def trouble(self, directory: Directory) -> None:
        """Schedule a retry of failed operations in a directory."""
        if self.has(directory):
            self.retries.add(directory)

    def miss_states(self, directory: Directory) -> None:
        """Schedule a check for missing state files."""
        if directory.states and directory.states_missing_since is None:
            directory.states_missing_since = real_clock.monotonic()
        self.trouble(directory)

    def missing_state(self, directory: Directory, register: str) -> str | None:
        """Return why a state file is missing. Return None if it exists, or if its removal has not been noticed yet."""
        if directory.states_missing_since is None or register not in directory.states:
            return None
        with contextlib.suppress(OSError):  # The next write reports other errors.
            try:
                directory.status(register)
            except FileNotFoundError:
                return self._problems.said((directory.path, _STATES)) or "the file is missing"
        return None

    def restore(self, directory: Directory) -> float | None:
        """Try to open a directory and to create its missing state files.

        Return the earliest time of the next retry (real_clock.monotonic()), or None if nothing is left to do.
        """
        now = real_clock.monotonic()
        abandoned = math.inf if directory.missing_since is None else directory.missing_since + ABANDONED
        self.look(directory, make=now >= abandoned)
        if directory.fd < 0:
            return now + FALLBACK if now >= abandoned else min(now + FALLBACK, abandoned)
        if directory.states_missing_since is None:
            return None
        recreate_at = max(directory.states_missing_since, directory.vanished_at) + directory.patience
        if now < recreate_at:
            return recreate_at
        problem = (directory.path, _STATES)
        try:
            for register in sorted(directory.states):
                directory.make_state(register)
        except OSError as error:
            self._problems.failed(problem, f"cannot create: {error.strerror}; retrying", error.filename)
            return now
        self._problems.well(problem, directory.path)
        directory.states_missing_since = None
        return None

    def close(self) -> None:
        """Close the directories. A process that inherits the inotify descriptor also inherits the watches."""
        for directory in self.by_path.values():
            directory.release()
