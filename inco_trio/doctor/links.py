"""Checks of a link: whether frames can pass through it, and whether they stay in order."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from inco_trio.doctor.register_files import removal
from inco_trio.doctor.result import Result, fail, ok, permit, warn
from inco_trio.frame import NAME_MAX
from inco_trio.links.address import UnixAddress
from inco_trio.links.peer_socket import directory_of, open_socket
from inco_trio.linux.files import kind_of_file
from inco_trio.linux.processes import read
from inco_trio.linux.rtnetlink import Interface, Rtnetlink
from inco_trio.signals import Direction, Signal
from inco_trio.trust import UnfitFileError

__all__ = ["bound", "interface", "order", "peer", "short_names", "socket_path", "state"]

MTU = 1500
"""The default MTU of Ethernet, in bytes."""


def interface(name: str, netns: Path | None = None) -> tuple[Interface | None, list[Result]]:
    """Return the interface `name` in this thread's network namespace, and the results of its checks.

    `netns` is the path of the namespace. The path appears only in the results.
    """
    try:
        rtnetlink = Rtnetlink()
    except OSError as error:
        return None, [warn("interface", name, f"cannot list interfaces (rtnetlink): {error.strerror}")]
    try:
        found = rtnetlink.interface(name)
        if found is None:
            names = ", ".join(other.name for other in rtnetlink.interfaces()) or "none"
            where = "" if netns is None else f" in the network namespace {netns}"
            text = f"no such interface{where} (available: {names}): create it or use another interface"
            return None, [fail("interface", name, text)]
        master = rtnetlink.interface(index=found.master) if found.master else None
        return found, list(state(found, master))
    finally:
        rtnetlink.close()


def state(found: Interface, master: Interface | None) -> Iterator[Result]:
    """Check that frames can pass through the interface. `master` is the interface's bridge or other master device."""
    name = found.name
    if not found.up:
        yield fail("state", name, "the interface is down", f"ip link set dev {shlex.quote(name)} up")
    elif not found.running and found.carrier:
        text = f"the interface is up and has a carrier, but is not RUNNING: its operational state is {found.state}"
        yield fail("state", name, f"{text} (expected UP)", f"ip link set dev {shlex.quote(name)} state up mode default")
    elif not found.running:
        yield fail("state", name, "the interface is up without a carrier: bring the peer up, or connect the cable")
    else:
        yield ok("state", name, "the interface is up and has a carrier")
    if found.mtu < NAME_MAX:
        text = f"MTU {found.mtu}: too small (signal names have up to {NAME_MAX} bytes)"
        yield fail("mtu", name, text, f"ip link set dev {shlex.quote(name)} mtu {MTU}")
    else:
        yield ok("mtu", name, f"MTU {found.mtu} is large enough")
    if found.is_taken:
        device = "in another network namespace" if master is None else master.name
        fix = None if master is None else f"inco-trio run {shlex.quote(master.name)}"
        kind = found.master_kind
        text = f"is a port of the {kind} {device}, which takes its frames: use the {kind} as the link"
        yield fail("master", name, text, fix)
    else:
        yield ok("master", name, "no bridge, bond or other master device takes its frames")


def short_names(found: Interface, signals: Iterable[Signal]) -> Iterator[Result]:
    """Check that the kernel can send the frames of all outbound signals."""
    from inco_trio.links.packet import too_short  # Import lazily: `unix:` links do not need this.

    outbound = (signal.name.encode() for signal in signals if signal.direction is Direction.OUTBOUND)
    if fault := too_short(found, outbound):
        yield warn("name", found.name, fault)


def order(found: Interface, root: Path = Path("/")) -> Iterator[Result]:
    """Check that receive packet steering and several receive queues do not reorder frames.

    Frames that several CPUs handle at the same time can be reordered. On a virtual interface, the sender's CPU handles
    the frames unless rps_cpus selects a CPU, and the scheduler may move the sender to another CPU.
    """
    name = found.name
    place = root / "sys/class/net" / name
    if read(place / "ifindex") != str(found.index) or (read(place / "address") or "") != found.address.hex(":"):
        text = "cannot inspect the receive queues: /sys belongs to another network namespace"
        yield warn("order", name, text, "mount -t sysfs sysfs /sys")
        return
    if _count(read(root / "sys/devices/system/cpu/online") or "0") == 1:
        yield ok("order", name, "this machine has one CPU: frames stay in order")
        return
    # The frames of a VLAN are steered when the VLAN's lower interface receives them.
    below = sorted(entry.name.removeprefix("lower_") for entry in place.glob("lower_*"))
    for steered in (name, *below):
        yield _steering(steered, root / "sys/class/net" / steered, found.name)


