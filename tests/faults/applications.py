"""The applications on core 0: they write trigger files, read state files, and replace, move or remove them.

Because directories and files are replaced, the path of a state file can refer to several files in turn. A notification
counts as delivered only if an application could find it: in a file that was at the path when the notification was sent,
or later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from inco_trio.linux.inotify import IN_CLOSE_WRITE, IN_MODIFY, IN_Q_OVERFLOW, Inotify, parse_events
from inco_trio.linux.libc import check, libc
from inco_trio.simulation.world import Peer
from netns.hang import HANG
from tests.faults.supervised import wait_path

__all__ = ["HEADER", "Applications", "Recorder", "Wire", "exchange", "remove_tree", "write_config"]

HEADER = 14
"""Length of an Ethernet header in bytes."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def write_config(path: Path, directory: Path, inbound: Iterable[str], outbound: Iterable[str]) -> None:
    """Write a udrv.json with the signals `inbound` and `outbound`, each with a register named after it."""
    signals = {name: {"direction": "inbound", "reg": f"ihub-irq-dev.{name}_state"} for name in inbound}
    signals |= {name: {"direction": "outbound", "reg": f"ihub-irq-dev.{name}_trig"} for name in outbound}
    board = {
        "file": {"ihub-irq-dev": {"path": str(directory)}},
        "misc": {"inco_proxy": {"signals": signals}},
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(board))
    new.replace(path)


def exchange(one: Path, other: Path) -> None:
    """Exchange two files of any type atomically (renameat2(2)), so that neither path is missing in between."""
    paths = os.fsencode(one), os.fsencode(other)
    check(libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE), str(other))


def remove_tree(path: Path) -> None:
    """Remove a directory and its contents, even if the proxy recreates files in the meantime.

    The proxy recreates a deleted file after 0.03 s, and also removes temporary files.
    """
    deadline = time.monotonic() + HANG
    while os.path.lexists(path):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
        else:
            return


class Recorder(threading.Thread):
    """A thread that calls `read_queued` whenever `fd` is readable, until `close` is called."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(name=name)
        self._fd = fd
        self._end, self._close = os.pipe()
        self.changed = threading.Condition()
        self.failure: BaseException | None = None

    def read_queued(self) -> None:
        """Read all data that is queued on `fd`."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            while self._end not in select.select([self._fd, self._end], [], [])[0]:
                self.read_queued()
                with self.changed:
                    self.changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - re-raised by `waited` and `close`
            with self.changed:
                self.failure = error
                self.changed.notify_all()

    def waited(self, happened: Callable[[], bool]) -> bool:
        """Wait until `happened()` is true; check after each read. Return False on timeout."""
        with self.changed:
            in_time = self.changed.wait_for(lambda: self.failure is not None or happened(), HANG)
        if self.failure is not None:
            raise self.failure
        return in_time

    def wait(self, happened: Callable[[], bool], otherwise: str) -> None:
        """Wait until `happened()` is true. On timeout, fail with the message `otherwise`."""
        assert self.waited(happened), otherwise

    def close(self) -> None:
        """End the thread. Raise the error if the thread has failed."""
        os.close(self._close)
        self.join()
        os.close(self._end)
        if self.failure is not None:
            raise self.failure


@attrs.define(eq=False)
class _Place:
    """A directory or a single state file that stayed at its original path until the time `ended`."""

    fd: int
    ended: float = float("inf")
    renamed: set[str] = attrs.Factory(set)
    """Trigger files that an application has replaced in this directory."""


def _reads_one(fd: int) -> bool:
    return os.pread(fd, 16, 0) == b"1"


