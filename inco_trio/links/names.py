"""Names in directories, as inotify(7) tells of them: the sockets of `unix:` links appear and vanish by name.

One descriptor serves any number of links, as a user may have few (fs.inotify.max_user_instances).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import attrs
import trio

from inco_trio.linux import inotify as ino
from inco_trio.linux.inotify import Inotify, parse_events

__all__ = ["Names", "Watched"]

MASK = (
    ino.IN_CREATE
    | ino.IN_MOVED_TO
    | ino.IN_DELETE
    | ino.IN_MOVED_FROM
    | ino.IN_ATTRIB
    | ino.IN_DELETE_SELF
    | ino.IN_MOVE_SELF
    | ino.IN_ONLYDIR
)
BUFFER = 4096
TRIES = 3
"""Looks at a way that changes while it is looked at. Who changes it more often is told of it by events."""


@attrs.define(eq=False)
class Watched:
    """The paths that one link has watched."""

    paths: tuple[Path, ...]
    places: frozenset[tuple[int, bytes]] = frozenset()
    """Watch descriptors, and names in the directories that they watch."""
    complete: frozenset[tuple[int, bytes]] = frozenset()
    """Those of them that are the last names of the paths: the way leads there, whatever becomes of these."""
    moved: bool = True
    """Whether the way to a path may be another one."""
    all_found: bool = False
    """Whether all paths can be watched."""
    changed: bool = False
    woken: trio.Event = attrs.Factory(trio.Event)


class Names:
    """Tells when what is at a path may be something else than before. Raises OSError (inotify_init(2))."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._at: dict[int, dict[bytes, set[Watched]]] = {}
        self._buffer = memoryview(bytearray(BUFFER))
        self._reading = False
        self._waiting: set[Watched] = set()

    def watch(self, watched: Watched) -> bool:
        """Watch the paths as they lead from now on; returns whether that can be done for all of them.

        What is missing on the way to a path is awaited in the directory above.
        """
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
        """Watch the paths no more."""
        self._move(watched, frozenset())

    def _move(self, watched: Watched, places: frozenset[tuple[int, bytes]]) -> None:
        former, watched.places = watched.places, places
        for wd, name in places - former:
            self._at.setdefault(wd, {}).setdefault(name, set()).add(watched)
        for wd, name in former - places:
            names = self._at.get(wd, {})  # The kernel may have ended the watch.
            names.get(name, set()).discard(watched)
            if not names.get(name, True):
                del names[name]
            if not names and self._at.pop(wd, None) is not None:
                self._inotify.unwatch(wd)

    def _way_to(self, path: Path) -> tuple[int, bytes, bool] | None:
        """The lowest directory on the way that can be watched, the next name in it, and whether it is the last one.

        None if no directory can be watched.
        """
        found = None
        for _ in range(TRIES):
            for parent in path.parents:
                try:
                    wd = self._inotify.watch(str(parent), MASK)
                except OSError:
                    continue  # It is missing, or not ours to read.
                following = path if parent == path.parent else parent / path.relative_to(parent).parts[0]
                found = wd, os.fsencode(following.name), following == path
                break
            else:
                return found
            if following == path or not following.is_dir():
                return found
        return found

    async def wait(self, watched: Watched) -> None:
        """Wait until something may have changed at one of the paths."""
        # Whoever waits first reads for all, and is relieved by another one.
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
        """Close the descriptor."""
        self._inotify.close()


def _wake(groups: Iterable[set[Watched]], place: tuple[int, bytes] | None) -> None:
    """Tell of a change at `place`; None is any."""
    for group in groups:
        for watched in group:
            watched.changed = True
            watched.moved |= place not in watched.complete
            watched.woken.set()
