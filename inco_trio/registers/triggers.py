"""Triggers: the files of outbound signals. The proxy watches each file and follows every replacement.

Each trigger has its own watch. IN_CLOSE_WRITE counts as a notification. IN_MODIFY is watched because it separates two
IN_CLOSE_WRITE events, which the kernel would otherwise merge (inotify(7)). The directory is watched only for changes to
file names: a watch for writes would also report the state files that the proxy writes.

If another process replaces a trigger, by a rename or by recreating the file, this counts as one notification. When the
proxy creates a trigger, it watches the file before the file becomes visible, so that no write is missed.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from inco_trio import real_clock
from inco_trio.counters import Counters
from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Event, Watcher
from inco_trio.persist.queue import LOST_WATCH
from inco_trio.persist.tables import NumberTable
from inco_trio.problems import Problems, report
from inco_trio.registers.directories import APPEARED, VANISHED, Directories
from inco_trio.registers.directory import TEMPORARY, Directory, temporary_name, watch_key
from inco_trio.signals import Signal
from inco_trio.trust import UnfitFileError

__all__ = ["RETIREMENT", "Trigger", "Triggered", "Triggers"]

logger = logging.getLogger(__name__)

_WRITTEN_AND_CLOSED = struct.Struct(ino.EVENT.format + ino.EVENT.format.removeprefix("="))
"""Layout of two inotify events without names: IN_MODIFY and IN_CLOSE_WRITE of the same file."""
RETIREMENT = 1.0
"""How long (seconds) to keep watching the old file of a replaced trigger: a process may still have it open."""


class Trigger:
    """The file of an outbound signal."""

    def __init__(self, directory: Directory, register: str) -> None:
        self.directory = directory
        self.register = register
        self.signal: Signal | None = None
        """The signal, or None while the trigger is not in the table."""
        self.wd = 0
        """The watch descriptor of the file, or 0."""
        self.looked_at = 0
        """`openings` of the directory when the file was last found, or 0."""
        self.missing_since: float | None = None
        self.made_in = 0
        """The watch descriptor of the directory in which the proxy created the file, or 0 after IN_CREATE was read."""
        self.made = 0
        """How often the proxy has created the file in `made_in` without having read IN_CREATE."""
        self.inherited_made_in = 0
        """Like `made_in`, but for a file that an earlier process created."""
        self.replaced: deque[int] = deque()
        """For each detected replacement, the byte position in the inotify stream after which no event can report it."""
        self.path = directory.path / register
        self.key = watch_key(self.path)
        self.made_key = b"+" + self.key[1:]
        """The key under which `Inflight.watches` stores `made_in`. No watch has this key."""


class Triggered:
    """Notifications to send, and watches to store after the notifications have been sent."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self.watches: dict[bytes, int] = {}
        """Entries to store in `Inflight.watches` after sending: otherwise, a crash could lose notifications."""

    def extend(self, other: Triggered) -> None:
        self.signals += other.signals
        self.watches |= other.watches

    def add(self, trigger: Trigger, *, note: bool = False) -> None:
        """Add one notification of `trigger` to `signals`. With `note`, also add the trigger's watch to `watches`."""
        if trigger.signal is not None:
            self.signals.append(trigger.signal)
            if note:
                self.watches[trigger.key] = trigger.wd


