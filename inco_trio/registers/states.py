"""State files: the files of inbound signals. For each notification, the proxy writes `1` and closes the file.

A notification that cannot be written is pending. The in-flight buffer counts the pending notifications of each signal,
which are written later and before newer notifications of the same signal.
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
"""Maximum number of pending notifications that are written before other tasks run."""


@attrs.define(eq=False)
class StateFile:
    """The file of an inbound signal."""

    signal: Signal
    directory: Directory
    fd: int = -1
    """A descriptor that stays open after a failed write (disk full): closing the file would notify its watchers."""
    count: int = 0
    last: int = 0
    """Time of the last write (time.time_ns())."""
    failures: int = 0
    _register: bytes = attrs.field(
        init=False, default=attrs.Factory(lambda file: os.fsencode(file.signal.register), takes_self=True)
    )

    def write(self, *, checked: bool = False) -> None:
        """Write one notification. Raises OSError.

        Never create the file: its directory may be about to vanish. `checked` means that the caller has just checked
        the file, in a directory that only trusted users can change.
        """
        fd = self.fd
        if fd >= 0:
            self._check_still_there()
            fd, self.fd = self.fd, -1
        if fd < 0:
            fd = self._open(checked=checked)
        try:
            os.write(fd, b"1")
        except OSError:
            self.fd = fd
            raise
        os.close(fd)

    def _open(self, *, checked: bool) -> int:
        directory = self.directory
        if directory.fd < 0:
            raise FileNotFoundError(errno.ENOENT, "the directory is missing")
        if not checked or directory.shared:
            directory.check(self._register)  # Check before open(2), which has effects on some devices.
        fd = os.open(self._register, WRITE_FLAGS, dir_fd=directory.fd)
        if directory.shared:
            try:
                directory.check(self._register, fd)  # Another user may have replaced the file before open(2).
            except OSError:
                os.close(fd)
                raise
        return fd

    def _check_still_there(self) -> None:
        try:
            there = os.stat(self.signal.register, dir_fd=self.directory.fd, follow_symlinks=False)
        except OSError:
            there = None
        if there is None or not os.path.samestat(os.fstat(self.fd), there):
            self.close()

    def count_written(self, number: int) -> None:
        self.count += number
        self.last = time.time_ns()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class StateFiles:
    """The state files of a signal table. No method blocks.

    `known` maps wire names to files. `by_frame` is a cache for `Inbound` that maps short frames, without their MAC
    addresses, to files. It is emptied when the table changes.
    """

    def __init__(self, directories: Directories, pending: NumberTable, problems: Problems, counters: Counters) -> None:
        self.known: dict[bytes, StateFile] = {}
        self.by_frame: dict[bytes, StateFile] = {}
        self._files: dict[str, StateFile] = {}
        self._current: set[StateFile] = set()
        self._directories = directories
        self._pending = pending
        self._problems = problems
        self._counters = counters

    def prepare(self, signal: Signal, directory: Directory) -> StateFile:
        """Return the state file of a signal, and create it if it is missing. Raises OSError."""
        file = self._files.get(signal.name)
        if file is None or file.signal != signal or file.directory is not directory:
            file = StateFile(signal, directory)
            if directory.fd >= 0 and signal.register not in directory.states:
                directory.make_state(signal.register)
                directory.check(signal.register)
        return file

    def take(self, files: Iterable[StateFile]) -> None:
        """Use `files` instead of the files of the previous table."""
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
        for key in self._pending:
            if (found := self._files.get(key.decode())) is not None:
                self._directories.trouble(found.directory)
                continue
            number, self._pending[key] = self._pending[key], 0
            logger.warning("%s: no longer configured: %d pending notifications dropped", key.decode(), number)
            self._counters.unknown += number

    @property
    def pending(self) -> int:
        """The number of pending notifications of all signals."""
        return sum(self._pending[name] for name in self._pending)

    def pending_of(self, name: str) -> int:
        return self._pending[name.encode()]

    def file_of(self, name: str) -> StateFile:
        return self._files[name]

    def write(self, files: Sequence[StateFile]) -> None:
        """Write one notification to each file, in order. Notifications that cannot be written become pending."""
        if not self._current.issuperset(files):
            files = self._renewed(files)
        if len(files) == 1 and not self._pending.places:
            self._write_alone(files[0])
            return
        pending, unwritten, checked = self._pending, [], set[StateFile]()
        any_pending = bool(pending.places)
        for file in files:
            # Do not write while older notifications of the same signal are pending.
            if not (any_pending and pending[file.signal.name.encode()]):
                try:
                    file.write(checked=file in checked)
                    checked.add(file)
                    continue
                except OSError as error:
                    self._failed(file, error)
            pending[file.signal.name.encode()] += 1
            any_pending = True
            unwritten.append(file)
        if len(unwritten) == len(files):
            return
        self._counters.delivered += len(files) - len(unwritten)
        written = Counter(files)
        for file in unwritten:
            written[file] -= 1
        for file, number in written.items():
            if number:
                file.count_written(number)
        for directory in {file.directory for file in written}:
            if not directory.current:
                # The directory was replaced meanwhile: the writes may have gone to the old directory.
                for file, number in written.items():
                    if file.directory is directory and number:
                        pending[file.signal.name.encode()] += number
                self._directories.look(directory)

    def _write_alone(self, file: StateFile) -> None:
        """Do what `write` does for one file while nothing is pending, in half the time."""
        try:
            file.write()
        except OSError as error:
            self._failed(file, error)
            self._pending[file.signal.name.encode()] += 1
            return
        self._counters.delivered += 1
        file.count_written(1)
        if not file.directory.current:
            self._pending[file.signal.name.encode()] += 1
            self._directories.look(file.directory)

    def _renewed(self, files: Sequence[StateFile]) -> list[StateFile]:
        """Replace files of the table before the last reload by the current files of the same signals."""
        renewed = [self._files[name] for file in files if (name := file.signal.name) in self._files]
        self._counters.unknown += len(files) - len(renewed)
        return renewed

    def _failed(self, file: StateFile, error: OSError) -> None:
        """Count and log a failed write, and schedule a retry."""
        if self._is_missing(file, error):
            self._directories.look(file.directory)
            self._directories.miss_states(file.directory)
        else:
            self._directories.trouble(file.directory)

    def _is_missing(self, file: StateFile, error: OSError) -> bool:
        """Count a failed write, and return whether the file is missing. Log any other error."""
        self._counters.write_failures += 1
        file.failures += 1
        if error.errno == errno.ENOENT:
            return True
        self._problems.failed(file.signal.path, f"cannot write: {error.strerror}; notifications are kept and retried")
        return False

    def write_pending(self, directory: Directory) -> Iterator[bool]:
        """Write the pending notifications of a directory. After every few writes, yield whether they succeeded."""
        for file in tuple(self._files.values()):
            key = file.signal.name.encode()
            if file.directory is not directory or not self._pending[key]:
                continue
            while self._files.get(file.signal.name) is file and (rest := self._pending[key]):
                if not directory.current:
                    yield False
                    return
                written, refused = self._write_some(file, min(rest, SLICE))
                # If the directory was replaced, the writes may have gone to the old directory.
                if written and directory.current:
                    self._counters.delivered += written
                    file.count_written(written)
                    self._pending[key] -= written
                yield not refused
                if refused:
                    break
            else:
                self._problems.well(file.signal.path)

    def _write_some(self, file: StateFile, number: int) -> tuple[int, bool]:
        for written in range(number):
            try:
                file.write(checked=written > 0)
            except OSError as error:
                if self._is_missing(file, error) and file.directory.states_missing_since is None:
                    self._directories.miss_states(file.directory)
                return written, True
        return number, False

    def close(self) -> None:
        """Close files that stayed open after a failed write."""
        for file in self._files.values():
            file.close()
