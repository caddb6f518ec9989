"""The registers of a signal table: state files, triggers and directories, opened and restored together.

`Inbound` is given the state files only, `Outbound` the triggers only; here is what concerns both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from pathlib import Path

import trio

from inco_trio.errors import ConfigError
from inco_trio.linux.inotify import Watcher
from inco_trio.nurseries import in_turns
from inco_trio.persist.inflight import Inflight
from inco_trio.problems import Problems
from inco_trio.registers.diagnose import unreported
from inco_trio.registers.directories import Directories, Directory
from inco_trio.registers.refusals import UnfitFileError, refusal
from inco_trio.registers.states import StateFile, StateFiles
from inco_trio.registers.triggers import Trigger, Triggers
from inco_trio.signals import Direction, Signal, SignalTable
from inco_trio.status import Counters

__all__ = ["Registers"]


class Registers:
    """The registers of a signal table; `open` takes the first, `reload` another.

    `troubled` is set when something could not be done, and `restore` is to be run.
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
        """Open the directories, make what is missing, watch the triggers.

        Raises IncoError: what cannot be opened is the user's to mend. Inherited watches then go on for a successor.
        """
        for _ in self.exchange(table):
            pass
        self._opened = True
        for wd in self.directories.forget_noted(self.triggers.keys()):
            # Of a predecessor's configuration.
            self.triggers.ignore(wd)

    def exchange(self, table: SignalTable) -> Generator[None, None, None]:
        """Take another table, in steps: what is in both is left untouched, and nothing new makes a notification.

        All that is new is opened first; if that is refused, IncoError is raised and nothing is changed. Then all is
        exchanged at one instant, the last step; what is not needed any more is left to `_drop_unneeded`.
        """
        directories: list[Directory] = []
        triggers: list[Trigger] = []
        files: list[StateFile] = []
        signals: dict[Trigger, Signal] = {}
        path = Path("/")
        try:
            for signal in table:
                path = signal.directory
                directory = self.directories.by_path.get(path)
                if directory is None:
                    directories.append(directory := self.directories.add(path))
                    self.directories.open(directory, make=True)
                path = signal.path
                if signal.direction is Direction.INBOUND:
                    files.append(self.states.prepare(signal, directory))
                else:
                    trigger = self.triggers.by_path.get(path)
                    if trigger is None:
                        triggers.append(trigger := self.triggers.add(directory, signal.register))
                        if directory.fd >= 0:
                            self.triggers.look(trigger, make=True)
                    signals[trigger] = signal
                self._refuse_both_ways(signal, table)
                yield
        except BaseException as error:
            if self._opened:
                for trigger in triggers:
                    self.triggers.drop(trigger)
                for directory in directories:
                    self.directories.drop(directory)
            if not isinstance(error, OSError):
                raise
            if problem := unreported(path):
                raise ConfigError([problem]) from error
            raise refusal(error, path) from error

        for trigger in self.triggers.by_path.values():
            # The same file may carry another name now.
            trigger.signal = signals.get(trigger)
        self.states.take(files)
        self.table = table

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
        """Raise UnfitFileError for a file that is a state register and a trigger: each frame would send one."""
        try:
            if signal.path.lstat().st_nlink < 2:
                return
            for other in table:
                if other.direction is not signal.direction and other.path.samefile(signal.path):
                    raise UnfitFileError(
                        signal.path, f"is the same file as {other.path}", "remove one of the two names"
                    )
        except FileNotFoundError:
            pass  # In a directory that is missing now.

    async def reload(self, table: SignalTable) -> None:
        """Take another table, see `exchange`; a directory that is missing is made. Raises IncoError."""
        await in_turns(self.exchange(table))
        # Whoever cancels that now finds the new table whole.
        with trio.CancelScope(shield=True):
            await in_turns(self._drop_unneeded())
        self.directories.forget_noted(self.triggers.keys())
        for directory in self.directories.by_path.values():
            self.directories.look(directory, make=True)

    def problem(self, signal: Signal) -> str | None:
        """What keeps the register of a signal from being written or watched now."""
        directory = self.directories.by_path[signal.directory]
        if directory.fd < 0:
            return "its directory is missing"
        trigger = self.triggers.by_path.get(signal.path)
        if trigger is not None and trigger.missing_since is not None:
            return "cannot be watched, or is missing"
        return self._problems.said(signal.path)

    # -------------------------------------------------------------------------------------------------- restoring

    def restore(self) -> Generator[None, None, None]:
        """Try again, in steps, what could not be done and is due."""
        self.triggers.expire()
        for directory in self.directories.due():
            started = time.monotonic()
            earliest = [self.directories.restore(directory)]
            for again in self.triggers.restore(directory):
                earliest.append(again)
                yield
            for well in self.states.pay(directory):
                earliest.append(None if well else time.monotonic())
                yield
            left = [again for again in earliest if again is not None]
            self.directories.retried(directory, min(left, default=None), time.monotonic() - started)

    def next_restore(self) -> float:
        """When `restore` has something to do (time.monotonic()); infinity for never."""
        return min(self.directories.next_retry(), self.triggers.next_expiry(), math.inf)

    def close(self) -> None:
        """Close files and directories. Watches stay, for a successor that inherits them."""
        self.states.close()
        self.directories.close()
