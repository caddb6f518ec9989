"""Opens the link that an address names."""

from __future__ import annotations

from contextlib import ExitStack

from inco_trio.errors import ResourceRefused
from inco_trio.links.address import InterfaceAddress, UnixAddress
from inco_trio.links.link import Link

__all__ = ["open_link"]


def open_link(
    address: InterfaceAddress | UnixAddress, held: int | None, note: memoryview, resources: ExitStack
) -> tuple[Link, Link | None]:
    """The link, and the one of the inherited descriptor `held` if that does not fit any more.

    `note` is 16 bytes of memory that outlive the process with the descriptor. `resources` closes what the link needs
    besides. Raises PermissionRefused, ResourceRefused.
    """
    # Each kind is imported only where it is used: start-up time is an outage.
    link: Link
    if isinstance(address, InterfaceAddress):
        from inco_trio.links.packet import PacketLink

        if held is None:
            return PacketLink.open(address.name), None
        link = PacketLink.take(address.name, held)
        return (link, None) if link.fits else (PacketLink.open(address.name), link)

    from inco_trio.links.names import Names
    from inco_trio.links.unix import UnixLink

    try:
        names = Names()
    except OSError as error:
        raise ResourceRefused(
            f"{address.name}: inotify: {error.strerror}: raise fs.inotify.max_user_instances or ulimit -n"
        ) from error
    resources.callback(names.close)
    if held is None:
        return UnixLink.open(address, note, names), None
    link = UnixLink.take(address, held, note, names)
    return (link, None) if link.fits else (UnixLink.open(address, note, names), link)
