"""Watch the paths of all links with one inotify descriptor, because the kernel limits descriptors per user."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

import attrs
import trio

from inco_trio.linux import inotify as ino
from inco_trio.linux.files import Resolver
from inco_trio.linux.inotify import Inotify, parse_events

__all__ = ["Names", "Watched"]

NAMES_CHANGED = ino.IN_CREATE | ino.IN_MOVED_TO | ino.IN_DELETE | ino.IN_MOVED_FROM | ino.IN_ATTRIB
SELF_CHANGED = ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
ABOVE_MASK = SELF_CHANGED | ino.IN_MASK_ADD
"""Without IN_ATTRIB, which would also report changes of all files in the directory."""
MASK = NAMES_CHANGED | ABOVE_MASK
BUFFER = 4096
TRIES = 3
"""Maximum number of attempts to watch a path that keeps changing. After that, events report further changes."""


@attrs.define(eq=False)
class Watched:
    """The watched paths of one link."""

    paths: tuple[Path, ...]
    places: frozenset[tuple[int, bytes]] = frozenset()
    """For each path, the watch descriptor of a directory and the name of the directory entry to wait for.

    Also the watch descriptors of all directories above it, with an empty name: only their own changes matter.
    """
    complete: frozenset[tuple[int, bytes]] = frozenset()
    """The elements of `places` that name a path's last component. Their events do not change the set of watches."""
    moved: bool = True
    """Whether a directory on one of the paths may have been replaced."""
    all_found: bool = False
    """Whether all paths can be watched."""
    changed: bool = False
    woken: trio.Event = attrs.Factory(trio.Event)


class Names:
    """A watcher that reports when a path may refer to a different file. Raises OSError (inotify_init(2))."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._at: dict[int, dict[bytes, set[Watched]]] = {}
        self._wide: set[int] = set()
        """The watch descriptors for which the kernel reports all names in the directory."""
        self._buffer = memoryview(bytearray(BUFFER))
        self._reading = False
        self._waiting: set[Watched] = set()

    def watch(self, watched: Watched) -> bool:
        """Watch the paths, or their nearest existing ancestors. Return whether all paths can be watched."""
        if watched.moved:
            watched.moved = False
            watched.all_found = False
            places: set[tuple[int, bytes]] = set()
            complete = set()
            ways: dict[Path, tuple[int, str]] = {}
            with suppress(OSError), closing(Resolver()) as resolver:
                for path in watched.paths:
                    if path.parent not in ways:
                        ways[path.parent] = self._way_to(path.parent, resolver, places)
                    wd, missing = ways[path.parent]
                    place = wd, os.fsencode(missing or path.name)
                    places.add(place)
                    if not missing:
                        complete.add(place)
                watched.all_found = True
            watched.complete = frozenset(complete)
            self._move(watched, frozenset(places))
            watched.moved |= not watched.all_found
        return watched.all_found

    def forget(self, watched: Watched) -> None:
        self._move(watched, frozenset())

    def _move(self, watched: Watched, places: frozenset[tuple[int, bytes]]) -> None:
        former, watched.places = watched.places, places
        for wd, name in places - former:
            self._at.setdefault(wd, {}).setdefault(name, set()).add(watched)
        for wd, name in former - places:
            names = self._at.get(wd, {})  # The kernel may have removed the watch.
            names.get(name, set()).discard(watched)
            if not names.get(name, True):
                del names[name]
            if not names and self._at.pop(wd, None) is not None:
                self._wide.discard(wd)
                self._inotify.unwatch(wd)
            elif name and names.keys() == {b""} and wd in self._wide:
                _wake(names.values(), None)  # Let `_watch_above` narrow the watch.

    def _way_to(self, directory: Path, resolver: Resolver, places: set[tuple[int, bytes]]) -> tuple[int, str]:
        """Watch a directory or its nearest existing ancestor, the directories above it, and the symlinks on the way.

        Add them to `places`. Return the watch descriptor, and the next component of the path if it is missing. Raises
        OSError.

        The watches are added by descriptor. By path, inotify_add_watch(2) could wait for a FUSE filesystem that another
        user has mounted.
        """

        def followed(directories: list[str], name: str) -> None:
            with suppress(OSError):  # The directory is unreadable.
                places.add((self._watch_all(directories, places), os.fsencode(name)))

        for _ in range(TRIES):
            directories, left = resolver.approach(directory, followed)
            wd = self._watch_all(directories, places)
            if resolver.is_current() and (not left or resolver.approach(directory)[1] == left):
                break
        return wd, left[0] if left else ""

    def _watch_all(self, directories: list[str], places: set[tuple[int, bytes]]) -> int:
        """Watch the last directory and those above it. Return the watch descriptor of the last one. Raises OSError."""
        *above, nearest = directories
        for each in above[1:]:  # The root directory cannot be moved.
            with suppress(OSError):  # The directory is unreadable.
                places.add((self._watch_above(each, places), b""))
        wd = self._inotify.watch(nearest, MASK)
        self._wide.add(wd)
        places.add((wd, b""))
        return wd

    def _watch_above(self, directory: str, places: set[tuple[int, bytes]]) -> int:
        """Watch a directory for its own removal or move only, unless a task waits for names in it. Raises OSError."""
        wd = self._inotify.watch(directory, ABOVE_MASK)
        in_use = any(self._at.get(wd, ())) or any(name for at, name in places if at == wd)
        if wd in self._wide and not in_use:
            self._inotify.watch(directory, SELF_CHANGED)
            self._wide.discard(wd)
        return wd

    async def wait(self, watched: Watched) -> None:
        """Wait until one of the paths may refer to a different file."""
        # The first waiting task reads events for all waiting tasks. When it stops waiting, another task takes over.
        while not watched.changed:
            watched.woken = trio.Event()
            try:
                if self._reading:
                    self._waiting.add(watched)
                    await watched.woken.wait()
                else:
                    self._reading = True
                    try:
                        await trio.lowlevel.wait_readable(self._inotify.fd)
                        self._read()
                    finally:
                        self._reading = False
            finally:
                self._waiting.discard(watched)
                if self._waiting and not self._reading:
                    next(iter(self._waiting)).woken.set()
        watched.changed = False

    @property
    def unread(self) -> bool:
        """Whether events are queued that no waiting task has read."""
        return self._inotify.queued > 0

    def _read(self) -> None:
        for wd, mask, name in parse_events(self._buffer[: self._inotify.read_into(self._buffer)]):
            if mask & ino.IN_Q_OVERFLOW:
                for names in self._at.values():
                    _wake(names.values(), None)
                continue
            names = self._at.get(wd, {})
            if name:
                _wake([names.get(name, set())], (wd, name))
            else:
                _wake(names.values(), None)
            if mask & ino.IN_IGNORED:
                self._at.pop(wd, None)
                self._wide.discard(wd)
                self._inotify.forget(wd)

    def close(self) -> None:
        self._inotify.close()


def _wake(groups: Iterable[set[Watched]], place: tuple[int, bytes] | None) -> None:
    """Wake the tasks in `groups` because the directory entry `place` has changed (None: any entry may have changed)."""
    for group in groups:
        for watched in group:
            watched.changed = True
            watched.moved |= place not in watched.complete
            watched.woken.set()
