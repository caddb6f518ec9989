"""State files: the files of inbound signals. For each notification, the proxy writes `1` and closes the file.

If the write fails, the notification becomes pending. The in-flight buffer counts the pending notifications of each
signal. The proxy writes them later, before newer notifications of the same signal.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from inco_trio import real_clock
from inco_trio.counters import Counters
from inco_trio.persist.inflight import PENDING, Inflight
from inco_trio.problems import Problems, report
from inco_trio.registers.directories import Directories
from inco_trio.registers.directory import WRITE_FLAGS, Directory
from inco_trio.signals import Signal

__all__ = ["StateFile", "StateFiles"]

logger = logging.getLogger(__name__)

RUNS = 64
"""Maximum number of distinct times to remember for the pending notifications of a file. It must be even."""
REPLACED = "its directory was replaced"
SLICE = 32
"""Maximum number of pending notifications to write before other tasks run."""


class StateFile:
    """The file of an inbound signal."""

    def __init__(self, signal: Signal, directory: Directory) -> None:
        self.signal = signal
        self.directory = directory
        self.fd = -1
        """A descriptor kept open after a failed write (disk full): closing the file would notify its watchers."""
        self.count = 0
        self.last = 0
        """Time of the last write (real_clock.monotonic_ns())."""
        self.failures = 0
        self.reason = "older notifications are pending"
        """Why the last write failed."""
        self.runs: deque[list[int]] = deque()
        """Pairs of a time (real_clock.monotonic_ns()) and a number of pending notifications, oldest first.

        The oldest notification of a pair became pending at that time, the others later. A negative time means that all
        of them became pending at `-time` or later.
        """
        self._stride = 1
        """Maximum number of notifications in a new pair of `runs`. It doubles whenever `runs` is full."""
        self._register = os.fsencode(signal.register)

    def write(self) -> None:
        """Write one notification. Raises OSError.

        Never create the file, because its directory may be about to vanish.
        """
        fd = self.fd
        if fd >= 0:
            self._check_still_there()
            fd, self.fd = self.fd, -1
        if fd < 0:
            directory, register = self.directory, self._register
            try:
                if register in directory.checked:  # In the usual case, avoid the cost of another call.
                    fd = os.open(register, WRITE_FLAGS, dir_fd=directory.fd)
                else:
                    fd = self._check_and_open()
            except OSError:
                if register in directory.checked:
                    directory.checked.discard(register)
                    directory.check(register)  # This raises an error that names the cause, such as a FIFO.
                raise
        try:
            os.write(fd, b"1")
        except OSError:
            self.fd = fd
            raise
        os.close(fd)

    def _check_and_open(self) -> int:
        directory, register = self.directory, self._register
        if directory.fd < 0:
            raise FileNotFoundError(errno.ENOENT, "the directory is missing")
        if directory.shared:
            return directory.open_shared(register)
        directory.check(register)  # Check before open(2), which has side effects on some devices.
        directory.checked.add(register)
        return os.open(register, WRITE_FLAGS, dir_fd=directory.fd)

    def pend(self, since: int = 0) -> None:
        """Record that a notification has become pending. `since` is a time as in `runs`, or 0 for now."""
        since = since or real_clock.monotonic_ns()
        if not self.runs:
            self._stride = 1
        elif (last := self.runs[-1])[1] < self._stride:
            last[:] = _merged(last[0], since), last[1] + 1
            return
        if len(self.runs) == RUNS:
            # Remember every second time only, and do the same from now on. All times then stay equally exact.
            self._stride *= 2
            pairs = zip(*[iter(self.runs)] * 2, strict=True)
            self.runs = deque([_merged(first, second), few + more] for (first, few), (second, more) in pairs)
        self.runs.append([since, 1])

    def unpend(self, number: int) -> Iterator[tuple[int, int]]:
        """Forget the oldest `number` pending notifications. Yield their times (see `Listener.carried`) and counts."""
        while number and self.runs:
            since, there = self.runs[0]
            some = min(number, there if since < 0 else 1)
            number -= some
            if some == there:
                self.runs.popleft()
            else:
                self.runs[0] = [-abs(since), there - some]
            yield since, some
        if number:
            yield 0, number

    def _check_still_there(self) -> None:
        try:
            there = self.directory.status(self._register)
        except OSError:
            there = None
        if there is None or not os.path.samestat(os.fstat(self.fd), there):
            self.close()

    def count_written(self, number: int) -> None:
        self.count += number
        self.last = real_clock.monotonic_ns()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _merged(first: int, second: int) -> int:
    """Return the time of a pair in `StateFile.runs` that replaces two pairs with these times."""
    return first if abs(first) <= abs(second) else -abs(second)


class StateFiles:
    """The state files of a signal table. No method blocks.

    `known` maps wire names to files. `by_frame` is a cache for `Inbound` that maps short frames, without their MAC
    addresses, to files. It is emptied when the table changes.
    """

    def __init__(self, directories: Directories, inflight: Inflight, problems: Problems, counters: Counters) -> None:
        self.known: dict[bytes, StateFile] = {}
        self.by_frame: dict[bytes, StateFile] = {}
        self._files: dict[str, StateFile] = {}
        self._current: set[StateFile] = set()
        self._directories = directories
        self._pending = inflight.pending
        self._times = inflight.times
        self._problems = problems
        self._counters = counters
        self.delivered_late: Callable[[Sequence[StateFile], int], None] = lambda *_: None
        """A function that is called after pending notifications have been written.

        Its arguments are the state files and the time when the notifications became pending; see `Listener.carried`.
        """

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
                if not found.runs and (since := min(self._times[PENDING], real_clock.monotonic_ns())):
                    # They became pending in an earlier process, or before a reload changed the register.
                    found.runs.append([-since, self._pending[key]])
                self._directories.trouble(found.directory)
                continue
            number, self._pending[key] = self._pending[key], 0
            text = f"{key.decode()}: no longer configured: {number} pending notifications dropped"
            report(logger, logging.WARNING, text, "dropped", number)
            self._counters.unknown += number

    @property
    def pending(self) -> int:
        """The number of pending notifications of all signals."""
        return sum(self._pending[name] for name in self._pending)

    def pending_of(self, name: str) -> int:
        return self._pending[name.encode()]

    def file_of(self, name: str) -> StateFile:
        return self._files[name]

    def write(self, files: Sequence[StateFile], since: int = 0) -> list[str | None] | None:
        """Write one notification to each file, in order. Notifications that cannot be written become pending.

        `since` is 0, or negative if the notifications may have waited since the time `-since`.
        Return None if all were written. Otherwise, return one outcome per file: "" if the file was written, the reason
        if the notification is pending, or None if the table no longer contains the signal.
        """
        written = Counter(files)
        if not written.keys() <= self._current:
            return self._write_renewed(files, since)
        pending, unwritten = self._pending, []
        any_pending = bool(pending.places)
        reopened: dict[Directory, int] = {}
        """For each directory that was reopened after a failed write, the index of that write in `files`."""
        for number, file in enumerate(files):
            # Do not write while older notifications of the same signal are pending.
            if not (any_pending and pending[file.signal.name.encode()]):
                try:
                    file.write()
                    continue
                except OSError as error:
                    before = file.directory.wd
                    self._failed(file, error)
                    if file.directory.wd != before:
                        reopened[file.directory] = number
            self._pend(file, since)
            any_pending = True
            unwritten.append(number)
        if len(unwritten) == len(files):
            return [file.reason for file in files]
        self._counters.delivered += len(files) - len(unwritten)
        for number in unwritten:
            written[files[number]] -= 1
        for file, number in written.items():
            if number:
                file.count_written(number)
        replaced = {directory for directory in {file.directory for file in written} if not directory.current}
        if not unwritten and not replaced:
            return None
        outcomes: list[str | None] = [""] * len(files)
        for number in unwritten:
            outcomes[number] = files[number].reason
        for number, file in enumerate(files):
            if not outcomes[number] and (file.directory in replaced or number < reopened.get(file.directory, 0)):
                # The directory was replaced during the write, which may have gone to the old directory.
                self._pend(file, since)
                outcomes[number] = REPLACED
        for directory in replaced:
            self._directories.look(directory)
        return outcomes

    def write_alone(self, file: StateFile, since: int = 0) -> list[str | None] | None:
        """Do the same as `write` for one notification, but faster."""
        if self._pending.places or file not in self._current:
            return self.write((file,), since)
        try:
            file.write()
        except OSError as error:
            self._failed(file, error)
            self._pend(file, since)
            return [file.reason]
        self._counters.delivered += 1
        file.count_written(1)
        if file.directory.current:
            return None
        self._pend(file, since)
        self._directories.look(file.directory)
        return [REPLACED]

    def _pend(self, file: StateFile, since: int) -> None:
        earliest = abs(since) or real_clock.monotonic_ns()
        if not self._pending.places or earliest < self._times[PENDING]:
            self._times[PENDING] = earliest
        self._pending[file.signal.name.encode()] += 1
        file.pend(since)

    def _write_renewed(self, files: Sequence[StateFile], since: int) -> list[str | None]:
        """Write to the current files of the signals. Some of `files` belong to a table that a reload has replaced."""
        renewed = [self._files.get(file.signal.name) for file in files]
        known = [file for file in renewed if file is not None]
        self._counters.unknown += len(files) - len(known)
        outcomes = iter(self.write(known, since) or [""] * len(known))
        return [None if file is None else next(outcomes) for file in renewed]

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
            file.reason = "the file or its directory is missing"
            return True
        file.reason = f"cannot write: {error.strerror}"
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
                    for since, number in file.unpend(written):
                        self.delivered_late([file] * number, since)
                    self._pending[key] -= written
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
                if self._is_missing(file, error) and file.directory.states_missing_since is None:
                    self._directories.miss_states(file.directory)
                return written, True
        return number, False

    def close(self) -> None:
        """Close files that stayed open after a failed write."""
        for file in self._files.values():
            file.close()
