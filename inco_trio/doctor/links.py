"""Checks of a link: whether frames can come and go, and come in order."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from inco_trio.doctor.processes import read
from inco_trio.doctor.result import Result, fail, ok, permit, warn
from inco_trio.frame import NAME_MAX
from inco_trio.links.address import UnixAddress
from inco_trio.linux.files import kind_of_file
from inco_trio.linux.rtnetlink import Interface, Rtnetlink

__all__ = ["bound", "interface", "order", "peer", "socket_path", "state"]

MTU = 1500
"""Ethernet's usual one."""


# ---------------------------------------------------------------------------------------------------------- interfaces


def interface(name: str) -> tuple[Interface | None, list[Result]]:
    """The interface of that name in this thread's network namespace, and what there is to say of it."""
    try:
        rtnetlink = Rtnetlink()
    except OSError as error:
        return None, [warn("interface", name, f"interfaces cannot be looked at (rtnetlink): {error.strerror}")]
    try:
        found = rtnetlink.interface(name)
        if found is None:
            names = ", ".join(other.name for other in rtnetlink.interfaces()) or "none"
            text = f"there is no such interface (there are: {names}): make it, or name another one"
            return None, [fail("interface", name, text)]
        master = rtnetlink.interface(index=found.master) if found.master else None
        return found, list(state(found, master))
    finally:
        rtnetlink.close()


def state(found: Interface, master: Interface | None) -> Iterator[Result]:
    """Whether frames can pass; `master` is what the interface is a port of."""
    name = found.name
    if not found.up:
        yield fail("state", name, "the interface is down", f"ip link set dev {shlex.quote(name)} up")
    elif not found.running:
        yield fail("state", name, "the interface is up without a carrier: bring its other end up, or plug it in")
    else:
        yield ok("state", name, "the interface is up and has a carrier")
    if found.mtu < NAME_MAX:
        text = f"MTU {found.mtu}: the longest signal's name has {NAME_MAX} bytes"
        yield fail("mtu", name, text, f"ip link set dev {shlex.quote(name)} mtu {MTU}")
    else:
        yield ok("mtu", name, f"MTU {found.mtu} holds every signal's name")
    if found.port_of == "bridge":
        bridge = "of another network namespace" if master is None else master.name
        fix = None if master is None else f"inco-trio run {shlex.quote(master.name)}"
        text = f"is a port of the bridge {bridge}, which takes its frames: use that as the interface"
        yield fail("bridge", name, text, fix)
    else:
        yield ok("bridge", name, "is no port of a bridge")


def order(found: Interface, root: Path = Path("/")) -> Iterator[Result]:
    """Whether frames can overtake each other: receive packet steering, and several receive queues.

    Frames that several CPUs handle at a time are in no order. Those of a virtual interface are handled by the CPU that
    sends them, and that changes, unless rps_cpus names one.
    """
    name = found.name
    place = root / "sys/class/net" / name
    if read(place / "ifindex") != str(found.index) or (read(place / "address") or "") != found.address.hex(":"):
        yield warn(
            "order",
            name,
            "its queues cannot be looked at: /sys is not that of this network namespace",
            "mount -t sysfs sysfs /sys",
        )
        return
    if _count(read(root / "sys/devices/system/cpu/online") or "0") == 1:
        yield ok("order", name, "this machine has one CPU: its frames stay in order")
        return
    # A VLAN's frames were steered when the interface below it received them.
    below = sorted(entry.name.removeprefix("lower_") for entry in place.glob("lower_*"))
    for steered in (name, *below):
        yield _steering(steered, root / "sys/class/net" / steered, found.name)


def _steering(name: str, place: Path, link: str) -> Result:
    queues = sorted((place / "queues").glob("rx-*"))
    masks = [mask for queue in queues if (mask := read(queue / "rps_cpus")) is not None]
    cpus = [int(mask.replace(",", "") or "0", 16) for mask in masks]
    where = shlex.quote(f"{Path('/sys/class/net', name)}")
    fix = f"echo 1 | tee {where}/queues/rx-*/rps_cpus"
    what = "its frames" if name == link else f"the frames of {link}"
    if len(set(cpus)) == 1 and cpus[0].bit_count() == 1:
        return ok("order", name, f"one CPU handles {what}, which stay in order")
    if any(mask.bit_count() > 1 for mask in cpus) or len(set(cpus) - {0}) > 1:
        text = f"rps_cpus is {', '.join(masks)}: several CPUs handle {what}, which can overtake each other"
    elif len(queues) > 1:
        text = f"{len(queues)} receive queues: several CPUs handle {what}, which can overtake each other"
    elif not (place / "device").exists():
        text = f"rps_cpus is 0: the CPU that sends {what} handles them; when it changes, they can overtake each other"
    else:
        return ok("order", name, f"one receive queue without steering: {what} stay in order")
    if not masks:
        # A kernel without RPS.
        return warn("order", name, text, f"ethtool -L {shlex.quote(name)} combined 1" if len(queues) > 1 else None)
    return warn("order", name, text, fix)


def _count(ranges: str) -> int:
    """How many CPUs a list as "0-3,5" names (cpuset(7), List format)."""
    ends = [part.partition("-")[::2] for part in ranges.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, last in ends)


# ------------------------------------------------------------------------------------------------------------- sockets


def bound(path: str) -> int:
    """Return 0 if a process receives datagrams at `path`, else the errno of connect(2), which sends nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    # A connected socket accepts no other peer.
    return 0 if code == errno.EPERM else code


def socket_path(address: UnixAddress) -> Iterator[Result]:
    """Check that the proxy can bind its socket or has bound it; `proxies` reports which process has."""
    path = Path(address.local)
    quoted = shlex.quote(address.local)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        yield _socket_directory(path.parent)
        return
    except OSError as error:
        yield fail("socket", path, f"cannot be looked at: {error.strerror}")
        return
    if not stat.S_ISSOCK(mode):
        fix = f"rmdir {quoted}" if stat.S_ISDIR(mode) else f"rm {quoted}"
        yield fail("socket", path, f"is no socket but {kind_of_file(mode)}: the proxy cannot be bound there", fix)
        return
    code = bound(address.local)
    if code == 0:
        yield ok("socket", path, "a process is bound there")
    elif code == errno.ECONNREFUSED:
        yield ok("socket", path, "is that of a process that has ended: the next proxy takes it over")
    elif code == errno.EPROTOTYPE:
        yield fail("socket", path, "a live process is bound there, by another type of socket: name another path")
    else:
        yield fail("socket", path, f"cannot be connected to: {os.strerror(code)}")


def _socket_directory(directory: Path) -> Result:
    if not directory.exists():
        return fail(
            "socket", directory, "does not exist: sockets are made there", f"mkdir -p {shlex.quote(str(directory))}"
        )
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        text = f"uid {os.geteuid()} may not make a socket there"
        return fail("socket", directory, text, permit(directory, "u+rwx"))
    return ok("socket", directory, "the proxy can make its socket there")


def peer(address: UnixAddress) -> Iterator[Result]:
    """Whether core 1 is there."""
    code = bound(address.peer)
    if code == 0:
        yield ok("peer", address.peer, "core 1 is bound there")
    elif code in (errno.ENOENT, errno.ECONNREFUSED):
        yield fail("peer", address.peer, f"no process is bound there ({os.strerror(code)}): start core 1, as QEMU")
    elif code == errno.EACCES:
        text = f"uid {os.geteuid()} may not send to it"
        yield fail("peer", address.peer, text, permit(Path(address.peer), "u+w"))
    else:
        yield fail("peer", address.peer, f"takes no frames: {os.strerror(code)}")
