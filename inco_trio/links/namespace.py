"""A link over an interface in a named network namespace, which may be deleted and recreated with the same name.

A socket belongs to the network namespace in which it was created, and keeps that namespace alive. When the name refers
to a new namespace, the link opens a socket in it. The link first receives the frames that the old socket has queued.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

import trio

from inco_trio.errors import IncoError, LinkNotFoundError
from inco_trio.links.link import LinkDownError
from inco_trio.links.names import Names, Watched
from inco_trio.links.packet import PacketLink
from inco_trio.linux.netns import entered, identity
from inco_trio.problems import report

__all__ = ["NamespaceLink"]

logger = logging.getLogger(__name__)

ABSENT = (0, 0)
LOOK_AGAIN = 0.2
"""Seconds between checks for a missing namespace: `ip netns add` creates the file before it mounts the namespace.

The link also checks a namespace whose path cannot be watched."""


class NamespaceLink:
    """The `Link` of the interface `name` in the network namespace at the path `netns`.

    `inner` is a link that is already open in this namespace, whose identity is `namespace`. `names` watches the path.
    """

    def __init__(self, inner: PacketLink, netns: Path, namespace: tuple[int, int], names: Names) -> None:
        self.name = inner.name
        self.foreign = 0
        self._inner: PacketLink | None = None
        self._former: list[PacketLink] = []
        self._netns = netns
        self._identity = ABSENT
        self._names, self._watched = names, Watched((netns,))
        self._opened = trio.Event()
        self._expected: tuple[Collection[bytes], Collection[bytes]] = (), ()
        self._restricted = False
        """Whether the kernel drops frames without an expected name. A new socket continues this."""
        self._refused = ""
        self._all_watched = False
        self._closed = False
        self._dropped = 0
        """How many frames the sockets of former namespaces have dropped since the last call of `dropped`."""
        self._downs_before = self._downs_at_start = 0
        """The value of `downs`, and the kernel's counter, at the time when the link entered the current namespace."""
        self._use(inner, namespace)

    def _use(self, inner: PacketLink, namespace: tuple[int, int]) -> None:
        self._inner, self._identity = inner, namespace
        self.fd = inner.fd
        self._opened.set()

    @property
    def renewal(self) -> str:
        return "" if self._inner is None else self._inner.renewal

    @property
    def mac(self) -> bytes:
        return b"" if self._inner is None else self._inner.mac

    @property
    def granted(self) -> int | None:
        return None if self._inner is None else self._inner.granted

    @property
    def running(self) -> bool:
        return self._inner is not None and self._inner.running

    @property
    def down_reason(self) -> str:
        return self.absence if self._inner is None else self._inner.down_reason

    @property
    def downs(self) -> int:
        return self._downs_before + (0 if self._inner is None else self._inner.downs - self._downs_at_start)

    @property
    def fits(self) -> bool:
        return self._inner is not None and self._inner.fits

    @property
    def description(self) -> str:
        inner = "" if self._inner is None else f", {self._inner.description}"
        return f"in {self._netns}{inner}"

    @property
    def absence(self) -> str:
        if self._inner is not None:
            return self._inner.absence
        return self._refused or f"the network namespace {self._netns} is gone"

    def missing(self) -> IncoError:
        return LinkNotFoundError(self.name, self.absence) if self._inner is None else self._inner.missing()

    def refresh(self) -> bool:
        self._all_watched = self._names.watch(self._watched)
        enters = self._inner is None or identity(self._netns) != self._identity
        if enters:
            self._leave()
            self._enter()
        exists = self._inner is not None and self._inner.refresh()
        if enters and self._inner is not None:
            self._downs_at_start = self._inner.downs
        return exists

    def _leave(self) -> None:
        """Stop sending in the old namespace. `receive_one` closes that namespace's socket once its queue is empty."""
        if self._inner is None:
            return
        report(logger, logging.WARNING, f"{self.name}: the network namespace {self._netns} was removed or replaced")
        self._downs_before, self._downs_at_start = self.downs + 1, 0
        self._former.append(self._inner)
        self._inner = None
        self._opened = trio.Event()
        trio.lowlevel.notify_closing(self.fd)
        self.fd = -1

    def _enter(self) -> None:
        if identity(self._netns) == ABSENT:
            self._refused = ""
            return
        try:
            with entered(self._netns):
                inner, namespace = PacketLink.open(self.name), identity(None)
            self._use(inner, namespace)
            inner.expect(*self._expected)
            if self._restricted:
                inner.restrict(True)
        except OSError as error:
            # EINVAL: the file exists, but the namespace is not mounted on it yet.
            is_early = error.errno in (errno.EINVAL, errno.ENOENT)
            self._refused = "" if is_early else f"cannot enter the network namespace {self._netns}: {error.strerror}"
        except IncoError as error:
            self._refused = str(error)
        else:
            report(logger, logging.INFO, f"{self.name}: opened in the new network namespace {self._netns}")

    async def wait_readable(self) -> None:
        if self._former:
            await trio.lowlevel.checkpoint()
            return
        if self._inner is None:
            await self._opened.wait()
            return
        try:
            await self._inner.wait_readable()
        except trio.ClosedResourceError:
            if self._closed:
                raise

    def receive_into(self, rooms: Sequence[memoryview], step: int) -> list[int]:
        while self._former:
            try:
                lengths = self._former[0].receive_into(rooms, step)
            except OSError:
                lengths = []
            if lengths:
                return lengths
            self._close_former()
        return [] if self._inner is None else self._inner.receive_into(rooms, step)

    def receive_one(self, room: memoryview) -> int:
        while self._former:
            try:
                length = self._former[0].receive_one(room)
            except OSError:
                length = -1
            if length >= 0:
                return length
            self._close_former()
        return -1 if self._inner is None else self._inner.receive_one(room)

    def _close_former(self) -> None:
        former = self._former.pop(0)
        self._dropped += former.dropped()
        former.close()

    def expect(self, inbound: Collection[bytes], outbound: Collection[bytes]) -> None:
        self._expected = inbound, outbound
        if self._inner is not None:
            self._inner.expect(inbound, outbound)

    def restrict(self, on: bool) -> bool:
        self._restricted = self._inner is not None and self._inner.restrict(on)
        return self._restricted

    def stands_for(self, frame: memoryview, length: int) -> int:
        return 1 if self._inner is None else self._inner.stands_for(frame, length)

    def _running(self) -> PacketLink:
        """Return the inner link. Raises LinkDownError if the namespace is gone."""
        if self._inner is None:
            raise LinkDownError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        return self._inner

    def frame(self, name: str) -> bytes:
        return self._running().frame(name)

    def send(self, name: str) -> None:
        self._running().send(name)

    def send_frame(self, frame: bytes) -> None:
        self._running().send_frame(frame)

    async def wait_for_room(self) -> None:
        try:
            await self._running().wait_for_room()
        except (trio.ClosedResourceError, LinkDownError):
            if self._closed:
                raise

    async def changed(self) -> None:
        async def first(wait: Callable[[], Awaitable[None]]) -> None:
            await wait()
            nursery.cancel_scope.cancel()

        looks = self._inner is None or self._former or not self._all_watched
        with trio.move_on_after(LOOK_AGAIN if looks else math.inf):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first, self._wait_for_name)
                if self._inner is not None:
                    nursery.start_soon(first, self._inner.changed)

    async def _wait_for_name(self) -> None:
        await self._names.wait(self._watched)

    def dropped(self) -> int:
        before, self._dropped = self._dropped, 0
        return before + (0 if self._inner is None else self._inner.dropped())

    def close(self, *, remove: bool = False) -> None:
        self._closed = True
        self._names.forget(self._watched)
        for link in (*self._former, *([] if self._inner is None else [self._inner])):
            link.close(remove=remove)
