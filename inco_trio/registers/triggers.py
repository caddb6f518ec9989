"""Triggers: the files of outbound signals. Each is watched, and followed through every replacement.

A trigger has a watch of its own, on the file: CLOSE_WRITE is the notification, and MODIFY stands between two closes, so
that the kernel does not merge them (inotify(7)). The directory is watched only for what happens to names, because a
watch for writes would also report the state files that the proxy itself writes.

A trigger that somebody else replaces, by a rename or by making it anew, was written by them: that counts as one
notification. Files that the proxy makes are watched before they are visible, so that no write to them is missed.
"""

from __future__ import annotations

import enum
import errno
import logging
import math
import os
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, Watcher
from inco_trio.persist.tables import NumberTable
from inco_trio.problems import Problems
from inco_trio.proxy_status import Counters
from inco_trio.registers.directories import APPEARED, VANISHED, Directories
from inco_trio.registers.directory import Directory, temporary_name, watch_key
from inco_trio.registers.refusals import UnfitFileError
from inco_trio.signals import Signal

__all__ = ["MEANING", "RETIREMENT", "Action", "Happening", "State", "Trigger", "Triggered", "Triggers"]

logger = logging.getLogger(__name__)

_WRITTEN_AND_CLOSED = struct.Struct(ino.EVENT.format + ino.EVENT.format.removeprefix("="))
"""Two events without a name, as a watch on a file reports them."""

RETIREMENT = 1.0
"""Seconds for which the watch of a replaced trigger stays: a process that has it open may still close it."""


class State(enum.Enum):
    """The state of a trigger's file."""

    KNOWN = enum.auto()
    """It is at its path and watched."""
    MADE = enum.auto()
    """The same, but the event of our creating it is still unread."""
    MISSING = enum.auto()
    """Its path has no file that can be watched, or we have not looked yet."""


class Happening(enum.Enum):
    """What happened to a trigger, as an event reports it."""

    MADE = enum.auto()
    """IN_CREATE of its name."""
    MOVED_HERE = enum.auto()
    """IN_MOVED_TO of its name."""
    VANISHED = enum.auto()
    """IN_DELETE or IN_MOVED_FROM of its name, or IN_IGNORED of its watch: the file does not exist any more."""


class Action(enum.Enum):
    """The response to an event."""

    LOOK = enum.auto()
    """Watch the file at the path; a replaced file, or one that is gone already, is a notification."""
    FOLLOW = enum.auto()
    """Watch the file at the path, and send a notification."""
    OWN = enum.auto()
    """Nothing: this process caused the event."""
    MISS = enum.auto()
    """Look a little later: a file that is there now has its own event, still unread, which counts it."""
    NOTHING = enum.auto()


MEANING = {
    State.KNOWN: {
        Happening.MADE: Action.LOOK,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.MISS,
    },
    State.MADE: {
        Happening.MADE: Action.OWN,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.MISS,
    },
    State.MISSING: {
        Happening.MADE: Action.LOOK,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.NOTHING,
    },
}
"""The response to each event in each state."""


@attrs.define(eq=False)
class Trigger:
    """The file of an outbound signal."""

    directory: Directory
    register: str
    signal: Signal | None = None
    """None while it is not in the table."""
    wd: int = 0
    """The watch on its file; 0 is none. Only `Triggers._set_watch` changes it."""
    looked_in: int = 0
    """The watch of the directory in which we found it."""
    missing_since: float | None = None
    made_in: int = 0
    """The watch of the directory in which we created it, until its IN_CREATE is read."""
    replaced: deque[int] = attrs.Factory(deque)
    """For each replacement that we found: the position in the inotify stream behind which no event reports it."""
    path: Path = attrs.field(init=False)
    key: bytes = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.path = self.directory.path / self.register
        self.key = watch_key(self.path)

    def state(self, directory_wd: int) -> State:
        """Return the state for an event of the watch `directory_wd`."""
        if self.made_in == directory_wd:
            return State.MADE
        return State.KNOWN if self.missing_since is None and self.looked_in == self.directory.wd else State.MISSING


@attrs.define
class Triggered:
    """The result of events: notifications to send, and watches to store once they are sent."""

    signals: list[Signal] = attrs.Factory(list)
    watches: dict[bytes, int] = attrs.Factory(dict)
    """For `Inflight.watches`. Stored earlier, a crash would lose the notification of a file that appeared."""

    def extend(self, other: Triggered) -> None:
        """Add another result."""
        self.signals += other.signals
        self.watches |= other.watches

    def add(self, trigger: Trigger, *, note: bool = False) -> None:
        """Add one notification of `trigger`; `note` its watch if it has changed."""
        if trigger.signal is not None:
            self.signals.append(trigger.signal)
            if note:
                self.watches[trigger.key] = trigger.wd