class Triggers:
    """The triggers of a signal table. No method blocks."""

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
        # Watches of replaced and removed triggers stay in this dict until IN_IGNORED is read.
        self._by_wd: dict[int, Trigger] = {}
        self._temporary, self._temporaries = temporary_name().encode(), TEMPORARY.encode()
        self._retired: dict[int, float] = {}
        self._replaced: set[Trigger] = set()
        # For each directory, the logged reasons why triggers cannot be watched, each with the path of one trigger.
        self._reasons: dict[Directory, dict[str, Path]] = {}

    def add(self, directory: Directory, register: str) -> Trigger:
        """Add a trigger without a signal. Its events are handled but cause no notification."""
        trigger = Trigger(directory, register)
        trigger.inherited_made_in = self._noted[trigger.made_key]
        self.by_path[trigger.path] = trigger
        self._in.setdefault(directory, {})[os.fsencode(register)] = trigger
        return trigger

    def keys(self) -> set[bytes]:
        """Return the keys of all entries in `Inflight.watches` that the triggers use."""
        return {key for trigger in self.by_path.values() for key in (trigger.key, trigger.made_key)}

    def drop(self, trigger: Trigger) -> None:
        """Remove a trigger from the table. Its events that are already queued have no effect."""
        trigger.signal = None
        trigger.replaced.clear()
        self._replaced.discard(trigger)
        del self.by_path[trigger.path]
        del self._in[trigger.directory][os.fsencode(trigger.register)]
        if not self._in[trigger.directory]:
            del self._in[trigger.directory]
            for reason in self._reasons.pop(trigger.directory, ()):
                self._problems.forget((trigger.directory, reason))
        self._noted[trigger.key] = self._noted[trigger.made_key] = 0
        if trigger.wd:
            self._retire(trigger.wd)

    def ignore(self, wd: int) -> None:
        """End an inherited watch that the configuration does not use. Its queued events have no effect."""
        if wd not in self._by_wd:
            self._by_wd[wd] = Trigger(Directory(Path("/")), "of an earlier process")
            self._retire(wd)

    def look(self, trigger: Trigger, *, make: bool) -> None:
        """Watch the file at the path. With `make`, create a missing file.

        If another process has replaced the file, the replacement is added to `replaced`. Raises OSError.
        """
        directory, register = trigger.directory, trigger.register
        before = trigger.wd or self._noted[trigger.key]
        made, is_first = False, not trigger.looked_at

        def note(wd: int) -> None:
            self._noted[trigger.key] = wd

        while not (wd := directory.watch_trigger(register, self._inotify)):
            if not make:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if wd := directory.make_trigger(register, self._inotify, note):
                made = True
                # Store this after link(2): if another process has created the file, a successor must count IN_CREATE.
                trigger.made = trigger.made + 1 if trigger.made_in == directory.wd else 1
                trigger.made_in = self._noted[trigger.made_key] = directory.wd
                break
            note(before)
        self._set_watch(trigger, wd)
        if wd == before:
            return
        if is_first and before and before not in self._by_wd:
            self._by_wd[before] = trigger  # An earlier process added this watch.
            self._retire(before)
        if made or (trigger.signal is None and not before):
            note(wd)  # The proxy created the file, or the file existed before it became a trigger.
        else:
            trigger.replaced.append(self._inotify.read + self._inotify.queued)
            self._replaced.add(trigger)

    def look_again(self, trigger: Trigger) -> None:
        """Watch the file that is now at a trigger's path, because a mount may hide or reveal files."""
        if self.by_path.get(trigger.path) is trigger and trigger.wd and _is_looked_at(trigger):
            self._try_look(trigger, make=False)

    def _set_watch(self, trigger: Trigger, wd: int) -> None:
        owner = self._by_wd.get(wd, trigger)
        if owner is not trigger and owner.wd == wd and self.by_path.get(owner.path) is owner:
            if _same_file(owner, trigger):
                raise UnfitFileError(trigger.path, f"the same file as {owner.path}", "configure only one of them")
            # The file of `owner` was renamed to this path.
            owner.wd = 0
            self._miss(owner)
        if trigger.wd not in (0, wd):
            self._retire(trigger.wd)
        self._by_wd[wd] = trigger
        self._retired.pop(wd, None)
        trigger.wd, trigger.looked_at, trigger.missing_since = wd, trigger.directory.openings, None

    def _retire(self, wd: int) -> None:
        self._retired[wd] = real_clock.monotonic() + RETIREMENT
        self._directories.retries.announce()

    def _miss(self, trigger: Trigger) -> None:
        """Mark a trigger as missing, and schedule a retry."""
        if trigger.missing_since is None:
            trigger.missing_since = real_clock.monotonic()
            self._directories.trouble(trigger.directory)

    def _try_look(self, trigger: Trigger, *, make: bool) -> OSError | None:
        """Call `look`. If it fails, schedule a retry and return the error."""
        try:
            self.look(trigger, make=make)
        except OSError as error:
            self._miss(trigger)
            return error
        return None

    def follow(self, events: Iterable[Event]) -> Triggered:
        """Turn events into notifications, in order. Add replaced files that no event will report. Never raises."""
        triggered = Triggered()
        by_wd, signals = self._by_wd, triggered.signals
        unknown = False
        for wd, mask, name in events:
            if mask & ino.IN_CLOSE_WRITE:
                trigger = by_wd.get(wd)
                if trigger is None:
                    # An earlier process was killed before it stored which trigger this watch belongs to.
                    unknown = True
                elif trigger.signal is not None:
                    signals.append(trigger.signal)
            elif mask & ino.IN_MODIFY:
                continue
            elif mask & ino.IN_Q_OVERFLOW and wd == LOST_WATCH:
                self._lost(triggered)
            elif mask & ino.IN_Q_OVERFLOW:
                self._overflowed(triggered)
            elif mask & ino.IN_IGNORED and wd in by_wd:
                self._ignored(wd)
            else:
                self._follow_directory(wd, mask, name, triggered)
        if unknown:
            # Send one notification for each trigger, not one for each unknown event: a crash can leave hundreds of such
            # events.
            self._notify_all(triggered)
        if self._replaced:
            self._count_replaced(triggered)
        return triggered

    def closed_alone(self, view: memoryview, length: int) -> Signal | None:
        """Return the signal if the first `length` bytes of `view` report only the close of its trigger, else None."""
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

    def _lost(self, triggered: Triggered) -> None:
        text = "the fd store lost the inotify descriptor, with unfinished events: sending every trigger once"
        report(logger, logging.WARNING, text)
        self._notify_all(triggered)

    def _overflowed(self, triggered: Triggered) -> None:
        self._counters.overflowed += 1
        text = "the inotify queue overflowed (fs.inotify.max_queued_events): sending every trigger once"
        report(logger, logging.WARNING, text, "overflow")
        self._notify_all(triggered)
        for trigger in self.by_path.values():
            self._forget_made(trigger, triggered)  # The IN_CREATE of this trigger may have been lost.
            # Check the file now: if it was renamed to this path, it is not watched yet.
            self._try_look(trigger, make=False)
        self._directories.look_at_all()

    def _ignored(self, wd: int) -> None:
        trigger = self._by_wd.pop(wd)
        self._retired.pop(wd, None)
        self._inotify.forget(wd)
        if trigger.wd == wd:
            trigger.wd = 0
            if self.by_path.get(trigger.path) is trigger:
                self._miss(trigger)

    def _follow_directory(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Handle an event on an IRQ directory or on one of its ancestors."""
        try:
            directory = self._directories.follow(wd, mask, name)
        except KeyError:
            self._follow_unknown(wd, mask, name, triggered)
            return
        if directory is None:
            return
        trigger = self._in.get(directory, {}).get(name)
        if trigger is not None:
            made = trigger.made_in or trigger.inherited_made_in
            self._follow_trigger(trigger, wd, mask, triggered)
            if made and not (trigger.made_in or trigger.inherited_made_in):
                self._forget_made(trigger, triggered)
        elif name.startswith(self._temporaries):
            directory.any_making_in = wd if mask & ino.IN_CREATE else 0
            if name == self._temporary:
                directory.making_in = directory.any_making_in

    @staticmethod
    def _forget_made(trigger: Trigger, triggered: Triggered) -> None:
        trigger.made_in = trigger.made = trigger.inherited_made_in = 0
        triggered.watches[trigger.made_key] = 0

    def _follow_unknown(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Handle an event of an unknown watch, which an earlier process added to a directory."""
        if mask & APPEARED and not mask & ino.IN_ISDIR and wd not in self._by_wd:
            # A process may have written to the new file.
            for trigger in self.by_path.values():
                if os.fsencode(trigger.register) == name:
                    triggered.add(trigger)

    def _follow_trigger(self, trigger: Trigger, wd: int, mask: int, triggered: Triggered) -> None:
        """Handle an event about a trigger's file name in the directory that `wd` watches."""
        directory = trigger.directory
        created, vanished, is_file = mask & ino.IN_CREATE, mask & VANISHED, not mask & ino.IN_ISDIR
        inherited = created and trigger.inherited_made_in == wd
        if inherited and directory.any_making_in == wd:
            trigger.inherited_made_in = 0
        elif wd != directory.wd:
            # `wd` watches the directory that was at this path before. A scheduled retry checks the current directory.
            if created and trigger.made_in == wd:
                trigger.made_in = trigger.made = 0
            elif not vanished and is_file:
                triggered.add(trigger)
        elif trigger.made_in == wd:
            # Until the IN_CREATE of our file has been read, all other events are about earlier files at this path.
            if created and directory.making_in == wd:
                trigger.made -= 1
                if not trigger.made:
                    trigger.made_in = 0
            elif not vanished and is_file:
                triggered.add(trigger)
        elif not vanished:
            trigger.made_in = trigger.made = 0
            # Another process may have created and deleted this file before an earlier process created the trigger.
            always = not created or bool(inherited and is_file)
            self._look_again(trigger, mask, triggered, always=always)
        elif trigger.missing_since is None and _is_looked_at(trigger):
            # Check the path later: if it already has a new file, another queued event reports that file.
            self._miss(trigger)

    def _look_again(self, trigger: Trigger, mask: int, triggered: Triggered, *, always: bool) -> None:
        """Watch the file that appeared. Add a notification if it is new or already gone, or if `always` is set."""
        error = self._try_look(trigger, make=False)
        if another := bool(trigger.replaced):
            trigger.replaced.popleft()
        # The event reported a file, but a directory may have replaced the file by now.
        gone_again = (
            error is not None and not mask & ino.IN_ISDIR and (error.errno == errno.ENOENT or _is_directory(trigger))
        )
        if another or gone_again or always:
            triggered.add(trigger, note=another)

    def _count_replaced(self, triggered: Triggered) -> None:
        """Add a notification for each replaced file that no unread event can still report."""
        for trigger in tuple(self._replaced):
            while trigger.replaced and trigger.replaced[0] <= self._inotify.read:
                trigger.replaced.popleft()
                triggered.add(trigger, note=True)
            if not trigger.replaced:
                self._replaced.discard(trigger)

    def restore(self, directory: Directory) -> Iterator[float | None]:
        """Watch or create the missing triggers of a directory.

        After each trigger, yield when to retry it (real_clock.monotonic()), or None if it is now watched.
        """
        if directory.fd < 0:
            return
        refused: dict[str, list[Path]] = {}
        patience = directory.patience
        for trigger in tuple(self._in.get(directory, {}).values()):
            now = real_clock.monotonic()
            if trigger.missing_since is None:
                if _is_looked_at(trigger):
                    continue
                trigger.missing_since = now
            if directory.fd < 0:
                return
            recreate_at = max(trigger.missing_since, directory.vanished_at) + patience
            error = self._try_look(trigger, make=now >= recreate_at)
            if error is None:
                yield None
            elif error.errno == errno.ENOENT and now < recreate_at:
                yield recreate_at
            else:
                refused.setdefault(error.strerror or "", []).append(trigger.path)
                yield now
        self._log_refused(directory, refused)

    def _log_refused(self, directory: Directory, refused: dict[str, list[Path]]) -> None:
        """Log each reason only once per directory, because a directory may have thousands of unwatched triggers."""
        unwatched = {path for paths in refused.values() for path in paths}
        for reason, path in tuple(self._reasons.get(directory, {}).items()):
            trigger = self.by_path.get(path)
            is_missing = trigger is not None and trigger.missing_since is not None and path not in unwatched
            if reason in refused or is_missing:  # The proxy waits before it recreates a missing file.
                continue
            if trigger is None or path in unwatched:  # The trigger was removed, or it has another problem.
                self._problems.forget((directory, reason))
            else:
                self._problems.well((directory, reason), path)
            del self._reasons[directory][reason]
        for reason, paths in refused.items():
            others = f" (and {len(paths) - 1} more in this directory)" if len(paths) > 1 else ""
            self._problems.failed((directory, reason), f"cannot watch: {reason}; retrying", f"{paths[0]}{others}")
            self._reasons.setdefault(directory, {})[reason] = paths[0]

    def expire(self) -> None:
        """End the watches of files that were replaced at least `RETIREMENT` seconds ago."""
        now = real_clock.monotonic()
        for wd in [wd for wd, until in self._retired.items() if until <= now]:
            del self._retired[wd]
            if self._directories.watches(wd):
                del self._by_wd[wd]  # A reload has added this directory, so its inherited watch is in use again.
            else:
                self._inotify.unwatch(wd)

    def next_expiry(self) -> float:
        """Return when to call `expire` next (real_clock.monotonic()), or infinity."""
        return min(self._retired.values(), default=math.inf)

    def found(self) -> Triggered:
        """Count replaced files that no event will report, and return their notifications."""
        triggered = Triggered()
        self._count_replaced(triggered)
        return triggered


def _is_looked_at(trigger: Trigger) -> bool:
    """Return whether the file was found since the directory was last opened or lost."""
    return trigger.looked_at == trigger.directory.openings


def _is_directory(trigger: Trigger) -> bool:
    try:
        return stat.S_ISDIR(trigger.directory.status(trigger.register).st_mode)
    except OSError:
        return False


def _same_file(*triggers: Trigger) -> bool:
    try:
        one, other = (trigger.directory.status(trigger.register) for trigger in triggers)
        return os.path.samestat(one, other)
    except OSError:
        return False
