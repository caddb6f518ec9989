"""The registers of a signal table: state files, triggers and their directories."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import trio

from inco_trio import real_clock
from inco_trio.counters import Counters
from inco_trio.errors import ConfigError
from inco_trio.linux.inotify import Watcher
from inco_trio.nurseries import in_turns
from inco_trio.persist.inflight import Inflight
from inco_trio.problems import Problems
from inco_trio.registers.diagnose import unreported
from inco_trio.registers.directories import Directories
from inco_trio.registers.directory import Directory
from inco_trio.registers.refusals import refusal
from inco_trio.registers.states import StateFile, StateFiles
from inco_trio.registers.triggers import Trigger, Triggers
from inco_trio.signals import Direction, Signal, SignalTable
from inco_trio.trust import Trust, UnfitFileError

__all__ = ["Registers"]


class _New:
    """The registers that a new table adds. `exchange` collects them before it replaces the table."""

    def __init__(self) -> None:
        self.directories: list[Directory] = []
        self.triggers: list[Trigger] = []
        self.files: list[StateFile] = []
        self.signals: dict[Trigger, Signal] = {}
        self.path = Path("/")
        """The path that is being opened, for error messages."""
        self.directory = Path("/")
        """The IRQ directory that contains `path`, or `path` itself if it is the directory."""


class Registers:
    """The registers of a signal table. `troubled` is set when an operation has failed and `restore` must run."""

    def __init__(self, inotify: Watcher, inflight: Inflight, counters: Counters, trust: Trust | None = None) -> None:
        self._problems = problems = Problems()
        self.table = SignalTable(())
        self._opened = False
        self._may_be_covered = False
        self.troubled = trio.Event()
        self.directories = Directories(inotify, inflight.watches, problems, lambda: self.troubled.set(), trust)
        self.states = StateFiles(self.directories, inflight, problems, counters)
        self.triggers = Triggers(self.directories, inotify, inflight.watches, problems, counters)

    def open(self, table: SignalTable) -> Generator[None, None, None]:
        """Open the directories, create missing files and watch the triggers, in steps. Raises IncoError."""
        yield from self.exchange(table)
        self._opened = True
        for wd in self.directories.forget_noted(self.triggers.keys()):
            self.triggers.ignore(wd)

    def exchange(self, table: SignalTable) -> Generator[None, None, None]:
        """Replace the table in steps. Registers that are in both tables do not change; new files cause no notification.

        Each step opens one register, and the last step replaces the table. If opening fails, the generator raises
        IncoError and changes nothing. After success, the caller closes old registers with `_drop_unneeded`.
        """
        new = _New()
        try:
            for signal in table:
                self._prepare(signal, new)
                yield
        except BaseException as error:
            if self._opened:
                for trigger in new.triggers:
                    self.triggers.drop(trigger)
                for directory in new.directories:
                    self.directories.drop(directory)
            if not isinstance(error, OSError):
                raise
            # If a component is not trusted or not a directory, do not inspect the path: stat(2) could block on a FUSE
            # filesystem.
            unsafe = isinstance(error, UnfitFileError | NotADirectoryError)
            if not unsafe and (problem := unreported(new.path)):
                raise ConfigError(problem) from error
            raise refusal(error, new.path, is_directory=new.path == new.directory) from error
        for trigger in self.triggers.by_path.values():
            # In the new table, the same file may belong to a different signal.
            trigger.signal = new.signals.get(trigger)
        self.states.take(new.files)
        self.table = table

    def _prepare(self, signal: Signal, new: _New) -> None:
        """Open the register of a signal, and its directory if it is new. Add both to `new`. Raises OSError."""
        new.path = new.directory = signal.directory
        directory = self.directories.by_path.get(new.path)
        if directory is None:
            new.directories.append(directory := self.directories.add(new.path))
            self.directories.open(directory, make=True)
        new.path = signal.path
        if signal.direction is Direction.INBOUND:
            new.files.append(self.states.prepare(signal, directory))
            return
        trigger = self.triggers.by_path.get(new.path)
        if trigger is None:
            new.triggers.append(trigger := self.triggers.add(directory, signal.register))
            if directory.fd >= 0:
                self.triggers.look(trigger, make=True)
        new.signals[trigger] = signal

    def _drop_unneeded(self) -> Generator[None, None, None]:
        for trigger in tuple(self.triggers.by_path.values()):
            if trigger.signal is None:
                self.triggers.drop(trigger)
                yield
        needed = {signal.directory for signal in self.table}
        for path, directory in tuple(self.directories.by_path.items()):
            if path not in needed:
                self.directories.drop(directory)
                yield

    async def reload(self, table: SignalTable, trust: Trust | None = None) -> None:
        """Replace the table and create missing directories. Raises IncoError (see `exchange`)."""
        before = self.directories.trust
        self.directories.trust = trust or before
        try:
            await in_turns(self.exchange(table))
        except BaseException:
            self.directories.trust = before
            raise
        # Shield the clean-up, because the new table is already in use.
        with trio.CancelScope(shield=True):
            await in_turns(self._drop_unneeded())
            self.directories.forget_noted(self.triggers.keys())
            await in_turns(self._make_missing())

    def _make_missing(self) -> Generator[None, None, None]:
        for directory in tuple(self.directories.by_path.values()):
            self.directories.look(directory, make=True)
            yield

    def problem(self, signal: Signal) -> str | None:
        """Return why the proxy cannot write or watch the register of a signal at the moment, or None if it can."""
        directory = self.directories.by_path[signal.directory]
        if directory.fd < 0:
            return self._problems.said(signal.directory) or "its directory is missing"
        trigger = self.triggers.by_path.get(signal.path)
        if trigger is not None and trigger.missing_since is not None:
            return "the file is missing or cannot be watched"
        return self._problems.said(signal.path) or self.directories.missing_state(directory, signal.register)

    def mounts_changed(self) -> int:
        """Make `restore` check all directories and triggers, because a mount may hide them. Return their number."""
        self._may_be_covered = True
        for directory in self.directories.by_path.values():
            directory.checked.clear()
        self.troubled.set()
        return len(self.directories.by_path) + len(self.triggers.by_path)

    def _look_again(self) -> Generator[None, None, None]:
        for directory in tuple(self.directories.by_path.values()):
            self.directories.look(directory)
            yield
        for trigger in tuple(self.triggers.by_path.values()):
            self.triggers.look_again(trigger)
            yield

    def restore(self) -> Generator[None, None, None]:
        """Run all retries that are due. Each step restores one trigger or writes a few pending notifications."""
        if self._may_be_covered:
            self._may_be_covered = False
            yield from self._look_again()
        self.triggers.expire()
        for directory in self.directories.retries.due():
            started = real_clock.monotonic()
            earliest = [self.directories.restore(directory)]
            for again in self.triggers.restore(directory):
                earliest.append(again)
                yield
            for well in self.states.write_pending(directory):
                earliest.append(None if well else real_clock.monotonic())
                yield
            left = [again for again in earliest if again is not None]
            self.directories.retries.retried(directory, min(left, default=None), real_clock.monotonic() - started)

    def next_restore(self) -> float:
        """Return when to call `restore` next (real_clock.monotonic()), or infinity."""
        return min(self.directories.retries.next(), self.triggers.next_expiry(), math.inf)

    def close(self) -> None:
        """Close files and directories. A process that inherits the inotify descriptor also inherits the watches."""
        self.states.close()
        self.directories.close()
