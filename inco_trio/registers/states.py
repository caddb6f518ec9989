"""State files: the files of inbound signals. Each notification is an open, write of `1` and close of its own.

A notification that cannot be written is pending: the in-flight buffer counts it by its wire name. It is written later,
before any newer notification of the same signal.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import attrs

from inco_trio.persist.tables import NumberTable
from inco_trio.problems import Problems
from inco_trio.proxy_status import Counters
from inco_trio.registers.directories import Directories
from inco_trio.registers.directory import WRITE_FLAGS, Directory
from inco_trio.signals import Signal

__all__ = ["StateFile", "StateFiles"]

logger = logging.getLogger(__name__)

SLICE = 32
"""Writes of pending notifications between two checks of the time."""


@attrs.define(eq=False)
class StateFile:
    """The file of an inbound signal."""

    signal: Signal
    directory: Directory
    fd: int = -1
    """Open while the disk has no room for the `1`: closing it would be a notification for a watcher of the file."""
    count: int = 0
    """Number of writes."""
    last: int = 0
    """The time of the last write (time.time_ns())."""
    failures: int = 0
    """Failed attempts to write it."""
    _register: bytes = attrs.field(
        init=False, default=attrs.Factory(lambda file: os.fsencode(file.signal.register), takes_self=True)
    )
    """The file's name in bytes."""

    def write(self) -> None:
        """Write one notification. Raises OSError.

        A missing file is not created: another process may be removing the directory.
        """
        fd = self.fd
        if fd >= 0:
            self._check_still_there()
            fd, self.fd = self.fd, -1
        if fd < 0:
            directory = self.directory.fd
            if directory < 0:
                raise FileNotFoundError(errno.ENOENT, "the directory is missing")
            fd = os.open(self._register, WRITE_FLAGS, dir_fd=directory)
        try:
            os.write(fd, b"1")
        except OSError:
            self.fd = fd
            raise
        os.close(fd)

    def _check_still_there(self) -> None:
        try:
            there = os.stat(self.signal.register, dir_fd=self.directory.fd, follow_symlinks=False)
        except OSError:
            there = None
        if there is None or not os.path.samestat(os.fstat(self.fd), there):
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class StateFiles:
    """The state files of a signal table. No method waits.

    `known` maps wire names to files. `by_frame` maps short frames without their addresses: `Inbound` caches them here,
    as the same few arrive again and again, and both maps change with the table.
    """

    def __init__(self, directories: Directories, owed: NumberTable, problems: Problems, counters: Counters) -> None:
        self.known: dict[bytes, StateFile] = {}
        self.by_frame: dict[bytes, StateFile] = {}
        self._files: dict[str, StateFile] = {}
        self._current: set[StateFile] = set()
        self._directories = directories
        self._owed = owed
        self._problems = problems
        self._counters = counters

    def prepare(self, signal: Signal, directory: Directory) -> StateFile:
        """Return the file of a signal, created unless it exists. Raises OSError."""
        file = self._files.get(signal.name)
        if file is None or file.signal != signal or file.directory is not directory:
            file = StateFile(signal, directory)
            if directory.fd >= 0 and signal.register not in directory.states:
                directory.make_state(signal.register)
                directory.check(signal.register)
        return file

    def take(self, files: Iterable[StateFile]) -> None:
        """Replace the files."""
        before = self._files
        self._files = {file.signal.name: file for file in files}
        self._current = set(self._files.values())
        self.known = {name.encode(): file for name, file in self._files.items()}
        self.by_frame = {}
        for directory in self._directories.by_path.values():
            directory.states = set()
        for file in self._files.values():
            file.directory.states.add(file.signal.register)
        for name, file in before.items():
            if self._files.get(name) is not file:
                file.close()
                self._problems.forget(file.signal.path)
        for key in self._owed:
            if (found := self._files.get(key.decode())) is not None:
                self._directories.trouble(found.directory)
                continue
            number, self._owed[key] = self._owed[key], 0
            logger.warning("%s: not configured any more: %d owed notifications dropped", key.decode(), number)
            self._counters.unknown += number

    @property
    def owed(self) -> int:
        """The number of pending notifications."""
        return sum(self._owed[name] for name in self._owed)

    def owed_of(self, name: str) -> int:
        """Return the number of pending notifications of a signal."""
        return self._owed[name.encode()]

    def file_of(self, name: str) -> StateFile:
        """Return the state file of a signal."""
        return self._files[name]

    def write(self, files: Sequence[StateFile]) -> None:
        """Write each file, in order. What cannot be written is pending."""
        if not self._current.issuperset(files):
            files = self._renewed(files)
        owed, unwritten = self._owed, []
        owing = bool(owed.places)
        for file in files:
            # Pending notifications of the same signal come first.
            if not (owing and owed[file.signal.name.encode()]):
                try:
                    file.write()
                    continue
                except OSError as error:
                    self._failed(file, error)
            owed[file.signal.name.encode()] += 1
            owing = True
            unwritten.append(file)
        if len(unwritten) == len(files):
            return
        self._counters.delivered += len(files) - len(unwritten)
        now = time.time_ns()
        written = Counter(files)
        for file in unwritten:
            written[file] -= 1
        for file, number in written.items():
            if number:
                file.count += number
                file.last = now
        for directory in {file.directory for file in written}:
            if not directory.current:
                # Replaced meanwhile: the writes may have gone to the old directory.
                for file, number in written.items():
                    if file.directory is directory and number:
                        owed[file.signal.name.encode()] += number
                self._directories.look(directory)

    def _renewed(self, files: Sequence[StateFile]) -> list[StateFile]:
        """Return the current files for those of frames that were read before a reload."""
        renewed = [self._files[name] for file in files if (name := file.signal.name) in self._files]
        self._counters.unknown += len(files) - len(renewed)
        return renewed

    def _failed(self, file: StateFile, error: OSError) -> None:
        self._counters.write_failures += 1
        file.failures += 1
        if error.errno == errno.ENOENT:
            self._directories.look(file.directory)
            self._directories.miss_states(file.directory)
        else:
            self._problems.failed(
                file.signal.path, f"cannot write: {error.strerror}; its notifications are kept and retried"
            )
            self._directories.trouble(file.directory)

    def pay(self, directory: Directory) -> Iterator[bool]:
        """Write the pending notifications of a directory; yields often: whether the writes succeed."""
        for file in tuple(self._files.values()):
            key = file.signal.name.encode()
            if file.directory is not directory or not self._owed[key]:
                continue
            while self._files.get(file.signal.name) is file and (rest := self._owed[key]):
                if not directory.current:
                    yield False
                    return
                written, refused = self._write_some(file, min(rest, SLICE))
                # If it was replaced, the writes may have gone to the old directory.
                if written and directory.current:
                    self._counters.delivered += written
                    file.count += written
                    file.last = time.time_ns()
                    self._owed[key] -= written
                yield not refused
                if refused:
                    break
            else:
                self._problems.well(file.signal.path)

    def _write_some(self, file: StateFile, number: int) -> tuple[int, bool]:
        for written in range(number):
            try:
                file.write()
            except OSError as error:
                self._counters.write_failures += 1
                file.failures += 1
                if error.errno != errno.ENOENT:
                    self._problems.failed(
                        file.signal.path, f"cannot write: {error.strerror}; its notifications are kept and retried"
                    )
                elif file.directory.states_missing_since is None:
                    self._directories.miss_states(file.directory)
                return written, True
        return number, False

    def close(self) -> None:
        """Close files that wait for room on the disk."""
        for file in self._files.values():
            file.close()
