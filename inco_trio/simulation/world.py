"""Two cores as network namespaces, for `inco-trio demo`, the tests and the benchmarks.

Only descriptors keep these namespaces alive (network_namespaces(7)). When the process ends, even by SIGKILL, the kernel
removes the namespaces and their links. A separate thread enters the namespace to change links, so the calling thread
stays in its own namespace. Creating namespaces needs CAP_SYS_ADMIN, which every user has in a new user namespace
(user_namespaces(7)). See `may_make_namespaces` and `new_user_namespace`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import attrs

from inco_trio import real_clock
from inco_trio.cores.peer import Peer
from inco_trio.errors import PermissionDeniedError, ResourceError
from inco_trio.linux.capabilities import CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN
from inco_trio.linux.netns import CLONE_NEWNET, CLONE_NEWUSER, set_network, unshare
from inco_trio.linux.rtnetlink import Rtnetlink

__all__ = [
    "Cores",
    "Namespace",
    "NamespaceRefusedError",
    "Peer",
    "may_make_namespaces",
    "namespaces_refusal",
    "new_user_namespace",
    "two_cores",
    "veth",
    "wait_running",
]

T = TypeVar("T")

_LINK_DEADLINE = 120.0
"""Timeout for a link to come up, in seconds. A veth pair needs milliseconds, so only a hang reaches this limit."""


class NamespaceRefusedError(PermissionDeniedError):
    """The system does not allow this user to create namespaces."""


def _refused(what: str, cause: OSError) -> NamespaceRefusedError:
    return NamespaceRefusedError(
        f"cannot create a {what} namespace ({cause.strerror})",
        "run as root, or set these sysctls, as far as this system has them:"
        " kernel.unprivileged_userns_clone=1, user.max_user_namespaces=15000 and"
        " kernel.apparmor_restrict_unprivileged_userns=0",
    )


def may_make_namespaces() -> bool:
    """Return whether this process has the capabilities for network namespaces, their links and raw sockets."""
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    return all(held >> capability & 1 for capability in (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN))


def new_user_namespace() -> None:
    """Move this process, which must have only one thread, into a new user namespace as root.

    The process gets all capabilities over namespaces that it creates. Outside them, it keeps its user's permissions.
    Call this function before any other function of this module: the others start threads, and the kernel may still
    count a thread that has just been joined. Raises NamespaceRefusedError.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWUSER)
        # Without privileges, a process may write gid_map only after it has disabled setgroups(2) (user_namespaces(7)).
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise _refused("user", error) from error


def namespaces_refusal() -> str | None:
    """Return why this process cannot create network namespaces, or None. The process must have only one thread.

    A child process makes the attempt: a process cannot leave a user namespace after the kernel has refused its maps.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if not may_make_namespaces():
                new_user_namespace()
            Namespace()
        except NamespaceRefusedError as refusal:
            os.write(write, str(refusal).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as text:  # noqa: PTH123 - `read` is a descriptor
        reason = text.read()
    os.waitpid(child, 0)
    return reason or None


def _in_thread(function: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(function)
        except RuntimeError as error:
            raise ResourceError("a network namespace", f"cannot start a thread: {error}") from error
        return answer.result()


def _make_network() -> int:
    def make() -> int:
        unshare(CLONE_NEWNET)
        # Disable IPv6, because it sends router solicitations and multicast reports over the links. If /proc/sys is
        # read-only, as in some containers, leave it enabled: these frames do no harm.
        with contextlib.suppress(OSError):
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    try:
        return _in_thread(make)
    except OSError as error:
        raise _refused("network", error) from error


@attrs.frozen
class Namespace(contextlib.AbstractContextManager["Namespace"]):
    """An unnamed network namespace. The kernel destroys it once it has no descriptor, process or socket left.

    `Namespace()` creates a namespace, or raises NamespaceRefusedError. `Namespace(fd)` takes over a descriptor of an
    existing namespace (`/proc/PID/ns/net`).
    """

    fd: int = attrs.field(factory=_make_network)

    @property
    def path(self) -> Path:
        """A path to the namespace that is valid only in this process."""
        return Path(f"/proc/self/fd/{self.fd}")

    def enter(self) -> None:
        """Move the calling thread into the namespace permanently. This method can be a `preexec_fn`."""
        set_network(self.fd)

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread in the namespace, and return its result or raise its exception.

        Sockets and processes that `function` creates stay in the namespace.
        """

        def inside() -> T:
            self.enter()
            return function()

        return _in_thread(inside)

    def close(self) -> None:
        os.close(self.fd)

    def __exit__(self, *raised: object) -> None:
        self.close()


