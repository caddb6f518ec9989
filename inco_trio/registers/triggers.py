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
from inco_trio.persist.inflight import NumberTable
from inco_trio.problems import Problems
from inco_trio.registers.directories import APPEARED, VANISHED, Directories, Directory, temporary_name, watch_key
from inco_trio.registers.refusals import UnfitFileError
from inco_trio.signals import Signal
from inco_trio.status import Counters

__all__ = ["MEANING", "RETIREMENT", "Action", "Happening", "State", "Trigger", "Triggered", "Triggers"]

logger = logging.getLogger(__name__)

_CLOSED = struct.Struct("=iIII")
_WRITTEN_AND_CLOSED = struct.Struct("=iIIIiIII")
"""One and two struct inotify_event without a name, as a watch on a file gives them."""

RETIREMENT = 1.0
"""Seconds for which the watch of a replaced trigger is kept: somebody who had it open may still close it."""


class State(enum.Enum):
    """What is known of a trigger's file."""

    KNOWN = enum.auto()
    """It is at its path, and watched."""
    MADE = enum.auto()
    """The same, and the event that tells of our making it is still to be read."""
    MISSING = enum.auto()
    """Nothing that can be watched is at its path, or nobody has looked yet."""


class Happening(enum.Enum):
    """What an event tells of a trigger."""

    CLOSED = enum.auto()
    """IN_CLOSE_WRITE of its watch, or of one that it had."""
    MADE = enum.auto()
    """IN_CREATE of its name."""
    MOVED_HERE = enum.auto()
    """IN_MOVED_TO of its name."""
    VANISHED = enum.auto()
    """IN_DELETE or IN_MOVED_FROM of its name."""
    IGNORED = enum.auto()
    """IN_IGNORED of its watch: the file is gone."""


class Action(enum.Enum):
    """What is to be done about it."""

    NOTIFY = enum.auto()
    """It is a notification."""
    LOOK = enum.auto()
    """Watch what is there now; another file than before is a notification, and one that is gone again."""
    FOLLOW = enum.auto()
    """Watch what is there now; a notification, whether it is another file or not."""
    OWN = enum.auto()
    """It tells of what we did."""
    MISS = enum.auto()
    """Look a little later: what is there now has an event of its own behind this one, which counts it."""
    NOTHING = enum.auto()


MEANING = {
    State.KNOWN: {
        Happening.CLOSED: Action.NOTIFY,
        Happening.MADE: Action.LOOK,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.MISS,
        Happening.IGNORED: Action.MISS,
    },
    State.MADE: {
        Happening.CLOSED: Action.NOTIFY,
        Happening.MADE: Action.OWN,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.MISS,
        Happening.IGNORED: Action.MISS,
    },
    State.MISSING: {
        Happening.CLOSED: Action.NOTIFY,
        Happening.MADE: Action.LOOK,
        Happening.MOVED_HERE: Action.FOLLOW,
        Happening.VANISHED: Action.NOTHING,
        Happening.IGNORED: Action.NOTHING,
    },
}
"""What each event means in each state."""


@attrs.define(eq=False)
class Trigger:
    """The file of an outbound signal."""

    directory: Directory
    register: str
    signal: Signal | None = None
    """None before it is in the table, and after."""
    wd: int = 0
    """The watch on its file; 0 is none. Only `Triggers._set_watch` gives it another one."""
    looked_in: int = 0
    """The watch of the directory in which it was found."""
    missing_since: float | None = None
    made_in: int = 0
    """The watch of the directory in which we made it, until IN_CREATE tells of that."""
    replaced: deque[int] = attrs.Factory(deque)
    """For each time that it was found to be another file: how much is to be read until no event tells of it."""
    path: Path = attrs.field(init=False)
    key: bytes = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.path = self.directory.path / self.register
        self.key = watch_key(self.path)

    def state(self, directory_wd: int) -> State:
        """The state, as an event of the watch `directory_wd` has to take it."""
        if self.made_in == directory_wd:
            return State.MADE
        return State.KNOWN if self.missing_since is None and self.looked_in == self.directory.wd else State.MISSING


@attrs.define
class Triggered:
    """What events lead to: notifications to send, and watches to note once they are sent."""

    signals: list[Signal] = attrs.Factory(list)
    watches: dict[bytes, int] = attrs.Factory(dict)
    """For `Inflight.watches`: noted earlier, a crash would lose the notification of a file that appeared."""

    def extend(self, other: Triggered) -> None:
        """Add what `other` leads to."""
        self.signals += other.signals
        self.watches |= other.watches

    def add(self, trigger: Trigger, *, note: bool = False) -> None:
        """Add one notification of `trigger`; `note` its watch, if it is another than before."""
        if trigger.signal is not None:
            self.signals.append(trigger.signal)
            if note:
                self.watches[trigger.key] = trigger.wd


