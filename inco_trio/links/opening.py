"""Open the link that an address specifies."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from inco_trio.errors import DENIED, STRERROR, LinkNotFoundError, PermissionDeniedError, from_os_error
from inco_trio.links.address import InterfaceAddress, UnixAddress
from inco_trio.links.link import Link
from inco_trio.linux.netns import belongs_here, entered, identity

if TYPE_CHECKING:
    from inco_trio.links.names import Names

__all__ = ["Surroundings", "open_link"]


class Surroundings:
    """Resources that all links of a process share, opened when first needed."""

    def __init__(self) -> None:
        self._names: Names | None = None

    def names(self, asking: str) -> Names:
        """Return the shared watcher of paths. Raises a ResourceError that names the link `asking`."""
        from inco_trio.links.names import Names

        if self._names is None:
            try:
                self._names = Names()
            except OSError as error:
                raise from_os_error(error, asking, f"inotify: {STRERROR}") from error
        return self._names

    def close(self) -> None:
        if self._names is not None:
            self._names.close()


def inside(netns: Path | None, asking: str) -> ExitStack:
    """Enter `netns` for the link `asking`. Raises LinkNotFoundError, PermissionDeniedError, ResourceError."""
    try:
        return entered(netns)
    except OSError as error:
        missing = f"there is no network namespace {netns} (create it with `ip netns add NAME`)"
        raise from_os_error(
            error,
            asking,
            f"cannot enter the network namespace {netns}: {STRERROR}",
            ((errno.ENOENT,), LinkNotFoundError, missing),
            (DENIED, PermissionDeniedError, f"entering the network namespace {netns} needs CAP_SYS_ADMIN"),
        ) from error


def open_link(
    address: InterfaceAddress | UnixAddress,
    netns: Path | None,
    held: int | None,
    note: memoryview,
    around: Surroundings,
) -> tuple[Link, Link | None]:
    """Return the link and, if the inherited descriptor `held` no longer fits, a second link for `held`.

    `netns` is the network namespace of an interface (default: the current namespace). `note` is 16 bytes of memory that
    outlive the process. Raises LinkNotFoundError, PermissionDeniedError, ResourceError.
    """
    # Import only the module that is needed, so that the proxy starts faster.
    link: Link
    if isinstance(address, UnixAddress):
        from inco_trio.links.unix import UnixLink

        names = around.names(address.name)
        if held is None:
            return UnixLink.open(address, note, names), None
        link = UnixLink.take(address, held, note, names)
        return (link, None) if link.fits else (UnixLink.open(address, note, names), link)

    from inco_trio.links.packet import PacketLink

    with inside(netns, address.name):
        stale = None if held is None else PacketLink.take(address.name, held)
        fits = stale is not None and held is not None and stale.fits and belongs_here(held)
        inner = stale if fits and stale is not None else PacketLink.open(address.name)
        stale, namespace = None if fits else stale, identity(None)
    if netns is None:
        return inner, stale
    from inco_trio.links.namespace import NamespaceLink

    return NamespaceLink(inner, netns, namespace, around.names(address.name)), stale