def _with_links(namespace: Namespace | None, change: Callable[[Rtnetlink], None]) -> None:
    def inside() -> None:
        # The socket belongs to the namespace of the thread that opens it.
        links = Rtnetlink()
        try:
            change(links)
        except OSError as error:
            raise ResourceError(f"cannot change a link: {error.strerror}") from error
        finally:
            links.close()

    if namespace is None:
        inside()
    else:
        namespace.run(inside)


def _set_up(namespace: Namespace, name: str, up: bool = True) -> None:
    _with_links(namespace, lambda links: links.set_up(name, up))


def _enslave(namespace: Namespace, name: str, bridge: str) -> None:
    _with_links(namespace, lambda links: links.set_master(name, socket.if_nametoindex(bridge)))


def veth(a: Namespace, a_name: str, b: Namespace, b_name: str) -> None:
    """Connect two namespaces with a veth pair, and leave both of its ends down."""
    _with_links(a, lambda links: links.add_veth(a_name, b_name, b.fd))


def wait_running(name: str, namespace: Namespace | None = None) -> None:
    """Wait until the kernel's link watcher has activated the link. Until then, the kernel silently drops frames.

    Without `namespace`, the link is in the namespace of the calling thread. Raises ResourceError if the link does not
    come up.
    """

    def wait(links: Rtnetlink) -> None:
        deadline = real_clock.monotonic() + _LINK_DEADLINE
        while not ((link := links.interface(name)) and link.activated):
            if not links.wait_blocking(max(0.0, deadline - real_clock.monotonic())):
                raise ResourceError(f"link {name} has not come up within {_LINK_DEADLINE:g} s")

    _with_links(namespace, wait)


@attrs.frozen
class Cores:
    """Two cores and the link between them. The link has the same name in both namespaces.

    If `switch` is set, the link passes through a bridge in that third namespace, as in the board's simulation. Deleting
    core 0's end then leaves core 1's end in place.
    """

    core0: Namespace
    core1: Namespace
    link: str
    switch: Namespace | None = None

    def peer(self) -> Peer:
        """Open core 1's end of the link for blocking code."""
        return Peer(self.link, run=self.core1.run)

    def make_link(self) -> None:
        """Create or recreate the link, and wait until frames pass."""
        if self.switch is None:
            veth(self.core0, self.link, self.core1, self.link)
            _set_up(self.core1, self.link)
        else:
            veth(self.core0, self.link, self.switch, "eth_rpmsg")
            _enslave(self.switch, "eth_rpmsg", "br_rpmsg")
            _set_up(self.switch, "eth_rpmsg")
        self.link_up()

    def delete_link(self) -> None:
        """Delete core 0's end of the link. The kernel also deletes the other end of the veth pair."""
        _with_links(self.core0, lambda links: links.delete(self.link))

    def link_down(self) -> None:
        """Take core 0's end of the link down."""
        _set_up(self.core0, self.link, False)

    def link_up(self) -> None:
        """Bring core 0's end of the link up, and wait until frames pass."""
        _set_up(self.core0, self.link)
        wait_running(self.link, self.core0)
        if self.switch is not None:
            wait_running("eth_rpmsg", self.switch)
        wait_running(self.link, self.core1)

    def _make_switch(self, switch: Namespace) -> None:
        _with_links(switch, lambda links: links.add_bridge("br_rpmsg"))
        _set_up(switch, "br_rpmsg")
        veth(switch, "tap_rpmsg", self.core1, self.link)
        _enslave(switch, "tap_rpmsg", "br_rpmsg")
        _set_up(switch, "tap_rpmsg")
        _set_up(self.core1, self.link)
        wait_running("tap_rpmsg", switch)


@contextlib.contextmanager
def two_cores(link: str = "rpmsg4000", *, chain: bool = False) -> Iterator[Cores]:
    """Create two cores, connected by a running veth pair. Both ends have the name `link`.

    With `chain`, the link is a veth pair, a bridge and a second veth pair. The board's simulation has a tap instead of
    the second pair. Raises NamespaceRefusedError, and ResourceError if the kernel has no veth or bridge.
    """
    with contextlib.ExitStack() as stack:
        core0, core1 = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        switch = stack.enter_context(Namespace()) if chain else None
        cores = Cores(core0, core1, link, switch)
        for core in (core0, core1):
            _set_up(core, "lo")
        if switch is not None:
            cores._make_switch(switch)
        cores.make_link()
        yield cores