class Triggers:
    """The triggers of a signal table. Everything here is immediate; nothing waits."""

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
        # Until IN_IGNORED is read: also watches of files that were replaced, and of what is not in the table any more.
        self._by_wd: dict[int, Trigger] = {}
        self._temporary = temporary_name().encode()
        self._retired: dict[int, float] = {}
        self._replaced: set[Trigger] = set()
        # What was said of each directory: a path by the reason.
        self._reasons: dict[Directory, dict[str, Path]] = {}

    # ------------------------------------------------------------------------------------------------------ table

    def add(self, directory: Directory, register: str) -> Trigger:
        """A trigger that has no signal yet: its events are followed and notify nobody."""
        trigger = Trigger(directory, register)
        self.by_path[trigger.path] = trigger
        self._in.setdefault(directory, {})[os.fsencode(register)] = trigger
        return trigger

    def keys(self) -> set[bytes]:
        """The keys of the triggers in `Inflight.watches`."""
        return {trigger.key for trigger in self.by_path.values()}

    def drop(self, trigger: Trigger) -> None:
        """A trigger that is not in the table any more: what is queued for it is nobody's."""
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
        """End the watch of a predecessor's configuration: what is queued for it is nobody's."""
        if wd not in self._by_wd:
            self._by_wd[wd] = Trigger(Directory(Path("/")), "of a predecessor")
            self._retire(wd)

    # --------------------------------------------------------------------------------------------------- watching

    def look(self, trigger: Trigger, *, make: bool) -> None:
        """Watch the file that is there now; one that is missing is made if `make`.

        If it is another file than the one that was watched, and not of our making, `replaced` says so. Raises OSError.
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
            note(wd)  # Ours, or there before it was a trigger of ours.
        else:
            trigger.replaced.append(self._inotify.read + self._inotify.queued)
            self._replaced.add(trigger)

    def _set_watch(self, trigger: Trigger, wd: int) -> None:
        """`wd` is the watch on the trigger's file."""
        owner = self._by_wd.get(wd, trigger)
        if owner is not trigger and owner.wd == wd and self.by_path.get(owner.path) is owner:
            if _same_file(owner.path, trigger.path):
                raise UnfitFileError(trigger.path, f"is the same file as {owner.path}", "remove one of the two names")
            # It was renamed from there to here.
            owner.wd = 0
            self._miss(owner)
        if trigger.wd not in (0, wd):
            self._retire(trigger.wd)
        self._by_wd[wd] = trigger
        self._retired.pop(wd, None)
        trigger.wd, trigger.looked_in, trigger.missing_since = wd, trigger.directory.wd, None

    def _retire(self, wd: int) -> None:
        self._retired[wd] = time.monotonic() + RETIREMENT
        self._directories.announce()

    def _miss(self, trigger: Trigger) -> None:
        """Look at a trigger a little later."""
        if trigger.missing_since is None:
            trigger.missing_since = time.monotonic()
            self._directories.trouble(trigger.directory)

    def _try_look(self, trigger: Trigger, *, make: bool) -> OSError | None:
        """`look`; a refusal is returned, and tried again later."""
        try:
            self.look(trigger, make=make)
        except OSError as error:
            self._miss(trigger)
            return error
        return None

    # -------------------------------------------------------------------------------------------------- following

    def follow(self, events: Iterable[Event]) -> Triggered:
        """What events lead to, in order; what nobody told of by now is added. Raises nothing."""
        triggered = Triggered()
        by_wd, signals = self._by_wd, triggered.signals
        unknown = False
        for wd, mask, name in events:
            if mask & ino.IN_CLOSE_WRITE:
                trigger = by_wd.get(wd)
                if trigger is None:
                    # Inherited from a predecessor that was killed before it noted whose watch this is.
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
            # Once for all of them: after a crash there can be hundreds.
            self._notify_all(triggered)
        if self._replaced:
            self._count_replaced(triggered)
        return triggered

    def closed_alone(self, view: memoryview, length: int) -> Signal | None:
        """The signal to send, if the `length` bytes in `view` only tell that one trigger was written and closed.

        None for everything else, which is for `follow`.
        """
        if length == _WRITTEN_AND_CLOSED.size:
            _, written, _, _, wd, mask, _, _ = _WRITTEN_AND_CLOSED.unpack_from(view)
        elif length == _CLOSED.size:
            wd, mask, _, _ = _CLOSED.unpack_from(view)
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
            trigger.made_in = 0  # The event that tells of it may be among the lost ones.
            # At once: a file that was renamed to here may have a watch that is still nobody's.
            self._try_look(trigger, make=False)
        self._directories.look_at_all()

    def _ignored(self, wd: int) -> None:
        trigger = self._by_wd.pop(wd)
        self._retired.pop(wd, None)
        self._inotify.forget(wd)
        if trigger.wd == wd:
            trigger.wd = 0
            action = MEANING[trigger.state(0)][Happening.IGNORED]
            if action is Action.MISS and self.by_path.get(trigger.path) is trigger:
                self._miss(trigger)

    def _follow_directory(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Follow an event of a directory, or of one above."""
        try:
            directory = self._directories.follow(wd, mask, name)
        except KeyError:
            if mask & APPEARED and wd not in self._by_wd:
                # In a directory that only a predecessor had seen, and that was not left out by our configuration.
                # Somebody may have written what they made there.
                for trigger in self.by_path.values():
                    if os.fsencode(trigger.register) == name:
                        triggered.add(trigger)
            return
        if directory is None:
            return
        trigger_or_none = self._in.get(directory, {}).get(name)
        if trigger_or_none is None:
            if name == self._temporary:
                directory.making_in = wd if mask & ino.IN_CREATE else 0
            return
        trigger, happening = trigger_or_none, _happening(mask)
        if wd != trigger.directory.wd:
            # In the directory that was at the path before; what is there now is looked at anyway.
            if trigger.made_in == wd and happening is Happening.MADE:
                trigger.made_in = 0
            elif happening in (Happening.MADE, Happening.MOVED_HERE):
                triggered.add(trigger)
            return
        action = MEANING[trigger.state(wd)][happening]
        if action is Action.OWN and directory.making_in != wd:
            # Somebody's file, which was gone again before ours was made: the event of that is still to come.
            if not mask & ino.IN_ISDIR:
                triggered.add(trigger)
            return
        if action is not Action.NOTHING:
            trigger.made_in = 0
        if action is Action.MISS:
            self._miss(trigger)
        elif action in (Action.LOOK, Action.FOLLOW):
            error = self._try_look(trigger, make=False)
            if another := bool(trigger.replaced):
                trigger.replaced.popleft()
            # A file of which the event tells, not the directory that may be there instead.
            gone_again = (
                error is not None
                and not mask & ino.IN_ISDIR
                and (error.errno == errno.ENOENT or _is_directory(trigger.path))
            )
            if another or gone_again or action is Action.FOLLOW:
                triggered.add(trigger, note=another)

    def _count_replaced(self, triggered: Triggered) -> None:
        """Count the triggers that turned out to be another file, and of which no event is left that may tell."""
        for trigger in tuple(self._replaced):
            while trigger.replaced and trigger.replaced[0] <= self._inotify.read:
                trigger.replaced.popleft()
                triggered.add(trigger, note=True)
            if not trigger.replaced:
                self._replaced.discard(trigger)

    # --------------------------------------------------------------------------------------------------- retrying

    def restore(self, directory: Directory) -> Iterator[float | None]:
        """Watch the missing triggers of a directory, and make them.

        Yields after each: None if it is watched now, else when to try again at the earliest (time.monotonic()).
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
        """Log what keeps triggers from being watched: once for each reason, as there may be thousands of them."""
        for reason, paths in refused.items():
            others = f" (and {len(paths) - 1} more in this directory)" if len(paths) > 1 else ""
            self._problems.failed((directory, reason), f"cannot watch: {reason}; retried", f"{paths[0]}{others}")
            self._reasons.setdefault(directory, {})[reason] = paths[0]
        for reason, path in tuple(self._reasons.get(directory, {}).items()):
            if reason not in refused:
                self._problems.well((directory, reason), path)
                del self._reasons[directory][reason]

    def expire(self) -> None:
        """End the watches of files that were replaced a while ago."""
        now = time.monotonic()
        for wd in [wd for wd, until in self._retired.items() if until <= now]:
            del self._retired[wd]
            if self._directories.watches(wd):
                del self._by_wd[wd]  # A directory of a predecessor's configuration that a reload took again.
            else:
                self._inotify.unwatch(wd)

    def next_expiry(self) -> float:
        """When `expire` has something to do (time.monotonic()); infinity for never."""
        return min(self._retired.values(), default=math.inf)

    def found(self) -> Triggered:
        """What nobody told of by now, as `follow` adds it."""
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
