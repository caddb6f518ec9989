"""The registers: files in the IRQ directories. State registers are written, triggers are watched.

A trigger has a watch of its own, on the file: CLOSE_WRITE is the notification, and MODIFY stands between two closes, so
that the kernel does not merge them (inotify(7)). The directory is watched only for what happens to names, because a
watch for writes would also report the state registers that the proxy itself writes.

A trigger that somebody else replaces, by a rename or by making it anew, was written by them: that counts as one
notification. Files that the proxy makes are watched before they are visible, so that no write to them is missed.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import attrs

from inco_trio.errors import ConfigError, IncoError, PermissionRefused, ResourceRefused
from inco_trio.keep.inflight import Inflight
from inco_trio.registers import inotify as ino
from inco_trio.registers.diagnose import unreported
from inco_trio.registers.directories import ANCESTOR_MASK, IrqDirectory
from inco_trio.registers.inotify import Event, Inotify
from inco_trio.signals import Direction, Signal, SignalTable
from inco_trio.stats import Stats

__all__ = ["Registers", "Triggered", "start_error"]

logger = logging.getLogger(__name__)

RETIREMENT = 1.0
"""Seconds for which the watch of a replaced trigger is kept."""
PATIENCE = 0.03
"""Seconds for which what vanished is left to whoever replaces it: what we make meanwhile would be in their way."""
LONG_AGO = 0.0

VANISHED = ino.IN_DELETE | ino.IN_MOVED_FROM
GONE_MASK = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_UNMOUNT | ino.IN_IGNORED


def _key(path: Path) -> bytes:
    """The key of a trigger in the table of watches."""
    # Hexadecimal, as a key has no trailing NUL.
    return blake2b(os.fsencode(path), digest_size=32).hexdigest().encode()


def start_error(error: OSError, what: object) -> IncoError:
    """The error, with its exit code, for a refusal of the kernel while the registers are opened."""
    text = f"{what}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionRefused(f"{text}: uid {os.geteuid()} needs write permission there (or CAP_DAC_OVERRIDE)")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS):
        return ConfigError([f"{text}: the configuration has to name a directory that can be made and written"])
    if error.errno == errno.EINVAL:
        return ConfigError([f"{text}: remove it, or name another register"])
    if error.errno == errno.EMFILE and error.filename == "inotify":
        # inotify_init(2) gives the same number for both.
        text = "inotify: limit reached: raise fs.inotify.max_user_instances or ulimit -n"
    return ResourceRefused(text)


@attrs.define
class Triggered:
    """What a batch of events leads to: notifications to send, and watches to note once they are sent."""

    signals: list[Signal]
    watches: dict[bytes, int]
    """For `Inflight.watches`: noted earlier, a crash would lose the notification of a file that appeared."""

    def extend(self, other: Triggered) -> None:
        """Add what `other` leads to."""
        self.signals += other.signals
        self.watches |= other.watches


class Registers:
    """The registers of a signal table. Everything here is immediate; nothing waits.

    `troubled` tells that something could not be done and `mend` should be called again.
    """

    def __init__(self, table: SignalTable, inotify: Inotify, inflight: Inflight, stats: Stats) -> None:
        self._inotify = inotify
        self._inflight = inflight
        self._stats = stats
        self._said: dict[Path, str] = {}
        self._by_wd: dict[int, Signal] = {}
        self._armed: dict[Path, int] = {}
        self._retired: dict[int, float] = {}
        self._ancestors: set[int] = set()
        # What is missing, and since when (time.monotonic()).
        self._unarmed: dict[Path, float] = {}
        self._lost: dict[Path, float] = {}
        # Triggers that we made, until their IN_CREATE is read.
        self._made: set[Path] = set()
        # Triggers that turned out to be replaced, and how often, until an event tells of it.
        self._found: Counter[Path] = Counter()
        self._directories: dict[Path, IrqDirectory] = {}
        self._set_table(table)

    def _set_table(self, table: SignalTable) -> None:
        self.table = table
        old = self._directories
        self._directories = {}
        for signal in table:
            directory = self._directories.get(signal.directory)
            if directory is None:
                directory = old.pop(signal.directory, None) or IrqDirectory(signal.directory)
                self._directories[signal.directory] = directory
                directory.states, directory.outbound = set(), []
            if signal.direction is Direction.INBOUND:
                directory.states.add(signal.register)
            else:
                directory.outbound.append(signal)
        for directory in old.values():
            directory.close(self._inotify)
        self._home = {signal.name: self._directories[signal.directory] for signal in table.inbound.values()}
        self._above = {parent for path in self._directories for parent in path.parents}
        self._triggers = {signal.path: signal for signal in table if signal.direction is Direction.OUTBOUND}

    # ------------------------------------------------------------------------------------------------ opening

    def open(self) -> None:
        """Open the directories, make what is missing, watch the triggers; see also `found`.

        Raises IncoError: at start, what cannot be opened is the user's to mend.
        """
        for directory in self._directories.values():
            path = directory.path
            try:
                self._open_directory(directory, make=True)
                directory.make_states()
                for signal in directory.outbound:
                    path = signal.path
                    self._arm(directory, signal, make=True)
            except OSError as error:
                if problem := unreported(directory.path):
                    raise ConfigError([problem]) from error
                named = error.filename is not None and not str(error.filename).startswith("/proc/self/fd/")
                raise start_error(error, error.filename if named else path) from error
        noted = self._inflight.watches
        live = {*self._armed.values(), *self._ancestors, *(d.wd for d in self._directories.values())}
        current = {_key(path) for path in (*self._triggers, *self._above, *self._directories)}
        for key in noted:
            if key not in current:
                # Of a predecessor's configuration: what is queued for it is nobody's.
                if noted[key] not in live:
                    self._retire(noted[key])
                noted[key] = 0

    def found(self) -> Triggered:
        """The triggers that turned out to be replaced, and no event told; none while events wait, which may tell."""
        triggered = Triggered([], {})
        if self._found and not self._inotify.queued:
            for path in self._found.elements():
                self._count(path, triggered)
            self._found.clear()
        return triggered

    def _count(self, path: Path, triggered: Triggered) -> None:
        """One notification of a trigger that was replaced."""
        triggered.signals.append(self._triggers[path])
        triggered.watches[_key(path)] = self._armed[path]

    def replace_table(self, table: SignalTable) -> Triggered:
        """Take another table: what is in both is left untouched, and nothing new makes a notification."""
        before = self._triggers
        self._set_table(table)
        for path in before.keys() - self._triggers.keys():
            self._inflight.watches[_key(path)] = 0
            del self._found[path]
            if wd := self._armed.pop(path, 0):
                del self._by_wd[wd]
                self._retire(wd)
        # The same file may carry another name now.
        for path, wd in self._armed.items():
            self._by_wd[wd] = self._triggers[path]
        # New ones, and those that are missing right now, although a watch of before is still known.
        self._unarmed = dict.fromkeys(
            (path for path in self._triggers if path not in self._armed or path in self._unarmed), LONG_AGO
        )
        self._lost = dict.fromkeys(self._directories, LONG_AGO)
        return self.mend()

    def _open_directory(self, directory: IrqDirectory, *, make: bool) -> None:
        key = _key(directory.path)
        former = self._inflight.watches[key]
        directory.open(self._inotify, make=make)
        if former not in (0, directory.wd):
            # A predecessor's: what happens from now on where the directory was moved to is not for us.
            self._inotify.unwatch(former)
        self._inflight.watches[key] = directory.wd
        # What happens above it is seen only there.
        for parent in directory.path.parents:
            try:
                wd = self._inotify.watch(str(parent), ANCESTOR_MASK)
            except OSError:
                continue  # Not readable for us; then a write notices.
            self._ancestors.add(wd)
            if parent not in self._directories:
                self._inflight.watches[_key(parent)] = wd
        if not directory.current:
            # Replaced before all the watches stood, of which no event tells.
            self._open_directory(directory, make=make)

    # -------------------------------------------------------------------------------------------- state registers

    def write(self, signals: Iterable[Signal]) -> None:
        """Write the state register of each signal, in order. What cannot be written now is owed, and `mend` retries."""
        written = []
        owed, home = self._inflight.owed, self._home
        owing = len(owed) > 0
        for signal in signals:
            directory = home.get(signal.name)
            if directory is None:
                self._stats.unknown += 1  # Read before a reload that removed it.
                continue
            try:
                # Earlier ones of the same register come first.
                if not (owing and owed[signal.name.encode()]):
                    directory.write(signal.register)
                    written.append(signal)
                    continue
            except OSError as error:
                self._failed(signal, error)
            owed[signal.name.encode()] += 1
            owing = True
        self._stats.delivered += len(written)
        for directory in self._directories.values():
            if not directory.current:
                # Replaced meanwhile: these may have gone to the old one.
                for signal in written:
                    if home[signal.name] is directory:
                        owed[signal.name.encode()] += 1

    def _failed(self, signal: Signal, error: OSError) -> None:
        self._stats.write_failures += 1
        self._say(signal.path, f"cannot write: {error.strerror}; its notifications are kept and retried")

    @property
    def troubled(self) -> bool:
        """Whether `mend` has something to do."""
        return bool(self._inflight.owed or self._unarmed or self._retired or self._lost)

    def _say(self, path: Path, problem: str) -> None:
        """Log a problem of a path once, until it changes or is mended."""
        if self._said.get(path) != problem:
            self._said[path] = problem
            logger.warning("%s: %s", path, problem)

    def _unsay(self, path: Path) -> None:
        if self._said.pop(path, None) is not None:
            logger.info("%s: works again", path)

    # --------------------------------------------------------------------------------------------------- triggers

    def _arm(self, directory: IrqDirectory, signal: Signal, *, make: bool) -> None:
        """Watch a trigger; one that somebody else replaced is found. One that is missing is made if `make`.

        Raises OSError.
        """
        path, key = signal.path, _key(signal.path)
        before = self._armed.get(path) or self._inflight.watches[key]
        made = False

        def note(wd: int) -> None:
            self._inflight.watches[key] = wd

        while not (wd := directory.watch_trigger(signal.register, self._inotify)):
            if not make:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if wd := directory.make_trigger(signal.register, self._inotify, note):
                made = True
                self._made.add(path)
                break
            note(before)
        self._armed[path] = wd
        self._by_wd[wd] = signal
        self._retired.pop(wd, None)  # A file that came back.
        self._unarmed.pop(path, None)
        self._unsay(path)
        if wd == before:
            return
        if before:
            self._by_wd.setdefault(before, signal)
            self._retire(before)
        if made or not before:
            note(wd)
        else:
            self._found[path] += 1

    def _try_arm(self, directory: IrqDirectory, signal: Signal) -> None:
        now = time.monotonic()
        make = now - self._unarmed.setdefault(signal.path, now) > PATIENCE
        try:
            self._arm(directory, signal, make=make)
        except OSError as error:
            if make or error.errno != errno.ENOENT:
                self._say(signal.path, f"cannot watch: {error.strerror}; retried")

    def _retire(self, wd: int) -> None:
        """Keep the watch of a replaced trigger for a moment: somebody who had it open may still close it."""
        self._retired[wd] = time.monotonic() + RETIREMENT

    def triggered(self, events: Iterable[Event]) -> Triggered:
        """What a batch of events leads to. Raises nothing; what cannot be followed now makes `troubled` true."""
        triggered = Triggered([], {})
        signals, by_wd = triggered.signals, self._by_wd
        unknown = False
        for wd, mask, name in events:
            if mask & ino.IN_CLOSE_WRITE:
                signal = by_wd.get(wd)
                if signal is not None:
                    signals.append(signal)
                elif wd not in self._retired:
                    # Inherited from a predecessor that was killed before it noted whose watch this is.
                    unknown = True
            elif mask & ino.IN_MODIFY:
                continue
            elif mask & ino.IN_Q_OVERFLOW:
                self._stats.overflowed += 1
                logger.warning(
                    "the inotify queue overflowed (fs.inotify.max_queued_events): sending every trigger once"
                )
                signals.extend(self._triggers.values())
                self._look_again(self._directories.values())
            elif mask & ino.IN_IGNORED and wd in by_wd:
                del by_wd[wd]
                self._retired.pop(wd, None)
                self._inotify.forget(wd)
            else:
                self._directory_event(wd, mask, name, triggered)
        if unknown:
            # Once for all of them: after a crash there can be hundreds.
            signals.extend(self._triggers.values())
        return triggered

    def _directory_event(self, wd: int, mask: int, name: bytes, triggered: Triggered) -> None:
        """Follow one event of a directory, or of a directory above one."""
        if mask & GONE_MASK:
            if mask & ino.IN_IGNORED:
                self._ancestors.discard(wd)
                self._inotify.forget(wd)
            self._look_again(self._directories.values(), moved=True)
            return
        for directory in self._directories.values():
            if directory.wd == wd:
                register = os.fsdecode(name)
                path = directory.path / register
                signal = self._triggers.get(path)
                if signal is not None and (mask & VANISHED or (mask & ino.IN_CREATE and path in self._made)):
                    # What is there now has an event of its own behind this one, which counts it; `mend` makes sure.
                    self._made.discard(path)
                    self._unarmed.setdefault(path, time.monotonic())
                elif signal is not None:
                    self._try_arm(directory, signal)
                    if self._found[path]:
                        self._found[path] -= 1
                        self._count(path, triggered)
                    elif mask & ino.IN_MOVED_TO:
                        triggered.signals.append(signal)
                elif mask & VANISHED and register in directory.states:
                    self._lost.setdefault(directory.path, time.monotonic())
                return
        if mask & (ino.IN_CREATE | ino.IN_MOVED_TO):
            # It happened in the directory that was at the path before, when nobody had seen yet that it was replaced.
            # Somebody may have written what they made there; that it was us cannot be told any more.
            register = os.fsdecode(name)
            triggered.signals += [signal for signal in self._triggers.values() if signal.register == register]

    def _look_again(self, directories: Iterable[IrqDirectory], *, moved: bool = False) -> None:
        """Open each directory again if its path leads elsewhere now, and watch the triggers in it.

        With `moved`, the triggers in one that is still in its place need no look.
        """
        now = time.monotonic()
        for directory in directories:
            path = directory.path
            make = path in self._lost and now - self._lost[path] > PATIENCE
            try:
                current = directory.current
                if not current:
                    self._lost.setdefault(path, now)
                    self._open_directory(directory, make=make)
                    # Its triggers need a look even if its state registers cannot be made.
                    self._unarmed |= {signal.path: self._lost[path] for signal in directory.outbound}
                if make:
                    directory.make_states()
            except OSError as error:
                if make or error.errno != errno.ENOENT:
                    self._say(path, f"cannot be opened: {error.strerror}; retried")
                continue
            if make:
                del self._lost[path]
                self._unsay(path)
            if not (current and moved):
                for signal in directory.outbound:
                    self._try_arm(directory, signal)

    # ---------------------------------------------------------------------------------------------------- mending

    def mend(self) -> Triggered:
        """Try again what could not be done: directories, watches, owed notifications. Raises nothing.

        Returns what was `found`.
        """
        now = time.monotonic()
        for wd in [wd for wd, until in self._retired.items() if until <= now]:
            del self._retired[wd]
            self._inotify.unwatch(wd)
        self._look_again(self._directories.values(), moved=True)
        for path in tuple(self._unarmed):
            signal = self._triggers[path]
            self._try_arm(self._directories[signal.directory], signal)
        self._pay()
        return self.found()

    def _pay(self) -> None:
        """Write what is owed, as far as it can be written."""
        owed = self._inflight.owed
        for name in owed:
            signal = self.table.inbound.get(name)
            if signal is None:
                logger.warning("%s: not configured any more: %d owed notifications dropped", name.decode(), owed[name])
                self._stats.unknown += owed[name]
                owed[name] = 0
                continue
            directory = self._home[signal.name]
            if not directory.current:
                continue
            written = 0
            try:
                while written < owed[name]:
                    directory.write(signal.register)
                    written += 1
            except OSError as error:
                self._failed(signal, error)
            # Else what was written may have gone to a directory that was replaced meanwhile.
            if written and directory.current:
                self._stats.delivered += written
                owed[name] -= written
                if not owed[name]:
                    self._unsay(signal.path)

    def close(self) -> None:
        """Close the directories. Watches stay, for a successor that inherits them."""
        for directory in self._directories.values():
            directory.release()
