"""IRQ directories: each is held open, watched for what happens to its names, and found again when it is replaced.

All that is done to its files is done relative to a descriptor of the directory. A directory that was removed belongs to
whoever removed it: it is made again only after `ABANDONED`, or by a reload.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import attrs

from inco_trio.backoff import Backoff
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Watcher
from inco_trio.persist.inflight import NumberTable
from inco_trio.problems import Problems
from inco_trio.registers.refusals import UnfitFileError

__all__ = ["ABANDONED", "EMPTIED", "PATIENCE", "Directories", "Directory", "temporary_name", "watch_key"]

PATIENCE = 0.03
"""Seconds for which a file that vanished is left to whoever replaces it: ours would be in their way."""
EMPTIED = 1.0
"""The same for an empty directory, which is probably being removed."""
ABANDONED = 60.0
"""Seconds for which a directory that was removed is left to whoever removed it."""
FALLBACK = 1.0
"""Seconds between two looks for a missing directory, in case that none above it may be watched."""

WRITE_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
FILE_MODE = 0o666 | stat.S_IFREG
TRIGGER_MASK = ino.IN_CLOSE_WRITE | ino.IN_MODIFY | ino.IN_DONT_FOLLOW
SELF_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
APPEARED = ino.IN_CREATE | ino.IN_MOVED_TO
VANISHED = ino.IN_DELETE | ino.IN_MOVED_FROM
NAMES_MASK = SELF_MASK | APPEARED | VANISHED
GONE_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_UNMOUNT | ino.IN_IGNORED

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a symlink", stat.S_IFSOCK: "a socket"}


def watch_key(path: Path) -> bytes:
    """The key of a path in `Inflight.watches`."""
    # Hexadecimal, as a key has no trailing NUL.
    return blake2b(os.fsencode(path), digest_size=32).hexdigest().encode()


def temporary_name() -> str:
    """What a trigger of our making is called before it is watched."""
    return f".inco-trio.{os.getpid()}"


@attrs.define(eq=False)
class Directory:
    """The directory at `path`; `fd` is -1 while it is not open.

    Every method raises OSError for what the kernel refuses, and UnfitFileError for what is no regular file; nothing
    waits.
    """

    path: Path
    states: set[str] = attrs.Factory(set)
    """The names of its state files."""
    fd: int = -1
    wd: int = 0
    """The watch on its names; 0 is none."""
    identity: tuple[int, int] = (0, 0)
    above: set[int] = attrs.Factory(set)
    """The watches on the directories above it."""
    opened: bool = False
    """Whether this process has opened it before."""
    awaited_in: int = 0
    """While it is missing: the watch on the directory above in which the next name on the way to it may appear."""
    missing_since: float | None = None
    """When its path was seen to lead nowhere, or to what could not be opened (time.monotonic())."""
    states_missing_since: float | None = None
    vanished_at: float = -math.inf
    """When a name in it was last seen to vanish."""
    making_in: int = 0
    """The watch whose events are being read that tell of our making a trigger: those between its temporary name's."""
    retry_at: float = math.inf
    """When to try again what could not be done in it."""
    troubled_again: bool = False
    """Whether something more could not be done while it was being tried again."""
    backoff: Backoff = attrs.Factory(Backoff)

    @property
    def current(self) -> bool:
        """Whether the path leads to the directory that is open."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - twice as fast as Path.stat, and run for every batch
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.identity

    @property
    def patience(self) -> float:
        """Seconds for which a file that vanished is left to whoever may replace it."""
        try:
            with os.scandir(self.path) as entries:
                return PATIENCE if next(entries, None) is not None else EMPTIED
        except OSError:
            return PATIENCE

    def name(self, register: str) -> str:
        """A path of a file in the open directory, wherever that is now."""
        # Without /proc the path has to do; whoever uses it looks afterwards whether the directory was replaced.
        return f"/proc/self/fd/{self.fd}/{register}" if _proc_is_there() else str(self.path / register)

    def release(self) -> None:
        """Close the directory; a watch stays, for a successor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # ----------------------------------------------------------------------------------------------- state files

    def make_state(self, register: str) -> None:
        """Make a missing state file; an existing one is left as it is. The OSError has the path."""
        try:
            # mknod, not open: nothing is closed that somebody may be watching.
            os.mknod(register, FILE_MODE, dir_fd=self.fd)
        except FileExistsError:
            pass
        except OSError as error:
            error.filename = str(self.path / register)
            raise

    def check(self, register: str) -> None:
        """Raise UnfitFileError for what is there and no regular file."""
        mode = os.stat(register, dir_fd=self.fd, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise UnfitFileError(
                self.path / register, f"is no regular file but {kind}", "remove it, or name another register"
            )

    # -------------------------------------------------------------------------------------------------- triggers

    def watch_trigger(self, register: str, inotify: Watcher) -> int:
        """Watch a trigger's file; 0 if there is none."""
        try:
            self.check(register)
            return inotify.watch(self.name(register), TRIGGER_MASK)
        except FileNotFoundError:
            return 0

    def make_trigger(self, register: str, inotify: Watcher, note: Callable[[int], None]) -> int:
        """Make a missing trigger; 0 if somebody else made it first.

        It is watched, and `note` is called with its watch descriptor, before it is visible.
        """
        temporary = temporary_name()
        self._unlink(temporary)  # A namesake may have been killed here; in a container, numbers recur.
        try:
            os.mknod(temporary, FILE_MODE, dir_fd=self.fd)
            wd = inotify.watch(self.name(temporary), TRIGGER_MASK)
            note(wd)
            try:
                os.link(temporary, register, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            except FileExistsError:
                return 0
            except OSError:
                # A filesystem without hard links: make it in place, visible an instant before it is watched.
                os.mknod(register, FILE_MODE, dir_fd=self.fd)
                note(wd := self.watch_trigger(register, inotify))
            return wd
        finally:
            self._unlink(temporary)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)


@attrs.define
class _Awaited:
    """A directory above missing ones that is watched for new names: the missing ones by the next name to them."""

    path: Path
    names: dict[bytes, set[Directory]] = attrs.Factory(dict)

    def next_name(self, directory: Directory) -> bytes:
        """The next name on the way from here to `directory`."""
        return os.fsencode(directory.path.relative_to(self.path).parts[0])


class Directories:
    """The IRQ directories of a signal table, and the watches on them and on the directories above them.

    `announce` is called when something could not be done: `troubled` then yields the directory it concerns, once its
    time has come.
    """

    def __init__(self, inotify: Watcher, noted: NumberTable, problems: Problems, announce: Callable[[], None]) -> None:
        self.by_path: dict[Path, Directory] = {}
        self._inotify = inotify
        self._noted = noted
        self._problems = problems
        self.announce = announce
        self._troubled: set[Directory] = set()
        # Until IN_IGNORED is read, which is the last event of a watch: also those that were replaced or dropped.
        self._by_wd: dict[int, Directory] = {}
        self._above: dict[int, set[Directory]] = {}
        self._awaited: dict[int, _Awaited] = {}

    # ------------------------------------------------------------------------------------------------ opening

    def add(self, path: Path) -> Directory:
        """A directory that is not open yet."""
        directory = self.by_path[path] = Directory(path)
        return directory

    def open(self, directory: Directory, *, make: bool) -> None:
        """Open the directory that the path leads to now, and watch its names and those above; `make` a missing one.

        Raises OSError, and UnfitFileError for a directory that is open already under another path.
        """
        while True:
            if make:
                directory.path.mkdir(parents=True, exist_ok=True)
            self._open(directory)
            directory.missing_since = None
            self._watch_above(directory, waiting=False)
            if directory.current:
                return
            # Replaced before all the watches stood, of which no event tells.

    def _open(self, directory: Directory) -> None:
        fd = os.open(directory.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            place = f"/proc/self/fd/{fd}/." if _proc_is_there() else str(directory.path)
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
        """Raise UnfitFileError if the watch `wd` is that of another one; one that is not at its path any more is
        lost.
        """
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
        """Watch the directories above for being moved or removed; if `waiting`, the lowest also for new names."""
        before, directory.above = directory.above, set()
        for parent in directory.path.parents:
            mask = SELF_MASK | ino.IN_MASK_ADD | (APPEARED if waiting else 0)
            try:
                wd = self._inotify.watch(str(parent), mask)
            except OSError:
                continue  # Missing too, or not readable for us; then a write notices.
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
        """`directory`, which is missing, comes back through a name that appears in `above`."""
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
        """Narrow the watch `wd`, which `path` led to, to what happens to the directory itself."""
        with contextlib.suppress(OSError):
            found = self._inotify.watch(str(path), SELF_MASK)
            if found != wd:
                self._unwatch(found)  # The path leads elsewhere by now.

    def _watches_names(self, wd: int) -> bool:
        directory = self._by_wd.get(wd)
        return directory is not None and directory.wd == wd

    def watches(self, wd: int) -> bool:
        """Whether `wd` is a watch on a directory, or on one above."""
        return self._watches_names(wd) or bool(self._above.get(wd))

    def _unwatch(self, wd: int) -> None:
        """End a watch that nothing needs any more. Its queued events still come."""
        if not self.watches(wd):
            self._above.setdefault(wd, set())
            self._inotify.unwatch(wd)

    def lose(self, directory: Directory) -> None:
        """The path does not lead to the directory any more."""
        if directory.missing_since is None:
            directory.missing_since = time.monotonic()
        directory.release()
        former, directory.wd, directory.identity = directory.wd, 0, (0, 0)
        if former:
            self._unwatch(former)
        self.trouble(directory)

    def drop(self, directory: Directory) -> None:
        """The directory is not in the table any more."""
        del self.by_path[directory.path]
        self._troubled.discard(directory)
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
        """Forget the noted watches of what is neither in the table nor of the keys `others`.

        Returns those that live on.
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
        """Follow one event; returns the directory, as it is or was, in which `name` appeared or vanished.

        Raises KeyError for a watch that is none of ours.
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
            # There may be thousands below, so that these wait for their turn.
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
        """Open the directory again if its path leads elsewhere now. What fails is said once, and tried again."""
        if not self.has(directory) or directory.current:
            return
        if newly := directory.missing_since is None:
            self.lose(directory)
        try:
            try:
                self.open(directory, make=make)
            except FileNotFoundError:
                self._watch_above(directory, waiting=True)
                # It may have come back before the watch above stood.
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
        """Have a look at each directory and its files soon: no event may tell any more."""
        for directory in self.by_path.values():
            directory.making_in = 0
            self.miss_states(directory)

    # ------------------------------------------------------------------------------------------------ retrying

    def has(self, directory: Directory) -> bool:
        """Whether it is in the table, and not one that was there before, perhaps under the same path."""
        return self.by_path.get(directory.path) is directory

    def trouble(self, directory: Directory) -> None:
        """Note that something has to be tried again in a directory, soon."""
        if not self.has(directory):
            return
        directory.retry_at = time.monotonic()
        directory.troubled_again = True
        directory.backoff.reset()
        self._troubled.add(directory)
        self.announce()

    def miss_states(self, directory: Directory) -> None:
        """Note that state files may be missing."""
        if directory.states and directory.states_missing_since is None:
            directory.states_missing_since = time.monotonic()
        self.trouble(directory)

    def due(self) -> Iterator[Directory]:
        """The directories in which something is to be tried again now; to be followed by `retried`."""
        now = time.monotonic()
        for directory in tuple(self._troubled):
            if directory.retry_at <= now and self.has(directory):
                directory.troubled_again = False
                yield directory

    def next_retry(self) -> float:
        """When something is to be tried again (time.monotonic()); infinity for never."""
        return min((directory.retry_at for directory in self._troubled), default=math.inf)

    def retried(self, directory: Directory, earliest: float | None, spent: float) -> None:
        """Note that all was tried, in `spent` seconds, and when to do so again; None if nothing is left."""
        if directory.troubled_again:
            # It may concern what had had its turn.
            directory.retry_at = time.monotonic() + directory.backoff.next()
        elif earliest is None:
            self._troubled.discard(directory)
            directory.retry_at = math.inf
        else:
            # Whatever is tried for ever takes a tenth of the time at most.
            pause = max(directory.backoff.next(), min(9 * spent, FALLBACK))
            directory.retry_at = max(earliest, time.monotonic() + pause)

    def restore(self, directory: Directory) -> float | None:
        """Try to open a directory, and to make its missing state files.

        Returns None if nothing is left, else when to try again at the earliest (time.monotonic()).
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
        """Close the directories. Watches stay, for a successor that inherits them."""
        for directory in self.by_path.values():
            directory.release()


def _proc_is_there() -> bool:
    return os.path.exists("/proc/self/fd")  # noqa: PTH110 - for every file that is watched
