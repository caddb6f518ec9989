"""Watch the paths of all links with one inotify descriptor, because the kernel limits descriptors per user."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import attrs
import trio

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Inotify, parse_events

__all__ = ["Names", "Watched"]

NAMES_CHANGED = ino.IN_CREATE | ino.IN_MOVED_TO | ino.IN_DELETE | ino.IN_MOVED_FROM | ino.IN_ATTRIB
MASK = NAMES_CHANGED | ino.IN_DELETE_SELF | ino.IN_MOVE_SELF | ino.IN_ONLYDIR
BUFFER = 4096
TRIES = 3
"""Maximum number of attempts to watch a path that keeps changing. After that, events report further changes."""


@attrs.define(eq=False)
class Watched:
    """The watched paths of one link."""

    paths: tuple[Path, ...]
    places: frozenset[tuple[int, bytes]] = frozenset()
    """For each path, the watch descriptor of a directory and the name of the directory entry to wait for."""
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
        self._buffer = memoryview(bytearray(BUFFER))
        self._reading = False
        self._waiting: set[Watched] = set()

    def watch(self, watched: Watched) -> bool:
        """Watch the paths, or their nearest existing ancestors. Return whether all paths can be watched."""
        if watched.moved:
            watched.moved = False
            ways = [self._way_to(path) for path in watched.paths]
            found = [way for way in ways if way is not None]
            watched.all_found = len(found) == len(ways)
            watched.complete = frozenset((wd, name) for wd, name, complete in found if complete)
            self._move(watched, frozenset((wd, name) for wd, name, _ in found))
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
                self._inotify.unwatch(wd)

    def _way_to(self, path: Path) -> tuple[int, bytes, bool] | None:
        """Watch the nearest ancestor of a path that can be watched. Return None if no ancestor can be watched.

        Return the watch descriptor, the next component of the path, and whether it is the last component.
        """
        found = None
        for _ in range(TRIES):
            for parent in path.parents:
                try:
                    wd = self._inotify.watch(str(parent), MASK)
                except OSError:
                    continue  # The directory is missing or unreadable.
                following = path if parent == path.parent else parent / path.relative_to(parent).parts[0]
                found = wd, os.fsencode(following.name), following == path
                break
            else:
                return found
            if following == path or not following.is_dir():
                return found
        return found

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