class Triggers:
    """The triggers of a signal table. No method waits."""

    def __init__(
        self, directories: Directories, inotify: Watcher, noted: NumberTable, problems: Problems, counters: Counters
    ) -> None:
        self.by_path: dict[Path, Trigger] = {}
        self._in: dict[Directory, dict[bytes, Trigger]] = {}
        self._directories = directories
        self._inotify = inotify
        self._noted = noted
        self._problems = problems
        self._counters = counters
        # Until IN_IGNORED is read: also watches of files that were replaced, or are not in the table any more.
        self._by_wd: dict[int, Trigger] = {}
        self._temporary = temporary_name().encode()
        self._retired: dict[int, float] = {}
        self._replaced: set[Trigger] = set()
        # The problems that were logged for each directory: a path by the reason.
        self._reasons: dict[Directory, dict[str, Path]] = {}

    # ------------------------------------------------------------------------------------------------------ table

    def add(self, directory: Directory, register: str) -> Trigger:
        """Add a trigger without a signal; its events are followed, but make no notification."""
        trigger = Trigger(directory, register)
        self.by_path[trigger.path] = trigger
        self._in.setdefault(directory, {})[os.fsencode(register)] = trigger
        return trigger

    def keys(self) -> set[bytes]:
        """Return the keys of the triggers in `Inflight.watches`."""
        return {trigger.key for trigger in self.by_path.values()}

    def drop(self, trigger: Trigger) -> None:
        """Remove a trigger from the table; its queued events have no effect."""
        trigger.signal = None
        trigger.replaced.clear()
        self._replaced.discard(trigger)
        del self.by_path[trigger.path]
        del self._in[trigger.directory][os.fsencode(trigger.register)]
        if not self._in[trigger.directory]:
            del self._in[trigger.directory]
            for reason in self._reasons.pop(trigger.directory, ()):
                self._problems.forget((trigger.directory, reason))
        self._noted[trigger.key] = 0
        if trigger.wd:
            self._retire(trigger.wd)

    def ignore(self, wd: int) -> None:
        """End a watch of a predecessor's configuration; its queued events have no effect."""
        if wd not in self._by_wd:
            self._by_wd[wd] = Trigger(Directory(Path("/")), "of a predecessor")
            self._retire(wd)

    # --------------------------------------------------------------------------------------------------- watching

    def look(self, trigger: Trigger, *, make: bool) -> None:
        """Watch the file at the path; `make` a missing one.

        A file that we neither watched nor created is added to `replaced`. Raises OSError.
        """
        directory, register = trigger.directory, trigger.register
        before = trigger.wd or self._noted[trigger.key]
        made = False

        def note(wd: int) -> None:
            self._noted[trigger.key] = wd

        while not (wd := directory.watch_trigger(register, self._inotify)):
            if not make:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if wd := directory.make_trigger(register, self._inotify, note):
                made = True
                trigger.made_in = directory.wd
                break
            note(before)
        self._set_watch(trigger, wd)
        if wd == before:
            return
        if before and before not in self._by_wd:
            self._by_wd[before] = trigger  # A predecessor's.
            self._retire(before)
        if made or (trigger.signal is None and not before):
            note(wd)  # We created it, or it was there before it became a trigger.
        else:
            trigger.replaced.append(self._inotify.read + self._inotify.queued)
            self._replaced.add(trigger)

    def _set_watch(self, trigger: Trigger, wd: int) -> None:
        """Set the watch on the trigger's file."""
        owner = self._by_wd.get(wd, trigger)
        if owner is not trigger and owner.wd == wd and self.by_path.get(owner.path) is owner:
            if _same_file(owner.path, trigger.path):
                raise UnfitFileError(trigger.path, f"is the same file as {owner.path}", "remove one of the two names")
            # It was renamed.
            owner.wd = 0
            self._miss(owner)
        if trigger.wd not in (0, wd):
            self._retire(trigger.wd)
        self._by_wd[wd] = trigger
        self._retired.pop(wd, None)
        trigger.wd, trigger.looked_in, trigger.missing_since = wd, trigger.directory.wd, None

    def _retire(self, wd: int) -> None:
        self._retired[wd] = time.monotonic() + RETIREMENT
        self._directories.retries.announce()

    def _miss(self, trigger: Trigger) -> None:
        """Retry a trigger a little later."""
        if trigger.missing_since is None:
            trigger.missing_since = time.monotonic()
            self._directories.trouble(trigger.directory)

    def _try_look(self, trigger: Trigger, *, make: bool) -> OSError | None:
        """Call `look`; return its error, and retry later."""
        try:
            self.look(trigger, make=make)
        except OSError as error:
            self._miss(trigger)
            return error
        return None

    # -------------------------------------------------------------------------------------------------- following

    def follow(self, events: Iterable[Event]) -> Triggered:
        """Turn events into notifications, in order. Add replaced files that no event will report. Raises nothing."""
        triggered = Triggered()
        by_wd, signals = self._by_wd, triggered.signals
        unknown = False
        for wd, mask, name in events:
            if mask & ino.IN_CLOSE_WRITE:
                trigger = by_wd.get(wd)
                if trigger is None:
                    # A predecessor was killed before it stored whose watch this is.
                    unknown = True
                elif trigger.signal is not None:
                    signals.append(trigger.signal)
            elif mask & ino.IN_MODIFY:
                continue
            elif mask & ino.IN_Q_OVERFLOW:
                self._overflowed(triggered)
            elif mask & ino.IN_IGNORED and wd in by_wd:
                self._ignored(wd)
            else:
                self._follow_directory(wd, mask, name, triggered)
        if unknown:
            # Once for all events: after a crash there can be hundreds.
            self._notify_all(triggered)
        if self._replaced:
            self._count_replaced(triggered)
        return triggered

    def closed_alone(self, view: memoryview, length: int) -> Signal | None:
        """Return the signal to send if the `length` bytes in `view` only report the write and close of one trigger.

        None for everything else, which `follow` handles.
        """
        if length == _WRITTEN_AND_CLOSED.size:
            _, written, _, _, wd, mask, _, _ = _WRITTEN_AND_CLOSED.unpack_from(view)
        elif length == ino.EVENT.size:
            wd, mask, _, _ = ino.EVENT.unpack_from(view)
            written = ino.IN_MODIFY
        else:
            return None
        if written != ino.IN_MODIFY or mask != ino.IN_CLOSE_WRITE or self._replaced:
            return None
        trigger = self._by_wd.get(wd)
        return None if trigger is None else trigger.signal

    def _notify_all(self, triggered: Triggered) -> None:
        for trigger in self.by_path.values():
            triggered.add(trigger)

    def _overflowed(self, triggered: Triggered) -> None:
        self._counters.overflowed += 1
        logger.warning(
            "the inotify queue overflowed (fs.inotify.max_queued_events): sending every trigger once",
            extra={"event": "overflow"},
        )
        self._notify_all(triggered)
        for trigger in self.by_path.values():
            trigger.made_in = 0  # The event of our creating it may be lost.
            # At once: a file that was renamed to this path may have a watch of no trigger yet.
            self._try_look(trigger, make=False)
        self._directories.look_at_all()

    def _ignored(self, wd: int) -> None:
        trigger = self._by_wd.pop(wd)
        self._retired.pop(wd, None)
        self._inotify.forget(wd)
        if trigger.wd == wd:
            trigger.wd = 0
            action = MEANING[trigger.state(0)][Happening.VANISHED]
            if action is Action.MISS and self.by_path.get(trigger.path) is trigger:
                self._miss(trigger)

    def _follow_directory(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Follow an event of a directory, or of one above it."""
        try:
            directory = self._directories.follow(wd, mask, name)
        except KeyError:
            self._follow_unknown(wd, mask, name, triggered)
            return
        if directory is None:
            return
        trigger = self._in.get(directory, {}).get(name)
        if trigger is not None:
            self._follow_trigger(trigger, wd, mask, triggered)
        elif name == self._temporary:
            directory.making_in = wd if mask & ino.IN_CREATE else 0

    def _follow_unknown(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Follow an event of a directory that only a predecessor watched, and that our configuration still has."""
        if mask & APPEARED and wd not in self._by_wd:
            # A process may have written the file that appeared.
            for trigger in self.by_path.values():
                if os.fsencode(trigger.register) == name:
                    triggered.add(trigger)

    def _follow_trigger(self, trigger: Trigger, wd: int, mask: int, triggered: Triggered) -> None:
        """Follow an event of a trigger's name."""
        directory, happening = trigger.directory, _happening(mask)
        if wd != directory.wd:
            # In the directory that the path led to before. A retry looks at the current one anyway.
            if trigger.made_in == wd and happening is Happening.MADE:
                trigger.made_in = 0
            elif happening in (Happening.MADE, Happening.MOVED_HERE):
                triggered.add(trigger)
            return
        action = MEANING[trigger.state(wd)][happening]
        if action is Action.OWN and directory.making_in != wd:
            # Another process created and deleted this file before we created ours; our IN_CREATE is still queued.
            if not mask & ino.IN_ISDIR:
                triggered.add(trigger)
            return
        if action is not Action.NOTHING:
            trigger.made_in = 0
        if action is Action.MISS:
            self._miss(trigger)
        elif action in (Action.LOOK, Action.FOLLOW):
            self._look_again(trigger, mask, triggered, always=action is Action.FOLLOW)

    def _look_again(self, trigger: Trigger, mask: int, triggered: Triggered, *, always: bool) -> None:
        """Watch the file that appeared. Another one, or one that is gone already, is a notification, or `always`."""
        error = self._try_look(trigger, make=False)
        if another := bool(trigger.replaced):
            trigger.replaced.popleft()
        # The event is of a file, not of a directory that may be there instead by now.
        gone_again = (
            error is not None
            and not mask & ino.IN_ISDIR
            and (error.errno == errno.ENOENT or _is_directory(trigger.path))
        )
        if another or gone_again or always:
            triggered.add(trigger, note=another)

    def _count_replaced(self, triggered: Triggered) -> None:
        """Add the replaced files that no unread event can report any more."""
        for trigger in tuple(self._replaced):
            while trigger.replaced and trigger.replaced[0] <= self._inotify.read:
                trigger.replaced.popleft()
                triggered.add(trigger, note=True)
            if not trigger.replaced:
                self._replaced.discard(trigger)

    # --------------------------------------------------------------------------------------------------- retrying

    def restore(self, directory: Directory) -> Iterator[float | None]:
        """Watch or create the missing triggers of a directory.

        Yields after each: None if it is watched now, else the earliest time of the next retry (time.monotonic()).
        """
        refused: dict[str, list[Path]] = {}
        patience = directory.patience
        for trigger in tuple(self._in.get(directory, {}).values()):
            now = time.monotonic()
            if trigger.missing_since is None:
                if trigger.looked_in == directory.wd:
                    continue
                trigger.missing_since = now
            if directory.fd < 0:
                return
            made_again = max(trigger.missing_since, directory.vanished_at) + patience
            error = self._try_look(trigger, make=now >= made_again)
            if error is None:
                yield None
            elif error.errno == errno.ENOENT and now < made_again:
                yield made_again
            else:
                refused.setdefault(error.strerror or "", []).append(trigger.path)
                yield now
        self._say(directory, refused)

    def _say(self, directory: Directory, refused: dict[str, list[Path]]) -> None:
        """Log why triggers cannot be watched: once for each reason, as there may be thousands of triggers."""
        for reason, paths in refused.items():
            others = f" (and {len(paths) - 1} more in this directory)" if len(paths) > 1 else ""
            self._problems.failed((directory, reason), f"cannot watch: {reason}; retried", f"{paths[0]}{others}")
            self._reasons.setdefault(directory, {})[reason] = paths[0]
        for reason, path in tuple(self._reasons.get(directory, {}).items()):
            if reason not in refused:
                self._problems.well((directory, reason), path)
                del self._reasons[directory][reason]

    def expire(self) -> None:
        """End the watches of files that were replaced `RETIREMENT` seconds ago."""
        now = time.monotonic()
        for wd in [wd for wd, until in self._retired.items() if until <= now]:
            del self._retired[wd]
            if self._directories.watches(wd):
                del self._by_wd[wd]  # A directory of a predecessor's configuration, which a reload uses again.
            else:
                self._inotify.unwatch(wd)

    def next_expiry(self) -> float:
        """Return the time for the next `expire` (time.monotonic()); infinity for never."""
        return min(self._retired.values(), default=math.inf)

    def found(self) -> Triggered:
        """Return the replaced files that no event will report, as `follow` adds them."""
        triggered = Triggered()
        self._count_replaced(triggered)
        return triggered


def _happening(mask: int) -> Happening:
    if mask & VANISHED:
        return Happening.VANISHED
    return Happening.MADE if mask & ino.IN_CREATE else Happening.MOVED_HERE


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except OSError:
        return False