class Applications(Recorder):
    """All applications that use one IRQ directory; `closes` counts the writes to each state file since `reset`."""

    def __init__(self, directory: Path, inbound: Iterable[str], outbound: Iterable[str]) -> None:
        self.directory = directory
        self.inbound = tuple(inbound)
        self.triggers = {f"{name}_trig" for name in outbound}
        self._inotify = Inotify()
        super().__init__(self._inotify.fd, "applications")
        self.closes: Counter[str] = Counter()
        self._buffer = memoryview(bytearray(1 << 20))
        self._directories: list[_Place] = []
        self._files: dict[str, list[_Place]] = {}
        self._paths = threading.Lock()
        self._aside = 0
        self._adopt()
        self.start()

    def read_queued(self) -> None:
        for _wd, mask, name in parse_events(self._buffer[: self._inotify.read_into(self._buffer)]):
            assert not mask & IN_Q_OVERFLOW, "the test's own inotify queue overflowed"
            if mask & IN_CLOSE_WRITE and name.endswith(b"_state"):
                self.closes[name.decode().removesuffix("_state")] += 1

    def close(self) -> None:
        super().close()
        self._forget()
        for place in self._directories:
            os.close(place.fd)
        self._inotify.close()

    def trigger(self, name: str) -> None:
        """Write to a trigger file, as a shell's `echo 1 >` does."""
        with self._paths:
            (self.directory / f"{name}_trig").write_bytes(b"1\n")

    def trigger_by_rename(self, name: str) -> None:
        """Replace a trigger file by renaming a new file to its path."""
        with self._paths:
            new = self.directory / f".{name}.new"
            new.write_bytes(b"1\n")
            new.rename(self.directory / f"{name}_trig")
            self._directories[-1].renamed.add(f"{name}_trig")

    def delivered(self, name: str, sent: float) -> bool:
        """Return whether an application finds a 1 in the state file for a notification sent at the time `sent`."""
        if any(place.ended >= sent and _reads_one(place.fd) for place in self._files.get(name, ())):
            return True
        return any(place.ended >= sent and self._reads_one(place.fd, name) for place in self._directories)

    @staticmethod
    def _reads_one(directory: int, name: str) -> bool:
        register = f"{name}_state"
        try:
            if not stat.S_ISREG(os.stat(register, dir_fd=directory, follow_symlinks=False).st_mode):
                return False
            fd = os.open(register, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except OSError:
            # The file is missing, or it is being replaced.
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and _reads_one(fd)
        finally:
            os.close(fd)

    @staticmethod
    def mark() -> float:
        """Return the current time. Pass it to `delivered` for the notifications that are sent next."""
        return time.monotonic()

    def reset(self, names: Iterable[str] = ()) -> None:
        """Empty the state files `names` (default: all), as an application does after handling notifications.

        truncate(2) neither opens nor closes the file, so it causes no close event.
        """
        chosen = tuple(names) or self.inbound
        if chosen == self.inbound:
            self._forget()
            self.closes.clear()
        for name in chosen:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.directory / f"{name}_state", 0)

    def _forget(self) -> None:
        for place in (place for places in self._files.values() for place in places):
            os.close(place.fd)
        self._files.clear()
        for place in [place for place in self._directories if place.ended < float("inf")]:
            os.close(place.fd)
            self._directories.remove(place)

    def _adopt(self) -> None:
        """Wait until the IRQ directory exists, and watch it."""
        wait_path(self.directory)
        self._follow(self.directory)

    def _follow(self, path: Path) -> None:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self._inotify.watch(f"/proc/self/fd/{fd}/.", IN_CLOSE_WRITE | IN_MODIFY)
        self._directories.append(_Place(fd))

    def _beside(self, path: Path) -> Path:
        self._aside += 1
        return path.with_name(f"{path.name}.{self._aside}")

    def is_watched(self, inodes: set[int]) -> bool:
        """Return whether `inodes` includes the IRQ directory and each trigger file that no application has replaced."""
        place = self._directories[-1]
        missing = self.triggers - place.renamed
        with os.scandir(self.directory) as files:
            watched = {file.name for file in files if file.inode() in inodes}
        return os.fstat(place.fd).st_ino in inodes and missing <= watched

    def replace_directory(self) -> None:
        """Atomically replace the IRQ directory with an empty directory (renameat2(2))."""
        new = self._beside(self.directory)
        new.mkdir()
        current = self._directories[-1]
        self._follow(new)
        with self._paths:
            exchange(new, self.directory)
            current.ended = time.monotonic()

    def move_away(self, path: Path) -> None:
        """Rename `path` (the IRQ directory or a parent directory), and create a new, empty IRQ directory."""
        with self._paths:
            path.rename(self._beside(path))
            self._directories[-1].ended = time.monotonic()
            # The directory might already exist, because the proxy creates it during a reload.
            self.directory.mkdir(parents=True, exist_ok=True)
            self._adopt()

    def remove_directory(self) -> None:
        """Remove the IRQ directory and its contents, and recreate the directory."""
        with self._paths:
            remove_tree(self.directory)
            self._directories[-1].ended = time.monotonic()
            # The directory might already exist, because the proxy creates it during a reload.
            self.directory.mkdir(parents=True, exist_ok=True)
            self._adopt()

    def replace_state(self, name: str) -> None:
        """Replace a state file by renaming a new file to its path."""
        with self._paths:
            new = self.directory / f".{name}.new"
            new.touch()
            self._retire(name, lambda path: new.rename(path))

    def block_state(self, name: str, kind: str) -> Path:
        """Replace a state file with a directory, FIFO or symlink, and return the path."""

        def block(path: Path) -> None:
            blocker = self._beside(path)
            if kind == "directory":
                blocker.mkdir()
            elif kind == "FIFO":
                os.mkfifo(blocker)
            else:
                blocker.symlink_to("/dev/null")
            exchange(blocker, path)
            blocker.unlink()

        with self._paths:
            self._retire(name, block)
        return self.directory / f"{name}_state"

    def unblock_state(self, path: Path) -> None:
        """Remove the directory, FIFO or symlink that `block_state` created, if it still exists."""
        with self._paths, contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif not path.is_file() or path.is_symlink():
                path.unlink()

    def remove_state(self, name: str) -> None:
        """Remove a state file."""
        with self._paths:
            self._retire(name, lambda path: path.unlink())

    def _retire(self, name: str, change: Callable[[Path], object]) -> None:
        path = self.directory / f"{name}_state"
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        change(path)
        self._files.setdefault(name, []).append(_Place(fd, time.monotonic()))


class Wire(Recorder):
    """A record of the frames that arrive at core 1; `seen` counts them by signal name."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer.fileno(), "wire")
        self._peer = peer
        self.seen: Counter[str] = Counter()
        self.order: list[str] = []
        self.sources: set[bytes] = set()
        self.start()

    def wait_seen(self, name: str, times: int = 1) -> None:
        """Wait until `name` has arrived `times` times."""
        self.wait(lambda: self.seen[name] >= times, f"{name} has not been sent")

    def read_queued(self) -> None:
        try:
            while True:
                frame = self._peer.receive(0)
                name = frame[HEADER:].rstrip(b"\0").decode()
                self.seen[name] += 1
                self.order.append(name)
                self.sources.add(frame[6:12])
        except OSError as error:
            # Either no frame is left (TimeoutError), or the link went down, which the kernel reports once (ENETDOWN).
            if not isinstance(error, TimeoutError) and error.errno != errno.ENETDOWN:
                raise