def _steering(name: str, place: Path, link: str) -> Result:
    queues = sorted((place / "queues").glob("rx-*"))
    masks = [mask for queue in queues if (mask := read(queue / "rps_cpus")) is not None]
    cpus = [int(mask.replace(",", "") or "0", 16) for mask in masks]
    fix: str | None = f"echo 1 | tee {shlex.quote(f'/sys/class/net/{name}')}/queues/rx-*/rps_cpus"
    what = "its frames" if name == link else f"the frames of {link}"
    if len(set(cpus)) == 1 and cpus[0]:
        # The kernel selects the CPU by a hash of the frame, and all frames of our EtherType have the same hash.
        return ok("order", name, f"one CPU handles {what}: they stay in order")
    if len(set(cpus) - {0}) > 1:
        text = f"rps_cpus is {', '.join(masks)}: several CPUs handle {what}, which may be reordered"
    elif len(queues) > 1:
        text = f"{len(queues)} receive queues: several CPUs handle {what}, which may be reordered"
    elif not (place / "device").exists():
        text = f"rps_cpus is 0: the sending CPU handles {what}, which may be reordered when the sending CPU changes"
    else:
        return ok("order", name, f"one receive queue without steering: {what} stay in order")
    if not masks:  # The kernel was built without receive packet steering.
        fix = f"ethtool -L {shlex.quote(name)} combined 1" if len(queues) > 1 else None
    return warn("order", name, text, fix)


def _count(ranges: str) -> int:
    """Return the number of CPUs in a list such as "0-3,5" ("List format" in cpuset(7))."""
    ends = [part.partition("-")[::2] for part in ranges.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, last in ends)


def bound(path: str) -> int:
    """Return 0 if a process receives datagrams at `path`, else the errno of connect(2). Nothing is sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    # EPERM means that the socket exists, but is connected to another peer.
    return 0 if code == errno.EPERM else code


def socket_path(address: UnixAddress) -> Iterator[Result]:
    """Check that a proxy can bind the link's socket, or that a process has already bound it."""
    path = Path(address.local)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        yield _socket_directory(address)
        return
    except OSError as error:
        yield fail("socket", path, f"cannot be inspected: {error.strerror}")
        return
    if not stat.S_ISSOCK(mode):
        text = f"{kind_of_file(mode)}, not a socket: the proxy cannot bind its socket"
        yield fail("socket", path, text, removal(path, mode))
        return
    code = bound(address.local)
    if code == 0:
        yield ok("socket", path, "a process has bound this socket")
    elif code == errno.ECONNREFUSED:
        yield ok("socket", path, "the process that bound this socket has ended: the next proxy replaces the socket")
    elif code == errno.EPROTOTYPE:
        yield fail("socket", path, "a socket of another type is bound to this path: use another path")
    else:
        yield fail("socket", path, f"cannot connect to this socket: {os.strerror(code)}")


def _socket_directory(address: UnixAddress) -> Result:
    directory = Path(address.local).parent
    if not directory.exists():
        text = "does not exist: the proxy creates its socket in this directory"
        return fail("socket", directory, text, f"mkdir -p {shlex.quote(str(directory))}")
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        text = f"uid {os.geteuid()} may not create a socket in this directory"
        return fail("socket", directory, text, permit(directory, "u+rwx"))
    try:
        with directory_of(address.local):
            return ok("socket", directory, "the proxy can create its socket in this directory")
    except UnfitFileError as error:
        return fail("socket", directory, f"{error.strerror}; {error.remedy}")
    except OSError as error:
        return fail("socket", directory, f"cannot be inspected: {error.strerror}")


def peer(address: UnixAddress) -> Iterator[Result]:
    """Check that core 1 has bound its socket."""
    try:
        fd = open_socket(address.peer)
    except UnfitFileError as error:
        yield fail("peer", error.filename, f"{error.strerror}; {error.remedy}")
        return
    except OSError:
        pass  # `bound` reports this error.
    else:
        if fd is not None:
            os.close(fd)
    code = bound(address.peer)
    if code == 0:
        yield ok("peer", address.peer, "core 1 has bound this socket")
    elif code in (errno.ENOENT, errno.ECONNREFUSED):
        yield fail("peer", address.peer, f"no process has bound this socket ({os.strerror(code)}): start core 1")
    elif code == errno.EACCES:
        text = f"uid {os.geteuid()} may not send to this socket"
        yield fail("peer", address.peer, text, permit(Path(address.peer), "u+w"))
    else:
        yield fail("peer", address.peer, f"does not receive frames: {os.strerror(code)}")
