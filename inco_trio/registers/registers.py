"""The registers of a signal table: state files, triggers and their directories, opened and restored together."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from pathlib import Path

import attrs
import trio

from inco_trio.errors import ConfigError
from inco_trio.linux.inotify import Watcher
from inco_trio.nurseries import in_turns
from inco_trio.persist.inflight import Inflight
from inco_trio.problems import Problems
from inco_trio.proxy_status import Counters
from inco_trio.registers.diagnose import unreported
from inco_trio.registers.directories import Directories
from inco_trio.registers.directory import Directory
from inco_trio.registers.refusals import UnfitFileError, refusal
from inco_trio.registers.states import StateFile, StateFiles
from inco_trio.registers.triggers import Trigger, Triggers
from inco_trio.signals import Direction, Signal, SignalTable

__all__ = ["Registers"]


@attrs.define
class _New:
    """The registers of another table, before the exchange."""

    directories: list[Directory] = attrs.Factory(list)
    triggers: list[Trigger] = attrs.Factory(list)
    files: list[StateFile] = attrs.Factory(list)
    signals: dict[Trigger, Signal] = attrs.Factory(dict)
    path: Path = Path("/")
    """The path that is being opened."""


class Registers:
    """The registers of a signal table; `open` sets the first table, `reload` another.

    `troubled` is set when something failed and `restore` must run.
    """

    def __init__(self, inotify: Watcher, inflight: Inflight, counters: Counters) -> None:
        self._problems = problems = Problems()
        self.table = SignalTable(())
        self._opened = False
        self.troubled = trio.Event()
        self.directories = Directories(inotify, inflight.watches, problems, lambda: self.troubled.set())
        self.states = StateFiles(self.directories, inflight.owed, problems, counters)
        self.triggers = Triggers(self.directories, inotify, inflight.watches, problems, counters)

    # ------------------------------------------------------------------------------------------------------ table

    def open(self, table: SignalTable) -> None:
        """Open the directories, create missing files, watch the triggers.

        Raises IncoError; then inherited watches stay for a successor.
        """
        for _ in self.exchange(table):
            pass
        self._opened = True
        for wd in self.directories.forget_noted(self.triggers.keys()):
            self.triggers.ignore(wd)

    def exchange(self, table: SignalTable) -> Generator[None, None, None]:
        """Replace the table, in steps. Nothing that both tables have is touched, and no new file makes a notification.

        The new registers are opened first; if one cannot be opened, IncoError is raised and nothing changes. The last
        step is the exchange. `_drop_unneeded` closes the rest.
        """
        new = _New()
        try:
            for signal in table:
                self._prepare(signal, new)
                self._refuse_both_ways(signal, table)
                yield
        except BaseException as error:
            if self._opened:
                for trigger in new.triggers:
                    self.triggers.drop(trigger)
                for directory in new.directories:
                    self.directories.drop(directory)
            if not isinstance(error, OSError):
                raise
            if problem := unreported(new.path):
                raise ConfigError(problem) from error
            raise refusal(error, new.path) from error
        for trigger in self.triggers.by_path.values():
            # The same file may belong to another signal now.
            trigger.signal = new.signals.get(trigger)
        self.states.take(new.files)
        self.table = table

    def _prepare(self, signal: Signal, new: _New) -> None:
        """Open the register of a signal, and add what is new to `new`. Raises OSError."""
        new.path = signal.directory
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

    def _refuse_both_ways(self, signal: Signal, table: SignalTable) -> None:
        """Raise UnfitFileError for a file that is a state file and a trigger: each frame would send another."""
        try:
            if signal.path.lstat().st_nlink < 2:
                return
            for other in table:
                if other.direction is not signal.direction and other.path.samefile(signal.path):
                    raise UnfitFileError(
                        signal.path, f"is the same file as {other.path}", "remove one of the two names"
                    )
        except FileNotFoundError:
            pass  # Its directory is missing now.

    async def reload(self, table: SignalTable) -> None:
        """Replace the table, see `exchange`, and create missing directories. Raises IncoError."""
        await in_turns(self.exchange(table))
        # A cancellation from here on leaves the new table complete.
        with trio.CancelScope(shield=True):
            await in_turns(self._drop_unneeded())
        self.directories.forget_noted(self.triggers.keys())
        for directory in self.directories.by_path.values():
            self.directories.look(directory, make=True)

    def problem(self, signal: Signal) -> str | None:
        """Return why the register of a signal cannot be written or watched now, or None."""
        directory = self.directories.by_path[signal.directory]
        if directory.fd < 0:
            return "its directory is missing"
        trigger = self.triggers.by_path.get(signal.path)
        if trigger is not None and trigger.missing_since is not None:
            return "cannot be watched, or is missing"
        return self._problems.said(signal.path)

    # -------------------------------------------------------------------------------------------------- restoring

    def restore(self) -> Generator[None, None, None]:
        """Retry everything that is due, in steps."""
        self.triggers.expire()
        for directory in self.directories.retries.due():
            started = time.monotonic()
            earliest = [self.directories.restore(directory)]
            for again in self.triggers.restore(directory):
                earliest.append(again)
                yield
            for well in self.states.pay(directory):
                earliest.append(None if well else time.monotonic())
                yield
            left = [again for again in earliest if again is not None]
            self.directories.retries.retried(directory, min(left, default=None), time.monotonic() - started)

    def next_restore(self) -> float:
        """Return the time for the next `restore` (time.monotonic()); infinity for never."""
        return min(self.directories.retries.next(), self.triggers.next_expiry(), math.inf)

    def close(self) -> None:
        """Close files and directories. Watches stay for a successor that inherits them."""
        self.states.close()
        self.directories.close()
